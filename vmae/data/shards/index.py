"""The index of shards: one mapped file with a column for each fact, and a `ShardEntry` made when asked for.

Arrays (see `vmae.files.flat_arrays`; any reader of safetensors reads them), N samples:

    shard, source, suffix         numbers into the lists that `about` holds
    offset, length, crc           bytes of the video in its shard
    table_offset, table_length    bytes of the packet table before it; 0 where there is none
    frames, fps, width, height    of the video; 0 where they are not known
    keep_every, phase             which frames are stored; 1 and 0: all
    stride                        of the list; 0: the run's own
    keys, key_end                 UTF-8 names one after the other, and where each ends
    labels, label_end             classes one after the other, and where each sample's end
    image_offset, image_length, image_crc, image_end
                                  of folders of frames, likewise
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from vmae.data.shards.entries import Place, Shard, ShardEntry, is_address
from vmae.data.shards.rows import FRAMES, ShardRows
from vmae.errors import InputError
from vmae.files.flat_arrays import read_arrays, write_arrays

INDEX_SUFFIX = ".vmae"
INDEX_NAME = "index" + INDEX_SUFFIX
FORMAT, VERSION = "vmae-index", 1

_EACH = {
    "shard": "u4", "source": "u2", "suffix": "u2", "offset": "u8", "length": "u8", "crc": "u4",
    "table_offset": "u8", "table_length": "u4", "frames": "u4", "fps": "f8", "width": "u4", "height": "u4",
    "keep_every": "u2", "phase": "u2", "stride": "u2", "key_end": "u8", "label_end": "u8", "image_end": "u8",
}  # fmt: skip
_FLAT = {"keys": "u1", "labels": "i4", "image_offset": "u8", "image_length": "u4", "image_crc": "u4"}
# flat arrays: the column that says where each sample's part ends
_ENDS = {
    "keys": "key_end", "labels": "label_end", "image_offset": "image_end", "image_length": "image_end",
    "image_crc": "image_end",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What a row of an index holds; see `ShardEntry` for what is not said here.

    Attributes:
        shard: number of the shard.
        suffix: of the video's name, with its dot; "" for a folder of frames.
        labels: classes, from 0; empty for none.
        source: name of the list or mix source that it came from.
        stride: frames from one sampled frame to the next; None for the run's own.
        images: (offset, length, CRC-32) of each image of a folder of frames.
    """

    key: str
    shard: int
    video: Place
    suffix: str = ".mp4"
    table: tuple[int, int] = (0, 0)
    labels: tuple[int, ...] = ()
    source: str = ""
    stride: int | None = None
    frames: int = 0
    fps: float = 0.0
    width: int = 0
    height: int = 0
    keep_every: int = 1
    phase: int = 0
    images: Sequence[Place] = ()


class ShardIndex(ShardRows):
    """The entries of an index, in order.

    Args:
        columns: as listed in the module.
        shards: with names relative to `base`, or complete ones.
        base: folder or address of the index, without a slash at its end.

    Attributes:
        settings: how the videos were packed; empty where that is not known.
    """

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        shards: Sequence[Shard],
        *,
        sources: Sequence[str] = ("",),
        suffixes: Sequence[str] = (".mp4",),
        settings: Mapping[str, Any] | None = None,
        base: str = "",
    ) -> None:
        self.columns, self.sources, self.suffixes = dict(columns), list(sources), list(suffixes)
        self.settings, self.base = dict(settings or {}), base
        self.relative = list(shards)
        self.shards = [shard._replace(name=join_name(base, shard.name)) for shard in shards]
        self._cells = _cells_of(self.columns)
        self.whole, self.numbers = self, range(len(self.columns["shard"]))

    def entry(self, number: int) -> ShardEntry:
        """The entry of sample `number`."""
        of: dict[str, Any] = {name: cells[number] for name, cells in self._cells.items()}
        shard, suffix = self.shards[of["shard"]], self.suffixes[of["suffix"]]
        key = self.key(number)
        images = None
        if suffix == FRAMES:
            names = ("image_offset", "image_length", "image_crc")
            images = np.stack([self.part(name, number).astype(np.int64) for name in names], axis=1)
        table = None
        if of["table_length"]:
            table = Place(of["table_offset"], of["table_length"], 0)
        return ShardEntry(
            f"{shard.name}/{key}{suffix}",
            "video" if images is None else "frames",
            total=-1 if images is None else len(images),
            stride=of["stride"] or None,
            line=number + 1,
            key=key,
            shard=shard,
            video=Place(of["offset"], of["length"], of["crc"]),
            table=table,
            images=images,
            **{name: of[name] for name in ("frames", "fps", "width", "height", "keep_every", "phase")},
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_cells", "whole")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, whole=self)
        self._cells = _cells_of(self.columns)

    def part(self, name: str, number: int) -> np.ndarray:
        """What a flat array holds of a sample."""
        ends = self._cells[_ENDS[name]]
        return self.columns[name][ends[number - 1] if number else 0 : ends[number]]

    def key(self, number: int) -> str:
        """Name of a sample."""
        return self.part("keys", number).tobytes().decode("utf-8")

    def labels(self, number: int) -> tuple[int, ...]:
        """Classes of a sample; empty for none."""
        return tuple(self.part("labels", number).tolist())

    def in_memory(self) -> ShardIndex:
        """The same in memory of its own: one that was read holds its file open."""
        return self.with_columns(**{name: column.copy() for name, column in self.columns.items()})

    def with_columns(self, **columns: np.ndarray) -> ShardIndex:
        """The same samples with some columns of other values."""
        return ShardIndex(
            {**self.columns, **columns},
            self.relative,
            sources=self.sources,
            suffixes=self.suffixes,
            settings=self.settings,
            base=self.base,
        )

    def chosen(self, numbers: Sequence[int]) -> ShardIndex:
        """An index of some samples alone, in this order, which may lie anywhere: its shards have complete
        names."""
        rows = np.asarray(numbers, np.int64)
        columns = {name: column[rows] for name, column in self.columns.items() if name in _EACH}
        for flat, end in _ENDS.items():
            parts = [self.part(flat, number) for number in rows.tolist()]
            columns[flat] = np.concatenate([self.columns[flat][:0], *parts])
            columns[end] = np.cumsum([len(part) for part in parts]).astype(self.columns[end].dtype)
        shards = [
            shard if "://" in shard.name else shard._replace(name=os.path.abspath(shard.name))
            for shard in self.shards
        ]
        return ShardIndex(
            columns, shards, sources=self.sources, suffixes=self.suffixes, settings=self.settings
        )

    def source(self, number: int) -> str:
        """Name of the list that a sample came from."""
        return self.sources[int(self.columns["source"][number])]


def _cells_of(columns: Mapping[str, np.ndarray]) -> dict[str, memoryview]:
    """The columns as Python reads single numbers off them soonest: a third of numpy's time."""
    found = {}
    for name in _EACH:
        column = columns[name]
        found[name] = np.ascontiguousarray(column, column.dtype.newbyteorder("=")).data
    return found


def bytes_per_sample(key_bytes: int) -> int:
    """Bytes of an index for each video without a label, where a key has so many."""
    return sum(np.dtype(code).itemsize for code in _EACH.values()) + key_bytes


def is_index(path: str | Path) -> bool:
    """Whether a path or address names an index, by its suffix."""
    return str(path).endswith(INDEX_SUFFIX)


def join_name(base: str, name: str) -> str:
    """The complete name of a shard: `name` may be relative to `base`, a folder or address."""
    if is_address(name) or os.path.isabs(name) or not base:
        return name
    return f"{base}/{quote(name) if base.startswith(('http://', 'https://')) else name}"


def read_index(path: str | Path, base: str | None = None) -> ShardIndex:
    """The index in a local file.

    Args:
        base: folder or address from which its shards' names start; None means the file's folder.

    Raises:
        InputError: the file is missing, damaged, no index, or of another version.
    """
    try:
        about, columns = read_arrays(path)
    except InputError as error:
        raise InputError(f"index {error}; `vmae index` makes one of tar files") from None
    told = about.get("format"), about.get("version")
    if told[0] != FORMAT:
        raise InputError(f"{path} is no index of shards; `vmae index` makes one of tar files")
    if told[1] != str(VERSION):
        raise InputError(
            f"index {path} is of version {told[1]}, and this vmae reads version {VERSION}: make it anew with "
            "`vmae index`, or take the vmae that made it"
        )
    try:
        content = json.loads(about["index"])
        shards = [Shard(str(name), int(size), str(etag)) for name, size, etag in content["shards"]]
        found = ShardIndex(
            columns,
            shards,
            sources=content["sources"],
            suffixes=content["suffixes"],
            settings=content["settings"],
            base=os.path.dirname(str(path)) if base is None else base,
        )
        _check_columns(found)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"index {path} is damaged ({error}): make it anew with `vmae index`") from None
    return found


def _check_columns(index: ShardIndex) -> None:
    """Raises ValueError or KeyError where columns are missing, too short, or point to what is not there."""
    columns, count = index.columns, len(index)
    for name in _EACH:
        if len(columns[name]) != count:
            raise ValueError(f"column {name} has {len(columns[name])} of {count} rows")
    for name, ends in _ENDS.items():
        if len(columns[name]) != (int(columns[ends][-1]) if count else 0):
            raise ValueError(f"column {name} does not end where {ends} says")
    for name, known in (("shard", index.shards), ("source", index.sources), ("suffix", index.suffixes)):
        if count and int(columns[name].max()) >= len(known):
            raise ValueError(f"column {name} names what is not there")


def columns_of(samples: Iterable[Sample], sources: list[str], suffixes: list[str]) -> dict[str, np.ndarray]:
    """The columns of some samples; names that `sources` and `suffixes` lack are added to them."""
    rows: dict[str, list] = {name: [] for name in (*_EACH, *_FLAT)}
    keys = bytearray()
    for sample in samples:
        keys += sample.key.encode("utf-8")
        rows["labels"] += sample.labels
        for place in sample.images:
            for name, value in zip(("image_offset", "image_length", "image_crc"), place, strict=True):
                rows[name].append(value)
        offset, length, crc = sample.video
        each = {
            "shard": sample.shard, "source": _number(sources, sample.source),
            "suffix": _number(suffixes, sample.suffix), "offset": offset, "length": length, "crc": crc,
            "table_offset": sample.table[0], "table_length": sample.table[1], "stride": sample.stride or 0,
            "key_end": len(keys), "label_end": len(rows["labels"]), "image_end": len(rows["image_offset"]),
        }  # fmt: skip
        for name in ("frames", "fps", "width", "height", "keep_every", "phase"):
            each[name] = getattr(sample, name)
        for name, value in each.items():
            rows[name].append(value)
    columns = {name: np.array(rows[name], "<" + code) for name, code in {**_EACH, **_FLAT}.items()}
    columns["keys"] = np.frombuffer(bytes(keys), "u1")
    return columns


def _number(known: list[str], name: str) -> int:
    if name not in known:
        known.append(name)
    return known.index(name)


def write_index(path: str | Path, index: ShardIndex) -> None:
    """Write an index file, complete or not at all; shards keep their relative names.

    Raises:
        InputError: the file cannot be written.
    """
    content = {
        "shards": [list(shard) for shard in index.relative],
        "sources": index.sources,
        "suffixes": index.suffixes,
        "settings": index.settings,
    }
    about = {"format": FORMAT, "version": str(VERSION), "index": json.dumps(content)}
    write_arrays(path, index.columns, about)


def join_indexes(indexes: Sequence[ShardIndex]) -> ShardIndex:
    """One index of several, one after the other, all with the same `base` and settings."""
    shards: list[Shard] = []
    sources: list[str] = []
    suffixes: list[str] = []
    parts: list[dict[str, np.ndarray]] = []
    ends = dict.fromkeys(_FLAT, 0)
    for index in indexes:
        part = dict(index.columns)
        part["shard"] = part["shard"] + np.uint32(len(shards))
        for name, known, own in (("source", sources, index.sources), ("suffix", suffixes, index.suffixes)):
            part[name] = np.array([_number(known, one) for one in own], "<u2")[part[name]]
        for flat, end in (("keys", "key_end"), ("labels", "label_end"), ("image_offset", "image_end")):
            part[end] = part[end] + np.uint64(ends[flat])
            ends[flat] += len(part[flat])
        shards += index.relative
        parts.append(part)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in (*_EACH, *_FLAT)}
    first = indexes[0]
    return ShardIndex(
        columns, shards, sources=sources, suffixes=suffixes, settings=first.settings, base=first.base
    )
