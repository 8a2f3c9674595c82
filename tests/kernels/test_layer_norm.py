"""layer_norm: forward, gradients of x, weight and bias, the forward's result again, against float64."""

import pytest
import torch
from bounds import assert_bounded, check, run

from vmae_kernels import layer_norm, layer_norm_ref
from vmae_kernels.layer_norm import (
    LEAST_ROWS,
    MOST_PROGRAMS,
    bwd_rows,
    config_of,
    layer_norm_backward_op,
    layer_norm_op,
)

SHAPES = {
    "odd width, rows of two programs, the last tile cut": (2, 13, 33),
    "ViT-B's decoder width": (1, 37, 384),
    "wide rows, one a tile": (1, 5, 1408),
    "one row": (1, 1, 24),
    "two dimensions": (7, 16),
    "four dimensions": (2, 3, 2, 8),
    "more rows than the most programs have least rows": (1, MOST_PROGRAMS * LEAST_ROWS + 5, 6),
    "no row": (2, 0, 16),
}


def problem(shape, dtype, device, learned=None):
    width = shape[-1]
    inputs = {
        "x": (torch.randn(shape, device=device) * 3 + 1).to(dtype),
        "weight": torch.randn(width, device=device).to(learned or dtype),
        "bias": torch.randn(width, device=device).to(learned or dtype),
    }
    return inputs, torch.randn(shape, device=device).to(dtype)


def ours(**x):
    return layer_norm(**x, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(shape, dtype, device):
    check(ours, layer_norm_ref, layer_norm_ref, *problem(shape, dtype, device))


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learned", [torch.float32, torch.bfloat16])
def test_autocast_reads_each_in_its_dtype(stream, learned, device):
    """float32 parameters beside a bf16 stream, FSDP's bf16 ones beside either: a bf16 result, and gradients
    in the inputs' dtypes, as near to float64 as PyTorch's float32 LayerNorm cast to bf16."""
    inputs, upstream = problem((3, 11, 33), stream, device, learned)

    def plain(**x):
        return layer_norm_ref(*(value.float() for value in x.values())).bfloat16()

    def autocast(**x):
        with torch.autocast(device, dtype=torch.bfloat16):
            return ours(**x)

    check(autocast, plain, layer_norm_ref, inputs, upstream.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 13, 33), (1, 5, 1408), (2, 0, 16)])
def test_the_backward_gives_the_forwards_result_again(shape, dtype, device):
    """The same bits: the same arithmetic on the same statistics. The gradients are those without it."""
    inputs, upstream = problem(shape, dtype, device, torch.float32)
    x, weight, bias = inputs.values()
    out, mean, rstd = layer_norm_op(x, weight, bias, 1e-6, dtype)
    grad_x, again, sums = layer_norm_backward_op(upstream, x, weight, bias, mean, rstd)
    assert torch.equal(again, out) and again.dtype == out.dtype
    alone, nothing, same = layer_norm_backward_op(upstream, x, weight, None, mean, rstd)
    assert torch.equal(grad_x, alone) and torch.equal(sums, same) and nothing.numel() == 0


def test_statistics_are_float32_of_each_row(device):
    inputs, _ = problem((2, 13, 33), torch.bfloat16, device)
    _, mean, rstd = layer_norm_op(*inputs.values(), 1e-6, torch.bfloat16)
    rows = inputs["x"].double().flatten(0, -2)
    for name, got, truth in (
        ("mean", mean, rows.mean(1)),
        ("rstd", rstd, (rows.var(1, unbiased=False) + 1e-6).rsqrt()),
    ):
        assert got.dtype == torch.float32
        assert_bounded(name, got, truth.float(), truth)


def test_rows_far_from_zero_keep_their_deviation(device):
    """The deviation is formed from differences: of squares alone nothing would be left at this mean."""
    inputs, upstream = problem((4, 33), torch.float32, device)
    inputs["x"] += 3e4
    check(ours, layer_norm_ref, layer_norm_ref, inputs, upstream)


# Two clips whose rows lie apart are copied; one clip's rows are read where they are.
@pytest.mark.parametrize("clips", [1, 2])
def test_strided_rows(clips, device):
    """Rows cut out of something larger in each way, and an upstream gradient with gaps."""
    inputs, upstream = problem((clips, 20, 33), torch.float32, device)
    plain = run(ours, inputs, upstream)
    whole = torch.full((3, 24, 40), float("nan"), device=device)
    columns, across = whole.mT.contiguous().mT, whole.transpose(0, 1).contiguous().transpose(0, 1)
    gaps = torch.stack([upstream, torch.full_like(upstream, float("nan"))], -1)[..., 0]
    for x in (whole[1:, 2:22, 3:36], columns[:, :20, :33], across[:, 4:, :33]):
        x = x[:clips]
        x.copy_(inputs["x"])
        x = x.detach().requires_grad_()
        result = layer_norm(x, inputs["weight"], inputs["bias"], backend="triton")
        assert torch.equal(result, plain["result"])
        assert torch.equal(torch.autograd.grad(result, x, gaps)[0], plain["gradient of x"])


def test_equal_rows_without_eps_are_nan_as_in_pytorch(device):
    inputs, _ = problem((3, 8), torch.float32, device)
    inputs["x"][1] = 2.0
    got, expected = (layer_norm(**inputs, eps=0.0, backend=backend) for backend in ("triton", "torch"))
    assert got[1].isnan().all() and expected[1].isnan().all()
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]])


def test_two_runs_give_the_same_bits(device):
    inputs, upstream = problem((1, 300, 97), torch.bfloat16, device)
    first, second = (run(ours, inputs, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rows", [1, 16, 17, 5120, 30208, 39424, 10**7])
@pytest.mark.parametrize("width", [8, 384, 768, 1408])
def test_backward_programs(rows, width):
    """At most MOST_PROGRAMS partial sums, of at least LEAST_ROWS rows, in whole tiles."""
    block = config_of(width)["BLOCK_R"]
    stretch = bwd_rows(rows, block)
    assert stretch % block == 0 and stretch >= LEAST_ROWS and -(-rows // stretch) <= MOST_PROGRAMS


@pytest.mark.parametrize("shapes", [((8,), (8,), (8,)), ((2, 8), (7,), (7,)), ((2, 8), (8,), (7,))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="do not fit"):
        layer_norm(*(torch.zeros(shape) for shape in shapes))
