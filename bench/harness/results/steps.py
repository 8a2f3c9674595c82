"""Result of dual_vs_encoder.py: training steps of several variants, counted and timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from harness.json_records import Runs, Spread
from harness.results.base import Result
from harness.table import MIB, Table, median_of, number, spread_text

PARTS = ("step", "forward", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes: the peak, and its parts; `activations` is what is left, the largest transient included."""

    peak: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int


@dataclass(frozen=True, kw_only=True)
class Check:
    """Loss and gradients against the reference's: errors are relative to a run of higher precision, bounds
    twice the reference's own error in the same dtype.

    Attributes:
        parameter: whose gradient's norm is furthest out, with its error and bound.
        widest_bound: of any parameter.
        compared: norms of gradients.
        note: what could not be compared.
    """

    loss_error: float
    loss_bound: float
    parameter: str
    gradient_error: float
    gradient_bound: float
    widest_bound: float
    compared: int
    note: str = ""

    def why_wrong(self, dtype: str) -> str | None:
        """The reason where an error is over its bound."""
        parts = [("loss", self.loss_error, self.loss_bound)]
        parts.append((f"gradient's norm of {self.parameter}", self.gradient_error, self.gradient_bound))
        for what, error, bound in parts:
            if not error <= bound:  # NaN too
                allowed = f"{error:.1e}, {bound:.1e} allowed in {dtype}"
                return f"{what} differs from the reference's by {allowed}"
        return None


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A variant with a masking: what was counted, and what was timed.

    Attributes:
        saved_activation_bytes_per_clip: kept for the backward; None where it cannot be counted.
        forward_macs_per_clip: multiply-accumulates.
        loss: of the batch, in `dtype`, with the fresh weights.
        step_ms, forward_ms, backward_ms, optimizer_ms: None where nothing was timed.
        mfu: model FLOP/s over the device's peak.
        failed: why nothing was timed, such as memory that lacked.
        group: number of the group of jobs that it took turns with.
        anchor: key of the one that took turns in every group, with its steps of this group's turns.
    """

    model: str
    masking: str
    variant: str
    device: str
    dtype: str
    batch: int
    saved_activation_bytes_per_clip: int | None
    forward_macs_per_clip: int
    loss: float | None = None
    peak_memory_bytes: int | None = None
    memory: Memory | None = None
    step_ms: Runs | None = None
    forward_ms: Runs | None = None
    backward_ms: Runs | None = None
    optimizer_ms: Runs | None = None
    clips_per_s: float | None = None
    model_flops_per_s: float | None = None
    mfu: float | None = None
    check: Check | None = None
    failed: str | None = None
    group: int = 0
    anchor: str = ""
    anchor_ms: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.variant}, {hyphened(self.masking)}"

    @property
    def key(self) -> str:
        """Name in ratios."""
        return f"{self.variant} {self.masking}"

    def medians(self) -> list[float | None]:
        """Milliseconds of a step and of its parts."""
        return [median_of(getattr(self, f"{part}_ms")) for part in PARTS]


@dataclass(frozen=True, kw_only=True)
class StepRatio:
    """A variant with a masking over another, run by run; under 1 is less, but of `speedup`.

    Attributes:
        through: key of the anchor, where the two took turns with it and not with each other.
    """

    model: str
    variant: str
    baseline: str
    saved_activations: float | None
    fastest_competitor: bool = False
    time: Spread | None = None
    speedup: Spread | None = None
    memory: float | None = None
    through: str = ""


@dataclass(frozen=True, kw_only=True)
class SweptBatch:
    """Steps at one batch size."""

    batch: int
    step_ms: list[float]
    memory: Memory
    clips_per_s: float


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Growing batches of one variant, as far as they fit; `ended`: why no further, where its process
    failed."""

    model: str
    masking: str
    variant: str
    device: str
    dtype: str
    batches: list[SweptBatch]
    ended: str = ""


@dataclass(frozen=True, kw_only=True)
class PaperLine:
    """Dual over encoder-only masking of a variant, here and in the paper."""

    model: str
    variant: str
    source: str
    speedup: float | None
    paper_speedup: float
    speedup_over_paper: float | None
    memory: float | None
    paper_memory: float
    memory_over_paper: float | None
    saved_activations: float | None
    macs: float
    paper_macs: float


@dataclass(frozen=True, kw_only=True)
class StepsResult(Result):
    """Steps of all variants, and what is compared with what.

    Attributes:
        rejected: what has a wrong loss or gradient, with the reason; it has no speed.
        failed: what could not be stepped, with the reason.
        complete: False in a file of a run that goes on, or was cut off.
    """

    title: ClassVar[str] = "Dual against encoder-only masking"

    records: list[StepRecord]
    ratios: list[StepRatio] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    sweeps: list[Sweep] = field(default_factory=list)
    paper: list[PaperLine] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    complete: bool = True

    def tables(self) -> list[Table]:
        tables = [self._steps(), ratio_table(self.ratios)]
        if any(record.step_ms for record in self.records):
            tables.append(self._parts())
        if self.sweeps:
            tables.append(sweep_table(self.sweeps))
        if self.paper:
            tables.append(paper_table(self.paper))
        return tables

    def _steps(self) -> Table:
        """What was timed and counted, against the first record."""
        first = self.records[0]
        faster = {ratio.variant: ratio.speedup for ratio in self.ratios if ratio.baseline == first.key}
        same = {ratio.variant: ratio.speedup for ratio in self.ratios if ratio.fastest_competitor}
        fastest = {ratio.baseline for ratio in self.ratios if ratio.fastest_competitor and ratio.speedup}
        rows = []
        for r in self.records:
            row = [r.name, self._step_text(r), number(r.clips_per_s, 1, 2)]
            row += [number(r.peak_memory_bytes, MIB), number(r.saved_activation_bytes_per_clip, MIB, 1)]
            row += [number(r.forward_macs_per_clip, 1e9, 2)]
            row += ["1 (fastest other)" if r.key in fastest else spread_text(same.get(r.key), 2)]
            rows.append([*row, "1" if r is first else spread_text(faster.get(r.key), 2)])
        head = ["variant, masking", "step, ms (min to max)", "clips/s", "peak memory, MiB"]
        head += ["kept for the backward, MiB a clip", "forward GMACs a clip"]
        head += ["times faster than the fastest other way with this mask", f"than {hyphened(first.key)}"]
        title = f"Training steps: {first.model}, batch {first.batch}, {first.dtype}"
        lost = {**self.rejected, **self.failed}.items()
        note = "".join(f" NO SPEED for {hyphened(name)}: {why}." for name, why in lost)
        note += "" if self.complete else " NOT COMPLETE: the run went on, or was cut off."
        return Table(title, head, rows, f"{self.conditions}.{note}")

    def _step_text(self, record: StepRecord) -> str:
        """Milliseconds, or why there are none."""
        if record.failed:
            fits = not record.failed.startswith("does not fit")
            return "- (failed)" if fits else f"- (does not fit at batch {record.batch})"
        return "- (wrong)" if record.key in self.rejected else spread_text(record.step_ms, 0)

    def _parts(self) -> Table:
        rows = []
        for r in self.records:
            row = [r.name, *(number(median) for median in r.medians())]
            row += [number(r.memory.activations if r.memory else None, MIB)]
            row += [number(r.mfu, 0.01, 1, " %"), number(r.loss, 1, 6)]
            error = bound = None
            if r.check:
                error, bound = r.check.gradient_error, r.check.gradient_bound
            rows.append([*row, "-" if error is None else f"{error:.1e} ({bound:.1e})"])
        head = ["variant, masking", *(f"{part}, ms" for part in PARTS), "activations, MiB", "MFU", "loss"]
        head += ["a gradient's error at most (its bound)"]
        notes = dict.fromkeys(f"{r.name}: {r.check.note}." for r in self.records if r.check and r.check.note)
        return Table("Parts of a step (medians)", head, rows, " ".join(notes))


def hyphened(name: str) -> str:
    """Name of a masking for people: "encoder-only"."""
    return name.replace("_", "-")


def ratio_table(ratios: list[StepRatio]) -> Table:
    """All comparisons, run by run."""
    rows = []
    for r in ratios:
        mark = " (the fastest other way)" if r.fastest_competitor else ""
        mark += f" (through {r.through})" if r.through else ""
        row = [hyphened(f"{r.variant} / {r.baseline}{mark}"), spread_text(r.speedup, 2)]
        rows.append([*row, number(r.memory, 1, 2, " x"), number(r.saved_activations, 1, 2, " x")])
    head = ["variant / baseline", "times faster (min to max)", "peak memory", "kept for the backward"]
    return Table("Compared, run by run", head, rows)


def sweep_table(sweeps: list[Sweep]) -> Table:
    rows = []
    for sweep in sweeps:
        tried = [f"{run.batch}: {run.clips_per_s:.2f}" for run in sweep.batches]
        name = f"{sweep.variant}, {hyphened(sweep.masking)}"
        ended = f"; {sweep.ended}" if sweep.ended else ""
        rows.append([name, (", ".join(tried) or "not even 1 clip fits") + ended])
    title = "Batch sweep: the last batch is the largest that was tried, or that fits"
    return Table(title, ["variant, masking", "clips: clips/s"], rows)


def paper_table(lines: list[PaperLine]) -> Table:
    rows = []
    for p in lines:
        values = [p.speedup, p.paper_speedup, p.speedup_over_paper]
        values += [p.memory, p.paper_memory, p.memory_over_paper, p.macs, p.paper_macs]
        rows.append([p.variant, *(number(value, 1, 2, " x") for value in values)])
    head = ["variant", "faster", "paper", "ours over paper"]
    head += ["memory", "paper", "ours over paper", "forward MACs", "paper"]
    return Table("Dual over encoder-only masking, here and in the paper", head, rows, lines[0].source)
