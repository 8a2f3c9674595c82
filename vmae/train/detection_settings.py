"""Settings of training a detector (`finetune-detection`): what decides the result, and its flags.

Published: VideoMAE-Action-Detection, run_class_finetuning.py and
scripts/ava/videomae_vit_base_k400_pretrain+finetune/run.sh (16 frames, stride 4; AdamW, learning rate 5e-4
for 256 clips, 128 clips a step, layer decay 0.75, weight decay 0.05, 30 epochs, 5 of them warm-up, stochastic
depth 0.2, head scaled by 0.001; boxes moved at random, no mixing). It also jitters colours, and keeps each
video's own aspect at a short side of 256 pixels; neither is done here.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from vmae.config import ModelConfig, _Checked, image_size
from vmae.data.detection_dataset import KeyAugmentConfig, KeyClipConfig
from vmae.data.manifest import DEFAULT_PATTERN
from vmae.errors import InputError
from vmae.settings import COUNT, FPS, SEED, SHARE_ABOVE_0, STEPS, Whole, limits, ranged
from vmae.train.finetune_settings import INIT_SCALE, add_optimizer_arguments
from vmae.train.optim import OptimConfig
from vmae.train.parallel import world_size
from vmae.train.pretrain_settings import (
    EFFECTIVE_BATCH,
    EPOCHS,
    WARMUP_STEPS,
    RunConfig,
    add_run_arguments,
    run_from_args,
    taken,
)


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(_Checked):
    """Everything that decides the weights that come out.

    Attributes:
        model, clip, augment, optim: see their classes; `optim.lr` is for 256 clips a step.
        annotations: AVA's CSV.
        videos: folder of the videos.
        action_ids, action_names: of the head's outputs, in order.
        excluded: file of key frames to leave out.
        skip_unlisted: leave out annotations of other actions.
        skip_missing: leave out key frames of videos that are not there.
        frame_pattern: see `find_videos`.
        fps: frames a second where videos do not tell.
        layer_decay: see `vmae.train.layer_decay`.
        init_scale: factor on a new head's weights.
        effective_batch: key frames of a step, over all ranks and micro-batches; None means what the run makes
            it.
        repeat: visits of a key frame in an epoch.
        epochs: length of the run; not used when `steps` is given.
        steps: length of the run in steps; None means `epochs`.
        warmup_steps: length of the warm-up; None means `optim.warmup_epochs`.
        seed: of weights, samples and augmentation.
        dtype: "float32" or "bfloat16" (autocast, float32 weights and loss).
        init: checkpoint to start from.
        new_head: leave the checkpoint's head out, also where it is a detector's.
    """

    model: ModelConfig
    clip: KeyClipConfig
    augment: KeyAugmentConfig
    optim: OptimConfig
    annotations: str
    videos: str
    action_ids: tuple[int, ...] = ranged(within=Whole(0, 10**9))
    action_names: tuple[str, ...]
    excluded: str | None = None
    skip_unlisted: bool = False
    skip_missing: bool = False
    frame_pattern: str = DEFAULT_PATTERN
    fps: float | None = ranged(None, FPS)
    layer_decay: float = ranged(0.75, SHARE_ABOVE_0)
    init_scale: float = ranged(0.001, INIT_SCALE)
    effective_batch: int | None = ranged(None, EFFECTIVE_BATCH)
    repeat: int = ranged(1, COUNT)
    epochs: int = ranged(30, EPOCHS)
    steps: int | None = ranged(None, STEPS)
    warmup_steps: int | None = ranged(None, WARMUP_STEPS)
    seed: int = ranged(0, SEED)
    dtype: str = "float32"
    init: str | None = None
    new_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.action_ids or len(self.action_ids) != len(self.action_names):
            raise InputError(
                f"{len(self.action_ids)} action ids and {len(self.action_names)} names: one of each, at "
                "least 1"
            )

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

    @classmethod
    def from_dict(cls, values):
        """Of `to_dict`, also after a way through JSON."""
        nested = {
            "model": ModelConfig,
            "clip": KeyClipConfig,
            "augment": KeyAugmentConfig,
            "optim": OptimConfig,
        }
        made = {
            key: nested[key].from_dict(v) if key in nested and isinstance(v, dict) else v
            for key, v in values.items()
        }
        return super().from_dict(made)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    source = parser.add_argument_group("data and output")
    source.add_argument(
        "--annotations", required=True, metavar="CSV", help="AVA's annotations (see vmae.data.ava)"
    )
    source.add_argument(
        "--videos",
        required=True,
        metavar="DIR",
        help="holds ID.mp4 (or another ending), or a folder ID of images",
    )
    source.add_argument(
        "--actions", required=True, metavar="PBTXT", help="action list: what the head has outputs for"
    )
    source.add_argument("--excluded", metavar="CSV", help="key frames to leave out")
    source.add_argument(
        "--skip-unlisted", action="store_true", help="leave out annotations of actions that are not listed"
    )
    source.add_argument(
        "--skip-missing", action="store_true", help="leave out key frames of videos that are not there"
    )
    add_video_arguments(source)
    source.add_argument(
        "--output", "--output_dir", required=True, metavar="DIR", help="folder of the run: checkpoints, logs"
    )
    source.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved settings, write nothing"
    )
    start = parser.add_argument_group("what to start from")
    start.add_argument(
        "--init", "--finetune", metavar="CHECKPOINT", help="pre-trained or fine-tuned: run folder, or file"
    )
    start.add_argument(
        "--new-head",
        action="store_true",
        help="leave out the checkpoint's head also where it is a detector's",
    )
    start.add_argument(
        "--init-frames",
        type=limits(ModelConfig, "num_frames"),
        help="frames of the checkpoint's clips, if it does not say (16)",
    )
    start.add_argument(
        "--init-size",
        type=limits(ModelConfig, "img_size"),
        help="side of the checkpoint's clips, if it does not say (224)",
    )
    _add_result_arguments(parser.add_argument_group("settings that change results"))
    add_optimizer_arguments(parser.add_argument_group("optimizer (changes results)"), lr=5e-4)
    add_run_arguments(parser.add_argument_group("settings that change speed and housekeeping only"))
    parser.set_defaults(probe="none")  # what `model_from_args` asks


def add_video_arguments(group) -> None:
    """Flags that say how the files of `--videos` are to be read."""
    group.add_argument(
        "--frame-pattern",
        default=DEFAULT_PATTERN,
        metavar="PATTERN",
        help="files of image folders, numbered from 1; {video} is the id (img_{:05}.jpg)",
    )
    group.add_argument(
        "--fps",
        type=limits(DetectionConfig, "fps"),
        help="frames a second, where videos or image folders do not tell",
    )


def _add_result_arguments(group) -> None:
    group.add_argument(
        "--model", help="preset: vit_s, vit_b, vit_l, vit_h, vit_g, vit_tiny (the checkpoint's, else vit_b)"
    )
    group.add_argument(
        "--image-size",
        type=image_size,
        help="side in pixels, or HEIGHTxWIDTH; whole frames are resized to it",
    )
    group.add_argument(
        "--num-frames", "--num_frames", type=limits(ModelConfig, "num_frames"), help="frames of a clip"
    )
    group.add_argument(
        "--patch-size",
        type=limits(ModelConfig, "patch_size"),
        help="side of a tubelet in pixels (default: the preset's)",
    )
    group.add_argument(
        "--stride",
        "--sampling_rate",
        type=limits(KeyClipConfig, "stride"),
        default=4,
        help="frames from one to the next (4)",
    )
    group.add_argument(
        "--origin",
        type=limits(KeyClipConfig, "origin"),
        default=0.0,
        help="second of the movie that files begin at; 900 for cut AVA (0)",
    )
    group.add_argument(
        "--drop-path",
        "--drop_path",
        type=limits(ModelConfig, "drop_path_rate"),
        default=0.2,
        help="stochastic depth (0.2)",
    )
    group.add_argument(
        "--init-scale",
        "--init_scale",
        type=limits(DetectionConfig, "init_scale"),
        default=0.001,
        help="factor on a new head's weights (0.001)",
    )
    group.add_argument(
        "--layer-scale",
        type=limits(ModelConfig, "init_values"),
        help="initial layer scale (default: the checkpoint's, else none)",
    )
    group.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the clips (yes)"
    )
    group.add_argument(
        "--jitter", action=argparse.BooleanOptionalAction, default=True, help="move boxes a little (yes)"
    )
    group.add_argument(
        "--min-crop",
        type=limits(KeyAugmentConfig, "min_crop"),
        default=1.0,
        help="least area of a random crop; 1: whole frames (1)",
    )
    group.add_argument(
        "--batch-size",
        "--batch_size",
        type=limits(RunConfig, "batch_size"),
        default=4,
        help="key frames of a micro-batch on one rank (4)",
    )
    group.add_argument(
        "--accumulate",
        "--update_freq",
        type=limits(RunConfig, "accumulate"),
        default=1,
        help="micro-batches of a step; effective batch = batch size x accumulate x ranks (1)",
    )
    group.add_argument(
        "--repeat",
        type=limits(DetectionConfig, "repeat"),
        default=1,
        help="visits of a key frame in an epoch (1)",
    )
    group.add_argument(
        "--epochs", type=limits(DetectionConfig, "epochs"), default=30, help="length of the run (30)"
    )
    group.add_argument(
        "--steps",
        type=limits(DetectionConfig, "steps"),
        help="length of the run in steps, instead of --epochs",
    )
    group.add_argument(
        "--seed",
        type=limits(DetectionConfig, "seed"),
        default=0,
        help="of weights, samples and augmentation (0)",
    )
    group.add_argument(
        "--dtype", default="float32", help="float32, or bfloat16 with float32 weights and loss (float32)"
    )


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
    warmup_epochs, warmup_steps = args.warmup_epochs, args.warmup_steps
    if warmup_epochs is None:
        warmup_epochs = min(5.0, args.epochs / 6)
        if warmup_steps is None and args.steps is not None:
            warmup_steps = args.steps // 10
    run = run_from_args(args)
    config = DetectionConfig(
        model=model,
        clip=KeyClipConfig(
            num_frames=model.num_frames, image_size=model.img_size, stride=args.stride, origin=args.origin
        ),
        augment=KeyAugmentConfig(**taken(args, "flip jitter min_crop")),
        optim=OptimConfig(
            warmup_epochs=warmup_epochs, **taken(args, "lr min_lr betas eps weight_decay clip_grad")
        ),
        action_ids=tuple(actions),
        action_names=tuple(actions.values()),
        warmup_steps=warmup_steps,
        effective_batch=run.videos_per_step(world_size()),
        **taken(
            args,
            "annotations videos excluded skip_unlisted skip_missing frame_pattern fps layer_decay init_scale",
        ),
        **taken(args, "repeat epochs steps seed dtype init new_head"),
    )
    return config, run
