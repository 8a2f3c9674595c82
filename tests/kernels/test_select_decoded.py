"""select_decoded: both results, gradients of hidden, weight and bias, against float64."""

import pytest
import torch
from bounds import check, run, tokens_of

from vmae_kernels import select_decoded, select_decoded_ref
from vmae_kernels.select_decoded import places_of

# batch, rows, kept, width
SHAPES = {
    "odd width, rows over three stretches of the backward": (2, 75, 9, 97),
    "ViT-B's decoder width, two parts in bf16 and four in float32": (1, 300, 270, 384),
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
        torch.randn(2, batch, kept, width, device=device).to(dtype),
    )


def both(keep, uses=None, eps=1e-6, select=select_decoded, **backend):
    """The rows and their LayerNorm as one tensor [2, B, Nk, D], of keyword arguments."""
    return lambda **x: torch.stack(select(**x, keep=keep, uses=uses, eps=eps, **backend))


def check_select(inputs, keep, upstream, uses=None):
    plain = both(keep, select=select_decoded_ref)
    check(both(keep, uses, backend="triton"), plain, plain, inputs, upstream)


@pytest.mark.parametrize("inverse", [True, False], ids=["with the inverse", "keep is sorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(shape, dtype, inverse, device):
    inputs, keep, upstream = problem(shape, dtype, device)
    check_select(inputs, keep, upstream, places_of(keep, shape[1])[0] if inverse else None)


@pytest.mark.parametrize("result", [0, 1], ids=["the rows", "their LayerNorm"])
def test_only_one_result_is_used(result, device):
    inputs, keep, upstream = problem((2, 20, 9, 33), torch.float32, device)
    upstream[1 - result] = 0
    whole = run(both(keep, backend="triton"), inputs, upstream)["gradient of hidden"]
    one = run(
        lambda **x: select_decoded(**x, keep=keep, backend="triton")[result], inputs | {}, upstream[result]
    )
    assert torch.equal(one["gradient of hidden"], whole)


def test_inverse_of_unsorted_rows(device):
    """Any order will do; and with the inverse the results are those without it, to the bit."""
    inputs, keep, upstream = problem((2, 75, 9, 33), torch.bfloat16, device)
    keep = keep[:, torch.randperm(9, device=device)]
    uses, following = places_of(keep, 75)
    assert (following == 9).all() and ((uses < 9).sum(1) == 9).all()
    found = [run(both(keep, given, backend="triton"), inputs, upstream) for given in (None, uses)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    check_select(inputs, keep, upstream, uses)


def test_places_of():
    keep = torch.tensor([[7, 3, 7, 0, 7], [1, 2, 3, 4, 5]], dtype=torch.int32)
    first, following = places_of(keep, 8)
    assert first.tolist() == [[3, 5, 5, 1, 5, 5, 5, 0], [5, 0, 1, 2, 3, 4, 5, 5]]
    assert following.tolist() == [[2, 5, 4, 5, 5], [5, 5, 5, 5, 5]]


def test_a_wrong_inverse_is_named(device, monkeypatch):
    monkeypatch.setenv("VMAE_CHECK_INDICES", "1")
    inputs, keep, _ = problem((2, 20, 5, 16), torch.float32, device)
    uses = places_of(keep, 20)[0]
    repeated = keep.clone()
    repeated[0, 1] = repeated[0, 0]
    for backend in ("torch", "triton"):
        select_decoded(**inputs, keep=keep, uses=uses, backend=backend)
        for wrong_keep, wrong in ((keep, uses.roll(1, 1)), (repeated, places_of(repeated, 20)[0])):
            with pytest.raises(ValueError, match="uses must be the inverse of keep"):
                select_decoded(**inputs, keep=wrong_keep, uses=wrong, backend=backend)
    with pytest.raises(ValueError, match=r"uses must be \[2, 20\], not \[2, 19\]"):
        select_decoded(**inputs, keep=keep, uses=uses[:, 1:])


def test_unsorted_duplicates(device):
    """One row three times, another twice, in no order."""
    inputs, keep, upstream = problem((2, 20, 9, 33), torch.float32, device)
    keep[:, :] = torch.tensor([7, 3, 19, 7, 0, 3, 11, 7, 4])
    check_select(inputs, keep, upstream)


def test_rows_not_kept_get_zero(device):
    inputs, keep, upstream = problem((2, 20, 5, 33), torch.bfloat16, device)
    grad = run(both(keep, backend="triton"), inputs, upstream)["gradient of hidden"]
    dropped = torch.ones(2, 20, dtype=torch.bool, device=device)
    dropped[torch.arange(2)[:, None], keep.long()] = False
    assert (grad[dropped] == 0).all() and (grad[~dropped] != 0).any(1).all()


@pytest.mark.parametrize("kept", [5, 0])
def test_rows_not_kept_are_finite_without_eps(kept, device):
    """Their deviation is never formed: with `eps` 0 it would be one over zero, and NaN in the gradients of
    weight and bias."""
    inputs, _, _ = problem((2, 75, 5, 33), torch.float32, device)
    keep, upstream = tokens_of(2, kept, 75, device), torch.randn(2, 2, kept, 33, device=device)
    got = run(both(keep, eps=0.0, backend="triton"), inputs, upstream)
    expected = run(both(keep, eps=0.0, select=select_decoded_ref), inputs, upstream)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_rows_not_kept_are_not_read(device):
    """They may hold anything, NaN too."""
    inputs, keep, upstream = problem((2, 20, 5, 33), torch.float32, device)
    dropped = torch.ones(2, 20, dtype=torch.bool, device=device)
    dropped[torch.arange(2)[:, None], keep.long()] = False
    inputs["hidden"][dropped] = float("nan")
    found = run(both(keep, backend="triton"), inputs, upstream)
    assert all(torch.isfinite(value).all() for value in found.values())


def test_strided(device):
    """Hidden cut out of something larger in each way, and an upstream gradient with gaps."""
    inputs, keep, upstream = problem((2, 9, 5, 33), torch.float32, device)
    plain = run(both(keep, backend="triton"), inputs, upstream)
    for dim in (1, 2, 3):
        hidden, *gaps = (
            torch.stack([x, torch.full_like(x, float("nan"))], dim).select(dim, 0)
            for x in (inputs["hidden"], *upstream)
        )
        hidden.requires_grad_()
        results = select_decoded(hidden, inputs["weight"], inputs["bias"], keep, backend="triton")
        assert torch.equal(torch.stack(results), plain["result"])
        assert torch.equal(torch.autograd.grad(results, hidden, gaps)[0], plain["gradient of hidden"])
