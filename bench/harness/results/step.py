"""Result of step.py: where the time of a training step goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from harness.json_records import Runs, Spread
from harness.results.base import Result
from harness.table import Table, number


@dataclass(frozen=True, kw_only=True)
class Share:
    """A kind of work in a step: milliseconds, part of the step, calls (None: no calls, a gap)."""

    name: str
    ms: float
    calls: float | None
    share: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was measured of a step.

    Attributes:
        step_ms: without the profiler.
        data_ms: waiting for a batch.
        profiled_step_ms: with the profiler; the classes are shares of it.
    """

    step_ms: Runs | None = None
    data_ms: Spread | None = None
    profiled_step_ms: float | None = None
    classes: list[Share] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ProfileRecord(Profile):
    """A variant's step; nothing was measured where its loss was wrong."""

    model: str
    variant: str
    device: str
    batch: int
    dtype: str
    masking: str
    threads: int
    input: str
    workers: int


@dataclass(frozen=True, kw_only=True)
class ProfileResult(Result):
    title: ClassVar[str] = "Where a step's time goes"

    records: list[ProfileRecord]
    rejected: dict[str, str] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        (r,) = self.records
        if r.step_ms is None:
            rows = [[name, why] for name, why in self.rejected.items()]
            return [Table(self.title, ["variant", "NO SPEED"], rows)]
        rows = []
        for found in r.classes:
            share = number(found.share, 0.01, 1, " %")
            rows.append([found.name, number(found.ms, 1, 1), share, number(found.calls)])
        title = f"{self.title}: {r.model}, {r.variant}, batch {r.batch}, {r.dtype}"
        note = f"{r.step_ms.median:.1f} ms a step, {number(r.profiled_step_ms, 1, 1)} profiled"
        return [Table(title, ["kind", "ms a step", "share", "calls"], rows, f"{note}; {self.conditions}")]
