"""Self-attention on packed q, k, v, through one function with named backends (`choice.py` lists
them).

Legend: B clips, N tokens, D width, H heads, d head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae.errors import InputError
from vmae.model.attention.calls import softmax_attention
from vmae.model.attention.choice import BACKENDS, NAMES, backend_of, choose, choose_name
from vmae.model.attention.packed import Lengths
from vmae.model.attention.probes import LONG, Workload
from vmae.model.recompute import norm_linear
from vmae.model.rows import Rows, select_linear
from vmae_kernels import select_decoded

__all__ = ["ATTENTION_BACKENDS", "Attention", "Lengths", "attention", "packed_attention", "softmax_attention"]

ATTENTION_BACKENDS = NAMES
LOG_100 = 4.6052  # as the published code writes it


def _chosen(*key) -> str:
    """`choose_name`, whose answer is a constant to torch.compile: the imports, device queries and probes that
    find it are not traced."""
    return choose_name(*key)


# What torch.compiler.assume_constant_result sets (torch 2.4 to 2.13); calling it would import torch._dynamo,
# 1.5 s, for all.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]  # an attribute set on a function


def attention(
    qkv: Tensor,
    backend: str = "auto",
    scale: float | None = None,
    *,
    query: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`softmax(q k^T * scale) v` for every head.

    Args:
        qkv: [B, N, 3, H, d], packed, any strides; with `query` k and v alone, [B, N, 2, H, d].
        backend: a name in `ATTENTION_BACKENDS`; "auto" takes the fastest that is installed and fits the
            device, the dtype and the head dim, and logs once which.
        scale: factor on the scores; None means `d ** -0.5`.
        query: [B, Nq, H, d], of fewer tokens than the keys.
        dropout: probability of a weight of the softmax matrix to become 0, the others scaled to keep the
            mean; drawn by torch's generator.

    Returns:
        [B, N, H, d], or [B, Nq, H, d].

    Raises:
        InputError: an unknown backend, or one that can't run here: the message says why, and what would.
            No other one runs in its place. "auto" never raises.
    """
    training = torch.is_grad_enabled() and qkv.requires_grad
    device, compiled = qkv.device, torch.compiler.is_compiling()
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()  # what every fused kernel asks for; qkv out of a linear layer has it
    long = qkv.shape[1] > LONG
    where = (backend, device.type, device.index, qkv.dtype, qkv.shape[-1])
    name = _chosen(*where, training, compiled, long, dropout > 0)
    call = BACKENDS[name].call
    assert call is not None  # `choose` refuses backends of packed sequences only
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    more = {"dropout": dropout} if dropout else {}
    return call(qkv, scale, **more) if query is None else call(qkv, scale, query=query, **more)


def packed_attention(
    qkv: Tensor,
    lengths: Lengths,
    backend: str = "auto",
    scale: float | None = None,
    *,
    query: Tensor | None = None,
    query_lengths: Lengths | None = None,
) -> Tensor:
    """`softmax(q k^T * scale) v` for every head, each sequence for itself.

    Args:
        qkv: [T, 3, H, d], sequences one after the other; with `query` k and v alone, [T, 2, H, d].
        lengths: of the sequences, T in total.
        backend, scale: as for `vmae.model.attention.attention`. A backend without a function for packed
            sequences pads them (B x longest rows) and hides the padding with a key mask.
        query, query_lengths: [Tq, H, d], of the same sequences, but fewer tokens of each.

    Returns:
        [T, H, d], or [Tq, H, d].

    Raises:
        InputError: an unknown backend, one that can't do this here, or `lengths` of another total.
    """
    for given, counts in ((qkv, lengths), (query, query_lengths)):
        if given is not None and counts is not None and given.shape[0] != counts.total:
            raise InputError(
                f"{given.shape[0]} packed tokens do not fit sequences of {counts.total} tokens in total"
            )
    training = torch.is_grad_enabled() and qkv.requires_grad
    workload = Workload.on(
        qkv.device, dtype=qkv.dtype, head_dim=qkv.shape[-1], training=training, packed=True
    )
    chosen = choose(backend, workload)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if chosen.packed is not None:
        return chosen.packed(qkv, lengths, scale, query, query_lengths)
    assert chosen.call is not None  # it has one of the two
    padded_query = None if query is None or query_lengths is None else query_lengths.padded(query)
    out = chosen.call(lengths.padded(qkv), scale, lengths.key_mask, padded_query)
    return out.flatten(0, 1).index_select(0, (query_lengths or lengths).padded_rows)


class Attention(nn.Module):
    """Multi-head self-attention with the published names: `qkv.weight`, `q_bias`, `v_bias`, `proj`.

    k has no bias: it would shift every score of a query alike. With `cos_attn`, q and k are normalised and a
    learned temperature per head replaces the fixed factor (Swin V2, equation 2): the exponential of `scale`
    [H, 1, 1], which is held below log 100. `drop` is the dropout of the softmax matrix in training (not in
    `of_rows`, which is for pre-training).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        cos_attn: bool = False,
        backend: str = "auto",
        drop: float = 0.0,
    ):
        super().__init__()
        self.drop = drop
        if backend != "auto":
            backend_of(backend)  # a misspelt name is an error now, not at the first step
        self.num_heads = num_heads
        self.qk_scale = qk_scale
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0))) if cos_attn else None
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x_BND: Tensor, norm: nn.LayerNorm | None = None, lengths: Lengths | None = None
    ) -> Tensor:
        """Attention of x, or of `norm(x)`, whose result is then not kept for the backward.

        With `lengths`, x is [1, T, D]: sequences of those lengths one after the other, each attending to
        itself alone.
        """
        qkv, scale = self._scored(x_BND, norm)
        dropped: dict[str, Any] = {"dropout": self.drop} if self.drop and self.training else {}
        if lengths is None:
            out = attention(qkv, self.backend, scale, **dropped)
        elif dropped:
            raise InputError("attention's dropout is for clips of equal lengths")
        else:
            out = packed_attention(qkv[0], lengths, self.backend, scale)[None]
        return self.proj(out.flatten(2))

    def of_rows(
        self, x_BND: Tensor, norm: nn.LayerNorm, rows: Rows, recompute: bool, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor]:
        """Some rows of x, [B, Nk, D], and the attention that they pay to `norm(x)`, all rows of it.

        With `recompute` x alone is kept for the backward of both. With `lengths`, x is [1, T, D].
        """
        bias, parts = self._bias(), [x_BND.shape[2], 2 * x_BND.shape[2]]
        q_weight, kv_weight = self.qkv.weight.split(parts)
        q_bias, kv_bias = (None, None) if bias is None else bias.split(parts)
        if recompute:
            picked, query = select_linear(x_BND, rows, norm, q_weight, q_bias)
            kv = norm_linear(x_BND, norm, kv_weight, kv_bias)
        else:
            picked, normed = select_decoded(
                x_BND, norm.weight, norm.bias, rows.keep, rows.uses, norm.eps, backend=rows.backend
            )
            query, kv = F.linear(normed, q_weight, q_bias), F.linear(norm(x_BND), kv_weight, kv_bias)
        query, kv = query.unflatten(-1, (self.num_heads, -1)), kv.unflatten(-1, (2, self.num_heads, -1))
        scale = self.qk_scale
        if self.scale is not None:
            query, k, v = self._cosine((query, *kv.unbind(2)), self.scale)
            kv, scale = torch.stack([k, v], dim=2), 1.0
        if lengths is None:
            out = attention(kv, self.backend, scale, query=query)
        else:
            out = packed_attention(
                kv[0], lengths, self.backend, scale, query=query[0], query_lengths=rows.lengths
            )[None]
        return picked, self.proj(out.flatten(2))

    def weights(self, x_BND: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """float32 [B, H, N, N]: how much each token (row) takes from each (column) in `forward`; rows sum to
        1.

        Computed with the whole matrix, to look at: the fused backends never hold it.
        """
        qkv, scale = self._scored(x_BND, norm)
        q, k, _ = qkv.float().permute(2, 0, 3, 1, 4)
        return (q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)

    def _scored(self, x_BND: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, float | None]:
        """qkv [B, N, 3, H, d] of x, or of `norm(x)`, and the factor on its scores."""
        bias = self._bias()
        if norm is None:
            qkv = F.linear(x_BND, self.qkv.weight, bias)
        else:
            qkv = norm_linear(x_BND, norm, self.qkv.weight, bias)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        if self.scale is not None:
            return torch.stack(self._cosine(qkv.unbind(2), self.scale), dim=2), 1.0
        return qkv, self.qk_scale

    def _bias(self) -> Tensor | None:
        """[3 D]: q's bias, zeros, v's bias, which the matrix product adds on its way out.

        Measured for 2 x 160 tokens of ViT-B in float32 on one core, where the product takes 23 ms: putting
        these 9 KB together takes 0.01 ms. The ways around it are no faster there and slower on a GPU: adding
        to q and v afterwards passes over two thirds of qkv once more (31 MB a layer at batch 32, in bf16
        rounded twice), three products read x three times, a kept copy goes stale in silence where FSDP swaps
        the parameters' storage.
        """
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])

    def _cosine(self, qkv: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv
        temperature = scale.clamp(max=LOG_100).exp().transpose(0, 1)  # [1, H, 1]
        q = F.normalize(q, dim=-1) * temperature
        # Autocast may have made norms float32: attention gets one dtype, that of the linear layer.
        return q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), v
