"""How each attention backend is called: one function for equal sequences and, where the library has one, one
for packed.

Written from the documented signatures, each named at its function. A call on equal sequences takes `qkv [B,
N, 3, H, d]` and gives `[B, N, H, d]`; a packed call takes `qkv [T, 3, H, d]`, the tokens of all sequences one
after the other, and gives `[T, H, d]`. With `query` of fewer tokens, `[B, Nq, H, d]` or `[Tq, H, d]` of
`query_lengths`, what is packed is k and v alone, `[..., 2, H, d]`, and the result has the query's tokens.
Those that have dropout (of the softmax matrix, drawn by torch's generator) take its probability.
Nothing is transposed in memory: what is packed goes on packed where the library takes it, else as views. SDPA
and the plain one also take `mask [B, 1, 1, N]`, bool, True where a key may be seen.

Legend: B clips, N tokens, Nq tokens with a query, H heads, d head width, T (Tq) such tokens of all clips
together.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from vmae.model.attention.packed import Lengths


def _parts(packed: Tensor, query: Tensor | None, dim: int = 2) -> tuple[Tensor, ...]:
    """q, k, v as views: of qkv, or the query and those of kv."""
    return packed.unbind(dim) if query is None else (query, *packed.unbind(dim))


def softmax_attention(
    q_BHNd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    scale: float,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The plain one: the softmax matrix [B, H, Nq, N] is formed and saved."""
    scores = (q_BHNd * scale) @ k_BHNd.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    return (F.dropout(weights, dropout) if dropout else weights) @ v_BHNd


def softmax(
    qkv: Tensor,
    scale: float,
    mask: Tensor | None = None,
    query: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in _parts(qkv, query))
    return softmax_attention(q, k, v, scale, mask, dropout).transpose(1, 2)


def _sdpa(
    qkv: Tensor,
    scale: float,
    mask: Tensor | None,
    query: Tensor | None,
    dropout: float,
    kernel: SDPBackend | None = None,
) -> Tensor:
    # Unbound first and transposed then: the three gradients are stacked as [B, N, 3, H, d], which the linear
    # layer before takes as it is. Permuting qkv first stacks them as [3, B, H, N, d], and a second copy of 3
    # B N H d elements follows.
    q, k, v = (x.transpose(1, 2) for x in _parts(qkv, query))
    with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)


def sdpa(
    qkv: Tensor,
    scale: float,
    mask: Tensor | None = None,
    query: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, ..., scale), [B, H, N,
    d], any strides."""
    return _sdpa(qkv, scale, mask, query, dropout)


def sdpa_flash(
    qkv: Tensor,
    scale: float,
    mask: Tensor | None = None,
    query: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    return _sdpa(qkv, scale, mask, query, dropout, SDPBackend.FLASH_ATTENTION)


def sdpa_cudnn(
    qkv: Tensor,
    scale: float,
    mask: Tensor | None = None,
    query: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    return _sdpa(qkv, scale, mask, query, dropout, SDPBackend.CUDNN_ATTENTION)


def sdpa_efficient(
    qkv: Tensor,
    scale: float,
    mask: Tensor | None = None,
    query: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    return _sdpa(qkv, scale, mask, query, dropout, SDPBackend.EFFICIENT_ATTENTION)


def sdpa_math(
    qkv: Tensor,
    scale: float,
    mask: Tensor | None = None,
    query: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    return _sdpa(qkv, scale, mask, query, dropout, SDPBackend.MATH)


def varlen(
    qkv: Tensor,
    lengths: Lengths,
    scale: float,
    query: Tensor | None = None,
    query_lengths: Lengths | None = None,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale),
    [T, H, d] each."""
    from torch.nn.attention.varlen import varlen_attn

    (starts_q, starts), (longest_q, longest) = _both(lengths, query_lengths)
    q, k, v = _parts(qkv, query, 1)
    return _output(varlen_attn(q, k, v, starts_q, starts, longest_q, longest, scale=scale))


def _both(lengths: Lengths, query_lengths: Lengths | None) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Starts of the queries' sequences and of the keys', and the longest of each."""
    both = (query_lengths or lengths, lengths)
    return tuple(each.starts for each in both), tuple(each.longest for each in both)


def _output(result: Tensor | tuple) -> Tensor:
    """The output of a function that gives it alone or, in some versions, before the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


def flash2(qkv: Tensor, scale: float, query: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """flash_attn 2.8: flash_attn_qkvpacked_func(qkv [B, N, 3, H, d], dropout_p=0.0, softmax_scale=None,
    causal=False, ...), flash_attn_kvpacked_func(q [B, Nq, H, d], kv [B, N, 2, H, d], the same).

    Its backward writes one packed gradient: nothing is stacked.
    """
    from flash_attn import flash_attn_kvpacked_func, flash_attn_qkvpacked_func

    if query is not None:
        return flash_attn_kvpacked_func(query, qkv, dropout_p=dropout, softmax_scale=scale)
    return flash_attn_qkvpacked_func(qkv, dropout_p=dropout, softmax_scale=scale)


def flash2_packed(
    qkv: Tensor,
    lengths: Lengths,
    scale: float,
    query: Tensor | None = None,
    query_lengths: Lengths | None = None,
) -> Tensor:
    """flash_attn 2.8: flash_attn_varlen_qkvpacked_func(qkv [T, 3, H, d], cu_seqlens int32 [B + 1],
    max_seqlen, ...), flash_attn_varlen_kvpacked_func(q [Tq, H, d], kv [T, 2, H, d], cu_seqlens_q, _k,
    max_seqlen_q, _k, ...)."""
    from flash_attn import flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

    if query is not None:
        starts, longest = _both(lengths, query_lengths)
        return flash_attn_varlen_kvpacked_func(
            query, qkv, *starts, *longest, dropout_p=0.0, softmax_scale=scale
        )
    return flash_attn_varlen_qkvpacked_func(
        qkv, lengths.starts, lengths.longest, dropout_p=0.0, softmax_scale=scale
    )


def flash3(qkv: Tensor, scale: float, query: Tensor | None = None) -> Tensor:
    """FlashAttention-3, module flash_attn_interface: flash_attn_qkvpacked_func(qkv [B, N, 3, H, d],
    softmax_scale=None, ...), flash_attn_func(q, k, v [B, N, H, d], softmax_scale=None, ...).

    No dropout; packed gradient as in 2, but none for k and v alone. Its first releases give (out,
    log-sum-exp).
    """
    from flash_attn_interface import flash_attn_func, flash_attn_qkvpacked_func

    if query is not None:
        return _output(flash_attn_func(*_parts(qkv, query), softmax_scale=scale))
    return _output(flash_attn_qkvpacked_func(qkv, softmax_scale=scale))


def flash3_packed(
    qkv: Tensor,
    lengths: Lengths,
    scale: float,
    query: Tensor | None = None,
    query_lengths: Lengths | None = None,
) -> Tensor:
    """FlashAttention-3: flash_attn_varlen_func(q, k, v [T, H, d], cu_seqlens_q, _k, max_seqlen_q, _k, ...,
    softmax_scale)."""
    from flash_attn_interface import flash_attn_varlen_func

    starts, longest = _both(lengths, query_lengths)
    return _output(flash_attn_varlen_func(*_parts(qkv, query, 1), *starts, *longest, softmax_scale=scale))


def flash4(qkv: Tensor, scale: float, query: Tensor | None = None) -> Tensor:
    """FlashAttention-4, flash_attn.cute: flash_attn_func(q, k, v [B, N, H, d], ..., softmax_scale=None) ->
    (out, log-sum-exp).

    Nothing packed: three views in, and three gradients that autograd stacks.
    """
    from flash_attn.cute import flash_attn_func

    return _output(flash_attn_func(*_parts(qkv, query), softmax_scale=scale))


def flash4_packed(
    qkv: Tensor,
    lengths: Lengths,
    scale: float,
    query: Tensor | None = None,
    query_lengths: Lengths | None = None,
) -> Tensor:
    """FlashAttention-4: flash_attn_varlen_func(q, k, v [T, H, d], ..., cu_seqlens_q, _k, max_seqlen_q, _k,
    ...).

    By keyword: what stands between v and cu_seqlens_q differs from release to release.
    """
    from flash_attn.cute import flash_attn_varlen_func

    starts, longest = _both(lengths, query_lengths)
    ragged = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts))
    most = dict(zip(("max_seqlen_q", "max_seqlen_k"), longest))
    return _output(flash_attn_varlen_func(*_parts(qkv, query, 1), **ragged, **most, softmax_scale=scale))


def xformers(qkv: Tensor, scale: float, query: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """xformers.ops.memory_efficient_attention(query, key, value [B, N, H, d], attn_bias=None, p=0.0,
    scale=None, *, op=None).

    Any strides whose last is 1; it dispatches to the best of its kernels for the device.
    """
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*_parts(qkv, query), p=dropout, scale=scale)


def xformers_packed(
    qkv: Tensor,
    lengths: Lengths,
    scale: float,
    query: Tensor | None = None,
    query_lengths: Lengths | None = None,
) -> Tensor:
    """The same with batch 1 and xformers.ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(q_seqlen,
    kv_seqlen=None)."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    q, k, v = (x[None] for x in _parts(qkv, query, 1))
    counts = [list(each.counts) for each in (query_lengths, lengths) if each is not None]
    bias = BlockDiagonalMask.from_seqlens(*counts)
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)[0]
