"""How time and memory of a training step grow: with clips a batch, frames, resolution, model size, and ranks.

Measured where it fits here (one process a point, on synthetic clips); beyond, predicted by `vmae.model.cost`.
The two stand apart: every record has `predicted`, and `measured` where it ran, with the ratio of the two.
Predicted memory: parameters, gradients and two moments in float32, and the activations that autograd keeps,
counted; what a process needs besides (on a CPU some 100 MiB of loaded code) is left out. Predicted time: the
axis's first measured point, in proportion to the multiply-accumulates.

The axis "clips" is counted only, with dual masking and without: what it saves as clips grow.

    python bench/scaling.py                    # a CPU: minutes; a GPU: larger points
    python bench/scaling.py --axes clips --model vit_b    # no step is run: seconds
    python bench/scaling.py --axes frames size --variant reference
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from harness.clips import load_clips
from harness.command import (
    add_device,
    add_json,
    check_least,
    exit_code,
    find_device,
    set_defaults,
    write_partial,
    write_result,
)
from harness.environment import find_environment
from harness.json_records import Runs
from harness.progress import at
from harness.records import count
from harness.results.scaling import Measured, Point, Predicted, Ratios, ScalingResult
from harness.stepping import LOSS_TOLERANCE, SEED, StepJob, StepWorker
from harness.table import show
from harness.variants import MASKINGS, VARIANTS, resolve_variant

from vmae import InputError, ModelConfig
from vmae.config import PRESETS
from vmae.model.cost import token_counts

MASKING, WITHOUT = "dual", "encoder_only"
GPU = dict(model="vit_b", batch=16, variant="triton")
CPU = dict(model="vit_s", batch=1, variant="torch")
# What is measured; the rest of each axis is predicted.
POINTS: dict[str, dict[str, list[Any]]] = {
    "batch": {"cpu": [1, 2, 4], "cuda": [8, 16, 32, 64], "beyond": [8, 32, 128], "quick": [1, 2]},
    "frames": {"cpu": [16, 32], "cuda": [16, 32, 64], "beyond": [64], "quick": [16, 32]},
    "size": {"cpu": [224, 288], "cuda": [224, 320, 448], "beyond": [320, 384, 448], "quick": [224, 256]},
    "model": {
        "cpu": ["vit_s", "vit_b"],
        "cuda": ["vit_s", "vit_b", "vit_l", "vit_g"],
        "beyond": ["vit_l", "vit_h", "vit_g"],
        "quick": ["vit_tiny", "vit_s"],
    },
    "ranks": {"cpu": [1, 2], "cuda": [1], "beyond": [], "quick": [1, 2]},
    # Frames x side, with each masking.
    "clips": {
        "cpu": [],
        "cuda": [],
        "beyond": ["16x224", "32x224", "64x224", "16x288", "16x384", "64x288", "64x384"],
        "quick": [],
    },
}


def job_of(args: argparse.Namespace, axis: str, value: Any, masking: str = MASKING) -> StepJob:
    """The model and the batch of a point."""
    config = ModelConfig.preset(value if axis == "model" else args.model)
    if axis == "frames":
        config = config.replace(num_frames=value)
    elif axis == "size":
        config = config.replace(img_size=value - value % config.patch_size)
    elif axis == "clips":
        frames, side = map(int, value.split("x"))
        config = config.replace(num_frames=frames, img_size=side - side % config.patch_size)
    return StepJob(
        model=value if axis == "model" else args.model,
        config=config,
        variant=args.variant,
        masking=masking,
        device=args.device,
        dtype=args.dtype,
        batch=value if axis == "batch" else args.batch,
        threads=torch.get_num_threads(),
    )


def predict(job: StepJob) -> Predicted:
    """What is known without running: MACs of a step's forward, bytes by part."""
    with torch.device("meta"):
        model = resolve_variant(job.variant).build(job.config)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    saved, macs = count(job.variant, job.masking, job.config, job.dtype)
    activations = None if saved is None else job.batch * saved
    tokens = token_counts(job.config, MASKINGS[job.masking])
    memory = {"parameters": parameters, "gradients": parameters, "optimizer": 2 * parameters}
    return Predicted(
        forward_macs=job.batch * macs,
        memory={**memory, "activations": activations},
        memory_bytes=None if activations is None else 4 * parameters + activations,
        tokens=dataclasses.asdict(tokens),
    )


# --- measuring ----------------------------------------------------------------------------------------------


def with_clips(job: StepJob, folder: str) -> StepJob:
    """The job with a file of synthetic clips, which points of the same shape share."""
    shape = (job.config.num_frames, job.config.image_hw[0], job.config.patch_size, job.batch)
    path = os.path.join(folder, f"{'-'.join(map(str, shape))}.pt")
    if not os.path.exists(path):
        torch.save(load_clips("synthetic", job.batch, job.config), path)
    return replace(job, clips=path)


def measure_point(job: StepJob, steps: int, warmup: int, check: bool) -> Measured:
    """Step times and memory; with `check`, after the variant's loss agreed with the reference's.

    Raises:
        InputError: it does not agree: nothing is timed.
    """
    with contextlib.closing(StepWorker(job)) as worker:
        worker.wait_ready()
        if check:
            check_loss(job, worker.ask("loss"))
        times = Runs.of([worker.ask("step")["step"] for _ in range(warmup + steps)][warmup:])
        rate = job.batch / times.median * 1e3
        return Measured(step_ms=times, clips_per_s=rate, memory=worker.ask("memory"))


def check_loss(job: StepJob, loss: float) -> None:
    """Compare a loss with the reference's.

    Raises:
        InputError: it differs.
    """
    with contextlib.closing(StepWorker(replace(job, variant="reference"))) as reference:
        reference.wait_ready()
        expected = reference.ask("loss")
    if not abs(loss - expected) <= LOSS_TOLERANCE * abs(expected):
        text = f"loss {loss:.6f} differs from reference's {expected:.6f}"
        raise InputError(f"NO SPEED for {job.variant}: {text}")


def run_rank(rank: int, ranks: int, job: StepJob, steps: int, file: str, results) -> None:
    """One of several processes that train one model by DDP over gloo, the cores shared out among them."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from vmae import DualMask
    from vmae.train.optim import OptimConfig, build_optimizer

    torch.set_num_threads(max(job.threads // ranks, 1))
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    torch.manual_seed(SEED)
    model = DistributedDataParallel(resolve_variant(job.variant).build(job.config))
    optimizer = build_optimizer(model, OptimConfig())
    clips = torch.load(job.clips, weights_only=True)
    mask = DualMask.sample(clips.shape[0], job.config.grid, **MASKINGS[MASKING].to_dict())
    times = []
    for _ in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(clips, mask).backward()
        optimizer.step()
        dist.barrier()
        times.append((time.perf_counter() - start) * 1e3)
    if rank == 0:
        results.put(times[1:])
    dist.destroy_process_group()


def measure_ranks(job: StepJob, ranks: int, steps: int) -> Measured:
    """Step times of `ranks` processes, each with the job's batch, over gloo."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, job, steps, os.path.join(folder, "store"), results)
        torch.multiprocessing.spawn(run_rank, arguments, nprocs=ranks)
    times = Runs.of(results.get())
    return Measured(step_ms=times, clips_per_s=ranks * job.batch / times.median * 1e3)


def measure_axis(
    args: argparse.Namespace,
    axis: str,
    folder: str,
    keep: Callable[[list[Point]], None] = lambda points: None,
) -> list[Point]:
    """Its points; the first that is measured has its loss checked. `keep` gets those so far, after each."""
    points = POINTS[axis]
    kind = "cuda" if args.device.startswith("cuda") else "cpu"
    here = points["quick" if args.quick else kind]
    records: list[Point] = []
    maskings = (WITHOUT, MASKING) if axis == "clips" else (MASKING,)
    for value, masking in itertools.product(dict.fromkeys([*here, *points["beyond"]]), maskings):
        at(f"{axis} {value} {masking}")
        job, measured = job_of(args, axis, value, masking), None
        if value in here and axis == "ranks":
            measured = measure_ranks(with_clips(job, folder), value, args.steps)
        elif value in here:
            measured = measure_point(with_clips(job, folder), args.steps, args.warmup, check=not records)
        point = Point(
            axis=axis,
            value=value,
            variant=job.variant,
            masking=job.masking,
            dtype=job.dtype,
            batch=job.batch,
            device=job.device,
            predicted=predict(job),
            measured=measured,
        )
        records.append(point)
        keep(with_predicted_times(records))
    return with_predicted_times(records)


def with_predicted_times(records: list[Point]) -> list[Point]:
    """The points with `predicted.step_ms`, and with measured over predicted where one was measured."""
    first = next((r for r in records if r.measured), None)
    if first is None or first.measured is None or first.axis == "ranks":
        return records  # each rank does the same work: nothing to extrapolate
    rate = first.measured.step_ms.median / first.predicted.forward_macs
    found = []
    for record in records:
        ms = rate * record.predicted.forward_macs
        ratios = None
        if record.measured:
            ratios = ratios_of(record.measured, record.predicted, None if record is first else ms)
        predicted = replace(record.predicted, step_ms=ms)
        found.append(replace(record, predicted=predicted, measured_over_predicted=ratios))
    return found


def ratios_of(measured: Measured, predicted: Predicted, predicted_ms: float | None) -> Ratios:
    time = memory = None
    if predicted_ms:
        time = measured.step_ms.median / predicted_ms
    if predicted.memory_bytes and measured.memory:
        memory = measured.memory.peak / predicted.memory_bytes
    return Ratios(time=time, memory=memory)


# --- command line -------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--axes", nargs="+", choices=list(POINTS), default=list(POINTS))
    add("--model", choices=list(PRESETS), help="of all axes but model (vit_s on a CPU, vit_b on a GPU)")
    add("--variant", help=f"one of {', '.join(VARIANTS)} (default: torch on a CPU, triton on a GPU)")
    add("--batch", type=int, help="clips of all axes but batch (default: 1 on a CPU, 16 on a GPU)")
    add("--steps", type=int, default=3, help="timed steps a point (3)")
    add("--warmup", type=int, default=2, help="steps before them (2)")
    add_device(parser)
    add("--quick", action="store_true", help="two small points an axis, a tiny model")
    add_json(parser)
    args = parser.parse_args(argv)
    args.device = find_device(args.device)
    on_gpu = args.device.startswith("cuda")
    if args.quick:
        set_defaults(args, {"model": "vit_tiny"})
    set_defaults(args, GPU if on_gpu else CPU)
    args.dtype = "bfloat16" if on_gpu else "float32"
    check_least(args, "batch", "steps")
    check_least(args, "warmup", least=0)
    reason = resolve_variant(args.variant).why_not(args.device)
    if reason:
        raise InputError(f"variant {args.variant!r} does not run here: {reason}")
    return args


def run(args: argparse.Namespace) -> int:
    known = find_environment(args.device)
    about = f"{args.model}, {args.variant}, dual masking, batch {args.batch}, {args.dtype}"
    print(f"{about}, {known.device}", flush=True)
    records: list[Point] = []

    def keep(points: list[Point]) -> None:
        write_partial(ScalingResult(environment=known, records=[*records, *points]), args.json)

    with tempfile.TemporaryDirectory() as folder:
        for axis in args.axes:
            records += measure_axis(args, axis, folder, keep)
    result = ScalingResult(environment=known, records=records)
    show(*result.tables())
    write_result(result, args.json)
    return 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
