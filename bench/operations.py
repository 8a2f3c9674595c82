"""Times the kernels of vmae_kernels on a GPU, against their floors and against the other ways to do the same.

    python bench/operations.py --json FILE        on a GPU: check, then time
    python bench/operations.py --check            anywhere: check alone (interpreted on a CPU)
    python bench/operations.py                    without a GPU: the floors, from bytes and FLOPs

Per operation and preset (bf16, uint8 clips): forward, and forward with backward; median and spread over
rounds, variants in turn. Device time is that of CUDA-graph replays, on inputs that go past the L2
(bench/harness/device_timing.py); what the host takes to launch a call is a number of its own. The floor is
the larger of bytes over bandwidth and FLOPs over rate: ceilings measured in the same run on a GPU, an H100's
datasheet without one. A variant that fails its check is not timed. Each record is written as it comes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from harness.command import add_json, check_least, exit_code, write_partial, write_result
from harness.device_timing import (
    DeviceClock,
    DeviceTimer,
    cache_bytes,
    clock_of,
    sets_past_cache,
    time_in_turn,
)
from harness.environment import find_environment, rehearsing
from harness.floors import DIRECTIONS, GPUS, Shape, floor_of, preset_shape
from harness.json_records import Spread
from harness.operation_calls import CHECK_SHAPES, Call, Prepared, error_ratios, prepare, variants
from harness.progress import at
from harness.results.operations import (
    CheckRecord,
    FloorRecord,
    KernelRecord,
    OperationsResult,
    Rates,
    TimeRecord,
)
from harness.table import show
from harness.variants import PUBLISHED_PRESETS

from vmae_kernels.backend import OPERATIONS

DTYPE = torch.bfloat16
OURS = "triton"
Records = Iterator[CheckRecord | FloorRecord | TimeRecord | KernelRecord]


# --- times on a GPU -----------------------------------------------------------------------------------------


def measured_ceilings(clock: DeviceClock, device: str) -> Rates:
    """Copy bandwidth and bf16 matrix rate of this GPU."""
    size, side = (1 << 30, 8192) if device == "cuda" else (1 << 10, 16)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=DTYPE) for _ in range(2))
    works: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    timers = {name: DeviceTimer(clock, [work]) for name, work in works.items()}
    best = {name: min(times) / 1e6 for name, times in time_in_turn(timers, 20).items()}
    return Rates(
        bytes_per_s=2 * size / best["copy"],
        matrix_flops=2 * side**3 / best["product"],
        vector_flops=GPUS["H100"].vector_flops,
        source=f"measured: {size >> 20} MiB copy, {side}^3 bf16 product",
    )


def input_sets(operation: str, shape: Shape, device: str) -> list[Prepared]:
    """Enough sets of inputs to pass three times the L2 before one comes again."""
    first = prepare(operation, shape, device, DTYPE)
    count = sets_past_cache(first.bytes, cache_bytes(device))
    return [first, *(prepare(operation, shape, device, DTYPE) for _ in range(count - 1))]


def measure(
    operation: str,
    shape: Shape,
    ceilings: Rates,
    clock: DeviceClock,
    device: str,
    rounds: int,
    ours_only: bool = False,
) -> Records:
    """Check, then time, all variants of an operation at a shape; then the kernels of ours."""
    at(f"{operation} {shape.name}, checked")
    torch.manual_seed(0)
    calls = variants(operation, compiled=not ours_only, device=device)
    if ours_only:
        calls = {OURS: calls[OURS]}
    ratios = error_ratios(operation, shape, calls, device, DTYPE)
    right = {name: call for name, call in calls.items() if ratios[name] <= 1}
    sets = input_sets(operation, shape, device)
    for direction in DIRECTIONS:
        at(f"{operation} {shape.name} {direction}, timed")
        floor = floor_record(operation, shape, direction, ceilings)
        timers, reasons = make_timers(right, sets, direction == "both", clock)
        times = time_in_turn(timers, rounds)
        for name in calls:
            record = time_record(floor, name, ratios[name], times.get(name), timers.get(name))
            yield replace(record, input_sets=len(sets), reason=reasons.get(name))
        del timers
        if OURS in right:
            works = [one.work(right[OURS], direction == "both") for one in sets]
            known: dict[str, Any] = dict(
                operation=operation, shape=shape.name, batch=shape.batch, direction=direction
            )
            for kernel, us in clock.kernels_us(works).items():
                yield KernelRecord(**known, kernel=kernel, us=us)


def make_timers(
    calls: dict[str, Call], sets: list[Prepared], backward: bool, clock: DeviceClock
) -> tuple[dict[str, DeviceTimer], dict[str, str]]:
    """A timer of every call, and the reason of each that does not run (too little memory, a compiler)."""
    timers, reasons = {}, {}
    for name, call in calls.items():
        try:
            timers[name] = DeviceTimer(clock, [one.work(call, backward) for one in sets])
        except Exception as error:  # torch.compile may raise anything
            reasons[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return timers, reasons


def time_record(
    floor: FloorRecord,
    variant: str,
    error_ratio: float,
    times: list[float] | None,
    timer: DeviceTimer | None = None,
) -> TimeRecord:
    """A variant's times (microseconds; None where it is wrong or does not run) over the floor."""
    known = {name: value for name, value in vars(floor).items() if name != "kind"}
    record = TimeRecord(**known, variant=variant, error_ratio=error_ratio)
    if times is None:
        return record
    found = Spread.of(times)
    return replace(
        record,
        median=found.median,
        min=found.min,
        max=found.max,
        over_floor=found.median / floor.floor_us,
        gb_per_s=floor.bytes / found.median / 1e3,
        tflop_per_s=floor.matrix / found.median / 1e6,
        timed_by=timer.timed_by if timer else None,
        host_us=timer.host_us if timer else None,
        calls=timer.calls if timer else None,
        rounds=len(times),
    )


# --- without one --------------------------------------------------------------------------------------------


def floor_record(operation: str, shape: Shape, direction: str, ceilings: Rates) -> FloorRecord:
    """What no implementation can beat."""
    floor, work = floor_of(operation, shape, direction, ceilings)
    return FloorRecord(
        operation=operation,
        shape=shape.name,
        batch=shape.batch,
        direction=direction,
        floor_us=floor,
        ceilings=ceilings,
        bytes=work.bytes,
        matrix=work.matrix,
        vector=work.vector,
    )


def check(operation: str, shape: Shape, dtype: torch.dtype, device: str) -> CheckRecord:
    """Our kernels' error at a shape."""
    name = str(dtype).removeprefix("torch.")
    at(f"{operation} {shape.name} {name}, checked")
    torch.manual_seed(0)
    calls = variants(operation, compiled=False, device=device)
    ratio = error_ratios(operation, shape, calls, device, dtype)[OURS]
    return CheckRecord(operation=operation, shape=shape.name, dtype=name, error_ratio=ratio, ok=ratio <= 1)


# --- command line -------------------------------------------------------------------------------------------


def make_records(args: argparse.Namespace, device: str) -> Records:
    """Checks, or times on a GPU, or floors without one."""
    if args.check:
        shapes = CHECK_SHAPES[:1] if args.one_shape else CHECK_SHAPES
        pairs = [(shape, operation) for shape in shapes for operation in args.operations]
        dtypes = (DTYPE,) if args.one_shape else (DTYPE, torch.float32)
        yield from (check(operation, shape, dtype, device) for shape, operation in pairs for dtype in dtypes)
        return
    presets = [preset_shape(name, args.batch) for name in args.presets]
    if rehearsing():
        presets = [CHECK_SHAPES[0]]
    pairs = [(shape, operation) for shape in presets for operation in args.operations]
    if device == "cpu" and not rehearsing():
        works = [(operation, shape, direction) for shape, operation in pairs for direction in DIRECTIONS]
        yield from (floor_record(*work, GPUS["H100"]) for work in works)
        return
    clock = clock_of(device)
    ceilings = measured_ceilings(clock, device)
    for shape, operation in pairs:
        yield from measure(operation, shape, ceilings, clock, device, args.rounds, args.ours)


def run(args: argparse.Namespace) -> int:
    check_least(args, "batch", "rounds")
    device = "cuda" if torch.cuda.is_available() and not rehearsing() else "cpu"
    autotuned = os.environ.get("VMAE_AUTOTUNE") == "1"
    result = OperationsResult(environment=find_environment(device), records=[], autotuned=autotuned)
    for record in make_records(args, device):
        result.records.append(record)
        write_partial(result, args.json)
    show(*result.tables())
    write_result(result, args.json)
    failed = any(getattr(record, "error_ratio", 0) > 1 for record in result.records)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--check", action="store_true", help="verify, time nothing")
    add("--one-shape", action="store_true", help="verify at one small shape, in bfloat16 alone")
    add("--ours", action="store_true", help="time our kernels only, not the other ways")
    add_json(parser)
    add("--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS), help="all")
    add("--presets", nargs="+", choices=PUBLISHED_PRESETS, default=["vit_b", "vit_g"])
    add("--batch", type=int, default=32, help="clips (32)")
    add("--rounds", type=int, default=20, help="measurements of each variant (20)")
    args = parser.parse_args(argv)
    return exit_code(partial(run, args))


if __name__ == "__main__":
    raise SystemExit(main())
