"""A small detector of actions in time, on features: class scores and distances to start and end at every
position.

Anchor-free, as FCOS (Tian et al., 2019) and ActionFormer (Zhang et al., 2022), but of one scale: residual
convolutions, each seeing twice as far as the one before, instead of a pyramid of transformers.

Legend: B videos, T positions, C feature width, D width, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PRIOR = (
    0.01  # score of every class before training, so that the many empty positions don't drown the first steps
)


class _DilatedBlock(nn.Module):
    """Adds what a convolution over `2 * dilation + 1` positions sees."""

    def __init__(self, width: int, dilation: int, drop_rate: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.near = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.mix = nn.Conv1d(width, width, 1)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x_BDT: Tensor, valid_B1T: Tensor) -> Tensor:
        seen = self.near(self.norm(x_BDT.transpose(1, 2)).transpose(1, 2) * valid_B1T)
        return x_BDT + self.drop(self.mix(F.gelu(seen)))


class TemporalHead(nn.Module):
    """Detector on features.

    Args:
        features: C.
        num_classes: K.
        width: D of its convolutions.
        depth: convolutions; it sees `2**depth - 1` positions each way.
        distance: typical distance to start and end in positions, where regression begins.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        width: int = 64,
        depth: int = 5,
        distance: float = 1.0,
        drop_rate: float = 0.1,
    ):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.embed = nn.Conv1d(features, width, 1)
        self.blocks = nn.ModuleList(_DilatedBlock(width, 2**i, drop_rate) for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, num_classes)
        self.distances = nn.Linear(width, 2)
        nn.init.constant_(self.classes.bias, -math.log((1 - _PRIOR) / _PRIOR))
        nn.init.zeros_(self.distances.weight)
        nn.init.constant_(self.distances.bias, math.log(distance))

    def forward(self, x_BTC: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, K] and distances to start and end [B, T, 2] in positions, above 0.

        Args:
            valid_BT: bool; what is not a position of its video is read by none.
        """
        valid = valid_BT[:, None].to(x_BTC.dtype)
        x = self.embed(((x_BTC - self.mean) / self.deviation).transpose(1, 2))
        for block in self.blocks:
            x = block(x, valid)
        x = self.norm(x.transpose(1, 2))
        return self.classes(x), self.distances(x).clamp(max=12).exp()
