"""What predictions are compared with: the seam between the pre-trainer and its target.

Dual masking is about which tokens are compared; a `Target` is about with what. Pixels are the published one
and the default; the others are in `vmae.targets`.

Legend: B clips, Nd decoded, Nk counted tokens, Dd decoder width, C values of a token, P values of a tubelet.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.masking import DualMask
from vmae.model.embed import statistics_of
from vmae_kernels import head_patch_loss, patch_targets_ref


class Target(abc.ABC):
    """Values of counted tokens, and the loss of predicting them. A subclass gives `name`, `width`, `values`,
    and where it is not the mean squared error, `compare`.

    It is no module: what it holds (a frozen teacher, say) is neither trained, sharded nor saved.

    Args:
        config: of the model that predicts.

    Attributes:
        notes: lines for the user on what it is made of.
        identity: what decides its values beside the settings, plain containers; None where nothing does.
        any_shape: whether clips may have other frames and sizes than the model's.
    """

    name: ClassVar[str]
    any_shape: ClassVar[bool] = False
    notes: tuple[str, ...] = ()
    identity: dict[str, Any] | None = None

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """C: what the head gives for each token."""

    @abc.abstractmethod
    def values(self, clips: Tensor, mask: DualMask) -> Tensor:
        """[B, Nk, C] of the tokens `mask.target`; called without gradients.

        Args:
            clips: uint8 [B, T, H, W, 3], or normalised float [B, 3, T, H, W]; of other channels as
                `vmae.model.embed.statistics_of` says.
        """

    def compare(self, predicted: Tensor, values: Tensor) -> Tensor:
        """float32 [B, Nk]: the error of each token; both arguments are float32 [B, Nk, C]."""
        return F.mse_loss(predicted, values, reduction="none").mean(-1)

    def loss(
        self,
        rows: Tensor,
        head: nn.Linear,
        clips: Tensor,
        mask: DualMask,
        *,
        values: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """float32 scalar: the mean error of the counted tokens.

        Args:
            rows: [B, Nk, Dd], what the head gets for the tokens `mask.target`.
            values: of these tokens, where they are known already.
            backend: of fused operations, where a target has some.
        """
        if values is None:
            with torch.no_grad():
                values = self.values(clips, mask)
        predicted = F.linear(rows, head.weight, head.bias).float()
        if values.shape != predicted.shape:
            raise InputError(
                f"values of shape {list(values.shape)} do not fit predictions of shape "
                f"{list(predicted.shape)}"
            )
        with torch.autocast(rows.device.type, enabled=False):
            return self._mean_error(predicted, values.float(), mask.target_weight)

    def _mean_error(self, predicted: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        """The error of the tokens, by their weights [B, Nk]."""
        return (self.compare(predicted, values) * weight).sum() / weight.sum()

    @torch.no_grad()
    def trivial(self, clips: Tensor, mask: DualMask, values: Tensor | None = None) -> dict[str, float]:
        """Losses of predictors that learn nothing, on one batch, by name: 0, and the mean of the batch."""
        values = (self.values(clips, mask) if values is None else values).float()
        weight = mask.target_weight
        mean = (values * weight[..., None]).sum((0, 1)) / weight.sum()

        predictors = {"zero": torch.zeros_like(mean), "mean of the batch": mean}
        return {
            name: self._mean_error(one.expand_as(values), values, weight).item()
            for name, one in predictors.items()
        }

    def macs(self) -> int:
        """Multiply-accumulates of a clip's values: matrix products and attention, nothing else."""
        return 0

    def state_bytes(self) -> int:
        """Bytes that it holds on each GPU throughout."""
        return 0

    def to(self, device: torch.device) -> None:  # noqa: B027  # most hold nothing
        """Move what it holds."""

    def describe(self) -> str:
        """What it is, in some words."""
        return self.name


class Pixels(Target):
    """The published target (VideoMAE V2, equation 5): a tubelet's pixels, through the fused loss that holds
    neither all predictions nor any target.

    Args:
        normalize: each channel of a tubelet by its own mean and variance; else pixels in [0, 1].
    """

    name = "pixels"
    any_shape = True

    def __init__(self, config: ModelConfig, normalize: bool = True) -> None:
        super().__init__(config)
        self.normalize = normalize

    @property
    def width(self) -> int:
        """P."""
        return self.config.tubelet_pixels

    def values(self, clips: Tensor, mask: DualMask) -> Tensor:
        size = (self.config.patch_size, self.config.tubelet_size)
        return patch_targets_ref(clips, mask.target, *size, self.normalize, statistics_of(clips, self.config))

    def loss(
        self,
        rows: Tensor,
        head: nn.Linear,
        clips: Tensor,
        mask: DualMask,
        *,
        values: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        return head_patch_loss(
            rows,
            head.weight,
            head.bias,
            clips,
            mask.target,
            mask.target_weight,
            self.normalize,
            tubelet_size=self.config.tubelet_size,
            backend=backend,
            statistics=statistics_of(clips, self.config),
        )

    def describe(self) -> str:
        return "pixels, normalised per channel" if self.normalize else "pixels in [0, 1]"
