"""Result of predict.py: what can be said of a GPU without one, and measured steps held against it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from harness.results.base import Result
from harness.results.operations import Rates
from harness.results.steps import hyphened
from harness.table import MIB, Table, number


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Milliseconds of a step: the shortest and the longest that is expected."""

    fast: float
    slow: float


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """One end of the interval.

    Attributes:
        matrix_share: of the matrix peak that the products reach.
        passes_over_kept_bytes: how often each kept byte crosses the memory bus.
        kernels_per_block, us_per_kernel: the host's part that the device's work does not hide.
    """

    matrix_share: float
    passes_over_kept_bytes: float
    kernels_per_block: int
    us_per_kernel: float


@dataclass(frozen=True, kw_only=True)
class PredictedStep:
    """Exact counts, and the interval on each GPU.

    Attributes:
        over_reference_encoder_only, over_reference_dual: kept bytes over those of the reference with that
            masking; None where it was not counted.
    """

    kind: str = "step"
    model: str
    variant: str
    masking: str
    dtype: str
    saved_activation_bytes_per_clip: int
    forward_macs_per_clip: int
    batch: int
    predicted_step_ms: dict[str, Interval]
    over_reference_encoder_only: float | None = None
    over_reference_dual: float | None = None

    @property
    def name(self) -> str:
        return f"{self.variant}, {hyphened(self.masking)}"


@dataclass(frozen=True, kw_only=True)
class PredictedFloor:
    """Floor of an operation on each GPU, in microseconds."""

    kind: str = "floor"
    model: str
    operation: str
    direction: str
    batch: int
    floor_us: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A measured step (optimizer left out) against its interval; `place`: inside, faster or slower."""

    kind: str = "score"
    model: str
    variant: str
    masking: str
    batch: int
    dtype: str
    gpu: str
    measured_ms: float
    interval_ms: Interval
    place: str


@dataclass(frozen=True, kw_only=True)
class PredictResult(Result):
    title: ClassVar[str] = "Without a GPU: counted and predicted"

    records: list[PredictedStep | PredictedFloor | Score]
    assumptions: dict[str, Assumption] = field(default_factory=dict)
    gpus: dict[str, Rates] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        steps = [r for r in self.records if isinstance(r, PredictedStep)]
        floors = [r for r in self.records if isinstance(r, PredictedFloor)]
        scores = [r for r in self.records if isinstance(r, Score)]
        tables = [self._kept(steps), self._times(steps)] if steps else []
        tables += [self._floors(floors)] if floors else []
        return tables + ([score_table(scores)] if scores else [])

    def _kept(self, steps: list[PredictedStep]) -> Table:
        """Bytes kept for the backward, exact, of every preset and variant."""
        rows = []
        for r in steps:
            over = (r.over_reference_encoder_only, r.over_reference_dual)
            row = [r.model, r.name, number(r.saved_activation_bytes_per_clip, MIB, 1)]
            row += [number(value, 1, 2, " x") for value in over]
            rows.append([*row, number(r.forward_macs_per_clip, 1e9, 2)])
        head = ["model", "variant, masking", "kept for the backward, MiB a clip"]
        head += ["of reference encoder-only", "of reference dual", "forward GMACs a clip"]
        return Table(f"Counted, {steps[0].dtype}: no GPU needed, exact", head, rows, self.conditions)

    def _times(self, steps: list[PredictedStep]) -> Table:
        """Intervals of step times."""
        rows = []
        for r in steps:
            spans = [r.predicted_step_ms[gpu] for gpu in self.gpus]
            rows.append([r.model, r.name, *(f"{span.fast:.0f} to {span.slow:.0f}" for span in spans)])
        assumed = [f"{name}: {json.dumps(asdict(values))}" for name, values in self.assumptions.items()]
        title = f"PREDICTED, not measured: ms a step of {steps[0].batch} clips, bf16, optimizer left out"
        note = f"Assumptions: {'; '.join(assumed)}"
        return Table(title, ["model", "variant, masking", *self.gpus], rows, note)

    def _floors(self, floors: list[PredictedFloor]) -> Table:
        rows = []
        for r in floors:
            rows.append([r.model, r.operation, r.direction, *(f"{r.floor_us[gpu]:.1f}" for gpu in self.gpus)])
        title = f"Floors of the fused operations at datasheet rates, microseconds, batch {floors[0].batch}"
        return Table(title, ["model", "operation", "direction", *self.gpus], rows)


def score_table(scores: list[Score]) -> Table:
    rows = []
    for r in scores:
        name = f"{r.model} {r.variant}, {hyphened(r.masking)}, batch {r.batch}"
        span = f"{r.interval_ms.fast:.1f} to {r.interval_ms.slow:.1f}"
        rows.append([name, f"{r.measured_ms:.1f}", span, r.place])
    head = ["step without optimizer", "measured, ms", f"predicted for {scores[0].gpu}, ms", ""]
    return Table("Measured steps against the prediction", head, rows)
