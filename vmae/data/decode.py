"""Pixels out of files, behind one small interface.

A backend is a name, the kinds of entries it reads, and a function that opens one. `open_video` finds it in `BACKENDS`;
another decoder joins with `register_backend`, and no caller changes. Readers are opened where they are used (in the
loader's worker), hold one file and are closed at once: nothing that decodes is ever shared or sent between processes.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vmae.data.manifest import VideoEntry
from vmae.errors import InputError


class DecodeError(InputError):
    """A file that cannot be decoded, or has no frames. The message names it and gives the library's reason."""


class VideoReader(ABC):
    """An open video; a context manager that closes it.

    Attributes:
        path: of the file or folder.
        fps: frames a second, None where it is not known.
    """

    path: str
    fps: float | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Frames of the video, at least 1."""

    @abstractmethod
    def _decode(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3], RGB, of ascending, distinct, valid int64 `indices` [T >= 1]."""

    def frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decode some frames, in any order; each is decoded once, even if it is named twice.

        Args:
            indices: whole numbers [T], from 0, T at least 1.

        Returns:
            uint8 [T, H, W, 3], RGB.

        Raises:
            IndexError: a frame that the video does not have, or no index.
            DecodeError: a frame cannot be decoded.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.ndim != 1 or wanted.size == 0:
            raise IndexError(f"{self.path}: frame indices must be a list of at least one number")
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"{self.path}: frames {wanted.min()} to {wanted.max()} asked for, it has {len(self)}")
        distinct, places = np.unique(wanted, return_inverse=True)
        decoded = self._decode(distinct)
        return decoded if np.array_equal(distinct, wanted) else decoded[places]

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; the reader is of no further use."""

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class Backend:
    """A way to read videos.

    Attributes:
        name: what the user calls it.
        kinds: the `VideoEntry.kind`s it reads.
        open: opens an entry; raises DecodeError.
        missing: None if it can be used here, else what to install.
    """

    name: str
    kinds: tuple[str, ...]
    open: Callable[[VideoEntry], VideoReader]
    missing: Callable[[], str | None]


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> Backend:
    """Make `backend` known to `open_video`. `auto` takes the first known one that reads the kind and is installed."""
    BACKENDS[backend.name] = backend
    return backend


def open_video(source: VideoEntry | str | Path, backend: str = "auto") -> VideoReader:
    """Open a video file or a folder of frames.

    Args:
        source: an entry of a list file, or the path of a video file.
        backend: "auto", or a name in `BACKENDS`.

    Raises:
        DecodeError: the file is not there, cannot be decoded, or has no frames.
        InputError: an unknown backend, one that does not read this kind of entry, or one that is not installed.
    """
    entry = source if isinstance(source, VideoEntry) else VideoEntry(str(source))
    chosen = _choose_backend(entry.kind, backend)
    if not os.path.exists(entry.path):
        raise DecodeError(f"{entry.path}: does not exist")
    if entry.kind == "video" and os.path.isdir(entry.path):
        raise DecodeError(f"{entry.path}: is a folder; for frames give a list file with a line `folder start total`")
    return chosen.open(entry)


def _choose_backend(kind: str, name: str) -> Backend:
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"unknown decoding backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    candidates = [backend for backend in BACKENDS.values() if kind in backend.kinds]
    named = [backend for backend in candidates if backend.name == name]
    # The name chooses among video decoders; a list may mix in frame folders, which most of them do not read.
    if named or (name != "auto" and kind == "video"):
        candidates = named
    if not candidates:
        raise InputError(f"the decoding backend {name!r} does not read entries of kind {kind!r}")
    missing = [backend.missing() for backend in candidates]
    for backend, lack in zip(candidates, missing, strict=True):
        if lack is None:
            return backend
    raise InputError(" or ".join(lack for lack in missing if lack))


class _DecordReader(VideoReader):
    """decord 0.6 or decord2: a CPU decoder with one thread, since the loader's workers already fill the cores."""

    def __init__(self, entry: VideoEntry) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self.path = entry.path
        with _library_stderr() as heard:
            try:
                reader = decord.VideoReader(entry.path, ctx=decord.cpu(0), num_threads=1)
                self._length = len(reader)
                self.fps = float(reader.get_avg_fps()) if self._length else None
            except Exception as error:  # decord raises RuntimeError, DECORDError and more
                failure = error
            else:
                failure = None
        if failure is not None:
            raise DecodeError(f"{self.path}: cannot be opened: {_first_reason(str(failure), heard)}") from None
        if self._length < 1:
            raise DecodeError(f"{self.path}: has no frames")
        self._reader = reader

    def __len__(self) -> int:
        return self._length

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        if self._reader is None:
            raise DecodeError(f"{self.path}: is closed")
        try:
            batch = self._reader.get_batch(indices.tolist())
        except Exception as error:
            raise DecodeError(f"{self.path}: cannot be decoded: {_first_reason(str(error), [])}") from None
        # A program that set decord's bridge gets tensors of its framework; all of them convert.
        return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)

    def close(self) -> None:
        self._reader = None


def _decord_missing() -> str | None:
    try:
        import decord  # noqa: F401
    except Exception as error:  # ImportError, or OSError and RuntimeError from its shared library
        # decord2 installs under the same import name, for newer Pythons too.
        return f"decoding video needs decord ({error}): `pip install decord`, or `pip install decord2` where that fails"
    return None


class _FrameFolderReader(VideoReader):
    """A folder of numbered images, all of one size."""

    def __init__(self, entry: VideoEntry) -> None:
        if entry.total < 1:
            raise DecodeError(f"{entry.path}: has no frames")
        self.path, self._entry = entry.path, entry

    def __len__(self) -> int:
        return self._entry.total

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        images = []
        for index in indices.tolist():
            path = self._entry.frame_path(index)
            try:
                with Image.open(path) as image:
                    images.append(np.asarray(image.convert("RGB")))
            except FileNotFoundError:
                raise DecodeError(f"{path}: does not exist; the list promises {len(self)} frames") from None
            except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError and more
                raise DecodeError(f"{path}: cannot be decoded: {_first_reason(str(error), [])}") from None
            if images[-1].shape != images[0].shape:
                height, width = images[-1].shape[:2]
                raise DecodeError(f"{path}: {width} x {height} pixels, unlike the frames before it")
        return np.stack(images)

    def close(self) -> None:
        pass


register_backend(Backend("decord", ("video",), _DecordReader, _decord_missing))
register_backend(Backend("frames", ("frames",), _FrameFolderReader, lambda: None))

_STDERR_LOCK = threading.Lock()


@contextlib.contextmanager
def _library_stderr() -> Iterator[list[str]]:
    """Keep what C libraries write to stderr from the terminal; yields a list that gets their lines at the end.

    decord tells why a file cannot be opened there and nowhere else. Lines of others that come meanwhile are passed on.
    """
    heard: list[str] = []
    with _STDERR_LOCK:
        try:
            saved = os.dup(2)
        except OSError:  # the process has no stderr
            yield heard
            return
        with tempfile.TemporaryFile() as capture:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(capture.fileno(), 2)
            try:
                yield heard
            finally:
                if sys.stderr is not None:
                    sys.stderr.flush()
                os.dup2(saved, 2)
                os.close(saved)
                capture.seek(0)
                for line in capture.read().decode(errors="replace").splitlines(keepends=True):
                    if line.startswith("["):  # decord: [08:41:57] /src/...; FFmpeg: [mov,mp4 @ 0x55...]
                        heard.append(line.strip())
                    elif line.strip():
                        os.write(2, line.encode())


def _first_reason(message: str, heard: list[str]) -> str:
    """One line without source files and addresses, from a library's exception and what it wrote to stderr."""
    opening = next((line for line in heard if "ERROR opening" in line), None)
    text = opening.rsplit(", ", 1)[-1] if opening else (message.strip().splitlines() or ["unknown reason"])[0]
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", text)
    text = text.replace("failed with 1094995529", "failed: invalid data")  # FFmpeg's AVERROR_INVALIDDATA
    # "Check failed: CODE >= 0 (-1094995529 vs. 0) Thread worker: Error sending packet." -> the words at its end
    return re.sub(r"^Check failed: .*?\(\S+ vs\. \S+\)\s*(?=\S)", "", text).strip() or "unknown reason"
