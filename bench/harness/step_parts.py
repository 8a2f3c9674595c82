"""A training step as a sum of parts, predicted: what the model runs is recorded on fake tensors, call by
call, and every call gets the time of its kind. So a change of the code changes the prediction.

    products     2 x rows x columns x terms FLOPs at a share of the peak, by shape
    attention    FLOPs of whole tiles at a share of the peak, by head dim
    operators    of vmae_kernels: the static model's records (`python -m vmae_kernels.build --predict`)
    passes       everything else: bytes read and written; a compiler joins those between two products
    host         launches, each some microseconds: what the device does not hide

Every number that is not counted is an assumption of the table `ASSUMED`. Nothing was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from harness import ROOT
from harness.results import read_result
from harness.results.predict import Interval, PredictedKernelsResult, PredictedPart
from harness.variants import MASKINGS, VARIANTS, resolve_variant
from vmae import InputError, ModelConfig, build_pretrainer
from vmae.model.cost import on_paper
from vmae_kernels.predict import BYTES_REACHED, GPUS, Gpu
from vmae_kernels.recording import Event, OperatorCall, Recorder, TorchCall, fused

KERNELS = ROOT / "bench" / "results" / "predicted"
# Ends of the interval: (lower, upper) time.
ASSUMED: dict[str, tuple[float, float]] = {
    "product_share": (0.78, 0.62),  # of the peak in full waves of tiles of 128 x 256, long sums
    "unaligned_share": (0.30, 0.20),  # rows that are no multiple of 16 bytes: no copy engine, 4-byte loads
    "attention_forward_share": (0.50, 0.30),  # of whole tiles; head dims of 64 and 128
    "attention_backward_share": (0.40, 0.25),
    "us_between_kernels": (0.5, 1.5),
    "us_a_launch_eager": (4.0, 8.0),  # on the host
    "us_a_launch_compiled": (2.0, 4.0),
    "us_an_operator": (40.0, 130.0),  # on the host: Python of a custom operator and its launcher
}
OPTIMIZER_BYTES = (
    28  # of a parameter: fused AdamW reads weight, gradient, two moments, writes three (float32)
)
ATTENTION_TILE = (128, 64)  # queries, keys
TILES = (((128, 256), 1.0), ((128, 128), 0.9), ((128, 64), 0.7))  # of a product, and what smaller ones cost


@dataclass
class Part:
    """Calls of one kind: milliseconds on the device at both ends, launches."""

    ms: tuple[float, float] = (0.0, 0.0)
    launches: int = 0
    host_us: tuple[float, float] = (0.0, 0.0)

    def add(self, us: tuple[float, float], launches: int, host_us: tuple[float, float]) -> None:
        self.ms = self.ms[0] + us[0] / 1e3, self.ms[1] + us[1] / 1e3
        self.launches += launches
        self.host_us = self.host_us[0] + host_us[0], self.host_us[1] + host_us[1]


class StepRecorder(Recorder):
    """Notes a step on fake tensors; what real ones do (masks) is not part of it."""

    def __init__(self) -> None:
        super().__init__(enter=False)

    def counts(self, tensors: list[Tensor]) -> bool:
        return any(isinstance(x, FakeTensor) for x in tensors)


@dataclass(frozen=True)
class RecordedStep:
    """What a step of `batch` clips does, optimizer left out."""

    preset: str
    batch: int
    events: list[Event]
    outer: set[int]
    parameters: int
    keep: Recorder = field(repr=False)


# Variants that are counted as another one, joined by a compiler.
COMPILED = {"triton+compile": "triton", "reference+compile": "reference+sdpa"}


def predictable(variant: str) -> bool:
    return variant in COMPILED or (variant in VARIANTS and VARIANTS[variant].countable)


@cache
def record_step(variant: str, masking: str, preset: str, batch: int) -> RecordedStep:
    """Forward and backward of a variant in bfloat16, recorded; a compiled one is recorded as it is eager."""
    build = _builder(variant)
    with on_paper(build, ModelConfig.preset(preset), MASKINGS[masking], torch.bfloat16) as (model, loss_of):
        recorder = StepRecorder()
        with recorder:
            loss = loss_of(batch)
            recorder.direction = "backward"
            loss.backward()
        recorder.given(*(p.grad for p in model.parameters() if p.grad is not None))
        parameters = sum(p.numel() for p in model.parameters())
    return RecordedStep(preset, batch, recorder.events, recorder.outer, parameters, recorder)


def _builder(variant: str) -> Callable[[ModelConfig], nn.Module]:
    """The variant's own; this code's with fused attention, which "auto" takes on a GPU."""
    if variant in ("torch", "triton"):
        return lambda config: build_pretrainer(config, backend=variant, attention="sdpa")
    return resolve_variant(variant).build


@cache
def kernel_records(device: str, folder: Path = KERNELS) -> dict[tuple[str, str], tuple]:
    """Of the static model, by preset and operator: elements returned, microseconds, batch.

    Raises:
        InputError: no such file.
    """
    path = folder / device / "predicted_kernels.json"
    try:
        result = read_result(path, "predicted_kernels")
    except ValueError as error:
        command = f"python -m vmae_kernels.build --predict --device {device} --json {path}"
        raise InputError(f"{error}; write it with `{command}`") from None
    assert isinstance(result, PredictedKernelsResult)
    return {
        (r.preset, r.kernel): (r.elements, tuple(r.predicted_us), r.batch)
        for r in result.records
        if r.by == "operator"
    }


def has_records(device: str, preset: str) -> bool:
    """Whether the static model was asked for a preset's kernels on a device."""
    try:
        return any(known == preset for known, _ in kernel_records(device))
    except InputError:
        return False


def operator_us(call: OperatorCall, preset: str, device: str) -> tuple[float, float]:
    """Of the static model, scaled by the elements read and returned where the call has another size. An
    operator that no public function calls has no record there: its bytes, twice at the upper end."""
    found = kernel_records(device).get((preset, call.name))
    if found is None:
        moved = 1e6 * call.bytes / GPUS[device].bytes_per_s
        return moved, 2 * moved / BYTES_REACHED
    elements, (low, high), _ = found
    scale = call.elements / elements
    return low * scale, high * scale


def product_us(call: TorchCall, gpu: Gpu) -> tuple[float, float]:
    """A product: FLOPs at the share of the peak that tiles and length of sums leave, or its bytes."""
    if len(call.shape) == 3:
        rows, columns, terms = call.shape
        efficiency = tile_efficiency(rows, columns, terms, gpu)
        long_sums = terms / (terms + 128)  # a tile's first loads and last stores, hidden at the lower end
        unaligned = any(side % 8 for side in call.shape)
    else:  # a convolution
        efficiency, long_sums, unaligned = 1.0, 1.0, False
    shares = ASSUMED["unaligned_share" if unaligned else "product_share"]
    low = 1e6 * call.flops / (gpu.matrix_flops * shares[0] * efficiency)
    high = 1e6 * call.flops / (gpu.matrix_flops * shares[1] * efficiency * long_sums)
    moved = bytes_us(call, gpu)
    return max(low, moved[0]), max(high, moved[1])


def tile_efficiency(rows: int, columns: int, terms: int, gpu: Gpu) -> float:
    """Share of the work that is no padding of tiles and of waves, of the best tile; long sums are split where
    there are fewer tiles than processors."""
    best = 0.0
    for (height, width), factor in TILES:
        tiles = math.ceil(rows / height) * math.ceil(columns / width)
        full = rows * columns / (tiles * height * width)
        tiles *= max(1, min(gpu.processors // tiles, terms // 512)) if tiles < gpu.processors else 1
        waves = tiles / (gpu.processors * math.ceil(tiles / gpu.processors))
        best = max(best, factor * full * waves)
    return best


def attention_us(call: TorchCall, gpu: Gpu) -> tuple[float, float]:
    """Fused attention: whole tiles of queries and keys, head dims as the kernels pad them."""
    _, _, queries, head_dim, keys = call.shape
    whole = [math.ceil(count / side) * side for count, side in zip((queries, keys), ATTENTION_TILE)]
    padded = next((size for size in (32, 64, 96, 128, 192) if head_dim <= size), 256)
    flops = call.flops * math.prod(whole) / (queries * keys) * padded / head_dim
    direction = "backward" if "backward" in call.name else "forward"
    fast, slow = (
        1e6 * flops / (share * gpu.matrix_flops) for share in ASSUMED[f"attention_{direction}_share"]
    )
    moved = bytes_us(call, gpu)
    return max(fast, moved[0]), max(slow, moved[1])


def bytes_us(call: TorchCall, gpu: Gpu, passes: int = 1) -> tuple[float, float]:
    """A pass over memory. Lower end: what is small enough comes from the L2 and stays there."""
    low = high = 0.0
    for sizes, times in ((call.read, passes), (call.made, 1)):
        for size in sizes.values():
            rate = gpu.l2_bytes_per_s if size <= gpu.l2_bytes / 4 else gpu.bytes_per_s
            low += size / rate
            high += times * size / (BYTES_REACHED * gpu.bytes_per_s)
    return 1e6 * low, 1e6 * high


_KINDS = {
    "native_layer_norm": "LayerNorm", "native_layer_norm_backward": "LayerNorm",
    "gelu": "GELU", "gelu_backward": "GELU", "_to_copy": "casts and copies", "copy_": "casts and copies",
    "clone": "casts and copies", "add": "residual sums", "sum": "sums of bias gradients",
    "cat": "q, k, v side by side", "stack": "q, k, v side by side", "fused": "passes, joined",
}  # fmt: skip


def part_name(call: TorchCall) -> str:
    """Kind of a call."""
    if "dot_product" in call.name:
        return f"attention {'backward' if 'backward' in call.name else 'forward'}"
    if call.flops:
        return "products"
    return _KINDS.get(call.name, "other passes")


SOURCES = {
    "products": "FLOPs at product_share, waves of tiles",
    "attention forward": "FLOPs of tiles at attention_forward_share",
    "attention backward": "FLOPs of tiles at attention_backward_share",
    "optimizer": f"{OPTIMIZER_BYTES} bytes a parameter",
    "host": "launches x us_a_launch",
}


def step_parts(step: RecordedStep, device: str, compiled: bool) -> dict[str, Part]:
    """Parts of a step on the device, by kind."""
    gpu = GPUS[device]
    parts: dict[str, Part] = {}
    host = ASSUMED["us_a_launch_compiled" if compiled else "us_a_launch_eager"]
    gap = ASSUMED["us_between_kernels"]

    def note(name: str, us: tuple[float, float], host_us: tuple[float, float]) -> None:
        parts.setdefault(name, Part()).add((us[0] + gap[0], us[1] + gap[1]), 1, host_us)

    for event in step.events:
        if isinstance(event.what, OperatorCall):
            us = operator_us(event.what, step.preset, device)
            parts.setdefault(event.what.name, Part()).add(us, 1, ASSUMED["us_an_operator"])
    for call, passes in torch_calls(step, compiled):
        if "dot_product" in call.name:
            us = attention_us(call, gpu)
        else:
            us = product_us(call, gpu) if call.flops else bytes_us(call, gpu, passes)
        note(part_name(call), us, host)
    return parts


def torch_calls(step: RecordedStep, compiled: bool) -> Iterable[tuple[TorchCall, int]]:
    """PyTorch's calls and the passes over their inputs: each by itself, or joined by a compiler."""
    if compiled:
        return [(call, passes) for _, call, passes in fused(step.events, step.outer)]
    calls = [event.what for event in step.events if isinstance(event.what, TorchCall)]
    return [(call, 1) for call in calls]


def interval_of(parts: dict[str, Part]) -> Interval:
    """The step without its optimizer: the longer of device and host."""
    device = [sum(part.ms[end] for part in parts.values()) for end in (0, 1)]
    host = [sum(part.host_us[end] for part in parts.values()) / 1e3 for end in (0, 1)]
    return Interval(fast=max(device[0], host[0]), slow=max(device[1], host[1]))


def optimizer_interval(parameters: int, device: str) -> Interval:
    """Fused AdamW."""
    ms = 1e3 * OPTIMIZER_BYTES * parameters / GPUS[device].bytes_per_s
    return Interval(fast=ms, slow=1.2 * ms)


def step_interval(variant: str, masking: str, preset: str, batch: int, device: str) -> Interval:
    """Milliseconds of a step, optimizer left out.

    Raises:
        InputError: a variant that cannot be recorded.
    """
    if not predictable(variant):
        raise InputError(f"variant {variant!r}: its steps cannot be recorded")
    step = record_step(COMPILED.get(variant, variant), masking, preset, batch)
    return interval_of(step_parts(step, device, variant in COMPILED))


def part_records(variant: str, masking: str, preset: str, batch: int, gpu: str) -> list[PredictedPart]:
    """Records of all parts of a step, host and optimizer too."""
    device = gpu.lower()
    step = record_step(COMPILED.get(variant, variant), masking, preset, batch)
    parts = step_parts(step, device, variant in COMPILED)
    named = PredictedPart(
        model=preset, variant=variant, masking=masking, batch=batch, gpu=gpu,
        part="", source="", ms=Interval(fast=0.0, slow=0.0), launches=0,
    )  # fmt: skip
    records = []
    for name, part in sorted(parts.items(), key=lambda item: -item[1].ms[1]):
        known = "static model of the kernels" if (preset, name) in kernel_records(device) else "bytes moved"
        source = SOURCES.get(name, known)
        ms = Interval(fast=part.ms[0], slow=part.ms[1])
        records.append(replace(named, part=name, source=source, ms=ms, launches=part.launches))
    host = [sum(part.host_us[end] for part in parts.values()) / 1e3 for end in (0, 1)]
    launches = sum(part.launches for part in parts.values())
    for name, ms in (
        ("host", Interval(fast=host[0], slow=host[1])),
        ("optimizer", optimizer_interval(step.parameters, device)),
        ("step", interval_of(parts)),
    ):
        source = SOURCES.get(name, "longer of device and host, without optimizer")
        records.append(replace(named, part=name, source=source, ms=ms, launches=launches))
    return records
