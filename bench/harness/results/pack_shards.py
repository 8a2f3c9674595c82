"""Result of pack_shards.py: what shards cost beside packed files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.json_records import Runs
from harness.results.base import Result
from harness.table import Table, spread_text


@dataclass(frozen=True, kw_only=True)
class PackRecord:
    """Packing of videos into "files" or "shards", CPU seconds of all processes."""

    kind: str = "pack"
    into: str
    videos: int
    cpu_s: Runs


@dataclass(frozen=True, kw_only=True)
class WriteRecord:
    """Writing of one shard from packed videos, forced to the disk."""

    kind: str = "write"
    videos: int
    bytes: int
    cpu_s: Runs


@dataclass(frozen=True, kw_only=True)
class IndexRecord:
    """What `vmae index` does with a shard."""

    kind: str = "index"
    what: str
    samples: int
    bytes: int
    cpu_s: Runs


@dataclass(frozen=True, kw_only=True)
class PackShardsResult(Result):
    title: ClassVar[str] = "Shards beside packed files"

    records: list[PackRecord | WriteRecord | IndexRecord]

    def tables(self) -> list[Table]:
        packing, reading = [], []
        for r in self.records:
            if isinstance(r, PackRecord):
                packing.append(
                    [r.into, str(r.videos), spread_text(r.cpu_s, 2), f"{r.videos / r.cpu_s.median:.3f}"]
                )
            else:
                what = "written" if isinstance(r, WriteRecord) else f"index {r.what}"
                count = r.videos if isinstance(r, WriteRecord) else r.samples
                rates = [f"{r.bytes / 2**20 / r.cpu_s.median:.0f}", f"{count / r.cpu_s.median:.0f}"]
                reading.append([what, f"{r.bytes / 2**20:.0f}", spread_text(r.cpu_s, 2), *rates])
        return [
            Table(self.title, ["packed into", "videos", "CPU s", "videos a CPU s"], packing, self.conditions),
            Table("A shard", ["what", "MiB", "CPU s", "MiB a CPU s", "videos a CPU s"], reading),
        ]
