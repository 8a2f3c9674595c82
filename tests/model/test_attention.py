"""Every backend that runs here against float64, inside a block, compiled, and in the module with the
published names."""

import logging
import math

import pytest
import torch

from vmae import InputError, ModelConfig, build_pretrainer, build_reference
from vmae.model.attention import ATTENTION_BACKENDS, Attention, attention
from vmae.model.attention import choice as backends
from vmae.model.attention.probes import Workload
from vmae.model.blocks import Block
from vmae.tools.parity import check_file, passed

RUNS = backends.runnable(Workload())
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def fresh():
    """Clear the probes' cached results before and after each test."""
    known = (backends.choose, backends.choose_name, backends.say_once)
    for function in known:
        function.cache_clear()
    yield
    for function in known:
        function.cache_clear()


def literal(qkv: torch.Tensor, scale: float) -> torch.Tensor:
    """Head by head, in the dtype of qkv."""
    batch, tokens, _, heads, width = qkv.shape
    rows = []
    for b in range(batch):
        outs = []
        for h in range(heads):
            q, k, v = qkv[b, :, :, h].unbind(1)
            scores = (q @ k.T) * scale
            weights = (scores - scores.max(1, keepdim=True).values).exp()
            outs.append((weights / weights.sum(1, keepdim=True)) @ v)
        rows.append(torch.stack(outs, 1))
    return torch.stack(rows)


def out_and_gradient(compute, qkv: torch.Tensor, upstream: torch.Tensor):
    leaf = qkv.detach().requires_grad_()
    out = compute(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, upstream.to(out.dtype))
    return out.detach(), gradient


def assert_within_bound(name: str, got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """The error against float64 is at most twice that of the plain one in the same dtype (DESIGN.md, section
    4).

    In the 2-norm: over seeds, torch's CPU flash kernel stays within 1.8 x in float32, while the largest of
    some thousand elements is one draw, whose ratio swings from 1.2 to 3.7. For one token the plain gradient
    of q and k is exactly 0, that of a flash kernel the difference of two rounded sums: an ulp is what any
    result may be off.
    """
    assert got.shape == exact.shape and got.dtype == plain.dtype and torch.isfinite(got).all(), name
    error, allowed = (float((x.double() - exact).norm() / exact.norm()) for x in (got, plain))
    ulp = torch.finfo(got.dtype).eps
    assert error <= 2 * max(allowed, ulp), f"{name}: error {error:.2e}, the plain one's is {allowed:.2e}"


SHAPES = [
    (2, 33, 3, 2, 32),  # an odd count; the smallest head dim of the flash kernels
    (1, 160, 3, 2, 64),  # ViT-B's encoder: 10 % of 1568 tokens
    (2, 7, 3, 1, 80),  # ViT-H's head dim, one head, less than a tile of tokens
    (1, 208, 3, 2, 88),  # ViT-g's encoder: its head dim and token count
    (2, 1, 3, 2, 64),  # one token
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["auto", *RUNS])
def test_within_the_bound_of_the_plain_one(backend, shape, dtype):
    qkv, upstream = torch.randn(shape).to(dtype), torch.randn(*shape[:2], *shape[3:])
    scale = shape[-1] ** -0.5
    got = out_and_gradient(lambda x: attention(x, backend), qkv, upstream.to(dtype))
    plain = out_and_gradient(lambda x: attention(x, "softmax"), qkv, upstream.to(dtype))
    exact = out_and_gradient(lambda x: literal(x, scale), qkv.double(), upstream.to(dtype).double())
    for name, *tensors in zip(("output", "gradient"), got, plain, exact):
        assert_within_bound(f"{backend} {name}", *tensors)


@pytest.mark.parametrize("backend", RUNS)
def test_any_strides_and_any_scale(backend):
    wide = torch.randn(2, 11, 3, 3, 64).transpose(
        1, 3
    )  # [2, 3, 3, 11, 64]: heads and tokens swapped in memory
    some = [
        wide.permute(0, 3, 2, 1, 4)[..., ::2],
        torch.randn(4, 9, 3, 2, 32)[::2],
        torch.randn(2, 9, 6, 2, 32)[:, :, ::2],
    ]
    for qkv in some:
        assert not qkv.is_contiguous()
        upstream = torch.randn(qkv.shape[0], qkv.shape[1], *qkv.shape[3:])
        got = out_and_gradient(lambda x: attention(x, backend, 0.7), qkv, upstream)
        exact = out_and_gradient(lambda x: literal(x, 0.7), qkv.double(), upstream.double())
        for one, other in zip(got, exact):
            torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-4)


def test_an_empty_batch_has_an_empty_result():
    for backend in ("auto", "softmax"):
        assert attention(torch.empty(0, 5, 3, 2, 32), backend).shape == (0, 5, 2, 32)


@pytest.mark.parametrize("backend, recompute", [*((name, True) for name in RUNS), ("sdpa", False)])
def test_a_block_compiles_without_a_graph_break(backend, recompute):
    torch.compiler.reset()  # every case compiles the same code object, which has a limit
    block = Block(ModelConfig.preset("vit_tiny"), 64, 2, 0.0, attention=backend, recompute=recompute)
    x, upstream = torch.randn(2, 9, 64, requires_grad=True), torch.randn(2, 9, 64)
    leaves = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x), leaves, upstream)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(x), leaves, upstream), expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_unknown_backend_is_named():
    text = "unknown attention backend 'flash9'; known: auto, flash2, flash3, flash4, xformers, varlen, sdpa"
    with pytest.raises(InputError, match=text):
        attention(torch.randn(1, 2, 3, 1, 4), "flash9")
    with pytest.raises(InputError, match=text):
        build_pretrainer(ModelConfig.preset("vit_tiny"), attention="flash9")  # at once, not at the first step


def test_a_named_backend_that_cannot_run_is_an_error_with_reason_and_alternatives():
    # float16 on a CPU: no GPU backend takes over, and none that needs one runs.
    for name in set(ATTENTION_BACKENDS) - {"auto", *RUNS}:
        with pytest.raises(InputError) as caught:
            attention(torch.randn(1, 4, 3, 1, 64, dtype=torch.float16), name)
        text = str(caught.value)
        assert f"attention backend {name!r} cannot run (cpu, float16, head dim 64, inference): " in text
        assert text.endswith(f"These can: {', '.join(RUNS)}")


def test_auto_logs_its_choice_once_and_a_named_backend_logs_nothing(fresh, caplog):
    caplog.set_level(logging.INFO)
    qkv = torch.randn(1, 4, 3, 1, 64)
    for _ in range(3):
        attention(qkv)
        attention(qkv.clone().requires_grad_())
        attention(qkv, "softmax")
    assert [record.getMessage() for record in caplog.records] == [
        "attention: auto takes sdpa (cpu, float32, head dim 64; order measured on cpu)"
    ]


def test_other_ranks_log_nothing(fresh, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("RANK", "1")
    attention(torch.randn(1, 4, 3, 1, 64))
    assert not caplog.records


def test_probes_run_once(fresh, monkeypatch):
    requests = []
    monkeypatch.setattr(
        backends.AttentionBackend, "why_not", lambda self, workload: requests.append((self.name, workload))
    )
    for tokens in (3, 4, 5):
        for head_dim in (32, 64):
            attention(torch.randn(1, tokens, 3, 1, head_dim, requires_grad=True), "sdpa_math")
    assert len(requests) == 2 and {workload.head_dim for _, workload in requests} == {32, 64}


def test_the_reference_forms_its_softmax_matrix():
    model = build_reference(ModelConfig.preset("vit_tiny"))
    assert {m.backend for m in model.modules() if isinstance(m, Attention)} == {"softmax"}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        model.encoder.blocks[0](torch.randn(2, 7, model.config.embed_dim))
    assert any(shape[-2:] == (7, 7) for shape in saved)


@pytest.mark.parametrize("backend", [name for name in RUNS if name != "softmax"])
def test_no_other_backend_but_the_composed_one_keeps_a_matrix(backend):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        attention(torch.randn(2, 7, 3, 2, 64, requires_grad=True), backend)
    assert any(shape[-2:] == (7, 7) for shape in saved) == (backend == "sdpa_math")


@pytest.mark.parametrize("backend", RUNS)
def test_parity_with_the_published_code(golden, backend):
    for name in ("tiny_dual", "tiny_classify"):
        assert passed(check_file(golden / f"{name}.npz", attention=backend)), (backend, name)


# --- the module ---------------------------------------------------------------------------------------------


def test_biases_are_on_q_and_v_only():
    layer = Attention(12, 3)
    torch.nn.init.normal_(layer.q_bias)
    torch.nn.init.normal_(layer.v_bias)
    x = torch.randn(2, 5, 12)
    q, k, v = (x @ layer.qkv.weight.T).chunk(3, dim=-1)
    packed = torch.stack([q + layer.q_bias, k, v + layer.v_bias], dim=2).unflatten(-1, (3, 4))
    expected = literal(packed.double(), 4**-0.5).float().flatten(2) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    assert {n for n, _ in layer.named_parameters()} == {
        "q_bias",
        "v_bias",
        "qkv.weight",
        "proj.weight",
        "proj.bias",
    }
    assert "q_bias" not in dict(Attention(12, 3, qkv_bias=False).named_parameters())


@pytest.mark.parametrize("backend", RUNS)
def test_cosine_attention_is_the_formula(backend):
    layer = Attention(12, 3, cos_attn=True, backend=backend)
    assert layer.scale.shape == (3, 1, 1) and math.isclose(
        float(layer.scale[0].detach()), math.log(10), rel_tol=1e-6
    )
    with torch.no_grad():
        layer.scale.copy_(torch.tensor([0.5, 2.0, 9.0]).view(3, 1, 1))  # the last is above the limit
    x = torch.randn(2, 6, 12)
    qkv = (x @ layer.qkv.weight.T).unflatten(-1, (3, 3, 4)).detach()
    q, k = (t / t.norm(dim=-1, keepdim=True) for t in (qkv[:, :, 0], qkv[:, :, 1]))
    factor = torch.tensor([math.exp(0.5), math.exp(2.0), math.exp(4.6052)]).view(1, 1, 3, 1)
    expected = literal(torch.stack([q * factor, k, qkv[:, :, 2]], dim=2).double(), 1.0).float()
    torch.testing.assert_close(layer(x), layer.proj(expected.flatten(2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cosine", [False, True])
def test_under_autocast_every_backend_gets_the_low_precision(cosine, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "vmae.model.attention.attention", lambda qkv, *_: seen.append(qkv.dtype) or qkv[:, :, 2]
    )
    layer, norm = Attention(64, 2, cos_attn=cosine), torch.nn.LayerNorm(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(1, 5, 64))
        layer(torch.randn(1, 5, 64), norm)
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("options", [{}, {"cos_attn": True}, {"qk_scale": 0.7}, {"qkv_bias": False}])
@pytest.mark.parametrize("backend", ["sdpa", "softmax"])
@torch.no_grad()
def test_weights_are_those_that_attention_multiplies_the_values_with(options, backend):
    layer, norm = Attention(24, 3, backend=backend, **options), torch.nn.LayerNorm(24)
    for parameter in (*layer.parameters(), *norm.parameters()):
        parameter.copy_(torch.randn_like(parameter))
    if layer.scale is not None:
        layer.scale.copy_(torch.tensor([0.5, 2.0, 6.0])[:, None, None])  # the last one is held below log 100
    x = torch.randn(2, 10, 24)
    for given, seen in (((x,), x), ((x, norm), norm(x))):
        weights = layer.weights(*given)
        assert weights.shape == (2, 3, 10, 10) and weights.dtype == torch.float32
        values = seen @ layer.qkv.weight[48:].T + (0 if layer.v_bias is None else layer.v_bias)
        mixed = weights @ values.unflatten(-1, (3, 8)).transpose(1, 2)
        torch.testing.assert_close(
            layer.proj(mixed.transpose(1, 2).flatten(2)), layer(*given), rtol=1e-4, atol=1e-3
        )
    assert layer.bfloat16().weights(x.bfloat16()).dtype == torch.float32
