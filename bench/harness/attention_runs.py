"""Attention backends on one shape after another: the shapes of the presets, and a backend's measurements."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from harness.device_timing import (
    DeviceTimer,
    HostTimer,
    Work,
    cache_bytes,
    clock_of,
    sets_past_cache,
)
from harness.environment import rehearsing
from harness.stepping import resident_bytes
from harness.variants import PUBLISHED_PRESETS
from harness.worker import Worker
from vmae import MaskConfig, ModelConfig, build_pretrainer
from vmae.model.attention import attention
from vmae.model.cost import count_saved_bytes, token_counts

BASELINE = "softmax"
BOUND = 2.0
MODES = ("forward", "forward_backward")
FLOPS = {"forward": ("4 B H N^2 d", 4), "forward_backward": ("12 B H N^2 d", 12)}
ELEMENTS = {"forward": 4, "forward_backward": 12}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    def flops(self, mode: str) -> int:
        return FLOPS[mode][1] * self.batch * self.heads * self.tokens**2 * self.head_dim

    def ideal_bytes(self, mode: str, dtype: torch.dtype) -> int:
        return ELEMENTS[mode] * self.batch * self.tokens * self.heads * self.head_dim * dtype.itemsize


def preset_shapes(batch: int) -> list[Shape]:
    """Shapes of every published preset: encoder and decoder under dual masking, decoder under encoder-only
    masking, all tokens."""
    users: dict[tuple[int, int, int], list[str]] = {}
    for preset in PUBLISHED_PRESETS:
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


@dataclass(frozen=True, kw_only=True)
class BackendJob:
    """A backend, and the shapes it is measured on.

    Attributes:
        dtype: a key of `DTYPES`.
        span: milliseconds that a turn takes at least.
    """

    backend: str
    shapes: list[Shape]
    device: str
    dtype: str
    span: float
    threads: int


class Errors(NamedTuple):
    """Relative errors (2-norm) against float64, of a backend and of the plain one."""

    output: float
    gradient: float
    output_plain: float
    gradient_plain: float

    def why_wrong(self, dtype: torch.dtype) -> str | None:
        """Why the backend gets no speed: an error over the bound (an ulp is allowed to all)."""
        pairs = {
            "output": (self.output, self.output_plain),
            "gradient": (self.gradient, self.gradient_plain),
        }
        for what, (error, plain) in pairs.items():
            if not error <= BOUND * max(plain, torch.finfo(dtype).eps):
                return f"{what} error {error:.1e} is over {BOUND:g} x the plain one's {plain:.1e}"
        return None


class Prepared(NamedTuple):
    """What needs no turns; `peak_bytes` is None where it cannot be measured, `host_us` on a CPU.

    Attributes:
        calls_per_turn, timed_by, host_us: by mode, see `harness.device_timing`.
    """

    errors: Errors
    saved_bytes: int
    peak_bytes: int | None
    calls_per_turn: dict[str, int]
    timed_by: dict[str, str]
    host_us: dict[str, float | None]


class Runner:
    """One backend's measurements of one shape at a time."""

    def __init__(self, job: BackendJob):
        torch.set_num_threads(job.threads)
        self.backend, self.shapes = job.backend, job.shapes
        self.device, self.dtype, self.span = torch.device(job.device), DTYPES[job.dtype], job.span

    def prepare(self, index: int) -> Prepared:
        """Make the shape's tensors and timers, and measure what needs no turns."""
        shape = self.shapes[index]
        generator = torch.Generator().manual_seed(index)
        self.qkv = torch.randn(shape.size, generator=generator).to(self.device, self.dtype).requires_grad_()
        out_size = (*shape.size[:2], *shape.size[3:])
        self.upstream = torch.randn(out_size, generator=generator).to(self.device, self.dtype)
        self.timers: dict[str, DeviceTimer | HostTimer] = {}  # those of the shape before go
        errors, saved, peak = self._errors(), self._saved(), self._peak()
        self.timers = {mode: self._timer(mode) for mode in MODES}
        return Prepared(
            errors,
            saved,
            peak,
            {mode: timer.calls for mode, timer in self.timers.items()},
            {mode: timer.timed_by for mode, timer in self.timers.items()},
            {mode: timer.host_us for mode, timer in self.timers.items()},
        )

    def _timer(self, mode: str) -> DeviceTimer | HostTimer:
        """On a GPU the calls go round sets of inputs, past the L2."""
        if self.device.type != "cuda" and not rehearsing():
            return HostTimer(self._work(mode, self.qkv), 1e3 * self.span)
        size = self.qkv.numel() * self.qkv.element_size()
        count = sets_past_cache(size, cache_bytes(self.device))
        others = [torch.randn_like(self.qkv, requires_grad=True) for _ in range(count - 1)]
        works = [self._work(mode, qkv) for qkv in (self.qkv, *others)]
        return DeviceTimer(clock_of(self.device), works, 1e3 * self.span)

    def _work(self, mode: str, qkv: torch.Tensor) -> Work:
        def forward() -> object:
            with torch.no_grad():
                return attention(qkv, self.backend)

        def both() -> object:
            return torch.autograd.grad(attention(qkv, self.backend), qkv, self.upstream)

        return forward if mode == "forward" else both

    def turn(self, mode: str) -> float:
        """Milliseconds of one call, a mean over `calls_per_turn`."""
        return self.timers[mode].turn() / 1e3

    def timed_by(self, mode: str) -> str:
        """How it was timed, known for sure after the turns."""
        return self.timers[mode].timed_by

    def _errors(self) -> Errors:
        """Errors of one clip."""

        def both(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            leaf = self.qkv[:1].detach().to(dtype).requires_grad_()
            out = attention(leaf, name)
            return out.detach(), torch.autograd.grad(out, leaf, self.upstream[:1].to(dtype))[0]

        exact = both(BASELINE, torch.float64)
        ours, plain = both(self.backend, self.dtype), both(BASELINE, self.dtype)
        return Errors(*(_relative_error(*pair) for made in (ours, plain) for pair in zip(made, exact)))

    def _saved(self) -> int:
        return count_saved_bytes(lambda: attention(self.qkv, self.backend), torch.nn.Module())

    def _peak(self) -> int | None:
        """Bytes that a forward and backward need at their highest, over what is there before."""
        step = self._work("forward_backward", self.qkv)
        step()
        _release_free_memory()
        if not _reset_peak(self.device):
            return None
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            step()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        before = resident_bytes(peak=False)
        step()
        return max(resident_bytes(peak=True) - before, 0)


def _reset_peak(device: torch.device) -> bool:
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


def _release_free_memory() -> None:
    """Give pages that the allocator keeps for later back to the system: they are not memory in use."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


# --- all backends, in turn ----------------------------------------------------------------------------------


@dataclass
class Found:
    """A backend on a shape: what `prepare` found (None: it failed), the reason if it was not timed, how it
    was, and milliseconds by mode."""

    prepared: Prepared | None
    wrong: str | None
    timed_by: dict[str, str] = field(default_factory=dict)
    runs: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})


def measure_shape(
    workers: Sequence[Worker[BackendJob]], index: int, turns: int, dtype: torch.dtype
) -> dict[str, Found]:
    """Results by backend; those that are right take turns. One whose process fails is left out from there
    on."""
    found = {}
    for worker in workers:
        try:
            prepared: Prepared = worker.ask("prepare", index)
        except (RuntimeError, OSError) as error:  # out of memory, a library's own; a dead process
            found[worker.name] = Found(None, f"it failed: {str(error).splitlines()[0]}")
            continue
        found[worker.name] = Found(prepared, prepared.errors.why_wrong(dtype))
    for _ in range(turns):
        for mode in MODES:
            for worker in workers:
                if found[worker.name].wrong is None:
                    found[worker.name].runs[mode].append(worker.ask("turn", mode))
    for worker in workers:
        if found[worker.name].wrong is None:
            found[worker.name].timed_by = {mode: worker.ask("timed_by", mode) for mode in MODES}
    return found


# --- whole models, for `variants.resolve_variant` -----------------------------------------------------------


def build_plain(config: ModelConfig) -> torch.nn.Module:
    return build_pretrainer(config, attention=BASELINE)


def build_sdpa(config: ModelConfig) -> torch.nn.Module:
    return build_pretrainer(config, attention="sdpa")


MODEL_VARIANTS = ("plain=harness.attention_runs:build_plain", "sdpa=harness.attention_runs:build_sdpa")
