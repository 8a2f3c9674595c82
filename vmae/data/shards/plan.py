"""Which videos of a list go to which shard: fixed before the first one is written, by the list alone.

A shard holds the same number of a source's neighbours, whatever their sizes, so every part of a job knows its
shards without asking the others, and a shard's bytes are the same whoever writes it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vmae.data.manifest import VideoEntry

PROBES = 16  # videos of a source from whose sizes the number for a shard follows


@dataclass(frozen=True)
class Origin:
    """Neighbours of a list that come from one source.

    Attributes:
        name: of the list, or of a mix's source.
        first, count: their place in the list.
        root: folder that their relative paths start from.
    """

    name: str
    first: int
    count: int
    root: str = ""


@dataclass(frozen=True)
class ShardPlan:
    """Shards, source by source.

    Attributes:
        sources: where the videos come from, in order.
        each: videos of a shard, for each source; its last shard may have fewer.
    """

    sources: tuple[Origin, ...]
    each: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self._counts())

    def _counts(self) -> Iterator[int]:
        for source, each in zip(self.sources, self.each, strict=True):
            yield -(-source.count // each)

    def __getitem__(self, shard: int) -> tuple[Origin, range]:
        """(source, numbers in the list) of the videos of a shard."""
        place = shard
        for source, each, count in zip(self.sources, self.each, self._counts(), strict=True):
            if 0 <= place < count:
                first = source.first + place * each
                return source, range(first, min(first + each, source.first + source.count))
            place -= count
        raise IndexError(shard)

    def __iter__(self) -> Iterator[tuple[Origin, range]]:
        return (self[shard] for shard in range(len(self)))


def probes(source: Origin) -> list[int]:
    """Numbers of some videos spread over a source."""
    count = min(PROBES, source.count)
    return [source.first + place * source.count // count for place in range(count)]


def videos_for(size: int, sizes: Sequence[int]) -> int:
    """Videos of a shard of about `size` bytes, from the `sizes` of some: two digits of the number, so that it
    hardly depends on how a processor rounds."""
    if not sizes:
        return 1000  # none of the probes could be read: any number will do
    number = max(size * len(sizes) // max(sum(sizes), 1), 1)
    digit = 10 ** max(int(math.log10(number)) - 1, 0)
    return number // digit * digit


def hash_list(
    entries: Sequence[VideoEntry],
    labels: Sequence[Iterable[int] | None] | None,
    sources: Sequence[Origin],
) -> str:
    """SHA-256 of what decides the content of shards: videos, in order, by their paths from the list's root,
    their images, strides and labels."""
    whole = hashlib.sha256()
    for source in sources:
        start = source.root.rstrip(os.sep) + os.sep
        whole.update(f"{source.name}\0{source.count}\n".encode("utf-8", "surrogatepass"))
        for number in range(source.first, source.first + source.count):
            entry = entries[number]
            facts: list[Any] = [entry.path.removeprefix(start), entry.kind, entry.stride]
            if entry.kind != "video":
                facts += [entry.start, entry.total, entry.pattern]
            own = labels[number] if labels else None
            facts.append(None if own is None else list(own))
            whole.update(f"{facts}\n".encode("utf-8", "surrogatepass"))
    return whole.hexdigest()
