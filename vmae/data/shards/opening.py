"""Readers of what lies in a shard: any library reads it, from a file in memory."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator

import numpy as np

from vmae.data.manifest import VideoEntry
from vmae.data.readers.frames import FrameFolderReader
from vmae.data.shards.entries import ShardEntry
from vmae.data.shards.reading import read_images, read_video
from vmae.data.video_reader import DecodeError, VideoReader


class StoredFrames(FrameFolderReader):
    """Images of a shard; only those that are wanted are read."""

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        assert isinstance(self._entry, ShardEntry)
        self._images = read_images(self._entry, indices.tolist())
        return super()._decode(indices)

    def _image(self, index: int) -> tuple[str, io.BytesIO]:
        return f"{self.path}, image {index}", io.BytesIO(self._images.pop(index))


def open_stored(entry: ShardEntry, open_file: Callable[[VideoEntry], VideoReader]) -> VideoReader:
    """Open an entry of a shard.

    Args:
        open_file: opens the entry of a video file.

    Raises:
        ShardError: the shard cannot be read, or is not what its index says.
        DecodeError: as `open_file` does.
    """
    if entry.kind == "frames":
        return StoredFrames(entry)
    _, video = read_video(entry)
    handle, name = _memory_file(video)
    try:
        reader = open_file(VideoEntry(name, stride=entry.stride))
    except DecodeError as error:
        os.close(handle)
        told = DecodeError(str(error).replace(name, entry.path))
        told.library = error.library
        raise told from None
    except BaseException:
        os.close(handle)
        raise
    weakref.finalize(reader, os.close, handle)
    return reader


@contextlib.contextmanager
def stored_file(entry: ShardEntry) -> Iterator[str]:
    """The path of a video's bytes as a file, for what reads files only; it is there within this context.

    Raises:
        ShardError: see `open_stored`.
    """
    handle, name = _memory_file(read_video(entry)[1])
    try:
        yield name
    finally:
        os.close(handle)


def _memory_file(content: bytes) -> tuple[int, str]:
    """(handle, path) of a file that exists while the handle is open, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("video", os.MFD_CLOEXEC)
    else:
        handle, path = tempfile.mkstemp()
        os.unlink(path)
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]
    os.lseek(handle, 0, os.SEEK_SET)
    return handle, f"/proc/self/fd/{handle}" if os.path.isdir("/proc/self/fd") else f"/dev/fd/{handle}"
