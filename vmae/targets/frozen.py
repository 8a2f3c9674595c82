"""Frozen encoders as teachers, whatever they are of: what `vmae.targets.teacher` asks of one, and how clips
and token grids of one size become those of another.

Legend: B clips, T frames, H x W pixels, N tokens, C the teacher's width, F frames of all clips.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from vmae.errors import InputError
from vmae.model.embed import clip_sides, statistics_of
from vmae.targets.settings import LAST, TargetConfig
from vmae_kernels.tubelets import STORED_RANGES

Grid = tuple[int, int, int]


class FrozenEncoder(abc.ABC):
    """An encoder that is never trained.

    Attributes:
        module: its weights.
        path: where they come from.
        width: C.
        grid: its tokens of a student's clip, along time, height and width.
        macs: multiply-accumulates of a clip.
        identity: what decides its latents beside the settings, plain containers.
        notes: what was assumed or changed, in some words each.
    """

    module: nn.Module
    path: str
    width: int
    grid: Grid
    macs: int
    identity: dict[str, Any]
    notes: list[str]

    @abc.abstractmethod
    def layers(self, clips: Tensor) -> Iterator[Tensor]:
        """Latents [B, N, C] of each layer that is wanted, in order; no block after the last of them runs.

        Args:
            clips: as the student sees them: uint8 [B, T, H, W, 3], or normalised float [B, 3, T, H, W].
        """

    @abc.abstractmethod
    def check_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises InputError where its attention does not run there."""


def freeze(module: nn.Module, dtype: torch.dtype) -> None:
    """No gradients, eval mode, and the weights of linear layers in `dtype`: half the bytes in bf16, and
    autocast casts none of them again. Norms, embeddings and what else there is stay float32."""
    module.requires_grad_(False).eval()
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.to(dtype)


def wanted_layers(settings: TargetConfig, depth: int, path: str) -> list[int]:
    """Numbers of the blocks whose latents are wanted, in order; none means the model's own end.

    Raises:
        InputError: there is no such block.
    """
    if settings.teacher_layers == LAST:
        return []
    numbers = sorted(set(map(int, settings.teacher_layers.split(","))))
    if numbers[-1] > depth:
        raise InputError(
            f"--teacher-layers {settings.teacher_layers}: the teacher {path} has {depth} blocks, 1 to {depth}"
        )
    return numbers


def nearest(length: int, step: int) -> int:
    """The multiple of `step` next to `length`."""
    return max(int(length / step + 0.5), 1) * step


def frames_of(clips: Tensor, config: ModelConfig) -> Tensor:
    """float32 [B, T, C, H, W], values over what counts as 1, of clips in any form that a model takes."""
    if clips.dtype == torch.uint8 or statistics_of(clips, config) is not None:
        return clips.permute(0, 1, 4, 2, 3).float() / STORED_RANGES[clips.dtype]
    mean, std = (
        clips.new_tensor(of, dtype=torch.float32).view(3, 1, 1) for of in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return clips.transpose(1, 2).float() * std + mean


def resized(frames_FCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames of another size, bilinear and antialiased."""
    if frames_FCHW.shape[-2:] == size:
        return frames_FCHW
    return F.interpolate(frames_FCHW, size=size, mode="bilinear", antialias=True, align_corners=False)


def fitted(clips: Tensor, config: ModelConfig) -> Tensor:
    """Clips with the frames and the size that a video model takes: the nearest frames in time, resized; as
    they are where they fit, else normalised float [B, 3, T, H, W], or float32 [B, T, H, W, C] of a model of
    other channels or statistics."""
    shape, wanted = clip_sides(clips, config), (config.num_frames, *config.image_hw)
    if shape == wanted:
        return clips
    frames = frames_of(clips, config)
    if shape[0] != wanted[0]:
        places = (torch.arange(wanted[0], device=clips.device) + 0.5) * (shape[0] / wanted[0])
        frames = frames[:, places.long()]
    x = resized(frames.flatten(0, 1), config.image_hw)
    if not config.has_imagenet_pixels:
        return x.unflatten(0, (-1, wanted[0])).permute(0, 1, 3, 4, 2)
    mean, std = (x.new_tensor(of).view(3, 1, 1) for of in (IMAGENET_MEAN, IMAGENET_STD))
    return ((x - mean) / std).unflatten(0, (-1, wanted[0])).transpose(1, 2)


def regridded(tokens_BNC: Tensor, grid: Grid, wanted: Grid) -> Tensor:
    """Tokens of one grid (time, height, width) at the places of another: trilinear, in float32."""
    if grid == wanted:
        return tokens_BNC
    x = tokens_BNC.float().transpose(1, 2).unflatten(2, grid)
    return F.interpolate(x, size=wanted, mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)
