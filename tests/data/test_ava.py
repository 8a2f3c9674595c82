"""AVA's files: what is read is what was written, and what is wrong is named with file and line."""

import pytest

from vmae import InputError
from vmae.data.ava import (
    AvaBox,
    read_actions,
    read_annotations,
    read_detections,
    read_excluded,
    read_person_boxes,
    write_actions,
    write_annotations,
    write_detections,
    write_excluded,
)

GOOD = "1j20qq1JyX4,0902,0.002,0.118,0.714,0.977,12,1\n1j20qq1JyX4,0902,0.002,0.118,0.714,0.977,79,1\n"
ACTIONS = {12: "stand", 79: "talk to (e.g., self, a person, a group)"}


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "a.csv").write_text(text)
        return tmp_path / "a.csv"

    return write


def test_annotations(file, tmp_path):
    rows = read_annotations(file(GOOD + "\nb,5,0,0,1,1,12\n"), ACTIONS)
    box = (0.002, 0.118, 0.714, 0.977)
    assert rows == [
        AvaBox("1j20qq1JyX4", 902, box, 12, person=1),
        AvaBox("1j20qq1JyX4", 902, box, 79, person=1),
        AvaBox("b", 5, (0, 0, 1, 1), 12),
    ]
    assert [row.line for row in rows] == [1, 2, 4] and rows[0].key == ("1j20qq1JyX4", 902)
    write_annotations(tmp_path / "b.csv", rows)
    assert read_annotations(tmp_path / "b.csv") == rows
    assert (tmp_path / "b.csv").read_text().startswith(GOOD)  # as AVA writes it


def test_unlisted_actions(file):
    path = file(GOOD)
    with pytest.raises(
        InputError, match=r"a\.csv, line 2: action 79 is not in the action list, which has 12"
    ):
        read_annotations(path, [12])
    assert [row.action for row in read_annotations(path, [12], skip_unlisted=True)] == [12]
    with pytest.raises(InputError, match="no boxes of listed actions"):
        read_annotations(path, [3], skip_unlisted=True)


@pytest.mark.parametrize(
    "line, message",
    [
        ("v,1,0,0,1.1,1,12,1", r"line 3: box \[0.0, 0.0, 1.1, 1.0\] leaves the frame"),
        ("v,1,-0.1,0,1,1,12,1", "line 3: .* leaves the frame"),
        ("v,1,0.5,0,0.5,1,12,1", "line 3: .* is empty"),
        ("v,1,0,0.9,1,0.1,12,1", "line 3: .* is empty"),
        ("v,1,0,0,1,1", "line 3: 6 columns; write video_id,timestamp"),
        ("v,1.5,0,0,1,1,12,1", "line 3: timestamp '1.5' is no whole number"),
        ("v,-1,0,0,1,1,12,1", "line 3: timestamp '-1'"),
        ("v,1e300,0,0,1,1,12,1", "line 3: timestamp '1e300'"),
        (f"v,1,0,0,1,1,{'9' * 5000},1", "line 3: action 9+ is not in the action list"),
        ("v,1,0,nan,1,1,12,1", "line 3: y1 'nan' is no number"),
        ("v,1,0,0,1,1,twelve,1", "line 3: action_id 'twelve'"),
        (",1,0,0,1,1,12,1", "line 3: no video_id"),
        (GOOD.split("\n")[0], "line 3: says the same as line 1"),
    ],
)
def test_malformed_lines(file, line, message):
    with pytest.raises(InputError, match=rf"a\.csv, {message}"):
        read_annotations(file(GOOD + line + "\n"), ACTIONS)


def test_rounding_is_forgiven(file):
    assert read_annotations(file("v,1,-0.0004,0,1.0009,1,3\n"))[0].box == (0, 0, 1, 1)


def test_detections(file, tmp_path):
    rows = [AvaBox("v", 902, (0.1, 0.2, 0.3, 0.4), 12, 0.875), AvaBox("w", 3, (0, 0, 1, 1), 79, 1e-05)]
    write_detections(tmp_path / "d.csv", rows)
    assert (tmp_path / "d.csv").read_text() == "v,0902,0.1,0.2,0.3,0.4,12,0.875\nw,0003,0,0,1,1,79,1e-05\n"
    assert read_detections(tmp_path / "d.csv", ACTIONS) == rows
    assert read_detections(tmp_path / "d.csv", [79], skip_unlisted=True) == rows[1:]
    with pytest.raises(InputError, match=r"a\.csv, line 1: score 'high' is no number"):
        read_detections(file("v,1,0,0,1,1,12,high\n"))
    with pytest.raises(InputError, match=r"line 1: 7 columns; write .*score"):
        read_detections(file("v,1,0,0,1,1,12\n"))
    assert read_detections(file("")) == []


def test_person_boxes(file):
    # Two lines of one box (a file of labelled boxes), a weak box, an empty action.
    path = file("v,1,0,0,1,1,12,0.9\nv,1,0,0,1,1,79,0.9\nv,1,0,0,0.5,1,,0.7\nv,2,0,0,1,1,,0.85\n")
    rows = read_person_boxes(path, 0.8)
    assert [(row.timestamp, row.action, row.score) for row in rows] == [(1, None, 0.9), (2, None, 0.85)]
    with pytest.raises(InputError, match="no person box with a score of at least 0.95"):
        read_person_boxes(path, 0.95)


def test_excluded(file, tmp_path):
    write_excluded(tmp_path / "e.csv", {("b", 3), ("a", 1000)})
    assert (tmp_path / "e.csv").read_text() == "a,1000\nb,0003\n"
    assert read_excluded(tmp_path / "e.csv") == {("a", 1000), ("b", 3)}
    with pytest.raises(InputError, match=r"line 1: 3 columns; write video_id,timestamp"):
        read_excluded(file("a,1,2\n"))


def test_actions(file, tmp_path):
    first = 'item {\n  name: "talk to (e.g., self, a person, a group)"\n  id: 79\n}\n'
    both = first + 'label {\n  name: "stand"\n  label_id: 12\n  label_type: PERSON_MOVEMENT\n}\n'
    assert list(read_actions(file(both)).items()) == sorted(ACTIONS.items())
    write_actions(tmp_path / "w.pbtxt", ACTIONS)
    assert read_actions(tmp_path / "w.pbtxt") == ACTIONS
    # As the published evaluation reads it: two blanks before each key.
    assert '\n  name: "stand"\n  id: 12\n' in (tmp_path / "w.pbtxt").read_text()


@pytest.mark.parametrize(
    "text, message",
    [
        ("stand, 12\n", "is no action list"),
        ('item {\n  name: "a"\n  id: 1\n}\nitem {\n  name: "b"\n}\n', "line 5: a block needs name"),
        (
            'item {\n  name: "a"\n  id: 1\n}\nitem {\n  name: "b"\n  id: 1\n}\n',
            "line 5: id 1 is also that of 'a'",
        ),
        ('item {\n  name: "a"\n  id: 0\n}\n', "line 1: a block needs"),
        ('item {\n  name: "a"\n  id: 99999999999\n}\n', "line 1: a block needs .* from 1 to 1,000,000,000"),
        (
            f'item {{\n  name: "a"\n  id: {"9" * 5000}\n}}\n',
            "line 1: a block needs .* from 1 to 1,000,000,000",
        ),
    ],
)
def test_malformed_action_lists(file, text, message):
    with pytest.raises(InputError, match=message):
        read_actions(file(text))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_annotations(tmp_path / "none.csv")
    with pytest.raises(InputError, match="cannot write"):
        write_excluded(tmp_path / "none" / "e.csv", set())
