"""Backends that this machine lacks: their probes' answers, and how they would be called.

The libraries are faked in `sys.modules`. A fake function has the documented signature (a wrong keyword is a
TypeError), checks shapes, dtypes and strides as the real one does, and computes the plain attention: results
and gradients are checked too.
"""

import importlib.machinery
import inspect
import sys
import types
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn import attention as torch_attention

from vmae import InputError
from vmae.model.attention import attention, packed_attention, probes
from vmae.model.attention import choice as backends
from vmae.model.attention.choice import BACKENDS, choose, why_not
from vmae.model.attention.packed import Lengths
from vmae.model.attention.probes import Workload

HALF = (torch.float16, torch.bfloat16)
HOPPER = Workload(device="cuda", capability=(9, 0), dtype=torch.bfloat16, head_dim=88)
BLACKWELL = Workload(device="cuda", capability=(10, 0), dtype=torch.bfloat16, head_dim=88)
AMPERE = Workload(device="cuda", capability=(8, 6), dtype=torch.bfloat16, head_dim=88)
TURING = Workload(device="cuda", capability=(7, 5), dtype=torch.float16, head_dim=64)
AMD = Workload(device="cuda", capability=(9, 4), hip=True, dtype=torch.bfloat16, head_dim=64)
NOT_REGISTERED = "this build does not register its kernels as torch operators, which torch.compile needs"
NOT_TRACED = "torch.compile cannot trace it (sdpa_flash4 calls the same kernels through torch, which it can)"


@pytest.fixture(autouse=True)
def _fresh():
    known = (backends.choose, backends.choose_name, backends.say_once)
    for function in known:
        function.cache_clear()
    yield
    for function in known:
        function.cache_clear()


@pytest.fixture(autouse=True)
def _torch_kernels_unasked(monkeypatch):
    """Without a GPU to ask torch about, assume that its kernels run on every GPU, except for float32."""

    def refuse_float32(question, workload):
        return "torch says: no float32" if workload.dtype == torch.float32 else None

    monkeypatch.setattr(probes, "_torch_refuses", refuse_float32)


# --- fakes --------------------------------------------------------------------------------------------------


def plain(q, k, v, scale):
    """[B, N, H, d] or [N, H, d]."""
    q, k, v = (x.transpose(-2, -3).float() for x in (q, k, v))
    return ((q @ k.transpose(-1, -2) * scale).softmax(-1) @ v).transpose(-2, -3)


def check(x, dims, dtypes=HALF, heads=None):
    assert (
        x.dim() == dims
        and x.dtype in dtypes
        and x.stride(-1) == 1
        and x.shape[-1] <= 256
        and x.shape[-1] % 8 == 0
    )
    assert heads is None or x.shape[-2] == heads


def each(parts, starts, scale, key_starts=None, longest=None):
    """Sequence by sequence of [T, H, d] parts; `longest` as the caller gave them, of queries and keys."""
    q, k, v = parts
    both = starts, (starts if key_starts is None else key_starts)
    for x, ends, given in zip((q, k), both, longest or (None, None)):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.dim() == 1
        assert ends[0] == 0 and ends[-1] == x.shape[0] and ends.shape == starts.shape
        assert given is None or (type(given) is int and given == int(ends.diff().max()))
    cuts = [zip(ends.tolist(), ends[1:].tolist()) for ends in both]
    return torch.cat([plain(q[a:b], k[c:d], v[c:d], scale) for (a, b), (c, d) in zip(*cuts)])


class Calls(list):
    """Arguments that the fake functions got."""

    def note(self, *tensors):
        self.append([(x.data_ptr(), tuple(x.stride())) for x in tensors])


def module(monkeypatch, name, **contents):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__path__ = []
    for key, value in contents.items():
        setattr(made, key, value)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def fake_flash2(monkeypatch, version="2.8.3"):
    calls = Calls()

    def flash_attn_qkvpacked_func(
        qkv,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        check(qkv, 5)
        assert qkv.shape[2] == 3 and dropout_p == 0.0 and not causal
        calls.note(qkv)
        return plain(*qkv.unbind(2), softmax_scale).to(qkv.dtype)

    def flash_attn_varlen_qkvpacked_func(
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        check(qkv, 4)
        assert qkv.shape[1] == 3 and dropout_p == 0.0 and not causal and type(max_seqlen) is int
        assert max_seqlen == int(cu_seqlens.diff().max())
        calls.note(qkv)
        return each(qkv.unbind(1), cu_seqlens, softmax_scale).to(qkv.dtype)

    def flash_attn_kvpacked_func(
        q,
        kv,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        check(q, 4), check(kv, 5)
        assert kv.shape[2] == 2 and dropout_p == 0.0 and not causal
        calls.note(q, kv)
        return plain(q, *kv.unbind(2), softmax_scale).to(q.dtype)

    def flash_attn_varlen_kvpacked_func(
        q,
        kv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        check(q, 3), check(kv, 4)
        assert kv.shape[1] == 2 and dropout_p == 0.0 and not causal
        calls.note(q, kv)
        longest = max_seqlen_q, max_seqlen_k
        return each((q, *kv.unbind(1)), cu_seqlens_q, softmax_scale, cu_seqlens_k, longest).to(q.dtype)

    functions = dict(
        flash_attn_qkvpacked_func=flash_attn_qkvpacked_func,
        flash_attn_kvpacked_func=flash_attn_kvpacked_func,
        flash_attn_varlen_qkvpacked_func=flash_attn_varlen_qkvpacked_func,
        flash_attn_varlen_kvpacked_func=flash_attn_varlen_kvpacked_func,
    )
    module(monkeypatch, "flash_attn", __version__=version, **functions)
    return calls


def fake_flash3(monkeypatch, version="3.0.0", with_lse=False):
    calls = Calls()

    def answer(out):
        return (out, None) if with_lse else out

    def flash_attn_qkvpacked_func(
        qkv,
        softmax_scale=None,
        causal=False,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        deterministic=False,
        num_heads_q=None,
        sm_margin=0,
        return_attn_probs=False,
    ):
        check(qkv, 5)
        assert qkv.shape[-3] == 3 and not causal
        calls.note(qkv)
        return answer(plain(*qkv.unbind(-3), softmax_scale).to(qkv.dtype))

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        for x in (q, k, v):
            check(x, 3)
        calls.note(q, k, v)
        longest = max_seqlen_q, max_seqlen_k
        return answer(each((q, k, v), cu_seqlens_q, softmax_scale, cu_seqlens_k, longest).to(q.dtype))

    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        for x in (q, k, v):
            check(x, 4)
        assert not causal and qv is None
        calls.note(q, k, v)
        return answer(plain(q, k, v, softmax_scale).to(q.dtype))

    functions = dict(
        flash_attn_qkvpacked_func=flash_attn_qkvpacked_func,
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
    )
    return calls, module(monkeypatch, "flash_attn_interface", __version__=version, **functions)


def fake_flash4(monkeypatch, version="4.0.0b36"):
    calls = Calls()

    def flash_attn_func(
        q,
        k,
        v,
        qv=None,
        gather_kv_indices=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        return_lse=False,
    ):
        for x in (q, k, v):
            check(x, 4)
        calls.note(q, k, v)
        return plain(q, k, v, softmax_scale).to(q.dtype), None

    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
    ):
        for x in (q, k, v):
            check(x, 3)
        assert qv is None and not causal
        calls.note(q, k, v)
        longest = max_seqlen_q, max_seqlen_k
        return each((q, k, v), cu_seqlens_q, softmax_scale, cu_seqlens_k, longest).to(q.dtype), None

    if "flash_attn" not in sys.modules:
        module(monkeypatch, "flash_attn")  # flash-attn-4 alone leaves a bare namespace there
    functions = dict(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    module(monkeypatch, "flash_attn.cute", __version__=version, **functions)
    return calls


def fake_xformers(monkeypatch, version="0.0.35", loads=True):
    calls = Calls()

    class BlockDiagonalMask:
        def __init__(self, *lengths):
            self.starts = [torch.tensor([0, *counts]).cumsum(0).int() for counts in lengths]

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None):
            assert type(q_seqlen) is list and (kv_seqlen is None or len(kv_seqlen) == len(q_seqlen))
            return cls(q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen)

    def memory_efficient_attention(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        for x in (query, key, value):
            check(x, 4, (*HALF, torch.float32))
        calls.note(query, key, value)
        if attn_bias is None:
            return plain(query, key, value, scale).to(query.dtype)
        assert query.shape[0] == 1
        starts, key_starts = attn_bias.starts
        return each((query[0], key[0], value[0]), starts, scale, key_starts).to(query.dtype)[None]

    class FwOp:
        @classmethod
        def is_available(cls):
            return loads

    bias = module(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    fmha = module(monkeypatch, "xformers.ops.fmha", attn_bias=bias, cutlass=types.SimpleNamespace(FwOp=FwOp))
    ops = module(
        monkeypatch,
        "xformers.ops",
        memory_efficient_attention=memory_efficient_attention,
        fmha=fmha,
        __version__=version,
    )
    module(monkeypatch, "xformers", ops=ops, __version__=version)
    return calls


FAKES = {
    "flash2": fake_flash2,
    "flash3": lambda patch: fake_flash3(patch)[0],
    "flash4": fake_flash4,
    "xformers": fake_xformers,
}


@pytest.fixture
def on_hopper(monkeypatch):
    """Pretend that every tensor is on a Hopper GPU."""

    def on(device, **settings):
        return Workload(device="cuda", capability=(9, 0), **settings)

    monkeypatch.setattr(Workload, "on", on)


# --- calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 80, 88])
@pytest.mark.parametrize("name", FAKES)
def test_called_as_documented_without_a_copy(name, head_dim, on_hopper, monkeypatch):
    calls = FAKES[name](monkeypatch)
    qkv = torch.randn(2, 9, 3, 2, head_dim).bfloat16().requires_grad_()
    out, expected = attention(qkv, name), attention(qkv, "softmax")
    assert out.shape == (2, 9, 2, head_dim) and out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    upstream = torch.randn_like(out)
    gradients = [torch.autograd.grad(x, qkv, upstream, retain_graph=True)[0] for x in (out, expected)]
    torch.testing.assert_close(*gradients, atol=5e-2, rtol=5e-2)
    (given,) = calls
    step, row = qkv.shape[3] * head_dim, 3 * qkv.shape[3] * head_dim
    if len(given) == 1:  # packed, the very tensor
        assert given == [(qkv.data_ptr(), tuple(qkv.stride()))]
    else:  # three views into it
        stride = (9 * row, row, head_dim, 1)
        assert given == [(qkv.data_ptr() + i * step * qkv.element_size(), stride) for i in range(3)]


@pytest.mark.parametrize("name", FAKES)
def test_fewer_queries_than_keys_called_as_documented(name, on_hopper, monkeypatch):
    calls = FAKES[name](monkeypatch)
    query, kv = torch.randn(2, 4, 2, 80).bfloat16(), torch.randn(2, 9, 2, 2, 80).bfloat16()
    leaves = query.requires_grad_(), kv.requires_grad_()
    out, expected = (attention(kv, way, 0.3, query=query) for way in (name, "softmax"))
    assert out.shape == (2, 4, 2, 80) and len(calls) == 1
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    upstream = torch.randn_like(out)
    found = [torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (out, expected)]
    for got, true in zip(*found):
        torch.testing.assert_close(got, true, atol=5e-2, rtol=5e-2)
    (given,) = calls
    assert given[0][0] == query.data_ptr() and given[1][0] == kv.data_ptr()  # no copy of either


@pytest.mark.parametrize("name", FAKES)
def test_fewer_packed_queries_called_as_documented(name, on_hopper, monkeypatch):
    calls = FAKES[name](monkeypatch)
    query, kv = torch.randn(6, 2, 80).bfloat16(), torch.randn(10, 2, 2, 80).bfloat16()
    lengths, query_lengths = (Lengths(counts, torch.device("cpu")) for counts in ((3, 1, 6), (2, 1, 3)))
    out, expected = (
        packed_attention(kv, lengths, way, query=query, query_lengths=query_lengths)
        for way in (name, "softmax")
    )
    assert out.shape == (6, 2, 80) and len(calls) == 1
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", FAKES)
def test_scale_is_passed_on(name, on_hopper, monkeypatch):
    FAKES[name](monkeypatch)
    qkv = torch.randn(1, 5, 3, 1, 64).bfloat16()
    torch.testing.assert_close(
        attention(qkv, name, 0.9), attention(qkv, "softmax", 0.9), atol=3e-2, rtol=3e-2
    )


@pytest.mark.parametrize("name", FAKES)
def test_packed_sequences_called_as_documented(name, on_hopper, monkeypatch):
    calls = FAKES[name](monkeypatch)
    lengths = Lengths((3, 1, 6), torch.device("cpu"))
    qkv = torch.randn(10, 3, 2, 80).bfloat16().requires_grad_()
    out, expected = packed_attention(qkv, lengths, name), packed_attention(qkv, lengths, "softmax")
    assert out.shape == (10, 2, 80) and len(calls) == 1 and calls[0][0][0] == qkv.data_ptr()
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    upstream = torch.randn_like(out)
    gradients = [torch.autograd.grad(x, qkv, upstream, retain_graph=True)[0] for x in (out, expected)]
    torch.testing.assert_close(*gradients, atol=5e-2, rtol=5e-2)


def test_torch_varlen_called_as_documented(on_hopper, monkeypatch):
    from torch.nn.attention import varlen

    seen = []

    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        for x in (query, key, value):
            check(x, 3)
        seen.append(scale)
        return each((query, key, value), cu_seq_q, scale, cu_seq_k, (max_q, max_k)).to(query.dtype)

    assert list(inspect.signature(varlen.varlen_attn).parameters) == list(
        inspect.signature(varlen_attn).parameters
    )
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    lengths = Lengths((3, 1, 6), torch.device("cpu"))
    qkv = torch.randn(10, 3, 2, 88).bfloat16()
    out = packed_attention(qkv, lengths, "varlen")
    torch.testing.assert_close(out, packed_attention(qkv, lengths, "softmax"), atol=2e-2, rtol=2e-2)
    query, query_lengths = torch.randn(5, 2, 88).bfloat16(), Lengths((1, 1, 3), torch.device("cpu"))
    found = [
        packed_attention(qkv[:, 1:], lengths, name, query=query, query_lengths=query_lengths)
        for name in ("varlen", "softmax")
    ]
    torch.testing.assert_close(*found, atol=2e-2, rtol=2e-2)
    assert seen == [88**-0.5] * 2
    with pytest.raises(
        InputError, match="'varlen' cannot run .*: for sequences of unequal lengths only. These can: "
    ):
        attention(torch.randn(1, 5, 3, 1, 64).bfloat16(), "varlen")


def test_first_releases_of_flash3_give_the_log_sum_exp_too(on_hopper, monkeypatch):
    fake_flash3(monkeypatch, with_lse=True)
    assert attention(torch.randn(1, 5, 3, 1, 64).bfloat16(), "flash3").shape == (1, 5, 1, 64)
    qkv, lengths = torch.randn(5, 3, 1, 64).bfloat16(), Lengths((2, 3), torch.device("cpu"))
    assert packed_attention(qkv, lengths, "flash3").shape == (5, 1, 64)


# --- probes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4", "xformers", "sdpa_flash3", "sdpa_flash4"])
def test_absent(name):
    assert why_not(name, HOPPER).endswith("is not installed")
    assert BACKENDS[name].install and BACKENDS[name].version() is None


def test_a_namespace_left_by_flash4_is_not_flash2(monkeypatch):
    fake_flash4(monkeypatch)
    assert why_not("flash2", HOPPER) == "flash-attn is not installed"
    assert why_not("flash4", HOPPER) is None


def test_wrong_version_or_build(monkeypatch, tmp_path):
    fake_flash2(monkeypatch, "2.6.3")
    assert why_not("flash2", HOPPER) == "flash-attn 2.6.3 is too old: 2.7 or later"
    fake_xformers(monkeypatch, "0.0.28")
    assert why_not("xformers", HOPPER) == "xformers 0.0.28 is too old: 0.0.35 or later"
    fake_xformers(monkeypatch, loads=False)
    assert why_not("xformers", HOPPER) == f"its compiled kernels do not load with torch {torch.__version__}"
    _, interface = fake_flash3(monkeypatch)
    del interface.flash_attn_varlen_func
    assert why_not("flash3", HOPPER) == "flash_attn_3 3.0.0 has no flash_attn_varlen_func"


@pytest.mark.parametrize(
    "line, text",
    [
        ("raise OSError('libc10.so: undefined symbol\\nmore')", "libc10.so: undefined symbol"),
        ("import no_such_part", "No module named 'no_such_part'"),
    ],
)
def test_a_broken_installation_is_a_reason_not_a_crash(line, text, monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text(line)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert why_not("flash2", HOPPER) == f"flash-attn does not import: {text}"
    assert choose("auto", HOPPER).name == "sdpa"


@pytest.mark.parametrize(
    "name, workload, reason",
    [
        ("flash2", Workload(dtype=torch.bfloat16), "runs on a GPU, not on cpu"),
        ("flash2", TURING, "needs compute capability 8.0 or later, this GPU has 7.5"),
        ("flash2", AMPERE, None),
        ("flash2", AMD, None),
        ("flash3", AMPERE, "needs compute capability 9.x, this GPU has 8.6"),
        ("flash3", BLACKWELL, "needs compute capability 9.x, this GPU has 10.0"),
        ("flash3", AMD, "runs on NVIDIA GPUs only"),
        ("flash3", HOPPER, None),
        ("flash4", AMPERE, "needs compute capability 9.x or 10.x or 11.x, this GPU has 8.6"),
        ("flash4", BLACKWELL, None),
        ("xformers", TURING, None),
        ("xformers", Workload(device="mps"), "runs on a GPU, not on mps"),
        ("varlen", HOPPER, "for sequences of unequal lengths only"),
        ("sdpa_flash", Workload(dropout=True), "has no dropout"),
        ("sdpa_cudnn", Workload(), "runs on a GPU, not on cpu"),
        ("sdpa_cudnn", AMD, "runs on NVIDIA GPUs only"),
        ("sdpa_efficient", Workload(device="cuda"), "torch sees no GPU here"),
        ("sdpa_math", Workload(device="meta"), None),
    ],
)
def test_device(name, workload, reason, monkeypatch):
    for fake in FAKES.values():
        fake(monkeypatch)
    assert why_not(name, workload) == reason


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("flash2", dict(dtype=torch.float32), "takes float16 and bfloat16, not float32"),
        ("flash3", dict(dtype=torch.float64), "takes float16 and bfloat16, not float64"),
        ("xformers", dict(dtype=torch.float32), None),
        ("sdpa_flash", dict(dtype=torch.float32), "torch says: no float32"),
        ("flash2", dict(head_dim=20), "takes head dims that are multiples of 8, up to 256, not 20"),
        ("flash2", dict(head_dim=264), "takes head dims that are multiples of 8, up to 256, not 264"),
        ("flash3", dict(dropout=True), "has no dropout"),
        ("flash4", dict(dropout=True), "has no dropout"),
        ("flash2", dict(dropout=True), None),
        ("flash2", dict(compiled=True), None),
        ("flash3", dict(compiled=True), NOT_REGISTERED),
        ("flash4", dict(compiled=True), NOT_TRACED),
        ("sdpa_flash4", dict(compiled=True), None),
        ("sdpa_flash3", dict(packed=True), "takes no sequences of unequal lengths"),
        ("varlen", dict(packed=True), None),
    ],
)
def test_dtype_head_dim_dropout_and_compilation(name, change, reason, monkeypatch):
    for fake in FAKES.values():
        fake(monkeypatch)
    assert why_not(name, replace(HOPPER, **change)) == reason


def test_flash4_on_blackwell_stops_at_128(monkeypatch):
    fake_flash4(monkeypatch)
    wide = replace(BLACKWELL, head_dim=192)
    assert why_not("flash4", wide) == "takes head dims that are multiples of 8, up to 128, not 192"


def test_flash3_registered_with_torch_compiles(monkeypatch):
    _, interface = fake_flash3(monkeypatch)

    @torch.library.custom_op("vmae_test::fake_flash3_forward", mutates_args=())
    def forward(q: torch.Tensor) -> torch.Tensor:
        return q.clone()

    interface._flash_attn_forward = forward
    assert why_not("flash3", replace(HOPPER, compiled=True)) is None


def test_torch_own_reasons_are_passed_on(monkeypatch):
    monkeypatch.undo()  # of the fixture that answers for torch

    def question(params, debug):
        assert (
            debug
            and params.query.shape == (1, 1, 8, 88)
            and params.query.requires_grad
            and params.attn_mask is None
        )
        warnings.warn("Head dim is odd. (Triggered internally at /x.cpp:1.)", stacklevel=1)
        return False

    workload = Workload(head_dim=88)
    assert probes._torch_refuses(question, workload) == "torch says: Head dim is odd."
    assert probes._torch_refuses(lambda params, debug: True, workload) is None
    # Without a GPU torch cannot make the tensor: a reason, not an error.
    if not torch.cuda.is_available():
        assert why_not("sdpa_cudnn", HOPPER).startswith("its probe failed: ")


def test_another_implementation_in_the_place_of_torchs(monkeypatch):
    """`activate_flash_attention_impl` changes the whole process: it is logged once, and sdpa_flash no longer
    claims to be torch's own kernel."""
    fake_flash3(monkeypatch)
    fake_flash4(monkeypatch)
    active = []
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(
        torch_attention, "current_flash_attention_impl", lambda: active[-1] if active else None
    )
    assert choose("sdpa_flash", HOPPER).name == "sdpa_flash" and not active
    assert choose("auto", HOPPER).name == "flash3" and not active
    for head_dim in (64, 88):
        assert choose("sdpa_flash3", replace(HOPPER, head_dim=head_dim)).name == "sdpa_flash3"
    assert active == ["FA3"]
    with pytest.raises(InputError, match=r"this process has put FA3 in its place \(sdpa_flash3\)"):
        choose("sdpa_flash", HOPPER)
    with pytest.raises(InputError, match="has put FA3 in the place of torch's flash kernel"):
        choose("sdpa_flash4", HOPPER)


# --- auto ---------------------------------------------------------------------------------------------------


def test_auto_takes_the_first_that_runs(monkeypatch):
    assert choose("auto", HOPPER).name == "sdpa"
    for fake in FAKES.values():
        fake(monkeypatch)
    choose.cache_clear()
    expected = {HOPPER: "flash3", BLACKWELL: "flash4", AMPERE: "flash2", TURING: "sdpa", AMD: "flash2"}
    assert {w: choose("auto", w).name for w in expected} == expected
    assert choose("auto", replace(HOPPER, dtype=torch.float32)).name == "sdpa"
    assert choose("auto", replace(BLACKWELL, compiled=True)).name == "sdpa"
    assert choose("auto", Workload(device="mps")).name == "sdpa"


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "softmax"),
        ({"dtype": torch.float32}, "sdpa"),
        ({"dtype": torch.float16}, "sdpa"),  # not measured
        ({"long": True}, "sdpa"),  # the softmax matrix would be large
        ({"packed": True}, "sdpa"),  # and padded
    ],
)
def test_auto_on_a_cpu_is_by_dtype_and_length(changes, name):
    workload = replace(Workload(dtype=torch.bfloat16), **changes)
    assert choose("auto", workload).name == name
    assert backends.auto_order(workload)[1] == (not workload.packed and workload.dtype != torch.float16)


@pytest.mark.parametrize("tokens, name", [(probes.LONG, "softmax"), (probes.LONG + 1, "sdpa")])
def test_long_sequences_are_told_by_their_tokens(monkeypatch, tokens, name):
    called = []
    for other in ("sdpa", "softmax"):
        fake = replace(
            BACKENDS[other], call=lambda qkv, scale, other=other: called.append(other) or qkv[:, :, 0]
        )
        monkeypatch.setitem(BACKENDS, other, fake)
    attention(torch.zeros(1, tokens, 3, 1, 8, dtype=torch.bfloat16))
    assert called == [name]


def test_auto_pads_only_where_nothing_takes_packed_sequences(monkeypatch):
    packed = replace(AMPERE, packed=True)
    assert choose("auto", packed).name == "varlen"
    assert choose("auto", replace(packed, dtype=torch.float32)).name == "sdpa"
    fake_flash2(monkeypatch)
    choose.cache_clear()
    assert choose("auto", packed).name == "flash2"


def test_auto_says_why_not_the_faster_ones(caplog):
    caplog.set_level("INFO")
    choose("auto", AMPERE)
    text = caplog.records[-1].getMessage()
    assert "auto takes sdpa (cuda sm_86, bfloat16, head dim 88; order expected, not measured on sm_80" in text
    assert "not flash2: flash-attn is not installed" in text


def test_auto_never_raises(monkeypatch):
    def broken(workload):
        raise RuntimeError("driver gone")

    for name in set(BACKENDS) - {"softmax"}:
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], probe=broken))
    for workload in (HOPPER, Workload(), Workload(device="cuda"), replace(HOPPER, packed=True)):
        assert choose("auto", workload).name == "softmax"
    with pytest.raises(InputError, match="its probe failed: RuntimeError: driver gone. These can: softmax"):
        choose("sdpa", HOPPER)


def test_tiles_of_the_head_dims():
    """The table at the top of vmae/model/attention/choice.py."""
    expected = {
        "flash2": {64: (64, 64), 80: (96, 96), 88: (96, 96)},
        "flash3": {32: (64, 64), 80: (96, 96), 88: (96, 96)},
        "flash4": {80: (80, 80), 88: (96, 96)},
        "sdpa_flash": {80: (96, 96), 88: (96, 96)},
        "sdpa_efficient": {64: (64, 64), 80: (96, 128), 88: (96, 128)},
        "sdpa_cudnn": {80: None},
        "softmax": {88: (88, 88)},
    }
    for name, widths in expected.items():
        assert {d: BACKENDS[name].tiles(d, True) for d in widths} == widths
    assert BACKENDS["sdpa_flash"].tiles(88, False) == BACKENDS["sdpa"].tiles(88, False) == (88, 88)
