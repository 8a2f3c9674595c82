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
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from harness.clips import add_input, choose_input, load_clips, open_dataset
from harness.command import (
    add_device,
    add_json,
    check_least,
    draw,
    exit_code,
    find_device,
    say_wrong,
    set_defaults,
    write_result,
)
from harness.environment import find_environment
from harness.json_records import Runs, Spread
from harness.plots import plot_classes
from harness.profiling import Total, summarise
from harness.progress import at
from harness.results.step import Profile, ProfileRecord, ProfileResult, Share
from harness.stepping import LOSS_TOLERANCE, StepJob, Stepper
from harness.table import show
from harness.variants import VARIANTS, resolve_variant

from vmae import DualMask, InputError, MaskConfig, ModelConfig
from vmae.config import PRESETS
from vmae.data import build_loader

GPU = dict(model="vit_b", batch=32, variant="triton")
CPU = dict(model="vit_s", batch=4, variant="torch")


class Batches:
    """Batches as training gets them: decoded by workers, moved to the device; the wait for each is timed, in
    milliseconds."""

    def __init__(self, source: str, job: StepJob, workers: int) -> None:
        self.device = torch.device(job.device)
        self.waits: list[float] = []
        if source == "synthetic":
            mask = DualMask.sample(job.batch, job.config.grid, **MaskConfig().to_dict())
            self._fixed = load_clips(source, job.batch, job.config), mask
            self._loader = None
        else:
            dataset = open_dataset(source, job.batch, job.config)
            pin = self.device.type == "cuda"
            self._loader = build_loader(dataset, batch_size=job.batch, num_workers=workers, pin_memory=pin)

    def next(self) -> tuple[torch.Tensor, DualMask]:
        start = time.perf_counter()
        if self._loader is None:
            clips, mask = self._fixed
            found = clips.to(self.device), mask.to(self.device)
        else:
            batch = next(self._loader).to(self.device, non_blocking=True)
            found = batch.clips, batch.mask
        self.waits.append((time.perf_counter() - start) * 1e3)
        return found

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()


def why_wrong(job: StepJob) -> str | None:
    """The variant's loss in float32 against the reference's on the same clips; None if it is right."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(load_clips("synthetic", 1, job.config), file.name)
        jobs = [replace(job, clips=file.name, variant=name) for name in ("reference", job.variant)]
        expected, loss = (Stepper(each).loss() for each in jobs)
    error = abs(loss - expected) / abs(expected)
    if error <= LOSS_TOLERANCE:
        return None
    return f"loss {loss:.6f} differs from reference's {expected:.6f} by {error:.1e}"


def run_steps(stepper: Stepper, batches: Batches, steps: int) -> Iterator[float]:
    """Milliseconds of every step, the wait for its batch included."""
    for _ in range(steps):
        start = time.perf_counter()
        stepper.clips, stepper.mask = batches.next()
        stepper.step()
        yield (time.perf_counter() - start) * 1e3


def profile(job: StepJob, args: argparse.Namespace) -> Profile:
    """Kinds, gaps and data of a step, averaged over the profiled ones, and the time of as many without the
    profiler."""
    steps, on_gpu = args.steps, job.device.startswith("cuda")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".pt"))
        torch.save(load_clips("synthetic", 1, job.config), file.name)
        stepper = Stepper(replace(job, clips=file.name))
        batches = stack.enter_context(contextlib.closing(Batches(args.input, job, args.workers)))
        at("warm-up")
        list(run_steps(stepper, batches, 3 if on_gpu else 1))
        at(f"{steps} steps")
        bare = list(run_steps(stepper, batches, steps))
        waits = batches.waits[-steps:]
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        with torch.profiler.profile(activities=activities) as profiler:
            at(f"{steps} steps, profiled")
            profiled = list(run_steps(stepper, batches, steps))
        data_ms = sum(batches.waits[-steps:]) / steps
    if args.trace:
        profiler.export_chrome_trace(args.trace)
    at("adding up what was profiled")
    kinds, busy = summarise(profiler.events(), on_gpu)
    wall = sum(profiled) / steps
    return Profile(
        step_ms=Runs.of(bare),
        data_ms=Spread.of(waits),
        profiled_step_ms=wall,
        classes=shares(kinds, steps, wall, data_ms, busy / steps),
    )


def shares(kinds: dict[str, Total], steps: int, wall: float, data: float, busy: float) -> list[Share]:
    """Milliseconds a step of each kind, the longest first, then of data and of gaps; `wall` is the whole."""
    found = []
    for name, total in sorted(kinds.items(), key=lambda item: -item[1].ms):
        ms = total.ms / steps
        found.append(Share(name=name, ms=ms, calls=total.calls / steps, share=ms / wall))
    gaps = max(wall - busy - data, 0.0)
    found.append(Share(name="waiting for data", ms=data, calls=1.0, share=data / wall))
    return [*found, Share(name="host gaps", ms=gaps, calls=None, share=gaps / wall)]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=list(PRESETS), help="default: vit_s on a CPU, vit_b on a GPU")
    add("--batch", type=int, help="clips a step (default: 4 on a CPU, 32 on a GPU)")
    add("--steps", type=int, default=5, help="steps to profile (5)")
    add("--variant", help=f"one of {', '.join(VARIANTS)} (default: torch on a CPU, triton on a GPU)")
    add_device(parser)
    add("--workers", type=int, default=2, help="processes that decode video (2)")
    add_input(parser)
    add_json(parser)
    add("--plot", metavar="FILE", help="draw them there (PNG)")
    add("--trace", metavar="FILE", help="write the profiler's trace there (.json or .json.gz)")
    args = parser.parse_args(argv)
    args.device = find_device(args.device)
    set_defaults(args, GPU if args.device.startswith("cuda") else CPU)
    check_least(args, "batch", "steps")
    reason = resolve_variant(args.variant).why_not(args.device)
    if reason:
        raise InputError(f"variant {args.variant!r} does not run here: {reason}")
    args.input = choose_input(args.input)
    return args


def make_job(args: argparse.Namespace) -> StepJob:
    return StepJob(
        model=args.model,
        config=ModelConfig.preset(args.model),
        variant=args.variant,
        masking="dual",
        device=args.device,
        dtype="bfloat16" if args.device.startswith("cuda") else "float32",
        batch=args.batch,
        threads=torch.get_num_threads(),
    )


def make_record(job: StepJob, args: argparse.Namespace, found: Profile) -> ProfileRecord:
    return ProfileRecord(
        model=job.model,
        variant=job.variant,
        device=job.device,
        batch=job.batch,
        dtype=job.dtype,
        masking=job.masking,
        threads=job.threads,
        input=args.input,
        workers=args.workers,
        **vars(found),
    )


def run(args: argparse.Namespace) -> int:
    job, known = make_job(args), find_environment(args.device)
    about = f"{job.model}, {job.variant}, dual masking, batch {job.batch}, {job.dtype}"
    print(f"{about}, {known.device}", flush=True)
    at("loss, checked against the reference's")
    wrong = why_wrong(job)
    record = make_record(job, args, Profile() if wrong else profile(job, args))
    rejected = {job.variant: wrong} if wrong else {}
    result = ProfileResult(environment=known, records=[record], rejected=rejected)
    say_wrong(rejected)
    if not wrong:
        show(*result.tables())
    write_result(result, args.json)
    if not wrong:
        draw(args.plot, lambda path: plot_classes(path, record))
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
