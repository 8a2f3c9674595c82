"""Frames of other channels and dtypes than RGB in 8 bits: files of them, and what a batch makes of them.

A stack is a file with all frames of a video: a numpy array [T, H, W] or [T, H, W, C], or a TIFF. Frames are
uint8, uint16 or float32. What counts as 1 is 255, 65535 and 1: `vmae_kernels.Statistics` are of such values.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmae.data.list_lines import VideoEntry
from vmae.errors import InputError

STACKS = {".npy": "npy", ".tif": "tiff", ".tiff": "tiff"}  # suffix -> kind of backend that reads it
DTYPES = tuple(map(np.dtype, ("uint8", "uint16", "float32")))
RGB = 3


def reading_kind(entry: VideoEntry) -> str:
    """The kind of backend that reads an entry: its own, or that of a stack."""
    if entry.kind != "video":
        return entry.kind
    return STACKS.get(os.path.splitext(entry.path)[1].lower(), "video")


def is_stack(entry: VideoEntry) -> bool:
    """Whether an entry is a file of frames, not a video."""
    return reading_kind(entry) in STACKS.values()


def refuse_stacks(entries: Sequence[VideoEntry], what: str) -> None:
    """Raises InputError, which names the first one, where there is a stack among `entries`."""
    first = next((entry for entry in entries if is_stack(entry)), None)
    if first is not None:
        raise InputError(f"{first.path}: is a stack of frames, no video file; {what}")


def join_clips(clips: Sequence[Tensor]) -> Tensor:
    """[B, T, H, W, C] of such clips. Where their dtypes differ, all become float32, over what counts as 1:
    a model with statistics sees the same values."""
    if any(clip.dtype != clips[0].dtype for clip in clips):
        from vmae_kernels.tubelets import STORED_RANGES  # here: `--help` loads no kernels

        clips = [clip.float() / STORED_RANGES[clip.dtype] for clip in clips]
    return torch.cat(list(clips))


def channel_moments(frames: np.ndarray) -> dict[str, list[float]]:
    """Means over [T, H, W, C] of the values of each channel and of their squares, over what counts as 1."""
    from vmae_kernels.tubelets import STORED_RANGES

    most = STORED_RANGES[getattr(torch, str(frames.dtype))]
    values = frames.reshape(-1, frames.shape[-1]).astype(np.float64) / most
    return {"mean": values.mean(0).tolist(), "mean_square": np.square(values).mean(0).tolist()}


def describe_statistics(records: Sequence[dict[str, Any]]) -> list[str]:
    """Mean and deviation of each channel over some records, as flags of a run, where they have them."""
    known = [record for record in records if "mean" in record]
    lines = []
    for count in sorted({len(record["mean"]) for record in known}):
        same = [record for record in known if len(record["mean"]) == count]
        mean = np.mean([record["mean"] for record in same], axis=0)
        square = np.mean([record["mean_square"] for record in same], axis=0)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        words = [" ".join(f"{value:.6g}" for value in values) for values in (mean, std)]
        lines.append(
            f"statistics of {len(same)} videos: --in-channels {count} --channel-mean {words[0]} "
            f"--channel-std {words[1]}"
        )
    return lines
