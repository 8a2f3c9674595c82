"""Transformer blocks shared by encoder, decoder and classifier.

Legend: B clips, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmae.config import ModelConfig
from vmae.model.attention import Attention
from vmae.model.attention.packed import Lengths
from vmae.model.recompute import gelu_linear, norm_linear


def init_xavier(module: nn.Module) -> None:
    """The published initialisation of linear layers and norms; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole clips (Huang et al., 2016), scaled to keep its
    mean."""

    share: Tensor | None  # of the clips that keep the branch, a scalar; None where all do

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.register_buffer("share", torch.tensor(1.0 - rate) if rate else None, persistent=False)

    def forward(self, x: Tensor, lengths: Lengths | None = None) -> Tensor:
        """`x` [B, ...], or [1, T, D] of packed clips of those lengths."""
        if self.share is None or not self.training:
            return x
        clips = x.shape[0] if lengths is None else len(lengths.counts)
        keep = self._drawn(x.new_empty((clips,) + (1,) * (x.ndim - 1)), self.share)
        return x * (keep if lengths is None else keep[lengths.owner].transpose(0, 1))

    def _drawn(self, empty: Tensor, share: Tensor) -> Tensor:
        """`empty` filled with 0 or, with probability `share`, 1 / share.

        torch.compile makes a constant of a number that a module holds, so every rate would be a compilation
        (8 at most), and takes the share from a tensor. Its draws are others than without it.
        """
        if torch.compiler.is_compiling():
            return torch.rand_like(empty, dtype=torch.float32).lt(share).to(empty.dtype) / share
        return empty.bernoulli_(1 - self.rate).div_(1 - self.rate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DropPath:
        super()._apply(fn, recurse)
        if self.share is not None:
            self.share.fill_(1.0 - self.rate)  # `to_empty` leaves it without a value
        return self


class Mlp(nn.Module):
    """Two linear layers and a GELU between them; with `again`, all of it runs again in the backward, from its
    input."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.again = False
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_BND: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """The MLP of x, or of `norm(x)` keeping neither its result nor GELU's for the backward."""
        if self.again:
            return checkpoint(self._forward, x_BND, norm, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_BND, norm)

    def _forward(self, x_BND: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        if norm is None:
            return self.fc2(self.act(self.fc1(x_BND)))
        hidden = norm_linear(x_BND, norm, self.fc1.weight, self.fc1.bias)
        return gelu_linear(hidden, self.fc2.weight, self.fc2.bias)


class Block(nn.Module):
    """Pre-norm block: attention and MLP, each with optional layer scale (`gamma_1`, `gamma_2`) and stochastic
    depth.

    With `recompute`, LayerNorm's and GELU's results are made again in the backward instead of being kept.
    """

    def __init__(
        self,
        config: ModelConfig,
        dim: int,
        num_heads: int,
        drop_path: float,
        attention: str = "auto",
        recompute: bool = False,
    ):
        super().__init__()
        self.recompute = recompute
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias=config.qkv_bias,
            qk_scale=config.qk_scale,
            cos_attn=config.cos_attn,
            backend=attention,
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        scaled = config.init_values > 0
        self.gamma_1 = nn.Parameter(torch.full((dim,), config.init_values)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), config.init_values)) if scaled else None

    def forward(self, x_BND: Tensor, lengths: Lengths | None = None) -> Tensor:
        """With `lengths`, x is [1, T, D]: clips of those lengths one after the other
        (`vmae.model.packed`)."""
        if self.recompute:
            x_BND = x_BND + self._branch(self.attn(x_BND, self.norm1, lengths), self.gamma_1, lengths)
            return x_BND + self._branch(self.mlp(x_BND, self.norm2), self.gamma_2, lengths)
        x_BND = x_BND + self._branch(self.attn(self.norm1(x_BND), None, lengths), self.gamma_1, lengths)
        return x_BND + self._branch(self.mlp(self.norm2(x_BND)), self.gamma_2, lengths)

    def _branch(self, update: Tensor, gamma: Tensor | None, lengths: Lengths | None) -> Tensor:
        return self.drop_path(update if gamma is None else gamma * update, lengths)


def build_blocks(
    config: ModelConfig,
    dim: int,
    depth: int,
    num_heads: int,
    attention: str = "auto",
    recompute: bool = False,
) -> nn.ModuleList:
    """`depth` blocks whose stochastic depth rises linearly from 0 to `config.drop_path_rate`."""
    rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
    return nn.ModuleList(Block(config, dim, num_heads, rate, attention, recompute) for rate in rates)
