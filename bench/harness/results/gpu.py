"""Result of gpu.py: what each stage of the day ran, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from harness.results.base import Result
from harness.table import Table


@dataclass(frozen=True, kw_only=True)
class CommandRecord:
    """One command of a stage.

    Attributes:
        status: "ran", "failed", "cut off" (over `limit_s`, or the stage's time was over), or "skipped".
        reason: why it did not run to its end.
        file: its result, up to where it was ended; None where it wrote none.
    """

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    code: int | None = None
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    file: str | None = None

    @property
    def good(self) -> bool:
        return self.status in ("ran", "skipped")


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage."""

    kind: str = "stage"
    stage: str
    title: str
    seconds: float = 0.0
    limit_s: float = 0.0
    commands: list[CommandRecord] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class GpuResult(Result):
    """The stages, in order."""

    title: ClassVar[str] = "The GPU day"

    records: list[StageRecord]
    missing: dict[str, str] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        rows = []
        for stage in self.records:
            for r in stage.commands:
                status = r.status + (f": {r.reason}" if r.reason else "")
                took = f"{r.seconds:.0f} of {r.limit_s:.0f} s" if r.limit_s else "-"
                rows.append([stage.stage, r.name, status, took, r.file or "-"])
        return [Table(self.title, ["stage", "command", "status", "took", "result"], rows, self.conditions)]
