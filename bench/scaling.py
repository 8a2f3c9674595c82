"""How time and memory of a training step grow: with clips a batch, frames, resolution, model size, and ranks.

Measured where it fits here (one process a point, on synthetic clips); beyond, what `vmae.model.cost` says. The two
stand apart: every record has `predicted`, and `measured` where it ran, with the ratio of the two. Predicted
memory: parameters, gradients and two moments in float32, and the activations that autograd keeps, counted;
what a process needs besides (on a CPU some 100 MiB of loaded code) is left out. Predicted time: the axis's
first measured point, in proportion to the multiply-accumulates.

    python bench/scaling.py                    # a CPU: minutes; a GPU: larger points
    python bench/scaling.py --axes frames size --variant reference
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from typing import Any

import torch
from harness.common import environment, exit_code, find_device, print_table, spread, write_json
from harness.records import load_clips
from harness.stepping import LOSS_TOLERANCE, SEED, Worker
from harness.telling import at
from harness.variants import MASKINGS, VARIANTS, resolve_variant

from vmae import InputError, ModelConfig
from vmae.config import PRESETS
from vmae.model.cost import forward_macs, saved_activation_bytes_per_clip

AXES = ("batch", "frames", "size", "model", "ranks")
MASKING = "dual"
# What is measured; the rest of each axis is predicted.
POINTS = {
    "batch": {"cpu": [1, 2, 4], "cuda": [8, 16, 32, 64], "beyond": [8, 32, 128]},
    "frames": {"cpu": [16, 32], "cuda": [16, 32, 64], "beyond": [64]},
    "size": {"cpu": [224, 288], "cuda": [224, 320, 448], "beyond": [320, 384, 448]},
    "model": {
        "cpu": ["vit_s", "vit_b"],
        "cuda": ["vit_s", "vit_b", "vit_l", "vit_g"],
        "beyond": ["vit_l", "vit_h", "vit_g"],
    },
    "ranks": {"cpu": [1, 2], "cuda": [1], "beyond": []},
}
QUICK = {
    "batch": [1, 2],
    "frames": [16, 32],
    "size": [224, 256],
    "model": ["vit_tiny", "vit_s"],
    "ranks": [1, 2],
}


def config_of(args: argparse.Namespace, axis: str, value: Any) -> tuple[ModelConfig, int]:
    """The model and the batch of a point."""
    if axis == "model":
        return ModelConfig.preset(value), args.batch
    config = ModelConfig.preset(args.model)
    if axis == "frames":
        config = config.replace(num_frames=value)
    elif axis == "size":
        config = config.replace(img_size=value - value % config.patch_size)
    return config, value if axis == "batch" else args.batch


def predict(variant: str, config: ModelConfig, batch: int, dtype: str) -> dict[str, Any]:
    """What is known without running: MACs of a step's forward, bytes by part."""
    known, mask = resolve_variant(variant), MASKINGS[MASKING]
    with torch.device("meta"):
        parameters = 4 * sum(p.numel() for p in known.build(config).parameters())
    saved = None
    if known.countable:
        saved = batch * saved_activation_bytes_per_clip(known.build, config, mask, getattr(torch, dtype))
    macs = batch * forward_macs(config, mask.encoder_ratio, mask.decoder_ratio, fused=known.ours)
    parts = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": 2 * parameters,
        "activations": saved,
    }
    return {
        "forward_macs": macs,
        "memory": parts,
        "memory_bytes": None if saved is None else 4 * parameters + saved,
    }


# --- measuring ----------------------------------------------------------------------------------------------


def job_of(args: argparse.Namespace, config: ModelConfig, folder: str, batch: int) -> dict[str, Any]:
    path = os.path.join(folder, f"{config.num_frames}-{config.image_hw[0]}-{config.patch_size}-{batch}.pt")
    if not os.path.exists(path):
        torch.save(load_clips("synthetic", batch, config), path)
    job = {
        "variant": args.variant,
        "masking": MASKING,
        "config": config,
        "device": args.device,
        "dtype": args.dtype,
    }
    return {**job, "clips": path, "threads": torch.get_num_threads()}


def measure_point(job: dict[str, Any], steps: int, warmup: int, check: bool) -> dict[str, Any]:
    """Step times and memory; with `check`, after the variant's loss agreed with the reference's.

    Raises:
        InputError: it does not agree: nothing is timed.
    """
    with contextlib.closing(Worker(job)) as worker:
        worker.wait_ready()
        if check:
            _check_loss(job, worker.ask("loss"))
        runs = [worker.ask("step")["step"] for _ in range(warmup + steps)][warmup:]
        return {"step_ms": {**spread(runs), "runs": runs}, "memory": worker.ask("memory")}


def _check_loss(job: dict[str, Any], loss: float) -> None:
    with contextlib.closing(Worker({**job, "variant": "reference"})) as reference:
        reference.wait_ready()
        expected = reference.ask("loss")
    if not abs(loss - expected) <= LOSS_TOLERANCE * abs(expected):
        raise InputError(
            f"NO SPEED for {job['variant']}: loss {loss:.6f} differs from reference's {expected:.6f}"
        )


def _rank_steps(rank: int, ranks: int, job: dict[str, Any], steps: int, file: str, results) -> None:
    """One of several processes that train one model by DDP over gloo, the cores shared out among them."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from vmae import DualMask
    from vmae.train.optim import OptimConfig, build_adamw

    torch.set_num_threads(max(job["threads"] // ranks, 1))
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    torch.manual_seed(SEED)
    model = DistributedDataParallel(resolve_variant(job["variant"]).build(job["config"]))
    optimizer = build_adamw(model, OptimConfig())
    clips = torch.load(job["clips"], weights_only=True)
    mask = DualMask.sample(clips.shape[0], job["config"].grid, **MASKINGS[MASKING].to_dict())
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


def measure_ranks(job: dict[str, Any], ranks: int, steps: int) -> dict[str, Any]:
    """Step times of `ranks` processes, each with the job's batch, over gloo."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, job, steps, os.path.join(folder, "store"), results)
        torch.multiprocessing.spawn(_rank_steps, arguments, nprocs=ranks)
    runs = results.get()
    return {"step_ms": {**spread(runs), "runs": runs}}


def measure_axis(args: argparse.Namespace, axis: str, folder: str) -> list[dict[str, Any]]:
    kind = "cuda" if args.device.startswith("cuda") else "cpu"
    measured = QUICK[axis] if args.quick else POINTS[axis][kind]
    records = []
    for value in dict.fromkeys([*measured, *POINTS[axis]["beyond"]]):
        at(f"{axis} {value}")
        config, batch = config_of(args, axis, value)
        record = {
            "axis": axis,
            "value": value,
            "variant": args.variant,
            "masking": MASKING,
            "dtype": args.dtype,
        }
        record |= {
            "batch": batch,
            "device": args.device,
            "predicted": predict(args.variant, config, batch, args.dtype),
        }
        if value in measured:
            job = job_of(args, config, folder, batch)
            if axis == "ranks":
                found = measure_ranks(job, value, args.steps)
            else:
                found = measure_point(job, args.steps, args.warmup, check=not records)
            clips = batch * (value if axis == "ranks" else 1)
            record["measured"] = found | {"clips_per_s": clips / found["step_ms"]["median"] * 1e3}
        records.append(record)
    return with_predicted_times(records)


def with_predicted_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds `predicted.step_ms`, and to measured points the ratios measured over predicted."""
    if records[0]["axis"] == "ranks":  # each rank does the same work: nothing to extrapolate
        return records
    first = next((r for r in records if "measured" in r), None)
    rate = first and first["measured"]["step_ms"]["median"] / first["predicted"]["forward_macs"]
    for record in records:
        predicted = record["predicted"]
        predicted["step_ms"] = rate and rate * predicted["forward_macs"]
        if "measured" in record:
            ratios = {}
            if record is not first:
                ratios["time"] = record["measured"]["step_ms"]["median"] / predicted["step_ms"]
            if predicted["memory_bytes"]:
                ratios["memory"] = record["measured"]["memory"]["peak"] / predicted["memory_bytes"]
            record["measured_over_predicted"] = ratios
    return records


# --- input and output ---------------------------------------------------------------------------------------


def report(records: list[dict[str, Any]]) -> None:
    def number(value: float | None, unit: float = 1.0) -> str:
        return "-" if value is None else f"{value / unit:.0f}"

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = []
    for r in records:
        predicted, measured, ratios = r["predicted"], r.get("measured"), r.get("measured_over_predicted", {})
        row = [
            f"{r['axis']} {r['value']}",
            f"{predicted['forward_macs'] / 1e9:.1f}",
            number(predicted.get("step_ms")),
        ]
        median = measured["step_ms"]["median"] if measured else None
        peak = measured["memory"]["peak"] if measured and "memory" in measured else None
        row += [number(median), ratio(ratios.get("time"))]
        row += [number(predicted["memory_bytes"], 2**20), number(peak, 2**20), ratio(ratios.get("memory"))]
        rows.append(row)
    head = ["axis", "GMACs", "predicted ms", "measured ms", "ratio", "predicted MiB", "measured MiB", "ratio"]
    print_table(head, rows)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument(
        "--model", choices=list(PRESETS), help="of all axes but model (vit_s on a CPU, vit_b on a GPU)"
    )
    parser.add_argument(
        "--variant", help=f"one of {', '.join(VARIANTS)} (default: torch on a CPU, triton on a GPU)"
    )
    parser.add_argument(
        "--batch", type=int, help="clips of all axes but batch (default: 1 on a CPU, 16 on a GPU)"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps a point (3)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (2)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="two small points an axis, a tiny model")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    args.device = find_device(args.device)
    on_gpu = args.device.startswith("cuda")
    defaults = {
        "model": "vit_tiny" if args.quick else "vit_b" if on_gpu else "vit_s",
        "batch": 16 if on_gpu else 1,
    }
    defaults["variant"] = "triton" if on_gpu else "torch"
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dtype = "bfloat16" if on_gpu else "float32"
    if args.batch < 1 or args.steps < 1 or args.warmup < 0:
        raise InputError("--batch and --steps must be at least 1, --warmup at least 0")
    reason = resolve_variant(args.variant).why_not(args.device)
    if reason:
        raise InputError(f"variant {args.variant!r} does not run here: {reason}")
    return args


def run(args: argparse.Namespace) -> int:
    known = environment(args.device)
    print(
        f"{args.model}, {args.variant}, dual masking, batch {args.batch}, {args.dtype}, {known['device']}",
        flush=True,
    )
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for axis in args.axes:
            records += measure_axis(args, axis, folder)
    report(records)
    if args.json:
        write_json(args.json, records, args.device)
        print(f"\nresults: {args.json}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
