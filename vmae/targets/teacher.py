"""Latents of a frozen encoder as the target: masked latent prediction with a static teacher (SALT, Li et al.,
2025, arXiv 2509.24317, stage 2).

Legend: B clips, N tokens, Nk counted tokens, D the teacher's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae.checkpoint.models import to_model
from vmae.checkpoint.source import Source, read_checkpoint
from vmae.errors import InputError
from vmae.masking import DualMask
from vmae.model import Classifier
from vmae.model.cost import classifier_macs
from vmae.model.target import Target
from vmae.targets.settings import Wanted

ABOUT = "latents of a frozen encoder, layer-normalised (--teacher)"


class TeacherTarget(Target):
    """The teacher sees the whole clip, once; its counted tokens, each normalised over its values, are what
    the student predicts.

    Args:
        teacher: in eval mode; its token grid is the student's.
        loss: a name of `TOKEN_LOSSES`.
    """

    name = "teacher"

    def __init__(self, wanted: Wanted, teacher: Classifier, source: Source) -> None:
        super().__init__(wanted.model)
        self.teacher, self.source = teacher.requires_grad_(False).eval(), source
        self.error = wanted.settings.target_loss

    @property
    def width(self) -> int:
        return self.teacher.config.embed_dim

    def values(self, clips: Tensor, mask: DualMask) -> Tensor:
        with torch.autocast(clips.device.type, torch.bfloat16):
            tokens = self.teacher.tokens(clips)
        counted = mask.target.long()[..., None].expand(-1, -1, tokens.shape[-1])
        return F.layer_norm(tokens.gather(1, counted).float(), (tokens.shape[-1],))

    def compare(self, predicted: Tensor, values: Tensor) -> Tensor:
        if self.error == "cosine":
            return 1 - F.cosine_similarity(predicted, values, dim=-1)
        losses = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "l2": F.mse_loss}
        return losses[self.error](predicted, values, reduction="none").mean(-1)

    def macs(self) -> int:
        return classifier_macs(self.teacher.config, 0)

    def state_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.teacher.parameters())

    def to(self, device: torch.device) -> None:
        self.teacher.to(device)

    def describe(self) -> str:
        return f"latents of {self.source.path}"


def build(wanted: Wanted) -> TeacherTarget:
    path = wanted.settings.teacher
    if path is None:
        raise InputError("--target teacher needs one: --teacher CHECKPOINT")
    source, model = read_checkpoint(path), wanted.model
    changes = {"num_frames": model.num_frames, "img_size": model.img_size}
    speed = wanted.speed
    teacher, _ = to_model(source, "encoder", changes, backend=speed.backend, attention=speed.attention)
    if teacher.config.in_channels != model.in_channels:
        raise InputError(
            f"the teacher {source.path} takes clips of {teacher.config.in_channels} channels, the student of "
            f"{model.in_channels}"
        )
    if teacher.config.grid != model.grid:
        raise InputError(
            f"the teacher {source.path} has {teacher.config.grid} tokens, the student {model.grid}"
        )
    return TeacherTarget(wanted, teacher, source)
