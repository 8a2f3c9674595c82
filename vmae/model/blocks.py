"""Transformer blocks shared by encoder, decoder and classifier.

Legend: B clips, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmae.config import ModelConfig
from vmae.model.attention import Attention
from vmae.model.attention.packed import Lengths
from vmae.model.recompute import LayerNorm, gelu_linear, norm_linear, padded, padded_width
from vmae.model.rows import Rows
from vmae_kernels.device import working_dtype


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
    """Two linear layers with a GELU between them, of which rows run as multiples of 16 bytes
    (`vmae.model.recompute`); `pad = False` leaves them as they are. With `again`, all of it runs again in the
    backward, from its input."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.again = False
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.pad = True

    def forward(self, x_BND: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """The MLP of x, or of `norm(x)` keeping neither its result nor GELU's for the backward."""
        if self.again:
            return checkpoint(self._forward, x_BND, norm, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_BND, norm)

    def _forward(self, x_BND: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if norm is None:
            dtype = working_dtype(x_BND.device.type, x_BND.dtype)
            width = padded_width(fc1.out_features, dtype)
            if width == fc1.out_features or not self.pad:
                return fc2(self.act(fc1(x_BND)))
            wide = padded(fc1.weight, (width, fc1.in_features), dtype), padded(fc1.bias, (width,), dtype)
            hidden = self.act(F.linear(x_BND, *wide))
            return F.linear(hidden, padded(fc2.weight, (fc2.out_features, width), dtype), fc2.bias)
        hidden = norm_linear(x_BND, norm, fc1.weight, fc1.bias, pad=self.pad)
        return gelu_linear(hidden, fc2.weight, fc2.bias)


class Block(nn.Module):
    """Pre-norm block: attention and MLP, each with optional dropout of its result (`drop`), layer scale
    (`gamma_1`, `gamma_2`) and stochastic depth. `attn_drop` is the dropout of attention's weights.

    With `recompute`, LayerNorm's and GELU's results are made again in the backward instead of being kept, the
    norms by `backend` ("torch", "triton", "auto").
    """

    def __init__(
        self,
        config: ModelConfig,
        dim: int,
        num_heads: int,
        drop_path: float,
        attention: str = "auto",
        recompute: bool = False,
        backend: str = "auto",
        drop: float = 0.0,
        attn_drop: float = 0.0,
    ):
        super().__init__()
        self.recompute = recompute
        self.norm1 = LayerNorm(dim, config.layer_norm_eps, backend)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias=config.qkv_bias,
            qk_scale=config.qk_scale,
            cos_attn=config.cos_attn,
            backend=attention,
            drop=attn_drop,
        )
        self.dropout = nn.Dropout(drop) if drop else None
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, config.layer_norm_eps, backend)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        scaled = config.init_values > 0
        self.gamma_1 = nn.Parameter(torch.full((dim,), config.init_values)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), config.init_values)) if scaled else None

    @property
    def draws(self) -> bool:
        """Whether a forward in training draws random numbers."""
        return self.drop_path.rate > 0 or self.drops

    @property
    def drops(self) -> bool:
        """Whether it has dropout, of its results or of attention's weights."""
        return self.attn.drop > 0 or self.dropout is not None

    def forward(self, x_BND: Tensor, lengths: Lengths | None = None, rows: Rows | None = None) -> Tensor:
        """With `lengths`, x is [1, T, D]: clips of those lengths one after the other
        (`vmae.model.packed`). With `rows`, the result is those of x's alone, [B, Nk, D]: the same numbers."""
        if rows is not None:
            x_BND, update = self.attn.of_rows(x_BND, self.norm1, rows, self.recompute, lengths)
            lengths = rows.lengths
        elif self.recompute:
            update = self.attn(x_BND, self.norm1, lengths)
        else:
            update = self.attn(self.norm1(x_BND), None, lengths)
        x_BND = x_BND + self._branch(update, self.gamma_1, lengths)
        update = self.mlp(x_BND, self.norm2) if self.recompute else self.mlp(self.norm2(x_BND))
        return x_BND + self._branch(update, self.gamma_2, lengths)

    def _branch(self, update: Tensor, gamma: Tensor | None, lengths: Lengths | None) -> Tensor:
        if self.dropout is not None:
            update = self.dropout(update)
        return self.drop_path(update if gamma is None else gamma * update, lengths)


def build_blocks(
    config: ModelConfig,
    dim: int,
    depth: int,
    num_heads: int,
    attention: str = "auto",
    recompute: bool = False,
    backend: str = "auto",
    drop: float = 0.0,
    attn_drop: float = 0.0,
) -> nn.ModuleList:
    """`depth` blocks whose stochastic depth rises linearly from 0 to `config.drop_path_rate`; the others are
    the same for all."""
    rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
    own = (attention, recompute, backend, drop, attn_drop)
    return nn.ModuleList(Block(config, dim, num_heads, rate, *own) for rate in rates)
