"""Result of kernel_scores.py: measured kernels against the static model's predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from harness.results.base import Result
from harness.table import Table, number


@dataclass(frozen=True, kw_only=True)
class KernelScore:
    """A kernel, or the whole of an operation ("all"), measured against its interval in microseconds.

    Attributes:
        place: "inside", "faster" or "slower".
        over: measured over the middle of the interval.
        model: what the prediction rests on: registers, programs a processor, instructions.
    """

    kind: str = "kernel score"
    operation: str
    preset: str
    batch: int
    direction: str
    kernel: str
    predicted_us: list[float]
    floor_us: float | None
    measured_us: float
    place: str
    over: float
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class KernelScoresResult(Result):
    """Scores; `unmatched` predictions have no measurement."""

    title: ClassVar[str] = "Kernels against their predictions"

    records: list[KernelScore]
    unmatched: list[str] = field(default_factory=list)

    def tables(self) -> list[Table]:
        rows = []
        for r in self.records:
            row = [f"{r.operation} {r.direction}", f"{r.preset}, batch {r.batch}", r.kernel]
            row += [f"{r.predicted_us[0]:.1f} to {r.predicted_us[1]:.1f}", number(r.floor_us, 1, 1)]
            rows.append([*row, f"{r.measured_us:.1f}", f"{r.over:.2f} x", r.place])
        head = ["operation", "shape", "kernel", "predicted, us", "floor, us", "measured, us"]
        inside = sum(r.place == "inside" for r in self.records)
        note = f"{inside} of {len(self.records)} inside; {len(self.unmatched)} predictions without a "
        note += f"measurement; {self.conditions}"
        return [Table(self.title, [*head, "over the middle", ""], rows, note)]
