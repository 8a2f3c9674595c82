"""embed_visible: forward, gradients of weight, bias and positions, against float64."""

import re

import pytest
import torch
import torch.nn.functional as F
from bounds import check, errors, float64_clips, make_clips, run, tokens_of

from vmae_kernels import device as dev
from vmae_kernels import embed_visible, embed_visible_ref, gather_tubelets
from vmae_kernels.embed_visible import BWD_CONFIGS, weight_grad_splits
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


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_float16(kind, device):
    """The other half precision: pixels, weight and gradient are fp16 on both ways."""
    check_embed(*problem((kind, 2, (1, 2, 2), 3, 4, 2, 24), torch.float16, device))


def test_weight_by_pointer(device, monkeypatch):
    """The way of devices without a copy engine."""
    monkeypatch.setenv("VMAE_NO_DESCRIPTOR", "1")
    check_embed(*problem(SHAPES["patch 14: 42-byte lines, K no multiple of a block"], torch.bfloat16, device))


@pytest.mark.slow
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


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-7, 1e5, 1e30])
def test_weights_of_any_size(size, device):
    """Rows of the weight that fp16 cannot hold: each has a scale of its own. One row of each size beside a
    usual one."""
    clips, visible, inputs, upstream = problem(("uint8", 2, (1, 2, 2), 3, 4, 2, 24), torch.bfloat16, device)
    inputs["weight"][::2] *= size
    inputs["bias"].zero_()
    inputs["pos"].zero_()
    rows = {name: value.clone() for name, value in inputs.items()}
    rows["weight"], rows["bias"], rows["pos"] = rows["weight"][::2], rows["bias"][::2], rows["pos"][:, ::2]
    check_embed(clips, visible, inputs, upstream)
    check_embed(clips, visible, rows, upstream[..., ::2])


def evaluate_ptx(code: str, word: int) -> list[int]:
    """The two 32-bit results of `device.FP16_PIXELS` or `BF16_PIXELS` for the 32-bit register `word`."""
    found = {"$2": word}
    dtypes = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}

    def halves(value: int, dtype: torch.dtype) -> torch.Tensor:
        bits = torch.tensor([value & 0xFFFF, value >> 16], dtype=torch.int32).to(torch.uint16)
        return bits.view(dtype).double()

    for statement in code.strip("{} \n").split(";"):
        name, *given = re.split(r"[\s,]+", statement.strip())
        if name == "mov.b32":
            found[given[0]] = int(given[1], 16)
        elif name == "prmt.b32":
            low, high = (found[source].to_bytes(4, "little") for source in given[1:3])
            picked = [(low + high)[int(given[3], 16) >> 4 * i & 7] for i in range(4)]
            found[given[0]] = int.from_bytes(bytes(picked), "little")
        elif name.startswith("fma.rn."):
            dtype = dtypes[name.removeprefix("fma.rn.")]
            x, factor, summand = (halves(found[source], dtype) for source in given[1:])
            bits = (x * factor + summand).to(dtype).view(torch.uint16).to(torch.int64).tolist()
            found[given[0]] = bits[0] | bits[1] << 16
        else:
            assert name in ("", ".reg"), statement
    return [found["$0"], found["$1"]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operands_of_every_byte(dtype):
    """The instructions that NVIDIA's devices run in place of what is interpreted here: exact for all bytes in
    all four places."""
    code = {torch.float16: dev.FP16_PIXELS, torch.bfloat16: dev.BF16_PIXELS}[dtype].value
    for first in range(256):
        pixels = [first, 255 - first, (first * 7 + 3) % 256, (first * 29 + 101) % 256]
        words = evaluate_ptx(code, int.from_bytes(bytes(pixels), "little"))
        bits = torch.tensor([w >> shift & 0xFFFF for w in words for shift in (0, 16)], dtype=torch.int32)
        expected = [(x - 114) / 64 for x in pixels]
        assert bits.to(torch.uint16).view(dtype).tolist() == expected


def test_splits_of_the_weight_gradient():
    """By shape and processors: ViT-B and ViT-g at batch 32; no part under 256 rows; all as one where one is
    enough."""
    config = BWD_CONFIGS[0]

    def splits(rows, width, values, processors):
        return weight_grad_splits(rows, width, values, config, processors)

    assert [splits(5120, 768, 1536, dev.PROCESSORS[t]) for t in ("sm_80", "sm_90", "sm_100")] == [3, 3, 2]
    assert [splits(6656, 1408, 1176, dev.PROCESSORS[t]) for t in ("sm_80", "sm_90", "sm_100")] == [2, 2, 2]
    assert splits(511, 768, 1536, 132) == 1 and splits(512, 8, 24, 132) == 2
    assert splits(6400, 132 * 128, 2 * 128, 132) == 1


def test_folding(device):
    """What the file says about folding the normalisation into the weight: in fp16 around 114, as the kernel
    does, far better than rounding the normalised pixels and the weight to bf16; in bf16 no worse around 114,
    worse around 0."""
    mean, std = (torch.tensor(value, dtype=torch.float64) for value in (MEAN, STD))
    clips = make_clips("uint8", 4, (2, 4, 4), 16, 2, "cpu")
    visible = tokens_of(4, 20, 32, "cpu")
    pixels = gather_tubelets(clips, visible, 16).double().flatten(2, 4)
    weight = torch.randn(256, 512, 3, dtype=torch.float64) * 0.02

    def project(x, w):
        return x.flatten(2) @ w.flatten(1).T

    def rounded_to(x, dtype):
        return x.to(dtype).double()

    def bf16(x):
        return rounded_to(x, torch.bfloat16)

    exact = project((pixels / 255 - mean) / std, weight)
    scaled = weight * 64 / (255 * std)

    def folded(centre, dtype):
        product = project((pixels - centre) / 64, rounded_to(scaled, dtype))
        return product + project((centre - 255 * mean).expand(1, 1, 512, 3) / 64, scaled)

    rounded = errors(project(bf16((pixels / 255 - mean) / std), bf16(weight)), exact)[0]
    bf16_weight = bf16(weight)
    pixels_only = errors(
        project(bf16((pixels / 255 - mean) / std), bf16_weight),
        project((pixels / 255 - mean) / std, bf16_weight),
    )[0]
    half = errors(folded(114, torch.float16), exact)[0]
    around_114, around_0 = (errors(folded(centre, torch.bfloat16), exact)[0] for centre in (114, 0))
    print(f"{half:.2e}; relative to {rounded:.2e}: fp16 around 114 {half / rounded:.3f}, ", end="")
    print(f"bf16 around 114 {around_114 / rounded:.2f}, 0 {around_0 / rounded:.2f}, ", end="")
    print(f"pixels only {pixels_only / rounded:.2f}")
    assert half < 0.12 * rounded and around_114 < 0.8 * rounded < 1.2 * rounded < around_0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time(dtype, device):
    clips, visible, inputs, upstream = problem(("uint8", 2, (2, 3, 2), 5, 4, 2, 24), dtype, device)
    first, second = (
        run(lambda **x: embed_visible(clips, visible, **x, backend="triton"), inputs, upstream)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
