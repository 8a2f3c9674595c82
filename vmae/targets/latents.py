"""What latents as a target share, whoever makes them; and latents that are stored, for fixed views.

Legend: B clips, Nk counted tokens, C the teacher's width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vmae.data.view_store import LatentStore
from vmae.errors import InputError
from vmae.masking import DualMask
from vmae.model.target import Target
from vmae.targets.settings import LAST, TargetConfig, Wanted

_LOSSES = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "l2": F.mse_loss}


class Latents(Target):
    """Latents of a teacher, compared token by token.

    Args:
        wanted: settings of the target, and the student.
        width: C.
        place: where they come from.
    """

    name = "teacher"

    def __init__(self, wanted: Wanted, width: int, place: str) -> None:
        super().__init__(wanted.model)
        self.settings, self._width, self.place = wanted.settings, width, place

    @property
    def width(self) -> int:
        return self._width

    def compare(self, predicted: Tensor, values: Tensor) -> Tensor:
        error = self.settings.target_loss
        if error == "cosine":
            return 1 - F.cosine_similarity(predicted, values, dim=-1)
        return _LOSSES[error](predicted, values, reduction="none").mean(-1)

    def describe(self) -> str:
        layers = self.settings.teacher_layers
        which = "latents" if layers == LAST else f"latents after block {layers.replace(',', ', ')}"
        normed = ", layer-normalised" if self.settings.normalize_latents else ""
        return f"{which} of {self.place}{normed} ({self.width} wide, {self.settings.target_loss})"


class StoredLatents(Latents):
    """Latents that a teacher has left on the disk; batches bring them along (`vmae.data.Batch.values`).

    Args:
        wanted: settings of the target, and the student.
        identity: of the teacher, where the caller knows it; else that of the store.

    Raises:
        InputError: the folder holds none.
    """

    def __init__(self, wanted: Wanted, identity: dict[str, Any] | None = None) -> None:
        folder = wanted.settings.latents or ""
        about = LatentStore.read_about(folder)
        if about is None:
            raise LatentStore.nothing_in(folder)
        super().__init__(wanted, about["width"], folder)
        self.identity = identity or about["teacher"]

    def values(self, clips: Tensor, mask: DualMask) -> Tensor:
        raise InputError(
            f"{self.place} holds latents of the views of a run, and no teacher that sees other clips: give "
            "`values`"
        )


def latent_settings(settings: TargetConfig) -> dict[str, Any]:
    """What decides latents beside the teacher's weights, plain containers."""
    return {
        "layers": settings.teacher_layers,
        "size": settings.teacher_size,
        "frames": settings.teacher_frames,
        "dtype": settings.teacher_dtype,
        "normalize": settings.normalize_latents,
    }
