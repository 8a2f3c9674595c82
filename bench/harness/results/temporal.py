"""Result of experiments/temporal.py: mAP of a temporal detector on three sets of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.results.base import Result
from harness.table import Table


@dataclass(frozen=True, kw_only=True)
class DetectorRecord:
    """A detector.

    Attributes:
        about: its features.
        map: mAP in [0, 1] by tIoU threshold; `average` over these.
        classes: the same of each class.
    """

    kind: str = "temporal"
    arm: str
    about: str
    seed: int
    map: dict[str, float]
    average: float
    classes: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class TemporalResult(Result):
    """A detector on each set of features.

    Attributes:
        seconds: by stage.
    """

    title: ClassVar[str] = "Temporal detection in miniature"

    records: list[DetectorRecord]
    seconds: dict[str, float]

    def tables(self) -> list[Table]:
        rows = []
        for r in self.records:
            rows.append([r.about, *(f"{100 * value:.1f}" for value in (*r.map.values(), r.average))])
        first = self.records[0]
        head = ["features", *(f"mAP@{threshold}" for threshold in first.map), "average"]
        means = {name: sum(values.values()) / len(values) for name, values in first.classes.items()}
        classes = ", ".join(f"{name} {100 * mean:.0f}" for name, mean in means.items())
        note = f"By class, of the first row: {classes}. {sum(self.seconds.values()):.0f} s of work"
        return [Table(self.title, head, rows, f"{note}; {self.conditions}.")]
