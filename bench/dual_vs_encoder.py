"""What dual masking saves over encoder-only masking, and what this code saves over the published way of doing
both.

Each (variant, masking) runs in a process of its own, so that its memory is its own; the processes take single
training steps in turn (A B C D A B C D ...), so that what disturbs the machine disturbs all. Losses are
compared first, in float32 on the same clips, masks and weights; a variant whose loss is off gets no speed.

    python bench/dual_vs_encoder.py                       # finds the device, under 3 minutes
    python bench/dual_vs_encoder.py --model vit_g --count # bytes and MACs only, no timing
    python bench/dual_vs_encoder.py --masking all         # the decoder drops 0, 25, 50 and 75 % of the tokens
    python bench/dual_vs_encoder.py --sweep 256           # batches of 1, 2, 4, ... 256, or as many as fit
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

import torch
from harness.common import environment, exit_code, find_device, print_table, write_json
from harness.paper import compare_with_paper, report_paper
from harness.records import choose_input, compare, count_record, load_clips, make_record
from harness.stepping import measure, sweep_batches
from harness.telling import at
from harness.variants import MASKINGS, VARIANTS, default_variants, resolve_variant

from vmae import InputError, ModelConfig
from vmae.config import PRESETS
from vmae.model.cost import peak_flops

MIB = 2**20


def words(name: str) -> str:
    """A masking's name for people."""
    return name.replace("_", "-")


def report(records: list[dict[str, Any]], ratios: list[dict[str, Any]], wrong: dict[str, str]) -> None:
    timed = any(r.get("step_ms") for r in records)
    head = ["variant, masking", "saved MiB/clip", "GMACs/clip"]
    if timed:
        head += [
            "step ms",
            "forward",
            "backward",
            "optimizer",
            "clips/s",
            "peak MiB",
            "activations",
            "MFU",
            "loss",
        ]
    print()
    print_table(head, [_row(record, timed) for record in records])
    print()
    rows = []
    for r in ratios:
        s = r.get("speedup")
        speed = f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})" if s else "-"
        memory = f"{r['memory']:.2f} x" if "memory" in r else "-"
        saved = "-" if r["saved_activations"] is None else f"{r['saved_activations']:.2f} x"
        mark = " (fastest other)" if r["fastest_competitor"] else ""
        rows.append([words(f"{r['variant']} / {r['baseline']}{mark}"), speed, memory, saved])
    print_table(["compared", "times faster (min to max)", "peak memory", "saved activations"], rows)
    for variant, reason in wrong.items():
        print(f"\nNO SPEED for {variant}: {reason}", file=sys.stderr)


def _row(r: dict[str, Any], timed: bool) -> list[str]:
    def number(value: float | None, unit: float = 1, digits: int = 0) -> str:
        return "-" if value is None else f"{value / unit:.{digits}f}"

    saved, macs = r["saved_activation_bytes_per_clip"], r["forward_macs_per_clip"]
    row = [f"{r['variant']}, {words(r['masking'])}", number(saved, MIB, 1), number(macs, 1e9, 2)]
    if not timed:
        return row
    row += [
        number((r.get(f"{part}_ms") or {}).get("median"))
        for part in ("step", "forward", "backward", "optimizer")
    ]
    memory = r["memory"] or {}
    row += [
        number(r["clips_per_s"], 1, 2),
        number(memory.get("peak"), MIB),
        number(memory.get("activations"), MIB),
    ]
    mfu = r.get("mfu")
    return [*row, "-" if mfu is None else f"{mfu:.1%}", f"{r['loss']:.6f}"]


def report_sweeps(sweeps: list[dict[str, Any]]) -> None:
    print("\nbatch sweep (clips/s; the last batch is the largest that was tried, or fits)")
    rows = []
    for sweep in sweeps:
        tried = [f"{run['batch']}: {run['clips_per_s']:.2f}" for run in sweep["batches"]]
        rows.append(
            [f"{sweep['variant']}, {words(sweep['masking'])}", ", ".join(tried) or "not even 1 clip fits"]
        )
    print_table(["variant, masking", "clips: clips/s"], rows)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(PRESETS), help="default: vit_s on a CPU, vit_b on a GPU")
    parser.add_argument("--batch", type=int, help="clips a step (default: 4 on a CPU, 32 on a GPU)")
    parser.add_argument(
        "--steps", type=int, help="timed steps of each variant (default: 5 on a CPU, 20 on a GPU)"
    )
    parser.add_argument("--warmup", type=int, help="steps before them (default: 1 on a CPU, 5 on a GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    texts = "; ".join(f"{name}: {known.text}" for name, known in VARIANTS.items())
    parser.add_argument(
        "--variants",
        help=f"comma-separated; the first is the baseline (default: reference,torch on a CPU, all on a GPU). {texts}; "
        "NAME=MODULE:FUNCTION: your own",
    )
    parser.add_argument(
        "--masking", default="encoder_only,dual", help=f"comma-separated: {', '.join(MASKINGS)}; or all"
    )
    parser.add_argument(
        "--input", default="auto", help="real (the sample clips), synthetic, a list file; auto: real if there"
    )
    parser.add_argument("--count", action="store_true", help="count activations and MACs only, time nothing")
    parser.add_argument(
        "--sweep", type=int, metavar="N", help="also time batches of 1, 2, 4, ... up to this, or to what fits"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there (PNG)")
    return _with_defaults(parser.parse_args(argv))


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    args.device = find_device(args.device)
    on_gpu = args.device.startswith("cuda")
    defaults = (
        dict(model="vit_b", batch=32, steps=20, warmup=5, dtype="bfloat16")
        if on_gpu
        else dict(model="vit_s", batch=4, steps=5, warmup=1, dtype="float32")
    )
    defaults["variants"] = ",".join(default_variants(args.device))
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("batch", "steps", "sweep"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1")
    return args


def make_jobs(args: argparse.Namespace, config: ModelConfig) -> list[dict[str, Any]]:
    """One for each (masking, variant).

    Raises:
        InputError: an unknown masking or variant, or one that does not run on the device.
    """
    maskings = list(MASKINGS) if args.masking == "all" else args.masking.split(",")
    if unknown := [m for m in maskings if m not in MASKINGS]:
        raise InputError(f"unknown masking {unknown[0]!r}; known: {', '.join(MASKINGS)}, all")
    variants = args.variants.split(",")
    for variant in variants:
        reason = resolve_variant(variant).why_not(args.device)
        if reason and not args.count:
            raise InputError(f"variant {variant!r} does not run here: {reason}")
    shared = {name: getattr(args, name) for name in ("model", "device", "dtype", "batch")}
    shared |= {"config": config, "threads": torch.get_num_threads()}
    pairs = [(m, v) for m in maskings for v in variants if m in resolve_variant(v).maskings]
    return [{**shared, "masking": masking, "variant": variant} for masking, variant in pairs]


def run_jobs(
    jobs: list[dict[str, Any]], args: argparse.Namespace
) -> tuple[list[dict[str, Any] | None], dict[str, str], list[dict[str, Any]]]:
    """Results of each job, the variants that were wrong, and the sweeps."""
    if args.count:
        return [None] * len(jobs), {}, []
    source = choose_input(args.input)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clips.pt")
        torch.save(load_clips(source, args.batch, jobs[0]["config"]), path)
        jobs = [{**job, "clips": path} for job in jobs]
        results, wrong = measure(jobs, args.steps, args.warmup)
        swept = [job for job in jobs if args.sweep and job["variant"] not in wrong]
        sweeps = [
            _sweep_record(job, sweep_batches(job, max(args.steps // 2, 1), args.sweep)) for job in swept
        ]
    return results, wrong, sweeps


def _sweep_record(job: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    batches = []
    for run in found:
        median = sorted(run["step_ms"])[len(run["step_ms"]) // 2]
        batches.append({**run, "clips_per_s": run["batch"] / median * 1e3})
    names = ("model", "masking", "variant", "device", "dtype")
    return {name: job[name] for name in names} | {"batches": sorted(batches, key=lambda run: run["batch"])}


def add_mfu(records: list[dict[str, Any]], device_name: str) -> None:
    """Model FLOPs over the device's dense peak at that dtype, where the peak is known."""
    for record in records:
        peak, done = peak_flops(device_name, record["dtype"]), record.get("model_flops_per_s")
        record["mfu"] = done / peak if peak and done else None


def run(args: argparse.Namespace) -> int:
    config = ModelConfig.preset(args.model)
    jobs = make_jobs(args, config)
    known = environment(args.device)
    print(
        f"{args.model}, batch {args.batch}, {args.dtype}, {known['device']} ({known['cpu']}, "
        f"{known['cores']} cores), "
        f"torch {known['torch']}",
        flush=True,
    )
    counts = []
    for job in jobs:
        at(f"counting {job['variant']} {job['masking']}")
        counts.append(count_record(job["variant"], job["masking"], config, args.dtype))
    results, wrong, sweeps = run_jobs(jobs, args)
    records = [make_record(*parts) for parts in zip(jobs, counts, results)]
    add_mfu(records, known["device"])
    ratios = compare(records)
    paper = compare_with_paper(args.model, records, ratios)
    report(records, ratios, wrong)
    if sweeps:
        report_sweeps(sweeps)
    report_paper(paper)
    if args.json:
        write_json(args.json, records, args.device, ratios=ratios, rejected=wrong, sweeps=sweeps, paper=paper)
        print(f"\nresults: {args.json}")
    if args.plot:
        draw(args, records, known["device"])
    return 1 if wrong else 0


def draw(args: argparse.Namespace, records: list[dict[str, Any]], device: str) -> None:
    from harness.plots import plot_steps

    title = f"{args.model}, batch {args.batch}, {args.dtype}, {device}: grey is encoder-only, blue dual"
    try:
        plot_steps(args.plot, records, title)
        print(f"plot: {args.plot}")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
