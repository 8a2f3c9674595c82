"""Settings of the temporal detector: what decides the result of its training and of its test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmae.config import _Checked
from vmae.settings import COUNT, SEED, SHARE_ABOVE_0, SHARE_BELOW_1, Real, Whole, ranged
from vmae.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(_Checked):
    """What decides the result of a training and of a test.

    Attributes:
        features: folder of the features of all videos.
        dataset: ActionFormer's file, with the segments.
        subset: of the dataset, to train on.
        about: what the features are of; None reads it from the folder.
        classes: None takes those of the subset's segments.
        width, depth: of the head.
        drop_rate: dropout in the head.
        epochs: passes over the training videos; `steps`, in optimizer steps, comes first.
        max_positions: of a video in training; of a longer one, a random piece.
        lr, weight_decay: of AdamW; the rate rises over the first tenth of the steps, then falls as a cosine.
        core: share of an action, around its middle, whose positions learn it.
        sigma: of soft-NMS; larger lets more neighbours live.
        min_score, keep: least score of a detection, and most detections of a video.
        seed: of everything random.
    """

    features: str
    dataset: str
    subset: str = "training"
    about: dict[str, Any] | None = None
    classes: tuple[str, ...] | None = None
    width: int = ranged(64, Whole(1, 2**14))
    depth: int = ranged(5, Whole(1, 1000))
    drop_rate: float = ranged(0.1, SHARE_BELOW_1)
    effective_batch: int | None = ranged(None, COUNT)
    epochs: int = ranged(40, COUNT)
    steps: int | None = ranged(None, COUNT)
    warmup_steps: int | None = ranged(None, Whole(0, COUNT.most))
    max_positions: int = ranged(2048, COUNT)
    lr: float = ranged(2e-3, Real(above=0, most=10_000))
    weight_decay: float = ranged(0.05, Real(least=0, most=1000))
    core: float = ranged(0.5, SHARE_ABOVE_0)
    sigma: float = ranged(0.5, Real(above=0, most=10**6))
    min_score: float = ranged(0.01, SHARE_ABOVE_0)
    keep: int = ranged(200, COUNT)
    seed: int = ranged(0, SEED)
    num_sample, dtype, init = 1, "float32", None  # the same for every detector

    @property
    def optim(self) -> OptimConfig:
        return OptimConfig(
            lr=self.lr,
            min_lr=0.0,
            warmup_epochs=self.epochs / 10,
            betas=(0.9, 0.999),
            weight_decay=self.weight_decay,
            clip_grad=1.0,
        )
