"""One line for each result of the GPU day."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.results import read_result
from harness.results.base import Result
from harness.results.gpu import GpuResult
from harness.results.operations import TimeRecord
from harness.table import number, spread_text


def _tests(result: Any) -> str:
    counts = result.counts
    text = ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
    return text + ("" if result.complete else ", not to the end")


def _sanitizer(result: Any) -> str:
    return ", ".join(f"{r.tool} {r.status}" for r in result.records)


def _steps(result: Any) -> str:
    found = [
        f"{ratio.variant} {spread_text(ratio.speedup, 2)} x as fast as {ratio.baseline}"
        for ratio in result.ratios
        if ratio.fastest_competitor and ratio.speedup
    ]
    return "; ".join(found) or "nothing to compare"


def _operations(result: Any) -> str:
    """Where our kernels are slower than another way."""
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in result.records:
        if isinstance(r, TimeRecord) and r.median is not None:
            times.setdefault((r.operation, r.shape, r.direction), {})[r.variant] = r.median
    slower = []
    for (operation, shape, direction), by_variant in times.items():
        ours = by_variant.pop("triton", None)
        if ours is not None and by_variant and ours > min(by_variant.values()):
            best = min(by_variant, key=by_variant.__getitem__)
            slower.append(f"{operation} {shape} {direction} ({ours:.0f} us; {best} {by_variant[best]:.0f})")
    return f"slower than another way: {'; '.join(slower) or 'nowhere'} ({len(times)} compared)"


def _attention(result: Any) -> str:
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in result.order)
    return f"times as fast as the plain one: {means}"


def _training(result: Any) -> str:
    (r,) = result.records
    if r.reason:
        return r.reason
    text = f"{number(r.clips_per_s, 1, 1)} clips/s, {number(r.data_share, 0.01, 1)} % waiting for data, "
    text += f"{number(r.host_gap_share, 0.01, 1)} % host gaps, MFU {number(r.mfu, 0.01, 1)} %, "
    return text + f"{number(r.peak_memory_bytes, 2**30, 1)} of {number(r.planned_memory_bytes, 2**30, 1)} GiB"


def _scores(result: Any) -> str:
    inside = sum(r.place == "inside" for r in result.records)
    return f"{inside} of {len(result.records)} inside their interval"


HEADLINES: dict[str, Callable[[Any], str]] = {
    "device_tests": _tests,
    "sanitize": _sanitizer,
    "dual_vs_encoder": _steps,
    "operations": _operations,
    "attention": _attention,
    "training_run": _training,
    "kernel_scores": _scores,
    "predict": _scores,
}


def headlines(folder: Path, day: GpuResult) -> Iterator[str]:
    """A line for each result that has one."""
    for command in (command for stage in day.records for command in stage.commands):
        make = HEADLINES.get(command.name.partition(".")[0])
        if make is None or command.file is None:
            continue
        try:
            result: Result = read_result(folder / command.file, command.name)
            yield f"{command.name}: {make(result)}"
        except ValueError as error:
            yield f"{command.name}: {error}"
