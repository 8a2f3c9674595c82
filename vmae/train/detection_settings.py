"""Settings of training a detector (`finetune-detection`): what decides the result, and its flags.

Published: VideoMAE-Action-Detection, run_class_finetuning.py and
scripts/ava/videomae_vit_base_k400_pretrain+finetune/run.sh (16 frames, stride 4; AdamW, learning rate 5e-4
for 256 clips, 128 clips a step, layer decay 0.75, weight decay 0.05, 30 epochs, 5 of them warm-up, stochastic
depth 0.2, head scaled by 0.001; boxes moved at random, no mixing): these are the defaults here. What it does
with pixels, and its RoIAlign, are `--preprocess published --roi published`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from vmae.config import DATA, RESULTS, ModelConfig, StartSettings
from vmae.data.detection_dataset import KeyAugmentConfig, KeyClipConfig
from vmae.data.manifest import DEFAULT_PATTERN
from vmae.errors import InputError
from vmae.flags import Settings, chosen
from vmae.settings import FPS, OneOf, Whole, ranged, setting, setting_like
from vmae.train import finetune_settings
from vmae.train.finetune_settings import SupervisedConfig, usual_warmup
from vmae.train.pretrain_settings import RunConfig, TrainingConfig, run_from_args, training_from_args


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(SupervisedConfig):
    """Everything that decides the weights that come out.

    Attributes:
        action_ids, action_names: of the head's outputs, in order.
    """

    clip: KeyClipConfig
    augment: KeyAugmentConfig
    annotations: str = setting(help="AVA's annotations (see vmae.data.ava)", metavar="CSV", group=DATA)
    videos: str = setting(
        help="holds ID.mp4 (or another ending), or a folder ID of images", metavar="DIR", group=DATA
    )
    action_ids: tuple[int, ...] = ranged(within=Whole(0, 10**9))
    action_names: tuple[str, ...]
    excluded: str | None = setting(None, "key frames to leave out", metavar="CSV", group=DATA)
    skip_unlisted: bool = setting(False, "leave out annotations of actions that are not listed", group=DATA)
    skip_missing: bool = setting(False, "leave out key frames of videos that are not there", group=DATA)
    frame_pattern: str = setting(
        DEFAULT_PATTERN,
        "files of image folders, numbered from 1; {video} is the id",
        metavar="PATTERN",
        group=DATA,
    )
    fps: float | None = setting(
        None, "frames a second, where videos or image folders do not tell", FPS, group=DATA
    )
    repeat: int = setting_like(TrainingConfig, "repeat", 1, help="visits of a key frame in an epoch")
    roi: str = setting(
        "aligned",
        "RoIAlign: aligned, with the half-pixel shift; published, without, as VideoMAE-Action-Detection",
        OneOf("RoIAlign", ("aligned", "published")),
        group=RESULTS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.action_ids or len(self.action_ids) != len(self.action_names):
            raise InputError(
                f"{len(self.action_ids)} action ids and {len(self.action_names)} names: one of each, at "
                "least 1"
            )
        if self.clip.published and self.augment.min_crop < 1:
            raise InputError("--min-crop is of --preprocess resize: published clips are cropped as published")

    @property
    def num_classes(self) -> int:
        return len(self.action_ids)

    @property
    def num_sample(self) -> int:
        """Clips of a key frame."""
        return 1

    @property
    def actions(self) -> dict[int, str]:
        return dict(zip(self.action_ids, self.action_names))


@dataclass(frozen=True, kw_only=True)
class DetectionSettings(StartSettings):
    """Of `finetune-detection`, beside its configurations."""

    actions: str = setting(help="action list: what the head has outputs for", metavar="PBTXT", group=DATA)


DEFAULTS = finetune_settings.DEFAULTS | {"lr": 5e-4, "batch_size": 4, "drop_path": 0.2}
SETTINGS = Settings(DetectionConfig, RunConfig, DetectionSettings, defaults=DEFAULTS)
add_arguments = SETTINGS.add_to


def configs_from_args(
    args: argparse.Namespace, model: ModelConfig, actions: dict[int, str]
) -> tuple[DetectionConfig, RunConfig]:
    """The checked settings of a command line.

    Args:
        model: with the grid of its positions.
        actions: names by id.

    Raises:
        InputError: settings that do not fit together.
    """
    args.settings.complete(args)
    run = run_from_args(args)
    seen = {"num_frames": model.num_frames, "image_size": model.img_size}
    follows = {
        "action_ids": tuple(actions),
        "action_names": tuple(actions.values()),
        "new_head": args.new_head,
    }
    config = DetectionConfig(
        model=model,
        clip=KeyClipConfig.from_dict({**seen, **chosen(KeyClipConfig, args)}),
        augment=KeyAugmentConfig(**chosen(KeyAugmentConfig, args)),
        **{**training_from_args(args, DetectionConfig, run, usual_warmup(args)), **follows},
    )
    return config, run
