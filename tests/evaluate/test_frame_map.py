"""Frame mAP by the rules of AVA, by hand."""

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
FOUND = [  # of action 1 by score: hit, miss (IoU 1/3), a second on what was found, hit, miss (another time); one is never found
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
    assert average_precision(TRUTH[:4], FOUND[:5], 0.3) == pytest.approx((1 + 1 + 0.75) / 4)  # FAR is right too
    assert average_precision(TRUTH[:4], []) == 0
    scores = frame_map(TRUTH, FOUND, [1, 2, 3])
    assert scores.actions == {1: pytest.approx(0.375), 2: 1.0}  # action 3 has no ground truth and does not count
    assert scores.mean == pytest.approx((0.375 + 1) / 2)
    assert (scores.key_frames, scores.detections, scores.truth) == (3, 6, {1: 4, 2: 1})


def test_order_of_the_rows_is_of_no_matter():
    assert frame_map(TRUTH[::-1], FOUND[::-1], [1, 2]) == frame_map(TRUTH, FOUND, [1, 2])


def test_a_detection_goes_to_the_box_it_overlaps_most():
    # Both detections overlap A most. The box beside is free and overlaps the second by more than 0.5: of no use.
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
    assert frame_map(truth, crowd + weak, [1, 2]).actions == {1: 0.5, 2: 0}  # the weak one of frame 1 is the 51st
    assert frame_map(truth, crowd + weak, [1, 2], per_frame=None).actions == {1: 1.0, 2: 0}
    assert frame_map(truth, crowd + weak, [1]).actions == {1: 1.0}  # only listed actions fill the places
