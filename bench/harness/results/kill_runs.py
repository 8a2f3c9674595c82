"""Result of experiments/kill_runs.py: runs that were killed, and whether they end as if undisturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.results.base import Result
from harness.table import Table


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill: of which run, when, and what it left.

    Attributes:
        ranks: of the run.
        moment: what it waited for.
        seconds: after the start.
        unfinished: whether a checkpoint was half written.
        newest: step of the newest complete checkpoint, 0 without any.
        readable: how many complete checkpoints there were, all as written.
        others_ended_s: until the other rank had gone too, by itself.
    """

    ranks: int
    moment: str
    seconds: float
    unfinished: bool
    newest: int
    readable: int
    others_ended_s: float | None


@dataclass(frozen=True, kw_only=True)
class KillResult(Result):
    """Every kill.

    Attributes:
        differences: from the undisturbed runs.
    """

    title: ClassVar[str] = "Runs that were killed"

    records: list[Kill]
    steps: int
    seed: int
    differences: list[str]

    def tables(self) -> list[Table]:
        moments = sorted({kill.moment for kill in self.records})
        rows = []
        for ranks in sorted({kill.ranks for kill in self.records}):
            kills = [kill for kill in self.records if kill.ranks == ranks]
            counts = [sum(kill.moment == moment for kill in kills) for moment in moments]
            half, readable = sum(kill.unfinished for kill in kills), sum(kill.readable for kill in kills)
            gone = [kill.others_ended_s for kill in kills if kill.others_ended_s is not None]
            row = [str(value) for value in (ranks, len(kills), *counts, half, readable)]
            rows.append([*row, f"{max(gone):.1f} s" if gone else "-"])
        head = ["ranks", "kills", *moments, "left half written", "checkpoints read", "other rank gone in"]
        same = (
            "losses of every step, weights and optimizer state are those of the undisturbed runs, bit for bit"
        )
        return [Table(self.title, head, rows, "; ".join(self.differences) or same)]
