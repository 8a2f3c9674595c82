"""Folders of videos: what is found, in which order, and what is said of the rest."""

import logging
import os

import pytest

from vmae.data.mix import read_data
from vmae.data.video_files import VIDEO_SUFFIXES, find_videos
from vmae.errors import InputError
from vmae.evaluate import features


@pytest.fixture
def folder(tmp_path):
    """Videos of every suffix, in capitals too, some in sub-folders; words, pictures, hidden files and broken
    links."""
    root = tmp_path / "videos"
    (root / "b").mkdir(parents=True)
    for suffix in VIDEO_SUFFIXES:
        (root / "b" / f"x{suffix.upper()}").touch()
    for name in ("b.mp4", "a-1.mp4", "notes.txt", "1.jpg", "2.JPG", "README", "._b.mp4", "#c.mp4"):
        (root / name).touch()
    (root / "gone.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(root / "pipe.mp4")
    return root


def test_every_suffix_in_order_and_the_rest_is_counted(folder, caplog):
    caplog.set_level(logging.INFO, "vmae")
    found = [os.path.relpath(path, folder) for path in find_videos(folder)]
    inside = sorted(f"b/x{suffix.upper()}" for suffix in VIDEO_SUFFIXES)
    assert found == ["#c.mp4", "a-1.mp4", *inside, "b.mp4"]
    assert f"{len(found)} videos; 7 other files skipped (" in caplog.text
    for part in (".jpg 2", "broken links and what is no file 2", ".txt 1", "hidden 1", "no suffix 1"):
        assert part in caplog.text


def test_every_command_finds_the_same(folder):
    found = find_videos(folder)
    assert [entry.path for entry in read_data(folder)] == found
    assert [entry.path for entry in features.find_videos(str(folder), None)] == found
    assert read_data(folder).sources[0].name == "videos"
    (folder.parent / "mix.yaml").write_text("sources:\n- {list: videos}\n")
    mix = read_data(folder.parent / "mix.yaml")
    assert [entry.path for entry in mix] == found and mix.sources[0].name == "videos"


def test_here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_videos(".")[:2] == ["#c.mp4", "a-1.mp4"]
    assert read_data(".").sources[0].name == "videos"


def test_linked_folders_come_once(folder):
    """A data set is often made of links; a link back up is not followed for ever."""
    before = find_videos(folder)
    (folder / "a").symlink_to("b")
    (folder / "b" / "up").symlink_to(folder)
    assert find_videos(folder) == before
    collected = folder.parent / "collected"
    collected.mkdir()
    (collected / "one").symlink_to(folder)
    assert [path.replace("collected/one", "videos") for path in find_videos(collected)] == before


def test_nothing_there(tmp_path):
    (tmp_path / "img_00001.jpg").touch()
    with pytest.raises(InputError, match="holds no videos .*; 1 other files skipped .*frames need a list"):
        find_videos(tmp_path)
    (tmp_path / "val.csv").touch()
    with pytest.raises(InputError, match="give the list .*val.csv"):
        read_data(tmp_path)
    with pytest.raises(InputError, match="'.*none' cannot be read"):
        find_videos(tmp_path / "none")
