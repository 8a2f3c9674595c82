"""Shards of a list for tests: plain tar files and their index, written without any encoding."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from vmae.data import open_video
from vmae.data.manifest import VideoEntry
from vmae.data.shards.entries import Place, Shard
from vmae.data.shards.index import FRAMES, Sample, ShardIndex, columns_of, write_index


def write_shards(
    folder: Path,
    entries: Sequence[VideoEntry],
    labels: Sequence[tuple[int, ...]] | None = None,
    *,
    keys: Sequence[str] | None = None,
    each: int = 3,
    **facts,
) -> Path:
    """The index of shards of `each` samples, with the bytes of the files as they are.

    Args:
        keys: of the samples; None takes their files' names, numbered.
        facts: fields of each `Sample` that differ from what the file says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards, samples = [], []
    for first in range(0, len(entries), each):
        path = folder / f"shard-{len(shards):05}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(first, min(first + each, len(entries))):
                entry = entries[number]
                key = keys[number] if keys else f"{number:08}_{Path(entry.path).stem}"
                own = labels[number] if labels else ()
                sample = _add(tar, entry, key, len(shards), own, facts)
                samples.append(sample)
        shards.append(Shard(path.name, os.path.getsize(path)))
    sources: list[str] = []
    suffixes: list[str] = []
    columns = columns_of(samples, sources, suffixes)
    write_index(folder / "index.vmae", ShardIndex(columns, shards, sources=sources, suffixes=suffixes))
    return folder / "index.vmae"


def _add(tar, entry: VideoEntry, key: str, shard: int, labels: tuple[int, ...], facts: dict) -> Sample:
    about = {"labels": labels, "stride": entry.stride, "source": "test", **facts}
    if entry.kind == "frames":
        paths = [Path(entry.frame_path(number)) for number in range(entry.total)]
        images = [_member(tar, f"{key}.{path.name}", path.read_bytes()) for path in paths]
        return Sample(key, shard, Place(0, 0, 0), FRAMES, images=images, **about)
    with open_video(entry) as reader:
        width, height = reader.size or (0, 0)
        seen = {"frames": len(reader), "fps": reader.fps or 0.0, "width": width, "height": height}
    suffix = Path(entry.path).suffix
    place = _member(tar, key + suffix, Path(entry.path).read_bytes())
    return Sample(key, shard, place, suffix, **{**seen, **about})


def _member(tar, name: str, content: bytes) -> Place:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
    length = -(-len(content) // 512) * 512
    return Place(tar.offset - length, len(content), zlib.crc32(content))
