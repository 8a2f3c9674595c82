"""Result of lists.py: the start of a run on a long list."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from harness.json_records import Runs
from harness.results.base import Result
from harness.table import Table, spread_text


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """A start up to the first batch's samples, in fresh processes of rank 0.

    Attributes:
        code: "now", or the tree that it was compared with.
        start: "cold" (nothing kept of the list) or "warm".
        cpu_s: processor seconds of the same starts, which other work on the machine disturbs less.
        laps_s: median of each part: reading, data set and loader, the list's identity, the first order.
        memory_mib: anonymous or private dirty memory beyond imports, the larger one, after the start.
        peak_mib: largest anonymous memory beyond imports during it.
    """

    kind: str = "start"
    lines: int
    code: str
    start: str
    seconds: Runs
    cpu_s: Runs | None = None
    laps_s: dict[str, float]
    memory_mib: Runs
    peak_mib: Runs


@dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """Private dirty memory that a forked worker gains by reading entries."""

    kind: str = "worker"
    lines: int
    code: str
    reads: int
    private_mib: float


@dataclass(frozen=True, kw_only=True)
class LookupRecord:
    """Calls of os.stat for what the list names, in a start on one rank."""

    kind: str = "lookup"
    lines: int
    code: str
    start: str
    rank: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class KindRecord:
    """Microseconds of one core for a line of a kind of list that is read for the first time.

    Attributes:
        line: an example.
    """

    kind: str = "lines"
    lines: int
    line: str
    line_us: Runs


@dataclass(frozen=True, kw_only=True)
class ListsResult(Result):
    """Attributes:
    hash_s: seconds for SHA-256 of each list's bytes, by its lines; part of every start.
    """

    title: ClassVar[str] = "The start of a run on a long list"

    records: list[StartRecord | WorkerRecord | LookupRecord | KindRecord]
    hash_s: dict[str, float] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        starts, workers, lookups, kinds = [], [], [], []
        for r in self.records:
            if isinstance(r, KindRecord):
                kinds.append([r.line, f"{r.lines:,}", spread_text(r.line_us, 1)])
                continue
            about = [f"{r.lines:,}", r.code]
            if isinstance(r, StartRecord):
                cpu = "-" if r.cpu_s is None else spread_text(r.cpu_s, 2)
                cells = [
                    spread_text(r.seconds, 2),
                    cpu,
                    spread_text(r.memory_mib, 0),
                    spread_text(r.peak_mib, 0),
                ]
                starts.append([*about, r.start, *cells])
            elif isinstance(r, WorkerRecord):
                workers.append([*about, f"{r.reads:,}", f"{r.private_mib:.1f}"])
            else:
                lookups.append([*about, r.start, str(r.rank), f"{r.calls:,}"])
        note = "videos reached by links; the list lies in the page cache; "
        note += "".join(f"SHA-256 of {int(lines):,} lines: {s:.2f} s; " for lines, s in self.hash_s.items())
        tables = [
            Table(
                self.title,
                ["lines", "code", "start", "seconds", "of a core", "MiB beyond imports", "at most MiB"],
                starts,
                note + self.conditions,
            )
        ]
        if workers:
            head = ["lines", "code", "entries read", "MiB made private"]
            tables.append(Table("A worker that reads entries", head, workers))
        if lookups:
            head = ["lines", "code", "start", "rank", "calls of stat"]
            tables.append(Table("Questions to the file system", head, lookups))
        if kinds:
            head = ["line", "lines", "us a line, one core"]
            tables.append(Table("Reading a list for the first time", head, kinds))
        return tables
