"""Bytes of a shard: by range, checked against the index, from a file of this machine."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict

from vmae.data.shards.entries import Place, Shard, ShardEntry, ShardError

_MOST_OPEN = 64  # shards that a process keeps open
_open: OrderedDict[str, int] = OrderedDict()


def read_video(entry: ShardEntry) -> tuple[bytes, bytes]:
    """(packet table, video) of an entry, in one request; the table is empty where there is none.

    Raises:
        ShardError: the shard is missing or cannot be read, or is not what the index says.
    """
    table = entry.table
    first = entry.video.offset if table is None else table.offset
    data = read_range(entry.shard, first, entry.video.offset + entry.video.length - first)
    video = data[entry.video.offset - first :]
    check(entry.shard, entry.video, video)
    return b"" if table is None else data[: table.length], video


def read_image(entry: ShardEntry, number: int) -> bytes:
    """Image `number` (from 0) of a folder of frames.

    Raises:
        ShardError: see `read_video`.
    """
    assert entry.images is not None  # a folder of frames has them
    place = Place(*entry.images[number].tolist())
    data = read_range(entry.shard, place.offset, place.length)
    check(entry.shard, place, data)
    return data


def check(shard: Shard, place: Place, data: bytes) -> None:
    """Raises ShardError unless `data` is what the index says of `place`."""
    if zlib.crc32(data) != place.crc:
        raise ShardError(
            f"shard {shard.name}: bytes {place.offset} to {place.offset + place.length} are not those that "
            "its index describes (CRC-32): it was changed or damaged; restore it, or make the index anew "
            "with `vmae index`"
        )


def read_range(shard: Shard, offset: int, length: int) -> bytes:
    """Bytes of a shard.

    Raises:
        ShardError: the shard is missing or cannot be read, or has fewer bytes than its index says.
    """
    try:
        data = os.pread(_file(shard.name), length, offset)
    except OSError as error:
        raise ShardError(f"shard {shard.name} cannot be read: {error.strerror}") from None
    if len(data) != length:
        raise ShardError(
            f"shard {shard.name} is cut off: its index says {shard.size} bytes; copy it again, or make the "
            "index anew with `vmae index`"
        )
    return data


def _file(name: str) -> int:
    """The handle of an open shard."""
    handle = _open.pop(name, None)
    if handle is None:
        handle = os.open(name, os.O_RDONLY)
        if len(_open) >= _MOST_OPEN:
            os.close(_open.popitem(last=False)[1])
    _open[name] = handle
    return handle
