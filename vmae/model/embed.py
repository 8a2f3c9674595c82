"""Positions and the tubelet embedding's parameters.

Legend: N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmae.config import ModelConfig


def sine_cosine_positions(num_tokens: int, dim: int) -> Tensor:
    """float32 [1, N, D]: the fixed table of "Attention Is All You Need" (section 3.5) over the flattened token index.

    Computed in float64, as the published code does, so that the float32 result is the same to the bit.
    """
    index = torch.arange(num_tokens, dtype=torch.float64)[:, None]
    power = 2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim
    angle = index / torch.pow(torch.tensor(10000.0, dtype=torch.float64), power)
    table = torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos())
    return table.float()[None]


class PatchEmbed(nn.Module):
    """Holds the Conv3d whose weight `proj.weight` [D, 3, t, p, p] embeds tubelets; `forward` embeds all of them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.embed_dim, kernel_size=size, stride=size)

    def forward(self, clips_BCTHW: Tensor) -> Tensor:
        return self.proj(clips_BCTHW).flatten(2).transpose(1, 2)


def register_positions(module: nn.Module, num_tokens: int, dim: int, learned: bool) -> None:
    """Give `module` a `pos_embed` [1, N, D]: a parameter, or fixed and left out of checkpoints as in the published code."""
    if learned:
        module.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, dim))
        nn.init.trunc_normal_(module.pos_embed, std=0.02, a=-0.02, b=0.02)
    else:
        module.register_buffer("pos_embed", sine_cosine_positions(num_tokens, dim), persistent=False)
