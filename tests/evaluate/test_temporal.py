"""Mean average precision of segments, by hand; ActionFormer's dataset file."""

import itertools
import json
import random

import pytest

from vmae import InputError
from vmae.evaluate.temporal import (
    Segment,
    average_precision,
    dropped_note,
    mean_average_precision,
    read_actionformer,
    temporal_iou,
    write_actionformer,
)

TRUTH = [
    Segment("a", 0, 10, "run"),
    Segment("a", 20, 30, "run"),
    Segment("b", 0, 4, "run"),
    Segment("b", 5, 9, "jump"),
]
# Of "run" by score: hit (IoU 0.8), miss (another video), a second on the same truth, hit (0.6); the third
# truth is not found.
FOUND = [
    Segment("a", 0, 8, "run", 0.9),
    Segment("c", 0, 10, "run", 0.8),
    Segment("a", 1, 10, "run", 0.7),
    Segment("a", 20, 26, "run", 0.6),
    Segment("b", 5, 9, "jump", 0.5),
]


def test_iou():
    assert temporal_iou(TRUTH[0], FOUND[0]) == pytest.approx(0.8)
    assert temporal_iou(TRUTH[0], TRUTH[1]) == 0
    assert temporal_iou(Segment("a", 0, 2, "x"), Segment("a", 1, 3, "x")) == pytest.approx(1 / 3)


def test_a_case_by_hand():
    run_truth, run_found = TRUTH[:3], FOUND[:4]
    # Hits: yes, no, no, yes. Precision at the hits 1 and 2/4; three to find: (1 + 0.5) / 3.
    assert average_precision(run_truth, run_found, 0.5) == pytest.approx(0.5)
    assert average_precision(run_truth, run_found, 0.7) == pytest.approx(1 / 3)  # the last hit has 0.6 only
    assert average_precision(run_truth, [], 0.5) == 0
    result = mean_average_precision(TRUTH, FOUND, (0.5, 0.7))
    assert result["map"] == {0.5: pytest.approx(0.75), 0.7: pytest.approx(2 / 3)}
    assert result["average"] == pytest.approx((0.75 + 2 / 3) / 2)
    assert result["classes"]["jump"] == {0.5: 1.0, 0.7: 1.0}


def test_precision_is_interpolated_from_the_right():
    truth = [Segment("a", 10 * i, 10 * i + 5, "x") for i in range(2)]
    found = [
        Segment("a", 50, 55, "x", 0.9),
        *(Segment("a", t.start, t.end, "x", 0.8 - 0.1 * i) for i, t in enumerate(truth)),
    ]
    # Precision 0, 1/2, 2/3: at the first recall the better 2/3 counts.
    assert average_precision(truth, found, 0.5) == pytest.approx(2 / 3)


def test_equal_scores_count_as_one_in_any_order():
    """All scores but the first (a wrong detection) are equal: two of five are correct at their end."""
    truth = [Segment("a", 0, 10, "x"), Segment("a", 20, 30, "x")]
    equal = [
        Segment(video, start, start + 9, "x", 0.5)
        for video, start in (("a", 0), ("a", 1), ("a", 20), ("b", 0))
    ]
    orders = itertools.permutations([Segment("b", 0, 5, "x", 0.9), *equal])
    (value,) = {average_precision(some, order, 0.3) for order in orders for some in (truth, truth[::-1])}
    assert value == pytest.approx(2 / 5)


def test_equal_overlaps_match_the_earliest_truth():
    truth = [Segment("a", 0, 10, "x"), Segment("a", 10, 20, "x")]
    found = [
        Segment("a", 5, 15, "x", 0.9),
        Segment("a", 8, 20, "x", 0.8),
    ]  # IoU 1/3 with each; 10/12 with the second
    assert average_precision(truth, found, 0.3) == average_precision(truth[::-1], found, 0.3) == 1.0


def test_equal_scores_are_matched_by_start_then_end():
    """Of two equal detections with the largest IoU with one segment, the earlier one is matched to it, the
    other to the best segment that is left."""
    truth = [Segment("a", 0, 10, "x"), Segment("a", 6, 16, "x")]
    wide, late = (
        Segment("a", 1, 14, "x", 0.5),
        Segment("a", 2, 10, "x", 0.5),
    )  # IoU 9/14 and 8/15; 8/10 and 4/14
    assert [temporal_iou(wide, one) for one in truth] == pytest.approx([9 / 14, 8 / 15])
    assert [temporal_iou(late, one) for one in truth] == pytest.approx([8 / 10, 4 / 14])
    # By start: `wide` takes the first truth, and `late` finds none. The other way round both would be right.
    for order in itertools.permutations([wide, late]):
        assert average_precision(truth, order, 0.5) == pytest.approx(1 / 2 * 1 / 2)


def test_the_dataset_file(tmp_path):
    videos = {"a": (40.0, 25.0), "b": (10.0, 30.0), "empty": (5.0, 30.0)}
    subsets = {"a": "training", "b": "test", "empty": "test"}
    write_actionformer(tmp_path / "d.json", TRUTH, videos, subsets)
    database = json.loads((tmp_path / "d.json").read_text())["database"]
    first = {"label": "run", "segment": [0, 10], "segment(frames)": [0, 250.0], "label_id": 1}
    assert database["a"]["annotations"][0] == first and database["empty"]["annotations"] == []
    assert read_actionformer(tmp_path / "d.json") == TRUTH
    assert read_actionformer(tmp_path / "d.json", "test") == TRUTH[2:]


def plain_duplicates(annotations):
    """ActionFormer's rule, on its own: what stays of a video's [start, end, label]."""
    stays = []
    for start, end, label in annotations:
        near = [a for a in stays if a[2] == label and max(abs(a[0] - start), abs(a[1] - end)) <= 1e-3]
        if end - start >= 1e-3 and not near:
            stays.append([start, end, label])
    return stays


def test_repeated_segments_are_left_out_as_actionformer_does(tmp_path):
    rng = random.Random(0)
    annotations = {
        name: [
            [s := round(rng.choice((1, 2, 3)) + rng.choice((0, 5e-4, 9e-4, 2e-3)), 4), s + length, label]
            for length in (0, 5e-4, 1, 1 + 8e-4, 4)
            for label in rng.choices("xyz", k=6)
        ]
        for name in ("a", "b")
    }
    database = {
        name: {
            "subset": "training" if name == "a" else "Test",
            "duration": 9.0,
            "fps": 25.0,
            "annotations": [{"label": label, "segment": [s, e], "label_id": 0} for s, e, label in rows],
        }
        for name, rows in annotations.items()
    }
    (tmp_path / "d.json").write_text(json.dumps({"database": database}))
    dropped = []
    found = read_actionformer(tmp_path / "d.json", dropped=dropped)
    for name, rows in annotations.items():
        stays = plain_duplicates(rows)
        assert [[one.start, one.end, one.label] for one in found if one.video == name] == stays
        assert 0 < len(stays) < len(rows) and sum(one.video == name for one in dropped) == len(rows) - len(
            stays
        )
    own = []
    assert read_actionformer(tmp_path / "d.json", "test", dropped=own) == [o for o in found if o.video == "b"]
    assert own == [one for one in dropped if one.video == "b"]
    said = dropped_note(dropped, "d.json")
    assert said.startswith(f"note: {len(dropped)} segments of d.json left out") and "\n" not in said


def test_a_segment_that_ends_before_it_starts_is_refused(tmp_path):
    one = {"label": "x", "segment": [5, 4], "label_id": 0}
    video = {"subset": "test", "duration": 9.0, "fps": 25.0, "annotations": [one]}
    (tmp_path / "d.json").write_text(json.dumps({"database": {"a": video}}))
    with pytest.raises(InputError, match="d.json: segment of 'a': 5.0 to 4.0 s"):
        read_actionformer(tmp_path / "d.json")


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="needs 0 <= start < end"):
        Segment("a", 5, 5, "x")
    with pytest.raises(InputError, match="no ground truth"):
        mean_average_precision([], FOUND)
    with pytest.raises(InputError, match="does not have: fly"):
        mean_average_precision(TRUTH, [Segment("a", 0, 1, "fly", 1.0)])
    with pytest.raises(InputError, match="'b', which is not among"):
        write_actionformer(tmp_path / "d.json", TRUTH, {"a": (40.0, 25.0)}, {"a": "test"})
    with pytest.raises(InputError, match="the video has 20"):
        write_actionformer(tmp_path / "d.json", TRUTH[:2], {"a": (20.0, 25.0)}, {"a": "test"})
    with pytest.raises(InputError, match="no subset for a"):
        write_actionformer(tmp_path / "d.json", TRUTH[:1], {"a": (40.0, 25.0)}, {})
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match="not a dataset file"):
        read_actionformer(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_actionformer(tmp_path / "none.json")
