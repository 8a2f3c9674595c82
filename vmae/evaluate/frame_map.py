"""Frame mAP of detections by the rules of AVA (the ActivityNet challenge's get_ava_performance.py, PASCAL VOC
at IoU 0.5).

Of each key frame the 50 best detections count, over all its boxes and listed actions. For each action,
detections are taken by falling score; one is right if the ground truth that it overlaps most has an IoU of at
least 0.5 and was not found before. Average precision is the area under precision, interpolated from the
right, over recall; its mean is over the listed actions that have ground truth. Excluded key frames count
nowhere; a detection on any other key frame that has no ground truth is wrong.

The published code leaves ties open (they come as its sort leaves them). Here the order of the rows does not
count: equal scores of an action count as one, precision being that at the end of their group; of equal scores
at the limit of 50, smaller action ids come first, then boxes by their coordinates, and of ground truth boxes
that a detection overlaps equally the first by coordinates is taken.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vmae.data.ava import AvaBox, Box, Key
from vmae.errors import InputError
from vmae.evaluate.temporal import interpolated_area

THRESHOLD, PER_FRAME = 0.5, 50


@dataclass(frozen=True, kw_only=True)
class FrameScores:
    """What `frame_map` finds.

    Attributes:
        mean: mean average precision, 0 to 1.
        actions: average precision by action id, of those with ground truth.
        truth: ground truth boxes by action id.
        key_frames: with ground truth.
        detections: that were counted.
    """

    mean: float
    actions: dict[int, float]
    truth: dict[int, int]
    key_frames: int
    detections: int


def box_iou(a: Box, b: Box) -> float:
    """Overlap over union, of the area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def average_precision(
    truth: Sequence[AvaBox], found: Sequence[AvaBox], threshold: float = THRESHOLD
) -> float:
    """Of one action; 0 where nothing was found.

    Args:
        truth: at least one.
        found: detections, in any order.
    """
    own: dict[Key, list[AvaBox]] = defaultdict(list)
    for row in sorted(truth, key=lambda row: row.box):  # `max` takes the first of equal ones
        own[row.key].append(row)
    taken: set[int] = set()
    found, hits = sorted(found, key=lambda row: -row.score), []
    for detection in found:
        best = max(own.get(detection.key, ()), key=lambda row: box_iou(detection.box, row.box), default=None)
        hit = best is not None and id(best) not in taken and box_iou(detection.box, best.box) >= threshold
        if hit:
            taken.add(id(best))
        hits.append(hit)
    return interpolated_area([row.score for row in found], hits, len(truth))


def frame_map(
    truth: Sequence[AvaBox],
    found: Sequence[AvaBox],
    actions: Collection[int],
    *,
    excluded: Collection[Key] = (),
    threshold: float = THRESHOLD,
    per_frame: int | None = PER_FRAME,
) -> FrameScores:
    """Frame mAP; see the module for the rules.

    Args:
        actions: ids that count (60 of AVA's 80); rows of others are passed over.
        excluded: key frames that are passed over.
        per_frame: detections of a key frame that count; None counts all.

    Raises:
        InputError: no ground truth is left, or a score is NaN.
    """
    listed, skipped = set(actions), set(excluded)
    if wrong := next((row for row in found if math.isnan(row.score)), None):
        raise InputError(
            f"a detection of action {wrong.action} on {wrong.video}, {wrong.timestamp} s has no score (NaN)"
        )
    truth = [row for row in truth if row.action in listed and row.key not in skipped]
    found = _best([row for row in found if row.action in listed and row.key not in skipped], per_frame)
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
        groups[row.action].append(row)
    return groups
