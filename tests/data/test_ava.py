"""AVA's files: what is read is what was written, and what is wrong is named with file and line."""

import pytest

from vmae import InputError
from vmae.data.ava import (
    AvaBox,
    read_actions,
    read_annotations,
    read_detections,
    read_excluded,
    read_ground_truth,
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
        ("v,1.5s,0,0,1,1,12,1", "line 3: timestamp '1.5s' is no number"),
        ("v,inf,0,0,1,1,12,1", "line 3: timestamp 'inf' is no number"),
        ("v,-0.5", "line 3: timestamp '-0.5'"),
        (",1", "line 3: no video_id"),
        ("v,1,0", "line 3: 3 columns; write .*, or video_id,timestamp for a key frame without a box"),
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


KINETICS = (
    "-0zLyBHkWYE,2.345000,0.1,0.2,0.3,0.4,12,0\n-0zLyBHkWYE,2.345000,0.1,0.2,0.3,0.4,79,0\n"
    "-1IlTIWPNs4,12.500000\nmovie,0902,0,0,1,1,12,0\nmovie,0903.000000\nother,7.25,0,0,1,1,80,0\n"
)


def test_ava_kinetics(file, tmp_path):
    """Key frames at parts of a second, and rows of two columns for those without a box."""
    truth = read_ground_truth(file(KINETICS), ACTIONS, skip_unlisted=True)
    assert [row.key for row in truth.rows] == [("-0zLyBHkWYE", 2.345)] * 2 + [("movie", 902)]
    assert truth.empty == 2 and type(truth.rows[2].timestamp) is int
    named = {("-0zLyBHkWYE", 2.345), ("-1IlTIWPNs4", 12.5), ("movie", 902), ("movie", 903), ("other", 7.25)}
    assert truth.frames == named  # also the one whose only action is not listed
    assert read_annotations(file(KINETICS), ACTIONS, skip_unlisted=True) == truth.rows
    write_annotations(tmp_path / "b.csv", truth.rows)
    written = (tmp_path / "b.csv").read_text()
    assert written.startswith("-0zLyBHkWYE,2.345000,") and "movie,0902," in written
    assert read_annotations(tmp_path / "b.csv") == truth.rows
    # Ways to write one time are one key frame; the seventh digit is rounded away, as by ActivityNet's script.
    ways = ["2.345", "02.345000", "2.3450004", "2345e-3"]
    keys = {read_detections(file(f"v,{way},0,0,1,1,12,0.5\n"))[0].key for way in ways}
    assert keys == {("v", 2.345)}
    assert read_excluded(file("v,2.345000\nv,0902\n")) == {("v", 2.345), ("v", 902)}
    write_excluded(tmp_path / "e.csv", {("v", 2.345), ("v", 902)})
    assert (tmp_path / "e.csv").read_text() == "v,2.345000\nv,0902\n"


def test_a_file_of_empty_frames_only(file):
    with pytest.raises(InputError, match="no boxes of listed actions"):
        read_ground_truth(file("v,1\nv,2.5\n"))
    assert read_detections(file("v,1\nv,2.5\n")) == []


WRONG = [
    ("v,1,0,0,1,1,12", "7 columns"),
    ("v,1,0,0,1,1,12,0.5,1", "9 columns"),
    ("v,1,0,0,nan,1,12,0.5", "x2 'nan' is no number"),
    ("v,1,0,0,1,1,12,nan", "score 'nan' is no number"),
    ("v,1,0,0,1,1,12,1.5", "score '1.5' is not from 0 to 1"),
    ("v,1,0,0,1,1,12,-0.1", "score '-0.1' is not from 0 to 1"),
    ("v,1,0.6,0,0.5,1,12,0.5", "is empty"),
    ("v,1,0,0,1.2,1,12,0.5", "leaves the frame"),
    ("v,one,0,0,1,1,12,0.5", "timestamp 'one'"),
    (",1,0,0,1,1,12,0.5", "no video_id"),
    ("v,one", "timestamp 'one'"),
]


@pytest.mark.parametrize(
    "line, message", [*WRONG, ("v,1,0,0,1,1,13,0.5", "action 13 is not in the action list")]
)
def test_wrong_detections_are_dropped_and_told(file, line, message):
    good = "v,1,0,0,1,1,12,0.5\nv,1.5,0,0,1,1,79,1\n"
    path, dropped = file(f"{good}{line}\n{good}"), []
    assert len(read_detections(path, ACTIONS, dropped=dropped)) == 4
    (said,) = dropped
    assert said.startswith(f"{path}, line 3: ") and message in said
    with pytest.raises(InputError, match="line 3"):
        read_detections(path, ACTIONS)


@pytest.mark.parametrize("line, message", WRONG)
def test_wrong_person_boxes_are_dropped_and_told(file, line, message):
    path, dropped = file(f"v,1,0,0,1,1,,0.9\n{line}\nv,2.5,0,0,1,1,,0.9\nv,3\n"), []
    assert [row.timestamp for row in read_person_boxes(path, 0.8, dropped=dropped)] == [1, 2.5]
    assert len(dropped) == 1 and "line 2: " in dropped[0] and message in dropped[0]
    with pytest.raises(InputError, match="line 2"):
        read_person_boxes(path, 0.8)


def test_person_boxes_that_are_all_wrong(file):
    with pytest.raises(InputError, match=r"at least 0.8 \(1 rows are wrong: .*line 1: score '87'"):
        read_person_boxes(file("v,1,0,0,1,1,,87\n"), 0.8, dropped=[])
