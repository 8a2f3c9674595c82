"""select_decoded: forward, gradients of hidden, weight and bias, against float64."""

import pytest
import torch
from bounds import check, run, tokens_of

from vmae_kernels import select_decoded, select_decoded_ref

# batch, rows, kept, width
SHAPES = {
    "odd width, rows over two stretches of the backward": (2, 75, 9, 97),
    "ViT-B's decoder width, more indices than one comparison holds": (1, 300, 270, 384),
    "one clip, one row": (1, 1, 1, 24),
    "every row kept": (2, 7, 7, 64),
    "nothing kept": (2, 5, 0, 16),
    "wider than any decoder": (1, 5, 3, 1408),
}


def problem(shape, dtype, device):
    batch, rows, kept, width = shape
    inputs = {
        "hidden": (torch.randn(batch, rows, width, device=device) * 3 + 1).to(dtype),
        "weight": torch.randn(width, device=device).to(dtype),
        "bias": torch.randn(width, device=device).to(dtype),
    }
    return (
        inputs,
        tokens_of(batch, kept, rows, device),
        torch.randn(batch, kept, width, device=device).to(dtype),
    )


def check_select(inputs, keep, upstream):
    check(
        lambda **x: select_decoded(**x, keep=keep, backend="triton"),
        lambda **x: select_decoded_ref(**x, keep=keep),
        lambda **x: select_decoded_ref(**x, keep=keep),
        inputs,
        upstream,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(shape, dtype, device):
    check_select(*problem(shape, dtype, device))


def test_unsorted_duplicates(device):
    """One row three times, another twice, in no order."""
    inputs, keep, upstream = problem((2, 20, 9, 33), torch.float32, device)
    keep[:, :] = torch.tensor([7, 3, 19, 7, 0, 3, 11, 7, 4])
    check_select(inputs, keep, upstream)


def test_rows_not_kept_get_zero(device):
    inputs, keep, upstream = problem((2, 20, 5, 33), torch.bfloat16, device)
    grad = run(lambda **x: select_decoded(**x, keep=keep, backend="triton"), inputs, upstream)[
        "gradient of hidden"
    ]
    dropped = torch.ones(2, 20, dtype=torch.bool, device=device)
    dropped[torch.arange(2)[:, None], keep.long()] = False
    assert (grad[dropped] == 0).all() and (grad[~dropped] != 0).any(1).all()


@pytest.mark.parametrize("kept", [5, 0])
def test_rows_not_kept_are_finite_without_eps(kept, device):
    """Their deviation is never formed: with `eps` 0 it would be one over zero, and NaN in the gradients of
    weight and bias."""
    inputs, _, _ = problem((2, 75, 5, 33), torch.float32, device)
    keep, upstream = tokens_of(2, kept, 75, device), torch.randn(2, kept, 33, device=device)
    got = run(lambda **x: select_decoded(**x, keep=keep, eps=0.0, backend="triton"), inputs, upstream)
    expected = run(lambda **x: select_decoded_ref(**x, keep=keep, eps=0.0), inputs, upstream)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_rows_not_kept_are_not_read(device):
    """They may hold anything, NaN too."""
    inputs, keep, upstream = problem((2, 20, 5, 33), torch.float32, device)
    dropped = torch.ones(2, 20, dtype=torch.bool, device=device)
    dropped[torch.arange(2)[:, None], keep.long()] = False
    inputs["hidden"][dropped] = float("nan")
    found = run(lambda **x: select_decoded(**x, keep=keep, backend="triton"), inputs, upstream)
    assert all(torch.isfinite(value).all() for value in found.values())


def test_strided(device):
    """Hidden cut out of something larger in each way, and an upstream gradient with gaps."""
    inputs, keep, upstream = problem((2, 9, 5, 33), torch.float32, device)
    plain = run(lambda **x: select_decoded(**x, keep=keep, backend="triton"), inputs, upstream)
    for dim in (1, 2, 3):
        hidden, gaps = (
            torch.stack([x, torch.full_like(x, float("nan"))], dim).select(dim, 0)
            for x in (inputs["hidden"], upstream)
        )
        hidden.requires_grad_()
        result = select_decoded(hidden, inputs["weight"], inputs["bias"], keep, backend="triton")
        assert torch.equal(result, plain["result"])
        assert torch.equal(torch.autograd.grad(result, hidden, gaps)[0], plain["gradient of hidden"])
