"""Result of predict.py: what can be said of a GPU without one, and measured steps held against it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

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
class PredictedPart:
    """A part of a step on one GPU: launches of one kind, their time on the device, and where it comes from.

    Attributes:
        part: a kind of call; "host" (launches), "optimizer", and "step" (all but the optimizer).
    """

    kind: str = "part"
    model: str
    variant: str
    masking: str
    batch: int
    gpu: str
    part: str
    source: str
    ms: Interval
    launches: int

    @property
    def name(self) -> str:
        return f"{self.variant}, {hyphened(self.masking)}"


@dataclass(frozen=True, kw_only=True)
class PredictedKernel:
    """What `python -m vmae_kernels.build --predict` says of a kernel, of an operator (`by` "operator") or of
    a whole operation ("sum"); a file has more of each.

    Attributes:
        predicted_us: lower and upper end.
        elements: that an operator returns.
    """

    operation: str
    preset: str
    device: str
    batch: int
    kernel: str
    by: str
    direction: str
    predicted_us: list[float]
    floor_us: float
    elements: int = 0
    rival_us: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class PredictedKernelsResult(Result):
    """The static model's file, as far as the benchmarks read it."""

    title: ClassVar[str] = "Kernels, predicted"

    records: list[PredictedKernel]

    def tables(self) -> list[Table]:
        rows = []
        for r in self.records:
            if r.by == "sum":
                spans = [f"{low:.0f} to {high:.0f}" for low, high in (r.predicted_us, r.rival_us or [0, 0])]
                rows.append([r.operation, r.preset, r.direction, *spans, f"{r.floor_us:.0f}"])
        device, batch = self.records[0].device, self.records[0].batch
        head = ["operation", "model", "direction", "predicted", "torch.compile, predicted", "floor"]
        title = f"PREDICTED, not measured: microseconds of the operations on {device}, batch {batch}, bf16"
        return [Table(title, head, rows, self.conditions)]


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

    records: list[PredictedStep | PredictedPart | PredictedFloor | Score]
    assumptions: dict[str, Any] = field(default_factory=dict)
    gpus: dict[str, Rates] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        steps = [r for r in self.records if isinstance(r, PredictedStep)]
        floors = [r for r in self.records if isinstance(r, PredictedFloor)]
        scores = [r for r in self.records if isinstance(r, Score)]
        parts = [r for r in self.records if isinstance(r, PredictedPart)]
        tables = [self._kept(steps), self._times(steps)] if steps else []
        tables += [parts_table(parts)] if parts else []
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
            spans = [r.predicted_step_ms.get(gpu) for gpu in self.gpus]
            cells = [f"{span.fast:.1f} to {span.slow:.1f}" if span else "-" for span in spans]
            rows.append([r.model, r.name, *cells])
        assumed = [assumption_text(name, value) for name, value in self.assumptions.items()]
        title = f"PREDICTED, not measured: ms a step of {steps[0].batch} clips, bf16, optimizer left out"
        note = f"Shorter and longer end: {'; '.join(assumed)}."
        return Table(title, ["model", "variant, masking", *self.gpus], rows, note)

    def _floors(self, floors: list[PredictedFloor]) -> Table:
        rows = []
        for r in floors:
            rows.append([r.model, r.operation, r.direction, *(f"{r.floor_us[gpu]:.1f}" for gpu in self.gpus)])
        title = f"Floors of the fused operations at datasheet rates, microseconds, batch {floors[0].batch}"
        return Table(title, ["model", "operation", "direction", *self.gpus], rows)


def assumption_text(name: str, value: Any) -> str:
    """One assumption in words: [shorter, longer]; of files before the parts, settings of one end."""
    if isinstance(value, list):
        return f"{name} {' or '.join(f'{end:g}' for end in value)}"
    return f"{name} ({', '.join(f'{key} {number:g}' for key, number in value.items())})"


def parts_table(parts: list[PredictedPart]) -> Table:
    """Where the predicted time of a step goes."""
    rows = []
    for r in parts:
        rows.append([r.model, r.name, r.part, f"{r.ms.fast:.2f} to {r.ms.slow:.2f}", r.launches, r.source])
    title = f"PREDICTED, not measured: parts of a step on {parts[0].gpu}, batch {parts[0].batch}, bf16"
    head = ["model", "variant, masking", "part", "ms", "launches", "source"]
    return Table(title, head, [[str(cell) for cell in row] for row in rows])


def score_table(scores: list[Score]) -> Table:
    rows = []
    for r in scores:
        name = f"{r.model} {r.variant}, {hyphened(r.masking)}, batch {r.batch}"
        span = f"{r.interval_ms.fast:.1f} to {r.interval_ms.slow:.1f}"
        rows.append([name, f"{r.measured_ms:.1f}", span, r.place])
    head = ["step without optimizer", "measured, ms", f"predicted for {scores[0].gpu}, ms", ""]
    return Table("Measured steps against the prediction", head, rows)
