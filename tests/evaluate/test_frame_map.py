"""Frame mAP by the rules of AVA, by hand."""

import itertools
import math

import pytest

from vmae import InputError
from vmae.data.ava import AvaBox
from vmae.evaluate.frame_map import average_precision, box_iou, frame_map

A, B, C = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9), (0.0, 0.5, 0.4, 0.9)
SHIFTED = (0.1, 0.0, 0.5, 0.4)  # IoU with A: 0.3 * 0.4 / (2 * 0.16 - 0.12) = 0.6
FAR = (0.2, 0.0, 0.6, 0.4)  # 0.2 * 0.4 / (0.32 - 0.08) = 1/3
TRUTH = [
    AvaBox("v", 902, A, 1),
    AvaBox("v", 902, B, 1),
    AvaBox("v", 903, A, 1),
    AvaBox("w", 902, C, 1),
    AvaBox("v", 902, A, 2),
]
# of action 1 by score: hit, miss (IoU 1/3), a second on what was found, hit, miss (another time); one is
# never found
FOUND = [
    AvaBox("v", 902, SHIFTED, 1, 0.9),
    AvaBox("v", 903, FAR, 1, 0.8),
    AvaBox("v", 902, A, 1, 0.7),
    AvaBox("w", 902, C, 1, 0.6),
    AvaBox("v", 904, A, 1, 0.5),
    AvaBox("v", 902, A, 2, 0.2),
]


def test_iou():
    assert box_iou(A, SHIFTED) == pytest.approx(0.6) and box_iou(A, FAR) == pytest.approx(1 / 3)
    assert box_iou(A, B) == 0 and box_iou(A, A) == pytest.approx(1)


def test_a_case_by_hand():
    # Hits: yes, no, no, yes, no. Precision at the hits 1 and 2/4; four to find: (1 + 0.5) / 4.
    assert average_precision(TRUTH[:4], FOUND[:5]) == pytest.approx(0.375)
    assert average_precision(TRUTH[:4], FOUND[:5], 0.3) == pytest.approx(
        (1 + 1 + 0.75) / 4
    )  # FAR is right too
    assert average_precision(TRUTH[:4], []) == 0
    scores = frame_map(TRUTH, FOUND, [1, 2, 3])
    assert scores.actions == {
        1: pytest.approx(0.375),
        2: 1.0,
    }  # action 3 has no ground truth and does not count
    assert scores.mean == pytest.approx((0.375 + 1) / 2)
    assert (scores.key_frames, scores.detections, scores.truth) == (3, 6, {1: 4, 2: 1})


def test_result_does_not_depend_on_the_order_of_rows():
    assert frame_map(TRUTH[::-1], FOUND[::-1], [1, 2]) == frame_map(TRUTH, FOUND, [1, 2])


def test_a_detection_goes_to_the_box_it_overlaps_most():
    # Both detections overlap A most. The box beside is free and overlaps the second by more than 0.5: of no
    # use.
    truth = [AvaBox("v", 1, A, 1), AvaBox("v", 1, SHIFTED, 1)]
    found = [AvaBox("v", 1, A, 1, 0.9), AvaBox("v", 1, (0.01, 0, 0.41, 0.4), 1, 0.8)]
    assert average_precision(truth, found) == pytest.approx(0.5)


def test_excluded_key_frames_and_unlisted_actions():
    scores = frame_map(TRUTH, FOUND, [1], excluded={("v", 903), ("v", 904)})
    # Left: hit, a second on what was found, hit; three to find.
    assert scores.actions == {1: pytest.approx((1 + 2 / 3) / 3)} and scores.detections == 3
    with pytest.raises(InputError, match="no ground truth"):
        frame_map(TRUTH, FOUND, [3])


def test_a_key_frame_counts_its_best_detections_only():
    truth = [AvaBox("v", 1, A, 1), AvaBox("v", 1, B, 2), AvaBox("v", 2, A, 1)]
    crowd = [AvaBox("v", 1, C, 2, 0.5 + i / 1000) for i in range(50)]
    weak = [AvaBox("v", 1, A, 1, 0.1), AvaBox("v", 2, A, 1, 0.05)]
    assert frame_map(truth, crowd + weak, [1, 2]).actions == {
        1: 0.5,
        2: 0,
    }  # the weak one of frame 1 is the 51st
    assert frame_map(truth, crowd + weak, [1, 2], per_frame=None).actions == {1: 1.0, 2: 0}
    assert frame_map(truth, crowd + weak, [1]).actions == {1: 1.0}  # only listed actions fill the places


def test_equal_scores_count_as_one_in_any_order():
    """Precision at the end of each group; the first alone, then four that are equal: two hits, two misses."""
    places = (("v", 902, A), ("v", 902, B), ("v", 904, A), ("w", 902, A))
    rows = [AvaBox(*place, 1, 0.5) for place in places]
    first = AvaBox("w", 902, C, 1, 0.9)
    for order in itertools.permutations(rows):
        assert average_precision(TRUTH[:4], [*order, first]) == pytest.approx((1 + 2 * 3 / 5) / 4)
    # A constant score: hits among all, times the share that is found.
    constant = [AvaBox(row.video, row.timestamp, row.box, row.action, 0.5) for row in FOUND[:5]]
    orders = itertools.permutations(constant)
    (value,) = {average_precision(truth, order) for order in orders for truth in (TRUTH[:4], TRUTH[3::-1])}
    assert value == pytest.approx(2 / 5 * 2 / 4)


def test_equal_scores_at_the_limit_of_a_key_frame_go_by_action_and_box():
    truth = [AvaBox("v", 1, A, 1), AvaBox("v", 1, B, 2)]
    found = [AvaBox("v", 1, A, 1, 0.5), AvaBox("v", 1, B, 2, 0.5), AvaBox("v", 1, C, 1, 0.5)]
    for order in itertools.permutations(found):
        assert frame_map(truth, order, [1, 2], per_frame=1).actions == {1: 1.0, 2: 0}  # A comes before C
        assert frame_map(truth, order, [1, 2], per_frame=2).actions == {1: 0.5, 2: 0}
        assert frame_map(truth, order, [1, 2]).actions == {1: 0.5, 2: 1.0}


def test_equal_overlaps_match_the_same_box_in_any_order():
    """A detection lies between two boxes; a second detection finds the first box already matched."""
    left, right, middle = (0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0), (0.125, 0.0, 0.625, 1.0)
    truth = [AvaBox("v", 1, left, 1), AvaBox("v", 1, right, 1)]
    found = [AvaBox("v", 1, middle, 1, 0.9), AvaBox("v", 1, right, 1, 0.8)]
    assert box_iou(middle, left) == box_iou(middle, right) == 0.6
    assert average_precision(truth, found) == average_precision(truth[::-1], found) == 1.0


def test_nan_scores_are_refused():
    with pytest.raises(InputError, match="action 1 on v, 902 s has no score"):
        frame_map(TRUTH, [AvaBox("v", 902, A, 1, math.nan)], [1])
