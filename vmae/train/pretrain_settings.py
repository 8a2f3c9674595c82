"""Settings of `pretrain`, and what every kind of training shares: what decides the result, what only carries
a run out, and how settings become configurations."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from vmae.config import (
    DATA,
    DTYPE,
    RESULTS,
    SPEED,
    TEACHER,
    USUAL_MODEL,
    MaskConfig,
    ModelConfig,
    ModelSettings,
    OptimConfig,
    SpeedConfig,
    _Checked,
)
from vmae.data.augment import CROPS
from vmae.data.loaders import LOADERS
from vmae.data.manifest import DEFAULT_PATTERN
from vmae.data.sampling import SAMPLINGS
from vmae.errors import InputError
from vmae.flags import Settings, chosen
from vmae.settings import BATCH, COUNT, FPS, SEED, SHARE, STEPS, STRIDE, OneOf, Whole, setting, setting_like
from vmae.targets.settings import TargetConfig
from vmae.train.probe_settings import ProbeConfig
from vmae.train.published_flags import PRETRAIN_FLAGS, adapt_pretrain
from vmae.train.sinks import SERVICES

EPOCHS, WARMUP_STEPS, EFFECTIVE_BATCH = Whole(1, 10**9), Whole(0, STEPS.most), Whole(1, 2**40)
OPTIMIZER = OptimConfig.group


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(_Checked):
    """What decides the weights that come out of any kind of training.

    Attributes:
        effective_batch: over all ranks and micro-batches; None means what the run makes it
            (`RunConfig.videos_per_step`), and nothing else is taken.
        warmup_steps: None means `optim.warmup_epochs`.
    """

    group = RESULTS

    effective_batch: int | None = setting(
        None,
        "videos of a step, over all ranks and micro-batches",
        EFFECTIVE_BATCH,
        unset="batch size x accumulate x ranks",
        overrules=("accumulate",),
    )
    repeat: int = setting(1, "visits of a video in an epoch, for short lists", COUNT)
    epochs: int = setting(1, "length of the run", EPOCHS, overrules=("steps",))
    steps: int | None = setting(None, "length of the run in steps, instead of --epochs", STEPS)
    warmup_steps: int | None = setting(
        None,
        "linear warm-up in steps, instead of epochs",
        WARMUP_STEPS,
        aliases=("--warmup_steps",),
        unset_words=("-1",),
        group=OPTIMIZER,
    )
    seed: int = setting(0, "of weights, samples, masks and augmentation", SEED)
    dtype: str = setting("float32", "float32, or bfloat16 (autocast) with float32 weights and loss", DTYPE)
    init: str | None = setting(
        None,
        "weights to start from: a run's folder, a checkpoint, or a file (.pth, .safetensors)",
        aliases=("--finetune",),
        metavar="WEIGHTS",
        group=DATA,
    )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Everything that decides the weights that come out; `optim.lr` is for 256 videos a step."""

    model: ModelConfig
    mask: MaskConfig
    optim: OptimConfig
    target: TargetConfig = TargetConfig()
    probe: ProbeConfig = ProbeConfig()
    data: str = setting(
        help="list file: one video or frame folder a line; a folder of videos; an index of shards (.vmae); "
        "or a mix of these (.yaml)",
        aliases=("--data_path",),
        metavar="LIST",
        group=DATA,
    )
    data_root: str | None = setting(
        None,
        "where the list's relative paths, or an index's shards, start",
        aliases=("--data_root",),
        metavar="DIR",
        group=DATA,
    )
    frame_pattern: str = setting(
        DEFAULT_PATTERN,
        "files of frame folders, where the list says nothing else",
        aliases=("--fname_tmpl",),
        metavar="PATTERN",
        group=DATA,
    )
    stride: int = setting(
        4,
        "frames from one sampled frame to the next, where the list says nothing else",
        STRIDE,
        aliases=("--sampling_rate",),
    )
    sampling: str = setting(
        "published",
        "published; exact (the stride kept exactly, the last frame in reach); fps (clips of --fps)",
        OneOf("sampling", SAMPLINGS),
    )
    fps: float | None = setting(None, "frames a second of the clips, with --sampling fps", FPS)
    crop: str = setting(
        "published",
        "published (random, multi-scale); center (the largest centred box of the clips' shape)",
        OneOf("crop", CROPS),
    )
    flip: bool = setting(
        False, "mirror half of the clips; wrong where left and right mean something, as in SSv2"
    )
    resize: str = setting(
        "torch",
        "torch; pil (or: published): the published pixels, slower",
        OneOf("resize", ("torch", "pil"), {"published": "pil"}),
    )
    loader: str = setting(
        "cpu", "who decodes: cpu, or dali (a GPU's decoder; some levels off)", OneOf("loader", LOADERS)
    )
    num_sample: int = setting(1, "clips cut from each decoded video", BATCH, aliases=("--num_sample",))
    epochs: int = setting_like(TrainingConfig, "epochs", 800)
    normalize_target: bool = setting(True, "predict tubelets normalised per channel; else pixels in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Checked):
    """Where and how a run is carried out; nothing here decides what comes out."""

    group = SPEED

    output: str = setting(
        help="folder of the run: checkpoints, logs", aliases=("--output_dir",), metavar="DIR", group=DATA
    )
    device: str = setting("auto", "auto (a GPU if there is one), cpu, cuda, or a GPU such as cuda:1")
    speed: SpeedConfig = dataclasses.field(default_factory=SpeedConfig)
    batch_size: int = setting(
        32, "videos of a micro-batch on one rank", BATCH, aliases=("--batch_size",), group=RESULTS
    )
    accumulate: int = setting(
        1,
        "micro-batches of a step; effective batch = batch size x accumulate x ranks",
        BATCH,
        aliases=("--update_freq",),
        group=RESULTS,
        overrules=("effective_batch",),
    )
    resume: str | None = setting(
        "auto",
        "go on from this checkpoint; auto: from the newest one in the output folder; last-good: from the "
        "newest one that is not damaged",
        aliases=("--auto_resume",),
        metavar="CHECKPOINT",
        bare="auto",
        constants=(
            (
                ("--no-resume", "--no_auto_resume"),
                None,
                "start afresh; an earlier run in the output folder is moved to DIR/previous-N",
            ),
        ),
    )
    save_every: int = setting(
        1000, "steps from one checkpoint to the next", STEPS, overrules=("save_every_epochs",)
    )
    save_every_epochs: int | None = setting(
        None,
        "epochs from one checkpoint to the next, instead of --save-every",
        EPOCHS,
        aliases=("--save_ckpt_freq",),
        metavar="EPOCHS",
        unset="none",
        overrules=("save_every",),
    )
    keep: int = setting(3, "newest checkpoints that stay", COUNT)
    keep_every: int | None = setting(
        None, "checkpoints of steps that this divides stay as well", STEPS, metavar="STEPS", unset="none"
    )
    async_save: bool = setting(False, "write checkpoints while training goes on")
    log_every: int = setting(10, "steps from one log line to the next", STEPS)
    tensorboard: bool = setting(True, "TensorBoard files")
    log_dir: str | None = setting(
        None, "where they go", aliases=("--log_dir",), metavar="DIR", unset="tensorboard, in the run's folder"
    )
    log_to: str = setting(
        "none",
        "also send the numbers of the log, and the settings, to wandb or trackio",
        OneOf("log service", ("none", *SERVICES)),
    )
    log_project: str | None = setting(
        None, "project there", metavar="NAME", unset="WANDB_PROJECT or TRACKIO_PROJECT, else vmae"
    )
    log_name: str | None = setting(
        None, "name of the run there", metavar="NAME", unset="that of the output folder"
    )
    max_bad_share: float = setting(0.05, "bad videos that do not stop a run, of all", SHARE)
    allow_list_change: bool = setting(
        False,
        "go on although videos, labels or weights differ from the checkpoint's: later samples are of the new "
        "list",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.speed.cuda_graphs and self.accumulate > 1:
            # torch issue 169545: a replay writes into the gradients of the micro-batch before, which raises
            # or (seen there) adds them up wrongly.
            raise InputError(
                f"--cuda-graphs does not go with --accumulate {self.accumulate}: a replayed backward writes "
                "over the gradients that it should add to; leave --cuda-graphs out, or take --accumulate 1 "
                "with a larger --batch-size or more ranks"
            )

    def videos_per_step(self, ranks: int) -> int:
        """The effective batch."""
        return self.batch_size * self.accumulate * ranks


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(ModelSettings):
    """Of `pretrain`, beside its configurations."""

    store: int | None = setting(
        None,
        "store the teacher's latents of so many epochs in --latents, and end",
        EPOCHS,
        metavar="EPOCHS",
        group=TEACHER,
    )


SETTINGS = Settings(
    PretrainConfig,
    RunConfig,
    PretrainSettings,
    defaults={"model": USUAL_MODEL},
    others=PRETRAIN_FLAGS,
    adapt=adapt_pretrain,
)
add_arguments = SETTINGS.add_to


def configs_from_args(args: argparse.Namespace) -> tuple[PretrainConfig, RunConfig]:
    """The checked settings of a command line.

    Raises:
        InputError: an unknown preset, or settings that do not fit together.
    """
    args.settings.complete(args)
    run = run_from_args(args)
    usual = OptimConfig.warmup_epochs
    if args.epochs < 2 * usual:
        usual = args.epochs / 10
    config = PretrainConfig(
        model=model_from_args(args),
        mask=MaskConfig(**chosen(MaskConfig, args)),
        target=TargetConfig(**chosen(TargetConfig, args)),
        probe=ProbeConfig(**chosen(ProbeConfig, args)),
        **training_from_args(args, PretrainConfig, run, usual),
    )
    return config, run


# --- For every kind of training ---


def world_size() -> int:
    """Processes of this run, as its launcher says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_ranks() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def run_from_args(args: argparse.Namespace) -> RunConfig:
    """Where and how; with an effective batch, and no `accumulate`, the micro-batches that make it up.

    Raises:
        InputError: they cannot.
    """
    args.settings.complete(args)
    given = chosen(RunConfig, args)
    wanted, at_once = args.effective_batch, args.batch_size * world_size()
    if wanted is not None and "accumulate" not in given:
        if wanted % at_once:
            raise InputError(
                f"an effective batch of {wanted} videos is no multiple of batch size {args.batch_size} x "
                f"{world_size()} ranks: choose a --batch-size that divides {wanted / world_size():g}"
            )
        given["accumulate"] = wanted // at_once
    return RunConfig(speed=SpeedConfig(**chosen(SpeedConfig, args)), **given)


def model_from_args(
    args: argparse.Namespace, found: dict | None = None, shown: dict | None = None
) -> ModelConfig:
    """The architecture: the preset named, or the checkpoint's own (`found`, its `config.model`), with what
    was changed.

    Args:
        shown: fields that the tensors of a checkpoint show which does not say its model.

    Raises:
        InputError: an unknown preset, or sizes that do not fit together.
    """
    args.settings.complete(args)
    changes = chosen(ModelConfig, args)
    if getattr(args, "probe", "none") != "none":
        changes["drop_path_rate"] = 0.0
    if args.model is None and found is not None:
        return ModelConfig.from_dict(found).replace(**{"pos_grid": None, **changes})
    return ModelConfig.preset(args.model or USUAL_MODEL, **{**(shown or {}), **changes})


def training_from_args(
    args: argparse.Namespace, config: type, run: RunConfig, usual_warmup: float
) -> dict[str, Any]:
    """What was set of a training configuration, with its optimizer, batch and warm-up, by field.

    Args:
        usual_warmup: epochs of the warm-up where nothing is set; a tenth of a run whose length is in steps.
    """
    optim, own = chosen(OptimConfig, args), chosen(config, args)
    if optim.setdefault("warmup_epochs", None) is None:
        optim["warmup_epochs"] = usual_warmup
        if args.warmup_steps is None and args.steps is not None:
            own["warmup_steps"] = args.steps // 10
    batch = args.effective_batch or run.videos_per_step(world_size())
    return {**own, "optim": OptimConfig(**optim), "effective_batch": batch}
