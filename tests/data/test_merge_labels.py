"""Merging label sets: names, duplicates across sources and splits, and the maps back."""

import json

import pytest

from vmae.cli import main
from vmae.data.labels import LabelledList, read_class_names, read_label_map, read_labelled_list
from vmae.data.manifest import VideoEntry
from vmae.data.merge_labels import LabelSource, merge_sources, normalise_name, video_id
from vmae.errors import InputError


def videos(*lines: str, classes: int) -> LabelledList:
    paths, labels = zip(*(line.rsplit(" ", 1) for line in lines), strict=True)
    return LabelledList(
        [VideoEntry(path) for path in paths], [(int(label),) for label in labels], classes, False
    )


def two_sources() -> list[LabelSource]:
    small = LabelSource(
        name="small",
        classes=["Eating cake", "running", "sleeping"],
        train=videos("s/one.mp4 0", "s/two.mp4 1", "s/three.mp4 2", classes=3),
        val=videos("s/val.mp4 1", classes=3),
    )
    large = LabelSource(
        name="large",
        classes=["jumping", "eating_cake", "dozing", "running (fast)"],
        train=videos("l/four.mp4 0", "l/one.webm 1", "l/val.mkv 3", "l/two.mp4 2", "l/held.mp4 0", classes=4),
        val=videos("l/held.mp4 0", "l/three.mp4 2", classes=4),
    )
    return [small, large]


def test_names_duplicates_and_splits():
    merged = merge_sources(two_sources(), {"Dozing": "sleeping"})
    assert merged.classes == ["Eating cake", "running", "sleeping", "jumping", "running (fast)"]
    assert merged.maps == {"small": [0, 1, 2], "large": [3, 0, 2, 4]}
    assert [(entry.path, labels) for entry, labels in merged.val] == [
        ("s/val.mp4", (1,)),
        ("l/held.mp4", (3,)),
        ("l/three.mp4", (2,)),
    ]
    # `three` is validated on by the other source, `one` and `two` come from the first, `val` and `held` are
    # validated on
    assert [(entry.path, labels) for entry, labels in merged.train] == [
        ("s/one.mp4", (0,)),
        ("s/two.mp4", (1,)),
        ("l/four.mp4", (3,)),
    ]
    assert merged.report["videos"]["train, large"] == {
        "listed": 5,
        "kept": 1,
        "duplicates": 2,
        "in_validation": 2,
    }
    assert merged.report["videos"]["train, small"] == {
        "listed": 3,
        "kept": 2,
        "duplicates": 0,
        "in_validation": 1,
    }
    assert merged.report["conflicts"] == 2  # two: running or dozing; val: running or running (fast)
    assert merged.report["first_conflicts"][1] == "two: running; large says sleeping"
    assert merged.report["merged_classes"] == {
        "Eating cake": ["small: Eating cake", "large: eating_cake"],
        "sleeping": ["small: sleeping", "large: dozing"],
    }


def test_names_may_be_merged_into_a_later_source():
    merged = merge_sources(two_sources(), {"sleeping": "dozing", "running": "running fast"})
    assert merged.classes == ["Eating cake", "running (fast)", "dozing", "jumping"]
    assert merged.maps == {"small": [0, 1, 2], "large": [3, 0, 2, 1]}


def test_normalised_names():
    for name in (" Playing_the  “Piano”, ＦＡＳＴ ", "playing-the piano (fast)"):
        assert normalise_name(name) == "playing the piano fast"


def test_video_ids():
    assert video_id("x/abc_def-123_000001_000011.mp4") == "abc_def-123_000001_000011"
    assert video_id("x/abc_def-123_000001_000011.mp4", "^.{11}") == "abc_def-123"
    assert video_id("frames/some.folder") == "some.folder"
    with pytest.raises(InputError, match="finds nothing in 'short'"):
        video_id("short.mp4", "^(.{11})")


@pytest.mark.parametrize(
    "same, message",
    [
        ({"napping": "sleeping"}, "'napping', which is no class of any source"),
        ({"dozing": "sleeping", "sleeping": "dozing"}, "in a circle"),
        ({"running": "sleeping"}, "source 'small': 'running' and 'sleeping' would become one class"),
    ],
)
def test_bad_same_names(same, message):
    with pytest.raises(InputError, match=message):
        merge_sources(two_sources(), same)


def test_nothing_left_and_names_of_sources():
    small, large = two_sources()
    with pytest.raises(InputError, match="each its own"):
        merge_sources([small, small])
    held = LabelSource(
        name="held", classes=large.classes, train=videos("l/held.mp4 0", classes=4), val=large.val
    )
    with pytest.raises(InputError, match="no video is left"):
        merge_sources([held])


@pytest.fixture
def folder(tmp_path):
    for name in ("one.mp4", "two.mp4", "val.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "names.txt").write_text("walk\nrun\n")
    (tmp_path / "other.txt").write_text("strolling\nRun\n")
    (tmp_path / "train.txt").write_text("one.mp4 0\ntwo.mp4 1\n")
    (tmp_path / "val.txt").write_text("val.mp4 1\n")
    (tmp_path / "same.json").write_text('{"strolling": "walk"}')
    return tmp_path


def test_command_writes_what_the_readers_read(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    first, second = (
        ["--source", "k", "names.txt", "train.txt", "val.txt"],
        ["--source", "j", "other.txt", "val.txt", "-"],
    )
    assert main(["merge-labels", "out", *first, *second, "--same", "same.json"]) == 0
    assert "4 classes of 2 sources make 2" in capsys.readouterr().out
    assert read_class_names("out/classes.txt") == ["walk", "run"]
    assert read_label_map("out/label_2toj.json", source_classes=2, num_classes=2) == [0, 1]
    train = read_labelled_list("out/train.txt", num_classes=2)
    assert train.labels == [(0,), (1,)] and train.entries[0].path == str(folder / "one.mp4")
    assert read_labelled_list("out/val.txt").labels == [(1,)]
    assert (
        json.loads((folder / "out" / "report.json").read_text())["videos"]["train, j"]["in_validation"] == 1
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (["--source", "j", "missing.txt", "train.txt", "-"], "'missing.txt' does not exist"),
        (["--source", "j", "one_class.txt", "train.txt", "-"], "label 1 is out of range"),
        (["--source", "j", "other.txt", "-", "-"], "no list to train on"),
        (["--data-root", "x", "."], "no such source"),
        (["--video-id", "("], "no regular expression"),
        (["--same", "names.txt"], "is no JSON"),
    ],
)
def test_command_explains(folder, monkeypatch, capsys, change, message):
    monkeypatch.chdir(folder)
    (folder / "one_class.txt").write_text("walk\n")
    assert main(["merge-labels", "out", "--source", "k", "names.txt", "train.txt", "val.txt", *change]) == 2
    assert message in capsys.readouterr().err and not (folder / "out").exists()
