"""What a target's file registers, and the settings that its builder is handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmae.config import TEACHER, ModelConfig, SpeedConfig, _Checked
from vmae.model.target import Target
from vmae.settings import OneOf, setting

TOKEN_LOSSES = ("smooth_l1", "l1", "l2", "cosine")


@dataclass(frozen=True, kw_only=True)
class TargetSettings(_Checked):
    """What decides a target beside its name."""

    group = TEACHER

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
    """What a builder is asked for.

    Attributes:
        model: the architecture that predicts.
        settings: of the target.
        normalize: of pixels, see `vmae.model.target.Pixels`.
        speed: how what it holds is computed.
    """

    model: ModelConfig
    settings: TargetSettings = field(default_factory=TargetSettings)
    normalize: bool = True
    speed: SpeedConfig = field(default_factory=SpeedConfig)


@dataclass(frozen=True)
class TargetKind:
    """A target by name.

    Attributes:
        name: name in settings.
        text: what predictions are compared with, in half a line.
        build: makes it, on the CPU; raises InputError for what a person can mend.
    """

    name: str
    text: str
    build: Callable[[Wanted], Target]
