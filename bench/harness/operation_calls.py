"""The fused operations as calls: inputs, variants, and the check of each variant's result and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vmae_kernels
from harness.floors import Shape
from vmae_kernels.select_decoded import places_of
from vmae_kernels.tubelets import normalise

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


def make_inputs(operation: str, s: Shape, device: str, dtype: torch.dtype) -> Inputs:
    """Random inputs of one call; learned ones need gradients."""

    def learned(*sides: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sides, device=device) * scale).to(dtype).requires_grad_()

    clips = torch.randint(0, 256, (s.batch, s.frames, s.side, s.side, 3), dtype=torch.uint8, device=device)
    visible, decode = _indices(s, s.visible, s.tokens, device), _indices(s, s.decoded, s.tokens, device)
    counted, weight = decode[:, : s.counted].contiguous(), torch.ones(s.batch, s.counted, device=device)
    if operation == "embed_visible":
        conv, pos = learned(s.width, 3, 2, s.patch, s.patch, scale=0.02), _positions(s, s.width, device)
        return clips, visible, conv, learned(s.width), pos
    if operation == "assemble_decoder_tokens":
        encoded, mask_token = learned(s.batch, s.visible, s.decoder), learned(1, 1, s.decoder)
        return encoded, mask_token, _positions(s, s.decoder, device), visible, decode
    if operation == "layer_norm":
        return learned(s.batch, s.visible, s.width), learned(s.width), learned(s.width)
    if operation == "select_decoded":
        keep = s.visible + _indices(s, s.counted, s.decoded, device)
        hidden = learned(s.batch, s.visible + s.decoded, s.decoder)
        return hidden, learned(s.decoder), learned(s.decoder), keep, places_of(keep, hidden.shape[1])[0]
    if operation == "patch_loss":
        return learned(s.batch, s.counted, s.values), clips, counted, weight
    head = learned(s.values, s.decoder, scale=0.05), learned(s.values)
    return learned(s.batch, s.counted, s.decoder), *head, clips, counted, weight


def _indices(s: Shape, count: int, total: int, device: str) -> Tensor:
    return torch.rand(s.batch, total, device=device).argsort(1)[:, :count].sort(1).values.int()


def _positions(s: Shape, width: int, device: str) -> Tensor:
    return torch.randn(s.tokens, width, device=device)


def variants(operation: str, compiled: bool) -> dict[str, Call]:
    """Ways to do an operation: our kernels, the reference, and compiled ones."""
    public, reference = getattr(vmae_kernels, operation), getattr(vmae_kernels, f"{operation}_ref")
    found: dict[str, Call] = {"triton": lambda *x: public(*x, backend="triton"), "eager": reference}
    if compiled:
        found["torch.compile"] = torch.compile(reference)
        if operation == "embed_visible":
            found["gather + cuBLAS + add"] = _gather_then_multiply()
    return found


def _gather_then_multiply() -> Call:
    """The other way to embed: one kernel that gathers and normalises (torch.compile's), cuBLAS, one
    addition."""

    @torch.compile
    def gather(clips: Tensor, visible: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
        pixels = normalise(vmae_kernels.gather_tubelets(clips, visible, patch)).permute(0, 1, 5, 2, 3, 4)
        return pixels.reshape(*visible.shape, -1).to(dtype)

    def embed(clips: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
        tokens = F.linear(gather(clips, visible, weight.shape[-1], weight.dtype), weight.flatten(1), bias)
        return tokens + pos[visible.long()].to(tokens.dtype)

    return embed


def error_ratios(
    operation: str, shape: Shape, calls: dict[str, Call], device: str, dtype: torch.dtype
) -> dict[str, float]:
    """Largest ratio of each variant's error to twice the eager reference's own, both against float64;
    over 1 is a failure. A reference is credited with one rounding of the truth."""
    inputs = make_inputs(operation, shape, device, dtype)
    exact = _outcome(calls["eager"], inputs, torch.float64)
    found = {name: _outcome(call, inputs, dtype) for name, call in calls.items()}
    ratios = {}
    for name, values in found.items():
        ratios[name] = 0.0
        for value, reference, truth in zip(values, found["eager"], exact, strict=True):
            eps = torch.finfo(value.dtype).eps
            rounding = eps if value.dtype == torch.float32 else eps / 5
            ratio = _error(value, truth) / (2 * max(_error(reference, truth), rounding))
            ratios[name] = max(ratios[name], ratio if ratio == ratio else float("inf"))
    return ratios


def _outcome(call: Call, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients of one call in `dtype`, with the same upstream gradients for every variant."""
    leaves = []
    for x in inputs:
        is_learned = x.is_floating_point() and x.requires_grad
        leaf = x.detach().to(dtype if is_learned else x.dtype)
        leaves.append(leaf.requires_grad_(x.requires_grad))
    given = call(*leaves)
    results = given if isinstance(given, tuple) else (given,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results]
    learned = [x for x in leaves if x.requires_grad]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, learned, upstream)]


def _error(value: Tensor, truth: Tensor) -> float:
    """Relative, in the 2-norm."""
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()
