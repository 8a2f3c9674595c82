"""What an index tells of a video: an entry of a list that lies in a tar file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmae.data.manifest import VideoEntry
from vmae.errors import InputError


class ShardError(InputError):
    """A shard that is not what its index says, or a store that cannot be read.

    Never the fault of a video: the run stops, no other video stands in.
    """


class DamagedShard(ShardError):
    """Bytes that are not those that the index describes; a store that does not answer is none."""


def is_address(path: str | Path) -> bool:
    """Whether it names something in a store (`s3://bucket/...`), not a file of this machine."""
    return "://" in str(path)


class Shard(NamedTuple):
    """A tar file as an index names it.

    Attributes:
        name: path or address; one that is relative starts from the index.
        size: bytes.
        etag: the store's name for this content, where the index was made from a store; else empty.
    """

    name: str
    size: int
    etag: str = ""


class Place(NamedTuple):
    """Bytes of a shard.

    Attributes:
        offset, length: in bytes, of the content alone, without tar's header.
        crc: CRC-32 of the content, as zlib's.
    """

    offset: int
    length: int
    crc: int


@dataclass(frozen=True)
class ShardEntry(VideoEntry):
    """A video, or a folder of frames, in a shard.

    Attributes:
        path: name for people and logs: the shard's path or address, and the member's name.
        total: images of a folder of frames; -1 for a video.
        key: name of the sample.
        shard: the tar file, its name complete.
        video: bytes of the video; of a folder of frames, from its first image to its last (its CRC-32 is 0).
        table: bytes of the packet table; None where there is none.
        images: int64 [total, 3], (offset, length, CRC-32) of each image; None for a video.
        frames: pictures of the video before any was left out; 0 where it is not known.
        fps: frames a second, 0 where they are not known.
        width, height: pixels, as displayed; 0 where they are not known.
        keep_every, phase: of `frames`, numbers `phase`, `phase + keep_every`, ... are stored.
    """

    key: str = ""
    shard: Shard = Shard("", 0)
    video: Place = Place(0, 0, 0)
    table: Place | None = None
    images: np.ndarray | None = dataclasses.field(default=None, compare=False)
    frames: int = 0
    fps: float = 0.0
    width: int = 0
    height: int = 0
    keep_every: int = 1
    phase: int = 0
