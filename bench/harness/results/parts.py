"""Result of parts.py: whether the parts of a job give its result, and what joining them takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.json_records import Runs
from harness.results.base import Result
from harness.table import Table, spread_text


@dataclass(frozen=True, kw_only=True)
class SameRecord:
    """The files of a job in parts, against those of one process that does all of it.

    Attributes:
        kills: times that processes of a part were killed (SIGKILL), and the part started again.
        files, differing: how many files one job writes; which of these differ, are missing or are too many.
        sha256: of the names and bytes of all files.
    """

    kind: str = "same"
    command: str
    parts: int
    ranks: int
    kills: int
    files: int
    differing: list[str]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """Records of check-data that become one file.

    Attributes:
        cpu_s: of its core, whatever else the machine did.
        peak_mib: largest resident memory of the process that joins, beyond its imports.
    """

    kind: str = "merge"
    items: int
    parts: int
    seconds: Runs
    cpu_s: Runs
    peak_mib: Runs


@dataclass(frozen=True, kw_only=True)
class PartsResult(Result):
    title: ClassVar[str] = "Jobs in parts"

    records: list[SameRecord | MergeRecord]

    def tables(self) -> list[Table]:
        same, merges = [], []
        for r in self.records:
            if isinstance(r, SameRecord):
                verdict = "same" if not r.differing else f"differ: {', '.join(r.differing)}"
                counts = (r.parts, r.ranks, r.kills, r.files)
                same.append([r.command, *map(str, counts), verdict, r.sha256[:12]])
            else:
                cells = [spread_text(r.seconds, 1), spread_text(r.cpu_s, 1), spread_text(r.peak_mib, 0)]
                merges.append([f"{r.items:,}", str(r.parts), *cells])
        head = ["command", "parts", "ranks", "killed", "files", "against one job", "SHA-256"]
        note = "small models, every file but times; the killed part was started again; "
        tables = [Table(self.title, head, same, note + self.conditions)]
        if merges:
            head = ["videos", "parts", "seconds", "seconds of a core", "MiB at most"]
            tables.append(Table("Joining the records of check-data", head, merges))
        return tables
