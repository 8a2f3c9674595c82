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
    """A variant's time; none where its check failed."""

    kind: str = "time"
    variant: str
    error_ratio: float
    unit: str = "us"
    median: float | None = None
    min: float | None = None
    max: float | None = None
    over_floor: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class OperationsResult(Result):
    title: ClassVar[str] = "Kernels"

    records: list[CheckRecord | FloorRecord | TimeRecord]

    def tables(self) -> list[Table]:
        checks = [r for r in self.records if isinstance(r, CheckRecord)]
        floors = [r for r in self.records if isinstance(r, FloorRecord)]
        tables = [check_table(checks, self.conditions)] if checks else []
        return tables + ([floor_table(floors, self.conditions)] if floors else [])


def check_table(records: list[CheckRecord], note: str) -> Table:
    rows = [
        [r.operation, r.shape, r.dtype, f"{r.error_ratio:.2f}", "ok" if r.ok else "FAIL"] for r in records
    ]
    head = ["operation", "shape", "dtype", "error over bound", ""]
    return Table("Kernels against float64 (1 is the bound)", head, rows, note)


def floor_table(records: list[FloorRecord], note: str) -> Table:
    """Floors, and what was timed beside them."""
    rows = []
    for r in records:
        variant, measured, over = "floor", "-", "-"
        if isinstance(r, TimeRecord):
            variant, over = r.variant, number(r.over_floor, 1, 2, " x")
            measured = "wrong" if r.median is None else number(r.median, 1, 1)
        row = [r.operation, f"{r.shape}, batch {r.batch}", r.direction, variant]
        row += [number(r.bytes, 1e6, 1), number(r.matrix + r.vector, 1e9, 2), number(r.floor_us, 1, 1)]
        rows.append([*row, measured, over])
    head = ["operation", "shape", "direction", "variant", "MB", "GFLOP", "floor, us"]
    note = f"{note}. Floors from: {records[0].ceilings.source}."
    return Table("Kernels", [*head, "measured, us", "over floor"], rows, note)
