"""Positions and the tubelet embedding's parameters.

Legend: N tokens, D width, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae_kernels import Statistics


def sine_cosine_positions(num_tokens: int, dim: int) -> Tensor:
    """float32 [1, N, D]: the fixed table of "Attention Is All You Need" (section 3.5) over the flattened
    token index.

    Computed in float64, as the published code does, so that the float32 result is the same to the bit.
    """
    index = torch.arange(num_tokens, dtype=torch.float64)[:, None]
    power = 2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim
    angle = index / torch.pow(torch.tensor(10000.0, dtype=torch.float64), power)
    table = torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos())
    return table.float()[None]


def interpolate_positions(
    table: Tensor, source: tuple[int, int, int], target: tuple[int, int, int]
) -> Tensor:
    """Positions of one token grid (time, height, width) for another: bicubic in space, linear in time, as
    published.

    Args:
        table: [1, N, D] of the `source` grid.

    Returns:
        [1, N', D] of the `target` grid; `table` itself where the grids are the same.
    """
    if source == target:
        return table
    dim = table.shape[2]
    x = table.reshape(source[0], source[1], source[2], dim).permute(0, 3, 1, 2)
    if source[1:] != target[1:]:
        x = F.interpolate(x, size=target[1:], mode="bicubic", align_corners=False)
    if source[0] != target[0]:
        x = F.interpolate(x.flatten(1).T[None], size=target[0], mode="linear", align_corners=False)
        x = x[0].T.reshape(target[0], dim, *target[1:])
    return x.permute(0, 2, 3, 1).reshape(1, -1, dim)


def fixed_positions(config: ModelConfig, dim: int) -> Tensor:
    """The sine-cosine table [1, N, dim] of a model's tokens; where `pos_grid` names another grid, that
    grid's, interpolated."""
    grid = config.pos_grid or config.grid
    return interpolate_positions(sine_cosine_positions(math.prod(grid), dim), grid, config.grid)


class PatchEmbed(nn.Module):
    """Holds the Conv3d whose weight `proj.weight` [D, C, t, p, p] embeds tubelets; `forward` embeds all of
    them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.embed_dim, kernel_size=size, stride=size)

    def forward(self, clips_BCTHW: Tensor) -> Tensor:
        return self.proj(clips_BCTHW).flatten(2).transpose(1, 2)


def statistics_of(clips: Tensor, config: ModelConfig) -> Statistics | None:
    """What operations need to know of these clips; None where the Triton kernels read them: uint8 [B, T, H,
    W, 3] or normalised float [B, 3, T, H, W], with ImageNet's mean and deviation.

    All others are values as files hold them, uint8, uint16 or float32 [B, T, H, W, C].
    """
    if config.has_imagenet_pixels:
        normalised = clips.is_floating_point() and not (clips.ndim == 5 and clips.shape[4] == 3)
        if clips.dtype == torch.uint8 or normalised:
            return None
    return Statistics(*config.statistics)


def clip_sides(clips: Tensor, config: ModelConfig) -> tuple[int, int, int]:
    """Frames, height and width of such clips.

    Raises:
        InputError: clips of other channels.
    """
    if statistics_of(clips, config) is None and clips.dtype != torch.uint8:
        channels, sides = clips.shape[1], clips.shape[2:5]
    else:
        channels, sides = clips.shape[-1], clips.shape[1:4]
    if clips.ndim != 5 or channels != config.in_channels:
        raise InputError(
            f"clips of shape {list(clips.shape)} do not fit a model of {config.in_channels} channels: they "
            f"are {layouts(config)}"
        )
    frames, height, width = sides
    return frames, height, width


def layouts(config: ModelConfig) -> str:
    """How clips of a model may lie, in words."""
    if config.has_imagenet_pixels:
        return "uint8 [B, T, H, W, 3] or normalised float [B, 3, T, H, W]"
    return f"uint8, uint16 or float32 [B, T, H, W, {config.in_channels}]"


def register_positions(module: nn.Module, config: ModelConfig) -> None:
    """Give `module` the encoder's `pos_embed` [1, N, D]: a parameter, or fixed and left out of checkpoints as
    in the published code."""
    if config.learned_pos:
        module.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, config.embed_dim))
        nn.init.trunc_normal_(module.pos_embed, std=0.02, a=-0.02, b=0.02)
        return
    module.register_buffer("pos_embed", fixed_positions(config, config.embed_dim), persistent=False)
