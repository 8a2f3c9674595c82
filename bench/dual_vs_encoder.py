"""What dual masking saves over encoder-only masking, and what this code saves over the published way of doing both.

Each (variant, masking) runs in a process of its own, so that its memory is its own; the processes take single training
steps in turn (A B C D A B C D ...), so that what disturbs the machine disturbs all. Losses are compared first, in float32
on the same clips, masks and weights; a variant whose loss is off gets no speed.

    python bench/dual_vs_encoder.py                       # finds the device, under 3 minutes
    python bench/dual_vs_encoder.py --model vit_g --count # bytes and MACs only, no timing
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, paired_ratio, print_table, spread, write_json

from vmae import DualMask, InputError, MaskConfig, ModelConfig, build_pretrainer, build_reference
from vmae.config import PRESETS
from vmae.cost import forward_macs, saved_activation_bytes_per_clip
from vmae.train.optim import OptimConfig, build_adamw

MASKINGS = {"encoder_only": MaskConfig(decoder="none"), "dual": MaskConfig()}
LOSS_TOLERANCE = 1e-4
SEED = 0


def build_torch(config: ModelConfig) -> torch.nn.Module:
    return build_pretrainer(config, backend="torch")


# What a variant runs; `fused` tells whether its forward embeds visible and predicts counted tokens only.
VARIANTS: dict[str, dict[str, Any]] = {
    "reference": {"build": build_reference, "fused": False, "text": "the published algorithm, written plainly"},
    "torch": {"build": build_torch, "fused": True, "text": "this code, PyTorch operations"},
}


def resolve_variant(name: str) -> dict[str, Any]:
    """A variant by name, or one's own as NAME=MODULE:FUNCTION, where FUNCTION(config) returns the model."""
    if name in VARIANTS:
        return VARIANTS[name]
    module, _, function = name.partition("=")[2].partition(":")
    if not function:
        raise InputError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}, or NAME=MODULE:FUNCTION")
    try:
        return {"build": getattr(importlib.import_module(module), function), "fused": True, "text": name}
    except (ImportError, AttributeError) as error:
        raise InputError(f"variant {name!r}: {error}") from error


# --- one (variant, masking) in its own process -----------------------------------------------------------------------


def resident_bytes(peak: bool) -> int:
    """Resident memory of this process now, or at its highest so far."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


class Stepper:
    """A model, its optimizer, and one training step at a time."""

    def __init__(self, job: dict[str, Any]):
        torch.set_num_threads(job["threads"])
        self.device = torch.device(job["device"])
        self.autocast_dtype = getattr(torch, job["dtype"])
        self.clips = torch.load(job["clips"], weights_only=True)
        drawn = DualMask.sample(
            self.clips.shape[0],
            job["config"].grid,
            **MASKINGS[job["masking"]].to_dict(),
            generator=torch.Generator().manual_seed(SEED),
        )
        self.base = resident_bytes(peak=False)
        torch.manual_seed(SEED)
        self.model = resolve_variant(job["variant"])["build"](job["config"]).to(self.device)
        self.clips, self.mask = self.clips.to(self.device), drawn.to(self.device)
        self.optimizer = build_adamw(self.model, OptimConfig(), fused=job["variant"] != "reference")

    def loss(self) -> float:
        """In float32, of the first two clips, with the fresh weights: what variants must agree on."""
        with torch.no_grad():
            return float(self.model(self.clips[:2], self.mask[:2]))

    def step(self) -> dict[str, float]:
        """Milliseconds of one training step's parts."""
        marks = [self._now()]
        self.optimizer.zero_grad(set_to_none=True)
        enabled = self.autocast_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled):
            loss = self.model(self.clips, self.mask)
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimizer.step()
        marks.append(self._now())
        names = ("forward", "backward", "optimizer")
        parts = {name: (b - a) * 1e3 for name, a, b in zip(names, marks, marks[1:])}
        return {"step": sum(parts.values()), **parts}

    def peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_bytes(peak=True) - self.base

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def serve(job: dict[str, Any], pipe) -> None:
    """A worker: does what the pipe asks, answers (True, result) or (False, message)."""
    try:
        stepper = Stepper(job)
        pipe.send((True, None))
        while (request := pipe.recv()) is not None:
            pipe.send((True, getattr(stepper, request)()))
    except EOFError:
        pass
    except BaseException as error:  # the parent reports it and stops the others
        with contextlib.suppress(OSError):
            pipe.send((False, f"{type(error).__name__}: {error}"))


class Worker:
    """A (variant, masking) and its process."""

    def __init__(self, job: dict[str, Any]):
        self.job = job
        self.name = f"{job['variant']} {job['masking']}"
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(job, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def wait_ready(self) -> None:
        self._receive()

    def ask(self, request: str) -> Any:
        self.pipe.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            good, result = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"{self.name}: its process died with code {self.process.exitcode} (out of memory?)") from None
        if not good:
            raise RuntimeError(f"{self.name}: {result}")
        return result

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


# --- the measurement --------------------------------------------------------------------------------------------------


def disagreeing(losses: dict[str, dict[str, float]], tolerance: float = LOSS_TOLERANCE) -> dict[str, str]:
    """Variants whose loss differs from the first one's, with the reason; `losses` is by masking and variant."""
    reasons: dict[str, str] = {}
    for masking, by_variant in losses.items():
        first, expected = next(iter(by_variant.items()))
        for variant, loss in by_variant.items():
            error = abs(loss - expected) / abs(expected)
            if not error <= tolerance:
                text = f"loss {loss:.6f} with {masking} masking differs from {first}'s {expected:.6f} by {error:.1e} relative"
                reasons.setdefault(variant, text)
    return reasons


def measure(jobs: list[dict[str, Any]], steps: int, warmup: int) -> tuple[list[dict], dict[str, str]]:
    """Runs of every job in turn, and the variants that failed the check (which were not timed)."""
    with contextlib.ExitStack() as stack:
        workers = []
        for job in jobs:
            worker = Worker(job)
            stack.callback(worker.close)
            workers.append(worker)
        for worker in workers:
            worker.wait_ready()
        losses: dict[str, dict[str, float]] = {}
        for worker in workers:
            worker.loss = worker.ask("loss")
            losses.setdefault(worker.job["masking"], {})[worker.job["variant"]] = worker.loss
        wrong = disagreeing(losses)
        timed = [worker for worker in workers if worker.job["variant"] not in wrong]
        runs: dict[str, list[dict[str, float]]] = {worker.name: [] for worker in workers}
        for turn in range(warmup + steps):
            for worker in timed:
                parts = worker.ask("step")
                if turn >= warmup:
                    runs[worker.name].append(parts)
            show_progress(turn + 1, warmup + steps)
        return [
            {"worker": w.name, "loss": w.loss, "runs": runs[w.name], "peak": w.ask("peak_bytes") if w in timed else None}
            for w in workers
        ], wrong


def show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r  round {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def count_record(variant: str, masking: str, config: ModelConfig, dtype: str) -> dict[str, int]:
    """Exact, with no GPU: bytes that autograd keeps for one more clip, and multiply-accumulates of a clip's forward."""
    known = resolve_variant(variant)
    mask = MASKINGS[masking]
    ratio = 0.0 if mask.decoder == "none" else mask.decoder_ratio
    return {
        "saved_activation_bytes_per_clip": saved_activation_bytes_per_clip(known["build"], config, mask, getattr(torch, dtype)),
        "forward_macs_per_clip": forward_macs(config, mask.encoder_ratio, ratio, fused=known["fused"]),
    }


def make_record(job: dict[str, Any], counts: dict[str, int], result: dict[str, Any] | None) -> dict[str, Any]:
    names = ("model", "masking", "variant", "device", "dtype", "batch")
    record: dict[str, Any] = {name: job[name] for name in names} | counts
    if result is None:
        return record
    record |= {"loss": result["loss"], "peak_memory_bytes": result["peak"]}
    if not result["runs"]:
        return record | {"step_ms": None, "clips_per_s": None}
    for part in ("step", "forward", "backward", "optimizer"):
        values = [run[part] for run in result["runs"]]
        record[f"{part}_ms"] = {**spread(values), "runs": values}
    record["clips_per_s"] = job["batch"] / record["step_ms"]["median"] * 1e3
    return record


def compare(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Variant over baseline (under 1 is less), run by run: every record against the first variant's with either masking."""
    ratios = []
    by_key = {(r["variant"], r["masking"]): r for r in records}
    first = records[0]["variant"]
    pairs = [((v, m), (first, base)) for v, m in by_key for base in MASKINGS if (v, m) != (first, base)]
    pairs += [((v, "dual"), (v, "encoder_only")) for v in {r["variant"]: 0 for r in records} if v != first]
    for (variant, masking), (base_variant, base_masking) in pairs:
        ours, base = by_key.get((variant, masking)), by_key.get((base_variant, base_masking))
        if ours is None or base is None or (masking == "encoder_only" and base_masking == "dual"):
            continue
        ratio: dict[str, Any] = {
            "model": ours["model"],
            "variant": f"{variant} {masking}",
            "baseline": f"{base_variant} {base_masking}",
            "saved_activations": ours["saved_activation_bytes_per_clip"] / base["saved_activation_bytes_per_clip"],
        }
        if ours.get("step_ms") and base.get("step_ms"):
            a, b = ours["step_ms"]["runs"], base["step_ms"]["runs"]
            ratio |= {"time": paired_ratio(a, b), "speedup": paired_ratio(b, a)}
            ratio["memory"] = ours["peak_memory_bytes"] / base["peak_memory_bytes"]
        ratios.append(ratio)
    return ratios


# --- input and output --------------------------------------------------------------------------------------------------


def load_clips(source: str, batch: int, config: ModelConfig) -> torch.Tensor:
    """uint8 [B, T, H, W, 3]: real clips of the sample videos or of a list, or noise."""
    if source == "synthetic":
        shape = (batch, config.num_frames, *config.image_hw, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))
    from vmae.data.dataset import PretrainDataset
    from vmae.data.manifest import read_list
    from vmae.data.samples import write_sample_list

    with tempfile.TemporaryDirectory() as folder:
        entries = read_list(write_sample_list(Path(folder) / "samples.txt") if source == "real" else source)
    dataset = PretrainDataset(
        entries,
        num_frames=config.num_frames,
        stride=4,
        image_size=config.image_hw,
        grid=config.grid,
        mask=MaskConfig(),
        repeat=-(-batch // len(entries)),
        seed=SEED,
    )
    return torch.cat([dataset[(0, i)].clips for i in range(batch)])


def plot(path: str, records: list[dict[str, Any]], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [
        ("saved_activation_bytes_per_clip", "saved activations, MiB a clip", 2**20),
        ("forward_macs_per_clip", "forward GMACs a clip", 1e9),
    ]
    timed = [r for r in records if r.get("step_ms")]
    if timed:
        columns = [("step", "ms a training step", 1.0), ("peak_memory_bytes", "peak memory, MiB", 2**20), *columns]
        records = timed
    labels = [f"{r['variant']}, {r['masking'].replace('_', '-')}" for r in records]
    figure, axes = plt.subplots(1, len(columns), figsize=(3.4 * len(columns), 0.6 + 0.55 * len(records)), sharey=True)
    for axis, (key, text, unit) in zip(axes, columns):
        values = [(r["step_ms"]["median"] if key == "step" else r[key]) / unit for r in records]
        shades = ["0.75" if r["masking"] == "encoder_only" else "#1f5fa8" for r in records]
        bars = axis.barh(labels, values, color=shades)
        if key == "step":
            low = [v - r["step_ms"]["min"] for v, r in zip(values, records)]
            high = [r["step_ms"]["max"] - v for v, r in zip(values, records)]
            axis.errorbar(values, range(len(values)), xerr=[low, high], fmt="none", ecolor="black", capsize=3)
        axis.bar_label(bars, fmt="%.0f" if max(values) >= 10 else "%.2f", padding=4)
        axis.set_title(text, fontsize=10)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(records: list[dict[str, Any]], ratios: list[dict[str, Any]], wrong: dict[str, str]) -> None:
    def ms(record: dict, part: str) -> str:
        found = record.get(f"{part}_ms")
        return f"{found['median']:.0f}" if found else "-"

    timed = any(r.get("step_ms") for r in records)
    head = ["variant, masking", "saved MiB/clip", "GMACs/clip"]
    rows = []
    for r in records:
        row = [f"{r['variant']}, {r['masking'].replace('_', '-')}", f"{r['saved_activation_bytes_per_clip'] / 2**20:.1f}"]
        row.append(f"{r['forward_macs_per_clip'] / 1e9:.2f}")
        if timed:
            peak, rate = r.get("peak_memory_bytes"), r.get("clips_per_s")
            row += [ms(r, part) for part in ("step", "forward", "backward", "optimizer")]
            row += [f"{rate:.2f}" if rate else "-", f"{peak / 2**20:.0f}" if peak else "-", f"{r['loss']:.6f}"]
        rows.append(row)
    if timed:
        head += ["step ms", "forward", "backward", "optimizer", "clips/s", "peak MiB", "loss"]
    print()
    print_table(head, rows)
    print()
    head = ["compared", "times faster (min to max)", "peak memory", "saved activations"]
    rows = []
    for r in ratios:
        s = r.get("speedup")
        speed = f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})" if s else "-"
        memory = f"{r['memory']:.2f} x" if "memory" in r else "-"
        rows.append([f"{r['variant']} / {r['baseline']}".replace("_", "-"), speed, memory, f"{r['saved_activations']:.2f} x"])
    print_table(head, rows)
    for variant, reason in wrong.items():
        print(f"\nNO SPEED for {variant}: {reason}", file=sys.stderr)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(PRESETS), help="default: vit_s on a CPU, vit_b on a GPU")
    parser.add_argument("--batch", type=int, help="clips a step (default: 4 on a CPU, 32 on a GPU)")
    parser.add_argument("--steps", type=int, help="timed steps of each variant (default: 5 on a CPU, 20 on a GPU)")
    parser.add_argument("--warmup", type=int, help="steps before them (default: 1 on a CPU, 5 on a GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    texts = "; ".join(f"{name}: {known['text']}" for name, known in VARIANTS.items())
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        help=f"comma-separated; the first is the baseline. {texts}; NAME=MODULE:FUNCTION: your own",
    )
    parser.add_argument("--masking", default=",".join(MASKINGS), help="comma-separated: encoder_only, dual")
    parser.add_argument("--input", default="real", help="real (the sample clips), synthetic, or a list file of videos")
    parser.add_argument("--count", action="store_true", help="count activations and MACs only, time nothing")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there (PNG)")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = args.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise InputError(f"device {args.device}: torch sees no GPU here; use --device cpu")
    defaults = (
        dict(model="vit_b", batch=32, steps=20, warmup=5, dtype="bfloat16")
        if on_gpu
        else dict(model="vit_s", batch=4, steps=5, warmup=1, dtype="float32")
    )
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("batch", "steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1")
    return args


def run(args: argparse.Namespace) -> int:
    config = ModelConfig.preset(args.model)
    variants, maskings = args.variants.split(","), args.masking.split(",")
    if unknown := [m for m in maskings if m not in MASKINGS]:
        raise InputError(f"unknown masking {unknown[0]!r}; known: {', '.join(MASKINGS)}")
    for variant in variants:
        resolve_variant(variant)
    known = environment(args.device)
    print(
        f"{args.model}, batch {args.batch}, {args.dtype}, {known['device']} ({known['cpu']}, {known['cores']} cores), "
        f"torch {known['torch']}",
        flush=True,
    )
    jobs = [
        {
            "model": args.model,
            "config": config,
            "masking": masking,
            "variant": variant,
            "device": args.device,
            "dtype": args.dtype,
            "batch": args.batch,
            "threads": torch.get_num_threads(),
        }
        for masking in maskings
        for variant in variants
    ]
    counts = [count_record(job["variant"], job["masking"], config, args.dtype) for job in jobs]
    results: list[dict[str, Any] | None] = [None] * len(jobs)
    wrong: dict[str, str] = {}
    if not args.count:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "clips.pt")
            torch.save(load_clips(args.input, args.batch, config), path)
            results, wrong = measure([{**job, "clips": path} for job in jobs], args.steps, args.warmup)
    records = [make_record(*parts) for parts in zip(jobs, counts, results)]
    ratios = compare(records)
    report(records, ratios, wrong)
    if args.json:
        write_json(args.json, records, args.device, ratios=ratios, rejected=wrong)
        print(f"\nresults: {args.json}")
    if args.plot:
        try:
            title = f"{args.model}, batch {args.batch}, {args.dtype}, {known['device']}: grey is encoder-only, blue dual"
            plot(args.plot, records, title)
            print(f"plot: {args.plot}")
        except ImportError:
            print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse_args(argv))
    except (InputError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
