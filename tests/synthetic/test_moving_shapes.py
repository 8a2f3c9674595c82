"""The class is the motion and nothing else: a frame alone tells nothing about it."""

import json
import os

import numpy as np
import pytest

from vmae.data.decode import open_video
from vmae.data.manifest import read_list
from vmae.errors import InputError
from vmae.synthetic.moving_shapes import (
    LABEL_SETS,
    MOTIONS,
    SAME_NAMES,
    VELOCITIES,
    WorldConfig,
    plan_world,
    render,
    states,
    write_world,
)

TINY = WorldConfig(size=32, frames=6, unlabeled=14, few=2, many=2, shared=1, validation=2, seed=3)


def test_videos_of_a_seed_start_with_the_same_picture_whatever_their_class():
    for seed in (0, 1):
        first = [render(motion, 32, 6, seed) for motion in MOTIONS]
        assert all(np.array_equal(video[0], first[0][0]) for video in first)
        assert all(not np.array_equal(a[-1], b[-1]) for a, b in zip(first, first[1:]))


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_frame_of_every_class_has_uniform_states(motion):
    drawn = np.stack([states(motion, 12, seed) for seed in range(600)])  # [seeds, frames, 4]
    assert drawn.min() >= 0 and drawn.max() < 1
    for frame in (0, 3, 6, 11):
        ordered = np.sort(drawn[:, frame], 0)
        distance = np.abs(ordered - np.arange(1, 601)[:, None] / 600).max(0)  # Kolmogorov-Smirnov
        assert (distance < 1.95 / np.sqrt(600)).all()  # one chance in a thousand, for each of four


def steps(motion: str, seed: int, frames: int = 13) -> np.ndarray:
    """float [frames - 1, 4]: from each state to the next, the short way round."""
    drawn = states(motion, frames, seed)
    return (np.diff(drawn, axis=0) + 0.5) % 1 - 0.5


def test_a_class_is_its_velocity():
    for motion, velocity in VELOCITIES.items():
        step = steps(motion, 5)
        assert np.allclose(step, step[0]) and np.allclose(step[0] / np.linalg.norm(step[0]), velocity)


def test_the_order_of_events_is_a_class():
    for motion, moved_first in (("slide_then_spin", True), ("spin_then_slide", False)):
        for seed in range(5):
            step = np.abs(steps(motion, seed))
            slides, spins = step[:, :2].sum(1) > 1e-6, step[:, 2] > 1e-6
            assert (slides != spins).all() and slides[0] == moved_first and slides[-1] != moved_first


def test_unknown_motion():
    with pytest.raises(InputError, match="unknown motion 'sideways'"):
        states("sideways", 4, 0)


def test_world_is_written_once_and_lists_what_is_there(tmp_path, capfd):
    paths = write_world(tmp_path, TINY)
    videos = sorted((tmp_path / "videos").iterdir())
    before = {video: (video.stat().st_mtime_ns, video.read_bytes()) for video in videos}
    videos[0].unlink()
    assert write_world(tmp_path, TINY, workers=2) == paths
    assert videos[0].read_bytes() == before[videos[0]][1]  # deterministic
    assert all(video.stat().st_mtime_ns == before[video][0] for video in videos[1:])  # resumed
    assert len(read_list(paths["unlabeled"])) == 14
    with open_video(videos[0]) as reader:
        assert len(reader) == 6 and reader.frames([5]).shape == (1, 32, 32, 3)
    listed = {
        line.split()[0]
        for name in ("unlabeled", "train_a", "val_a", "train_b", "val_b")
        for line in open(paths[name])
    }
    assert listed == {f"videos/{video.name}" for video in videos}
    assert json.loads(paths["same"].read_text()) == SAME_NAMES


def test_labels_are_balanced_and_named(tmp_path):
    plan = plan_world(TINY)
    for name, amount in (("a", TINY.few), ("b", TINY.many)):
        motions = [video.motion for video in plan[f"train_{name}"] if video.name.startswith(f"train_{name}")]
        assert all(motions.count(motion) == amount for motion in LABEL_SETS[name].values())
    assert set(SAME_NAMES) <= set(LABEL_SETS["b"]) and set(SAME_NAMES.values()) <= set(LABEL_SETS["a"])


def test_sets_share_videos_across_splits():
    plan = plan_world(TINY)
    names = {split: {video.name for video in videos} for split, videos in plan.items()}
    assert len(names["train_b"] & names["train_a"]) == len(names["train_b"] & names["val_a"]) == 6
    seeds = [video.seed for videos in plan.values() for video in videos]
    assert len(set(seeds)) == len(seeds) - 12


def test_another_seed_is_another_world():
    other = plan_world(WorldConfig(seed=4))["unlabeled"][0]
    assert other.seed != plan_world(WorldConfig(seed=3))["unlabeled"][0].seed


def test_pictures_survive_the_encoder(tmp_path):
    from vmae.data.write_video import write_video

    pictures = render("right", 64, 8, 1)
    write_video(tmp_path / "v.mp4", pictures)
    with open_video(tmp_path / "v.mp4") as reader:
        error = np.abs(reader.frames(range(8)).astype(int) - pictures)
    assert error.mean() < 6 and b"avc1" in (tmp_path / "v.mp4").read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_bad_input(tmp_path):
    wrong = (
        (dict(size=33), "size must be even"),
        (dict(few=0), "few must be a whole"),
        (dict(shared=9), "cannot share"),
    )
    for change, message in wrong:
        with pytest.raises(InputError, match=message):
            WorldConfig(**change)
    (tmp_path / "world.json").write_text("{}")
    with pytest.raises(InputError, match="other settings"):
        write_world(tmp_path, TINY)
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(InputError, match="cannot write"):
            write_world(tmp_path / "locked" / "x", TINY)
