"""Stacks of frames in numpy's own format: [T, H, W], or [T, H, W, C]; uint8, uint16 or float32.

Frames are read one by one at their places in the file, which is not mapped: a file that shrinks meanwhile is
an error, not a signal.
"""

from __future__ import annotations

import numpy as np

from vmae.data.channels import DTYPES
from vmae.data.manifest import VideoEntry
from vmae.data.readers import Backend
from vmae.data.video_reader import DecodeError, VideoReader


class NumpyReader(VideoReader):
    """A `.npy` file of frames."""

    def __init__(self, entry: VideoEntry) -> None:
        self.path = entry.path
        try:
            self._file = open(entry.path, "rb")
        except OSError as error:
            raise DecodeError(f"{self.path}: cannot be read: {error.strerror}") from None
        try:
            self._shape, self._dtype = self._read_head()
        except BaseException:
            self._file.close()
            raise
        self._start = self._file.tell()

    def _read_head(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape [T, H, W, C] and dtype."""
        try:
            version = np.lib.format.read_magic(self._file)
            read = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(self._file)
        except (ValueError, OSError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise DecodeError(f"{self.path}: cannot be opened: no numpy array ({reason})") from None
        if dtype.newbyteorder("=") not in DTYPES:
            raise DecodeError(
                f"{self.path}: cannot be opened: frames are uint8, uint16 or float32, not {dtype}; "
                "`numpy.save(path, frames.astype('float32'))` writes them so"
            )
        if by_columns or len(shape) not in (3, 4) or 0 in shape:
            order = " in Fortran's order" if by_columns else ""
            raise DecodeError(
                f"{self.path}: cannot be opened: frames are [T, H, W] or [T, H, W, C] in C's order, not "
                f"{list(shape)}{order}"
            )
        return (*shape, 1) if len(shape) == 3 else shape, dtype

    @property
    def size(self) -> tuple[int, int]:
        return self._shape[2], self._shape[1]

    def __len__(self) -> int:
        return self._shape[0]

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        shape = self._shape[1:]
        values = int(np.prod(shape))
        frames = np.empty((len(indices), *shape), self._dtype.newbyteorder("="))
        for place, index in enumerate(indices.tolist()):
            try:
                self._file.seek(self._start + index * values * self._dtype.itemsize)
                frame = np.fromfile(self._file, self._dtype, values)
            except (OSError, ValueError) as error:
                raise DecodeError(f"{self.path}: cannot be decoded: {error}") from None
            if len(frame) < values:
                raise DecodeError(f"{self.path}: cannot be decoded: it ends within frame {index}")
            frames[place] = frame.reshape(shape)
        return frames

    def close(self) -> None:
        self._file.close()


BACKEND = Backend("numpy", ("npy",), NumpyReader, lambda: None)
