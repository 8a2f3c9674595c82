import math

import pytest
import torch

from vmae import InputError
from vmae.model.attention import ATTENTION_BACKENDS, Attention, attention


def literal(qkv: torch.Tensor, scale: float) -> torch.Tensor:
    """Head by head in float64."""
    batch, tokens, _, heads, width = qkv.shape
    out = torch.empty(batch, tokens, heads, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            q, k, v = qkv[b, :, :, h].double().unbind(1)
            scores = (q @ k.T) * scale
            weights = (scores - scores.max(1, keepdim=True).values).exp()
            out[b, :, h] = (weights / weights.sum(1, keepdim=True)) @ v
    return out


# Head widths of the presets (64, 80 for ViT-H, 88 for ViT-g) and the small ones of tests; 1 token; an odd count.
@pytest.mark.parametrize("shape", [(2, 33, 3, 2, 32), (1, 16, 3, 2, 64), (2, 7, 3, 1, 80), (1, 20, 3, 3, 88), (2, 1, 3, 2, 16)])
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_every_backend_is_attention(shape, backend):
    qkv = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(shape[0], shape[1], shape[3], shape[4])
    out = attention(qkv, backend)
    (gradient,) = torch.autograd.grad(out, qkv, upstream)
    exact_in = qkv.detach().double().requires_grad_()
    exact = literal(exact_in, shape[-1] ** -0.5)
    (exact_gradient,) = torch.autograd.grad(exact, exact_in, upstream.double())
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=1e-5, rtol=1e-4)


def test_scale_is_used():
    qkv = torch.randn(1, 9, 3, 2, 8)
    for backend in ATTENTION_BACKENDS:
        torch.testing.assert_close(attention(qkv, backend, 0.7).double(), literal(qkv, 0.7), atol=2e-6, rtol=1e-5)


def test_unknown_backend_is_named():
    with pytest.raises(InputError, match="unknown attention backend 'flash9'; known: auto, sdpa, softmax"):
        attention(torch.randn(1, 2, 3, 1, 4), "flash9")


def test_biases_are_on_q_and_v_only():
    layer = Attention(12, 3)
    torch.nn.init.normal_(layer.q_bias)
    torch.nn.init.normal_(layer.v_bias)
    x = torch.randn(2, 5, 12)
    q, k, v = (x @ layer.qkv.weight.T).chunk(3, dim=-1)
    packed = torch.stack([q + layer.q_bias, k, v + layer.v_bias], dim=2).unflatten(-1, (3, 4))
    expected = literal(packed, 4**-0.5).float().flatten(2) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    assert {n for n, _ in layer.named_parameters()} == {"q_bias", "v_bias", "qkv.weight", "proj.weight", "proj.bias"}
    assert "q_bias" not in dict(Attention(12, 3, qkv_bias=False).named_parameters())


@pytest.mark.parametrize("backend", ["sdpa", "softmax"])
def test_cosine_attention_is_the_formula(backend):
    layer = Attention(12, 3, cos_attn=True, backend=backend)
    assert layer.scale.shape == (3, 1, 1) and math.isclose(float(layer.scale[0].detach()), math.log(10), rel_tol=1e-6)
    with torch.no_grad():
        layer.scale.copy_(torch.tensor([0.5, 2.0, 9.0]).view(3, 1, 1))  # the last is above the limit
    x = torch.randn(2, 6, 12)
    qkv = (x @ layer.qkv.weight.T).unflatten(-1, (3, 3, 4)).detach()
    q, k = (t / t.norm(dim=-1, keepdim=True) for t in (qkv[:, :, 0], qkv[:, :, 1]))
    factor = torch.tensor([math.exp(0.5), math.exp(2.0), math.exp(4.6052)]).view(1, 1, 3, 1)
    expected = literal(torch.stack([q * factor, k, qkv[:, :, 2]], dim=2), 1.0).float()
    torch.testing.assert_close(layer(x), layer.proj(expected.flatten(2)), atol=1e-5, rtol=1e-4)
