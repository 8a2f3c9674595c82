"""Result of training_run.py: a run of the real training command's loop, for some seconds."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

from harness.json_records import Spread
from harness.results.base import Result
from harness.table import Table, number, spread_text


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """One run; its first steps, which compile and fill the queues, are left out.

    Attributes:
        input: "packed" videos or "synthetic" noise, made by the same workers.
        steps: counted ones; `warmup_steps` came before.
        step_ms, clips_per_s: of all ranks, as the log has them.
        data_share: of the time, in which the device waited for data.
        mfu: model FLOP/s over the device's peak; None where that is not known.
        host_gap_share: of some profiled steps, in which the device had nothing to do and data was there; None
            on a CPU.
        graphs, recompilations, graph_breaks: of torch.compile; None where the log has none.
        peak_memory_bytes, planned_memory_bytes: of one rank, and what `vmae plan` expects there.
        reason: why there is no run.
    """

    kind: str = "training run"
    input: str
    model: str
    batch: int
    ranks: int
    dtype: str
    device: str
    workers: int
    compiled: bool
    seconds: float = 0.0
    warmup_steps: int = 0
    steps: int = 0
    step_ms: Spread | None = None
    clips_per_s: float | None = None
    data_share: float | None = None
    mfu: float | None = None
    host_gap_share: float | None = None
    graphs: int | None = None
    recompilations: int | None = None
    graph_breaks: int | None = None
    peak_memory_bytes: int | None = None
    planned_memory_bytes: float | None = None
    last_loss: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingResult(Result):
    title: ClassVar[str] = "Training runs of some seconds"

    records: list[TrainingRecord]
    notes: list[str] = field(default_factory=list)

    def tables(self) -> list[Table]:
        rows = []
        for r in self.records:
            row = [f"{r.model}, batch {r.batch} x {r.ranks}, {r.dtype}, {r.input}"]
            if r.reason:
                rows.append([*row, textwrap.shorten(r.reason, 60), *["-"] * 9])
                continue
            row += [str(r.steps), spread_text(r.step_ms, 1), number(r.clips_per_s, 1, 1)]
            row += [number(r.data_share, 0.01, 1, " %"), number(r.host_gap_share, 0.01, 1, " %")]
            row += [number(r.mfu, 0.01, 1, " %")]
            row += [" / ".join(number(x) for x in (r.graphs, r.recompilations, r.graph_breaks))]
            row += [number(r.peak_memory_bytes, 2**30, 2), number(r.planned_memory_bytes, 2**30, 2)]
            rows.append([*row, number(_over(r), 1, 2, " x")])
        head = ["run", "steps", "step, ms (min to max)", "clips/s", "waiting for data", "host gaps", "MFU"]
        head += ["graphs / recompilations / breaks", "peak memory, GiB", "planned, GiB", "peak over planned"]
        return [Table(self.title, head, rows, " ".join([*self.notes, f"{self.conditions}."]))]


def _over(r: TrainingRecord) -> float | None:
    if not r.peak_memory_bytes or not r.planned_memory_bytes:
        return None
    return r.peak_memory_bytes / r.planned_memory_bytes
