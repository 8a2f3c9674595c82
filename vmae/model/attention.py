"""Self-attention on packed q, k, v, through one function with named backends.

Legend: B clips, N tokens, H heads, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae.errors import InputError
from vmae.model.recompute import norm_linear

ATTENTION_BACKENDS = ("auto", "sdpa", "softmax")


def softmax_attention(q_BHNd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, scale: float) -> Tensor:
    """The plain one: the softmax matrix [B, H, N, N] is formed and saved."""
    scores = (q_BHNd * scale) @ k_BHNd.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v_BHNd


def attention(qkv: Tensor, backend: str = "auto", scale: float | None = None) -> Tensor:
    """`softmax(q k^T * scale) v` for every head.

    Args:
        qkv: [B, N, 3, H, d], packed.
        backend: "sdpa" (torch's scaled_dot_product_attention, which picks a flash kernel where it has one), "softmax" (the
            plain one) or "auto" (sdpa).
        scale: factor on the scores; None means `d ** -0.5`.

    Returns:
        [B, N, H, d].

    Raises:
        InputError: an unknown backend.
    """
    if backend not in ATTENTION_BACKENDS:
        raise InputError(f"unknown attention backend {backend!r}; known: {', '.join(ATTENTION_BACKENDS)}")
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if backend == "softmax":
        return softmax_attention(q, k, v, scale).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with the published names: `qkv.weight`, `q_bias`, `v_bias`, `proj`.

    k has no bias: it would shift every score of a query alike. With `cos_attn`, q and k are normalised and a learned
    temperature per head replaces the fixed factor (Swin V2, equation 2): the exponential of `scale` [H, 1, 1], which is held
    below 4.6052, log 100 as the published code writes it.
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
    ):
        super().__init__()
        self.num_heads = num_heads
        self.qk_scale = qk_scale
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0))) if cos_attn else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """Attention of x, or of `norm(x)`, whose result is then not kept for the backward."""
        bias = None
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        if norm is None:
            qkv = F.linear(x_BND, self.qkv.weight, bias)
        else:
            qkv = norm_linear(x_BND, norm, self.qkv.weight, bias)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        if self.scale is None:
            out = attention(qkv, self.backend, self.qk_scale)
        else:
            out = attention(self._cosine(qkv), self.backend, 1.0)
        return self.proj(out.flatten(2))

    def _cosine(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(2)
        temperature = self.scale.clamp(max=4.6052).exp().transpose(0, 1)  # [1, H, 1]
        q = F.normalize(q, dim=-1) * temperature.to(q.dtype)
        return torch.stack([q, F.normalize(k, dim=-1), v], dim=2)
