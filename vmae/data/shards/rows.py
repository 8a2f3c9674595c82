"""Samples of an index, and what its columns tell of all of them: no video is opened, no entry is made."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np

from vmae.data.entry_table import Entries
from vmae.data.shards.entries import ShardEntry

FRAMES = ""  # the suffix of a folder of frames
_AT_ONCE = 1 << 12  # rows whose arrays stay in the cache: of 1 << 14, hashing takes four times as long


# Of `ShardRows.identity_lines`. Of a folder of frames, `length` is a hash of its images' lengths and
# checksums, and `crc` their number.
_IDENTITY = np.dtype(
    [("key", "<u8"), ("suffix", "<u8"), ("length", "<u8"), ("crc", "<u4"), ("stride", "<u4"),
     ("every", "<u4"), ("phase", "<u4")]
)  # fmt: skip


def _scrambled(values: np.ndarray) -> np.ndarray:
    """uint64 that look random, of whole numbers (the finalizer of SplitMix64, Steele et al., 2014)."""
    mixed = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


_OF_BYTE = _scrambled(np.arange(256))
_OF_PLACE = _scrambled(np.arange(256, 256 + 4096)) | np.uint64(1)


def hash_each(data: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint64 [n]: a number for each of the n sequences in `data` (uint8 or uint64) that end at `ends`, equal
    for equal ones and for others hardly ever: a sum of scrambled values, each times a number for its
    place."""
    if not len(ends):
        return np.zeros(0, np.uint64)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1].astype(np.int64)])
    lengths = ends.astype(np.int64) - starts
    places = np.arange(len(data)) - np.repeat(starts, lengths)
    values = np.zeros(len(data) + 1, np.uint64)  # one more: an empty sequence may stand at the end
    values[:-1] = _OF_BYTE[data] if data.dtype == np.uint8 else _scrambled(data)
    values[:-1] *= _OF_PLACE[places & (len(_OF_PLACE) - 1)]
    sums = np.add.reduceat(values, starts)
    sums[lengths == 0] = 0
    return sums


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
        rows, ends = self.numbers, self.whole.columns[end]
        if rows.step != 1:
            return self._chosen(np.diff(ends.astype(np.int64), prepend=0))
        first = int(ends[rows.start - 1]) if rows.start and rows else 0
        return np.diff(ends[rows.start : rows.stop].astype(np.int64), prepend=first)

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
            found.add(tuple(entry_identity(self[place])[1:3]))
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
        """40 bytes for each of these samples that tell which frames it is: by its key, stride, and the length
        and checksum of its bytes. Where the shards lie, and which of them holds it, does not count."""
        parts = (self.numbers[begin : min(begin + _AT_ONCE, last)] for begin in range(first, last, _AT_ONCE))
        return b"".join(ShardPart(self.whole, part)._identities().tobytes() for part in parts)

    def _identities(self) -> np.ndarray:
        found = np.zeros(len(self), _IDENTITY)
        found["key"] = self.key_hashes()
        texts = [suffix.encode() for suffix in self.whole.suffixes]
        hashes = hash_each(np.frombuffer(b"".join(texts), "u1"), np.cumsum([len(text) for text in texts]))
        found["suffix"] = hashes[self.column("suffix")]
        for name in ("length", "crc", "stride"):
            found[name] = self.column(name)
        folders = self.are("frames")
        if folders.any():
            images, sums = self._flat("image_length", "image_end"), self._flat("image_crc", "image_end")
            counts = self.counts("image_end")
            content = (images.astype(np.uint64) << np.uint64(32)) | sums
            found["length"][folders] = hash_each(content, np.cumsum(counts))[folders]
            found["crc"][folders] = counts[folders]
        every = self.column("keep_every")
        found["every"] = np.where(every > 1, every, 0)
        found["phase"] = np.where(every > 1, self.column("phase"), 0)
        return found

    def key_hashes(self) -> np.ndarray:
        """uint64: see `hash_each`."""
        return hash_each(self._flat("keys", "key_end"), np.cumsum(self.counts("key_end")))

    def keys(self) -> list[bytes]:
        """Names of all samples, in UTF-8."""
        places = [0, *np.cumsum(self.counts("key_end")).tolist()]
        data = self._flat("keys", "key_end").tobytes()
        return [data[one:other] for one, other in itertools.pairwise(places)]

    def _flat(self, name: str, end: str) -> np.ndarray:
        """What a flat array holds of these samples, one after the other."""
        rows, ends, values = self.numbers, self.whole.columns[end], self.whole.columns[name]
        if rows.step != 1 or not rows:
            return np.concatenate([values[:0], *(self.whole.part(name, number) for number in rows)])
        return values[int(ends[rows.start - 1]) if rows.start else 0 : int(ends[rows.stop - 1])]


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
