"""The same model written the plain, published way: the oracle of the tests and the baseline of the
benchmarks.

Every tubelet is embedded, tokens are gathered with booleans, the softmax matrix is formed, targets are made
for the whole clip. It shares the parameter names of `Pretrainer` and is never made faster.

Legend: B clips, T frames, N tokens, Nv visible, Nd decoded, D width, P values of a tubelet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmae.config import ModelConfig
from vmae.masking import DualMask
from vmae.model.pretrainer import Pretrainer


class ReferencePretrainer(nn.Module):
    """Same arguments (but no backends), parameters and results as `Pretrainer`."""

    pos_embed: Tensor

    def __init__(self, config: ModelConfig, *, normalize_target: bool = True):
        super().__init__()
        parts = Pretrainer(config, attention="softmax", normalize_target=normalize_target, recompute=False)
        self.config = config
        self.normalize_target = normalize_target
        self.encoder, self.decoder = parts.encoder, parts.decoder
        for block in (*self.encoder.blocks, *self.decoder.blocks):
            block.mlp.pad = False
        self.encoder_to_decoder, self.mask_token = parts.encoder_to_decoder, parts.mask_token
        self.register_buffer("pos_embed", parts.pos_embed, persistent=False)

    def forward(self, clips: Tensor, mask: DualMask | tuple[Tensor, Tensor]) -> Tensor:
        """The loss, a float32 scalar. `mask` may also be the two booleans [B, N] (True = masked) of the
        published code."""
        images = self._images(clips)
        encoder_mask, decoder_mask = mask.to_bool() if isinstance(mask, DualMask) else mask
        target = self._targets(images)[~decoder_mask].reshape(images.shape[0], -1, self.config.tubelet_pixels)
        loss = (self._predict(images, encoder_mask, decoder_mask) - target).square().mean(dim=-1)
        counted = encoder_mask[~decoder_mask].reshape(images.shape[0], -1)
        return (loss * counted).sum() / counted.sum()

    def predict(self, clips: Tensor, mask: DualMask | tuple[Tensor, Tensor]) -> Tensor:
        """Predicted tubelets [B, Nd, P]."""
        return self._predict(self._images(clips), *(mask.to_bool() if isinstance(mask, DualMask) else mask))

    def _images(self, clips: Tensor) -> Tensor:
        """uint8 [B, T, H, W, C] -> normalised float32 [B, C, T, H, W]; floats pass."""
        if clips.is_floating_point():
            return clips
        mean, std = (torch.tensor(x, device=clips.device) for x in self.config.statistics)
        return ((clips.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)

    def _predict(self, images: Tensor, encoder_mask: Tensor, decoder_mask: Tensor) -> Tensor:
        x = self.encoder.patch_embed(images)
        x = x + self.encoder.pos_embed.type_as(x)
        x = x[~encoder_mask].reshape(x.shape[0], -1, x.shape[-1])
        for block in self.encoder.blocks:
            x = block(x)
        x = self.encoder_to_decoder(self.encoder.norm(x))
        batch, _, dim = x.shape
        positions = self.pos_embed.expand(batch, -1, -1).type_as(x)
        shown = positions[~encoder_mask].reshape(batch, -1, dim)
        hidden = positions[~decoder_mask].reshape(batch, -1, dim)
        x = torch.cat([x + shown, self.mask_token + hidden], dim=1)
        for block in self.decoder.blocks:
            x = block(x)
        return self.decoder.head(self.decoder.norm(x[:, -hidden.shape[1] :]))

    @torch.no_grad()
    def _targets(self, images: Tensor) -> Tensor:
        """Targets [B, N, P] of the whole clip."""
        mean, std = (
            torch.tensor(x, device=images.device)[None, :, None, None, None] for x in self.config.statistics
        )
        pixels = images * std + mean
        depth, patch = self.config.tubelet_size, self.config.patch_size
        time, height, width = self.config.grid
        pixels = pixels.reshape(-1, self.config.in_channels, time, depth, height, patch, width, patch)
        # [B, N, pixels of a tubelet, C]
        pixels = pixels.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6).flatten(1, 3)
        if self.normalize_target:
            spread = pixels.var(dim=-2, unbiased=True, keepdim=True).sqrt() + 1e-6
            pixels = (pixels - pixels.mean(dim=-2, keepdim=True)) / spread
        return pixels.flatten(2)


def build_reference(config: ModelConfig, **options) -> ReferencePretrainer:
    """A freshly initialised `ReferencePretrainer`; from one seed it has the weights of `build_pretrainer`."""
    return ReferencePretrainer(config, **options)
