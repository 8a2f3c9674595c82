"""Settings of supervised training (`finetune`, `distil`): what decides the result, and its flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmae.config import PUBLISHED_CLASSIFIERS, ModelConfig, _Checked, image_size
from vmae.data.augment_classify import AugmentConfig
from vmae.data.classify_dataset import ClipConfig
from vmae.data.labels import read_class_names
from vmae.errors import InputError
from vmae.settings import (
    BATCH,
    CLASSES,
    COUNT,
    SEED,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    STEPS,
    Real,
    limits,
    ranged,
)
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

PROBES = ("none", "linear", "attentive")
INIT_SCALE = Real(least=0, most=1000)
# Of a folder that is given for a list. The published code trains on train.csv, and validates and tests on
# val.csv; that of VideoMAE V1 tests on test.csv.
TRAINING_LISTS, TEST_LISTS = ("train.csv",), ("test.csv", "val.csv")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(_Checked):
    """Everything that decides the weights that come out.

    Attributes:
        model, clip, augment, optim: see their classes; `optim.lr` is for 256 videos a step.
        data: the labelled list.
        data_root: folder that its relative paths start from.
        num_classes: of the head.
        class_names: by number, where they are known; kept with the weights.
        multi_label: a video may have several labels; each class has a loss of its own.
        probe: "none" trains everything; "linear" and "attentive" only what reads the frozen encoder.
        pooling: of the tokens, see `Classifier`.
        layer_decay: see `vmae.train.layer_decay`.
        ema_decay: of the weights' moving average; None keeps none.
        head_drop_rate, init_scale: see `Classifier`.
        effective_batch: videos of a step, over all ranks and micro-batches; None means what the run makes it.
        num_sample: clips of each decoded video (repeated augmentation).
        repeat: visits of a video in an epoch.
        epochs: length of the run; not used when `steps` is given.
        steps: length of the run in steps; None means `epochs`.
        warmup_steps: length of the warm-up; None means `optim.warmup_epochs`.
        seed: of weights, samples and augmentation.
        dtype: "float32" or "bfloat16" (autocast, float32 weights and loss).
        init: checkpoint to start from.
        label_map: file that says which of a larger head's classes to keep.
        new_head: leave the checkpoint's head out.
    """

    model: ModelConfig
    clip: ClipConfig
    augment: AugmentConfig
    optim: OptimConfig
    data: str
    num_classes: int = ranged(within=CLASSES)
    data_root: str | None = None
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False
    probe: str = "none"
    pooling: str = "mean"
    layer_decay: float = ranged(0.75, SHARE_ABOVE_0)
    ema_decay: float | None = ranged(None, SHARE_BELOW_1)
    head_drop_rate: float = ranged(0.0, SHARE_BELOW_1)
    init_scale: float = ranged(0.001, INIT_SCALE)
    effective_batch: int | None = ranged(None, EFFECTIVE_BATCH)
    num_sample: int = ranged(2, BATCH)
    repeat: int = ranged(1, COUNT)
    epochs: int = ranged(30, EPOCHS)
    steps: int | None = ranged(None, STEPS)
    warmup_steps: int | None = ranged(None, WARMUP_STEPS)
    seed: int = ranged(0, SEED)
    dtype: str = "float32"
    init: str | None = None
    label_map: str | None = None
    new_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe not in PROBES:
            raise InputError(f"unknown probe {self.probe!r}; known: {', '.join(PROBES)}")
        if self.probe != "none" and self.init is None:
            raise InputError("a probe reads a trained encoder: name its checkpoint with --init")
        if (self.label_map or self.new_head) and self.init is None:
            raise InputError("--label-map and --new-head are about a checkpoint's head: name it with --init")
        if self.label_map and self.new_head:
            raise InputError("--label-map keeps a checkpoint's head, --new-head leaves it out: choose one")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise InputError(
                f"the class list has {len(self.class_names)} names, but num_classes is {self.num_classes}"
            )

    @classmethod
    def from_dict(cls, values):
        """Of `to_dict`, also after a way through JSON."""
        nested = {"model": ModelConfig, "clip": ClipConfig, "augment": AugmentConfig, "optim": OptimConfig}
        made = {
            key: nested[key].from_dict(v) if key in nested and isinstance(v, dict) else v
            for key, v in values.items()
        }
        return super().from_dict(made)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command; the published names of the same settings work too."""
    source = parser.add_argument_group("data and output")
    source.add_argument(
        "--data",
        "--data_path",
        required=True,
        metavar="LIST",
        help="labelled list, `path label` a line, or a folder with train.csv",
    )
    source.add_argument(
        "--data-root", "--data_root", metavar="DIR", help="where the list's relative paths start"
    )
    source.add_argument("--classes", metavar="FILE", help="class names: a name a line, or JSON")
    source.add_argument(
        "--num-classes",
        "--nb_classes",
        type=limits(FinetuneConfig, "num_classes"),
        help="without --classes (default: largest label + 1)",
    )
    source.add_argument(
        "--output", "--output_dir", required=True, metavar="DIR", help="folder of the run: checkpoints, logs"
    )
    source.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved settings, write nothing"
    )
    _add_start_arguments(parser.add_argument_group("what to start from"))
    _add_result_arguments(parser.add_argument_group("settings that change results"))
    _add_augment_arguments(parser.add_argument_group("augmentation (changes results)"))
    add_optimizer_arguments(parser.add_argument_group("optimizer (changes results)"))
    add_run_arguments(parser.add_argument_group("settings that change speed and housekeeping only"))


def _add_start_arguments(group) -> None:
    group.add_argument(
        "--init", "--finetune", metavar="CHECKPOINT", help="pre-trained or fine-tuned: run folder, or file"
    )
    group.add_argument(
        "--label-map",
        metavar="FILE.json",
        help="turn the checkpoint's head of more classes into one of these",
    )
    group.add_argument("--new-head", action="store_true", help="leave the checkpoint's head out")
    group.add_argument(
        "--init-frames",
        type=limits(ModelConfig, "num_frames"),
        help="frames of the checkpoint's clips, if it does not say (16)",
    )
    group.add_argument(
        "--init-size",
        type=limits(ModelConfig, "img_size"),
        help="side of the checkpoint's clips, if it does not say (224)",
    )
    group.add_argument(
        "--probe", default="none", help="freeze the encoder, train a linear or attentive reader (none)"
    )


def _add_result_arguments(group) -> None:
    group.add_argument(
        "--model", help="preset: vit_s, vit_b, vit_l, vit_h, vit_g, vit_tiny (the checkpoint's, else vit_b)"
    )
    group.add_argument(
        "--image-size", "--input_size", type=image_size, help="side in pixels, or HEIGHTxWIDTH"
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
        "--drop-path",
        "--drop_path",
        type=limits(ModelConfig, "drop_path_rate"),
        default=0.1,
        help="stochastic depth (0.1)",
    )
    group.add_argument(
        "--head-drop",
        "--head_drop_rate",
        type=limits(FinetuneConfig, "head_drop_rate"),
        default=0.0,
        help="dropout before the head (0)",
    )
    group.add_argument(
        "--init-scale",
        "--init_scale",
        type=limits(FinetuneConfig, "init_scale"),
        default=0.001,
        help="factor on a new head's weights (0.001)",
    )
    group.add_argument(
        "--layer-scale",
        type=limits(ModelConfig, "init_values"),
        help="initial layer scale (default: the checkpoint's, else none)",
    )
    group.add_argument("--pooling", default="mean", help="of the tokens: mean, first (mean)")
    group.add_argument("--sampling", default="dense", help="frames: dense, or sparse as for SSv2 (dense)")
    group.add_argument(
        "--sparse_sample", dest="sampling", action="store_const", const="sparse", help=argparse.SUPPRESS
    )
    group.add_argument(
        "--stride",
        "--sampling_rate",
        type=limits(ClipConfig, "stride"),
        default=4,
        help="frames from one to the next, for dense (4)",
    )
    group.add_argument(
        "--batch-size",
        "--batch_size",
        type=limits(RunConfig, "batch_size"),
        default=64,
        help="videos of a micro-batch on one rank (64)",
    )
    group.add_argument(
        "--accumulate",
        "--update_freq",
        type=limits(RunConfig, "accumulate"),
        default=1,
        help="micro-batches of a step; effective batch = batch size x accumulate x ranks (1)",
    )
    group.add_argument(
        "--num-sample",
        "--num_sample",
        type=limits(FinetuneConfig, "num_sample"),
        default=2,
        help="clips of each decoded video (2)",
    )
    group.add_argument(
        "--repeat",
        type=limits(FinetuneConfig, "repeat"),
        default=1,
        help="visits of a video in an epoch, for short lists (1)",
    )
    group.add_argument(
        "--epochs", type=limits(FinetuneConfig, "epochs"), default=30, help="length of the run (30)"
    )
    group.add_argument(
        "--steps",
        type=limits(FinetuneConfig, "steps"),
        help="length of the run in steps, instead of --epochs",
    )
    group.add_argument(
        "--multi-label", action="store_true", help="a loss for each class (found in the list otherwise)"
    )
    group.add_argument(
        "--ema",
        "--model_ema_decay",
        type=limits(FinetuneConfig, "ema_decay"),
        metavar="DECAY",
        help="average the weights, 0.9999 say (no)",
    )
    group.add_argument(
        "--seed",
        type=limits(FinetuneConfig, "seed"),
        default=0,
        help="of weights, samples and augmentation (0)",
    )
    group.add_argument(
        "--dtype", default="float32", help="float32, or bfloat16 with float32 weights and loss (float32)"
    )


def _add_augment_arguments(group) -> None:
    group.add_argument(
        "--augment", default="published", choices=["published", "none"], help="what the others start from"
    )
    group.add_argument(
        "--operations",
        type=limits(AugmentConfig, "operations"),
        help="RandAugment operations of a clip, each with probability 0.5 (4)",
    )
    group.add_argument(
        "--magnitude", type=limits(AugmentConfig, "magnitude"), help="of RandAugment, 0 to 10 (7)"
    )
    group.add_argument("--magnitude-std", type=limits(AugmentConfig, "magnitude_std"), help="(0.5)")
    group.add_argument("--crop", action=argparse.BooleanOptionalAction, help="random resized crop (yes)")
    group.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, help="mirror half of the clips; not for SSv2 (yes)"
    )
    group.add_argument(
        "--erase",
        "--reprob",
        type=limits(AugmentConfig, "erase"),
        help="probability of random erasing (0.25)",
    )
    group.add_argument("--mixup", type=limits(AugmentConfig, "mixup"), help="alpha (0.8)")
    group.add_argument("--cutmix", type=limits(AugmentConfig, "cutmix"), help="alpha (1.0)")
    group.add_argument("--smoothing", type=limits(AugmentConfig, "smoothing"), help="of labels (0.1)")


def add_optimizer_arguments(group, lr: float = 1e-3) -> None:
    """Flags of `OptimConfig`, of the warm-up and of the layers' decay."""
    group.add_argument(
        "--lr",
        type=limits(OptimConfig, "lr"),
        default=lr,
        help=f"peak learning rate for 256 videos a step ({lr:g})",
    )
    group.add_argument(
        "--min-lr",
        "--min_lr",
        type=limits(OptimConfig, "min_lr"),
        default=1e-6,
        help="final learning rate for 256 videos (1e-6)",
    )
    group.add_argument(
        "--warmup-epochs",
        "--warmup_epochs",
        type=limits(OptimConfig, "warmup_epochs"),
        help="linear warm-up (5; at most a sixth of the run)",
    )
    group.add_argument(
        "--warmup-steps",
        "--warmup_steps",
        type=limits(FinetuneConfig, "warmup_steps"),
        help="linear warm-up in steps, instead of epochs",
    )
    group.add_argument(
        "--layer-decay",
        "--layer_decay",
        type=limits(FinetuneConfig, "layer_decay"),
        default=0.75,
        help="factor from a layer to the one before",
    )
    group.add_argument(
        "--weight-decay",
        "--weight_decay",
        type=limits(OptimConfig, "weight_decay"),
        default=0.05,
        help="(0.05)",
    )
    group.add_argument(
        "--clip-grad",
        "--clip_grad",
        type=limits(OptimConfig, "clip_grad"),
        help="largest gradient norm (no clipping)",
    )
    group.add_argument(
        "--betas",
        "--opt_betas",
        type=limits(OptimConfig, "betas"),
        nargs=2,
        default=(0.9, 0.999),
        help="of AdamW (0.9 0.999)",
    )
    group.add_argument(
        "--eps", "--opt_eps", type=limits(OptimConfig, "eps"), default=1e-8, help="of AdamW (1e-8)"
    )
    group.add_argument("--opt", choices=["adamw"], default="adamw", help=argparse.SUPPRESS)


def augment_from_args(args: argparse.Namespace) -> AugmentConfig:
    names = "operations magnitude magnitude_std crop flip erase mixup cutmix smoothing"
    chosen = {name: value for name, value in taken(args, names).items() if value is not None}
    return AugmentConfig(**chosen) if args.augment == "published" else AugmentConfig.none(**chosen)


def list_of(path: str, names: Sequence[str] = TRAINING_LISTS) -> str:
    """The list file that `path` means: itself, or the first of `names` that is in this folder.

    Raises:
        InputError: a folder that holds none of them.
    """
    if not Path(path).is_dir():
        return path
    found = next((name for name in names if (Path(path) / name).is_file()), None)
    if found is None:
        raise InputError(
            f"folder {path} holds no {' and no '.join(names)}; give a list, `path label` a line "
            "(docs/own_data.md has lines "
            "that make one of a folder for each class)"
        )
    return str(Path(path) / found)


def model_from_args(args: argparse.Namespace, found: dict | None) -> ModelConfig:
    """The architecture: the preset named, or the checkpoint's own (`found`, its `config.model`), with what
    was changed.

    Raises:
        InputError: an unknown preset, or sizes that do not fit together.
    """
    flags = {
        "img_size": "image_size",
        "num_frames": "num_frames",
        "patch_size": "patch_size",
        "init_values": "layer_scale",
    }
    changes = {name: getattr(args, flag) for name, flag in flags.items() if getattr(args, flag) is not None}
    changes["drop_path_rate"] = 0.0 if args.probe != "none" else args.drop_path
    if args.model is None and found is not None:
        return ModelConfig.from_dict(found).replace(pos_grid=None, **changes)
    return ModelConfig.preset(PUBLISHED_CLASSIFIERS.get(args.model, args.model or "vit_b"), **changes)


def configs_from_args(
    args: argparse.Namespace, model: ModelConfig, num_classes: int
) -> tuple[FinetuneConfig, RunConfig]:
    """The checked settings of a command line.

    Args:
        model: with the grid of its positions.
        num_classes: of the class list, the flag, or the labels.

    Raises:
        InputError: settings that do not fit together.
    """
    warmup_epochs, warmup_steps = args.warmup_epochs, args.warmup_steps
    if warmup_epochs is None:
        warmup_epochs = min(5.0, args.epochs / 6)
        if warmup_steps is None and args.steps is not None:
            warmup_steps = args.steps // 10
    run = run_from_args(args)
    config = FinetuneConfig(
        model=model,
        clip=ClipConfig(
            num_frames=model.num_frames, image_size=model.img_size, sampling=args.sampling, stride=args.stride
        ),
        augment=augment_from_args(args),
        optim=OptimConfig(
            warmup_epochs=warmup_epochs, **taken(args, "lr min_lr betas eps weight_decay clip_grad")
        ),
        data=list_of(args.data),
        num_classes=num_classes,
        class_names=tuple(read_class_names(args.classes)) if args.classes else None,
        pooling="attentive" if args.probe == "attentive" else args.pooling,
        ema_decay=args.ema,
        head_drop_rate=args.head_drop,
        warmup_steps=warmup_steps,
        effective_batch=run.videos_per_step(world_size()),
        **taken(
            args,
            "data_root multi_label probe layer_decay init_scale num_sample repeat epochs steps seed dtype",
        ),
        **taken(args, "init label_map new_head"),
    )
    return config, run
