"""Where the time of a training step goes: kinds of kernels, gaps in which the device waits for the host, and
data.

    python bench/step.py                                 # torch on a CPU, triton on a GPU
    python bench/step.py --variant reference             # the published way
    python bench/step.py --trace trace.json.gz           # for chrome://tracing or ui.perfetto.dev

Batches come from the training loader, decoding real video in worker processes, unless --input synthetic. The
variant's loss is compared with the reference's first; a wrong one is not profiled. On a GPU a kind's time is
the sum of its kernels; on a CPU that of its operators, those inside left out. Profiling itself slows a step:
its own length is also measured without it.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from harness.common import environment, exit_code, find_device, print_table, spread, write_json
from harness.records import choose_input, load_clips
from harness.stepping import LOSS_TOLERANCE, SEED, Stepper
from harness.telling import at
from harness.variants import VARIANTS, resolve_variant

from vmae import DualMask, InputError, MaskConfig, ModelConfig
from vmae.config import PRESETS

OURS = r"embed_visible|assemble_decoder|select_decoded|patch_loss|head_(error|weight)|target_affine|_partials|column_sum"
# The first pattern that a kernel's or operator's name matches decides its kind.
KINDS = (
    ("ours (Triton)", OURS),
    ("fused by torch.compile", r"triton_(poi|per|red|tem)|cpp_fused"),
    ("attention", r"flash|fmha|attention|softmax|cudnn_generated"),
    ("matrix products", r"gemm|gemv|\bmm\b|addmm|bmm|baddbmm|cutlass|cublas|nvjet|matmul|linear|conv"),
    ("optimizer", r"adam|multi_tensor|foreach|lerp"),
    ("normalisation", r"norm|var_mean|\bvar\b|std"),
    ("GELU", r"gelu"),
    (
        "gather and copy",
        r"copy|memcpy|memset|\bto\b|cat|index|gather|scatter|fill|zero|arange|sort|stack|contiguous|clone",
    ),
    ("sums", r"sum|mean|reduce"),
    ("element by element", r"elementwise|add|mul|sub|div|pow|sqrt|neg|where|clamp|exp|square|bernoulli"),
)


def kind_of(name: str) -> str:
    """The kind of a kernel or operator; "other" where no pattern fits."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def union_us(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def summarise(events: list, on_gpu: bool) -> tuple[dict[str, dict[str, float]], float]:
    """By kind: milliseconds and calls; and the milliseconds in which the device was busy."""
    kinds: dict[str, dict[str, float]] = {}
    spans = []
    for event in events:
        if on_gpu != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue
        us = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        if not on_gpu and not event.name.startswith(("aten::", "vmae", "Optimizer")):
            continue
        found = kinds.setdefault(kind_of(event.name), {"ms": 0.0, "calls": 0})
        found["ms"] += us / 1e3
        found["calls"] += 1
        spans.append((event.time_range.start, event.time_range.end))
    busy = union_us(spans) / 1e3 if on_gpu else sum(kind["ms"] for kind in kinds.values())
    return kinds, busy


# --- one profiled run ---------------------------------------------------------------------------------------


class Batches:
    """Batches as training gets them: decoded by workers, moved to the device; the wait for each is timed."""

    def __init__(
        self, source: str, batch: int, config: ModelConfig, device: torch.device, workers: int
    ) -> None:
        self.device, self.waits = device, []
        self._clips = None if source != "synthetic" else load_clips(source, batch, config)
        self._loader = None
        if self._clips is None:
            from vmae.data import PretrainDataset, build_loader, read_list
            from vmae.synthetic.samples import write_sample_list

            with tempfile.TemporaryDirectory() as folder:
                entries = read_list(
                    write_sample_list(f"{folder}/samples.txt") if source == "real" else source
                )
            size = dict(num_frames=config.num_frames, image_size=config.image_hw, grid=config.grid)
            repeat = -(-batch // len(entries))
            dataset = PretrainDataset(entries, stride=4, mask=MaskConfig(), repeat=repeat, seed=SEED, **size)
            pin = device.type == "cuda"
            self._loader = build_loader(dataset, batch_size=batch, num_workers=workers, pin_memory=pin)
        else:
            self._mask = DualMask.sample(batch, config.grid, **MaskConfig().to_dict())

    def next(self) -> tuple[torch.Tensor, DualMask]:
        start = time.perf_counter()
        if self._loader is None:
            found = self._clips.to(self.device), self._mask.to(self.device)
        else:
            batch = next(self._loader).to(self.device, non_blocking=True)
            found = batch.clips, batch.mask
        self.waits.append((time.perf_counter() - start) * 1e3)
        return found

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()


def check_loss(job: dict[str, Any]) -> str | None:
    """Why the variant is wrong: its loss in float32 against the reference's on the same clips; None if it is
    right."""
    clips = load_clips("synthetic", 1, job["config"])
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(clips, file.name)
        losses = [
            Stepper({**job, "clips": file.name, "variant": name}).loss()
            for name in ("reference", job["variant"])
        ]
    error = abs(losses[1] - losses[0]) / abs(losses[0])
    return (
        None
        if error <= LOSS_TOLERANCE
        else f"loss {losses[1]:.6f} differs from reference's {losses[0]:.6f} by {error:.1e}"
    )


def run_steps(stepper: Stepper, batches: Batches, steps: int) -> Iterator[float]:
    """Milliseconds of every step, the wait for its batch included."""
    for _ in range(steps):
        start = time.perf_counter()
        stepper.clips, stepper.mask = batches.next()
        stepper.step()
        yield (time.perf_counter() - start) * 1e3


def profile(
    job: dict[str, Any], source: str, workers: int, steps: int, warmup: int, trace: str | None
) -> dict[str, Any]:
    """Kinds, gaps and data of a step, averaged over `steps` profiled ones, and the time of as many without
    the profiler."""
    config, device = job["config"], torch.device(job["device"])
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".pt"))
        torch.save(load_clips("synthetic", 1, config), file.name)
        stepper = Stepper({**job, "clips": file.name})
        batches = stack.enter_context(
            contextlib.closing(Batches(source, job["batch"], config, device, workers))
        )
        at("warm-up")
        list(run_steps(stepper, batches, warmup))
        at(f"{steps} steps")
        bare = list(run_steps(stepper, batches, steps))
        waits = batches.waits[-steps:]
        on_gpu = device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        with torch.profiler.profile(activities=activities) as profiler:
            at(f"{steps} steps, profiled")
            profiled = list(run_steps(stepper, batches, steps))
        profiled_waits = batches.waits[-steps:]
    if trace:
        profiler.export_chrome_trace(trace)
    at("adding up what was profiled")
    kinds, busy = summarise(profiler.events(), on_gpu)
    classes = [
        {"name": name, "ms": found["ms"] / steps, "calls": found["calls"] / steps}
        for name, found in sorted(kinds.items(), key=lambda item: -item[1]["ms"])
    ]
    data, wall = sum(profiled_waits) / steps, sum(profiled) / steps
    classes.append({"name": "waiting for data", "ms": data, "calls": 1.0})
    classes.append({"name": "host gaps", "ms": max(wall - busy / steps - data, 0.0), "calls": None})
    for found in classes:
        found["share"] = found["ms"] / wall
    return {
        "step_ms": {**spread(bare), "runs": bare},
        "data_ms": spread(waits),
        "profiled_step_ms": wall,
        "classes": classes,
    }


# --- input and output ---------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(PRESETS), help="default: vit_s on a CPU, vit_b on a GPU")
    parser.add_argument("--batch", type=int, help="clips a step (default: 4 on a CPU, 32 on a GPU)")
    parser.add_argument("--steps", type=int, default=5, help="steps to profile (5)")
    parser.add_argument(
        "--variant", help=f"one of {', '.join(VARIANTS)} (default: torch on a CPU, triton on a GPU)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode video (2)")
    parser.add_argument(
        "--input", default="auto", help="real (the sample clips), synthetic, a list file; auto: real if there"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there (PNG)")
    parser.add_argument(
        "--trace", metavar="FILE", help="write the profiler's trace there (.json or .json.gz)"
    )
    args = parser.parse_args(argv)
    args.device = find_device(args.device)
    on_gpu = args.device.startswith("cuda")
    for name, gpu, cpu in (("model", "vit_b", "vit_s"), ("batch", 32, 4), ("variant", "triton", "torch")):
        if getattr(args, name) is None:
            setattr(args, name, gpu if on_gpu else cpu)
    if args.batch < 1 or args.steps < 1:
        raise InputError("--batch and --steps must be at least 1")
    reason = resolve_variant(args.variant).why_not(args.device)
    if reason:
        raise InputError(f"variant {args.variant!r} does not run here: {reason}")
    args.input = choose_input(args.input)
    return args


def report(record: dict[str, Any]) -> None:
    times = record["step_ms"]
    profiled = f"profiled {record['profiled_step_ms']:.1f}"
    print(f"a step takes {times['median']:.1f} ms ({times['min']:.1f} to {times['max']:.1f}); {profiled}")
    rows = []
    for found in record["classes"]:
        calls = "-" if found["calls"] is None else f"{found['calls']:.0f}"
        rows.append([found["name"], f"{found['ms']:.1f}", f"{found['share']:.1%}", calls])
    print_table(["where the time goes", "ms a step", "share", "calls"], rows)


def run(args: argparse.Namespace) -> int:
    known, on_gpu = environment(args.device), args.device.startswith("cuda")
    job = {name: getattr(args, name) for name in ("model", "variant", "device", "batch")}
    job |= {
        "dtype": "bfloat16" if on_gpu else "float32",
        "masking": "dual",
        "config": ModelConfig.preset(args.model),
    }
    job |= {"threads": torch.get_num_threads()}
    print(
        f"{args.model}, {args.variant}, dual masking, batch {args.batch}, {job['dtype']}, {known['device']}",
        flush=True,
    )
    record = {name: value for name, value in job.items() if name != "config"} | {
        "input": args.input,
        "workers": args.workers,
    }
    at("loss, checked against the reference's")
    wrong = check_loss(job)
    rejected = {args.variant: wrong} if wrong else {}
    if wrong:
        print(f"NO SPEED for {args.variant}: {wrong}", file=sys.stderr)
    else:
        record |= profile(
            job, args.input, args.workers, args.steps, warmup=3 if on_gpu else 1, trace=args.trace
        )
        report(record)
    if args.json:
        write_json(args.json, [record], args.device, rejected=rejected)
        print(f"\nresults: {args.json}")
    if args.plot and not wrong:
        from harness.plots import plot_classes

        try:
            plot_classes(args.plot, record)
            print(f"plot: {args.plot}")
        except ImportError:
            print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
