"""Features of windows equal those of a loop that decodes each window separately."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vmae import InputError, ModelConfig, build_classifier
from vmae.checkpoint.folder import export_weights
from vmae.cli import main
from vmae.data.decode import DecodeError, open_video
from vmae.data.manifest import VideoEntry
from vmae.evaluate import features
from vmae.evaluate.features import (
    WindowConfig,
    extract,
    extract_videos,
    features_of,
    name_targets,
    read_features,
    windows,
)
from vmae.synthetic.samples import sample_videos
from vmae.train.guard import LateNumbers

CONFIG = ModelConfig(img_size=32, num_frames=8, embed_dim=48, depth=2, num_heads=3)


@pytest.fixture(scope="module")
def video() -> str:
    return str(sample_videos()[2])  # 120 frames of 176 x 144


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_classifier(CONFIG, 5).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    clip = {"num_frames": 8, "image_size": 32}
    settings = {"model": CONFIG.to_dict(), "num_classes": 5, "clip": clip}
    export_weights(tmp_path / "weights.pth", model.state_dict(), config=settings)
    return tmp_path / "weights.pth"


def published_loop(model, path, step):
    """One window after the other, each decoded and resized separately."""
    found = []
    with open_video(VideoEntry(path)) as reader, torch.no_grad():
        for start in range(0, len(reader) - 7, step):
            frames = (
                torch.from_numpy(reader.frames(range(start, start + 8))).permute(3, 0, 1, 2).float() / 255
            )
            frames = F.interpolate(frames, size=(32, 32), mode="bilinear", align_corners=False)
            found.append(model.features(frames[None]))
    return torch.cat(found).numpy()


@pytest.mark.parametrize("step", [4, 8, 11])
def test_the_same_as_window_by_window(model, video, step):
    config = WindowConfig(frames=8, step=step, size=(32, 32))
    found = extract(model, VideoEntry(video), config, batch_size=5, device=torch.device("cpu"))
    expected = published_loop(model, video, step)
    assert found.shape == (len(config.starts(120)), 48) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_normalising_changes_them(model, video):
    plain, normalized = (
        extract(
            model,
            VideoEntry(video),
            WindowConfig(frames=8, step=40, size=(32, 32), normalize=normalize),
            batch_size=5,
            device=torch.device("cpu"),
        )
        for normalize in (False, True)
    )
    assert plain.shape == normalized.shape and np.abs(plain - normalized).max() > 1e-2


@pytest.mark.parametrize("step", [1, 3, 8, 13])
def test_windows_hold_consecutive_frames(step):
    frames = (np.full((4, 4, 3), number, np.uint8) for number in range(40))
    config = WindowConfig(frames=8, step=step, size=(4, 4))
    first = [[round(float(frame[0, 0, 0]) * 255) for frame in window] for window in windows(frames, config)]
    assert first == [list(range(start, start + 8)) for start in config.starts(40)]


def test_every_reader_iterates_over_its_frames(video):
    for backend in ("pyav", "decord"):
        try:
            reader = open_video(VideoEntry(video), backend)
        except InputError as error:
            if "not installed" in str(error):
                continue
            raise
        with reader:
            frames = list(reader.iterate())
            assert len(frames) == 120 and np.array_equal(
                np.stack(frames[100:104]), reader.frames(range(100, 104))
            )


def test_the_command_continues_after_a_stop(checkpoint, video, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{video}\n{sample_videos()[3]}\n{tmp_path / 'bad.mp4'}\n")
    (tmp_path / "bad.mp4").write_text("no video")
    command = [
        "features",
        str(tmp_path / "list.txt"),
        "--checkpoint",
        str(checkpoint),
        "--output",
        str(tmp_path / "out"),
    ]
    command += ["--step", "32"]
    assert main(command) == 1
    assert "bad.mp4" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    features = ["carphone_distorted.npy", "carphone_pristine.npy"]
    assert files == [*features, "features.json", "undecodable.jsonl", "videos.json"]
    first = read_features(tmp_path / "out" / "carphone_pristine.npy")
    assert first.shape == (4, 48)
    (tmp_path / "out" / "carphone_distorted.npy").unlink()
    before = (tmp_path / "out" / "carphone_pristine.npy").stat().st_mtime_ns
    assert main(command) == 1 and (tmp_path / "out" / "carphone_distorted.npy").exists()
    assert (tmp_path / "out" / "carphone_pristine.npy").stat().st_mtime_ns == before
    assert main([*command[:-1], "16"]) == 2
    assert "other weights or windows" in capsys.readouterr().err


def test_bad_input(checkpoint, tmp_path, capsys):
    end = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    for command, message in (
        ([str(tmp_path / "empty")], "holds no videos"),
        ([str(tmp_path / "none.mp4")], "does not exist"),
        ([str(sample_videos()[2]), "--step", "0"], "--step: must be a whole number from 1"),
        ([str(sample_videos()[2]), "--batch-size", "0"], "--batch-size: must be a whole number from 1"),
    ):
        assert main(["features", *command, *end]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="would both become a.npy"):
        name_targets([VideoEntry("x/a.mp4"), VideoEntry("y/a.mkv")], tmp_path)
    (tmp_path / "bad.npy").write_text("x")
    with pytest.raises(InputError, match="cannot be read"):
        read_features(tmp_path / "bad.npy")


def test_a_video_shorter_than_a_window(model, video):
    config = WindowConfig(frames=200, step=4, size=(32, 32))
    with pytest.raises(InputError, match="has 120 frames, fewer than a window of 200"):
        extract(model, VideoEntry(video), config, batch_size=5, device=torch.device("cpu"))


def test_the_next_windows_are_read_while_a_batch_is_computed(model, monkeypatch):
    """Results are waited for one batch late."""
    events = []

    class Late(LateNumbers):
        def __init__(self, values):
            super().__init__(values)
            events.append("launched")

        def wait(self):
            events.append("waited")
            return super().wait()

    def frames(count):
        for number in range(count):
            if number % 16 == 15:  # the last frame of a batch of two windows of eight
                events.append("read")
            yield np.full((40, 40, 3), number, np.uint8)

    monkeypatch.setattr(features, "LateNumbers", Late)
    config = WindowConfig(frames=8, step=8, size=(32, 32))
    found = list(
        features_of(model, [frames(32), frames(16)], config, batch_size=2, device=torch.device("cpu"))
    )
    assert [len(one) for one in found] == [4, 2]
    assert events == ["read", "launched"] + ["read", "launched", "waited"] * 2 + ["waited"]


def test_batches_span_videos_and_skip_a_bad_one(model, video, tmp_path, monkeypatch):
    """Videos of 29, 0 (bad after some windows) and 29 windows, in batches of 8."""
    config, device = WindowConfig(frames=8, step=4, size=(32, 32)), torch.device("cpu")
    alone = extract(model, VideoEntry(video), config, batch_size=1, device=device)
    (tmp_path / "bad.mp4").write_text("no video")
    sizes, whole = [], model.features_of_embedded
    monkeypatch.setattr(
        model, "features_of_embedded", lambda clips: (sizes.append(len(clips)), whole(clips))[1]
    )

    def frames(broken: bool):
        with open_video(VideoEntry(video)) as reader:
            for number, frame in enumerate(reader.iterate()):
                if broken and number == 40:
                    raise DecodeError("broken after frame 40")
                yield frame

    found = list(
        features_of(model, [frames(False), frames(True), frames(False)], config, batch_size=8, device=device)
    )
    assert isinstance(found[1], DecodeError) and len(found) == 3
    for one in (found[0], found[2]):
        np.testing.assert_allclose(one.numpy(), alone, rtol=0, atol=1e-5)
    # 3 of the broken video's 9 windows fill the first video's last batch, the other 6 are dropped
    assert sizes == [8] * 7 + [5]
    entries = [VideoEntry(str(tmp_path / "bad.mp4")), VideoEntry(video)]
    bad, good = extract_videos(model, entries, config, batch_size=8, device=device)
    assert isinstance(bad, DecodeError) and "bad.mp4" in str(bad)
    np.testing.assert_allclose(good, alone, rtol=0, atol=1e-5)
