"""Videos of several motions: what the dataset file says is what moves, and the same settings make the same
videos."""

import hashlib

import numpy as np
import pytest

from vmae.cli import main
from vmae.data.decode import open_video
from vmae.data.write_video import write_video
from vmae.errors import InputError
from vmae.evaluate.temporal import read_actionformer, read_videos
from vmae.synthetic.moving_segments import (
    FPS,
    MOTIONS,
    REST,
    Part,
    SegmentsConfig,
    clip_part,
    plan,
    states_of,
    timeline,
    write_segments_world,
)
from vmae.synthetic.moving_shapes import VELOCITIES, render_states

TINY = SegmentsConfig(seconds=9, training=2, test=1, clips=2, clip_frames=4, seed=3)


def test_a_timeline_leaves_nothing_out_and_rests_between():
    config = SegmentsConfig(seconds=30)
    for seed in range(20):
        parts = timeline(config, seed)
        assert parts[0].first == 0 and parts[-1].end == 30 * FPS
        assert all(one.end == other.first for one, other in zip(parts, parts[1:]))
        assert [part.motion == REST for part in parts] == [number % 2 == 0 for number in range(len(parts))]
        assert all(FPS <= part.end - part.first <= 4 * FPS for part in parts[1::2]) and len(parts) > 4
    assert {part.motion for seed in range(20) for part in timeline(config, seed)} == {REST, *MOTIONS}


def test_states_move_where_the_segments_say():
    parts = [
        Part(REST, 0, 5),
        Part("left", 5, 12, 0.05),
        Part(REST, 12, 14),
        Part("grow", 14, 20, 0.04),
        Part(REST, 20, 24),
    ]
    drawn = states_of(parts, 7)
    assert drawn.shape == (24, 4) and drawn.min() >= 0 and drawn.max() < 1
    step = (np.diff(drawn, axis=0) + 0.5) % 1 - 0.5  # from each frame to the next
    for part in parts:
        expected = part.speed * np.asarray(VELOCITIES.get(part.motion, (0, 0, 0, 0)))
        assert np.allclose(step[part.first : part.end], expected)
    segment = parts[1].segment("v")
    assert (segment.start, segment.end, segment.label) == (5 / FPS, 1.0, "left")


def test_the_world(tmp_path):
    paths = write_segments_world(tmp_path, TINY)
    files = sorted([*(tmp_path / "videos").iterdir(), *(tmp_path / "clips").iterdir()])
    before = {file: (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).digest()) for file in files}
    files[-1].unlink()
    assert write_segments_world(tmp_path, TINY) == paths  # goes on
    assert all(
        hashlib.sha256(file.read_bytes()).digest() == before[file][1] for file in files
    )  # deterministic
    assert all(file.stat().st_mtime_ns == before[file][0] for file in files[:-1])
    videos, several = read_videos(paths["dataset"]), plan(TINY)[0]
    assert {name: info.subset for name, info in videos.items()} == {
        "training_0000": "training",
        "training_0001": "training",
        "test_0000": "test",
    }
    moving = sum(part.motion != REST for parts in several.values() for part in parts)
    assert len(read_actionformer(paths["dataset"])) == moving > 0
    with open_video(paths["videos"] / "test_0000.mp4") as reader:
        assert len(reader) == 9 * FPS == videos["test_0000"].duration * videos["test_0000"].fps
        pixels = reader.frames(range(len(reader))).astype(int)
    # Encoded pictures change little while all rests, and more in every motion.
    change = np.abs(np.diff(pixels, axis=0)).mean((1, 2, 3))
    parts = several["test_0000"]
    rests = np.concatenate([change[p.first : p.end] for p in parts if p.motion == REST])
    assert all(change[p.first : p.end].mean() > 3 * rests.mean() for p in parts if p.motion != REST)


def test_the_encoder_makes_the_same_file_every_time(tmp_path):
    """Of a clip that x264 with its macroblock tree encodes in several ways."""
    config = SegmentsConfig()
    seed = plan(config)[2]["clip_0043"]
    pictures = render_states(states_of([clip_part(config, "right", seed)], seed), config.size, seed)
    made = set()
    for _ in range(25):
        write_video(tmp_path / "v.mp4", pictures, fps=FPS)
        made.add((tmp_path / "v.mp4").read_bytes())
    assert len(made) == 1


def test_clips_are_balanced_and_named(tmp_path):
    paths = write_segments_world(tmp_path, TINY)
    lines = [line.split() for line in paths["clips"].read_text().splitlines()]
    classes = paths["classes"].read_text().splitlines()
    assert classes == [*MOTIONS, REST]
    assert [sum(int(label) == number for _, label in lines) for number in range(7)] == [2] * 7
    assert all((tmp_path / name).is_file() for name, _ in lines)


def test_another_seed_is_another_world():
    one, two = plan(TINY)[2], plan(SegmentsConfig(seconds=9, training=2, test=1, clips=2, seed=4))[2]
    assert not set(one.values()) & set(two.values()) and len(set(one.values())) == len(one)


def test_bad_input(tmp_path, capsys):
    for change, message in (
        (dict(size=33), "even"),
        (dict(seconds=5), "too short"),
        (dict(motions=("left", "fly")), "unknown motions: fly"),
        (dict(test=0), "test must be a whole number from 1"),
        (dict(motions=("left", "left")), "twice"),
    ):
        with pytest.raises(InputError, match=message):
            SegmentsConfig(**change)
    (tmp_path / "segments.json").write_text("{}")
    words = [
        "moving-segments",
        str(tmp_path),
        "--seconds",
        "9",
        "--training",
        "1",
        "--test",
        "1",
        "--clips",
        "1",
    ]
    assert main(words) == 2
    assert "videos of other settings" in capsys.readouterr().err
    (tmp_path / "segments.json").unlink()
    assert main([*words, "--motions", "left", "--clip-frames", "3"]) == 0
    assert "dataset.json" in capsys.readouterr().out
