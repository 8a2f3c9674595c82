"""How each attention backend is called: one function for equal sequences and, where the library has one, one
for packed.

Written from the documented signatures, each named at its function. A call on equal sequences takes `qkv [B,
N, 3, H, d]` and gives `[B, N, H, d]`; a packed call takes `qkv [T, 3, H, d]`, the tokens of all sequences one
after the other, and gives `[T, H, d]`. Nothing is transposed in memory: packed qkv goes on packed where the
library takes it, else as three views. SDPA and the plain one also take `mask [B, 1, 1, N]`, bool, True where
a key may be seen.

Legend: B clips, N tokens, H heads, d head width, T tokens of all clips together.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from vmae.model.attention.packed import Lengths


def softmax_attention(
    q_BHNd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """The plain one: the softmax matrix [B, H, N, N] is formed and saved."""
    scores = (q_BHNd * scale) @ k_BHNd.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v_BHNd


def softmax(qkv: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return softmax_attention(q, k, v, scale, mask).transpose(1, 2)


def _sdpa(qkv: Tensor, scale: float, mask: Tensor | None, kernel: SDPBackend | None) -> Tensor:
    # Unbound first and transposed then: the three gradients are stacked as [B, N, 3, H, d], which the linear
    # layer before takes as it is. Permuting qkv first stacks them as [3, B, H, N, d], and a second copy of 3
    # B N H d elements follows.
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def sdpa(qkv: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, ..., scale), [B, H, N,
    d], any strides."""
    return _sdpa(qkv, scale, mask, None)


def sdpa_flash(qkv: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    return _sdpa(qkv, scale, mask, SDPBackend.FLASH_ATTENTION)


def sdpa_cudnn(qkv: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    return _sdpa(qkv, scale, mask, SDPBackend.CUDNN_ATTENTION)


def sdpa_efficient(qkv: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    return _sdpa(qkv, scale, mask, SDPBackend.EFFICIENT_ATTENTION)


def sdpa_math(qkv: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    return _sdpa(qkv, scale, mask, SDPBackend.MATH)


def varlen(qkv: Tensor, lengths: Lengths, scale: float) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale),
    [T, H, d] each."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    starts, longest = lengths.starts, lengths.longest
    return _output(varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale))


def _output(result: Tensor | tuple) -> Tensor:
    """The output of a function that gives it alone or, in some versions, before the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


def flash2(qkv: Tensor, scale: float) -> Tensor:
    """flash_attn 2.8: flash_attn_qkvpacked_func(qkv [B, N, 3, H, d], dropout_p=0.0, softmax_scale=None,
    causal=False, ...).

    Its backward writes one packed gradient: nothing is stacked.
    """
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=scale)


def flash2_packed(qkv: Tensor, lengths: Lengths, scale: float) -> Tensor:
    """flash_attn 2.8: flash_attn_varlen_qkvpacked_func(qkv [T, 3, H, d], cu_seqlens int32 [B + 1],
    max_seqlen, ...)."""
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(
        qkv, lengths.starts, lengths.longest, dropout_p=0.0, softmax_scale=scale
    )


def flash3(qkv: Tensor, scale: float) -> Tensor:
    """FlashAttention-3, module flash_attn_interface: flash_attn_qkvpacked_func(qkv [B, N, 3, H, d],
    softmax_scale=None, ...).

    No dropout; packed gradient as in 2. Its first releases give (out, log-sum-exp).
    """
    from flash_attn_interface import flash_attn_qkvpacked_func

    return _output(flash_attn_qkvpacked_func(qkv, softmax_scale=scale))


def flash3_packed(qkv: Tensor, lengths: Lengths, scale: float) -> Tensor:
    """FlashAttention-3: flash_attn_varlen_func(q, k, v [T, H, d], cu_seqlens_q, _k, max_seqlen_q, _k, ...,
    softmax_scale)."""
    from flash_attn_interface import flash_attn_varlen_func

    q, k, v = qkv.unbind(1)
    starts, longest = lengths.starts, lengths.longest
    return _output(flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, softmax_scale=scale))


def flash4(qkv: Tensor, scale: float) -> Tensor:
    """FlashAttention-4, flash_attn.cute: flash_attn_func(q, k, v [B, N, H, d], ..., softmax_scale=None) ->
    (out, log-sum-exp).

    Nothing packed: three views in, and three gradients that autograd stacks.
    """
    from flash_attn.cute import flash_attn_func

    q, k, v = qkv.unbind(2)
    return _output(flash_attn_func(q, k, v, softmax_scale=scale))


def flash4_packed(qkv: Tensor, lengths: Lengths, scale: float) -> Tensor:
    """FlashAttention-4: flash_attn_varlen_func(q, k, v [T, H, d], ..., cu_seqlens_q, _k, max_seqlen_q, _k,
    ...).

    By keyword: what stands between v and cu_seqlens_q differs from release to release.
    """
    from flash_attn.cute import flash_attn_varlen_func

    q, k, v = qkv.unbind(1)
    ragged = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), lengths.starts)
    longest = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), lengths.longest)
    return _output(flash_attn_varlen_func(q, k, v, **ragged, **longest, softmax_scale=scale))


def xformers(qkv: Tensor, scale: float) -> Tensor:
    """xformers.ops.memory_efficient_attention(query, key, value [B, N, H, d], attn_bias=None, p=0.0,
    scale=None, *, op=None).

    Any strides whose last is 1; it dispatches to the best of its kernels for the device.
    """
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv.unbind(2)
    return memory_efficient_attention(q, k, v, scale=scale)


def xformers_packed(qkv: Tensor, lengths: Lengths, scale: float) -> Tensor:
    """The same with batch 1 and xformers.ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(q_seqlen)."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    q, k, v = qkv[None].unbind(2)
    bias = BlockDiagonalMask.from_seqlens(list(lengths.counts))
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)[0]
