"""Settings of distillation (`distil`): those of fine-tuning, and what a teacher adds."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from vmae.errors import InputError
from vmae.settings import SHARE, Real, limits, ranged
from vmae.train import finetune_settings
from vmae.train.finetune_settings import FinetuneConfig
from vmae.train.pretrain_settings import EPOCHS


@dataclass(frozen=True, kw_only=True)
class DistilConfig(FinetuneConfig):
    """Everything that decides the student's weights.

    Attributes:
        teacher: its checkpoint.
        teacher_identity: its `model_identity`.
        teacher_map: file that says which of the teacher's classes the student's are.
        temperature: of both softmaxes.
        kl_weight: share of the loss that the teacher has; the labels have the rest.
        logits: folder of the teacher's stored logits; None runs it beside the student.
        stored_epochs: epochs that are stored, and then come again.
    """

    teacher: str
    teacher_identity: dict[str, Any] | None = None
    teacher_map: str | None = None
    temperature: float = ranged(2.0, Real(above=0, most=10_000))
    kl_weight: float = ranged(0.9, SHARE)
    logits: str | None = None
    stored_epochs: int | None = ranged(None, EPOCHS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multi_label:
            raise InputError(
                "distillation is for classes that exclude each other, not for several labels a video"
            )
        if self.logits is not None and (self.augment.mixup or self.augment.cutmix):
            raise InputError(
                "stored logits are of single clips, which mixup and cutmix would change: --mixup 0 --cutmix 0"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    finetune_settings.add_arguments(parser)
    group = parser.add_argument_group("teacher (changes results)")
    group.add_argument(
        "--teacher", required=True, metavar="CHECKPOINT", help="fine-tuned: a run's folder, or a file"
    )
    group.add_argument("--teacher-model", help="its preset, for files that do not say what they are")
    group.add_argument(
        "--teacher-map", metavar="FILE.json", help="turn its head of more classes into one of these"
    )
    group.add_argument(
        "--temperature", type=limits(DistilConfig, "temperature"), default=2.0, help="of both softmaxes (2)"
    )
    group.add_argument(
        "--kl-weight",
        type=limits(DistilConfig, "kl_weight"),
        default=0.9,
        help="the teacher's share of the loss (0.9)",
    )
    group.add_argument("--logits", metavar="DIR", help="the teacher's stored logits")
    group.add_argument(
        "--store",
        type=limits(DistilConfig, "stored_epochs"),
        metavar="EPOCHS",
        help="store the teacher's logits of so many epochs, and end",
    )
