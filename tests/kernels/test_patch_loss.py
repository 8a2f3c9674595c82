"""patch_loss: loss and gradient of the predictions, against float64."""

import importlib

import pytest
import torch
from bounds import check, float64_targets, make_clips, tokens_of

from vmae_kernels import patch_loss, patch_loss_ref

# clips, batch, grid, tokens, patch, depth
SHAPES = {
    "patch 16": ("uint8", 2, (2, 2, 3), 5, 16, 2),
    "patch 14: a tubelet is no power of two": ("uint8", 2, (2, 2, 3), 5, 14, 2),
    "a tubelet of 2400 values: two warps": ("uint8", 1, (1, 1, 2), 2, 20, 2),
    "float clip, a tubelet of 2400 values": ("float", 1, (1, 1, 2), 2, 20, 2),
    "one clip, one token": ("uint8", 1, (1, 1, 1), 1, 4, 2),
    "token count no multiple of a program's": ("uint8", 3, (2, 3, 3), 17, 4, 2),
    "depth 1": ("uint8", 2, (3, 2, 2), 6, 4, 1),
    "float clip, patch 14": ("float", 2, (2, 2, 3), 5, 14, 2),
    "float clip": ("float", 2, (2, 3, 3), 9, 4, 2),
}


def problem(shape, dtype, device):
    kind, batch, grid, count, patch, depth = shape
    clips = make_clips(kind, batch, grid, patch, depth, device)
    tokens = tokens_of(batch, count, grid[0] * grid[1] * grid[2], device)
    pixels = torch.randn(batch, count, 3 * depth * patch * patch, device=device).to(dtype)
    return clips, tokens, torch.rand(batch, count, device=device), {"pixels": pixels}


def check_loss(clips, tokens, weight, inputs, normalize, depth, patch, kernel_clips=None):
    targets = float64_targets(clips, tokens, patch, depth, normalize)
    kernel_clips = clips if kernel_clips is None else kernel_clips

    def exact(pixels):
        return ((pixels - targets).square().mean(-1) * weight.double()).sum() / weight.double().sum()

    options = dict(normalize=normalize, tubelet_size=depth)
    upstream = torch.randn((), device=clips.device)
    check(
        lambda pixels: patch_loss(pixels, kernel_clips, tokens, weight, **options, backend="triton"),
        lambda pixels: patch_loss_ref(pixels, clips, tokens, weight, **options),
        exact,
        inputs,
        upstream,
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(shape, dtype, normalize, device):
    check_loss(*problem(shape, dtype, device), normalize, shape[-1], shape[-2])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_two_warps_a_token_as_before_triton_3_7(shape, device, monkeypatch):
    """Built by Triton 3.6, a warp with a whole tubelet would spill."""
    module = importlib.import_module("vmae_kernels.patch_loss")
    few = module.loss_config(1536, 2, True)
    monkeypatch.setattr(module, "WARP_BYTES", module.WARP_BYTES // 2)
    more = module.loss_config(1536, 2, True)
    assert more["BLOCK_Q"] == 2 * few["BLOCK_Q"] and more["BLOCK_S"] * 2 == few["BLOCK_S"]
    test_against_float64(shape, torch.bfloat16, True, device)


def test_weights_of_zero_and_duplicates(device):
    shape = ("uint8", 2, (2, 3, 3), 9, 4, 2)
    clips, tokens, weight, inputs = problem(shape, torch.float32, device)
    weight[:, ::2] = 0
    tokens[:, 4:] = tokens[:, :1]
    check_loss(clips, tokens, weight, inputs, True, 2, 4)


def test_constant_tubelets(device):
    """Variance zero, in all three channels or one: the target is the mean's rounding error over 1e-6, as in
    the reference."""
    shape = ("uint8", 1, (1, 2, 2), 4, 4, 2)
    clips, tokens, weight, inputs = problem(shape, torch.float32, device)
    clips[..., 1] = 7
    clips[:, :, :4, :4] = 200
    check_loss(clips, tokens, weight, inputs, True, 2, 4)


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_strided(kind, device):
    """A crop of a larger clip; predictions and weights with gaps."""
    clips, tokens, weight, inputs = problem((kind, 2, (2, 3, 2), 5, 4, 2), torch.float32, device)
    pad = (0, 0, 3, 5, 2, 1) if kind == "uint8" else (3, 5, 2, 1)
    row, column = (2, 3) if kind == "uint8" else (3, 4)
    large = torch.nn.functional.pad(clips, pad)
    view = large.narrow(row, 2, clips.shape[row]).narrow(column, 3, clips.shape[column])
    assert torch.equal(view, clips) and not view.is_contiguous()
    check_loss(clips, tokens, weight, inputs, True, 2, 4, kernel_clips=view)
    gaps = [
        torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0] for x in (inputs["pixels"], weight)
    ]
    plain = patch_loss(inputs["pixels"], clips, tokens, weight, backend="triton")
    assert torch.equal(patch_loss(gaps[0], view, tokens, gaps[1], backend="triton"), plain)


def test_float16_under_a_loss_scale(device):
    """The gradient is formed when the scale is known: none is rounded to zero."""
    clips, tokens, weight, inputs = problem(("uint8", 2, (2, 3, 3), 9, 4, 2), torch.float32, device)
    half = inputs["pixels"].half().requires_grad_()
    (patch_loss(half, clips, tokens, weight, backend="triton") * 2.0**12).backward()
    full = half.detach().float().requires_grad_()
    patch_loss_ref(full, clips, tokens, weight).backward()
    torch.testing.assert_close(half.grad.float() / 2.0**12, full.grad, rtol=2e-3, atol=1e-7)
