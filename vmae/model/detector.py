"""Spatio-temporal detection: what the people in given boxes do at the middle of a clip.

The head that VideoMAE was tested with on AVA (Tong et al., 2022; its code, VideoMAE-Action-Detection,
modeling_finetune.py): tokens after the encoder's `norm`, their mean over time, RoIAlign to 7 x 7, the largest
of these, a linear layer with one logit for each action. Parameter names are the same, so its checkpoints
load. RoIAlign here has the half-pixel shift of Detectron2 (`aligned=True`) and 2 x 2 samples a bin; the one
used there (AlphAction's ROIAlign3d) has no shift, makes boxes at least a token wide, and takes as many
samples as the box is large: outputs of its checkpoints differ a little.

Legend: B clips, M boxes of a clip (padded), N tokens, D width, h x w tokens of a frame, P bins along a side,
K actions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.model.classifier import Classifier

BINS, SAMPLES = 7, 2  # published resolution; samples along each side of a bin


def axis_weights(low: Tensor, high: Tensor, cells: int, bins: int, samples: int) -> Tensor:
    """Weights of an axis' cells in each bin of an interval: bilinear interpolation, averaged over samples.

    Args:
        low, high: the interval, shares of the axis in [0, 1], of one shape [...].
        cells: of the axis; their values sit at their middles.
        bins: that the interval is cut into.
        samples: of each bin, evenly spread.

    Returns:
        [..., bins, cells]; each bin's weights sum to 1.
    """
    steps = (torch.arange(bins * samples, device=low.device, dtype=low.dtype) + 0.5) / (bins * samples)
    places = (low[..., None] + (high - low)[..., None] * steps) * cells - 0.5
    distance = places.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=low.device, dtype=low.dtype)
    return (1 - distance.abs()).clamp(min=0).unflatten(-2, (bins, samples)).mean(-2)


def roi_align(features_BhwD: Tensor, boxes_BM4: Tensor, bins: int = BINS, samples: int = SAMPLES) -> Tensor:
    """RoIAlign (He et al., 2017) of boxes inside the frame, `aligned` as in Detectron2.

    Samples lie on a grid, so interpolation and averaging fall into one small matrix for each axis: no gather,
    no atomics.

    Args:
        boxes_BM4: x1, y1, x2, y2 in [0, 1].

    Returns:
        [B, M, bins, bins, D], rows first.
    """
    height, width = features_BhwD.shape[1:3]
    if boxes_BM4.dtype != torch.float64:
        boxes_BM4 = boxes_BM4.float()
    x1, y1, x2, y2 = boxes_BM4.unbind(-1)
    rows = axis_weights(y1, y2, height, bins, samples).to(features_BhwD.dtype)
    columns = axis_weights(x1, x2, width, bins, samples).to(features_BhwD.dtype)
    kept_rows = torch.einsum("bmph,bhwd->bmpwd", rows, features_BhwD)
    return torch.einsum("bmqw,bmpwd->bmpqd", columns, kept_rows)


class Detector(Classifier):
    """Actions of boxes: an encoder with its final `norm`, RoIAlign, and `head`.

    Args:
        config: the architecture; its decoder is not used.
        num_classes: K, at least 1.
        init_scale: factor on the head's initial weight (published 0.001).
        options: `backend`, `attention`, `recompute`, `drop_rate`, `attn_drop_rate` of `Classifier`.

    Raises:
        InputError: no classes.
    """

    def __init__(self, config: ModelConfig, num_classes: int, *, init_scale: float = 1.0, **options):
        if num_classes < 1:
            raise InputError(f"a detector needs at least 1 action, not {num_classes}")
        super().__init__(config, num_classes, pooling="first", init_scale=init_scale, **options)

    def box_features(self, clips: Tensor, boxes_BM4: Tensor) -> Tensor:
        """Features of boxes [B, M, D]."""
        tokens = self.tokens(clips).unflatten(1, self.config.grid)
        return roi_align(tokens.mean(1), boxes_BM4).amax((2, 3))

    def forward(self, clips: Tensor, boxes_BM4: Tensor) -> Tensor:  # type: ignore[override]  # modules differ in that
        """Logits [B, M, K].

        Args:
            clips: see `Classifier.tokens`.
            boxes_BM4: x1, y1, x2, y2 in [0, 1]; rows that pad may be anything in there.
        """
        return self.head(self.box_features(clips, boxes_BM4))


def build_detector(config: ModelConfig, num_classes: int, **options) -> Detector:
    """A freshly initialised `Detector`; `options` are those of its constructor."""
    return Detector(config, num_classes, **options)
