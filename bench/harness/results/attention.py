"""Result of attention.py: attention backends by shape, and what they change in a whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from harness.json_records import Runs, Spread
from harness.results.base import Result
from harness.results.steps import StepRatio, StepRecord
from harness.table import MIB, Table, median_of, number, spread_text


@dataclass(frozen=True, kw_only=True)
class BackendRecord:
    """A backend on a shape.

    Attributes:
        shape: "tokens x heads x head_dim".
        used_by: layers of presets that have it.
        tiles: head dims that the kernel computes instead, of q k^T and of the product with v; None: unknown.
        padding_flop_factor: FLOPs that this makes of each useful one.
        output_error, gradient_error: relative, against float64; `plain`: of the plain backend.
        saved_bytes: kept for the backward.
        peak_bytes: of a forward and backward, over what was there before; None where it cannot be measured.
        calls_per_turn: by mode; short calls are repeated.
        timed_by, host_us: by mode, see `harness.device_timing.DeviceTimer`; no host time on a CPU.
    """

    kind: str = "attention"
    shape: str
    tokens: int
    heads: int
    head_dim: int
    batch: int
    used_by: list[str]
    backend: str
    device: str
    dtype: str
    tiles: list[int] | None
    padding_flop_factor: float | None
    output_error: float
    gradient_error: float
    output_plain_error: float
    gradient_plain_error: float
    saved_bytes: int
    peak_bytes: int | None
    calls_per_turn: dict[str, int]
    forward_flops: int
    forward_flop_formula: str
    forward_ideal_bytes: int
    forward_ms: Runs | None
    forward_tflops: float | None
    forward_backward_flops: int
    forward_backward_flop_formula: str
    forward_backward_ideal_bytes: int
    forward_backward_ms: Runs | None
    forward_backward_tflops: float | None
    timed_by: dict[str, str] = field(default_factory=dict)
    host_us: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelRecord(StepRecord):
    """Training steps of a whole model."""

    kind: str = "model"


@dataclass(frozen=True, kw_only=True)
class BackendRatio:
    """How many times as fast as the plain backend on the same shape, run by run; bytes kept over its."""

    kind: str = "attention"
    shape: str
    variant: str
    baseline: str
    forward_speedup: Spread
    forward_backward_speedup: Spread
    saved_activations: float


@dataclass(frozen=True, kw_only=True)
class ModelRatio(StepRatio):
    kind: str = "model"


@dataclass(frozen=True, kw_only=True)
class PredictedTime:
    """Microseconds: the shortest and the longest that is expected."""

    fast: float
    slow: float


@dataclass(frozen=True, kw_only=True)
class BackendPrediction:
    """What a backend's kernels do at a shape in bf16, from their tiles; nothing here is measured.

    Attributes:
        mode: "forward" or "forward_backward"; tiles are those of its last kernel.
        head_dim_padded, query_rows, key_rows: what is multiplied instead of head dim and tokens.
        head_dim_factor, token_factor: of the FLOPs, by that padding.
        flop_factor: FLOPs of all kernels over the useful ones; the scores that a backward computes again too.
        bytes: that must move; stacking of three gradients into one, and the plain ones' matrix, too.
        programs: of all kernels.
    """

    kind: str = "attention prediction"
    backend: str
    shape: str
    tokens: int
    head_dim: int
    batch: int
    mode: str
    gpu: str
    head_dim_padded: int
    query_rows: int
    key_rows: int
    head_dim_factor: float
    token_factor: float
    flop_factor: float
    flops: float
    exponentials: float
    bytes: float
    programs: int
    predicted_us: PredictedTime


@dataclass(frozen=True, kw_only=True)
class AttentionResult(Result):
    """Backends by shape, and whole models.

    Attributes:
        rejected: what was wrong and has no speed, with the reason.
        skipped: backends that do not run here, with the reason.
        order: pairs of backend and times faster than the plain one (geometric mean), the fastest first.
    """

    title: ClassVar[str] = "Attention"

    records: list[BackendRecord | ModelRecord | BackendPrediction]
    ratios: list[BackendRatio | ModelRatio] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    order: list[Any] = field(default_factory=list)

    @property
    def predictions(self) -> list[BackendPrediction]:
        return [r for r in self.records if isinstance(r, BackendPrediction)]

    def tables(self) -> list[Table]:
        backends = [r for r in self.records if isinstance(r, BackendRecord)]
        return [*self.summaries(), *([backend_table(backends)] if backends else [])]

    def cost_table(self) -> Table:
        """What each backend pays: predicted, and measured where a GPU was."""
        on_gpu = self.environment.capability is not None or self.environment.rehearsed
        backends = [r for r in self.records if isinstance(r, BackendRecord) and on_gpu]
        return cost_table(self.predictions, backends)

    def summaries(self) -> list[Table]:
        """Comparisons with the plain backend; the terminal has had `backend_table` of every shape."""
        costs = [self.cost_table()] if self.predictions else []
        if len(self.predictions) == len(self.records):
            return costs
        ratios = [r for r in self.ratios if isinstance(r, BackendRatio)]
        skipped = "".join(f" Not here: {name}: {why}." for name, why in self.skipped.items())
        tables = [ratio_table(ratios, f"{self.conditions}.{skipped}")]
        models = [r for r in self.records if isinstance(r, ModelRecord)]
        if models:
            tables.append(model_table(models, [r for r in self.ratios if isinstance(r, ModelRatio)]))
        return tables + costs


def cost_table(predictions: list[BackendPrediction], measured: list[BackendRecord]) -> Table:
    """A row a backend and shape: padding, FLOPs, bytes, predicted and measured times of both directions."""
    records = {(r.backend, r.shape, r.batch): r for r in measured}
    by_key: dict[tuple[str, str, int], dict[str, BackendPrediction]] = {}
    for p in predictions:
        by_key.setdefault((p.backend, p.shape, p.batch), {})[p.mode] = p
    rows = []
    for key, modes in by_key.items():
        forward, both, record = modes["forward"], modes.get("forward_backward"), records.get(key)
        row = [f"{forward.batch} x {forward.shape}", forward.backend, str(forward.head_dim_padded)]
        row += [number(forward.head_dim_factor, 1, 2), *(_tokens(p) for p in (forward, both))]
        row += [number(p.flop_factor if p else None, 1, 2) for p in (forward, both)]
        row += [number(p.bytes if p else None, 1e6, 0) for p in (forward, both)]
        row += [str(forward.programs)]
        row += [_span(p) for p in (forward, both)]
        times = (record.forward_ms, record.forward_backward_ms) if record else (None, None)
        rows.append([*row, *(number(median_of(found), 1e-3, 1) for found in times)])
    head = ["batch x tokens x heads x head dim", "backend", "head dim padded to", "FLOPs by that, x"]
    head += ["tokens padded to, forward (queries x keys)", "in the backward", "FLOPs of all, x, forward"]
    head += ["and backward", "MB forward", "and backward", "programs forward", "predicted us, forward"]
    head += ["and backward", "measured us, forward", "and backward"]
    gpu = predictions[0].gpu if predictions else ""
    title = f"What attention backends pay: PREDICTED for bf16 on {gpu}, from the tiles of their kernels"
    note = "Times are predicted, not measured, but in the last two columns. FLOPs over the useful ones: a "
    note += "backward that computes the scores again does 1.25 x of its own. Bytes: the stacking of three "
    note += 'gradients into one counts. "-": tiles not looked up; sdpa_cudnn publishes none.'
    return Table(title, head, rows, note)


def _span(p: BackendPrediction | None) -> str:
    return f"{p.predicted_us.fast:.0f} to {p.predicted_us.slow:.0f}" if p else "-"


def _tokens(p: BackendPrediction | None) -> str:
    return f"{p.query_rows} x {p.key_rows}" if p else "-"


def ratio_table(ratios: list[BackendRatio], note: str = "") -> Table:
    rows = []
    for r in ratios:
        row = [r.shape, f"{r.variant} / {r.baseline}", spread_text(r.forward_speedup, 2)]
        rows.append(
            [*row, spread_text(r.forward_backward_speedup, 2), number(r.saved_activations, 1, 2, " x")]
        )
    head = ["tokens x heads x head dim", "backend / baseline", "forward, times faster"]
    return Table("Attention backends", [*head, "forward and backward", "kept bytes"], rows, note)


def backend_table(records: list[BackendRecord]) -> Table:
    rows = []
    for r in records:
        times = [number(median_of(found), 1, 2) for found in (r.forward_ms, r.forward_backward_ms)]
        rates = [_rate(found) for found in (r.forward_tflops, r.forward_backward_tflops)]
        memory = [number(r.saved_bytes, MIB, 1), number(r.peak_bytes, MIB, 1)]
        padding, host = number(r.padding_flop_factor, 1, 2), number(r.host_us.get("forward_backward"))
        name = f"{r.batch} x {r.shape}"
        rows.append([name, r.backend, *times, *rates, host, *memory, padding, f"{r.gradient_error:.1e}"])
    head = ["batch x tokens x heads x head dim", "backend", "forward, ms", "and backward, ms"]
    head += ["forward, TFLOP/s", "and backward, TFLOP/s", "host, us a call", "kept, MiB", "peak, MiB"]
    ways = {way for r in records for way in r.timed_by.values()}
    note = f"Timed by: {'; '.join(sorted(ways))}." if ways else ""
    title = "Time, memory and errors of backends"
    return Table(title, [*head, "padding, FLOPs", "gradient error"], rows, note)


def _rate(tflops: float | None) -> str:
    return "-" if tflops is None else f"{tflops:.3g}"


def model_table(records: list[ModelRecord], ratios: list[ModelRatio]) -> Table:
    faster = {r.variant.partition(" ")[0]: r for r in ratios}
    rows = []
    for r in records:
        ratio = faster.get(r.variant)
        row = [r.model, r.variant.partition("=")[0], number(median_of(r.step_ms))]
        row += [spread_text(ratio.speedup if ratio else None, 2), number(r.peak_memory_bytes, MIB)]
        row += [number(r.saved_activation_bytes_per_clip, MIB, 1)]
        rows.append([*row, number(ratio.saved_activations if ratio else None, 1, 2, " x")])
    first = records[0]
    head = ["model", "attention", "step, ms", "times faster than plain", "peak memory, MiB"]
    head += ["kept for the backward, MiB a clip", "of plain"]
    return Table(f"A training step, dual masking, batch {first.batch}, {first.dtype}", head, rows)
