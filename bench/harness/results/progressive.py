"""Result of experiments/progressive.py: top-1 of each arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.results.base import MiniatureResult
from harness.table import Table, number


@dataclass(frozen=True, kw_only=True)
class ArmRecord:
    """Top-1 of an arm in percent: over the seeds, and of each."""

    arm: str
    mean: float
    std: float
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class SeedScores:
    """Scores of a seed.

    Attributes:
        top1: by arm, in percent.
        dual_loss, others_loss: of the pre-trainings with dual and with encoder-only masking.
        seconds: by part and stage.
    """

    seed: int
    top1: dict[str, float]
    dual_loss: float | None
    others_loss: float | None
    seconds: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class ProgressiveResult(MiniatureResult):
    """Every arm, over the seeds.

    Attributes:
        verdicts: what was asked for, and what came out.
    """

    title: ClassVar[str] = "Progressive training in miniature"

    records: list[ArmRecord]
    seeds: list[SeedScores]
    verdicts: list[str]
    minutes: float

    def tables(self) -> list[Table]:
        rows = []
        for r in self.records:
            rows.append([r.arm, *(number(value, 1, 1) for value in (r.mean, r.std, *r.values))])
        head = ["arm", "top-1, %", "standard deviation", *(f"seed {seed.seed}" for seed in self.seeds)]
        note = ". ".join((*self.verdicts, f"{self.minutes:.0f} minutes; {self.conditions}"))
        return [Table(self.title, head, rows, note + ".")]
