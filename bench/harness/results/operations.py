"""Result of operations.py: checks of the fused operations, their floors, and times over floors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.results.base import Result
from harness.table import Table, number


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device can do at most a second: bytes moved, FLOPs of matrix units, FLOPs of the others."""

    bytes_per_s: float
    matrix_flops: float
    vector_flops: float
    source: str


@dataclass(frozen=True, kw_only=True)
class CheckRecord:
    """Our kernels against float64.

    Attributes:
        error_ratio: largest error over the bound; over 1 is a failure.
    """

    kind: str = "check"
    operation: str
    shape: str
    dtype: str
    error_ratio: float
    ok: bool


@dataclass(frozen=True, kw_only=True)
class FloorRecord:
    """What no implementation can beat: bytes that must move, FLOPs that must be done, at `ceilings`."""

    kind: str = "floor"
    operation: str
    shape: str
    batch: int
    direction: str
    floor_us: float
    ceilings: Rates
    bytes: float
    matrix: float
    vector: float


@dataclass(frozen=True, kw_only=True)
class TimeRecord(FloorRecord):
    """A variant's time on the device; none where its check failed, or where it could not be timed (`reason`).

    Attributes:
        timed_by: see `harness.device_timing.DeviceTimer`.
        host_us: of the host to launch one call, the queue not full.
        calls: of each of the `rounds` measurements.
        input_sets: that the calls go round.
    """

    kind: str = "time"
    variant: str
    error_ratio: float
    unit: str = "us"
    reason: str | None = None
    timed_by: str | None = None
    host_us: float | None = None
    rounds: int | None = None
    calls: int | None = None
    input_sets: int | None = None
    median: float | None = None
    min: float | None = None
    max: float | None = None
    over_floor: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class KernelRecord:
    """Device time of one kernel of our variant in a call, by the profiler."""

    kind: str = "kernel"
    operation: str
    shape: str
    batch: int
    direction: str
    kernel: str
    us: float


@dataclass(frozen=True, kw_only=True)
class OperationsResult(Result):
    """Checks, floors, times, kernels.

    Attributes:
        autotuned: the launch configurations were chosen by timing (VMAE_AUTOTUNE=1).
    """

    title: ClassVar[str] = "Kernels"

    records: list[CheckRecord | FloorRecord | TimeRecord | KernelRecord]
    autotuned: bool = False

    def tables(self) -> list[Table]:
        checks = [r for r in self.records if isinstance(r, CheckRecord)]
        floors = [r for r in self.records if isinstance(r, FloorRecord)]
        kernels = [r for r in self.records if isinstance(r, KernelRecord)]
        tables = [floor_table(floors, self.conditions)] if floors else []
        tables += [kernel_table(kernels)] if kernels else []
        return tables + ([check_table(checks, self.conditions)] if checks else [])


def check_table(records: list[CheckRecord], note: str) -> Table:
    rows = [
        [r.operation, r.shape, r.dtype, f"{r.error_ratio:.2f}", "ok" if r.ok else "FAIL"] for r in records
    ]
    head = ["operation", "shape", "dtype", "error over bound", ""]
    return Table("Kernels against float64 (1 is the bound)", head, rows, note)


def floor_table(records: list[FloorRecord], note: str) -> Table:
    """Floors, and what was timed beside them."""
    rows, ways = [], {r.timed_by for r in records if isinstance(r, TimeRecord) and r.timed_by}
    for r in records:
        row = [r.operation, f"{r.shape}, batch {r.batch}", r.direction, getattr(r, "variant", "floor")]
        row += [number(r.bytes, 1e6, 1), number(r.matrix + r.vector, 1e9, 2), number(r.floor_us, 1, 1)]
        rows.append([*row, *(_time_cells(r) if isinstance(r, TimeRecord) else ["-"] * 4)])
    head = ["operation", "shape", "direction", "variant", "MB", "GFLOP", "floor, us"]
    head += ["measured, us", "over floor", "host, us a call", "timed by"]
    note = f"{note}. Floors from: {records[0].ceilings.source}."
    note += f" Timed by: {'; '.join(sorted(ways))}." if ways else ""
    return Table("Kernels", head, rows, note)


def _time_cells(r: TimeRecord) -> list[str]:
    measured = number(r.median, 1, 1)
    if r.median is None:
        measured = r.reason or "wrong"
    how = (r.timed_by or "-").partition(":")[0] + (
        " (host too)" if "host included" in (r.timed_by or "") else ""
    )
    return [measured, number(r.over_floor, 1, 2, " x"), number(r.host_us, 1, 0), how]


def kernel_table(records: list[KernelRecord]) -> Table:
    rows = []
    for r in records:
        rows.append([r.operation, f"{r.shape}, batch {r.batch}", r.direction, r.kernel, number(r.us, 1, 1)])
    head = ["operation", "shape", "direction", "kernel", "us a call"]
    return Table("Kernels of a call of ours, by the profiler", head, rows)
