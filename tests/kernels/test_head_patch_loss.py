"""head_patch_loss: loss and gradients of hidden, head weight and bias, against float64; chunks, accumulation,
refusals."""

import sys

import pytest
import torch
import torch.nn.functional as F
from bounds import check, float64_targets, make_clips, tokens_of

from vmae_kernels import head_patch_loss, head_patch_loss_ref
from vmae_kernels.head_patch_loss import chunk_rows

# clips, batch, grid, tokens, patch, depth, width
SHAPES = {
    "patch 14: columns no multiple of a tile, odd width": ("uint8", 1, (1, 2, 2), 3, 14, 2, 33),
    "two chunks, the second one not full": ("uint8", 2, (2, 4, 5), 40, 4, 2, 96),
    "one clip, one token": ("uint8", 1, (1, 1, 1), 1, 4, 2, 24),
    "float clip, depth 1": ("float", 2, (4, 2, 2), 7, 4, 1, 40),
}


def problem(shape, dtype, device):
    kind, batch, grid, count, patch, depth, width = shape
    values = 3 * depth * patch * patch
    clips = make_clips(kind, batch, grid, patch, depth, device)
    tokens = tokens_of(batch, count, grid[0] * grid[1] * grid[2], device)
    inputs = {
        "hidden": torch.randn(batch, count, width, device=device).to(dtype),
        "head_weight": torch.randn(values, width, device=device).mul(0.1).to(dtype),
        "head_bias": torch.randn(values, device=device).to(dtype),
    }
    return clips, tokens, torch.rand(batch, count, device=device), inputs


def check_head(clips, tokens, weight, inputs, normalize, patch, depth):
    targets = float64_targets(clips, tokens, patch, depth, normalize)

    def exact(hidden, head_weight, head_bias=None):
        error = F.linear(hidden, head_weight, head_bias) - targets
        return (error.square().mean(-1) * weight.double()).sum() / weight.double().sum()

    rest = dict(clips=clips, decode=tokens, weight=weight, normalize=normalize, tubelet_size=depth)
    none = {} if "head_bias" in inputs else {"head_bias": None}
    check(
        lambda **x: head_patch_loss(**x, **none, **rest, backend="triton"),
        lambda **x: head_patch_loss_ref(**x, **none, **rest),
        exact,
        inputs,
        torch.randn((), device=clips.device),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(shape, dtype, device):
    check_head(*problem(shape, dtype, device), True, *shape[4:6])


def test_pixels_in_unit_range_without_bias(device):
    shape = SHAPES["two chunks, the second one not full"]
    clips, tokens, weight, inputs = problem(shape, torch.bfloat16, device)
    del inputs["head_bias"]
    check_head(clips, tokens, weight, inputs, False, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_several_chunks(dtype, device, monkeypatch):
    """300 rows in chunks of 64: each adds to the loss and to all gradients; the last one is not full."""
    shape = ("uint8", 2, (2, 10, 10), 150, 2, 2, 8)
    monkeypatch.setattr(sys.modules["vmae_kernels.head_patch_loss"], "CHUNK_BYTES", 3 << 10)
    assert chunk_rows(300, 48) == 64
    check_head(*problem(shape, dtype, device), True, 2, 2)


@pytest.mark.slow
def test_many_partial_sums(device, monkeypatch):
    """More programs than a sum in one step takes."""
    shape = ("uint8", 2, (2, 10, 10), 150, 2, 2, 8)
    monkeypatch.setattr(sys.modules["vmae_kernels.device"], "MANY_PARTS", 4)
    check_head(*problem(shape, torch.float32, device), True, 2, 2)


def test_product_in_float32_is_a_call_that_torch_knows():
    """cuBLAS' product of bf16 rows in float32: made on a GPU alone, but its call is understood anywhere."""
    errors, rows, out = torch.ones(4, 3).bfloat16(), torch.ones(4, 5).bfloat16(), torch.zeros(3, 5)
    with pytest.raises(NotImplementedError, match=r"aten::mm\.dtype_out"):
        torch.mm(errors.t(), rows, out_dtype=torch.float32, out=out)


def test_weights_of_zero_and_duplicates(device):
    clips, tokens, weight, inputs = problem(
        SHAPES["two chunks, the second one not full"], torch.float32, device
    )
    weight[:, ::2] = 0
    tokens[:, 4:8] = tokens[:, :1]
    check_head(clips, tokens, weight, inputs, True, 4, 2)


def test_never_all_predictions():
    """A chunk is smaller than all predictions wherever these are more than 64 rows, and bounded."""
    for rows in (65, 128, 1000, 8192, 8193, 22528, 29440, 10**6):
        assert chunk_rows(rows, 3072) < rows and chunk_rows(rows, 3072) * 3072 <= (18 << 20) + 64 * 3072
    # ViT-B and ViT-g, 32 clips, bf16: 4 chunks, 16 launches in all.
    assert chunk_rows(22528, 3072) == 5632 and chunk_rows(29440, 2352) == 7360


def leaves(inputs):
    return {name: value.clone().requires_grad_() for name, value in inputs.items()}


def test_accumulation_and_retained_graph(device):
    """Two backwards through one graph, and two graphs into one gradient, are sums; scaled losses scale."""
    clips, tokens, weight, inputs = problem(SHAPES["float clip, depth 1"], torch.float32, device)
    rest = dict(clips=clips, decode=tokens, weight=weight, tubelet_size=1, backend="triton")
    once, twice, again = leaves(inputs), leaves(inputs), leaves(inputs)
    head_patch_loss(**once, **rest).backward()
    loss = head_patch_loss(**twice, **rest)
    loss.backward(retain_graph=True)
    loss.backward(torch.tensor(3.0, device=device))
    for factor in (0.5, 3.5):
        (head_patch_loss(**again, **rest) * factor).backward()
    for name in inputs:
        torch.testing.assert_close(twice[name].grad, 4 * once[name].grad)
        torch.testing.assert_close(again[name].grad, 4 * once[name].grad)


def test_float32_master_weights_get_float32_gradients(device):
    """bf16 rows and a float32 head, under autocast: the weight's gradient is never rounded to bf16."""
    clips, tokens, weight, inputs = problem(SHAPES["float clip, depth 1"], torch.float32, device)
    rest = dict(clips=clips, decode=tokens, weight=weight, tubelet_size=1)
    found = leaves(inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        head_patch_loss(**found, **rest, backend="triton").backward()
    rounded = {name: value.to(torch.bfloat16).float() for name, value in inputs.items()}
    expected = leaves(rounded)
    head_patch_loss_ref(**expected, **rest).backward()
    assert all(value.grad.dtype == torch.float32 for value in found.values())
    for name in inputs:
        difference = (found[name].grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert difference < 2**-8, f"{name}: {difference:.3g}"


def test_without_gradients_none_are_formed(device, monkeypatch):
    monkeypatch.setattr(torch, "mm", None)
    clips, tokens, weight, inputs = problem(SHAPES["float clip, depth 1"], torch.float32, device)
    rest = dict(clips=clips, decode=tokens, weight=weight, tubelet_size=1)
    with torch.no_grad():
        loss = head_patch_loss(**leaves(inputs), **rest, backend="triton")
    torch.testing.assert_close(loss, head_patch_loss_ref(**inputs, **rest))


def test_only_some_gradients_wanted(device):
    clips, tokens, weight, inputs = problem(SHAPES["float clip, depth 1"], torch.float32, device)
    rest = dict(clips=clips, decode=tokens, weight=weight, tubelet_size=1)
    head = inputs["head_weight"].clone().requires_grad_()
    head_patch_loss(inputs["hidden"], head, inputs["head_bias"], **rest, backend="triton").backward()
    expected = inputs["head_weight"].clone().requires_grad_()
    head_patch_loss_ref(inputs["hidden"], expected, inputs["head_bias"], **rest).backward()
    torch.testing.assert_close(head.grad, expected.grad)


def test_float16_is_refused_where_gradients_are_formed(device):
    clips, tokens, weight, inputs = problem(SHAPES["float clip, depth 1"], torch.float16, device)
    rest = dict(clips=clips, decode=tokens, weight=weight, tubelet_size=1)
    with pytest.raises(ValueError, match="before a loss scale is known"):
        head_patch_loss(**leaves(inputs), **rest, backend="triton")
    with torch.no_grad():
        loss = head_patch_loss(**leaves(inputs), **rest, backend="triton")
    assert torch.isfinite(loss)


def test_second_derivative_is_refused(device):
    clips, tokens, weight, inputs = problem(SHAPES["float clip, depth 1"], torch.float32, device)
    found = leaves(inputs)
    loss = head_patch_loss(
        **found, clips=clips, decode=tokens, weight=weight, tubelet_size=1, backend="triton"
    )
    with pytest.raises(RuntimeError, match="differentiated"):
        torch.autograd.grad(loss, found["hidden"], create_graph=True)
