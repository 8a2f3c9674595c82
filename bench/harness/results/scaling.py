"""Result of scaling.py: how time and memory of a step grow; predictions and measurements apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.json_records import Runs
from harness.results.base import Result
from harness.results.steps import Memory
from harness.table import MIB, Table, number, spread_text


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What is known without running.

    Attributes:
        forward_macs: of a step's forward.
        memory: bytes by part; None for activations that cannot be counted.
        step_ms: the axis's first measured point, in proportion to the multiply-accumulates.
        tokens: of a clip: total, visible, decoded, counted.
    """

    forward_macs: int
    memory: dict[str, int | None]
    memory_bytes: int | None
    step_ms: float | None = None
    tokens: dict[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    step_ms: Runs
    clips_per_s: float
    memory: Memory | None = None


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Measured over predicted."""

    time: float | None = None
    memory: float | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value on an axis."""

    axis: str
    value: int | str
    variant: str
    masking: str
    dtype: str
    batch: int
    device: str
    predicted: Predicted
    measured: Measured | None = None
    measured_over_predicted: Ratios | None = None


@dataclass(frozen=True, kw_only=True)
class ScalingResult(Result):
    title: ClassVar[str] = "Scaling"

    records: list[Point]

    def tables(self) -> list[Table]:
        growth = [record for record in self.records if record.axis != "clips"]
        clips = [record for record in self.records if record.axis == "clips"]
        return [*([self._growth(growth)] if growth else []), *([self._clips(clips)] if clips else [])]

    def _clips(self, records: list[Point]) -> Table:
        """What dual masking saves of clips of growing size: each value has a record of both maskings."""
        rows = []
        for plain, dual in zip(records[::2], records[1::2]):
            row = [str(plain.value).replace("x", " x "), *_tokens(dual)]
            for get, unit in ((_macs, 1e9), (_activations, MIB)):
                without, with_it = get(plain) / plain.batch, get(dual) / dual.batch
                row += [number(without, unit), number(with_it, unit), number(without / with_it, 1, 2)]
            rows.append(row)
        head = ["frames x side", "tokens", "visible", "decoded", "counted"]
        for what in ("forward GMACs", "activations, MiB"):
            head += [f"{what}: encoder-only", "dual", "ratio"]
        about = f"{records[0].variant}, {records[0].dtype}, batch {records[0].batch}, counted, not run"
        return Table(
            "What dual masking saves as clips grow (counted)", head, rows, f"{about}; {self.conditions}"
        )

    def _growth(self, records: list[Point]) -> Table:
        rows = []
        for r in records:
            predicted, measured = r.predicted, r.measured
            ratios = r.measured_over_predicted or Ratios()
            row = [f"{r.axis} {r.value}", number(predicted.forward_macs, 1e9, 1), number(predicted.step_ms)]
            row += [spread_text(measured.step_ms if measured else None, 0), number(ratios.time, 1, 2)]
            peak = measured.memory.peak if measured and measured.memory else None
            row += [number(predicted.memory_bytes, MIB), number(peak, MIB)]
            rows.append([*row, number(ratios.memory, 1, 2)])
        head = ["point", "forward GMACs", "predicted, ms", "measured, ms", "ratio"]
        head += ["predicted, MiB", "measured, MiB", "ratio"]
        title = "How time and memory grow (predictions and measurements apart)"
        return Table(title, head, rows, self.conditions)


def _tokens(point: Point) -> list[str]:
    return [str(count) for count in (point.predicted.tokens or {}).values()]


def _macs(point: Point) -> float:
    return point.predicted.forward_macs


def _activations(point: Point) -> float:
    return point.predicted.memory["activations"] or 0
