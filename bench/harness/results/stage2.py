"""Result of experiments/stage2.py: top-1 of each arm and evaluation, at equal FLOPs of pre-training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from harness.results.base import OverSeeds, Result
from harness.table import Table, number


@dataclass(frozen=True, kw_only=True)
class ArmRecord:
    """An arm.

    Attributes:
        about: what it predicts.
        steps: of the arm; those of the teacher's pre-training are not among them.
        macs: millions of multiply-accumulates of a clip's forward: the student's, at this mask.
        target_macs: the same of the target's values.
        tflops: of the whole pre-training, that of the teacher among them.
        top1: by evaluation, in percent.
    """

    arm: str
    about: str
    steps: int
    macs: float
    target_macs: float
    tflops: float
    top1: dict[str, OverSeeds]


@dataclass(frozen=True, kw_only=True)
class DifferenceRecord:
    """Points of one arm more than another's, seed by seed."""

    better: str
    worse: str
    evaluation: str
    points: OverSeeds


@dataclass(frozen=True, kw_only=True)
class Stage2Result(Result):
    """Every arm, over the seeds.

    Attributes:
        differences: between the arms, paired by seed.
        teacher: steps, share of the budget and top-1 of the frozen teacher, where it was evaluated.
        verdicts: what was asked for, and what came out.
        scale, settings: of the runs.
        seconds: by job and stage.
    """

    title: ClassVar[str] = "Stage two in miniature"

    records: list[ArmRecord]
    differences: list[DifferenceRecord]
    teacher: dict[str, Any]
    verdicts: list[str]
    minutes: float
    seeds: int
    scale: dict[str, Any]
    settings: dict[str, Any]
    seconds: dict[str, dict[str, float]]

    def tables(self) -> list[Table]:
        kinds = list(self.records[0].top1)
        rows = []
        for r in self.records:
            row = [r.arm, str(r.steps), number(r.macs, 1, 1), number(r.target_macs, 1, 1)]
            row += [number(r.tflops, 1, 2)]
            rows.append(row + [f"{r.top1[kind].mean:.1f} ± {r.top1[kind].std:.1f}" for kind in kinds])
        head = ["arm", "steps", "student, forward MMACs a clip", "target, MMACs a clip", "TFLOP in all"]
        head += [f"{kind}, top-1 %" for kind in kinds]
        note = f"Mean ± standard deviation of {self.seeds} seeds. {'. '.join(self.verdicts)}. "
        note += f"{self.minutes:.0f} minutes; {self.conditions}."
        return [Table(self.title, head, rows, note), self.difference_table()]

    def difference_table(self) -> Table:
        kinds = list(self.records[0].top1)
        rows: dict[str, list[str]] = {}
        for d in self.differences:
            name = f"{d.better} - {d.worse}"
            text = f"{d.points.mean:+.1f} ± {d.points.error:.1f}"
            rows.setdefault(name, [name]).append(text)
        note = "Mean ± its standard error; every seed's is in the JSON."
        return Table("Differences, paired by seed", ["arms", *kinds], list(rows.values()), note)
