"""Attention backends on the shapes of all presets: time, achieved TFLOP/s, memory; then what SDPA saves a
whole ViT-B.

Every backend that runs here is checked first, output and gradient against float64, and gets no speed if its
error is over twice that of the plain one in the same dtype. Each runs in a process of its own; they take
single measurements in turn (A B C A B C ...), so that what disturbs the machine disturbs all.

    python bench/attention.py           # a choice of shapes on a CPU (under 2 minutes), all of them on a GPU
    python bench/attention.py --full    # all shapes
    python bench/attention.py --quick   # seconds: that it works
    python bench/attention.py --predict # what each backend pays on a GPU, predicted; nothing is measured

On a GPU a call's time is that of CUDA-graph replays, on inputs that go past the L2
(bench/harness/device_timing.py); what the host takes to launch a call is a number of its own. The result is
written after every shape.

FLOPs are the useful ones: 4 B H N^2 d forward, 12 B H N^2 d with the backward (a flash backward computes the
scores once more, which counts as time, not as work). Ideal bytes: q, k, v and the output once, 4 B N H d
elements, and 12 with the backward.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
from dataclasses import asdict, replace
from typing import Any

import torch
from harness.attention_cost import predict
from harness.attention_runs import (
    BASELINE,
    CPU_CHOICE,
    DTYPES,
    FLOPS,
    MODEL_VARIANTS,
    MODES,
    QUICK,
    BackendJob,
    Found,
    Runner,
    Shape,
    measure_shape,
    preset_shapes,
)
from harness.clips import load_clips
from harness.command import (
    add_device,
    add_json,
    check_least,
    exit_code,
    find_device,
    say_wrong,
    set_defaults,
    write_partial,
    write_result,
)
from harness.environment import find_environment
from harness.floors import GPUS
from harness.json_records import Runs, Spread
from harness.progress import at
from harness.records import compare, count, make_record
from harness.results.attention import (
    AttentionResult,
    BackendPrediction,
    BackendRatio,
    BackendRecord,
    ModelRatio,
    ModelRecord,
    backend_table,
)
from harness.stepping import StepJob
from harness.table import show
from harness.turns import measure
from harness.worker import Worker

from vmae import InputError, ModelConfig
from vmae.config import PRESETS
from vmae.model.attention.choice import BACKENDS, auto_order, runnable
from vmae.model.attention.probes import Workload

PREDICTED_BATCH = 32
GPU = dict(dtype="bfloat16", batch=32, turns=20, model="vit_b", model_batch=32)
CPU = dict(dtype="float32", batch=1, turns=5, model="vit_b", model_batch=1)
SMALL = dict(turns=2, model="vit_tiny", model_batch=1)


def shape_record(shape: Shape, job: BackendJob, found: Found) -> BackendRecord:
    """A backend on a shape; no times where it was wrong."""
    tiles = BACKENDS[job.backend].tiles(shape.head_dim, job.device.startswith("cuda"))
    prepared = found.prepared
    assert prepared is not None  # one that failed has no record
    errors = prepared.errors
    values: dict[str, Any] = asdict(shape) | {"used_by": list(shape.used_by)}
    for mode in MODES:
        times, flops = Runs.of(found.runs[mode]) if found.runs[mode] else None, shape.flops(mode)
        values[f"{mode}_flops"], values[f"{mode}_flop_formula"] = flops, FLOPS[mode][0]
        values[f"{mode}_ideal_bytes"] = shape.ideal_bytes(mode, DTYPES[job.dtype])
        values[f"{mode}_ms"] = times
        values[f"{mode}_tflops"] = flops / times.median / 1e9 if times else None
    return BackendRecord(
        shape=shape.name,
        backend=job.backend,
        device=job.device,
        dtype=job.dtype,
        tiles=None if tiles is None else list(tiles),
        padding_flop_factor=None if tiles is None else sum(tiles) / (2 * shape.head_dim),
        output_error=errors.output,
        gradient_error=errors.gradient,
        output_plain_error=errors.output_plain,
        gradient_plain_error=errors.gradient_plain,
        saved_bytes=prepared.saved_bytes,
        peak_bytes=prepared.peak_bytes,
        calls_per_turn=prepared.calls_per_turn,
        timed_by=found.timed_by or prepared.timed_by,
        host_us=prepared.host_us,
        **values,
    )


def ratios_of(records: list[BackendRecord]) -> list[BackendRatio]:
    """Every backend against the plain one on the same shape, run by run."""
    plain = {r.shape: r for r in records if r.backend == BASELINE}
    ratios = []
    for record in records:
        base = plain.get(record.shape)
        if base is None or record is base:
            continue
        pairs = [(base.forward_ms, record.forward_ms), (base.forward_backward_ms, record.forward_backward_ms)]
        speedups = [Spread.of_ratios(slow.runs, fast.runs) for slow, fast in pairs if slow and fast]
        if len(speedups) < len(pairs):
            continue
        ratio = BackendRatio(
            shape=record.shape,
            variant=record.backend,
            baseline=BASELINE,
            forward_speedup=speedups[0],
            forward_backward_speedup=speedups[1],
            saved_activations=record.saved_bytes / base.saved_bytes,
        )
        ratios.append(ratio)
    return ratios


def measured_order(ratios: list[BackendRatio]) -> list[tuple[str, float]]:
    """Backends by the geometric mean of their speedups with backward over the shapes, the plain one (1) among
    them."""
    by_backend: dict[str, list[float]] = {BASELINE: [1.0]}
    for ratio in ratios:
        by_backend.setdefault(ratio.variant, []).append(ratio.forward_backward_speedup.median)
    means = {name: statistics.geometric_mean(values) for name, values in by_backend.items()}
    return sorted(means.items(), key=lambda item: -item[1])


def measure_shapes(args: argparse.Namespace, shapes: list[Shape], names: list[str]) -> AttentionResult:
    """Every backend on every shape, shown and written as they come."""
    span = 0.0 if args.quick else 50.0
    if args.device.startswith("cuda"):
        span = 2.0
    shared = BackendJob(
        backend=BASELINE,
        shapes=shapes,
        device=args.device,
        dtype=args.dtype,
        span=span,
        threads=torch.get_num_threads(),
    )
    jobs = {name: replace(shared, backend=name) for name in names}
    batch = args.batch if args.device.startswith("cuda") else PREDICTED_BATCH
    result = AttentionResult(
        environment=find_environment(args.device), records=[*predictions(args.gpu, batch)]
    )
    with contextlib.ExitStack() as stack:
        workers = [Worker(Runner, job, name) for name, job in jobs.items()]
        for worker in workers:
            stack.callback(worker.close)
        for worker in workers:
            worker.wait_ready()
        for index, shape in enumerate(shapes):
            at(f"shape {index + 1} of {len(shapes)}, {shape.name}")
            found = measure_shape(workers, index, args.turns, DTYPES[args.dtype])
            made = [shape_record(shape, jobs[name], each) for name, each in found.items() if each.prepared]
            wrong = {f"{name}, {shape.name}": each.wrong for name, each in found.items() if each.wrong}
            result.records.extend(made)
            backends = [r for r in result.records if isinstance(r, BackendRecord)]
            ratios = ratios_of(backends)
            order = measured_order(ratios)
            result = replace(result, ratios=[*ratios], rejected=result.rejected | wrong, order=order)
            write_partial(result, args.json)
            show(replace(backend_table(made), title=f"{shape.name}: {', '.join(shape.used_by)}"))
    return result


def predictions(gpu: str, batch: int) -> list[BackendPrediction]:
    """What every backend pays on `gpu` at the shapes of `CPU_CHOICE`, by shape."""
    shapes = [shape for shape in preset_shapes(batch) if set(shape.used_by) & set(CPU_CHOICE)]
    return [p for shape in shapes for name in BACKENDS for p in predict(name, shape, gpu, GPUS[gpu])]


def with_model(result: AttentionResult, args: argparse.Namespace) -> AttentionResult:
    """The result with training steps of a whole model (dual masking), with plain attention and with SDPA."""
    config = ModelConfig.preset(args.model)
    at(f"counting a step of {args.model}")
    counts = [count(variant, "dual", config, args.dtype) for variant in MODEL_VARIANTS]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clips.pt")
        torch.save(load_clips("synthetic", args.model_batch, config), path)
        shared = StepJob(
            model=args.model,
            config=config,
            variant=MODEL_VARIANTS[0],
            masking="dual",
            device=args.device,
            dtype=args.dtype,
            batch=args.model_batch,
            threads=torch.get_num_threads(),
            clips=path,
        )
        jobs = [replace(shared, variant=variant) for variant in MODEL_VARIANTS]
        measured, wrong = measure(jobs, args.turns, warmup=1)
    records = [make_record(*parts) for parts in zip(jobs, counts, measured)]
    ratios = [ModelRatio(**vars(ratio)) for ratio in compare(records)]
    return replace(
        result,
        records=[*result.records, *(ModelRecord(**vars(record)) for record in records)],
        ratios=[*result.ratios, *ratios],
        rejected=result.rejected | wrong,
    )


# --- command line -------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_device(parser)
    add("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, bfloat16 on a GPU")
    known = f"comma-separated: {', '.join(BACKENDS)}; default: all that run here"
    add("--backends", help=f"{known}; the plain one ({BASELINE}) is always measured")
    add("--batch", type=int, help="clips (default: 1 on a CPU, 32 on a GPU)")
    add("--turns", type=int, help="measurements of each (default: 5 on a CPU, 20 on a GPU)")
    add("--model", choices=[*PRESETS, "none"], help="of the whole-model part (default: vit_b)")
    add("--model-batch", type=int, help="clips a step (default: 1 on a CPU, 32 on a GPU)")
    add("--full", action="store_true", help="all shapes of all presets")
    add("--predict", action="store_true", help="what each backend pays on a GPU; measure nothing")
    add("--gpu", choices=list(GPUS), default="H100", help="of the predictions (H100)")
    add("--quick", action="store_true", help="two tiny shapes and a tiny model")
    add_json(parser)
    args = parser.parse_args(argv)
    args.device = find_device(args.device)
    if args.quick:
        set_defaults(args, SMALL)
    if args.predict:
        set_defaults(args, {"batch": PREDICTED_BATCH})
    set_defaults(args, GPU if args.device.startswith("cuda") else CPU)
    check_least(args, "batch", "turns", "model_batch")
    return args


def choose_shapes(args: argparse.Namespace) -> list[Shape]:
    if args.quick:
        return QUICK
    shapes = preset_shapes(args.batch)
    first = [shape for shape in shapes if set(shape.used_by) & set(CPU_CHOICE)]
    if args.full or args.device.startswith("cuda"):
        return [*first, *(shape for shape in shapes if shape not in first)]
    return first


def choose_backends(args: argparse.Namespace, shapes: list[Shape]) -> tuple[list[str], dict[str, str]]:
    """Backends that run on every shape, the plain one first, and the reason why each of the others does
    not.

    Raises:
        InputError: one that was named is unknown, or does not run here.
    """
    head_dims, dtype = {shape.head_dim for shape in shapes}, DTYPES[args.dtype]
    workloads = [Workload.on(args.device, dtype=dtype, head_dim=head_dim) for head_dim in head_dims]
    skipped = {}
    for name, backend in BACKENDS.items():
        reasons = [reason for workload in workloads if (reason := backend.why_not(workload))]
        if reasons:
            skipped[name] = reasons[0]
    names = [name for name in BACKENDS if name not in skipped]
    if args.backends is not None:
        names = args.backends.split(",")
    for name in names:
        if name not in BACKENDS:
            raise InputError(f"unknown attention backend {name!r}; known: {', '.join(BACKENDS)}")
        if name in skipped:
            can = ", ".join(runnable(workloads[0]))
            raise InputError(f"{name} cannot run here: {skipped[name]}; these can: {can}")
    return [BASELINE, *(name for name in names if name != BASELINE)], skipped


def say_order(args: argparse.Namespace, shape: Shape, order: list[tuple[str, float]]) -> None:
    """What was fastest, and what `auto` tries first."""
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in order)
    print(f"\nfastest first: {means} (times faster than {BASELINE})")
    workload = Workload.on(args.device, dtype=DTYPES[args.dtype], head_dim=shape.head_dim)
    tried, measured = auto_order(workload)
    print(f"auto tries {', '.join(tried)} ({'measured' if measured else 'expected, not measured'})")


def run(args: argparse.Namespace) -> int:
    if args.predict:
        made = predictions(args.gpu, args.batch)
        result = AttentionResult(environment=find_environment(), records=[*made])
        show(*result.tables())
        write_result(result, args.json)
        return 0
    shapes = choose_shapes(args)
    names, skipped = choose_backends(args, shapes)
    known = find_environment(args.device)
    print(f"{args.dtype}, {known.device} ({known.cpu}, {known.cores} cores), torch {known.torch}")
    for name, reason in skipped.items():
        print(f"  not here: {name}: {reason}")
    result = replace(measure_shapes(args, shapes, names), skipped=skipped)
    if args.model != "none":
        result = with_model(result, args)
    show(*result.summaries())
    say_order(args, shapes[0], result.order)
    say_wrong(result.rejected)
    write_result(result, args.json)
    return 1 if result.rejected else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
