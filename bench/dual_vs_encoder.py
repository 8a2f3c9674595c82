"""What dual masking saves over encoder-only masking, and what this code saves over the published way of doing
both.

Each (variant, masking) runs in a process of its own, so that its memory is its own; the processes take turns
(A B C D A B C D ...), so that what disturbs the machine disturbs all. On a GPU each leaves the device between
its turns, and no more than --resident of them exist at once (bench/harness/turns.py). What does not fit is
told, and the others go on; the results file is whole after every round.

Loss and gradients are compared first, as they are timed: in that dtype, on the same batch, masks and weights.
An error over twice the reference's own gets no speed (bench/harness/checking.py). Exit code 1: something has
no speed, and the tables say why.

    python bench/dual_vs_encoder.py                       # finds the device, under 3 minutes
    python bench/dual_vs_encoder.py --model vit_g --count # bytes and MACs only, no timing
    python bench/dual_vs_encoder.py --masking all         # the decoder drops 0, 25, 50 and 75 % of the tokens
    python bench/dual_vs_encoder.py --sweep 256           # batches of 1, 2, 4, ... 256, or as many as fit
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from harness.clips import add_input, choose_input, load_clips
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
from harness.environment import Environment, find_environment
from harness.paper import compare_with_paper
from harness.plots import plot_steps
from harness.progress import at
from harness.records import Counts, compare, count, make_record
from harness.results.steps import StepRecord, StepsResult, Sweep
from harness.stepping import StepJob
from harness.table import show
from harness.turns import RESIDENT, Results, measure_in_groups, sweep_batches
from harness.variants import MASKINGS, VARIANTS, default_variants, resolve_variant

from vmae import InputError, ModelConfig
from vmae.config import PRESETS
from vmae.model.cost import peak_flops

GPU = dict(model="vit_b", batch=32, steps=20, warmup=5, dtype="bfloat16")
CPU = dict(model="vit_s", batch=4, steps=5, warmup=1, dtype="float32")


@dataclass
class Outcome:
    """What was measured so far, by the job's name, and the sweeps."""

    measured: Results = field(default_factory=dict)
    sweeps: list[Sweep] = field(default_factory=list)

    def reasons(self, kind: str) -> dict[str, str]:
        """Jobs without a speed that are "wrong", or have "failed", with the reason."""
        found = {name: getattr(one, kind) for name, one in self.measured.items()}
        return {name: why for name, why in found.items() if why}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=list(PRESETS), help="default: vit_s on a CPU, vit_b on a GPU")
    add("--batch", type=int, help="clips a step (default: 4 on a CPU, 32 on a GPU)")
    add("--steps", type=int, help="timed steps of each variant (default: 5 on a CPU, 20 on a GPU)")
    add("--warmup", type=int, help="steps before them (default: 1 on a CPU, 5 on a GPU)")
    add_device(parser)
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, help="default: float32 on a CPU, bfloat16 on a GPU")
    texts = "; ".join(f"{name}: {known.text}" for name, known in VARIANTS.items())
    default = "default: reference+sdpa, reference, huggingface, torch on a CPU, all on a GPU"
    yours = "NAME=MODULE:FUNCTION: your own"
    add("--variants", help=f"comma-separated; the first is the baseline ({default}). {texts}; {yours}")
    maskings = f"comma-separated: {', '.join(MASKINGS)}; or all"
    add("--masking", default="encoder_only,dual", help=maskings)
    add_input(parser)
    add("--count", action="store_true", help="count activations and MACs only, time nothing")
    sweep = "also time batches of 1, 2, 4, ... up to this, or to what fits"
    add("--sweep", type=int, metavar="N", help=sweep)
    add("--resident", type=int, default=RESIDENT, help=f"processes at once, at most ({RESIDENT})")
    add_json(parser)
    add("--plot", metavar="FILE", help="draw them there (PNG)")
    args = parser.parse_args(argv)
    args.device = find_device(args.device)
    defaults = GPU if args.device.startswith("cuda") else CPU
    set_defaults(args, {**defaults, "variants": ",".join(default_variants(args.device))})
    check_least(args, "batch", "steps", "sweep")
    check_least(args, "warmup", least=0)
    check_least(args, "resident", least=2)
    return args


def make_jobs(args: argparse.Namespace) -> list[StepJob]:
    """One for each (masking, variant).

    Raises:
        InputError: an unknown masking or variant, or one that does not run on the device.
    """
    maskings = args.masking.split(",")
    if maskings == ["all"]:
        maskings = list(MASKINGS)
    if unknown := [m for m in maskings if m not in MASKINGS]:
        raise InputError(f"unknown masking {unknown[0]!r}; known: {', '.join(MASKINGS)}, all")
    variants = args.variants.split(",")
    for variant in variants:
        reason = resolve_variant(variant).why_not(args.device)
        if reason and not args.count:
            raise InputError(f"variant {variant!r} does not run here: {reason}")
    pairs = [(m, v) for m in maskings for v in variants if m in resolve_variant(v).maskings]
    return [make_job(args, masking, variant) for masking, variant in pairs]


def make_job(args: argparse.Namespace, masking: str, variant: str) -> StepJob:
    return StepJob(
        model=args.model,
        config=ModelConfig.preset(args.model),
        variant=variant,
        masking=masking,
        device=args.device,
        dtype=args.dtype,
        batch=args.batch,
        threads=torch.get_num_threads(),
    )


def run_jobs(jobs: list[StepJob], args: argparse.Namespace) -> Iterator[Outcome]:
    """Time the jobs, then sweep those that ran; the outcome so far, again and again."""
    outcome = Outcome()
    if args.count:
        return
    source = choose_input(args.input)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clips.pt")
        torch.save(load_clips(source, args.batch, jobs[0].config), path)
        jobs = [replace(job, clips=path) for job in jobs]
        for outcome.measured in measure_in_groups(jobs, args.steps, args.warmup, args.resident):
            yield outcome
        for job in jobs if args.sweep else ():
            if not outcome.measured[job.name].wrong:
                outcome.sweeps.append(sweep(job, max(args.steps // 2, 1), args.sweep))
                yield outcome


def sweep(job: StepJob, steps: int, largest: int) -> Sweep:
    batches, ended = sweep_batches(job, steps, largest)
    return Sweep(
        model=job.model,
        masking=job.masking,
        variant=job.variant,
        device=job.device,
        dtype=job.dtype,
        batches=batches,
        ended=ended,
    )


def make_result(
    jobs: list[StepJob], counts: list[Counts], outcome: Outcome, known: Environment, complete: bool
) -> StepsResult:
    """Records of all jobs, what is compared, and what has no speed."""
    measured = [outcome.measured.get(job.name) for job in jobs]
    records = [make_record(*parts) for parts in zip(jobs, counts, measured)]
    records = [with_mfu(record, known.device) for record in records]
    ratios = compare(records)
    return StepsResult(
        environment=known,
        records=records,
        ratios=ratios,
        rejected=outcome.reasons("wrong"),
        failed=outcome.reasons("failed"),
        sweeps=outcome.sweeps,
        paper=compare_with_paper(jobs[0].model, records, ratios),
        complete=complete,
    )


def with_mfu(record: StepRecord, device_name: str) -> StepRecord:
    """Model FLOPs over the device's dense peak at that dtype, where the peak is known."""
    peak, done = peak_flops(device_name, record.dtype), record.model_flops_per_s
    if peak is None or done is None:
        return record
    return replace(record, mfu=done / peak)


def run(args: argparse.Namespace) -> int:
    jobs, known = make_jobs(args), find_environment(args.device)
    where = f"{known.device} ({known.cpu}, {known.cores} cores), torch {known.torch}"
    print(f"{args.model}, batch {args.batch}, {args.dtype}, {where}", flush=True)
    counts = []
    for job in jobs:
        at(f"counting {job.name}")
        counts.append(count(job.variant, job.masking, job.config, job.dtype))
    outcome = Outcome()
    for outcome in run_jobs(jobs, args):
        if args.json:
            make_result(jobs, counts, outcome, known, complete=False).write(args.json)
    result = make_result(jobs, counts, outcome, known, complete=True)
    show(*result.tables())
    lost = {**result.rejected, **result.failed}
    say_wrong(lost)
    write_result(result, args.json)
    title = f"{args.model}, batch {args.batch}, {args.dtype}, {known.device}: grey is encoder-only, blue dual"
    draw(args.plot, lambda path: plot_steps(path, result.records, title))
    return 1 if lost else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
