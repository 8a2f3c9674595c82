"""Stacks of frames in TIFF, with tifffile: pages, or a series of ImageJ or OME; uint8, uint16 or float32.

Axes other than height and width are time (T, Z, or what tifffile names I or Q) and channels (C, or S for
samples of a pixel), at most one of each; further ones of length 1 are left out.
"""

from __future__ import annotations

from typing import IO, Any

import numpy as np

from vmae.data.channels import DTYPES
from vmae.data.manifest import VideoEntry
from vmae.data.readers import Backend, Library
from vmae.data.video_reader import DecodeError, VideoReader

_TIME, _CHANNELS = "TZIQ", "CS"
SUFFIXES = (".tif", ".tiff")


class TiffReader(VideoReader):
    """A `.tif` file of frames; only the pages that are wanted are read."""

    def __init__(self, entry: VideoEntry) -> None:
        self.path = entry.path
        self._file, self._series = open_tiff(entry.path, entry.path)
        try:
            self._order, self._shape = _axes_of(self._series, self.path)
        except BaseException:
            self._file.close()
            raise

    @property
    def size(self) -> tuple[int, int]:
        return self._shape[2], self._shape[1]

    def __len__(self) -> int:
        return self._shape[0]

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        """Pages that hold these frames, each read once."""
        series = self._series
        page_axes = len(series.pages[0].shape) if len(series.pages) > 1 else 0
        outer, inner = series.shape[: series.ndim - page_axes], series.shape[series.ndim - page_axes :]
        try:
            if not outer or len(series.pages) != int(np.prod(outer)):
                return self._laid_out(series.asarray(), self._order)[indices]
            time = next((n for n, axis in enumerate(series.axes[: len(outer)]) if axis in _TIME), None)
            if time is None or outer[time] != len(self):  # time lies within a page
                return self._laid_out(series.asarray(), self._order)[indices]
            places = np.arange(int(np.prod(outer))).reshape(outer).take(indices, axis=time)
            pages = [series.pages[int(place)].asarray() for place in places.ravel()]
        except Exception as error:  # tifffile raises TiffFileError, ValueError, struct.error and more
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DecodeError(f"{self.path}: cannot be decoded: {reason}") from None
        return self._laid_out(np.stack(pages).reshape(*places.shape, *inner), self._order)

    @staticmethod
    def _laid_out(array: np.ndarray, order: tuple[int | None, ...]) -> np.ndarray:
        """[T, H, W, C] of an array whose axes stand in `order`; None for one that is not there."""
        kept = [axis for axis in order if axis is not None]
        others = tuple(axis for axis in range(array.ndim) if axis not in kept)
        moved = array.transpose(*kept, *others).reshape([array.shape[axis] for axis in kept])
        for place, axis in enumerate(order):
            if axis is None:
                moved = np.expand_dims(moved, place)
        return np.ascontiguousarray(moved.astype(moved.dtype.newbyteorder("="), copy=False))

    def close(self) -> None:
        self._file.close()


def open_tiff(source: str | IO[bytes], name: str) -> tuple[Any, Any]:
    """The open file and its first series; raises DecodeError."""
    import tifffile

    try:
        file = tifffile.TiffFile(source)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DecodeError(f"{name}: cannot be opened: {reason}") from None
    if not file.series:
        file.close()
        raise DecodeError(f"{name}: has no frames")
    return file, file.series[0]


def read_image(source: str | IO[bytes], name: str) -> np.ndarray:
    """[H, W, C] of a TIFF that is one frame."""
    file, series = open_tiff(source, name)
    with file:
        order, shape = _axes_of(series, name)
        if shape[0] != 1:
            raise DecodeError(f"{name}: has {shape[0]} frames, and an image of a folder is one")
        try:
            return TiffReader._laid_out(series.asarray(), order)[0]
        except Exception as error:
            raise DecodeError(f"{name}: cannot be decoded: {str(error).splitlines()[0]}") from None


def _axes_of(series: Any, name: str) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """Places of time, height, width and channels among a series' axes, and the lengths [T, H, W, C].

    Raises:
        DecodeError: other axes, or a dtype that is none of a stack's.
    """
    axes, shape, dtype = series.axes, series.shape, np.dtype(series.dtype)
    if dtype.newbyteorder("=") not in DTYPES:
        raise DecodeError(f"{name}: cannot be opened: frames are uint8, uint16 or float32, not {dtype}")
    kinds = (_TIME, "Y", "X", _CHANNELS)
    found = {kind: [n for n, axis in enumerate(axes) if axis in kind] for kind in kinds}
    long = {kind: [n for n in places if shape[n] > 1] for kind, places in found.items()}
    others = [n for n, axis in enumerate(axes) if axis not in f"{_TIME}YX{_CHANNELS}" and shape[n] > 1]
    if others or any(len(places) > 1 for places in long.values()) or not (found["Y"] and found["X"]):
        raise DecodeError(
            f"{name}: cannot be opened: axes {axes} of {list(shape)} are no frames: height, width, and at "
            "most one axis of time and one of channels"
        )
    order = tuple(next(iter(long[kind] or found[kind]), None) for kind in kinds)
    return order, tuple(1 if axis is None else shape[axis] for axis in order)


def missing() -> str | None:
    """What to install; None where tifffile is there."""
    try:
        import tifffile  # noqa: F401
    except ImportError as error:
        return f"stacks and images in TIFF of other channels need tifffile ({error}): `pip install tifffile`"
    return None


BACKEND = Backend(
    "tifffile",
    ("tiff",),
    TiffReader,
    missing,
    library=Library(
        name="tifffile",
        module="tifffile",
        packages=("tifffile",),
        install="pip install tifffile",
        without="no TIFF stacks as videos, and no images in TIFF but those of Pillow",
    ),
)
