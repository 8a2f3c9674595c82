"""The one error bound of all kernels, and the float64 truth it is measured against.

A kernel's error against float64 is at most twice that of the same operation's reference in the kernel's own
dtype. Errors are relative, in the 2-norm and in the largest element. A reference can be nearer to the truth
by luck than its arithmetic warrants (a scalar, a sum of few terms), so it counts as having at least the error
of rounding the truth once: in bf16 and fp16 half a unit in the last place at most, a fifth of one in the
norm; in float32, where intermediate values are rounded to the same grid, a unit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vmae_kernels import gather_tubelets
from vmae_kernels.tubelets import MEAN, STD

FACTOR = 2.0


def rounding_floor(result: Tensor) -> tuple[float, float]:
    """Least error that a reference is credited with, in the norm and in the largest element."""
    eps = torch.finfo(result.dtype).eps
    if result.dtype == torch.float32:
        return eps, eps
    return (eps / 5 if result.numel() > 1 else eps / 2), eps / 2


def errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """2-norm and largest element of the difference, each relative to that of the truth."""
    difference, truth = result.double().cpu() - truth.cpu(), truth.cpu()
    if truth.numel() == 0:
        return 0.0, 0.0
    scale, largest = truth.norm().item(), truth.abs().max().item()
    return difference.norm().item() / max(scale, 1e-300), difference.abs().max().item() / max(largest, 1e-300)


def assert_bounded(name: str, result: Tensor, reference: Tensor, truth: Tensor) -> None:
    assert result.shape == truth.shape, f"{name}: shape {list(result.shape)}, not {list(truth.shape)}"
    assert torch.isfinite(result).all(), f"{name}: not finite; an element that nobody wrote?"
    both = zip(("norm", "max"), errors(result, truth), errors(reference, truth), rounding_floor(result))
    for kind, error, allowed, floor in both:
        bound = FACTOR * max(allowed, floor)
        assert error <= bound, (
            f"{name}: {kind} error {error:.3g}, over {FACTOR} x the reference's {allowed:.3g}"
        )


def run(call: Callable, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """Result of `call(**inputs)`, and the gradient of every input that is floating point, under a random
    upstream gradient."""
    leaves = {
        name: value.detach().clone().requires_grad_(value.is_floating_point())
        for name, value in inputs.items()
    }
    result = call(**leaves)
    learned = {name: value for name, value in leaves.items() if value.requires_grad}
    grads = torch.autograd.grad(result, list(learned.values()), upstream.to(result.dtype), allow_unused=True)
    found = {"result": result.detach()}
    found.update({f"gradient of {name}": grad for name, grad in zip(learned, grads) if grad is not None})
    return found


def check(
    kernel: Callable, reference: Callable, exact: Callable, inputs: dict[str, Tensor], upstream: Tensor
) -> None:
    """Forward and every gradient of `kernel` within the bound. `exact` gets float64 inputs."""
    got = run(kernel, inputs, upstream)
    expected = run(reference, inputs, upstream)
    truth = run(
        exact, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}, upstream.double()
    )
    assert got.keys() == expected.keys() == truth.keys()
    for name in got:
        assert got[name].dtype == expected[name].dtype, (
            f"{name}: {got[name].dtype}, not {expected[name].dtype}"
        )
        assert_bounded(name, got[name], expected[name], truth[name])


def make_clips(
    kind: str, batch: int, grid: tuple[int, int, int], patch: int, depth: int, device: str
) -> Tensor:
    """uint8 [B, T, H, W, 3] or normalised float [B, 3, T, H, W] of `grid` tubelets."""
    frames, height, width = grid[0] * depth, grid[1] * patch, grid[2] * patch
    if kind == "uint8":
        return torch.randint(0, 256, (batch, frames, height, width, 3), dtype=torch.uint8, device=device)
    return torch.randn(batch, 3, frames, height, width, device=device)


def float64_clips(clips: Tensor) -> Tensor:
    """float64 [B, 3, T, H, W], normalised without a float32 step."""
    if clips.dtype != torch.uint8:
        return clips.double()
    mean, std = (torch.tensor(value, dtype=torch.float64, device=clips.device) for value in (MEAN, STD))
    return ((clips.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)


def float64_targets(clips: Tensor, tokens: Tensor, patch: int, depth: int, normalize: bool) -> Tensor:
    """`patch_targets_ref` in float64."""
    pixels = gather_tubelets(clips, tokens, patch, depth).double()
    if clips.dtype == torch.uint8:
        pixels = pixels / 255
    else:
        mean, std = (torch.tensor(value, dtype=torch.float64, device=clips.device) for value in (MEAN, STD))
        pixels = pixels * std + mean
    pixels = pixels.flatten(2, 4)
    if normalize:
        variance, mean = torch.var_mean(pixels, dim=2, unbiased=True, keepdim=True)
        pixels = (pixels - mean) / (variance.sqrt() + 1e-6)
    return pixels.flatten(2)


def tokens_of(batch: int, count: int, total: int, device: str) -> Tensor:
    """Sorted token indices without duplicates, as a mask gives them."""
    tokens = torch.rand(batch, total).argsort(1)[:, :count].sort(1).values
    return tokens.to(torch.int32).to(device)
