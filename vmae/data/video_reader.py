"""What every decoder looks like from outside, and what they share: an error, and what C libraries write to
stderr."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from vmae.errors import InputError

_FRAMES_AT_ONCE = 64

# (width, height) as displayed -> (left, top, width, height) of the part that is wanted
Crop = Callable[[int, int], tuple[int, int, int, int]]

Result = TypeVar("Result")
Reader = TypeVar("Reader", bound="VideoReader")


class DecodeError(InputError):
    """A file that cannot be decoded, or has no frames. The message names it and gives the library's reason.

    Attributes:
        library: the backend that failed; None where none was asked.
    """

    library: str | None = None


@contextlib.contextmanager
def memory_as_decode_error(path: str | Path) -> Iterator[None]:
    """Turn a lack of memory, numpy's or torch's, into a `DecodeError` that names the file."""
    try:
        yield
    except MemoryError:
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
    else:
        return
    raise DecodeError(f"{path}: cannot be decoded: it needs more memory than there is")


def call_library(path: str, done: str, function: Callable[[], Result]) -> Result:
    """What `function` gives, which calls a C library: what that writes to stderr is captured, and its
    exceptions become a `DecodeError` of one line.

    Args:
        done: "opened" or "decoded", for the message.
    """
    with library_stderr() as captured:
        try:
            return function()
        except Exception as error:  # RuntimeError, ValueError, and what FFmpeg makes of a damaged file
            failure = error
    raise DecodeError(f"{path}: cannot be {done}: {first_reason(str(failure), captured)}")


def find_box(crop: Crop, width: int, height: int) -> tuple[int, int, int, int]:
    """The part of a picture that `crop` wants.

    Raises:
        InputError: it is not inside.
    """
    left, top, box_width, box_height = box = crop(width, height)
    if not (0 <= left < left + box_width <= width and 0 <= top < top + box_height <= height):
        raise InputError(f"{tuple(box)} is not inside a frame of {width} x {height} pixels")
    return left, top, box_width, box_height


class VideoReader(ABC):
    """An open video; a context manager that closes it.

    Attributes:
        path: name of the file or folder.
        fps: frames a second, None where it is not known.
        codec: FFmpeg's name of it, None where it is not known.
        backend: name of the backend that opened it.
        channels: that frames must have. With 3, images of a folder become RGB in 8 bits; with others, or
            None (any), they keep their channels and dtype.
    """

    path: str
    fps: float | None = None
    codec: str | None = None
    backend: str = "?"
    channels: int | None = 3

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height as displayed; None where they are known only once a frame is decoded."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """Frames of the video, at least 1."""

    @abstractmethod
    def _decode(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3], RGB, of ascending, distinct, valid int64 `indices` [T >= 1]."""

    def _decode_part(self, indices: np.ndarray, crop: Crop) -> np.ndarray:
        """A part of what `_decode` gives: uint8 [T, h, w, 3]. A reader that can cut before it converts
        colours does so."""
        frames = self._decode(indices)
        left, top, width, height = find_box(crop, frames.shape[2], frames.shape[1])
        return frames[:, top : top + height, left : left + width]

    def frames(self, indices: Sequence[int] | np.ndarray, crop: Crop | None = None) -> np.ndarray:
        """Decode some frames, in any order; each is decoded once, even if it is named twice.

        Args:
            indices: whole numbers [T], from 0, T at least 1.
            crop: gives the part of the frames that is wanted, by their width and height: pixels as cut
                afterwards, in less time. None: all of them.

        Returns:
            uint8 [T, H, W, 3], RGB; with `crop`, of its height and width. Of images and stacks of other
                `channels`, [T, H, W, C] in their dtype.

        Raises:
            IndexError: a frame that the video does not have, or no index.
            DecodeError: a frame cannot be decoded.
            InputError: a part that is not inside the frames.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.ndim != 1 or wanted.size == 0:
            raise IndexError(f"{self.path}: frame indices must be a list of at least one number")
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(
                f"{self.path}: frames {wanted.min()} to {wanted.max()} asked for, it has {len(self)}"
            )
        distinct, places = np.unique(wanted, return_inverse=True)
        try:
            with memory_as_decode_error(self.path):
                decoded = self._decode(distinct) if crop is None else self._decode_part(distinct, crop)
                self._check_channels(decoded)
                return decoded if np.array_equal(distinct, wanted) else decoded[places]
        except DecodeError as error:
            error.library = self.backend
            raise

    def _check_channels(self, frames: np.ndarray) -> None:
        """Raises DecodeError where frames have other channels than are wanted."""
        found = frames.shape[-1]
        if self.channels is not None and found != self.channels:
            raise DecodeError(
                f"{self.path}: has {found} channel{'s' * (found != 1)} ({frames.dtype} frames of "
                f"{frames.shape[2]} x {frames.shape[1]}), and the model takes {self.channels} (--in-channels)"
            )

    def iterate(self) -> Iterator[np.ndarray]:
        """Every frame once, in order: uint8 [H, W, 3], RGB.

        Raises:
            DecodeError: a frame cannot be decoded.
        """
        for start in range(0, len(self), _FRAMES_AT_ONCE):
            yield from self.frames(range(start, min(start + _FRAMES_AT_ONCE, len(self))))

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; the reader is of no further use."""

    def __enter__(self: Reader) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_STDERR_LOCK = threading.Lock()


@contextlib.contextmanager
def library_stderr() -> Iterator[list[str]]:
    """Keep what C libraries write to stderr from the terminal; yields a list that gets their lines at the
    end.

    decord tells why a file cannot be opened there and nowhere else. Lines of others that come meanwhile are
    passed on.
    """
    captured: list[str] = []
    with _STDERR_LOCK:
        try:
            saved = os.dup(2)
        except OSError:  # the process has no stderr
            yield captured
            return
        with tempfile.TemporaryFile() as capture:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(capture.fileno(), 2)
            try:
                yield captured
            finally:
                if sys.stderr is not None:
                    sys.stderr.flush()
                os.dup2(saved, 2)
                os.close(saved)
                capture.seek(0)
                for line in capture.read().decode(errors="replace").splitlines(keepends=True):
                    if line.startswith("["):  # decord: [08:41:57] /src/...; FFmpeg: [mov,mp4 @ 0x55...]
                        captured.append(line.strip())
                    elif line.strip():
                        os.write(2, line.encode())


def first_reason(message: str, captured: list[str]) -> str:
    """One line without source files and addresses, from a library's exception and what it wrote to stderr."""
    opening = next((line for line in captured if "ERROR opening" in line), None)
    text = (message.strip().splitlines() or ["unknown reason"])[0]
    if opening:
        text = opening.rsplit(", ", 1)[-1]
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", text)
    text = re.sub(r"^(\w+, )?/\S+\.(cpp|cc|h):\d+, ", "", text)
    text = text.replace("failed with 1094995529", "failed: invalid data")  # FFmpeg's AVERROR_INVALIDDATA
    # "Check failed: CODE >= 0 (-1094995529 vs. 0) Thread worker: Error sending packet." -> what its end says
    return re.sub(r"^Check failed: .*?\(\S+ vs\. \S+\)\s*(?=\S)", "", text).strip() or "unknown reason"
