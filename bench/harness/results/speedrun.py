"""Result of experiments/speedrun.py: FLOPs of pre-training until a frozen probe reaches a goal, by entry."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.results.base import Result
from harness.table import Table, number

NEAR = 3.0  # points below the goal: told as well, for luck decides less there


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A probe: FLOPs of training before it, and what it read, percent."""

    flops: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """One seed.

    Attributes:
        seconds: of training and its start, without the probes.
        probe_s: of the probes.
    """

    seed: int
    seconds: float
    probe_s: float
    passes: list[Pass]


@dataclass(frozen=True, kw_only=True)
class EntryRecord:
    """An entry.

    Attributes:
        about: what it changes.
        date, commit: of its runs.
        goal: percent.
        legs: steps and flags of its runs of `vmae pretrain`.
    """

    entry: str
    about: str
    date: str
    commit: str | None
    goal: float
    legs: list[dict[str, Any]]
    runs: list[SeedRun]

    @property
    def score(self) -> float | None:
        """Mean FLOPs of the seeds until the goal; None where one did not reach it."""
        flops = self.flops_to(self.goal)
        return statistics.mean(flops) if len(flops) == len(self.runs) else None

    def flops_to(self, percent: float) -> list[float]:
        """FLOPs until the first probe that read `percent`, of the seeds that reached it."""
        found = (next((one.flops for one in run.passes if one.top1 >= percent), None) for run in self.runs)
        return [flops for flops in found if flops is not None]

    @property
    def best(self) -> float:
        """The highest that every seed reached, percent."""
        return min(max(one.top1 for one in run.passes) for run in self.runs)


@dataclass(frozen=True, kw_only=True)
class SpeedrunResult(Result):
    """All entries, in the order in which they were run.

    Attributes:
        race: what they have in common.
    """

    title: ClassVar[str] = "Speedrun"

    records: list[EntryRecord]
    race: dict[str, Any]

    def tables(self) -> list[Table]:
        rows, goal, machine = [], self.records[-1].goal, self.environment
        for record in sorted(self.records, key=lambda one: (one.score is None, one.score or 0)):
            runs = record.runs
            texts = []
            for percent in (goal, goal - NEAR):
                flops = record.flops_to(percent)
                if len(flops) < len(runs):
                    texts.append(f"not reached by {len(runs) - len(flops)} of {len(runs)}")
                else:
                    each = (statistics.mean(flops), min(flops), max(flops))
                    texts.append("{} ({} to {})".format(*(number(one, 1e12, 2) for one in each)))
            if record.score is None:
                texts[0] += f" ({record.best:.1f} % by all)"
            seconds = number(statistics.mean(run.seconds for run in runs))
            made = [record.date, (record.commit or "unknown")[:9]]
            rows.append([record.entry, record.about, *texts, seconds, *made])
        head = ["entry", "what it is", f"TFLOP to {goal:g} %", f"to {goal - NEAR:g} %"]
        head += ["seconds", "date", "commit"]
        note = f"{len(self.records[-1].runs)} seeds: mean (least to most). Seconds of a seed, without its "
        note += f"probes; {machine.device}, {machine.cpu}."
        return [Table(self.title, head, rows, note)]
