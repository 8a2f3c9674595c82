"""Frame mAP of detections on AVA (PASCAL VOC at IoU 0.5), by the rules that its scripts have had.

- For each action, detections are matched in order of falling score. A detection is correct if the ground
  truth box of the largest IoU with it has an IoU of at least 0.5 and is not matched yet.
- Average precision is the area under the precision-recall curve, with precision interpolated from the right.
  mAP is its mean over the listed actions that have ground truth.
- Excluded key frames do not count.

That is common to all. `RULES` has what differs: how many detections of a key frame count (those of highest
score, over all its boxes and listed actions), and whether a detection counts, as a wrong one, on a key frame
that the ground truth's file does not name.

The result of the published scripts depends on the order of the rows where scores are equal. Here it does not:

- Detections of an action with equal scores form one point of the curve, at the end of their group: the lowest
  value that the scripts give over all orders of these rows.
- Of equal scores at the limit of a key frame, smaller action ids come first, then boxes by their coordinates.
- Of ground truth boxes with equal IoU, the first one by coordinates is matched.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vmae.data.ava import AvaBox, Box, Key
from vmae.errors import InputError
from vmae.evaluate.temporal import interpolated_area

THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which detections count.

    Attributes:
        per_frame: of a key frame, those of highest score; None: all.
        unannotated: on key frames that the ground truth's file does not name: "count" as wrong, or "ignore".
        source: the code that scores so, with its revision.
    """

    per_frame: int | None
    unannotated: str
    source: str

    def __str__(self) -> str:
        which = "all detections" if self.per_frame is None else f"the best {self.per_frame} of a key frame"
        return which + ("" if self.unannotated == "count" else ", on key frames that the ground truth names")


UNANNOTATED = ("count", "ignore")
RULES = {
    "videomae": Rule(
        per_frame=None,
        unannotated="count",
        source="VideoMAE-Action-Detection at 26cbda8, with AlphAction's ava_eval.py at bcb6b16",
    ),
    "activitynet_2019": Rule(
        per_frame=50,
        unannotated="count",
        source="ActivityNet, Evaluation/get_ava_performance.py at 1212804 (since 2019)",
    ),
    "activitynet_2020": Rule(
        per_frame=50,
        unannotated="ignore",
        source="ActivityNet, Evaluation/get_ava_performance.py since pull request 70 (2020, AVA-Kinetics)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class FrameScores:
    """Result of `frame_map`.

    Attributes:
        mean: mean average precision, 0 to 1.
        actions: average precision by action id, for actions with ground truth.
        truth: number of ground truth boxes by action id.
        key_frames: number of key frames with ground truth.
        detections: number of detections that count.
    """

    mean: float
    actions: dict[int, float]
    truth: dict[int, int]
    key_frames: int
    detections: int


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    (a_left, a_top, a_right, a_bottom), (b_left, b_top, b_right, b_bottom) = a, b
    width = min(a_right, b_right) - max(a_left, b_left)
    height = min(a_bottom, b_bottom) - max(a_top, b_top)
    overlap = max(width, 0.0) * max(height, 0.0)
    area_a, area_b = (a_right - a_left) * (a_bottom - a_top), (b_right - b_left) * (b_bottom - b_top)
    return overlap / (area_a + area_b - overlap)


def average_precision(
    truth: Sequence[AvaBox], found: Sequence[AvaBox], threshold: float = THRESHOLD
) -> float:
    """Average precision of one action; 0 without detections.

    Args:
        truth: ground truth boxes, at least one.
        found: detections, in any order.
        threshold: least IoU of a correct detection.
    """
    of_frame: dict[Key, list[AvaBox]] = defaultdict(list)
    for row in sorted(truth, key=lambda row: row.box):  # of equal IoUs, `max` returns the first
        of_frame[row.key].append(row)
    matched: set[int] = set()
    found, hits = sorted(found, key=lambda row: -row.score), []
    for detection in found:
        truth_here = of_frame.get(detection.key, ())
        best = max(truth_here, key=lambda row: box_iou(detection.box, row.box), default=None)
        hit = best is not None and id(best) not in matched and box_iou(detection.box, best.box) >= threshold
        if hit:
            matched.add(id(best))
        hits.append(hit)
    return interpolated_area([row.score for row in found], hits, len(truth))


def frame_map(
    truth: Sequence[AvaBox],
    found: Sequence[AvaBox],
    actions: Collection[int],
    *,
    excluded: Collection[Key] = (),
    threshold: float = THRESHOLD,
    per_frame: int | None = None,
    frames: Collection[Key] | None = None,
) -> FrameScores:
    """Frame mAP; the module's docstring has the rules.

    Args:
        truth: ground truth boxes, a row for each box and action.
        found: detections, a row for each box and action.
        actions: ids of the listed actions (60 of AVA's 80); rows of other actions are ignored.
        excluded: key frames to ignore.
        threshold: least IoU of a correct detection.
        per_frame: detections that each key frame counts; None counts all.
        frames: key frames that the ground truth names, with or without boxes: detections on others do not
            count. None: they count, as wrong ones.

    Raises:
        InputError: no ground truth is left, or a score is NaN.
    """
    listed, skipped = set(actions), set(excluded)
    if wrong := next((row for row in found if math.isnan(row.score)), None):
        raise InputError(
            f"a detection of action {wrong.action} on {wrong.video}, {wrong.timestamp} s has no score (NaN)"
        )
    truth = [row for row in truth if row.action in listed and row.key not in skipped]
    found = [row for row in found if row.action in listed and row.key not in skipped]
    if frames is not None:
        named = set(frames)
        found = [row for row in found if row.key in named]
    found = _best(found, per_frame)
    if not truth:
        raise InputError(
            "no ground truth to compare with: no box of a listed action on a key frame that is not excluded"
        )
    truth_of, found_of = _by_action(truth), _by_action(found)
    values = {
        action: average_precision(rows, found_of.get(action, []), threshold)
        for action, rows in sorted(truth_of.items())
    }
    return FrameScores(
        mean=sum(values.values()) / len(values),
        actions=values,
        truth={action: len(truth_of[action]) for action in values},
        key_frames=len({row.key for row in truth}),
        detections=len(found),
    )


def _best(found: Sequence[AvaBox], per_frame: int | None) -> list[AvaBox]:
    """The `per_frame` detections of highest score of each key frame."""
    frames: dict[Key, list[AvaBox]] = defaultdict(list)
    for row in found:
        frames[row.key].append(row)
    by_rank = {
        key: sorted(rows, key=lambda row: (-row.score, row.action, row.box)) for key, rows in frames.items()
    }
    return [row for rows in by_rank.values() for row in rows[:per_frame]]


def _by_action(rows: Sequence[AvaBox]) -> dict[int, list[AvaBox]]:
    groups: dict[int, list[AvaBox]] = defaultdict(list)
    for row in rows:
        if row.action is not None:
            groups[row.action].append(row)
    return groups
