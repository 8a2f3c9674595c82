"""Latents of a frozen encoder as the target: masked latent prediction with a static teacher (SALT, Li et al.,
2025, arXiv 2509.24317, stage 2).

Legend: B clips, N tokens, Nk counted tokens, C the teacher's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae.errors import InputError
from vmae.masking import DualMask
from vmae.targets.frozen import FrozenEncoder, freeze, regridded
from vmae.targets.image_encoder import ImageEncoder, find_image_model
from vmae.targets.latents import Latents, StoredLatents
from vmae.targets.settings import Wanted
from vmae.targets.video_encoder import VideoEncoder

ABOUT = "latents of a frozen encoder, layer-normalised (--teacher)"

# Tokens that the teacher sees at once: 41 clips of ViT-B, whose MLP then holds 0.4 GB in bf16. More would
# take memory beside the student's own, for few launches less.
TOKENS_AT_ONCE = 2**16
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class TeacherTarget(Latents):
    """The teacher sees the whole clip, once; its counted tokens, each normalised over its values, are what
    the student predicts. Latents of several layers are each normalised, and so is their mean.

    Args:
        wanted: settings of the target, and the student.
        encoder: the teacher.
    """

    def __init__(self, wanted: Wanted, encoder: FrozenEncoder) -> None:
        super().__init__(wanted, encoder.width, encoder.path)
        self.encoder, self.dtype = encoder, _DTYPES[wanted.settings.teacher_dtype]
        tokens = encoder.grid[0] * encoder.grid[1] * encoder.grid[2]
        self.at_once = wanted.settings.teacher_batch or max(TOKENS_AT_ONCE // tokens, 1)
        self.identity, notes = encoder.identity, list(encoder.notes)
        if encoder.grid != wanted.model.grid:
            grids = (" x ".join(map(str, grid)) for grid in (encoder.grid, wanted.model.grid))
            notes.append(f"{encoder.path}: latents resampled from {' tokens to '.join(grids)}, trilinear")
        self.notes = tuple(f"teacher: {note}" for note in notes)
        freeze(encoder.module, self.dtype)

    @torch.no_grad()
    def values(self, clips: Tensor, mask: DualMask) -> Tensor:
        target = mask.target.long()
        parts = zip(clips.split(self.at_once), target.split(self.at_once))
        return torch.cat([self._latents(*part) for part in parts])

    def _latents(self, clips: Tensor, counted: Tensor) -> Tensor:
        """float32 [B, Nk, C] of some clips, all at once."""
        device, total, layers = clips.device.type, None, 0
        with torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            for tokens in self.encoder.layers(clips):
                tokens = regridded(tokens, self.encoder.grid, self.config.grid)
                rows = counted[..., None].expand(-1, -1, tokens.shape[-1])
                own = self._normalized(tokens.gather(1, rows).float())
                total, layers = own if total is None else total + own, layers + 1
        assert total is not None  # a teacher has a layer at least
        return total if layers == 1 else self._normalized(total / layers)

    def _normalized(self, latents: Tensor) -> Tensor:
        return F.layer_norm(latents, latents.shape[-1:]) if self.settings.normalize_latents else latents

    def macs(self) -> int:
        return self.encoder.macs

    def state_bytes(self) -> int:
        module = self.encoder.module
        return sum(one.numel() * one.element_size() for one in (*module.parameters(), *module.buffers()))

    def to(self, device: torch.device) -> None:
        self.encoder.check_device(device, self.dtype)
        self.encoder.module.to(device)


def build(wanted: Wanted) -> Latents:
    """The teacher; or with stored latents what stands for it, a teacher's identity checked beside them."""
    settings = wanted.settings
    if settings.latents is not None:
        identity = None if settings.teacher is None else _encoder(wanted).identity
        return StoredLatents(wanted, identity)
    if settings.teacher is None:
        raise InputError(
            "--target teacher needs one: --teacher CHECKPOINT, or --latents DIR of stored latents"
        )
    return TeacherTarget(wanted, _encoder(wanted))


def _encoder(wanted: Wanted) -> FrozenEncoder:
    folder = find_image_model(wanted.settings.teacher or "")
    return VideoEncoder(wanted) if folder is None else ImageEncoder(wanted, folder)
