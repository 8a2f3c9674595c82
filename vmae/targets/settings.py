"""Settings of what pre-training predicts, and what a target's builder is handed."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from vmae.config import DTYPE, MODEL, RESULTS, SPEED, TEACHER, ModelConfig, SpeedConfig, _Checked
from vmae.errors import InputError
from vmae.settings import BATCH, FRAMES, SIDE, Limits, OneOf, Whole, ranged, setting
from vmae.targets import TARGETS

TOKEN_LOSSES = ("smooth_l1", "l1", "l2", "cosine")
LAST = "last"
TUBELET_FRAMES = ("first", "mean")
# What says where a teacher is and how it runs: its latents are the same, so a run that goes on may change it.
PLACES = (
    *("teacher", "teacher_model", "teacher_init_frames", "teacher_init_size"),
    *("teacher_attention", "teacher_batch", "latents"),
)


class Layers(Limits):
    """`last`, or numbers of blocks from 1 on, with commas between."""

    def allows(self, value: Any) -> bool:
        if isinstance(value, int) and not isinstance(value, bool):  # of a settings file
            return value > 0
        return (
            isinstance(value, str) and re.fullmatch(r"last|[1-9]\d{0,4}(,[1-9]\d{0,4})*", value) is not None
        )

    def read(self, text: str) -> str:
        return text.replace(" ", "")

    def __str__(self) -> str:
        return "last, or numbers of blocks from 1 on, such as 9 or 6,9,12"


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
        "of --target teacher: a run's folder, a checkpoint, a file, or a folder of the Hugging Face hub; of "
        "video, or of images",
        metavar="CHECKPOINT",
    )
    teacher_model: str | None = setting(None, "its preset, for files that do not say what they are", MODEL)
    teacher_init_frames: int | None = setting(
        None,
        "frames of the clips that the teacher is of, if it does not say",
        FRAMES,
        unset="as the file shows, else 16",
    )
    teacher_init_size: int | None = setting(
        None,
        "side of the clips that the teacher is of, if it does not say",
        SIDE,
        unset="as the file shows, else 224",
    )
    teacher_size: int | tuple[int, int] | None = setting(
        None,
        "side in pixels of what the teacher sees, or HEIGHTxWIDTH",
        SIDE,
        unset="the clips', or the nearest that its patches divide; of an image model its own",
    )
    teacher_layers: str = setting(
        LAST,
        "its latents: last (after the final norm), the number of a block, or several (6,9,12): their mean",
        Layers(),
    )
    teacher_frames: str = setting(
        "first",
        "frames of a tubelet that an image model sees: first, or mean (of the latents of each)",
        OneOf("teacher frames", TUBELET_FRAMES),
    )
    teacher_dtype: str = setting("bfloat16", "what it computes in: bfloat16 (autocast), float32", DTYPE)
    normalize_latents: bool = setting(True, "layer-normalise its latents, without weights")
    target_loss: str = setting(
        "smooth_l1",
        f"error of a token's predicted features: {', '.join(TOKEN_LOSSES)}",
        OneOf("target loss", TOKEN_LOSSES),
    )
    teacher_attention: str = setting("auto", "the teacher's attention: as --attention has it", group=SPEED)
    teacher_batch: int | None = setting(
        None,
        "clips that the teacher sees at once",
        BATCH,
        unset="as many as make 65,536 tokens",
        group=SPEED,
    )
    teacher_identity: dict[str, Any] | None = None
    latents: str | None = setting(
        None, "folder of stored latents, which stand for the teacher", metavar="DIR"
    )
    stored_epochs: int | None = ranged(None, Whole(1, 10**9))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "teacher_layers", str(self.teacher_layers))
        if self.name == "teacher":
            return
        for one in dataclasses.fields(self):
            own = one.name.startswith(("teacher", "latents", "normalize"))
            if own and getattr(self, one.name) != one.default:
                flag = one.name.replace("_", "-")
                raise InputError(f"--{flag} is of --target teacher, and the target is {self.name}")


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
