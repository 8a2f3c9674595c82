"""The indexes among the entries of a run, and whether they have the frames that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vmae.data.entry_table import EntryChain, EntryList
from vmae.data.shards.entries import ShardEntry
from vmae.data.shards.rows import ShardRows
from vmae.errors import InputError


def parts_of(entries: Any) -> list[Sequence[Any]]:
    """The lists and indexes that a sequence of entries is made of."""
    entries = getattr(entries, "entries", entries)  # of a mix
    return list(entries.parts) if isinstance(entries, EntryChain) else [entries]


def indexes_in(entries: Any) -> list[ShardRows]:
    """What of the entries of a run lies in shards."""
    return [part for part in parts_of(entries) if isinstance(part, ShardRows)]


def contents(entries: Any) -> set[tuple[int, Any]]:
    """What lies in shards: equal for equal videos and images."""
    return {pair for rows in indexes_in(entries) for pair in rows.contents()}


def check_all_frames(entries: Any, needed_by: str) -> None:
    """Raises InputError where frames were left out of videos of a run that needs all of them."""
    parts = parts_of(entries)
    found = [int(part.column("keep_every").max()) for part in parts if isinstance(part, ShardRows)]
    for part in parts:
        if isinstance(part, (list, EntryList)):
            found += [entry.keep_every for entry in part if isinstance(entry, ShardEntry)]
    every = max(found, default=1)
    if every > 1:
        raise InputError(
            f"{needed_by} needs all frames, and these shards hold one of every {every} (`vmae pack "
            f"--keep-every {every}`): take the videos, or shards packed without --keep-every"
        )


def check_strides(entries: Any, stride: int) -> None:
    """Raises InputError where a clip's stride is no multiple of the frames that are stored.

    Args:
        stride: of samples that have none of their own.
    """
    for rows in indexes_in(entries):
        if rows.column("keep_every").max() <= 1:
            continue
        every = np.maximum(rows.column("keep_every").astype(np.int64), 1)
        own = rows.column("stride").astype(np.int64)
        strides = np.where(own == 0, stride, own)
        for place in np.flatnonzero(strides % every)[:1].tolist():
            kept = int(every[place])
            raise InputError(
                f"{rows[place].key}: a stride of {int(strides[place])} needs frames that its shard has not: "
                f"one of every {kept} is stored (`vmae pack --keep-every {kept}`); take a stride that {kept} "
                "divides, or shards packed without --keep-every"
            )
