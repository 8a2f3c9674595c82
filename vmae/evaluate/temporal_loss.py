"""What a temporal detector learns: labels and distances at the positions within an action's middle, and their
losses, as ActionFormer has them (Zhang et al., 2022).

Legend: B videos, T positions, K classes, N positions with an action.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae.evaluate.temporal import Segment
from vmae.evaluate.temporal_features import Geometry, Item


def targets_of(
    item: Item, truth: Sequence[Segment], classes: Sequence[str], geometry: Geometry, core: float
) -> tuple[Tensor, Tensor]:
    """Labels float32 [T, K], 1 in the middle `core` of each action (one position at least), and distances to
    its start and end float32 [T, 2] in positions; where actions overlap, those to the shortest."""
    positions = torch.arange(len(item.features), dtype=torch.float32)
    labels, distances = torch.zeros(len(positions), len(classes)), torch.ones(len(positions), 2)
    for segment in sorted(truth, key=lambda one: one.start - one.end):  # the shortest last
        start, end = (geometry.position(seconds, item.info.fps) for seconds in (segment.start, segment.end))
        learns = (positions - (start + end) / 2).abs() <= max(core * (end - start) / 2, 0.5)
        labels[learns, classes.index(segment.label)] = 1
        distances[learns] = torch.stack([positions - start, end - positions], 1)[learns]
    return labels, distances.clamp(min=1e-3)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Elementwise, of sigmoids (Lin et al., 2017)."""
    missed = torch.where(labels > 0, 1 - logits.sigmoid(), logits.sigmoid())
    weight = torch.where(labels > 0, alpha, 1 - alpha) * missed**gamma
    return weight * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def distance_iou_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """[N], from distances to start and end [N, 2] of the same positions: 1 - IoU + (middles apart / span of
    both)^2."""
    overlap, span = torch.minimum(found, wanted).sum(1), torch.maximum(found, wanted).sum(1)
    apart = ((found[:, 1] - found[:, 0]) - (wanted[:, 1] - wanted[:, 0])) / 2
    return 1 - overlap / (found.sum(1) + wanted.sum(1) - overlap) + (apart / span) ** 2


def detector_loss(logits: Tensor, found: Tensor, labels: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Of a batch, a mean over its positions with an action, float32 scalar.

    Args:
        logits, labels: [B, T, K].
        found, wanted: distances to start and end [B, T, 2].
        valid: bool [B, T].
    """
    learns = labels.any(2) & valid
    classes = (focal_loss(logits, labels) * valid[..., None]).sum()
    return (classes + distance_iou_loss(found[learns], wanted[learns]).sum()) / learns.sum().clamp(min=1)
