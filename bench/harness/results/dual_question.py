"""Result of experiments/dual_question.py: dual against encoder-only masking, seed by seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.results.base import MiniatureResult, OverSeeds
from harness.table import Table


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One arm and seed.

    Attributes:
        hidden: percent of the frames that the encoder does not see.
        steps: of pre-training.
        top1: after fine-tuning, percent; the mean of `scores`, those of several fine-tunings.
        macs: millions of multiply-accumulates of a clip's forward.
    """

    hidden: int
    arm: str
    seed: int
    steps: int
    top1: float
    scores: list[float]
    macs: float


@dataclass(frozen=True, kw_only=True)
class Difference(OverSeeds):
    """An arm's top-1 minus that of encoder-only masking, in points."""

    hidden: int
    arm: str


@dataclass(frozen=True, kw_only=True)
class DualQuestionResult(MiniatureResult):
    """All arms and seeds.

    Attributes:
        step_s: CPU seconds of a step by arm, three quarters hidden.
    """

    title: ClassVar[str] = "Dual against encoder-only masking, seed by seed"

    records: list[Difference]
    runs: list[ArmRun]
    step_s: dict[str, float]
    verdicts: list[str]
    minutes: float

    def tables(self) -> list[Table]:
        rows = []
        for one in self.records:
            for arm in dict.fromkeys(("encoder-only", one.arm)):
                runs = [run for run in self.runs if (run.hidden, run.arm) == (one.hidden, arm)]
                scores = [run.top1 for run in runs]
                mean = f"{sum(scores) / len(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"
                gap = f"{one.mean:+.1f} ± {one.error:.2f}" if arm == one.arm else ""
                about = [f"{one.hidden} %", arm, str(len(runs)), str(runs[0].steps), f"{runs[0].macs:.1f}"]
                row = [*about, mean, gap]
                if row not in rows:
                    rows.append(row)
        head = ["frames hidden", "arm", "seeds", "steps", "forward MMACs a clip"]
        head += ["top-1, %", "difference, points"]
        note = f"{len(self.runs[0].scores)} fine-tunings of each pre-training; ±: standard "
        note += f"error of the mean paired difference; {self.conditions}."
        return [Table(self.title, head, rows, note)]
