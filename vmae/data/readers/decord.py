"""decord 0.6, or decord2 for newer Pythons: for files that PyAV finds harmless. The slowest, and it refuses
most."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from vmae.data.inspection import (
    EVEN_PIXELS,
    PLAIN_PIXELS,
    check_length,
    find_hazard,
    inspector_missing,
)
from vmae.data.manifest import VideoEntry
from vmae.data.readers import Backend, Library
from vmae.data.video_reader import DecodeError, VideoReader, call_library, first_reason


class DecordReader(VideoReader):
    """One thread on the CPU, since the loader's workers already fill the cores."""

    def __init__(self, entry: VideoEntry) -> None:
        self.path = entry.path
        # decord has no types; its `VideoReader`.
        self._reader: Any = call_library(entry.path, "opened", self._open)
        if self._length < 1:
            raise DecodeError(f"{self.path}: has no frames")
        check_length(self)

    def _open(self) -> Any:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(os.path.abspath(self.path), ctx=decord.cpu(0), num_threads=1)
        self._length = len(reader)
        self.fps = float(reader.get_avg_fps()) if self._length else None
        return reader

    def __len__(self) -> int:
        return self._length

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        if self._reader is None:
            raise DecodeError(f"{self.path}: is closed")
        try:
            batch = self._reader.get_batch(indices.tolist())
        except Exception as error:  # decord raises RuntimeError, DECORDError and more
            raise DecodeError(f"{self.path}: cannot be decoded: {first_reason(str(error), [])}") from None
        # A program that set decord's bridge gets tensors of its framework; all of them convert.
        return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)

    def close(self) -> None:
        self._reader = None


def _missing() -> str | None:
    try:
        import decord  # noqa: F401
    except Exception as error:  # ImportError, or OSError and RuntimeError from its shared library
        # decord2 installs under the same import name, for newer Pythons too.
        return (
            f"decoding video needs decord ({error}): `pip install decord`, or `pip install decord2` where "
            "that fails"
        )
    return inspector_missing("decord")


def _refuses(entry: VideoEntry) -> str | None:
    hazard, found = find_hazard(entry)
    if hazard is not None:
        return hazard
    if found.streams > 1:
        return f"{found.streams} video streams"
    if found.open_gop:
        return "open GOP"
    odd = found.pixels in EVEN_PIXELS and any(side % 2 for side in found.size)
    if odd or found.pixels not in PLAIN_PIXELS:
        return f"{found.pixels} pixels of {found.size[0]} x {found.size[1]}"
    return None


BACKEND = Backend(
    "decord",
    ("video",),
    DecordReader,
    _missing,
    _refuses,
    order=30,
    library=Library(
        name="decord",
        module="decord",
        packages=("decord", "decord2"),
        install="pip install decord, or decord2 (newer Pythons, AV1); never both",
        without="nothing: PyAV reads all that it reads; only bench/data.py's baseline is gone",
    ),
)
