"""Samples of an index, and what its columns tell of all of them: no video is opened, no entry is made."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from vmae.data.entry_table import Entries
from vmae.data.shards.entries import ShardEntry

FRAMES = ""  # the suffix of a folder of frames
_AT_ONCE = 1 << 14  # rows that become Python's numbers at a time


class ShardRows(Entries[ShardEntry]):
    """Some samples of an index, in order.

    Attributes:
        whole: the `ShardIndex`.
        numbers: of the samples in it.
    """

    whole: Any  # that module imports this one
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        found = self.numbers[index]
        return ShardPart(self.whole, found) if isinstance(found, range) else self.whole.entry(found)

    def column(self, name: str) -> np.ndarray:
        """A column of one value for each sample."""
        return self._chosen(self.whole.columns[name])

    def counts(self, end: str) -> np.ndarray:
        """int64: how long each sample's part of the flat arrays is that end at column `end`."""
        return self._chosen(np.diff(self.whole.columns[end].astype(np.int64), prepend=0))

    def _chosen(self, column: np.ndarray) -> np.ndarray:
        rows = self.numbers
        return column[rows.start : rows.stop] if rows.step == 1 else column[np.asarray(rows, np.int64)]

    def are(self, kind: str) -> np.ndarray:
        """bool: whether each sample is of `kind`, "video" or "frames"."""
        folders = [number for number, suffix in enumerate(self.whole.suffixes) if suffix == FRAMES]
        frames = np.isin(self.column("suffix"), folders)
        return frames if kind == "frames" else ~frames

    def numbers_of(self, kind: str) -> np.ndarray:
        """Places of the samples of a kind, in order."""
        return np.flatnonzero(self.are(kind))

    def strides(self) -> list[int]:
        """The strides that the index itself sets, ascending."""
        return [stride for stride in np.unique(self.column("stride")).tolist() if stride]

    def with_stride(self, stride: int | None) -> ShardRows:
        """The same, with this stride for samples that have none of their own."""
        if stride is None:
            return self
        own = self.whole.columns["stride"]
        changed = self.whole.with_columns(stride=np.where(own == 0, np.uint32(stride), own))
        return changed if len(self) == len(changed) else ShardPart(changed, self.numbers)

    def images(self) -> int:
        """Images of all folders of frames."""
        return int(self.counts("image_end").sum())

    def length(self) -> tuple[float, int]:
        """(seconds of the videos whose length is known, how many these are)."""
        frames, fps = self.column("frames"), self.column("fps")
        known = self.are("video") & (frames > 0) & (fps > 0)
        return float((frames[known] / fps[known]).sum()), int(known.sum())

    def contents(self) -> set[tuple[int, Any]]:
        """(length, checksum) of all videos, (number, checksums) of all folders' images: equal for equal
        content."""
        videos = self.are("video")
        found: set[tuple[int, Any]] = set(
            zip(*(self.column(name)[videos].tolist() for name in ("length", "crc")), strict=True)
        )
        for place in np.flatnonzero(~videos).tolist():
            found.add((-1, self._images_of(self.numbers[place])))
        return found

    def count_paths(self) -> int:  # an index has no key twice
        return len(self)

    def path_bytes(self, first: int, last: int) -> list[bytes]:
        part = ShardPart(self.whole, self.numbers[first:last])
        shards = [shard.name.encode("utf-8", "surrogatepass") + b"/" for shard in self.whole.shards]
        suffixes = [suffix.encode() for suffix in self.whole.suffixes]
        names = zip(part.column("shard").tolist(), part.keys(), part.column("suffix").tolist(), strict=True)
        return [shards[shard] + key + suffixes[suffix] for shard, key, suffix in names]

    def identity_lines(self, first: int, last: int, start: str = "") -> bytes:
        """The `identities` of some samples."""
        return b"".join(self.identities(first, last))

    def identities(self, first: int, last: int) -> Iterator[bytes]:
        """A line for each of these samples that tells which frames it is: its key, stride, and the length and
        checksum of its bytes. Where the shards lie, and which of them holds it, does not count."""
        for begin in range(first, last, _AT_ONCE):
            yield from ShardPart(self.whole, self.numbers[begin : min(begin + _AT_ONCE, last)])._identities()

    def keys(self) -> list[bytes]:
        """Names of all samples, in UTF-8."""
        rows, ends = self.numbers, self.whole.columns["key_end"]
        if rows.step != 1 or not rows:
            return [self.whole.part("keys", number).tobytes() for number in rows]
        start = int(ends[rows.start - 1]) if rows.start else 0
        places = [0, *(ends[rows.start : rows.stop].astype(np.int64) - start).tolist()]
        data = self.whole.columns["keys"][start : start + places[-1]].tobytes()
        return [data[one:other] for one, other in itertools.pairwise(places)]

    def _identities(self) -> Iterator[bytes]:
        names = ("suffix", "stride", "length", "crc", "keep_every", "phase")
        columns = (self.column(name).tolist() for name in names)
        suffixes = self.whole.suffixes
        for number, key, kind, stride, length, crc, every, phase in zip(
            self.numbers, self.keys(), *columns, strict=True
        ):
            content = f"{length}\0{crc}"
            if suffixes[kind] == FRAMES:
                content = self._images_of(number)
            kept = f"\0{every}\0{phase}" if every > 1 else ""
            yield key + f"{suffixes[kind]}\0{stride or None}\0{content}{kept}\n".encode()

    def _images_of(self, number: int) -> str:
        lengths, sums = (self.whole.part(name, number) for name in ("image_length", "image_crc"))
        return f"{len(lengths)}\0{images_identity(lengths, sums)}"


class ShardPart(ShardRows):
    """Those samples of an index that have `numbers`."""

    def __init__(self, whole: Any, numbers: range) -> None:
        self.whole, self.numbers = whole, numbers


def images_identity(lengths: np.ndarray, sums: np.ndarray) -> str:
    """The content of a folder of frames, by the lengths and checksums of its images."""
    data = np.stack([lengths, sums], axis=1).astype("<u4").tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def entry_identity(entry: ShardEntry) -> list[Any]:
    """Which frames an entry is, in plain containers: see `ShardRows.identity_lines`."""
    kept = [entry.keep_every, entry.phase] if entry.keep_every > 1 else []
    if entry.images is None:
        return [result_name(entry), entry.video.length, entry.video.crc, *kept]
    return [entry.key, len(entry.images), images_identity(entry.images[:, 1], entry.images[:, 2]), *kept]


def result_name(entry: Any) -> str:
    """What results call a video: its path; in a shard the name of its member, wherever the shard lies."""
    if isinstance(entry, ShardEntry):
        return entry.path[len(entry.shard.name) + 1 :]
    return entry.path
