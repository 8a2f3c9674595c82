"""The encoder with a head, for post-pre-training, fine-tuning, probing and evaluation, with the published
names.

Legend: B clips, N tokens, D width, K classes, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae.config import NORMED, POOLINGS, ModelConfig
from vmae.errors import InputError
from vmae.model.blocks import build_blocks
from vmae.model.embed import PatchEmbed, clip_sides, register_positions, statistics_of
from vmae_kernels import embed_visible


def init_truncated_normal(module: nn.Module) -> None:
    """The published initialisation of the classifier's linear layers and norms; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class AttentivePool(nn.Module):
    """One learned query that attends to all tokens, for probes of frozen encoders (as V-JEPA's, Bardes et
    al., 2024)."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Pooled features [B, D]."""
        k, v = self.kv(self.norm(x_BND)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query = (
            self.query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).expand(x_BND.shape[0], -1, -1, -1)
        )
        return self.proj(F.scaled_dot_product_attention(query.to(k.dtype), k, v).flatten(1))

    def of_normed(self, x_BND: Tensor) -> Tensor:
        """`forward` of tokens that are normalised already, by a norm without weights: the same sum in another
        order, without a key or value of any token. 4 N D H operations a clip instead of 4 N D^2: for tokens
        that are read many times."""
        _, _, dim = x_BND.shape
        weight_HCD = self.kv.weight.unflatten(0, (2, self.num_heads, -1))
        bias_HC = self.kv.bias.unflatten(0, (2, self.num_heads, -1))[1]
        query_HC = self.query.view(self.num_heads, -1) * (dim // self.num_heads) ** -0.5
        # A key's bias, and the norm's, add the same to all of a head's scores: softmax does not see it.
        asked_HD = torch.einsum("hc,hcd->hd", query_HC, weight_HCD[0]) * self.norm.weight
        scores_BHN = (x_BND @ asked_HD.T).transpose(1, 2).softmax(-1)
        seen_BHD = (scores_BHN @ x_BND) * self.norm.weight + self.norm.bias
        values_BHC = torch.einsum("bhd,hcd->bhc", seen_BHD, weight_HCD[1]) + bias_HC
        return self.proj(values_BHC.flatten(1))


class Classifier(nn.Module):
    """Video classifier (VideoMAE V2, section 3.4): all tokens, pooled, `fc_norm`, `head`.

    Args:
        config: the architecture; its decoder is not used.
        num_classes: K; 0 gives features only.
        pooling: "mean" over tokens (published default), the "first" token after `norm`, or "attentive";
            of a pre-trained encoder "normed": the mean over tokens after `norm`.
        head_drop_rate: dropout before the head, in training.
        drop_rate, attn_drop_rate: dropout, in training, of tokens with their positions and of the results of
            attention and MLPs; of attention's weights. Where the published code has them.
        init_scale: factor on the head's initial weight.
        recompute: see `Pretrainer`.
    """

    pos_embed: Tensor
    every_token: Tensor

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        *,
        pooling: str = "mean",
        head_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        init_scale: float = 1.0,
        backend: str = "auto",
        attention: str = "auto",
        recompute: bool = True,
    ):
        super().__init__()
        if num_classes < 0:
            raise InputError(f"num_classes must be at least 0, not {num_classes}")
        if pooling not in (*POOLINGS, NORMED):
            raise InputError(f"unknown pooling {pooling!r}; known: {', '.join(POOLINGS)}")
        rates = {"head_drop_rate": head_drop_rate, "drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate}
        for name, rate in rates.items():
            if not 0 <= rate < 1:
                raise InputError(f"{name} must be in [0, 1), not {rate}")
        self.config, self.num_classes, self.pooling = config, num_classes, pooling
        self.backend = backend
        self.frozen = False
        self.patch_embed = PatchEmbed(config)
        register_positions(self, config)
        self.pos_dropout = nn.Dropout(drop_rate) if drop_rate else None
        size = (config.embed_dim, config.depth, config.num_heads)
        drop = (drop_rate, attn_drop_rate)
        self.blocks = build_blocks(config, *size, attention, recompute, backend, *drop)
        norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        ends_with_norm = pooling in ("first", NORMED)
        self.norm = norm if ends_with_norm else nn.Identity()
        self.fc_norm = None if ends_with_norm else norm
        attentive = pooling == "attentive"
        self.pool = (
            AttentivePool(config.embed_dim, config.num_heads, config.layer_norm_eps) if attentive else None
        )
        self.head_dropout = nn.Dropout(head_drop_rate)
        self.head: nn.Module = nn.Linear(config.embed_dim, num_classes) if num_classes else nn.Identity()
        every_token = torch.arange(config.num_tokens, dtype=torch.int32)
        self.register_buffer("every_token", every_token, persistent=False)
        self.apply(init_truncated_normal)
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(init_scale)
                self.head.bias.mul_(init_scale)

    def freeze_encoder(self) -> None:
        """Train the pooling, `fc_norm` and the head only: a probe. The encoder then keeps nothing for a
        backward."""
        self.frozen = True
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(("patch_embed.", "pos_embed", "blocks.", "norm.")))

    def tokens(self, clips: Tensor) -> Tensor:
        """Tokens [B, N, D] after the last block.

        Args:
            clips: uint8 [B, T, H, W, 3], or normalised float [B, 3, T, H, W].

        Raises:
            InputError: clips of another size than the model's.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self._encode(self._embedded(clips))

    def layer_tokens(self, clips: Tensor) -> Iterator[Tensor]:
        """Tokens [B, N, D] after each block in turn, before the final norm; see `tokens`."""
        x_BND = self._embedded(clips)
        for block in self.blocks:
            x_BND = block(x_BND)
            yield x_BND

    def features(self, clips: Tensor) -> Tensor:
        """Pooled features [B, D]."""
        return self._pooled(self.tokens(clips))

    def embed(self, clips: Tensor) -> Tensor:
        """Tubelets [B, N', D] embedded without positions, of clips of any number of frames that tubelets
        divide."""
        frames, height, width = clip_sides(clips, self.config)
        depth, side, proj = self.config.tubelet_size, self.config.patch_size, self.patch_embed.proj
        count = (frames // depth) * (height // side) * (width // side)
        every_token = torch.arange(count, dtype=torch.int32, device=clips.device).expand(clips.shape[0], -1)
        nowhere = self.pos_embed.new_zeros(1, count, self.config.embed_dim)
        return embed_visible(
            clips,
            every_token,
            proj.weight,
            proj.bias,
            nowhere,
            backend=self.backend,
            statistics=statistics_of(clips, self.config),
        )

    def features_of_embedded(self, x_BND: Tensor) -> Tensor:
        """Pooled features [B, D] of clips embedded by `embed`; positions are added here. For overlapping
        clips."""
        return self._pooled(self.tokens_of_embedded(x_BND))

    def tokens_of_embedded(self, x_BND: Tensor) -> Tensor:
        """Tokens [B, N, D] after the last block, of clips that `embed` has embedded; positions are added
        here."""
        return self._encode(x_BND + self.pos_embed.to(x_BND.dtype))

    def _embedded(self, clips: Tensor) -> Tensor:
        """All tubelets [B, N, D] embedded, with their positions."""
        self._check(clips)
        every_token = self.every_token.expand(clips.shape[0], -1)
        proj = self.patch_embed.proj
        return embed_visible(
            clips,
            every_token,
            proj.weight,
            proj.bias,
            self.pos_embed,
            backend=self.backend,
            statistics=statistics_of(clips, self.config),
        )

    def _encode(self, x_BND: Tensor) -> Tensor:
        if self.pos_dropout is not None:
            x_BND = self.pos_dropout(x_BND)
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.norm(x_BND)

    def _pooled(self, x_BND: Tensor) -> Tensor:
        if self.fc_norm is None:
            return x_BND[:, 0] if self.pooling == "first" else x_BND.mean(1)
        return self.fc_norm(x_BND.mean(1) if self.pool is None else self.pool(x_BND))

    def forward(self, clips: Tensor) -> Tensor:
        """Logits [B, K]."""
        return self.head(self.head_dropout(self.features(clips)))

    def _check(self, clips: Tensor) -> None:
        shape = (self.config.num_frames, *self.config.image_hw)
        if clip_sides(clips, self.config) != shape:
            raise InputError(
                f"clips of shape {list(clips.shape)} do not fit a model of {shape} (frames, height, width)"
            )


def build_classifier(config: ModelConfig, num_classes: int, **options) -> Classifier:
    """A freshly initialised `Classifier`; `options` are those of its constructor."""
    return Classifier(config, num_classes, **options)
