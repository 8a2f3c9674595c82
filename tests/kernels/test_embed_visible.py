"""embed_visible: forward, gradients of weight, bias and positions, against float64."""

import pytest
import torch
import torch.nn.functional as F
from bounds import check, errors, float64_clips, make_clips, run, tokens_of

from vmae_kernels import embed_visible, embed_visible_ref, gather_tubelets
from vmae_kernels.tubelets import MEAN, STD

# clips, batch, grid, visible tokens, patch, depth, width
SHAPES = {
    "patch 16, two K blocks of every tile, odd width": ("uint8", 2, (1, 2, 2), 3, 16, 2, 97),
    "patch 14: 42-byte lines, K no multiple of a block": ("uint8", 2, (1, 2, 2), 3, 14, 2, 96),
    "more rows than a tile, token count no multiple of it": ("uint8", 3, (3, 4, 5), 47, 2, 2, 40),
    "one clip, one token": ("uint8", 1, (1, 1, 1), 1, 4, 2, 24),
    "two column tiles": ("uint8", 1, (1, 2, 2), 2, 2, 2, 136),
    "float clip, patch 14, odd width": ("float", 2, (1, 2, 2), 3, 14, 2, 33),
    "float clip, depth 1, rows over two tiles": ("float", 2, (4, 6, 6), 70, 2, 1, 24),
}


def problem(shape, dtype, device):
    kind, batch, grid, count, patch, depth, width = shape
    total = grid[0] * grid[1] * grid[2]
    clips = make_clips(kind, batch, grid, patch, depth, device)
    inputs = {
        "weight": torch.randn(width, 3, depth, patch, patch, device=device).mul(0.05).to(dtype),
        "bias": torch.randn(width, device=device).to(dtype),
        "pos": torch.randn(total, width, device=device).to(dtype),
    }
    return (
        clips,
        tokens_of(batch, count, total, device),
        inputs,
        torch.randn(batch, count, width, device=device).to(dtype),
    )


def check_embed(clips, visible, inputs, upstream, kernel_clips=None):
    clips64 = float64_clips(clips)
    kernel_clips = clips if kernel_clips is None else kernel_clips
    check(
        lambda **x: embed_visible(kernel_clips, visible, **x, backend="triton"),
        lambda **x: embed_visible_ref(clips, visible, **x),
        lambda **x: embed_visible_ref(clips64, visible, **x),
        inputs,
        upstream,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(shape, dtype, device):
    check_embed(*problem(shape, dtype, device))


def test_weight_by_pointer(device, monkeypatch):
    """The way of devices without a copy engine."""
    monkeypatch.setenv("VMAE_NO_DESCRIPTOR", "1")
    check_embed(*problem(SHAPES["patch 14: 42-byte lines, K no multiple of a block"], torch.bfloat16, device))


def test_several_splits_of_the_weight_gradient(device):
    """600 rows: two parts, summed in a second stage."""
    check_embed(*problem(("uint8", 2, (6, 10, 10), 300, 2, 2, 8), torch.float32, device))


def test_duplicates_without_bias(device):
    """A token may be visible twice; positions then sum both gradients."""
    clips, visible, inputs, upstream = problem(("uint8", 2, (2, 3, 3), 6, 4, 2, 24), torch.float32, device)
    visible[:, 3:] = visible[:, :1]
    check_embed(clips, visible, inputs, upstream)
    del inputs["bias"]
    clips64 = float64_clips(clips)
    check(
        lambda **x: embed_visible(clips, visible, bias=None, **x, backend="triton"),
        lambda **x: embed_visible_ref(clips, visible, bias=None, **x),
        lambda **x: embed_visible_ref(clips64, visible, bias=None, **x),
        inputs,
        upstream,
    )


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_strided_clips(kind, device):
    """Every second frame of every second clip, a crop of a larger frame, and channels where they do not
    belong."""
    clips, visible, inputs, upstream = problem((kind, 2, (2, 3, 2), 5, 4, 2, 24), torch.float32, device)
    batch, height, width = (0, 2, 3) if kind == "uint8" else (0, 3, 4)
    large = clips.repeat_interleave(2, 0).repeat_interleave(2, 1 if kind == "uint8" else 2)
    large = F.pad(large, (0, 0, 3, 5, 2, 1) if kind == "uint8" else (3, 5, 2, 1))
    large = large.narrow(height, 2, clips.shape[height]).narrow(width, 3, clips.shape[width])
    view = large[::2, ::2] if kind == "uint8" else large[::2, :, ::2]
    assert torch.equal(view, clips) and not view.is_contiguous()
    check_embed(clips, visible, inputs, upstream, kernel_clips=view)
    other = clips.transpose(1, 4).contiguous().transpose(1, 4)
    check_embed(clips, visible, inputs, upstream, kernel_clips=other)


def test_strided_weight_and_upstream(device):
    clips, visible, inputs, upstream = problem(("uint8", 2, (2, 3, 2), 5, 4, 2, 24), torch.float32, device)
    inputs["weight"] = inputs["weight"].transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.stack([upstream, torch.full_like(upstream, float("nan"))], -1)[..., 0]
    check_embed(clips, visible, inputs, wide)


def test_folding(device):
    """What the file says about folding the normalisation into a bf16 weight: around 114 no worse than
    rounding the normalised pixels, around 0 worse."""
    mean, std = (torch.tensor(value, dtype=torch.float64) for value in (MEAN, STD))
    clips = make_clips("uint8", 4, (2, 4, 4), 16, 2, "cpu")
    pixels = gather_tubelets(clips, tokens_of(4, 20, 32, "cpu"), 16).double().flatten(2, 4)
    weight = torch.randn(256, 512, 3, dtype=torch.float64) * 0.02

    def project(x, w):
        return x.flatten(2) @ w.flatten(1).T

    def bf16(x):
        return x.to(torch.bfloat16).double()

    exact = project((pixels / 255 - mean) / std, weight)
    scaled = weight / (255 * std)

    def folded(centre):
        return project(pixels - centre, bf16(scaled)) + project(
            (centre - 255 * mean).expand(1, 1, 512, 3), scaled
        )

    rounded = errors(project(bf16((pixels / 255 - mean) / std), bf16(weight)), exact)[0]
    bf16_weight = bf16(weight)
    pixels_only = errors(
        project(bf16((pixels / 255 - mean) / std), bf16_weight),
        project((pixels / 255 - mean) / std, bf16_weight),
    )[0]
    around_114, around_0 = errors(folded(114), exact)[0], errors(folded(0), exact)[0]
    print(
        f"relative to {rounded:.2e}: around 114 {around_114 / rounded:.2f}, 0 {around_0 / rounded:.2f}, ",
        end="",
    )
    print(f"pixels only {pixels_only / rounded:.2f}")
    assert around_114 < 0.8 * rounded < 1.2 * rounded < around_0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time(dtype, device):
    clips, visible, inputs, upstream = problem(("uint8", 2, (2, 3, 2), 5, 4, 2, 24), dtype, device)
    first, second = (
        run(lambda **x: embed_visible(clips, visible, **x, backend="triton"), inputs, upstream)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
