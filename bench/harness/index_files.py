"""An index of millions of samples whose shards are holes: what starts on it and reads entries, not videos."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from vmae.data.shards.entries import Shard
from vmae.data.shards.index import INDEX_NAME, ShardIndex, columns_of, write_index

SAMPLES, BYTES = 3500, 300_000  # of a shard, and of a sample: about 1 GiB
FACTS = {
    "length": BYTES - 5000,
    "table_length": 4000,
    "frames": 300,
    "fps": 30.0,
    "width": 340,
    "height": 256,
}


def make_index(folder: Path, samples: int) -> Path:
    """An index beside its shards, with keys as long as `pack` makes them."""
    columns = columns_of([], [], [])
    numbers = np.arange(samples)
    names = [f"{number:07}_abseiling_{number:09x}" for number in range(samples)]
    columns["shard"] = (numbers // SAMPLES).astype("<u4")
    columns["table_offset"] = (numbers % SAMPLES * BYTES).astype("<u8")
    columns["offset"] = columns["table_offset"] + 4000
    columns["crc"] = np.random.default_rng(0).integers(1 << 32, size=samples, dtype=np.uint32)
    columns["keys"] = np.frombuffer("".join(names).encode(), "u1")
    columns["key_end"] = np.cumsum(np.array([len(name) for name in names], "<u8"))
    for name, value in {**FACTS, "keep_every": 1}.items():
        columns[name] = np.full(samples, value, columns[name].dtype)
    for name in ("source", "suffix", "phase", "stride", "label_end", "image_end"):
        columns[name] = np.zeros(samples, columns[name].dtype)
    shards = [Shard(f"shard-{number:05}.tar", SAMPLES * BYTES) for number in range(-(-samples // SAMPLES))]
    for shard in shards:
        with open(folder / shard.name, "wb"):
            os.truncate(folder / shard.name, shard.size)
    write_index(folder / INDEX_NAME, ShardIndex(columns, shards))
    return folder / INDEX_NAME
