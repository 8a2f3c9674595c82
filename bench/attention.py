"""Attention backends on the shapes of all presets: time, achieved TFLOP/s, memory; then what SDPA saves a
whole ViT-B.

Every backend that runs here is checked first, output and gradient against float64, and gets no speed if its
error is over twice that of the plain one in the same dtype. Each runs in a process of its own; they take
single measurements in turn (A B C A B C ...), so that what disturbs the machine disturbs all.

    python bench/attention.py                # a choice of shapes on a CPU (under 2 minutes), all of them on a
    GPU
    python bench/attention.py --full         # all shapes
    python bench/attention.py --quick        # seconds: that it works

FLOPs are the useful ones: 4 B H N^2 d forward, 12 B H N^2 d with the backward (a flash backward computes the
scores once more, which counts as time, not as work). Ideal bytes: q, k, v and the output once, 4 B N H d
elements, and 12 with the backward.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import environment, exit_code, find_device, paired_ratio, print_table, spread, write_json
from records import compare, count_record, load_clips, make_record
from stepping import Worker, resident_bytes
from stepping import measure as measure_models
from telling import at

from vmae import InputError, MaskConfig, ModelConfig, build_pretrainer
from vmae.config import PRESETS
from vmae.cost import count_saved_bytes, token_counts
from vmae.model.attention import attention
from vmae.model.attention_backends import BACKENDS, auto_order, runnable
from vmae.model.attention_probes import Workload

BASELINE = "softmax"
BOUND = 2.0
MODES = ("forward", "forward_backward")
FLOPS = {"forward": ("4 B H N^2 d", 4), "forward_backward": ("12 B H N^2 d", 12)}
ELEMENTS = {"forward": 4, "forward_backward": 12}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- shapes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """qkv [batch, tokens, 3, heads, head_dim], and the layers that have it."""

    tokens: int
    heads: int
    head_dim: int
    batch: int
    used_by: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.tokens} x {self.heads} x {self.head_dim}"

    @property
    def size(self) -> tuple[int, ...]:
        return (self.batch, self.tokens, 3, self.heads, self.head_dim)

    def work(self, mode: str) -> int:
        return FLOPS[mode][1] * self.batch * self.heads * self.tokens**2 * self.head_dim

    def ideal_bytes(self, mode: str, dtype: torch.dtype) -> int:
        return ELEMENTS[mode] * self.batch * self.tokens * self.heads * self.head_dim * dtype.itemsize


def preset_shapes(batch: int) -> list[Shape]:
    """Of every published preset: encoder and decoder under dual masking, decoder under encoder-only masking,
    all tokens."""
    users: dict[tuple[int, int, int], list[str]] = {}
    for preset in PRESETS:
        if preset in ("vit_tiny", "vit_demo"):
            continue
        config = ModelConfig.preset(preset)
        counts = token_counts(config, MaskConfig())
        encoder = config.num_heads, config.embed_dim // config.num_heads
        decoder = config.decoder_num_heads, config.decoder_embed_dim // config.decoder_num_heads
        for tokens, heads, what in (
            (counts.visible, encoder, "encoder"),
            (counts.visible + counts.decoded, decoder, "decoder"),
            (config.num_tokens, decoder, "decoder, encoder-only masking"),
            (config.num_tokens, encoder, "classifier"),
        ):
            users.setdefault((tokens, *heads), []).append(f"{preset} {what}")
    return [Shape(*key, batch, tuple(names)) for key, names in sorted(users.items())]


# What a CPU measures unless told otherwise: each head dim, encoders and decoders, no classifier.
CPU_CHOICE = ("vit_b encoder", "vit_h encoder", "vit_g encoder", "vit_b decoder", "vit_g decoder")
QUICK = [Shape(16, 2, 64, 1, ("quick",)), Shape(24, 2, 88, 1, ("quick",))]


# --- one backend, in a process of its own -------------------------------------------------------------------


def reset_peak(device: torch.device) -> bool:
    """Start the peak anew; False where that cannot be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def release_free_memory() -> None:
    """Give pages that the allocator keeps for later back to the system, so that they are not taken for memory
    in use."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


class Runner:
    """One backend's measurements of one shape at a time."""

    def __init__(self, job: dict[str, Any]):
        torch.set_num_threads(job["threads"])
        self.backend, self.shapes = job["backend"], job["shapes"]
        self.device, self.dtype, self.span = torch.device(job["device"]), DTYPES[job["dtype"]], job["span"]

    def prepare(self, index: int) -> dict[str, Any]:
        """Make the shape's tensors, and measure what needs no turns: errors, kept bytes, peak."""
        shape = self.shapes[index]
        generator = torch.Generator().manual_seed(index)
        self.qkv = torch.randn(shape.size, generator=generator).to(self.device, self.dtype).requires_grad_()
        out_size = (*shape.size[:2], *shape.size[3:])
        self.upstream = torch.randn(out_size, generator=generator).to(self.device, self.dtype)
        self.inner = dict.fromkeys(MODES, 1)
        found = self._check() | {"saved_bytes": self._saved(), "peak_bytes": self._peak()}
        for mode in MODES:  # short calls are repeated, so that a turn is long enough to time
            self.turn(mode)
            self.inner[mode] = max(1, math.ceil(self.span / max(self.turn(mode), 1e-3)))
        return found | {"calls_per_turn": dict(self.inner)}

    def turn(self, mode: str) -> float:
        """Milliseconds of one call, over `inner` calls."""
        step = self._forward if mode == "forward" else self._forward_backward
        count = self.inner[mode]
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            start.record()
            for _ in range(count):
                step()
            end.record()
            torch.cuda.synchronize(self.device)
            return start.elapsed_time(end) / count
        began = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - began) * 1e3 / count

    def _forward(self) -> None:
        with torch.no_grad():
            attention(self.qkv, self.backend)

    def _forward_backward(self) -> None:
        torch.autograd.grad(attention(self.qkv, self.backend), self.qkv, self.upstream)

    def _check(self) -> dict[str, float]:
        """Relative errors (2-norm) of output and gradient against float64, of this backend and of the plain
        one; one clip."""

        def both(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            leaf = self.qkv[:1].detach().to(dtype).requires_grad_()
            out = attention(leaf, name)
            return out.detach(), torch.autograd.grad(out, leaf, self.upstream[:1].to(dtype))[0]

        exact = both(BASELINE, torch.float64)
        errors = {}
        for who, results in (
            ("error", both(self.backend, self.dtype)),
            ("plain_error", both(BASELINE, self.dtype)),
        ):
            for what, got, truth in zip(("output", "gradient"), results, exact):
                errors[f"{what}_{who}"] = relative_error(got, truth)
        return errors

    def _saved(self) -> int:
        return count_saved_bytes(lambda: attention(self.qkv, self.backend), torch.nn.Module())

    def _peak(self) -> int | None:
        """Bytes that a forward and backward need at their highest, over what is there before."""
        self._forward_backward()
        release_free_memory()
        if not reset_peak(self.device):
            return None
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            self._forward_backward()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        before = resident_bytes(peak=False)
        self._forward_backward()
        return max(resident_bytes(peak=True) - before, 0)


# --- the measurement ----------------------------------------------------------------------------------------


def why_wrong(found: dict[str, float], dtype: torch.dtype) -> str | None:
    """Why a backend gets no speed: an error over the bound (an ulp is allowed to all)."""
    for what in ("output", "gradient"):
        error, plain = found[f"{what}_error"], found[f"{what}_plain_error"]
        if not error <= BOUND * max(plain, torch.finfo(dtype).eps):
            return f"{what} error {error:.1e} is over {BOUND:g} x the plain one's {plain:.1e}"
    return None


def measure_shape(
    workers: list[Worker], index: int, turns: int, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """By backend: what `prepare` found, the runs of each mode, and the reason if it was not timed."""
    found = {worker.name: worker.ask("prepare", index) for worker in workers}
    for result in found.values():
        result["wrong"] = why_wrong(result, dtype)
        result["runs"] = {mode: [] for mode in MODES}
    for _ in range(turns):
        for mode in MODES:
            for worker in workers:
                if found[worker.name]["wrong"] is None:
                    found[worker.name]["runs"][mode].append(worker.ask("turn", mode))
    return found


def shape_record(
    shape: Shape, backend: str, found: dict[str, Any], device: str, dtype_name: str
) -> dict[str, Any]:
    dtype = DTYPES[dtype_name]
    tiles = BACKENDS[backend].tiles(shape.head_dim, device.startswith("cuda"))
    record: dict[str, Any] = {"kind": "attention", "shape": shape.name, **asdict(shape), "backend": backend}
    record |= {"device": device, "dtype": dtype_name, "tiles": tiles}
    record["padding_flop_factor"] = None if tiles is None else sum(tiles) / (2 * shape.head_dim)
    record |= {key: found[key] for key in found if key not in ("runs", "wrong")}
    for mode in MODES:
        runs, flops = found["runs"][mode], shape.work(mode)
        record[f"{mode}_flops"], record[f"{mode}_flop_formula"] = flops, FLOPS[mode][0]
        record[f"{mode}_ideal_bytes"] = shape.ideal_bytes(mode, dtype)
        record[f"{mode}_ms"] = {**spread(runs), "runs": runs} if runs else None
        record[f"{mode}_tflops"] = flops / statistics.median(runs) / 1e9 if runs else None
    return record


def ratios_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every backend against the plain one on the same shape, run by run: how many times faster, and what it
    keeps."""
    plain = {r["shape"]: r for r in records if r["backend"] == BASELINE}
    ratios = []
    for record in records:
        base = plain.get(record["shape"])
        if base is None or record is base or not record["forward_ms"] or not base["forward_ms"]:
            continue
        ratio: dict[str, Any] = {"kind": "attention", "shape": record["shape"], "variant": record["backend"]}
        ratio["baseline"] = BASELINE
        for mode in MODES:
            ratio[f"{mode}_speedup"] = paired_ratio(base[f"{mode}_ms"]["runs"], record[f"{mode}_ms"]["runs"])
        ratio["saved_activations"] = record["saved_bytes"] / base["saved_bytes"]
        ratios.append(ratio)
    return ratios


def measured_order(ratios: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Backends by the geometric mean of their speedups with backward over the shapes, the plain one (1) among
    them."""
    by_backend: dict[str, list[float]] = {BASELINE: [1.0]}
    for ratio in ratios:
        by_backend.setdefault(ratio["variant"], []).append(ratio["forward_backward_speedup"]["median"])
    means = {name: statistics.geometric_mean(values) for name, values in by_backend.items()}
    return sorted(means.items(), key=lambda item: -item[1])


# --- a whole model ------------------------------------------------------------------------------------------


def build_plain(config: ModelConfig) -> torch.nn.Module:
    return build_pretrainer(config, attention=BASELINE)


def build_sdpa(config: ModelConfig) -> torch.nn.Module:
    return build_pretrainer(config, attention="sdpa")


VARIANTS = ("plain=attention:build_plain", "sdpa=attention:build_sdpa")


def measure_model(
    model: str, batch: int, steps: int, device: str, dtype: str
) -> tuple[list[dict], list[dict], dict[str, str]]:
    """Training steps of `model` with dual masking, all else equal: plain attention and SDPA."""
    config = ModelConfig.preset(model)
    job = {
        "model": model,
        "config": config,
        "masking": "dual",
        "device": device,
        "dtype": dtype,
        "batch": batch,
    }
    jobs = [{**job, "variant": variant, "threads": torch.get_num_threads()} for variant in VARIANTS]
    at(f"counting a step of {model}")
    counts = [count_record(variant, "dual", config, dtype) for variant in VARIANTS]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clips.pt")
        torch.save(load_clips("synthetic", batch, config), path)
        results, wrong = measure_models([{**job, "clips": path} for job in jobs], steps, warmup=1)
    records = [make_record(*parts) for parts in zip(jobs, counts, results)]
    ratios = compare(records)
    for record in (*records, *ratios):
        record["kind"] = "model"
    return records, ratios, wrong


# --- output -------------------------------------------------------------------------------------------------


def report_shape(shape: Shape, records: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> None:
    faster = {r["variant"]: r["forward_backward_speedup"] for r in ratios if r["shape"] == shape.name}
    rows = []
    for r in records:
        times = [f"{r[f'{mode}_ms']['median']:.2f}" if r[f"{mode}_ms"] else "-" for mode in MODES]
        rates = [f"{r[f'{mode}_tflops']:.3g}" if r[f"{mode}_tflops"] else "-" for mode in MODES]
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.1f}"
        speed = faster.get(r["backend"])
        gain = f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})" if speed else "-"
        padding = "?" if r["padding_flop_factor"] is None else f"{r['padding_flop_factor']:.2f}"
        row = [r["backend"], *times, *rates, gain, f"{r['saved_bytes'] / 2**20:.1f}", peak, padding]
        rows.append([*row, f"{r['gradient_error']:.1e}"])
    print(f"\n{shape.batch} x {shape.name} ({', '.join(shape.used_by)})")
    head = [
        "backend",
        "fwd ms",
        "fwd+bwd ms",
        "fwd TFLOP/s",
        "fwd+bwd",
        "times faster",
        "kept MiB",
        "peak MiB",
    ]
    print_table([*head, "padding FLOPs", "gradient error"], rows)


def report_model(records: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> None:
    rows = []
    for r in records:
        kept = f"{r['saved_activation_bytes_per_clip'] / 2**20:.1f}"
        step = f"{r['step_ms']['median']:.0f}" if r.get("step_ms") else "-"
        peak = f"{r['peak_memory_bytes'] / 2**20:.0f}" if r["peak_memory_bytes"] else "-"
        rows.append([r["variant"].partition("=")[0], kept, step, peak])
    print(
        f"\n{records[0]['model']}, dual masking, batch {records[0]['batch']}, {records[0]['dtype']}: a "
        "training step"
    )
    print_table(["attention", "kept MiB/clip", "step ms", "peak MiB"], rows)
    for r in ratios:
        speed = r.get("speedup")
        text = (
            f"{speed['median']:.2f} x as fast ({speed['min']:.2f} to {speed['max']:.2f}), " if speed else ""
        )
        print(
            f"{r['variant'].partition('=')[0]} against plain: {text}{r['saved_activations']:.2f} x the kept "
            "bytes"
        )


# --- command line -------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument(
        "--backends", help="comma-separated (default: all that run here); the plain one is always measured"
    )
    parser.add_argument("--batch", type=int, help="clips (default: 1 on a CPU, 32 on a GPU)")
    parser.add_argument("--turns", type=int, help="measurements of each (default: 5 on a CPU, 20 on a GPU)")
    parser.add_argument(
        "--model", choices=[*PRESETS, "none"], help="of the whole-model part (default: vit_b)"
    )
    parser.add_argument("--model-batch", type=int, help="clips a step (default: 1 on a CPU, 32 on a GPU)")
    parser.add_argument("--full", action="store_true", help="all shapes of all presets")
    parser.add_argument("--quick", action="store_true", help="two tiny shapes and a tiny model")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    args.device = find_device(args.device)
    on_gpu = args.device.startswith("cuda")
    defaults = {
        "dtype": "bfloat16" if on_gpu else "float32",
        "batch": 32 if on_gpu else 1,
        "turns": 20 if on_gpu else 5,
    }
    defaults |= {"model_batch": 32 if on_gpu else 1, "model": "vit_b"}
    if args.quick:
        defaults |= {"turns": 2, "model": "vit_tiny", "model_batch": 1}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("batch", "turns", "model_batch"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    return args


def pick_shapes(args: argparse.Namespace) -> list[Shape]:
    if args.quick:
        return QUICK
    shapes = preset_shapes(args.batch)
    if args.full or args.device.startswith("cuda"):
        return shapes
    return [shape for shape in shapes if set(shape.used_by) & set(CPU_CHOICE)]


def pick_backends(args: argparse.Namespace, shapes: list[Shape]) -> tuple[list[str], dict[str, str]]:
    """Backends that run on every shape, the plain one first, and the reason why each of the others does
    not."""
    workloads = [
        Workload.on(args.device, dtype=DTYPES[args.dtype], head_dim=d) for d in {s.head_dim for s in shapes}
    ]
    skipped = {}
    for name, backend in BACKENDS.items():
        reasons = [reason for workload in workloads if (reason := backend.why_not(workload))]
        if reasons:
            skipped[name] = reasons[0]
    if args.backends is None:
        names = [name for name in BACKENDS if name not in skipped]
    else:
        names = args.backends.split(",")
        for name in names:
            if name not in BACKENDS:
                raise InputError(f"unknown attention backend {name!r}; known: {', '.join(BACKENDS)}")
            if name in skipped:
                raise InputError(
                    f"{name} cannot run here: {skipped[name]}; these can: {', '.join(runnable(workloads[0]))}"
                )
    return [BASELINE, *(name for name in names if name != BASELINE)], skipped


def measure_shapes(
    args: argparse.Namespace, shapes: list[Shape], names: list[str]
) -> tuple[list[dict], list[dict], dict[str, str]]:
    """Records, ratios, and the reason of every (backend, shape) that got no speed."""
    span = 20.0 if args.device.startswith("cuda") else 0.0 if args.quick else 50.0
    job = {
        "shapes": shapes,
        "device": args.device,
        "dtype": args.dtype,
        "span": span,
        "threads": torch.get_num_threads(),
    }
    records, wrong = [], {}
    with contextlib.ExitStack() as stack:
        workers = []
        for name in names:
            workers.append(Worker({**job, "backend": name}, Runner, name))
            stack.callback(workers[-1].close)
        for worker in workers:
            worker.wait_ready()
        for index, shape in enumerate(shapes):
            at(f"shape {index + 1} of {len(shapes)}, {shape.name}")
            found = measure_shape(workers, index, args.turns, DTYPES[args.dtype])
            made = [shape_record(shape, name, found[name], args.device, args.dtype) for name in names]
            wrong |= {f"{name}, {shape.name}": found[name]["wrong"] for name in names if found[name]["wrong"]}
            records += made
            report_shape(shape, made, ratios_of(made))
    return records, ratios_of(records), wrong


def run(args: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    shapes = pick_shapes(args)
    names, skipped = pick_backends(args, shapes)
    known = environment(args.device)
    say(f"{args.dtype}, {known['device']} ({known['cpu']}, {known['cores']} cores), torch {known['torch']}")
    for name, reason in skipped.items():
        say(f"  not here: {name}: {reason}")
    records, ratios, wrong = measure_shapes(args, shapes, names)
    order = measured_order(ratios)
    say(
        f"\nfastest first: {', '.join(f'{name} {mean:.2f}' for name, mean in order)} (times faster than "
        f"{BASELINE})"
    )
    tried, measured = auto_order(
        Workload.on(args.device, dtype=DTYPES[args.dtype], head_dim=shapes[0].head_dim)
    )
    say(f"auto tries {', '.join(tried)} ({'measured' if measured else 'expected, not measured'})")
    if args.model != "none":
        made, compared, off = measure_model(args.model, args.model_batch, args.turns, args.device, args.dtype)
        report_model(made, compared)
        records, ratios, wrong = [*records, *made], [*ratios, *compared], wrong | off
    for what, reason in wrong.items():
        print(f"\nNO SPEED for {what}: {reason}", file=sys.stderr)
    if args.json:
        write_json(
            args.json, records, args.device, ratios=ratios, rejected=wrong, skipped=skipped, order=order
        )
        say(f"\nresults: {args.json}")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
