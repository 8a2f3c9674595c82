"""Result of experiments/optimizers.py: AdamW and Muon at several learning rates."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import ClassVar

from harness.results.base import Result
from harness.table import Table, number


@dataclass(frozen=True, kw_only=True)
class OptimizerRun:
    """One seed: mean losses of the tenths that end halfway and at the end, and seconds."""

    seed: int
    halfway: float | None
    loss: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class OptimizerRecord:
    """An optimizer and its learning rate for 256 videos."""

    opt: str
    lr: float
    runs: list[OptimizerRun]


@dataclass(frozen=True, kw_only=True)
class OptimizerResult(Result):
    """Every optimizer and rate, over the seeds.

    Attributes:
        steps: of each run.
        pretrain: settings of the runs, whose learning rate the records replace.
    """

    title: ClassVar[str] = "AdamW and Muon in miniature"

    records: list[OptimizerRecord]
    steps: int
    pretrain: list[str]

    def tables(self) -> list[Table]:
        rows = [
            [
                record.opt,
                number(record.lr, 1, 3),
                _mean([run.halfway for run in record.runs]),
                _mean([run.loss for run in record.runs]),
                number(min(run.seconds for run in record.runs)),
            ]
            for record in self.records
        ]
        head = ["optimizer", "--lr", "loss halfway (least to most)", "at the end", "seconds (least)"]
        note = f"{self.steps} steps, {len(self.records[0].runs)} seeds; {self.conditions}."
        return [Table(self.title, head, rows, note)]


def _mean(losses: list[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    if not known:
        return number(None)
    return f"{statistics.mean(known):.4f} ({min(known):.4f} to {max(known):.4f})"
