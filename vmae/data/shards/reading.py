"""Bytes of a shard: by range, checked against the index, from a file of this machine or an object store."""

from __future__ import annotations

import multiprocessing
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from vmae.data.manifest import VideoEntry
from vmae.data.shards import ahead, stores
from vmae.data.shards.entries import DamagedShard, Place, Shard, ShardEntry, ShardError, is_address
from vmae.data.shards.remote import AGAIN, ask_apart
from vmae.data.waiting import waiting

_MOST_OPEN = 64  # shards that a process keeps open
_open: OrderedDict[str, int] = OrderedDict()
_RETRIES = 2  # of an answer of a store whose bytes are not those of the index: some fault on its way
# Images of a store that are less than this apart come with one request: it costs as long as some MB (a round
# trip of 10 to 30 ms at 50 to 100 MB/s).
_GAP = 1 << 20


def read_video(entry: ShardEntry) -> tuple[bytes, bytes]:
    """(packet table, video) of an entry, in one request; the table is empty where there is none.

    Raises:
        ShardError: the shard is missing or cannot be read, or is not what the index says.
    """
    first, length = _range_of(entry)
    data = _read_checked(entry.shard, first, length, [entry.video])
    video = data[entry.video.offset - first :]
    return b"" if entry.table is None else data[: entry.table.length], video


def _range_of(entry: ShardEntry) -> tuple[int, int]:
    """(offset, length) of a video and of its packet table."""
    first = entry.video.offset if entry.table is None else entry.table.offset
    return first, entry.video.offset + entry.video.length - first


def read_images(entry: ShardEntry, numbers: Sequence[int]) -> dict[int, bytes]:
    """Images (from 0) of a folder of frames, by number; of a store, near ones come with one request.

    Raises:
        ShardError: see `read_video`.
    """
    assert entry.images is not None  # a folder of frames has them
    places = {number: Place(*entry.images[number].tolist()) for number in numbers}
    found: dict[int, bytes] = {}
    for first, length in _spans(entry, list(places.values())):
        inside = {number: place for number, place in places.items() if first <= place.offset < first + length}
        data = _read_checked(entry.shard, first, length, list(inside.values()))
        for number, place in inside.items():
            found[number] = data[place.offset - first :][: place.length]
    return found


def _spans(entry: ShardEntry, places: list[Place]) -> list[tuple[int, int]]:
    """(offset, length) of the requests that give these places."""
    gap = _GAP if is_address(entry.shard.name) else -1
    spans: list[list[int]] = []
    for offset, length, _ in sorted(places):
        if spans and offset - spans[-1][1] <= gap:
            spans[-1][1] = max(spans[-1][1], offset + length)
        else:
            spans.append([offset, offset + length])
    return [(first, end - first) for first, end in spans]


def ask_ahead(entry: VideoEntry, frames: np.ndarray | None = None) -> None:
    """Start to read an entry that lies in an object store, where this process is a worker; nothing else is
    read ahead.

    Args:
        frames: int64, images that are wanted of a folder of frames; None where that is not known: then it is
            not read ahead.
    """
    if not (isinstance(entry, ShardEntry) and is_address(entry.shard.name)):
        return
    requests = ahead.ahead_of(_read_object)
    if requests is None:
        return
    if entry.images is None:
        spans = [_range_of(entry)]
    else:
        numbers = [] if frames is None else np.unique(frames).tolist()
        spans = _spans(entry, [Place(*entry.images[number].tolist()) for number in numbers])
    for first, length in spans:
        requests.want((entry.shard, first, length))


def _read_checked(shard: Shard, first: int, length: int, places: list[Place]) -> bytes:
    """Bytes of a shard in which `places` are what the index says."""
    for left in reversed(range(_RETRIES + 1 if is_address(shard.name) else 1)):
        data = read_range(shard, first, length)
        views = [memoryview(data)[place.offset - first :][: place.length] for place in places]
        wrong = [place for place, view in zip(places, views, strict=True) if zlib.crc32(view) != place.crc]
        if wrong and not left:
            raise DamagedShard(
                f"shard {shard.name}: bytes {wrong[0].offset} to {wrong[0].offset + wrong[0].length} are not "
                "those that its index describes (CRC-32): it was changed or damaged; restore it, or make the "
                "index anew with `vmae index`"
            )
        if not wrong:
            break
    return data


def read_range(shard: Shard, offset: int, length: int) -> bytes:
    """Bytes of a shard.

    Raises:
        ShardError: the shard is missing or cannot be read, has fewer bytes than its index says, or was
            changed.
    """
    if is_address(shard.name):
        requests = ahead.ahead_of(_read_object)
        future = None if requests is None else requests.take((shard, offset, length))
        if future is not None and future.done():
            return ahead.answer_of(future, shard)
        with waiting():
            if future is not None:
                return ahead.answer_of(future, shard)
            return _read_object(shard, offset, length)
    try:
        data = os.pread(_file(shard.name), length, offset)
    except OSError as error:
        raise ShardError(f"shard {shard.name} cannot be read: {error.strerror}") from None
    if len(data) != length:
        raise DamagedShard(
            f"shard {shard.name} is cut off: its index says {shard.size} bytes; copy it again, or make the "
            "index anew with `vmae index`"
        )
    return data


def _read_object(shard: Shard, offset: int, length: int) -> bytes:
    """`read_range` of a store: by this process where it is a worker, else by the one that asks for it."""
    asked = (shard.name, offset, length, shard.etag, stores.patience())
    try:
        if multiprocessing.current_process().daemon:
            data, size = stores.read_bytes(*asked)
        else:
            data, size = ask_apart(stores.read_bytes, *asked)
    except stores.Changed:
        raise DamagedShard(
            f"shard {shard.name} was changed since its index was made (ETag): {AGAIN}"
        ) from None
    if size != shard.size or len(data) != length:
        told = f"{size} bytes" if size >= 0 else "fewer bytes"
        raise DamagedShard(f"shard {shard.name} has {told}, and its index says {shard.size}: {AGAIN}")
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
