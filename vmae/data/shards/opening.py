"""Readers of what lies in a shard: any library reads it, from a file in memory."""

from __future__ import annotations

import contextlib
import io
import os
import weakref
from collections.abc import Callable, Iterator

import numpy as np

from vmae.data.manifest import VideoEntry
from vmae.data.readers.frames import FrameFolderReader
from vmae.data.shards.entries import DamagedShard, ShardEntry
from vmae.data.shards.memory_file import memory_file
from vmae.data.shards.packed_reader import PackedReader
from vmae.data.shards.packets import PacketTable
from vmae.data.shards.reading import read_images, read_video
from vmae.data.video_reader import Crop, DecodeError, VideoReader


class StoredFrames(FrameFolderReader):
    """Images of a shard; only those that are wanted are read."""

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        assert isinstance(self._entry, ShardEntry)
        self._images = read_images(self._entry, indices.tolist())
        return super()._decode(indices)

    def _image(self, index: int) -> tuple[str, io.BytesIO]:
        return f"{self.path}, image {index}", io.BytesIO(self._images.pop(index))


class KeptFrames(VideoReader):
    """A video of which every n-th frame is stored, with its frames' own numbers: for a frame that was left
    out, the stored one before it stands in.

    A clip whose stride is a multiple of n has its stride exactly; its start moves to a stored frame. Frames
    that are read together and begin before the first stored one move to it together, where they then still
    end within the video; else the first stored one stands in.

    Args:
        entry: says which frames are stored.
        stored: of these.

    Raises:
        DamagedShard: their number is not what `entry` says.
    """

    def __init__(self, entry: ShardEntry, stored: VideoReader) -> None:
        self._entry, self._stored, self.path = entry, stored, entry.path
        self.fps, self.codec, self.backend = entry.fps or None, stored.codec, stored.backend
        expected = len(range(entry.phase, entry.frames, entry.keep_every))
        if len(stored) != expected:
            stored.close()
            raise DamagedShard(
                f"{self.path}: has {len(stored)} frames, its index says {expected}: make the index anew with "
                "`vmae index`"
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """See `VideoReader.size`."""
        return self._stored.size

    def __len__(self) -> int:
        return self._entry.frames

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        return self._stored.frames(self._places(indices))

    def _decode_part(self, indices: np.ndarray, crop: Crop) -> np.ndarray:
        return self._stored.frames(self._places(indices), crop)

    def _places(self, indices: np.ndarray) -> np.ndarray:
        """Numbers of stored frames; `indices` ascend."""
        late = max(self._entry.phase - int(indices[0]), 0)
        if indices[-1] + late < self._entry.frames:
            indices = indices + late
        return np.maximum(indices - self._entry.phase, 0) // self._entry.keep_every

    def close(self) -> None:
        self._stored.close()


def open_stored(
    entry: ShardEntry, open_file: Callable[[VideoEntry], VideoReader], *, by_packets: bool = False
) -> VideoReader:
    """Open an entry of a shard.

    Args:
        open_file: opens the entry of a video file.
        by_packets: read videos that have a packet table by it, with PyAV's decoder.

    Raises:
        ShardError: the shard cannot be read, or is not what its index says.
        DecodeError: as `open_file` does.
    """
    if entry.kind == "frames":
        return StoredFrames(entry)
    reader = _open_video(entry, open_file, by_packets)
    return reader if entry.keep_every == 1 else KeptFrames(entry, reader)


def _open_video(
    entry: ShardEntry, open_file: Callable[[VideoEntry], VideoReader], by_packets: bool
) -> VideoReader:
    table, video = read_video(entry)
    packets = _read_table(entry, table) if by_packets and table else None
    if packets is not None:
        return PackedReader(entry.path, packets, video)
    handle, name = memory_file(video)
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


def _read_table(entry: ShardEntry, table: bytes) -> PacketTable | None:
    """None where a later version wrote it: the video is opened as a file is."""
    try:
        return PacketTable.read(table)
    except ValueError as error:
        raise DamagedShard(
            f"shard {entry.shard.name}: the packet table of {entry.key} is not what was written ({error}): "
            "the shard was changed or damaged; restore it, or make the index anew with `vmae index`"
        ) from None


@contextlib.contextmanager
def stored_file(entry: ShardEntry) -> Iterator[str]:
    """The path of a video's bytes as a file, for what reads files only; it is there within this context.

    Raises:
        ShardError: see `open_stored`.
    """
    handle, name = memory_file(read_video(entry)[1])
    try:
        yield name
    finally:
        os.close(handle)
