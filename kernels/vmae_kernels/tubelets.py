"""Gathering tubelets (2 x p x p pixels x 3 channels) from a clip, for the references of all operations.

Clips of other channels, dtypes or statistics than the kernels' are "stored": [B, T, H, W, C] as files hold
them, uint8, uint16 or float32, with a mean and a deviation of each channel. References alone take them.

Legend: B clips, T frames, H x W pixels, C channels, n tokens a clip, t tubelet depth, p patch side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Dtypes of stored clips, and the value that counts as 1.
STORED_RANGES = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.float32: 1.0}


class Statistics(NamedTuple):
    """Mean and deviation of each channel, of values over their dtype's `STORED_RANGES`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def clip_grid(
    clips: Tensor, patch_size: int, tubelet_size: int, statistics: Statistics | None = None
) -> tuple[int, int, int]:
    """Tokens along (time, height, width) of uint8 [B, T, H, W, 3] or float [B, 3, T, H, W] clips; with
    `statistics`, of stored ones.

    Raises:
        ValueError: another shape or dtype, or sides that the tubelet does not divide.
    """
    if statistics is not None:
        _check_stored(clips, statistics)
        sides = clips.shape[1:4]
    elif clips.ndim == 5 and clips.dtype == torch.uint8 and clips.shape[-1] == 3:
        sides = clips.shape[1:4]
    elif clips.ndim == 5 and clips.is_floating_point() and clips.shape[1] == 3:
        sides = clips.shape[2:5]
    else:
        raise ValueError(
            "clips must be uint8 [B, T, H, W, 3] or normalised float [B, 3, T, H, W], not "
            f"{str(clips.dtype).removeprefix('torch.')} {list(clips.shape)}"
        )
    steps = (tubelet_size, patch_size, patch_size)
    if any(side % step for side, step in zip(sides, steps)):
        raise ValueError(
            f"tubelets of {steps} pixels do not divide a clip of {tuple(sides)} (frames, height, width)"
        )
    frames, height, width = (side // step for side, step in zip(sides, steps))
    return frames, height, width


def _check_stored(clips: Tensor, statistics: Statistics) -> None:
    channels = len(statistics.mean)
    if clips.ndim != 5 or clips.shape[-1] != channels or clips.dtype not in STORED_RANGES:
        raise ValueError(
            f"clips must be uint8, uint16 or float32 [B, T, H, W, {channels}], not "
            f"{str(clips.dtype).removeprefix('torch.')} {list(clips.shape)}"
        )


def clip_strides(clips: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The clip as the kernels read it, and its strides (clip, frame, line, channel) in elements.

    Any batch, frame and line stride will do. Pixels of a line must be adjacent (channels last in uint8, one
    channel's in float), else a contiguous copy is made.

    Raises:
        ValueError: a single clip spans 2**31 elements or more; offsets inside a clip are 32-bit.
    """
    last = (3, 1) if clips.dtype == torch.uint8 else (1,)
    if clips.stride()[-len(last) :] != last:
        clips = clips.contiguous()
    if clips.dtype == torch.uint8:
        clip, frame, line, channel = *clips.stride()[:3], 1
    else:
        clip, channel, frame, line, _ = clips.stride()
    if 1 + sum((side - 1) * abs(step) for side, step in zip(clips.shape[1:], clips.stride()[1:])) >= 2**31:
        raise ValueError(f"a clip of shape {list(clips.shape[1:])} spans 2**31 elements or more")
    return clips, (clip, frame, line, channel)


def gather_tubelets(
    clips: Tensor,
    tokens: Tensor,
    patch_size: int,
    tubelet_size: int = 2,
    statistics: Statistics | None = None,
) -> Tensor:
    """Pixels of the tubelets `tokens`, in the dtype of `clips`.

    Args:
        clips: uint8 [B, T, H, W, 3] or float [B, 3, T, H, W]; with `statistics`, stored ones.
        tokens: int [B, n], indices in (frame, row, column) order.

    Returns:
        [B, n, t, p, p, 3] (C where clips are stored), pixel order (t, h, w, c).
    """
    frames, rows, columns = clip_grid(clips, patch_size, tubelet_size, statistics)
    if tokens.ndim != 2 or tokens.shape[0] != clips.shape[0]:
        raise ValueError(f"tokens must be [B={clips.shape[0]}, n], not {list(tokens.shape)}")
    tokens = tokens.long()
    frame, row, column = tokens // (rows * columns), tokens // columns % rows, tokens % columns
    clip = torch.arange(clips.shape[0], device=clips.device)[:, None]
    split = (frames, tubelet_size, rows, patch_size, columns, patch_size)
    if clips.dtype == torch.uint8 or statistics is not None:
        return clips.reshape(clips.shape[0], *split, clips.shape[-1])[clip, frame, :, row, :, column]
    return clips.reshape(clips.shape[0], 3, *split)[clip, :, frame, :, row, :, column].permute(
        0, 1, 3, 4, 5, 2
    )


def normalise(pixels: Tensor, mean: tuple = MEAN, std: tuple = STD) -> Tensor:
    """`(x / 255 - mean) / std` over a last dimension of channels, float32; uint16 is divided by 65535, and
    floats are taken as they are."""
    mean_c = torch.tensor(mean, dtype=torch.float32, device=pixels.device)
    std_c = torch.tensor(std, dtype=torch.float32, device=pixels.device)
    return (stored_units(pixels) - mean_c) / std_c


def stored_units(pixels: Tensor) -> Tensor:
    """Values as files hold them, over their dtype's `STORED_RANGES`, float32."""
    most = STORED_RANGES[pixels.dtype]
    return pixels.float() if most == 1 else pixels.float() / most


def unit_pixels(pixels: Tensor, mean: tuple = MEAN, std: tuple = STD) -> Tensor:
    """Pixels in [0, 1], float32, last dimension of three channels: uint8 divided by 255, floats
    un-normalised."""
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    mean_c = torch.tensor(mean, dtype=torch.float32, device=pixels.device)
    std_c = torch.tensor(std, dtype=torch.float32, device=pixels.device)
    return pixels.float() * std_c + mean_c
