from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vmae import MaskConfig, ModelConfig, build_classifier, build_pretrainer
from vmae.model.blocks import Mlp
from vmae.model.cost import count_saved_bytes, saved_activation_bytes_per_clip, token_counts
from vmae.model.recompute import LayerNorm, gelu_linear, norm_linear, padded_width
from vmae.train.optim import OptimConfig, build_optimizer

KINDS = ["norm", "norm, triton", "gelu"]


def layers(width_in, width_out, dtype=torch.float32):
    norm, linear = nn.LayerNorm(width_in, eps=1e-6), nn.Linear(width_in, width_out)
    for parameter in (*norm.parameters(), *linear.parameters()):
        nn.init.normal_(parameter)
    return norm.to(dtype), linear.to(dtype)


def plain(kind, x, norm, linear):
    return linear(F.gelu(x) if kind == "gelu" else norm(x))


def ours(kind, x, norm, linear):
    norm.backend = "triton" if kind == "norm, triton" else "torch"
    if kind != "gelu":
        return norm_linear(x, norm, linear.weight, linear.bias)
    return gelu_linear(x, linear.weight, linear.bias)


def outcome(function, kind, x, norm, linear, upstream):
    wanted = [x, *linear.parameters(), *(() if kind == "gelu" else norm.parameters())]
    out = function(kind, x, norm, linear)
    return [out, *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]


# Odd widths, one token, two dimensions instead of three.
@pytest.mark.parametrize("shape, width", [((2, 5, 7), 3), ((1, 1, 8), 4), ((6, 5), 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_same_results_and_gradients_in_float32(kind, shape, width):
    norm, linear = layers(shape[-1], width)
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], width)
    for got, expected in zip(*(outcome(f, kind, x, norm, linear, upstream) for f in (ours, plain))):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
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


# --- Bytes moved, weights cast ---


aten = torch.ops.aten
NOT_COUNTED = {aten.mm, aten.addmm, aten._unsafe_view, aten.empty_like, aten.detach}


class Traffic(TorchDispatchMode):
    """Bytes of tensors of `shape` that operations other than matrix products read and write, and how often a
    float32 tensor of `weight`'s shape was cast. What an operation reads twice inside counts once."""

    def __init__(self, shape, weight):
        super().__init__()
        self.shape, self.weight, self.bytes, self.casts = tuple(shape), tuple(weight), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if func.overloadpacket is aten._to_copy:
            self.casts += (tuple(tensors[0].shape), tensors[0].dtype) == (self.weight, torch.float32)
        moves_nothing = func.is_view or func.namespace == "prim" or func.overloadpacket in NOT_COUNTED
        if not moves_nothing:
            self.bytes += sum(x.numel() * x.itemsize for x in tensors if tuple(x.shape) == self.shape)
        return result


def norm_traffic(backend, device="cpu"):
    """Traffic of a norm_linear under bf16 autocast, counted on fake tensors: bytes an element of a bf16
    stream, casts of the weight."""
    with FakeTensorMode(), torch.device(device):
        norm, weight = LayerNorm(64, 1e-6, backend), torch.empty(48, 64, requires_grad=True)
        x = torch.empty(4, 33, 64, dtype=torch.bfloat16, requires_grad=True)
        with Traffic(x.shape, weight.shape) as counted:
            with torch.autocast(device, dtype=torch.bfloat16):
                out = norm_linear(x, norm, weight, None)
            out.backward(torch.empty_like(out))
    assert weight.grad.dtype == torch.float32
    return counted.bytes / x.numel(), counted.casts


def test_a_layer_norm_moves_12_bytes_an_element_with_the_kernels():
    """A block's two: 24. Before there were kernels, and where PyTorch has to copy to float32: 64 as counted
    here; the native backward reads both of its inputs again for the weights' gradients, so 72."""
    assert norm_traffic("triton")[0] == 12
    assert norm_traffic("torch")[0] == 38


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_weight_is_cast_once_for_forward_and_backward(backend):
    assert norm_traffic(backend)[1] == 1
    with FakeTensorMode():
        weight, bias = torch.empty(48, 64, requires_grad=True), torch.empty(48, requires_grad=True)
        x = torch.empty(4, 64, dtype=torch.bfloat16, requires_grad=True)
        with Traffic(x.shape, weight.shape) as counted:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = gelu_linear(x, weight, bias)
            out.backward(torch.empty_like(out))
    assert counted.casts == 1


def test_a_weight_is_cast_anew_after_a_fused_optimizer_step():
    """Which leaves the parameter's version as it was: a copy kept from the step before would be stale."""
    norm, linear = layers(16, 24)
    x = torch.randn(5, 16)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, fused=True)
    linear.weight.grad, linear.bias.grad = torch.ones_like(linear.weight), torch.ones_like(linear.bias)
    version = linear.weight._version
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            got = norm_linear(x, norm, linear.weight, linear.bias)
            expected = F.linear(norm(x), linear.weight.detach(), linear.bias.detach())
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
            optimizer.step()
            assert linear.weight._version == version


def test_mean_and_deviation_are_the_8_bytes_a_row_that_the_kernels_add():
    config = ModelConfig.preset("vit_tiny")
    counts = token_counts(config, MaskConfig())
    rows = (2 * config.depth + 1) * counts.visible  # the encoder's final norm is the one more
    rows += (2 * config.decoder_depth - 1) * (counts.visible + counts.decoded)
    rows += counts.counted  # the last norm before an MLP

    def kept(recompute_backend):
        def build(config):
            model = build_pretrainer(config, "torch")
            for module in model.modules():
                if isinstance(module, LayerNorm):
                    module.backend = recompute_backend
            return model

        return saved_activation_bytes_per_clip(build, config, MaskConfig(), torch.bfloat16)

    assert kept("triton") - kept("torch") == 8 * rows


@pytest.mark.parametrize("build", [build_pretrainer, lambda c, b: build_classifier(c, 2, backend=b)])
def test_a_models_backend_is_that_of_its_blocks_norms(build, tiny):
    for backend in ("torch", "triton", "auto"):
        norms = [module for module in build(tiny, backend).modules() if isinstance(module, LayerNorm)]
        assert len(norms) >= 2 * tiny.depth and {norm.backend for norm in norms} == {backend}


# --- Rows of a multiple of 16 bytes ---


def test_padded_widths():
    """ViT-g's decoder: 512 * 48 / 11."""
    assert [padded_width(2234, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)] == [
        2240,
        2236,
        2234,
    ]
    assert padded_width(2240, torch.bfloat16) == 2240


def mlp(pad, seed=0):
    """32 -> 139 -> 32: 139 is the odd width that 48 / 11 makes of it."""
    torch.manual_seed(seed)
    layer, norm = Mlp(32, 139), nn.LayerNorm(32, eps=1e-6)
    layer.pad = pad
    return nn.ModuleList([layer, norm])


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_is_exactly_nothing(recompute, dtype):
    """The padding of the hidden tensor is 0, and so is its gradient; parameters and gradients keep their
    shapes; results are as near to those without padding as the dtype allows."""
    x, upstream, found = torch.randn(2, 9, 32), torch.randn(2, 9, 32), {}
    width, hidden = {"float32": 140, "bfloat16": 144}[dtype], []
    for pad in (True, False):
        layer, norm = mlp(pad)
        layer.act.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()
        with autocast:
            if recompute:
                hidden.append(norm_linear(x, norm, layer.fc1.weight, layer.fc1.bias, pad=pad))
                out = gelu_linear(hidden[-1], layer.fc2.weight, layer.fc2.bias)
            else:
                out = layer(norm(x))
            assert torch.equal(out, layer(x, norm) if recompute else layer(norm(x)))
        (grad,) = torch.autograd.grad(
            out, hidden[0 if recompute else len(hidden) - 2], upstream.to(out.dtype), retain_graph=True
        )
        if pad:
            assert hidden[0].shape[-1] == width and (hidden[0][..., 139:] == 0).all()
            assert grad.shape[-1] == width and (grad[..., 139:] == 0).all() and (grad[..., :139] != 0).any()
        else:
            assert hidden[-1].shape[-1] == 139
        out.backward(upstream.to(out.dtype))
        for parameter in layer.parameters():
            assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == torch.float32
        found[pad] = [out.detach().float(), *(p.grad for p in layer.parameters())]
        hidden.clear()
    tolerance = 5e-6 if dtype == "float32" else 2e-2
    for padded, plain in zip(found[True], found[False]):
        torch.testing.assert_close(padded, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())


@pytest.mark.parametrize("recompute", [True, False])
def test_twenty_steps_padded_and_not_agree_to_5e_6(recompute):
    data = torch.randn(20, 2, 9, 32, generator=torch.Generator().manual_seed(1))
    trained = {}
    for pad in (True, False):
        layer, norm = both = mlp(pad)
        optimizer = build_optimizer(both, OptimConfig(lr=1e-3))
        for x in data:
            loss = ((layer(x, norm) if recompute else layer(norm(x))) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained[pad] = both.state_dict()
    start = mlp(True).state_dict()
    for name, value in trained[True].items():
        assert (value - start[name]).abs().max() > 1e-3
        torch.testing.assert_close(value, trained[False][name], rtol=5e-6, atol=5e-6)


def test_padded_rows_compile_without_a_break():
    x = torch.randn(2, 9, 32, requires_grad=True)
    for norm_in in (True, False):
        layer, norm = mlp(True)
        expected = layer(x, norm) if norm_in else layer(norm(x))
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(
            *((x, norm) if norm_in else (norm(x),))
        )
        torch.testing.assert_close(got, expected)
        upstream = torch.randn_like(got)
        wanted = [x, layer.fc1.weight, layer.fc2.weight]
        for a, b in zip(*(torch.autograd.grad(y, wanted, upstream) for y in (got, expected))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_padding_keeps():
    """fc1's output alone is wider, in every block of the decoder."""
    config = ModelConfig.preset("vit_tiny", mlp_ratio=48 / 11)
    counts = token_counts(config, MaskConfig())
    hidden = int(config.decoder_embed_dim * config.mlp_ratio)
    wider = padded_width(hidden, torch.bfloat16) - hidden
    assert wider > 0 and int(config.embed_dim * config.mlp_ratio) % 8

    def kept(pad):
        def build(config):
            model = build_pretrainer(config, "torch")
            for block in (*model.encoder.blocks, *model.decoder.blocks):
                block.mlp.pad = pad
            return model

        return saved_activation_bytes_per_clip(build, config, MaskConfig(), torch.bfloat16)

    encoder = int(config.embed_dim * config.mlp_ratio)
    more = config.depth * counts.visible * (padded_width(encoder, torch.bfloat16) - encoder)
    rows = (config.decoder_depth - 1) * (counts.visible + counts.decoded) + counts.counted
    more += rows * wider
    assert kept(True) - kept(False) == 2 * more


def test_vit_b_dual_keeps_at_most_65_mib_a_clip_in_bfloat16():
    config = ModelConfig.preset("vit_b")
    kept = saved_activation_bytes_per_clip(
        lambda c: build_pretrainer(c, "torch"), config, MaskConfig(), torch.bfloat16
    )
    assert kept <= 65 * 2**20
