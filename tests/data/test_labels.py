"""Labelled lists, class names and label maps, in the formats that the published code reads."""

import json

import pytest
import torch

from vmae.data.labels import (
    convert_head,
    read_any_list,
    read_class_names,
    read_label_map,
    read_labelled_list,
    write_labelled_list,
)
from vmae.data.manifest import VideoEntry, write_list
from vmae.errors import InputError


@pytest.fixture
def world(tmp_path):
    """Videos, and folders of images, one of them named with blanks and a number at its end."""
    for name in ("a.mp4", "b c.mp4", "take 3"):
        (tmp_path / name).write_bytes(b"x")
    for folder in ("frames", "walk 2"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            (tmp_path / folder / f"img_{number:05}.jpg").write_bytes(b"x")
    return tmp_path


def read(world, text, **options):
    (world / "list.txt").write_text(text)
    return read_labelled_list(world / "list.txt", **options)


def test_every_format(world):
    text = "a.mp4 3\nb c.mp4, 0\nframes 2 5\nframes,2,1\nframes 0 3 4\n# comment\n\ntake 3 2\nwalk 2 2 1\n"
    found = read(world, text)
    about = [(entry.path.rsplit("/", 1)[1], entry.kind, entry.start, entry.total) for entry in found.entries]
    assert about == [
        ("a.mp4", "video", 0, -1),
        ("b c.mp4", "video", 0, -1),
        ("frames", "frames", 1, 2),
        ("frames", "frames", 1, 2),
        ("frames", "frames", 0, 3),
        ("take 3", "video", 0, -1),
        ("walk 2", "frames", 1, 2),
    ]
    assert found.labels == [(3,), (0,), (5,), (1,), (4,), (2,), (1,)]
    assert found.num_classes == 6 and not found.multi


def test_several_labels(world):
    found = read(world, "a.mp4 2;0;2\nframes 2 1\n", num_classes=4)
    assert found.labels == [(2, 0), (1,)] and found.multi
    assert found.targets([0, 1]).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.mp4 1\na.mp4 7\n", "line 2: label 7 is out of range; labels are 0 to 6 \\(7 classes\\)"),
        ("a.mp4 -1\n", "line 1: label -1 is out of range"),
        (f"a.mp4 1\na.mp4 {'9' * 5000}\n", "line 2: label 9+ is out of range; labels are 0 to 6"),
        ("a.mp4\n", "line 1: no label at the end"),
        ("nothing.mp4 1\n", "line 1: .*does not exist"),
        ("frames 1\n", "is a folder"),
        ("# only words\n", "has no entries"),
    ],
)
def test_bad_lists(world, text, message):
    with pytest.raises(InputError, match=message):
        read(world, text, num_classes=7)


@pytest.mark.parametrize(
    "label", ["99999999999", "1000000", "9" * 30, "9" * 5000, "0;99999999999", "-1", "-" + "9" * 5000]
)
def test_a_label_that_no_head_could_have_is_named_with_its_line(world, label):
    with pytest.raises(
        InputError, match=r"list.*, line 2: label -?\d+ is out of range; labels are 0 to 999999$"
    ):
        read(world, f"a.mp4 1\na.mp4 {label}\n")


@pytest.mark.parametrize(
    "columns", ["99999999999 1", "0 99999999999 1", "99999999999 3 1", f"{'9' * 5000} 1"]
)
def test_a_folder_of_too_many_images_is_named_with_its_line(world, columns):
    with pytest.raises(InputError, match="line 1: .*more than 1,000,000,000 images"):
        read(world, f"frames {columns}\n")


def test_written_lists_read_back(world):
    first = read(world, "#! stride=2 pattern=img_{:05}.jpg\na.mp4 3;1\n#! stride=default\nframes 0 3 4\n")
    write_labelled_list(world / "made.txt", first.entries, first.labels)
    again = read_labelled_list(world / "made.txt")
    assert again.labels == first.labels
    assert [(e.path, e.start, e.total, e.stride) for e in again.entries] == [
        (e.path, e.start, e.total, e.stride) for e in first.entries
    ]


@pytest.mark.parametrize(
    "text, labelled, labels",
    [
        ("a.mp4 3\nb c.mp4,0\n", True, [(3,), (0,)]),
        ("a.mp4 3;1\nframes 2 1\n", True, [(3, 1), (1,)]),
        ("frames 2 5\n", True, [(5,)]),  # 2 images from 1, not 5 from 2, as the folder shows
        ("walk 2 2 1\ntake 3 2\n", True, [(1,), (2,)]),
        ("frames 0 3\n", False, [None]),
        ("a.mp4\nframes 0 3\n", False, [None, None]),
        ("a.mp4 0 -1\n", False, [None]),
        ("a.mp4 0 -1 17\nb c.mp4\nframes 0 3 2\n", False, [(17,), None, (2,)]),
        ("take 3 0 -1\nwalk 2 0 3 7\n", False, [None, (7,)]),
        ("a.mp4 0 -1\nb c.mp4 0\na.mp4 0 -1\n", False, None),  # one bad line does not make it a labelled list
    ],
)
def test_lists_of_either_kind(world, text, labelled, labels):
    for name in ("walk 2", "frames"):
        (world / name / "img_00003.jpg").unlink(missing_ok=True)
    (world / "list.txt").write_text(text)
    if labels is None:
        with pytest.raises(InputError, match="line 2: malformed: one number after the path"):
            read_any_list(world / "list.txt")
        return
    found = read_any_list(world / "list.txt")
    assert (found.labelled, found.labels, found.problems) == (labelled, labels, [])
    write_list(world / "copy.txt", found.entries, found.labels, labelled=found.labelled)
    again = read_labelled_list(world / "copy.txt") if labelled else read_any_list(world / "copy.txt")
    assert again.labels == labels
    assert [(e.path, e.kind, e.start, e.total) for e in again.entries] == [
        (e.path, e.kind, e.start, e.total) for e in found.entries
    ]


def test_columns_of_pre_training_with_a_label(world):
    found = read(world, "a.mp4 0 -1 3\nb c.mp4,0,-1,2\n")
    assert found.labels == [(3,), (2,)] and [entry.kind for entry in found.entries] == ["video", "video"]


@pytest.mark.parametrize("name, first", [("walk 3", 3), ("2 2", 0)])
def test_a_number_of_the_path_is_no_label(world, name, first):
    """`walk 3 3 3`: folder `walk 3` from 3, not folder `walk` with label 3."""
    (world / name).mkdir()
    for number in range(first, first + 3):
        (world / name / f"img_{number:05}.jpg").touch()
    (world / "list.txt").write_text(f"{name} {first} 3\n")
    found = read_any_list(world / "list.txt")
    assert (found.labelled, found.labels) == (False, [None]) and found.entries[0].path.endswith(name)


@pytest.mark.parametrize("name", ["a\nb.mp4", "a.mp4 ", "a.mp4,", "a\udcff.mp4"])
def test_names_that_no_list_can_hold(tmp_path, name):
    with pytest.raises(InputError, match="rename the file"):
        write_list(tmp_path / "list.txt", [VideoEntry(str(tmp_path / name))])
    assert not list(tmp_path.iterdir())


def test_class_names(tmp_path):
    forms = {
        "plain.txt": "eating cake\nhi, you\n",
        "numbered.csv": 'id,name\n1,"hi, you"\n0,eating cake\n',
        "list.json": '["eating cake", "hi, you"]',
        "dict.json": '{"hi, you": 1, "eating cake": "0"}',
        "comments.txt": "\ufeff# names\r\n\r\neating cake\r\n  #\r\nhi, you\r\n",
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert read_class_names(tmp_path / name) == ["eating cake", "hi, you"], name
    (tmp_path / "tags.txt").write_text("#selfie\n# a comment\nhi\n")
    assert read_class_names(tmp_path / "tags.txt") == ["#selfie", "hi"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("c.txt", "a\na\n", "'a' comes twice"),
        ("c.txt", "0,a\n2,b\n", "not 0 to 1"),
        ("c.txt", "", "names no classes"),
        ("c.json", '{"a": "x"}', "neither a list"),
        ("c.json", "{", "is no JSON"),
    ],
)
def test_bad_class_names(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_class_names(tmp_path / name)


def test_a_head_of_710_becomes_one_of_400(tmp_path):
    numbers = torch.randperm(710)[:400].tolist()
    (tmp_path / "label_710to400.json").write_text(json.dumps(numbers))
    found = read_label_map(tmp_path / "label_710to400.json", source_classes=710, num_classes=400)
    state = {
        "head.weight": torch.randn(710, 8),
        "head.bias": torch.randn(710),
        "fc_norm.weight": torch.randn(8),
    }
    converted = convert_head(state, found)
    features = torch.randn(5, 8)
    before = features @ state["head.weight"].T + state["head.bias"]
    after = features @ converted["head.weight"].T + converted["head.bias"]
    torch.testing.assert_close(after, before[:, numbers])
    assert converted["fc_norm.weight"] is state["fc_norm.weight"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[0, 1]", "misses classes: it maps 2 classes, the target has 3"),
        ("[0, 1, 2, 3]", "has too many"),
        ("[0, 1, 9]", "names class 9, but the source has 5 classes"),
        ("[0, 1, 1]", "two target classes the same"),
        ('{"0": 1}', "no list of whole numbers"),
        ("[0, true, 2]", "no list of whole numbers"),
        ("[", "no JSON"),
    ],
)
def test_bad_maps(tmp_path, content, message):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_label_map(tmp_path / "map.json", source_classes=5, num_classes=3)
