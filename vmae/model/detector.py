"""Spatio-temporal detection: what the people in given boxes do at the middle of a clip.

The head that VideoMAE was tested with on AVA (Tong et al., 2022; its code, VideoMAE-Action-Detection at
26cbda8, modeling_finetune.py): tokens after the encoder's `norm`, their mean over time, RoIAlign to 7 x 7,
the largest of these, a linear layer with one logit for each action. Parameter names are the same, so its
checkpoints load.

RoIAlign is one of two. "aligned" has the half-pixel shift of Detectron2 (`aligned=True`) and 2 x 2 samples a
bin. "published" is AlphAction's ROIAlign3d, which that head uses (csrc/cuda/ROIAlign3d_cuda.cu at 09296b6):
no shift, boxes at least a token wide and tall, ceil(tokens of the box / 7) samples along each side of a bin,
0 for a sample more than a token outside.

Clips of `preprocess` "published" may have any height and width (`vmae.data.detection_published`). Their
pixels are normalised with that code's mean and deviation, not ImageNet's, then filled up with zeros at the
right and the bottom to whole patches; the positions are interpolated to their grid.

Legend: B clips, M boxes of a clip (padded), N tokens, D width, h x w tokens of a frame, P bins along a side,
K actions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.model.classifier import Classifier
from vmae.model.embed import interpolate_positions
from vmae_kernels import embed_visible

BINS, SAMPLES = 7, 2  # published resolution; samples along each side of a bin ("aligned")
ROIS = ("aligned", "published")
MEAN, DEVIATION = (122.7717, 115.9465, 102.9801), (57.375, 57.375, 57.375)  # RGB, of 0 to 255


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


def published_axis_weights(low: Tensor, high: Tensor, cells: int, bins: int) -> Tensor:
    """Weights of an axis' cells in each bin of an interval, as AlphAction's ROIAlign3d has them.

    Args: see `axis_weights`.

    Returns:
        [..., bins, cells]; a bin's weights sum to less than 1 where samples lie outside.
    """
    start, length = low * cells, ((high - low) * cells).clamp(min=1)
    count = (length / bins).ceil()  # samples of a bin
    most = -(-cells // bins) + 1  # one more than of the whole axis, where rounding lifts the quotient
    sample = torch.arange(most, device=low.device, dtype=low.dtype)
    share = (
        torch.arange(bins, device=low.device, dtype=low.dtype)[:, None]
        + (sample + 0.5) / count[..., None, None]
    )
    places = start[..., None, None] + share * (length / bins)[..., None, None]
    counts = (sample < count[..., None, None]) & (places >= -1) & (places <= cells)
    cell = torch.arange(cells, device=low.device, dtype=low.dtype)
    each = (1 - (places.clamp(0, cells - 1)[..., None] - cell).abs()).clamp(min=0) * counts[..., None]
    return each.sum(-2) / count[..., None, None]


def roi_align(
    features_BhwD: Tensor,
    boxes_BM4: Tensor,
    bins: int = BINS,
    samples: int = SAMPLES,
    *,
    roi: str = "aligned",
) -> Tensor:
    """RoIAlign (He et al., 2017) of boxes inside the frame; see the module for the two kinds.

    Samples lie on a grid, so interpolation and averaging fall into one small matrix for each axis: no gather,
    no atomics.

    Args:
        boxes_BM4: x1, y1, x2, y2 in [0, 1].
        samples: along each side of a bin, of "aligned".

    Returns:
        [B, M, bins, bins, D], rows first.
    """
    height, width = features_BhwD.shape[1:3]
    if boxes_BM4.dtype != torch.float64:
        boxes_BM4 = boxes_BM4.float()
    x1, y1, x2, y2 = boxes_BM4.unbind(-1)
    if roi == "published":
        rows, columns = (
            published_axis_weights(*axis, bins).to(features_BhwD.dtype)
            for axis in ((y1, y2, height), (x1, x2, width))
        )
    else:
        rows = axis_weights(y1, y2, height, bins, samples).to(features_BhwD.dtype)
        columns = axis_weights(x1, x2, width, bins, samples).to(features_BhwD.dtype)
    kept_rows = torch.einsum("bmph,bhwd->bmpwd", rows, features_BhwD)
    return torch.einsum("bmqw,bmpwd->bmpqd", columns, kept_rows)


def normalise_published(clips_BTHWC: Tensor) -> Tensor:
    """float32 [B, 3, T, H, W] of uint8 clips, with VideoMAE-Action-Detection's mean and deviation."""
    clips = clips_BTHWC.permute(0, 4, 1, 2, 3).float()
    mean, deviation = (clips.new_tensor(values)[:, None, None, None] for values in (MEAN, DEVIATION))
    return (clips - mean) / deviation


class Detector(Classifier):
    """Actions of boxes: an encoder with its final `norm`, RoIAlign, and `head`.

    Args:
        config: the architecture; its decoder is not used.
        num_classes: K, at least 1.
        init_scale: factor on the head's initial weight (published 0.001).
        roi: "aligned" or "published", see the module.
        preprocess: "resize" or "published": what clips are, see the module.
        options: `backend`, `attention`, `recompute`, `drop_rate`, `attn_drop_rate` of `Classifier`.

    Raises:
        InputError: no classes, or an unknown `roi`.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        *,
        init_scale: float = 1.0,
        roi: str = "aligned",
        preprocess: str = "resize",
        **options,
    ):
        if num_classes < 1:
            raise InputError(f"a detector needs at least 1 action, not {num_classes}")
        if roi not in ROIS:
            raise InputError(f"unknown roi {roi!r}; known: {', '.join(ROIS)}")
        super().__init__(config, num_classes, pooling="first", init_scale=init_scale, **options)
        self.roi, self.preprocess = roi, preprocess

    def box_features(self, clips: Tensor, boxes_BM4: Tensor) -> Tensor:
        """Features of boxes [B, M, D]."""
        if self.preprocess == "published":
            features_BhwD, boxes_BM4 = self._published_features(clips, boxes_BM4)
        else:
            features_BhwD = self.tokens(clips).unflatten(1, self.config.grid).mean(1)
        return roi_align(features_BhwD, boxes_BM4, roi=self.roi).amax((2, 3))

    def _published_features(self, clips: Tensor, boxes_BM4: Tensor) -> tuple[Tensor, Tensor]:
        """Mean tokens [B, h, w, D] of clips of any height and width, and the boxes as shares of what the
        clips are filled up to."""
        clips = normalise_published(clips) if clips.dtype == torch.uint8 else clips
        frames, height, width = clips.shape[2:]
        if frames != self.config.num_frames:
            raise InputError(
                f"clips of shape {list(clips.shape)} do not fit a model of {self.config.num_frames} frames"
            )
        patch, depth = self.config.patch_size, self.config.tubelet_size
        clips = F.pad(clips, (0, -width % patch, 0, -height % patch))
        grid = (frames // depth, clips.shape[3] // patch, clips.shape[4] // patch)
        positions = interpolate_positions(self.pos_embed, self.config.grid, grid)
        every_token = torch.arange(positions.shape[1], dtype=torch.int32, device=clips.device)
        proj = self.patch_embed.proj
        tokens = self._encode(
            embed_visible(
                clips,
                every_token.expand(clips.shape[0], -1),
                proj.weight,
                proj.bias,
                positions,
                backend=self.backend,
            )
        )
        filled = boxes_BM4.new_tensor([width / clips.shape[4], height / clips.shape[3]] * 2)
        return tokens.unflatten(1, grid).mean(1), boxes_BM4 * filled

    def forward(self, clips: Tensor, boxes_BM4: Tensor) -> Tensor:  # type: ignore[override]  # modules differ in that
        """Logits [B, M, K].

        Args:
            clips: see `Classifier.tokens`; published ones may have any height and width, and float ones are
                normalised with `MEAN` and `DEVIATION`.
            boxes_BM4: x1, y1, x2, y2 in [0, 1]; rows that pad may be anything in there.
        """
        return self.head(self.box_features(clips, boxes_BM4))


def build_detector(config: ModelConfig, num_classes: int, **options) -> Detector:
    """A freshly initialised `Detector`; `options` are those of its constructor."""
    return Detector(config, num_classes, **options)
