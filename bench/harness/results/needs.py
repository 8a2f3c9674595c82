"""Result of needs.py: what data workers take of a machine, and what packed clips take to make and keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.json_records import Runs
from harness.results.base import Result
from harness.table import Table, number


@dataclass(frozen=True, kw_only=True)
class LoadRecord:
    """Worker processes that make batches of packed videos, looked at by /proc.

    Attributes:
        batch_bytes: of a batch's clips.
        main_files, worker_files: most open files seen, of the main process and of any worker.
        main_files_before: of the main process, without workers.
        planned_files: what `vmae.data.needs` says of these settings, its allowance for libraries left out.
        worker_private: bytes that only one worker has, shared batches left out; the most seen of each.
        main_private: likewise of the main process.
    """

    kind: str = "load"
    workers: int
    batch: int
    batch_bytes: int
    main_files_before: int
    main_files: int
    worker_files: int
    planned_files: int
    worker_private: Runs
    main_private: int


@dataclass(frozen=True, kw_only=True)
class ClipsRecord:
    """Packing and checking of real videos, on one core.

    Attributes:
        seconds: of video.
        packed_bytes: of the packed videos together; `originals_bytes`: of what they were made of.
        shard_bytes: of the tar file with all of them; `table_bytes`: of the packet tables in it.
        pack_cpu_s, check_cpu_s: CPU seconds for all of them.
        fetched_bytes: mean of what one read of a clip asks a store for: a video and its packet table.
    """

    kind: str = "clips"
    videos: int
    seconds: float
    originals_bytes: int
    packed_bytes: int
    pack_cpu_s: Runs
    check_cpu_s: Runs


@dataclass(frozen=True, kw_only=True)
class OrderRecord:
    """The order of an epoch on one rank."""

    kind: str = "order"
    samples: int
    seconds: float
    kept_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class NeedsResult(Result):
    """What a run needs of its machine."""

    title: ClassVar[str] = "What a run needs of its machine"

    records: list[LoadRecord | ClipsRecord | OrderRecord]

    def tables(self) -> list[Table]:
        loads = [r for r in self.records if isinstance(r, LoadRecord)]
        rows = [
            [
                str(r.workers),
                str(r.batch),
                number(r.batch_bytes, 2**20, 1),
                str(r.main_files),
                str(r.worker_files),
                str(r.planned_files),
                number(r.worker_private.median, 2**20),
                number(r.worker_private.max, 2**20),
                number(r.main_private, 2**20),
            ]
            for r in loads
        ]
        head = ["workers", "batch", "MiB a batch", "open files, main", "of a worker", "planned"]
        head += ["MiB of its own, a worker (median)", "most", "main process"]
        tables = [Table(self.title, head, rows, self.conditions)]
        clips = [r for r in self.records if isinstance(r, ClipsRecord)]
        rows = [
            [
                str(r.videos),
                number(r.seconds, 1, 1),
                number(r.packed_bytes / r.seconds, 1e3, 1),
                number(r.pack_cpu_s.median / r.seconds, 1, 3),
                number(r.check_cpu_s.median / r.seconds, 1, 4),
            ]
            for r in clips
        ]
        head = ["videos", "seconds", "packed, KB a second", "packing, CPU s a second", "checking"]
        tables.append(Table("Packing and checking of real videos", head, rows))
        orders = [r for r in self.records if isinstance(r, OrderRecord)]
        rows = [
            [
                f"{r.samples:,}",
                number(r.seconds, 1, 1),
                number(r.kept_bytes, 1e6),
                number(r.peak_bytes, 1e6),
            ]
            for r in orders
        ]
        head = ["samples", "seconds", "MB kept", "MB at the most"]
        return [*tables, Table("The order of an epoch, on one rank", head, rows)]
