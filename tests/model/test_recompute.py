import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmae import MaskConfig, ModelConfig, build_pretrainer
from vmae.model.cost import count_saved_bytes, saved_activation_bytes_per_clip
from vmae.model.recompute import gelu_linear, norm_linear


def layers(width_in, width_out, dtype=torch.float32):
    norm, linear = nn.LayerNorm(width_in, eps=1e-6), nn.Linear(width_in, width_out)
    for parameter in (*norm.parameters(), *linear.parameters()):
        nn.init.normal_(parameter)
    return norm.to(dtype), linear.to(dtype)


def plain(kind, x, norm, linear):
    return linear(norm(x) if kind == "norm" else F.gelu(x))


def ours(kind, x, norm, linear):
    if kind == "norm":
        return norm_linear(x, norm, linear.weight, linear.bias)
    return gelu_linear(x, linear.weight, linear.bias)


def outcome(function, kind, x, norm, linear, upstream):
    wanted = [x, *linear.parameters(), *(norm.parameters() if kind == "norm" else ())]
    out = function(kind, x, norm, linear)
    return [out, *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]


# Odd widths, one token, two dimensions instead of three.
@pytest.mark.parametrize("shape, width", [((2, 5, 7), 3), ((1, 1, 8), 4), ((6, 5), 2)])
@pytest.mark.parametrize("kind", ["norm", "gelu"])
def test_same_results_and_gradients_in_float32(kind, shape, width):
    norm, linear = layers(shape[-1], width)
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], width)
    for got, expected in zip(*(outcome(f, kind, x, norm, linear, upstream) for f in (ours, plain))):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["norm", "gelu"])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_under_autocast_no_worse_than_the_plain_way(kind, stream):
    """Against float64: at most twice the error that plain PyTorch makes under the same autocast."""
    norm, linear = layers(64, 48)
    x = torch.randn(4, 33, 64).to(stream).requires_grad_()
    upstream = torch.randn(4, 33, 48)
    exact_norm, exact_linear = nn.LayerNorm(64, eps=1e-6).double(), nn.Linear(64, 48).double()
    exact_norm.load_state_dict(norm.state_dict()), exact_linear.load_state_dict(linear.state_dict())
    exact = outcome(
        plain, kind, x.detach().double().requires_grad_(), exact_norm, exact_linear, upstream.double()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outcome(ours, kind, x, norm, linear, upstream)
        reference = outcome(plain, kind, x, norm, linear, upstream)
    assert got[0].dtype == torch.bfloat16
    for ours_, theirs, truth in zip(got, reference, exact):
        assert ours_.dtype == theirs.dtype
        bound = 2 * (theirs.double() - truth).norm() + 1e-6 * truth.norm()
        assert (ours_.double() - truth).norm() <= bound


@pytest.mark.parametrize("kind", ["norm", "gelu"])
def test_keeps_its_input_only(kind):
    norm, linear = layers(16, 24)
    x = torch.randn(5, 16, requires_grad=True)
    modules = nn.ModuleList([norm, linear])
    assert count_saved_bytes(lambda: ours(kind, x, norm, linear), modules) == 5 * 16 * 4
    assert count_saved_bytes(lambda: plain(kind, x, norm, linear), modules) >= 2 * 5 * 16 * 4


def test_no_bias_and_compiled_without_a_break():
    norm, linear = layers(12, 12)
    x = torch.randn(3, 4, 12, requires_grad=True)

    def function(x):
        return gelu_linear(norm_linear(x, norm, linear.weight, None), linear.weight, linear.bias)

    expected = F.linear(F.gelu(F.linear(norm(x), linear.weight)), linear.weight, linear.bias)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
    upstream = torch.randn(3, 4, 12)
    for a, b in zip(
        *(torch.autograd.grad(y, [x, norm.weight, linear.weight], upstream) for y in (got, expected))
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_a_models_gradients_do_not_depend_on_it(tiny, clips_of):
    from vmae import DualMask

    clips, mask = clips_of(tiny), DualMask.sample(2, tiny.grid)
    models = [build_pretrainer(tiny, recompute=recompute) for recompute in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    losses = [model(clips, mask) for model in models]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_vit_b_dual_keeps_at_most_65_mib_a_clip_in_bfloat16():
    config = ModelConfig.preset("vit_b")
    kept = saved_activation_bytes_per_clip(
        lambda c: build_pretrainer(c, "torch"), config, MaskConfig(), torch.bfloat16
    )
    assert kept <= 65 * 2**20
