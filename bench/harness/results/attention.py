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
class AttentionResult(Result):
    """Backends by shape, and whole models.

    Attributes:
        rejected: what was wrong and has no speed, with the reason.
        skipped: backends that do not run here, with the reason.
        order: pairs of backend and times faster than the plain one (geometric mean), the fastest first.
    """

    title: ClassVar[str] = "Attention"

    records: list[BackendRecord | ModelRecord]
    ratios: list[BackendRatio | ModelRatio] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    order: list[Any] = field(default_factory=list)

    def tables(self) -> list[Table]:
        backends = [r for r in self.records if isinstance(r, BackendRecord)]
        return [*self.summaries(), backend_table(backends)]

    def summaries(self) -> list[Table]:
        """Comparisons with the plain backend; the terminal has had `backend_table` of every shape."""
        ratios = [r for r in self.ratios if isinstance(r, BackendRatio)]
        skipped = "".join(f" Not here: {name}: {why}." for name, why in self.skipped.items())
        tables = [ratio_table(ratios, f"{self.conditions}.{skipped}")]
        models = [r for r in self.records if isinstance(r, ModelRecord)]
        if models:
            tables.append(model_table(models, [r for r in self.ratios if isinstance(r, ModelRatio)]))
        return tables


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
        padding = number(r.padding_flop_factor, 1, 2)
        name = f"{r.batch} x {r.shape}"
        rows.append([name, r.backend, *times, *rates, *memory, padding, f"{r.gradient_error:.1e}"])
    head = ["batch x tokens x heads x head dim", "backend", "forward, ms", "and backward, ms"]
    head += ["forward, TFLOP/s", "and backward, TFLOP/s", "kept, MiB", "peak, MiB", "padding, FLOPs"]
    return Table("Time, memory and errors of backends", [*head, "gradient error"], rows)


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
