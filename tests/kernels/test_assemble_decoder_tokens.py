"""assemble_decoder_tokens: forward, gradients of the encoded tokens and the mask token, against float64."""

import pytest
import torch
from bounds import check, run, tokens_of

from vmae_kernels import assemble_decoder_tokens, assemble_decoder_tokens_ref

# batch, visible, decoded, all tokens, width
SHAPES = {
    "odd width, rows no multiple of a block": (3, 5, 9, 20, 97),
    "ViT-B's decoder width, several parts of the mask token's sum": (3, 7, 50, 80, 384),
    "one clip, one token each": (1, 1, 1, 4, 24),
    "nothing decoded": (2, 3, 0, 8, 16),
    "nothing visible": (2, 0, 3, 8, 16),
    "wider than any decoder": (1, 2, 3, 8, 1408),
}


def problem(shape, dtype, device):
    batch, shown, decoded, total, width = shape
    inputs = {
        "encoded": torch.randn(batch, shown, width, device=device).to(dtype),
        "mask_token": torch.randn(1, 1, width, device=device).to(dtype),
    }
    pos = torch.randn(1, total, width, device=device)
    indices = {
        "visible": tokens_of(batch, shown, total, device),
        "decode": tokens_of(batch, decoded, total, device),
    }
    return inputs, pos, indices, torch.randn(batch, shown + decoded, width, device=device).to(dtype)


def check_assemble(inputs, pos, indices, upstream):
    check(
        lambda **x: assemble_decoder_tokens(**x, pos=pos, **indices, backend="triton"),
        lambda **x: assemble_decoder_tokens_ref(**x, pos=pos, **indices),
        lambda **x: assemble_decoder_tokens_ref(**x, pos=pos, **indices),
        inputs,
        upstream,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(shape, dtype, device):
    check_assemble(*problem(shape, dtype, device))


def test_duplicates(device):
    inputs, pos, indices, upstream = problem(
        SHAPES["odd width, rows no multiple of a block"], torch.float32, device
    )
    indices["decode"][:, 4:] = indices["decode"][:, :1]
    indices["visible"][:, 1] = indices["visible"][:, 0]
    check_assemble(inputs, pos, indices, upstream)


def test_strided(device):
    """Encoded tokens cut out of a longer sequence, an upstream gradient with gaps, a table in the working
    dtype."""
    inputs, pos, indices, upstream = problem(
        SHAPES["odd width, rows no multiple of a block"], torch.bfloat16, device
    )
    call = dict(pos=pos.to(torch.bfloat16), **indices, backend="triton")
    plain = run(lambda **x: assemble_decoder_tokens(**x, **call), inputs, upstream)

    def cut(x, dim):
        return torch.stack([x, torch.full_like(x, float("nan"))], dim).select(dim, 0)

    for dim in (1, 2, 3):
        inputs_cut = {"encoded": cut(inputs["encoded"], dim), "mask_token": cut(inputs["mask_token"], dim)}
        leaves = {name: value.requires_grad_() for name, value in inputs_cut.items()}
        result = assemble_decoder_tokens(**leaves, **call)
        grads = torch.autograd.grad(result, list(leaves.values()), cut(upstream, dim))
        assert torch.equal(result, plain["result"])
        assert torch.equal(grads[0], plain["gradient of encoded"]) and torch.equal(
            grads[1], plain["gradient of mask_token"]
        )


def test_float32_mask_token_with_bf16_tokens(device):
    """Its gradient stays float32: sums are never rounded to the tokens' dtype."""
    inputs, pos, indices, upstream = problem(
        SHAPES["odd width, rows no multiple of a block"], torch.bfloat16, device
    )
    inputs["mask_token"] = inputs["mask_token"].float()
    found = run(
        lambda **x: assemble_decoder_tokens(**x, pos=pos, **indices, backend="triton"), inputs, upstream
    )
    exact = upstream[:, inputs["encoded"].shape[1] :].double().sum((0, 1))
    grad = found["gradient of mask_token"]
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad.flatten().double(), exact, rtol=1e-6, atol=1e-6)
