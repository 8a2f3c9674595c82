"""Videos that are in memory, and folders of images without a list: both read like video files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vmae.data.channels import DTYPES, RGB
from vmae.data.files import path_kind
from vmae.data.manifest import VideoEntry
from vmae.data.video_files import IMAGE_SUFFIXES, is_image, is_video
from vmae.data.video_reader import VideoReader
from vmae.errors import InputError

_NUMBERED = re.compile(r"(?P<prefix>.*?)(?P<number>\d+)(?P<suffix>\.[A-Za-z]+)")
_LAYOUT = "frames are uint8 [T, H, W, 3], RGB from 0 to 255"


class ArrayReader(VideoReader):
    """Frames in memory.

    Args:
        frames: uint8 [T, H, W, 3], RGB; see `check_frames`.
        name: for messages.
        channels: of the frames.
    """

    backend = "memory"

    def __init__(self, frames: np.ndarray, name: str = "frames", channels: int = RGB) -> None:
        self._frames, self.path, self.channels = frames, name, channels

    def __len__(self) -> int:
        return len(self._frames)

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        return self._frames[indices]

    def iterate(self) -> Iterator[np.ndarray]:
        yield from self._frames

    def close(self) -> None:
        pass


def is_array(video: Any) -> bool:
    """Whether `video` holds frames rather than names a file."""
    return isinstance(video, (np.ndarray, torch.Tensor))


def check_frames(frames: Any, name: str = "frames", channels: int = RGB) -> np.ndarray:
    """uint8 [T, H, W, 3] from such a numpy array or a tensor on any device, contiguous and writable; of other
    `channels` uint8, uint16 or float32 [T, H, W, C].

    BGR, as OpenCV gives it, cannot be told from RGB: `frames[..., ::-1]` turns it.

    Raises:
        InputError: another dtype or shape; the message says how to change it.
    """
    shape = list(frames.shape)
    kind = str(frames.dtype).removeprefix("torch.")
    if channels != RGB:
        if frames.ndim != 4 or shape[-1] != channels or 0 in shape or kind not in map(str, DTYPES):
            raise InputError(
                f"{name}: frames of a model of {channels} channels are uint8, uint16 or float32 "
                f"[T, H, W, {channels}]; these are {kind} {shape}"
            )
        return _in_memory(frames)
    if frames.ndim == 4 and shape[-1] != 3:
        advice = "grey or with transparency? make them RGB"
        if shape[1] == 3:
            advice = "this looks like [T, 3, H, W]: `.transpose(0, 2, 3, 1)`, torch's `.permute(0, 2, 3, 1)`"
        elif shape[0] == 3:
            advice = "this looks like [3, T, H, W]: `.transpose(1, 2, 3, 0)`, torch's `.permute(1, 2, 3, 0)`"
        raise InputError(f"{name}: {_LAYOUT}; these are {shape}; {advice}")
    if frames.ndim != 4:
        advice = ""
        if frames.ndim == 5:
            advice = "; several videos are a list of them: `list(frames)`"
        elif frames.ndim == 3:
            advice = "; one frame of several? `numpy.stack(frames)` makes a video of them"
        raise InputError(f"{name}: {_LAYOUT}; these are {shape}{advice}")
    if kind != "uint8":
        raise InputError(
            f"{name}: {_LAYOUT}, not {kind}: pixels are normalised here. From 0 to 1: "
            "`(frames * 255).round()` first; then numpy's `.astype('uint8')` or torch's `.byte()`"
        )
    if 0 in shape:
        raise InputError(f"{name}: {_LAYOUT}; these are {shape}: there is no pixel")
    return _in_memory(frames)


def _in_memory(frames: Any) -> np.ndarray:
    if isinstance(frames, torch.Tensor):
        frames = frames.detach().cpu().numpy()
    return np.require(frames, requirements=["C", "W"])


def path_entry(path: str | os.PathLike) -> VideoEntry:
    """The entry of a path: a video file, or a folder of images. A video's suffix is taken at its word: only
    the worker that decodes it asks its file system."""
    name = os.fspath(path)
    return VideoEntry(name) if is_video(name) else frame_folder(name) or VideoEntry(name)


def frame_folder(path: str | Path) -> VideoEntry | None:
    """The entry of a folder of images, one file a frame, numbered without a gap; None for anything else.

    Raises:
        InputError: a folder of videos, or images whose names do not number them.
    """
    if path_kind(path) != "a folder":
        return None
    try:
        names = [name for name in os.listdir(path) if not name.startswith(".")]
    except OSError as error:
        raise InputError(f"folder {str(path)!r} cannot be read: {error.strerror}") from None
    images = [name for name in names if is_image(name)]
    if not images:
        if any(map(is_video, names)):
            raise InputError(
                f"folder {str(path)!r} holds videos, not frames: give their paths (in Python a list of them)"
            )
        raise InputError(f"folder {str(path)!r} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return _numbered(str(path), images)


def _numbered(path: str, images: list[str]) -> VideoEntry:
    """The entry of images by their names."""
    parts = [_NUMBERED.fullmatch(name) for name in images]
    kinds = {(part["prefix"], part["suffix"]) for part in parts if part}
    if len(kinds) != 1 or None in parts:
        raise InputError(
            f"folder {path!r}: its images are not numbered alike (such as img_00001.jpg, img_00002.jpg): "
            f"{', '.join(sorted(images)[:3])}"
        )
    ((prefix, suffix),) = kinds
    texts = sorted((part["number"] for part in parts if part), key=int)
    start, total = int(texts[0]), len(texts)
    width = len(texts[0])
    padded = f"{{:0{width}}}" if texts[0].startswith("0") or len(texts[-1]) == width else "{}"
    pattern = _literal(prefix) + padded + _literal(suffix)
    there = set(images)
    for number in range(start, start + total):
        if pattern.format(number) not in there:
            raise InputError(f"folder {path!r}: {pattern.format(number)} is missing between its images")
    return VideoEntry(path, "frames", start, total, pattern=pattern)


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
