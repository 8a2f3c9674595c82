"""The dual-masked autoencoder (VideoMAE V2, section 3): the encoder sees visible tokens, the decoder predicts
decoded ones.

Legend: B clips, Nv visible, Nd decoded, Nk counted tokens, D encoder width, Dd decoder width, C values of a
token's target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.masking import DualMask
from vmae.model.blocks import build_blocks, init_xavier
from vmae.model.embed import (
    PatchEmbed,
    clip_sides,
    fixed_positions,
    layouts,
    register_positions,
    statistics_of,
)
from vmae.model.packed import check_groups, packed_loss, packed_predict, positions_of
from vmae.model.recompute import LayerNorm, norm_linear
from vmae.model.rows import Rows, norm_rows
from vmae.model.target import Pixels, Target
from vmae_kernels import assemble_decoder_tokens, embed_visible


class Encoder(nn.Module):
    """Embedding of visible tubelets, blocks and final norm."""

    pos_embed: Tensor

    def __init__(self, config: ModelConfig, attention: str, recompute: bool, backend: str):
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        register_positions(self, config)
        self.blocks = build_blocks(
            config, config.embed_dim, config.depth, config.num_heads, attention, recompute, backend
        )
        self.norm = LayerNorm(config.embed_dim, config.layer_norm_eps, backend)
        self.apply(init_xavier)


class Decoder(nn.Module):
    """Blocks, norm and the head that predicts `width` values of a token."""

    def __init__(self, config: ModelConfig, attention: str, recompute: bool, backend: str, width: int):
        super().__init__()
        dim, heads = config.decoder_embed_dim, config.decoder_num_heads
        self.blocks = build_blocks(config, dim, config.decoder_depth, heads, attention, recompute, backend)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.head = nn.Linear(dim, width)
        self.apply(init_xavier)


class Pretrainer(nn.Module):
    """Loss and predictions of dual-masked pre-training; parameter names and shapes are the published ones.

    Args:
        config: the architecture.
        backend: of the fused operations: "torch", "triton" or "auto" (triton on a GPU).
        attention: backend of attention, see `vmae.model.attention.attention`.
        normalize_target: predict tubelets normalised per channel (published default) or pixels in [0, 1].
        target: what is predicted; None are these pixels.
        recompute: make results of LayerNorm and GELU again in the backward instead of keeping them: 0.65 x
            the bytes that a block keeps, no matrix product repeated (`vmae.model.recompute`).
    """

    pos_embed: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: str = "auto",
        attention: str = "auto",
        normalize_target: bool = True,
        target: Target | None = None,
        recompute: bool = True,
    ):
        super().__init__()
        self.config = config
        self.backend = backend
        self.target = target or Pixels(config, normalize_target)
        self.recompute = recompute
        self.encoder = Encoder(config, attention, recompute, backend)
        self.decoder = Decoder(config, attention, recompute, backend, self.target.width)
        # Left at torch's default initialisation, as in the published code, whose `apply` covers the two
        # halves only.
        self.encoder_to_decoder = nn.Linear(config.embed_dim, config.decoder_embed_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        positions = fixed_positions(config, config.decoder_embed_dim)
        self.register_buffer("pos_embed", positions, persistent=False)

    @property
    def normalize_target(self) -> bool:
        """Whether it predicts pixels that are normalised."""
        return isinstance(self.target, Pixels) and self.target.normalize

    def encode(self, clips: Tensor, mask: DualMask) -> Tensor:
        """Encoded visible tokens [B, Nv, D], before the encoder's final norm."""
        return self._encode(clips, mask.visible, mask.num_tokens)

    def tokens(self, clips: Tensor) -> Tensor:
        """Every token [B, N, D] after the encoder's final norm: nothing is masked. What a probe reads."""
        count = self.config.num_tokens
        every = torch.arange(count, dtype=torch.int32, device=clips.device)
        return self.encoder.norm(self._encode(clips, every.expand(clips.shape[0], -1), count))

    def _encode(self, clips: Tensor, tokens: Tensor, total: int) -> Tensor:
        """`tokens` [B, Nv] of the `total` ones of a clip, encoded: [B, Nv, D]."""
        proj = self.encoder.patch_embed.proj
        x = embed_visible(
            clips,
            tokens,
            proj.weight,
            proj.bias,
            positions_of(self.encoder.pos_embed, total),
            backend=self.backend,
            statistics=statistics_of(clips, self.config),
        )
        for block in self.encoder.blocks:
            x = block(x)
        return x

    def narrow(self, encoded: Tensor) -> Tensor:
        """[..., D] -> [..., Dd]: the encoder's final norm, and the step to the decoder's width."""
        if self.recompute:
            return norm_linear(encoded, self.encoder.norm, self.encoder_to_decoder.weight, None)
        return self.encoder_to_decoder(self.encoder.norm(encoded))

    def decode(self, encoded: Tensor, mask: DualMask, rows: Rows) -> Tensor:
        """`rows` of the decoder's sequence [B, Nv + Nd, Dd] before its final norm: its last block computes no
        others."""
        x = self.narrow(encoded)
        positions = positions_of(self.pos_embed, mask.num_tokens)
        x = assemble_decoder_tokens(
            x, self.mask_token, positions, mask.visible, mask.decode, backend=self.backend
        )
        *blocks, last = self.decoder.blocks
        for block in blocks:
            x = block(x)
        return last(x, rows=rows)

    def final_norm(self, rows: Tensor) -> Tensor:
        """The decoder's final norm of the rows that its last block gave, in their dtype."""
        return norm_rows(rows, self.decoder.norm, self.backend)

    def forward(
        self,
        clips: Tensor | Sequence[Tensor],
        mask: DualMask | Sequence[DualMask],
        values: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The loss, a float32 scalar, over counted tokens: the decoded ones that the encoder did not see
        (equation 5).

        Args:
            clips: uint8 [B, T, H, W, 3], or normalised float [B, 3, T, H, W]; of a model of other channels or
                statistics uint8, uint16 or float32 [B, T, H, W, C].
            mask: of B clips of the same grid, on the clips' device. A list of masks with unequal counts, with
                clips of any sizes, goes through `vmae.model.packed.packed_loss`; a list of one needs no
                packing.
            values: the target's [B, Nk, C], where they are known already; with a list of masks, as many.
        """
        if isinstance(mask, DualMask):
            if not (values is None or isinstance(values, Tensor)):
                raise InputError(f"{len(values)} groups of values need a list of masks, one each")
            clips = self._checked(clips, mask)
        elif len(mask) == 1 and values is None:
            (clips,), (mask,) = check_groups(self, clips, mask), mask
        else:
            return packed_loss(self, clips, mask, values)
        counted = Rows(mask.hidden_rows, mask.hidden_uses, self.backend)
        rows = self.decode(self.encode(clips, mask), mask, counted)
        return self.target.loss(
            self.final_norm(rows), self.decoder.head, clips, mask, values=values, backend=self.backend
        )

    @overload
    def predict(self, clips: Tensor, mask: DualMask) -> Tensor: ...
    @overload
    def predict(self, clips: Tensor | Sequence[Tensor], mask: Sequence[DualMask]) -> list[Tensor]: ...
    def predict(
        self, clips: Tensor | Sequence[Tensor], mask: DualMask | Sequence[DualMask]
    ) -> Tensor | list[Tensor]:
        """Predictions [B, Nd, C] of all decoded tokens, in the target's space; of pixels in the order
        (t, h, w, c).

        With a list of masks, a list with one such tensor each.
        """
        if not isinstance(mask, DualMask):
            return packed_predict(self, clips, mask)
        decoded = Rows(mask.decoded_rows, None, self.backend)
        rows = self.decode(self.encode(self._checked(clips, mask), mask), mask, decoded)
        return self.decoder.head(self.final_norm(rows))

    def _checked(self, clips: Tensor | Sequence[Tensor], mask: DualMask) -> Tensor:
        """`clips`, or InputError where they do not fit the model or the mask."""
        if not isinstance(clips, Tensor):
            raise InputError(f"a list of {len(clips)} groups of clips needs a list of masks, one each")
        height, width = self.config.image_hw
        shape = (self.config.num_frames, height, width)
        if clip_sides(clips, self.config) != shape:
            raise InputError(
                f"clips of shape {list(clips.shape)} do not fit a model of {shape} (frames, height, width); "
                f"clips are {layouts(self.config)}"
            )
        if mask.num_tokens != self.config.num_tokens or mask.batch != clips.shape[0]:
            raise InputError(
                f"a mask of {mask.batch} clips of {mask.num_tokens} tokens does not fit {clips.shape[0]} "
                f"clips of {self.config.num_tokens} tokens"
            )
        return clips


def build_pretrainer(config: ModelConfig, backend: str = "auto", **options) -> Pretrainer:
    """A freshly initialised `Pretrainer`; `options` are those of its constructor."""
    return Pretrainer(config, backend=backend, **options)
