"""The fused operations as calls: inputs, variants, and the check of each variant's results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vmae_kernels
from harness.floors import Shape
from vmae_kernels.backend import OPERATIONS
from vmae_kernels.patch_loss import patch_size_of, weighted_mean
from vmae_kernels.select_decoded import places_of
from vmae_kernels.tubelets import MEAN, STD

Call = Callable[..., Any]  # gives a tensor, or several
Inputs = tuple[Tensor, ...]

CHECK_SHAPES = (
    Shape(
        name="patch 4",
        batch=2,
        patch=4,
        width=40,
        decoder=24,
        visible=3,
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
        visible=2,
        decoded=4,
        counted=3,
        side=28,
        frames=2,
    ),
)


@dataclass(frozen=True)
class Maker:
    """Random tensors of a shape, for the inputs of one call."""

    shape: Shape
    device: str
    dtype: torch.dtype

    def learned(self, *sides: int, scale: float = 1.0) -> Tensor:
        """Normal, with this deviation; it needs a gradient."""
        return (torch.randn(*sides, device=self.device) * scale).to(self.dtype).requires_grad_()

    def clips(self) -> Tensor:
        s = self.shape
        size = (s.batch, s.frames, s.side, s.side, 3)
        return torch.randint(0, 256, size, dtype=torch.uint8, device=self.device)

    def indices(self, count: int, total: int) -> Tensor:
        """int32 [B, count]: sorted, without duplicates, below `total`."""
        drawn = torch.rand(self.shape.batch, total, device=self.device)
        return drawn.argsort(1)[:, :count].sort(1).values.int()

    def positions(self, width: int) -> Tensor:
        return torch.randn(self.shape.tokens, width, device=self.device)

    def counted(self) -> tuple[Tensor, Tensor]:
        """Counted tokens and their weights."""
        s = self.shape
        decode = self.indices(s.decoded, s.tokens)
        return decode[:, : s.counted].contiguous(), torch.ones(s.batch, s.counted, device=self.device)


def _embed_visible(m: Maker) -> Inputs:
    s = m.shape
    weight = m.learned(s.width, 3, 2, s.patch, s.patch, scale=0.02)
    return m.clips(), m.indices(s.visible, s.tokens), weight, m.learned(s.width), m.positions(s.width)


def _assemble_decoder_tokens(m: Maker) -> Inputs:
    s = m.shape
    tokens = m.learned(s.batch, s.visible, s.decoder), m.learned(1, 1, s.decoder)
    visible, decode = m.indices(s.visible, s.tokens), m.indices(s.decoded, s.tokens)
    return *tokens, m.positions(s.decoder), visible, decode


def _layer_norm(m: Maker) -> Inputs:
    s = m.shape
    return m.learned(s.batch, s.visible, s.width), m.learned(s.width), m.learned(s.width)


def _select_decoded(m: Maker) -> Inputs:
    s = m.shape
    hidden = m.learned(s.batch, s.visible + s.decoded, s.decoder)
    keep = s.visible + m.indices(s.counted, s.decoded)
    uses, _ = places_of(keep, hidden.shape[1])
    return hidden, m.learned(s.decoder), m.learned(s.decoder), keep, uses


def _patch_loss(m: Maker) -> Inputs:
    counted, weight = m.counted()
    return m.learned(m.shape.batch, m.shape.counted, m.shape.values), m.clips(), counted, weight


def _head_patch_loss(m: Maker) -> Inputs:
    s = m.shape
    head = m.learned(s.values, s.decoder, scale=0.05), m.learned(s.values)
    counted, weight = m.counted()
    return m.learned(s.batch, s.counted, s.decoder), *head, m.clips(), counted, weight


# Arguments of each operation; a new one has an entry here and in `floors`.
INPUTS: dict[str, Callable[[Maker], Inputs]] = {
    "embed_visible": _embed_visible,
    "assemble_decoder_tokens": _assemble_decoder_tokens,
    "layer_norm": _layer_norm,
    "select_decoded": _select_decoded,
    "patch_loss": _patch_loss,
    "head_patch_loss": _head_patch_loss,
}
if lacking := OPERATIONS.keys() - INPUTS.keys():
    raise RuntimeError(f"no inputs for {', '.join(sorted(lacking))}")


def make_inputs(operation: str, shape: Shape, device: str, dtype: torch.dtype) -> Inputs:
    """Random inputs of one call; learned ones need gradients."""
    return INPUTS[operation](Maker(shape, device, dtype))


def variants(operation: str, compiled: bool, device: str = "cpu") -> dict[str, Call]:
    """Ways to do an operation: our kernels, the reference, and compiled ones for one shape each."""
    public = getattr(vmae_kernels, operation)
    eager = _EAGER.get(operation, lambda device: getattr(vmae_kernels, f"{operation}_ref"))(device)
    found: dict[str, Call] = {"triton": lambda *x: public(*x, backend="triton"), "eager": eager}
    if compiled:
        torch.compiler.reset()  # of another shape: a second one would be compiled with symbolic sizes
        found["torch.compile"] = torch.compile(eager, dynamic=False)
        if operation == "embed_visible":
            found["gather + cuBLAS + add"] = _gather_then_multiply(device)
    return found


def _normalise(device: str, dtype: torch.dtype = torch.float32) -> Call:
    """`(x / 255 - mean) / std` with constants made once: the reference copies them to the device at each
    call, and waits for that."""
    mean, std = (torch.tensor(values, device=device, dtype=dtype) for values in (MEAN, STD))
    return lambda pixels: (pixels.to(dtype) / 255 - mean) / std


def _embed_eagerly(device: str, dtype: torch.dtype = torch.float32) -> Call:
    """`embed_visible_ref` for uint8 clips, with `_normalise`."""
    normalise = _normalise(device, dtype)

    def embed(clips: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
        pixels = normalise(vmae_kernels.gather_tubelets(clips, visible, weight.shape[-1]))
        flat = pixels.permute(0, 1, 5, 2, 3, 4).flatten(2).to(weight.dtype)
        tokens = F.linear(flat, weight.flatten(1), bias)
        return tokens + pos[visible.long()].to(tokens.dtype)

    return embed


# The reference of an operation, where it would build tensors at each call.
_EAGER: dict[str, Callable[[str], Call]] = {"embed_visible": _embed_eagerly}


def _gather_then_multiply(device: str) -> Call:
    """The other way to embed: one kernel that gathers and normalises (torch.compile's), cuBLAS, one
    addition."""
    normalise = _normalise(device)

    @torch.compile(dynamic=False)
    def gather(clips: Tensor, visible: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
        pixels = normalise(vmae_kernels.gather_tubelets(clips, visible, patch)).permute(0, 1, 5, 2, 3, 4)
        return pixels.reshape(*visible.shape, -1).to(dtype)

    def embed(clips: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
        tokens = F.linear(gather(clips, visible, weight.shape[-1], weight.dtype), weight.flatten(1), bias)
        return tokens + pos[visible.long()].to(tokens.dtype)

    return embed


# --- one call, ready to be timed ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Inputs of one call, and gradients of its results."""

    inputs: Inputs
    upstream: Inputs

    def work(self, call: Call, backward: bool) -> Callable[[], object]:
        """The call with or without its backward; nothing is made but by the call itself."""
        learned = [x for x in self.inputs if x.requires_grad]

        def forward() -> object:
            with torch.no_grad():
                return call(*self.inputs)

        def both() -> object:
            return torch.autograd.grad(differentiable(call(*self.inputs)), learned, self.upstream)

        return both if backward else forward

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.inputs, *self.upstream))


def prepare(operation: str, shape: Shape, device: str, dtype: torch.dtype) -> Prepared:
    """Random inputs, and random gradients of the reference's results."""
    inputs = make_inputs(operation, shape, device, dtype)
    results = differentiable(getattr(vmae_kernels, f"{operation}_ref")(*inputs))
    return Prepared(inputs, tuple(torch.randn_like(x) for x in results))


def differentiable(result: Any) -> list[Tensor]:
    """Those of a call's results that have a gradient."""
    results = result if isinstance(result, tuple) else (result,)
    return [x for x in results if isinstance(x, Tensor) and x.requires_grad]


def _loss_exactly(pixels: Tensor, clips: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    """`patch_loss_ref` for uint8 clips, with targets in float64."""
    patch = patch_size_of(pixels.shape[-1], 2)
    units = vmae_kernels.gather_tubelets(clips, counted, patch).double().flatten(2, 4) / 255
    variance, mean = torch.var_mean(units, dim=2, unbiased=True, keepdim=True)
    targets = ((units - mean) / (variance.sqrt() + 1e-6)).flatten(2)
    return weighted_mean((pixels - targets).square().mean(-1), weight.double())


def _exact(operation: str, device: str) -> Call:
    """An operation in float64: its reference, or what stands for it where that is float32 inside."""
    own: dict[str, Call] = {
        "embed_visible": _embed_eagerly(device, torch.float64),
        "patch_loss": _loss_exactly,
        "head_patch_loss": lambda hidden, head, bias, *x: _loss_exactly(F.linear(hidden, head, bias), *x),
    }
    return own.get(operation, getattr(vmae_kernels, f"{operation}_ref"))


def error_ratios(
    operation: str, shape: Shape, calls: dict[str, Call], device: str, dtype: torch.dtype
) -> dict[str, float]:
    """Largest ratio of each variant's error to twice the reference's own, both against float64; over 1 is a
    failure. A reference is credited with one rounding of the truth."""
    inputs = make_inputs(operation, shape, device, dtype)
    exact = _outcome(_exact(operation, device), inputs, torch.float64)
    plain = _outcome(getattr(vmae_kernels, f"{operation}_ref"), inputs, dtype)
    found = {name: _outcome(call, inputs, dtype) for name, call in calls.items()}
    ratios = {}
    for name, values in found.items():
        ratios[name] = 0.0
        for value, expected, truth in zip(values, plain, exact, strict=True):
            eps = torch.finfo(value.dtype).eps
            rounding = eps if value.dtype == torch.float32 else eps / 5
            ratio = _error(value, truth) / (2 * max(_error(expected, truth), rounding))
            ratios[name] = max(ratios[name], ratio if ratio == ratio else float("inf"))
    return ratios


def _outcome(call: Call, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients of one call in `dtype`, with the same upstream gradients for every variant."""
    leaves = []
    for x in inputs:
        is_learned = x.is_floating_point() and x.requires_grad
        leaf = x.detach().to(dtype if is_learned else x.dtype)
        leaves.append(leaf.requires_grad_(x.requires_grad))
    results = differentiable(call(*leaves))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results]
    learned = [x for x in leaves if x.requires_grad]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, learned, upstream)]


def _error(value: Tensor, truth: Tensor) -> float:
    """Relative, in the 2-norm."""
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()
