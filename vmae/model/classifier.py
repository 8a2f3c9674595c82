"""The encoder with a linear head, for post-pre-training, fine-tuning and evaluation, with the published names.

Legend: B clips, N tokens, D width, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.model.blocks import build_blocks
from vmae.model.embed import PatchEmbed, register_positions
from vmae_kernels import embed_visible


def init_truncated_normal(module: nn.Module) -> None:
    """The published initialisation of the classifier's linear layers and norms; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Classifier(nn.Module):
    """Video classifier (VideoMAE V2, section 3.4): all tokens, their mean, `fc_norm`, `head`.

    Args:
        config: the architecture; its decoder is not used.
        num_classes: K; 0 gives features only.
        mean_pooling: mean over tokens and `fc_norm` (published default), or `norm` and the first token.
        head_drop_rate: dropout before the head, in training.
        init_scale: factor on the head's initial weight.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        *,
        mean_pooling: bool = True,
        head_drop_rate: float = 0.0,
        init_scale: float = 1.0,
        backend: str = "auto",
        attention: str = "auto",
    ):
        super().__init__()
        if num_classes < 0:
            raise InputError(f"num_classes must be at least 0, not {num_classes}")
        self.config = config
        self.backend = backend
        self.patch_embed = PatchEmbed(config)
        register_positions(self, config.num_tokens, config.embed_dim, config.learned_pos)
        self.blocks = build_blocks(config, config.embed_dim, config.depth, config.num_heads, attention)
        norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.norm = nn.Identity() if mean_pooling else norm
        self.fc_norm = norm if mean_pooling else None
        self.head_dropout = nn.Dropout(head_drop_rate)
        self.head = nn.Linear(config.embed_dim, num_classes) if num_classes else nn.Identity()
        every_token = torch.arange(config.num_tokens, dtype=torch.int32)
        self.register_buffer("every_token", every_token, persistent=False)
        self.apply(init_truncated_normal)
        if num_classes:
            with torch.no_grad():
                self.head.weight.mul_(init_scale)
                self.head.bias.mul_(init_scale)

    def features(self, clips: Tensor) -> Tensor:
        """[B, D] from uint8 [B, T, H, W, 3] or normalised float [B, 3, T, H, W] clips."""
        tokens = self.every_token.expand(clips.shape[0], -1)
        proj = self.patch_embed.proj
        x = embed_visible(clips, tokens, proj.weight, proj.bias, self.pos_embed, backend=self.backend)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.fc_norm(x.mean(1)) if self.fc_norm is not None else x[:, 0]

    def forward(self, clips: Tensor) -> Tensor:
        """Logits [B, K]."""
        return self.head(self.head_dropout(self.features(clips)))


def build_classifier(config: ModelConfig, num_classes: int, **options) -> Classifier:
    """A freshly initialised `Classifier`; `options` are those of its constructor."""
    return Classifier(config, num_classes, **options)
