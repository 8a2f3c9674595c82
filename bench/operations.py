"""Times the kernels of vmae_kernels on a GPU, against their floors and against the other ways to do the same.

    python bench/operations.py --json bench/results/kernels.json     on a GPU: check, then time
    python bench/operations.py --check                               anywhere: check alone (interpreted on a CPU)
    python bench/operations.py                                       without a GPU: the floors, from bytes and
    FLOPs

Per operation and preset (bf16, uint8 clips): device time by CUDA events, forward and forward with backward;
median and spread over calls, variants in turn, inputs rotated so that none is found in the L2. The floor is
the larger of bytes over bandwidth and FLOPs over rate: ceilings measured in the same run on a GPU, an H100's
datasheet without one. A variant that fails its check is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]

# Triton must not be imported before `common` has chosen the interpreter.
import torch.nn.functional as F  # noqa: E402
from harness.common import print_table, write_json  # noqa: E402
from harness.telling import at, telling  # noqa: E402

import vmae_kernels  # noqa: E402
from vmae_kernels.tubelets import normalise  # noqa: E402

OPERATIONS = ("embed_visible", "assemble_decoder_tokens", "select_decoded", "patch_loss", "head_patch_loss")
H100 = {"bytes_per_s": 3.35e12, "matrix_flops": 989e12, "vector_flops": 67e12, "source": "H100 SXM datasheet"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A preset's tokens and widths: 16 frames of `side` x `side` pixels, masks of 90 % and 50 %."""

    name: str
    batch: int
    patch: int
    width: int
    decoder: int
    shown: int
    decoded: int
    counted: int
    side: int = 224
    frames: int = 16

    @property
    def tokens(self) -> int:
        return self.frames // 2 * (self.side // self.patch) ** 2

    @property
    def values(self) -> int:
        return 6 * self.patch**2


PRESETS = {
    "vit_s": dict(patch=16, width=384, decoder=192, shown=160, decoded=784, counted=704),
    "vit_b": dict(patch=16, width=768, decoder=384, shown=160, decoded=784, counted=704),
    "vit_l": dict(patch=16, width=1024, decoder=512, shown=160, decoded=784, counted=704),
    "vit_h": dict(patch=16, width=1280, decoder=512, shown=160, decoded=784, counted=704),
    "vit_g": dict(patch=14, width=1408, decoder=512, shown=208, decoded=1024, counted=920),
}
CHECK_SHAPES = (
    Shape(
        name="patch 4",
        batch=2,
        patch=4,
        width=40,
        decoder=24,
        shown=3,
        decoded=20,
        counted=17,
        side=16,
        frames=4,
    ),
    Shape(
        name="patch 14",
        batch=1,
        patch=14,
        width=33,
        decoder=17,
        shown=2,
        decoded=4,
        counted=3,
        side=28,
        frames=2,
    ),
)


def floor_counts(operation: str, s: Shape) -> dict[str, dict[str, float]]:
    """Bytes that must move and FLOPs that must be done, forward and backward: bf16 (2 bytes), uint8 pixels
    (1), float32 positions (4). Scratch and second reads are not in a floor."""
    b, nv, nd, nk, k = s.batch, s.shown, s.decoded, s.counted, s.values
    if operation == "embed_visible":
        table = min(s.tokens, b * nv) * s.width * 4
        moved = b * nv * k + b * nv * s.width * 2 + s.width * k * 2
        matrix = 2 * b * nv * k * s.width
        return {
            "forward": dict(bytes=moved + table, matrix=matrix),
            "backward": dict(bytes=moved, matrix=matrix),
        }
    if operation == "assemble_decoder_tokens":
        moved = b * (2 * nv + nd) * s.decoder * 2 + min(s.tokens, b * (nv + nd)) * s.decoder * 4
        vector = b * (nv + nd) * s.decoder
        backward = dict(bytes=b * nd * s.decoder * 2, vector=b * nd * s.decoder)
        return {"forward": dict(bytes=moved, vector=vector), "backward": backward}
    if operation == "select_decoded":
        rows = b * nk * s.decoder
        backward = dict(bytes=2 * (2 * rows + b * (nv + nd) * s.decoder), vector=16 * rows)
        return {"forward": dict(bytes=2 * 2 * rows, vector=8 * rows), "backward": backward}
    pixels = b * nk * k
    if operation == "patch_loss":
        return {
            "forward": dict(bytes=3 * pixels, vector=12 * pixels),
            "backward": dict(bytes=5 * pixels, vector=12 * pixels),
        }
    matrix, head = 2 * pixels * s.decoder, k * s.decoder * 2
    forward = dict(bytes=pixels + 2 * b * nk * s.decoder + head, matrix=matrix)
    return {"forward": forward, "backward": dict(bytes=2 * b * nk * s.decoder + 2 * head, matrix=2 * matrix)}


def floor_us(counts: dict[str, float], ceilings: dict) -> float:
    work = (
        counts.get("matrix", 0) / ceilings["matrix_flops"]
        + counts.get("vector", 0) / ceilings["vector_flops"]
    )
    return 1e6 * max(counts["bytes"] / ceilings["bytes_per_s"], work)


def floor_of(operation: str, shape: Shape, direction: str, ceilings: dict) -> tuple[float, dict[str, float]]:
    """Microseconds and counts of "forward", or of "both"."""
    both = floor_counts(operation, shape)
    parts = [both["forward"]] if direction == "forward" else list(both.values())
    total = {key: sum(part.get(key, 0) for part in parts) for key in ("bytes", "matrix", "vector")}
    return sum(floor_us(part, ceilings) for part in parts), total


def indices(s: Shape, count: int, total: int, device: str) -> torch.Tensor:
    return torch.rand(s.batch, total, device=device).argsort(1)[:, :count].sort(1).values.int()


def arguments(operation: str, s: Shape, device: str, dtype: torch.dtype) -> tuple:
    """Random inputs of one call; learned ones need gradients."""

    def learned(*sides: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*sides, device=device) * scale).to(dtype).requires_grad_()

    clips = torch.randint(0, 256, (s.batch, s.frames, s.side, s.side, 3), dtype=torch.uint8, device=device)
    visible, decode = indices(s, s.shown, s.tokens, device), indices(s, s.decoded, s.tokens, device)
    counted, weight = decode[:, : s.counted].contiguous(), torch.ones(s.batch, s.counted, device=device)
    if operation == "embed_visible":
        shape = (s.width, 3, 2, s.patch, s.patch)
        return (
            clips,
            visible,
            learned(*shape, scale=0.02),
            learned(s.width),
            torch.randn(s.tokens, s.width, device=device),
        )
    if operation == "assemble_decoder_tokens":
        pos = torch.randn(s.tokens, s.decoder, device=device)
        return learned(s.batch, s.shown, s.decoder), learned(1, 1, s.decoder), pos, visible, decode
    if operation == "select_decoded":
        keep = s.shown + indices(s, s.counted, s.decoded, device)
        return learned(s.batch, s.shown + s.decoded, s.decoder), learned(s.decoder), learned(s.decoder), keep
    if operation == "patch_loss":
        return learned(s.batch, s.counted, s.values), clips, counted, weight
    head = learned(s.values, s.decoder, scale=0.05), learned(s.values)
    return learned(s.batch, s.counted, s.decoder), *head, clips, counted, weight


def gather_then_multiply() -> Callable:
    """The other way to embed: one kernel that gathers and normalises (torch.compile's), cuBLAS, one
    addition."""

    def gather(clips, visible, patch, dtype):
        pixels = normalise(vmae_kernels.gather_tubelets(clips, visible, patch)).permute(0, 1, 5, 2, 3, 4)
        return pixels.reshape(*visible.shape, -1).to(dtype)

    gather = torch.compile(gather)

    def embed(clips, visible, weight, bias, pos):
        tokens = F.linear(gather(clips, visible, weight.shape[-1], weight.dtype), weight.flatten(1), bias)
        return tokens + pos[visible.long()].to(tokens.dtype)

    return embed


def variants(operation: str, compiled: bool) -> dict[str, Callable]:
    public, reference = getattr(vmae_kernels, operation), getattr(vmae_kernels, f"{operation}_ref")
    found = {"triton": lambda *x: public(*x, backend="triton"), "eager": reference}
    if compiled:
        found["torch.compile"] = torch.compile(reference)
        if operation == "embed_visible":
            found["gather + cuBLAS + add"] = gather_then_multiply()
    return found


def outcome(call: Callable, inputs: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    """Result and gradients of one call in `dtype`, the same for every variant."""
    leaves = [x.detach().to(dtype if x.is_floating_point() and x.requires_grad else x.dtype) for x in inputs]
    leaves = [leaf.requires_grad_(x.requires_grad) for leaf, x in zip(leaves, inputs, strict=True)]
    result = call(*leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(result.shape, generator=generator).to(result.device, result.dtype)
    learned = [x for x in leaves if x.requires_grad]
    return [result.detach(), *torch.autograd.grad(result, learned, upstream)]


def check(
    operation: str, shape: Shape, calls: dict[str, Callable], device: str, dtype: torch.dtype
) -> dict[str, float]:
    """Per variant the largest ratio of its error to twice the eager reference's own, both against float64:
    over 1 is a failure. A reference is credited with one rounding of the truth."""
    inputs = arguments(operation, shape, device, dtype)
    exact = outcome(calls["eager"], inputs, torch.float64)
    found = {name: outcome(call, inputs, dtype) for name, call in calls.items()}

    def error(value: torch.Tensor, truth: torch.Tensor) -> float:
        return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()

    ratios = {}
    for name, values in found.items():
        ratios[name] = 0.0
        for value, reference, truth in zip(values, found["eager"], exact, strict=True):
            eps = torch.finfo(value.dtype).eps
            allowed = max(error(reference, truth), eps if value.dtype == torch.float32 else eps / 5)
            ratio = error(value, truth) / (2 * allowed)
            ratios[name] = max(ratios[name], ratio if ratio == ratio else float("inf"))
    return ratios


def time_variants(
    calls: dict[str, Callable], sets: list[tuple], both: bool, rounds: int
) -> dict[str, list[float]]:
    """Microseconds of every call, variants in turn, each call on the next set of inputs."""

    def once(call: Callable, inputs: tuple) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        learned = [x for x in inputs if x.requires_grad]
        torch.cuda._sleep(200_000)  # The host gets ahead, so that launches are not what is timed.
        start.record()
        with torch.set_grad_enabled(both):
            result = call(*inputs)
            if both:
                torch.autograd.grad(result, learned, torch.ones_like(result))
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3

    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 5):
        for name, call in calls.items():
            elapsed = once(call, sets[turn % len(sets)])
            if turn >= 5:
                found[name].append(elapsed)
    return found


def measured_ceilings() -> dict:
    """Copy bandwidth and bf16 matrix rate of this GPU."""

    def best(call: Callable) -> float:
        return min(time_variants({"x": lambda *_: call()}, [()], False, 20)["x"]) / 1e6

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy, product = best(lambda: target.copy_(source)), best(lambda: a @ b)
    rates = {"bytes_per_s": 2 * source.numel() / copy, "matrix_flops": 2 * 8192**3 / product}
    return {
        **rates,
        "vector_flops": H100["vector_flops"],
        "source": "measured: 1 GiB copy, 8192^3 bf16 product",
    }


def input_sets(operation: str, shape: Shape) -> list[tuple]:
    """Enough sets of inputs to pass three times the L2 before one comes again."""
    first = arguments(operation, shape, "cuda", torch.bfloat16)
    size = sum(x.numel() * x.element_size() for x in first)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(16, 2 + 3 * cache // size)
    return [first, *(arguments(operation, shape, "cuda", torch.bfloat16) for _ in range(count - 1))]


def measure(shapes: list[Shape], rounds: int) -> list[dict]:
    """Checks, then times, every operation at every shape."""
    ceilings, records = measured_ceilings(), []
    for shape in shapes:
        for operation in OPERATIONS:
            at(f"{operation} {shape.name}, checked")
            calls = variants(operation, compiled=True)
            ratios = check(operation, shape, calls, "cuda", torch.bfloat16)
            right = {name: call for name, call in calls.items() if ratios[name] <= 1}
            sets = input_sets(operation, shape)
            for direction in ("forward", "both"):
                at(f"{operation} {shape.name} {direction}, timed")
                floor, counts = floor_of(operation, shape, direction, ceilings)
                times = time_variants(right, sets, direction == "both", rounds)
                for name in calls:
                    record = dict(
                        kind="time",
                        operation=operation,
                        shape=shape.name,
                        batch=shape.batch,
                        direction=direction,
                    )
                    record |= dict(
                        variant=name, error_ratio=ratios[name], floor_us=floor, ceilings=ceilings, **counts
                    )
                    if name in times:
                        median = statistics.median(times[name])
                        record |= dict(unit="us", median=median, min=min(times[name]), max=max(times[name]))
                        record |= dict(over_floor=median / floor, gb_per_s=counts["bytes"] / median / 1e3)
                        record |= dict(tflop_per_s=counts["matrix"] / median / 1e6)
                    records.append(record)
    return records


def floors(shapes: list[Shape]) -> list[dict]:
    """What no implementation can beat, at an H100's datasheet rates."""
    records = []
    for shape in shapes:
        for operation in OPERATIONS:
            for direction in ("forward", "both"):
                floor, counts = floor_of(operation, shape, direction, H100)
                record = dict(
                    kind="floor",
                    operation=operation,
                    shape=shape.name,
                    batch=shape.batch,
                    direction=direction,
                )
                records.append(record | dict(floor_us=floor, ceilings=H100, **counts))
    return records


def checks(device: str) -> list[dict]:
    """Every operation at small and awkward shapes, in bf16 and float32."""
    records = []
    for shape in CHECK_SHAPES:
        for operation in OPERATIONS:
            for dtype in (torch.bfloat16, torch.float32):
                at(f"{operation} {shape.name} {str(dtype).removeprefix('torch.')}, checked")
                torch.manual_seed(0)
                ratio = check(operation, shape, variants(operation, compiled=False), device, dtype)["triton"]
                kind = dict(
                    kind="check",
                    operation=operation,
                    shape=shape.name,
                    dtype=str(dtype).removeprefix("torch."),
                )
                records.append(kind | dict(error_ratio=ratio, ok=ratio <= 1))
    return records


def show(records: list[dict]) -> None:
    if records[0]["kind"] == "check":
        names = [f"{r['operation']} {r['shape']} {r['dtype']}" for r in records]
        rows = [
            (name, f"{r['error_ratio']:.2f}", "ok" if r["ok"] else "FAIL") for name, r in zip(names, records)
        ]
        print_table(("check against float64", "error / bound", ""), rows)
        return
    timed = records[0]["kind"] == "time"
    head = ["operation, shape, direction", "MB", "GFLOP", "floor us"] + ["variant", "us", "x floor"] * timed
    rows = []
    for r in records:
        row = [f"{r['operation']} {r['shape']} b{r['batch']} {r['direction']}"]
        row += [f"{r['bytes'] / 1e6:.1f}", f"{(r['matrix'] + r['vector']) / 1e9:.2f}", f"{r['floor_us']:.1f}"]
        if timed:
            row += [
                r["variant"],
                *((f"{r['median']:.1f}", f"{r['over_floor']:.2f}") if "median" in r else ("wrong", "")),
            ]
        rows.append(row)
    print(
        f"floors from: {records[0]['ceilings']['source']}" + ("" if timed else " (nothing was run on a GPU)")
    )
    print_table(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="verify, time nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["vit_b", "vit_g"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [Shape(name=name, batch=options.batch, **PRESETS[name]) for name in options.presets]
    with telling():
        if options.check:
            records = checks(device)
        else:
            records = measure(shapes, options.rounds) if device == "cuda" else floors(shapes)
    show(records)
    if options.json:
        write_json(options.json, records, device)
    return 0 if all(record.get("error_ratio", 0) <= 1 for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
