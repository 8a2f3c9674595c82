"""Result of loop.py: the training loop beside a bare step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.json_records import Runs, Spread
from harness.results.base import Result
from harness.table import Table, spread_text

CLOCKS = {"step": "by the clock", "cpu": "processor time"}


@dataclass(frozen=True, kw_only=True)
class LoopRecord:
    """Milliseconds of a step, by the clock and of this process."""

    model: str
    batch: int
    dtype: str
    variant: str
    step_ms: Runs
    cpu_ms: Runs


@dataclass(frozen=True, kw_only=True)
class LoopRatio:
    """Loop over bare step, pair by pair."""

    variant: str
    baseline: str
    step: Spread
    cpu: Spread


@dataclass(frozen=True, kw_only=True)
class LoopResult(Result):
    title: ClassVar[str] = "The training loop beside a bare step"

    records: list[LoopRecord]
    ratios: list[LoopRatio]

    def tables(self) -> list[Table]:
        rows = []
        for r in self.records:
            rows.append([r.variant, spread_text(r.step_ms, 1), spread_text(r.cpu_ms, 1)])
        for ratio in self.ratios:
            name = f"{ratio.variant} / {ratio.baseline}"
            rows.append([name, spread_text(ratio.step, 3), spread_text(ratio.cpu, 3)])
        first = self.records[0]
        head = ["ms a step (min to max)", *CLOCKS.values()]
        note = f"{first.model}, batch {first.batch}, {first.dtype}, {len(first.step_ms.runs)} pairs"
        return [Table(self.title, head, rows, f"{note}; {self.conditions}")]
