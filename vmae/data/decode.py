"""Pixels out of files, behind one small interface.

A backend is a name, the kinds of entries it reads, and a function that opens one. `open_video` finds it in
`BACKENDS`; another decoder joins with `register_backend`, and no caller changes. Readers are opened where
they are used (in the loader's worker), hold one file and are closed at once: nothing that decodes is ever
shared or sent between processes.

PyAV, torchcodec, decord (or decord2): `auto` takes the first that is installed and safe for the file.
torchcodec and decord refuse, also when they were named, what PyAV finds in a file and they were found to be
wrong about (docs/decoders.md).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vmae.data.containers import FORMATS, container_kind, names_other_files
from vmae.data.decode_pyav import Inspection, PyavReader, inspect_video, pyav_missing
from vmae.data.files import check_regular
from vmae.data.manifest import VideoEntry
from vmae.data.video_reader import (
    DecodeError,
    VideoReader,
    first_reason,
    library_stderr,
    memory_as_decode_error,
)
from vmae.errors import InputError


@dataclass(frozen=True)
class Backend:
    """A way to read videos.

    Attributes:
        name: what the user calls it.
        kinds: the `VideoEntry.kind`s it reads.
        open: opens an entry; raises DecodeError.
        missing: None if it can be used here, else what to install.
        refuses: what it would decode wrongly of an entry, in a few words; None where it can be trusted.
    """

    name: str
    kinds: tuple[str, ...]
    open: Callable[[VideoEntry], VideoReader]
    missing: Callable[[], str | None]
    refuses: Callable[[VideoEntry], str | None] = lambda entry: None


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> Backend:
    """Make `backend` known to `open_video`. `auto` takes the first known one that is installed and does not
    refuse."""
    BACKENDS[backend.name] = backend
    return backend


def open_video(source: VideoEntry | str | Path, backend: str = "auto") -> VideoReader:
    """Open a video file or a folder of frames.

    Args:
        source: an entry of a list file, or the path of a video file.
        backend: "auto", or a name in `BACKENDS`.

    Raises:
        DecodeError: the file is not there, is no regular one, cannot be decoded, or has no frames.
        InputError: an unknown backend, one that does not read this kind of entry, or one that is not
            installed.
    """
    entry = source if isinstance(source, VideoEntry) else VideoEntry(str(source))
    candidates = find_backends(entry.kind, backend)
    check_regular(entry.path, folder=entry.kind == "frames")
    chosen = _choose_backend(entry, candidates)
    try:
        with memory_as_decode_error(entry.path):
            reader = chosen.open(entry)
    except DecodeError as error:
        error.library = chosen.name
        raise
    reader.backend = chosen.name
    return reader


def find_backends(kind: str, name: str) -> list[Backend]:
    """The installed backends that may read an entry of this kind, at least one, the preferred one first."""
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
    installed = [backend for backend, lack in zip(candidates, missing, strict=True) if lack is None]
    if not installed:
        raise InputError("; or ".join(lack for lack in missing if lack))
    return installed


def _choose_backend(entry: VideoEntry, candidates: list[Backend]) -> Backend:
    refusals = []
    for backend in candidates:
        try:
            refusal = backend.refuses(entry)
        except OSError as error:
            raise DecodeError(f"{entry.path}: cannot be read: {error.strerror}") from None
        except DecodeError as error:
            error.library = backend.name
            raise
        if refusal is None:
            return backend
        refusals.append(f"{backend.name} cannot be trusted with {refusal}")
    others = [
        backend for backend in BACKENDS.values() if entry.kind in backend.kinds and backend not in candidates
    ]
    lacking = [lack for lack in (backend.missing() for backend in others) if lack]
    advice = (
        "; ".join(lacking) or f"another backend may read it: {', '.join(backend.name for backend in others)}"
    )
    error = DecodeError(f"{entry.path}: refused, it would give wrong frames: {'; '.join(refusals)}; {advice}")
    error.library = candidates[-1].name
    raise error


def _check_length(reader: VideoReader) -> None:
    """Refuse a file of which a library counts other frames than PyAV; what is left of a damaged one,
    mostly."""
    expected = inspect_video(reader.path).frames
    if len(reader) != expected:
        raise DecodeError(
            f"{reader.path}: refused, it would give wrong frames: {len(reader)} of {expected} frames are "
            "found"
        )


class _TorchcodecReader(VideoReader):
    """torchcodec in exact mode: the file is scanned once, so that a frame's number is its place in time."""

    def __init__(self, entry: VideoEntry) -> None:
        from torchcodec.decoders import VideoDecoder

        self.path = entry.path
        with library_stderr() as captured:
            try:
                decoder = VideoDecoder(
                    os.path.abspath(entry.path),
                    stream_index=inspect_video(entry.path).stream,
                    dimension_order="NHWC",
                    num_ffmpeg_threads=1,
                    seek_mode="exact",
                )
                self._length = len(decoder)
                self.fps = decoder.metadata.average_fps
            except Exception as error:  # RuntimeError, ValueError, and what FFmpeg makes of a damaged file
                failure = error
            else:
                failure = None
        if failure is not None:
            raise DecodeError(
                f"{self.path}: cannot be opened: {first_reason(str(failure), captured)}"
            ) from None
        if self._length < 1:
            raise DecodeError(f"{self.path}: has no frames")
        _check_length(self)
        self._decoder = decoder

    def __len__(self) -> int:
        return self._length

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        if self._decoder is None:
            raise DecodeError(f"{self.path}: is closed")
        with library_stderr() as captured:
            try:
                return self._decoder.get_frames_at(indices.tolist()).data.numpy()
            except Exception as error:
                failure = error
        raise DecodeError(f"{self.path}: cannot be decoded: {first_reason(str(failure), captured)}")

    def close(self) -> None:
        self._decoder = None


@functools.cache  # a failing import looks for FFmpeg in many versions, which takes longer than a clip
def _torchcodec_missing() -> str | None:
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except ImportError:
        return "torchcodec is not installed: `pip install 'torchcodec>=0.13,<0.14'` and FFmpeg's libraries"
    except Exception as error:  # RuntimeError or OSError of its shared libraries
        reason = (str(error).strip().splitlines() or ["unknown reason"])[0]
        return (
            f"torchcodec does not load ({reason}): it needs FFmpeg's shared libraries (`apt-get install "
            "ffmpeg`) and a "
            "version that fits torch (0.13 loads with torch 2.13 on a CPU; 0.14 to 0.17 link CUDA libraries)"
        )
    return _inspector_missing("torchcodec")


class _DecordReader(VideoReader):
    """decord 0.6 or decord2: a CPU decoder with one thread, since the loader's workers already fill the
    cores."""

    def __init__(self, entry: VideoEntry) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self.path = entry.path
        with library_stderr() as captured:
            try:
                reader = decord.VideoReader(os.path.abspath(entry.path), ctx=decord.cpu(0), num_threads=1)
                self._length = len(reader)
                self.fps = float(reader.get_avg_fps()) if self._length else None
            except Exception as error:  # decord raises RuntimeError, DECORDError and more
                failure = error
            else:
                failure = None
        if failure is not None:
            raise DecodeError(
                f"{self.path}: cannot be opened: {first_reason(str(failure), captured)}"
            ) from None
        if self._length < 1:
            raise DecodeError(f"{self.path}: has no frames")
        _check_length(self)
        self._reader = reader

    def __len__(self) -> int:
        return self._length

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        if self._reader is None:
            raise DecodeError(f"{self.path}: is closed")
        try:
            batch = self._reader.get_batch(indices.tolist())
        except Exception as error:
            raise DecodeError(f"{self.path}: cannot be decoded: {first_reason(str(error), [])}") from None
        # A program that set decord's bridge gets tensors of its framework; all of them convert.
        return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)

    def close(self) -> None:
        self._reader = None


def _decord_missing() -> str | None:
    try:
        import decord  # noqa: F401
    except Exception as error:  # ImportError, or OSError and RuntimeError from its shared library
        # decord2 installs under the same import name, for newer Pythons too.
        return (
            f"decoding video needs decord ({error}): `pip install decord`, or `pip install decord2` where "
            "that fails"
        )
    return _inspector_missing("decord")


def _inspector_missing(name: str) -> str | None:
    lack = pyav_missing()
    return lack and f"{name} is used for files that PyAV finds harmless: {lack}"


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
                check_regular(path)
                with Image.open(path) as image:
                    images.append(np.asarray(image.convert("RGB")))
            except DecodeError as error:
                raise DecodeError(f"{error}; the list promises {len(self)} frames") from None
            except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError and more
                raise DecodeError(f"{path}: cannot be decoded: {first_reason(str(error), [])}") from None
            if images[-1].shape != images[0].shape:
                height, width = images[-1].shape[:2]
                raise DecodeError(f"{path}: {width} x {height} pixels, unlike the frames before it")
        return np.stack(images)

    def close(self) -> None:
        pass


_EVEN_PIXELS = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p"}
_PLAIN_PIXELS = _EVEN_PIXELS | {"yuv444p", "yuvj444p", "gbrp", "gray"}


def find_hazard(entry: VideoEntry) -> tuple[str | None, Inspection]:
    """(why FFmpeg in another library than PyAV would give other frames of a file than PyAV does, what PyAV
    found).

    Measured with the FFmpeg of decord 0.6 and torchcodec 0.13 (on FFmpeg 5.1): docs/decoders.md.

    Raises:
        DecodeError: PyAV cannot read it.
    """
    found = inspect_video(entry.path)
    kind = container_kind(entry.path)
    if kind not in ("MP4", "Matroska") or found.kind != FORMATS[kind]:
        return (kind if kind != "unknown" else f"{found.kind} files"), found
    if names_other_files(entry.path):
        return "a video that may be taken for a manifest", found
    if found.orientation.mirrored:
        return "a mirrored video", found
    return found.hazard, found


def _refused_by_torchcodec(entry: VideoEntry) -> str | None:
    hazard, found = find_hazard(entry)
    deep = found.pixels not in _PLAIN_PIXELS
    return hazard or ("full-range colour of more than 8 bits" if deep and found.full_range else None)


def _refused_by_decord(entry: VideoEntry) -> str | None:
    hazard, found = find_hazard(entry)
    if hazard is None and found.streams > 1:
        return f"{found.streams} video streams"
    if hazard is None and found.open_gop:
        return "open GOP"
    odd = found.pixels in _EVEN_PIXELS and any(side % 2 for side in found.size)
    if hazard is None and (odd or found.pixels not in _PLAIN_PIXELS):
        return f"{found.pixels} pixels of {found.size[0]} x {found.size[1]}"
    return hazard


# The order of `auto`, as measured by bench/data.py on one core (clips of 16 frames, stride 4, short side
# 256): PyAV, which leaves out pictures that H.264 does not need, beats torchcodec on H.264, is level with it
# on HEVC, VP9 and MPEG-4, and refuses least; decord is the slowest and refuses most.
register_backend(Backend("pyav", ("video",), PyavReader, pyav_missing))
register_backend(
    Backend("torchcodec", ("video",), _TorchcodecReader, _torchcodec_missing, _refused_by_torchcodec)
)
register_backend(Backend("decord", ("video",), _DecordReader, _decord_missing, _refused_by_decord))
register_backend(Backend("frames", ("frames",), _FrameFolderReader, lambda: None))
