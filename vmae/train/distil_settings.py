"""Settings of `distil`: those of `finetune`, and a teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmae.config import MODEL, TEACHER
from vmae.errors import InputError
from vmae.flags import Settings
from vmae.settings import SHARE, Real, ranged, setting
from vmae.train.finetune_settings import DEFAULTS, FinetuneConfig, FinetuneSettings
from vmae.train.pretrain_settings import EPOCHS, RunConfig
from vmae.train.published_flags import adapt_data_set


@dataclass(frozen=True, kw_only=True)
class DistilConfig(FinetuneConfig):
    """Everything that decides the student's weights.

    Attributes:
        teacher_identity: its `model_identity`.
        logits: None runs the teacher beside the student.
        stored_epochs: epochs that are stored, and then come again.
    """

    teacher: str = setting(help="fine-tuned: a run's folder, or a file", metavar="CHECKPOINT", group=TEACHER)
    teacher_identity: dict[str, Any] | None = None
    teacher_map: str | None = setting(
        None, "turn its head of more classes into one of these", metavar="FILE.json", group=TEACHER
    )
    temperature: float = setting(2.0, "of both softmaxes", Real(above=0, most=10_000), group=TEACHER)
    kl_weight: float = setting(
        0.9, "the teacher's share of the loss; the labels have the rest", SHARE, group=TEACHER
    )
    logits: str | None = setting(None, "the teacher's stored logits", metavar="DIR", group=TEACHER)
    stored_epochs: int | None = ranged(None, EPOCHS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multi_label:
            raise InputError(
                "distillation is for classes that exclude each other, not for several labels a video"
            )
        if self.logits is not None and self.augment.mixes:
            raise InputError(
                "stored logits are of single clips, which mixup and cutmix would change: --mixup 0 --cutmix "
                "0, and no --cutmix-minmax"
            )


@dataclass(frozen=True, kw_only=True)
class DistilSettings(FinetuneSettings):
    """Of `distil`, beside its configurations."""

    teacher_model: str | None = setting(
        None, "its preset, for files that do not say what they are", MODEL, group=TEACHER
    )
    store: int | None = setting(
        None,
        "store the teacher's logits of so many epochs, and end",
        EPOCHS,
        metavar="EPOCHS",
        group=TEACHER,
    )


SETTINGS = Settings(DistilConfig, RunConfig, DistilSettings, defaults=DEFAULTS, adapt=adapt_data_set)
add_arguments = SETTINGS.add_to
