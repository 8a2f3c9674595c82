"""Settings of what pre-training predicts, and what a target's builder is handed."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmae.config import RESULTS, TEACHER, ModelConfig, SpeedConfig, _Checked
from vmae.settings import OneOf, setting
from vmae.targets import TARGETS

TOKEN_LOSSES = ("smooth_l1", "l1", "l2", "cosine")


@dataclass(frozen=True, kw_only=True)
class TargetConfig(_Checked):
    """What the decoder's predictions are compared with."""

    group = TEACHER

    name: str = setting(
        "pixels",
        f"what is predicted: {', '.join(f'{name} ({about})' for name, about in TARGETS.items())}",
        OneOf("target", TARGETS),
        name="target",
        group=RESULTS,
    )
    teacher: str | None = setting(
        None,
        "of --target teacher: a run's folder, a checkpoint, a file, or a folder of the Hugging Face hub",
        metavar="CHECKPOINT",
    )
    target_loss: str = setting(
        "smooth_l1",
        f"error of a token's predicted features: {', '.join(TOKEN_LOSSES)}",
        OneOf("target loss", TOKEN_LOSSES),
    )


@dataclass(frozen=True)
class Wanted:
    """What `build` of a target is asked for.

    Attributes:
        model: the architecture that predicts.
        settings: of the target.
        normalize: of pixels, see `vmae.model.target.Pixels`.
        speed: how what it holds is computed.
    """

    model: ModelConfig
    settings: TargetConfig = field(default_factory=TargetConfig)
    normalize: bool = True
    speed: SpeedConfig = field(default_factory=SpeedConfig)
