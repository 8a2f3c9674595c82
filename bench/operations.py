"""Times the kernels of vmae_kernels on a GPU, against their floors and against the other ways to do the same.

    python bench/operations.py --json FILE        on a GPU: check, then time
    python bench/operations.py --check            anywhere: check alone (interpreted on a CPU)
    python bench/operations.py                    without a GPU: the floors, from bytes and FLOPs

Per operation and preset (bf16, uint8 clips): device time by CUDA events, forward and forward with backward;
median and spread over calls, variants in turn, inputs rotated so that none is found in the L2. The floor is
the larger of bytes over bandwidth and FLOPs over rate: ceilings measured in the same run on a GPU, an H100's
datasheet without one. A variant that fails its check is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness.command import add_json, exit_code, write_result
from harness.environment import find_environment
from harness.floors import DIRECTIONS, GPUS, Shape, floor_of, preset_shape
from harness.json_records import Spread
from harness.operation_calls import CHECK_SHAPES, Call, Inputs, error_ratios, make_inputs, variants
from harness.progress import at
from harness.results.operations import CheckRecord, FloorRecord, OperationsResult, Rates, TimeRecord
from harness.table import show
from harness.variants import PUBLISHED_PRESETS

from vmae_kernels.backend import OPERATIONS

WARMUP = 5


def time_variants(
    calls: dict[str, Call], sets: list[Inputs], backward: bool, rounds: int
) -> dict[str, list[float]]:
    """Microseconds of every call, variants in turn, each call on the next set of inputs."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + WARMUP):
        for name, call in calls.items():
            elapsed = time_call(call, sets[turn % len(sets)], backward)
            if turn >= WARMUP:
                found[name].append(elapsed)
    return found


def time_call(call: Call, inputs: Inputs, backward: bool) -> float:
    """Microseconds of one call, by events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    learned = [x for x in inputs if x.requires_grad]
    torch.cuda._sleep(200_000)  # The host gets ahead, so that launches are not what is timed.
    start.record()
    with torch.set_grad_enabled(backward):
        result = call(*inputs)
        if backward:
            torch.autograd.grad(result, learned, torch.ones_like(result))
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


def measured_ceilings() -> Rates:
    """Copy bandwidth and bf16 matrix rate of this GPU."""

    def best(call: Callable[[], Any]) -> float:
        return min(time_variants({"x": lambda *_: call()}, [()], False, 20)["x"]) / 1e6

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy, product = best(lambda: target.copy_(source)), best(lambda: a @ b)
    return Rates(
        bytes_per_s=2 * source.numel() / copy,
        matrix_flops=2 * 8192**3 / product,
        vector_flops=GPUS["H100"].vector_flops,
        source="measured: 1 GiB copy, 8192^3 bf16 product",
    )


def input_sets(operation: str, shape: Shape) -> list[Inputs]:
    """Enough sets of inputs to pass three times the L2 before one comes again."""
    first = make_inputs(operation, shape, "cuda", torch.bfloat16)
    size = sum(x.numel() * x.element_size() for x in first)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(16, 2 + 3 * cache // size)
    return [first, *(make_inputs(operation, shape, "cuda", torch.bfloat16) for _ in range(count - 1))]


def measure(operation: str, shape: Shape, ceilings: Rates, rounds: int) -> list[TimeRecord]:
    """Check, then time, all variants of an operation at a shape."""
    at(f"{operation} {shape.name}, checked")
    calls = variants(operation, compiled=True)
    ratios = error_ratios(operation, shape, calls, "cuda", torch.bfloat16)
    right = {name: call for name, call in calls.items() if ratios[name] <= 1}
    sets, records = input_sets(operation, shape), []
    for direction in DIRECTIONS:
        at(f"{operation} {shape.name} {direction}, timed")
        floor = floor_record(operation, shape, direction, ceilings)
        times = time_variants(right, sets, direction == "both", rounds)
        for name in calls:
            records.append(time_record(floor, name, ratios[name], times.get(name)))
    return records


def time_record(
    floor: FloorRecord, variant: str, error_ratio: float, times: list[float] | None
) -> TimeRecord:
    """A variant's times (microseconds; None where it is wrong) over the floor."""
    known = {name: value for name, value in vars(floor).items() if name != "kind"}
    record = TimeRecord(**known, variant=variant, error_ratio=error_ratio)
    if times is None:
        return record
    found = Spread.of(times)
    return TimeRecord(
        **known,
        variant=variant,
        error_ratio=error_ratio,
        median=found.median,
        min=found.min,
        max=found.max,
        over_floor=found.median / floor.floor_us,
        gb_per_s=floor.bytes / found.median / 1e3,
        tflop_per_s=floor.matrix / found.median / 1e6,
    )


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
    ratios = error_ratios(operation, shape, variants(operation, compiled=False), device, dtype)
    ratio = ratios["triton"]
    return CheckRecord(operation=operation, shape=shape.name, dtype=name, error_ratio=ratio, ok=ratio <= 1)


def make_records(args: argparse.Namespace, device: str) -> list[CheckRecord | FloorRecord | TimeRecord]:
    """Checks, or times on a GPU, or floors without one."""
    if args.check:
        pairs = [(shape, operation) for shape in CHECK_SHAPES for operation in OPERATIONS]
        dtypes = (torch.bfloat16, torch.float32)
        return [check(operation, shape, dtype, device) for shape, operation in pairs for dtype in dtypes]
    pairs = [(preset_shape(name, args.batch), operation) for name in args.presets for operation in OPERATIONS]
    if device == "cpu":
        works = [(operation, shape, direction) for shape, operation in pairs for direction in DIRECTIONS]
        return [floor_record(*work, GPUS["H100"]) for work in works]
    ceilings = measured_ceilings()
    found: list[CheckRecord | FloorRecord | TimeRecord] = []
    for shape, operation in pairs:
        found += measure(operation, shape, ceilings, args.rounds)
    return found


def run(args: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    records = make_records(args, device)
    result = OperationsResult(environment=find_environment(device), records=records)
    show(*result.tables())
    write_result(result, args.json)
    failed = any(getattr(record, "error_ratio", 0) > 1 for record in records)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--check", action="store_true", help="verify, time nothing")
    add_json(parser)
    add("--presets", nargs="+", choices=PUBLISHED_PRESETS, default=["vit_b", "vit_g"])
    add("--batch", type=int, default=32, help="clips (32)")
    add("--rounds", type=int, default=50, help="timed calls of each variant (50)")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
