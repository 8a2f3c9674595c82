"""Histograms of oriented gradients as the target (MaskFeat, Wei et al., 2022, arXiv 2112.09133): no teacher.

Of a token, the first frame is described, as MaskFeat's released code does for video; the other frames of the
tubelet are not read. Each cell of about 8 x 8 pixels has, for each colour, 9 bins of orientation over 180
degrees. A pixel votes for the bin of its gradient with the gradient's length: Sobel filters, frames mirrored
at their border, a neighbouring token's pixels where a token ends. Each histogram is divided by its L2 norm;
that of a cell of one colour is 0.

Legend: B clips, n tokens, p patch side, c cells along a side of a patch, C colours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.masking import DualMask
from vmae.model.target import Target
from vmae.targets.settings import Wanted
from vmae_kernels.tubelets import clip_grid, unit_pixels

ABOUT = "histograms of oriented gradients of a tubelet's first frame: MaskFeat"
BINS = 9
CELL = 8  # pixels along a side: the published cell, and what others come near to
# Steps of a grey level to which pixels are rounded: a float clip made from uint8 then gives the same whole
# numbers, whose sums are exact, and no pixel changes its bin by a rounding error.
STEPS = 64


def cells_of(patch_size: int) -> int:
    """c: cells along a side of a patch, each as near to 8 pixels as patches allow: 2 of 8 for patch 16, 2 of
    7 for patch 14, 1 for patch 8.

    Raises:
        InputError: a patch that gives no equal cells of 6 to 10 pixels.
    """
    cells = max(1, round(patch_size / CELL))
    if patch_size % cells or not 6 <= patch_size // cells <= 10:
        raise InputError(
            f"--target hog cuts a patch into equal cells of 6 to 10 pixels, and --patch-size {patch_size} "
            "has none: choose 8, 14, 16 or another that does"
        )
    return cells


def windows(clips: Tensor, tokens: Tensor, patch_size: int, tubelet_size: int) -> Tensor:
    """[B, n, p + 2, p + 2, C] in the dtype of `clips`: patches of the tokens' first frames with the pixels
    around them; beyond the frame, those that mirror it (the border itself once)."""
    _, rows, columns = clip_grid(clips, patch_size, tubelet_size)
    tokens = tokens.long()
    around = torch.arange(-1, patch_size + 1, device=clips.device)

    def lines(first: Tensor, count: int) -> Tensor:
        places = (first[..., None] * patch_size + around).abs()
        return torch.where(places >= count * patch_size, 2 * (count * patch_size - 1) - places, places)

    clip = torch.arange(clips.shape[0], device=clips.device)[:, None, None, None]
    frame = (tokens // (rows * columns) * tubelet_size)[..., None, None]
    y = lines(tokens // columns % rows, rows)[..., :, None]
    x = lines(tokens % columns, columns)[..., None, :]
    if clips.dtype == torch.uint8:
        return clips[clip, frame, y, x]
    return clips.movedim(1, -1)[clip, frame, y, x]


def gradients(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel gradients (along x, along y) of [..., p + 2, p + 2, C], each [..., p, p, C]."""

    def smooth(x: Tensor, dim: int) -> Tensor:
        inner = x.shape[dim] - 2
        return x.narrow(dim, 0, inner) + 2 * x.narrow(dim, 1, inner) + x.narrow(dim, 2, inner)

    def slope(x: Tensor, dim: int) -> Tensor:
        inner = x.shape[dim] - 2
        return x.narrow(dim, 2, inner) - x.narrow(dim, 0, inner)

    return slope(smooth(pixels, -3), -2), slope(smooth(pixels, -2), -3)


class HogTarget(Target):
    """Values in the order (cell row, cell column, colour, bin). Bin k holds gradients of k to k + 1 times 20
    degrees: bin 0 those along x, of a vertical edge; bin 4 those along y."""

    name = "hog"
    any_shape = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if not config.has_imagenet_pixels:
            raise InputError("--target hog reads RGB clips, without --in-channels, --channel-mean and -std")
        self.cells = cells_of(config.patch_size)
        self.colours = config.tubelet_pixels // (config.tubelet_size * config.patch_size**2)

    @property
    def width(self) -> int:
        return self.cells**2 * self.colours * BINS

    def values(self, clips: Tensor, mask: DualMask) -> Tensor:
        size = (self.config.patch_size, self.config.tubelet_size)
        with torch.autocast(clips.device.type, enabled=False):
            pixels = unit_pixels(windows(clips, mask.target, *size))
            x, y = gradients((pixels * (255 * STEPS)).round())
            down = torch.where((y < 0) | ((y == 0) & (x < 0)), -1.0, 1.0)  # a direction is its opposite's
            turn = torch.atan2(y * down, x * down) * (BINS / math.pi)
            votes, bins = (x.square() + y.square()).sqrt(), turn.to(torch.uint8).clamp_(max=BINS - 1)
            # [B, n, c, pixels, c, pixels, C]; a sum a bin, for scattered sums have no fixed order on a GPU.
            split = (self.cells, size[0] // self.cells) * 2
            votes, bins = (part.unflatten(3, split[:2]).unflatten(2, split[:2]) for part in (votes, bins))
            sums = [torch.where(bins == k, votes, 0.0).sum((3, 5)) for k in range(BINS)]
            return F.normalize(torch.stack(sums, -1), dim=-1).flatten(2)

    def describe(self) -> str:
        side = self.config.patch_size // self.cells
        return f"histograms of oriented gradients, {BINS} bins, cells of {side} x {side} pixels"


def build(wanted: Wanted) -> HogTarget:
    return HogTarget(wanted.model)
