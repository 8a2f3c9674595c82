"""Settings of `python -m vmae pretrain`: what decides the result, what only carries a run out, and the flags
for both."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from vmae.config import PUBLISHED_MODELS, MaskConfig, ModelConfig, SpeedConfig, _Checked, image_size
from vmae.masking import PUBLISHED_MASKS, mask_help
from vmae.settings import BATCH, COUNT, FPS, SEED, SHARE, STEPS, STRIDE, Whole, limits, ranged
from vmae.train.optim import OptimConfig
from vmae.train.parallel import world_size

EPOCHS, WARMUP_STEPS, EFFECTIVE_BATCH = Whole(1, 10**9), Whole(0, STEPS.most), Whole(1, 2**40)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(_Checked):
    """Everything that decides the weights that come out.

    Attributes:
        model, mask, optim: see their classes; `optim.lr` is for 256 videos a step.
        data: the list file, or a mix (YAML, see `vmae.data.mix`).
        data_root: folder that its relative paths start from.
        stride: frames from one sampled frame to the next, where the list says nothing else.
        sampling, fps, flip, resize: see `vmae.data.PretrainDataset`.
        loader: "cpu", or "dali", whose pixels differ by some levels, see `vmae.data.build_loader`.
        effective_batch: videos of a step, over all ranks and micro-batches; None means what the run makes it
            (`RunConfig.videos_per_step`), and nothing else is taken.
        num_sample: clips cut from each of them.
        repeat: visits of a video in an epoch.
        epochs: length of the run; not used when `steps` is given.
        steps: length of the run in steps; None means `epochs`.
        warmup_steps: length of the warm-up; None means `optim.warmup_epochs`.
        seed: of weights, samples and masks.
        dtype: "float32" or "bfloat16" (autocast, float32 weights and loss).
        normalize_target: predict tubelets normalised per channel, or pixels in [0, 1].
        init: file of weights to start from.
    """

    model: ModelConfig
    mask: MaskConfig
    optim: OptimConfig
    data: str
    data_root: str | None = None
    stride: int = ranged(4, STRIDE)
    sampling: str = "published"
    fps: float | None = ranged(None, FPS)
    flip: bool = False
    resize: str = "torch"
    loader: str = "cpu"
    effective_batch: int | None = ranged(None, EFFECTIVE_BATCH)
    num_sample: int = ranged(1, BATCH)
    repeat: int = ranged(1, COUNT)
    epochs: int = ranged(800, EPOCHS)
    steps: int | None = ranged(None, STEPS)
    warmup_steps: int | None = ranged(None, WARMUP_STEPS)
    seed: int = ranged(0, SEED)
    dtype: str = "float32"
    normalize_target: bool = True
    init: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Checked):
    """Where and how a run is carried out; nothing here decides what comes out.

    Attributes:
        output: folder of the run.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        speed: see `SpeedConfig`.
        batch_size: videos of a micro-batch on one rank.
        accumulate: micro-batches of a step on each rank. The effective batch is `batch_size * accumulate *
            ranks`.
        resume: "auto" (the newest checkpoint in `output`), "last-good" (the newest one that is not damaged),
            a checkpoint's path, or None (start afresh).
        save_every, log_every: steps from one checkpoint, or log line, to the next.
        keep: newest checkpoints that stay.
        keep_every: checkpoints of steps that this divides stay as well.
        async_save: write checkpoints while training goes on.
        tensorboard: also write TensorBoard files.
        max_bad_share: share of the list's videos that may be bad before the run stops, see
            `vmae.data.Quarantine`.
        allow_list_change: go on from a checkpoint of another list, see `vmae.data.list_identity`.
    """

    output: str
    device: str = "auto"
    speed: SpeedConfig = dataclasses.field(default_factory=SpeedConfig)
    batch_size: int = ranged(32, BATCH)
    accumulate: int = ranged(1, BATCH)
    resume: str | None = "auto"
    save_every: int = ranged(1000, STEPS)
    keep: int = ranged(3, COUNT)
    keep_every: int | None = ranged(None, STEPS)
    async_save: bool = False
    log_every: int = ranged(10, STEPS)
    tensorboard: bool = True
    max_bad_share: float = ranged(0.05, SHARE)
    allow_list_change: bool = False

    def videos_per_step(self, ranks: int) -> int:
        """The effective batch."""
        return self.batch_size * self.accumulate * ranks


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Flags of the command; the published names of the same settings work too. `required`: those for data and
    output are."""
    source = parser.add_argument_group("data and output")
    source.add_argument(
        "--data",
        "--data_path",
        required=required,
        metavar="LIST",
        help="list file: one video or frame folder a line; a folder of videos; or a mix of lists (.yaml)",
    )
    source.add_argument(
        "--data-root", "--data_root", metavar="DIR", help="where the list's relative paths start"
    )
    source.add_argument(
        "--output", "--output_dir", required=required, metavar="DIR", help="folder of the run"
    )
    source.add_argument(
        "--init", metavar="WEIGHTS", help="start from these weights (.pth or .safetensors, published names)"
    )
    source.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved settings, write nothing"
    )
    _add_result_arguments(parser.add_argument_group("settings that change results"))
    _add_optimizer_arguments(parser.add_argument_group("optimizer (changes results)"))
    add_run_arguments(parser.add_argument_group("settings that change speed and housekeeping only"))


def _add_result_arguments(group) -> None:
    group.add_argument(
        "--model", default="vit_b", help="preset: vit_s, vit_b, vit_l, vit_h, vit_g, vit_tiny (default vit_b)"
    )
    group.add_argument(
        "--image-size", "--input_size", type=image_size, help="side in pixels, or HEIGHTxWIDTH (default 224)"
    )
    group.add_argument(
        "--num-frames",
        "--num_frames",
        type=limits(ModelConfig, "num_frames"),
        help="frames of a clip (default 16)",
    )
    group.add_argument(
        "--patch-size",
        type=limits(ModelConfig, "patch_size"),
        help="side of a tubelet in pixels (default: the preset's)",
    )
    group.add_argument(
        "--decoder-depth",
        "--decoder_depth",
        type=limits(ModelConfig, "decoder_depth"),
        help="blocks of the decoder (default: the preset's)",
    )
    group.add_argument(
        "--drop-path",
        "--drop_path",
        type=limits(ModelConfig, "drop_path_rate"),
        default=0.0,
        help="stochastic depth of the encoder",
    )
    group.add_argument(
        "--stride",
        "--sampling_rate",
        type=limits(PretrainConfig, "stride"),
        default=4,
        help="frames from one sampled frame to the next (4)",
    )
    group.add_argument(
        "--sampling",
        default="published",
        help="published; exact (the stride kept exactly, the last frame in reach); fps (clips of --fps) (published)",
    )
    group.add_argument(
        "--fps", type=limits(PretrainConfig, "fps"), help="frames a second of the clips, with --sampling fps"
    )
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="mirror half of the clips; wrong where left and right mean something, as in SSv2 (no)",
    )
    group.add_argument("--resize", default="torch", help="torch; pil: pixels as published, slower (torch)")
    group.add_argument(
        "--loader", default="cpu", help="who decodes: cpu, or dali (a GPU's decoder; some levels off) (cpu)"
    )
    group.add_argument(
        "--batch-size",
        "--batch_size",
        type=limits(RunConfig, "batch_size"),
        default=32,
        help="videos of a micro-batch on one rank (32)",
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
        type=limits(PretrainConfig, "num_sample"),
        default=1,
        help="clips cut from each decoded video (1)",
    )
    group.add_argument(
        "--repeat",
        type=limits(PretrainConfig, "repeat"),
        default=1,
        help="visits of a video in an epoch, for short lists (1)",
    )
    group.add_argument("--encoder-mask", "--mask_type", default="tube", help=f"{mask_help('encoder')} (tube)")
    group.add_argument(
        "--encoder-ratio",
        "--mask_ratio",
        type=limits(MaskConfig, "encoder_ratio"),
        default=0.9,
        help="share hidden from the encoder (0.9)",
    )
    group.add_argument(
        "--decoder-mask",
        "--decoder_mask_type",
        default="running_cell",
        help=f"{mask_help('decoder')} (running_cell)",
    )
    group.add_argument(
        "--decoder-ratio",
        "--decoder_mask_ratio",
        type=limits(MaskConfig, "decoder_ratio"),
        default=0.5,
        help="share left out by the decoder (0.5)",
    )
    group.add_argument(
        "--epochs", type=limits(PretrainConfig, "epochs"), default=800, help="length of the run (800)"
    )
    group.add_argument(
        "--steps",
        type=limits(PretrainConfig, "steps"),
        help="length of the run in steps, instead of --epochs",
    )
    group.add_argument(
        "--seed", type=limits(PretrainConfig, "seed"), default=0, help="of weights, samples and masks (0)"
    )
    group.add_argument(
        "--dtype", default="float32", help="float32, or bfloat16 with float32 weights and loss (float32)"
    )
    group.add_argument(
        "--normalize-target",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="predict normalised tubelets (yes)",
    )


def _add_optimizer_arguments(group) -> None:
    group.add_argument(
        "--lr",
        type=limits(OptimConfig, "lr"),
        default=1.5e-4,
        help="peak learning rate for 256 videos a step (1.5e-4)",
    )
    group.add_argument(
        "--min-lr",
        "--min_lr",
        type=limits(OptimConfig, "min_lr"),
        default=1e-5,
        help="final learning rate for 256 videos (1e-5)",
    )
    group.add_argument(
        "--warmup-epochs",
        "--warmup_epochs",
        type=limits(OptimConfig, "warmup_epochs"),
        help="linear warm-up (40 as published; a tenth of runs shorter than 80 epochs)",
    )
    group.add_argument(
        "--warmup-steps",
        "--warmup_steps",
        type=limits(PretrainConfig, "warmup_steps"),
        help="linear warm-up in steps, instead of epochs",
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
        default=(0.9, 0.95),
        help="of AdamW (0.9 0.95)",
    )
    group.add_argument(
        "--eps", "--opt_eps", type=limits(OptimConfig, "eps"), default=1e-8, help="of AdamW (1e-8)"
    )
    group.add_argument("--opt", choices=["adamw"], default="adamw", help=argparse.SUPPRESS)


def add_run_arguments(group) -> None:
    """Flags of `RunConfig`, the same for every kind of training."""
    group.add_argument(
        "--workers",
        "--num_workers",
        type=limits(SpeedConfig, "num_workers"),
        default=1,
        help="processes that decode; 0: this one (1)",
    )
    group.add_argument(
        "--max-bad-share",
        type=limits(RunConfig, "max_bad_share"),
        default=0.05,
        help="bad videos that do not stop a run, of all (0.05)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    group.add_argument("--backend", default="auto", help="fused operations: auto, torch, triton (auto)")
    group.add_argument(
        "--attention", default="auto", help="attention: auto, or a name that `vmae doctor` lists (auto)"
    )
    group.add_argument("--compile", action="store_true", help="compile the blocks with torch.compile")
    group.add_argument(
        "--cuda-graphs", action="store_true", help="replay compiled blocks as CUDA graphs (not run yet)"
    )
    group.add_argument(
        "--checkpointing",
        default="none",
        help="made again in the backward: none, selective (MLPs' hidden layers), full (all but blocks' inputs) (none)",
    )
    group.add_argument(
        "--parallel",
        default="auto",
        help="none, ddp, fsdp (weights split over all ranks), hybrid (over a group of ranks); auto: ddp under torchrun (auto)",
    )
    group.add_argument(
        "--shard-size",
        type=limits(SpeedConfig, "shard_size"),
        help="ranks of a group, for hybrid (default: those of a node)",
    )
    resume = group.add_mutually_exclusive_group()
    resume.add_argument(
        "--resume",
        "--auto_resume",
        nargs="?",
        const="auto",
        default="auto",
        metavar="CHECKPOINT",
        help="go on from this checkpoint; by default from the newest one in the output folder; last-good: from the newest "
        "one that is not damaged",
    )
    resume.add_argument(
        "--no-resume",
        "--no_auto_resume",
        dest="resume",
        action="store_const",
        const=None,
        help="start afresh; an earlier run in the output folder is moved to DIR/previous-N",
    )
    group.add_argument(
        "--allow-list-change",
        action="store_true",
        help="go on although videos, labels or weights differ from the checkpoint's: later samples are of the new list (no)",
    )
    group.add_argument(
        "--save-every",
        type=limits(RunConfig, "save_every"),
        default=1000,
        help="steps from one checkpoint to the next (1000)",
    )
    group.add_argument(
        "--keep", type=limits(RunConfig, "keep"), default=3, help="newest checkpoints that stay (3)"
    )
    group.add_argument(
        "--keep-every",
        type=limits(RunConfig, "keep_every"),
        metavar="STEPS",
        help="checkpoints of these steps stay as well (none)",
    )
    group.add_argument("--async-save", action="store_true", help="write checkpoints while training goes on")
    group.add_argument(
        "--log-every",
        type=limits(RunConfig, "log_every"),
        default=10,
        help="steps from one log line to the next (10)",
    )
    group.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, default=True, help="TensorBoard files (yes)"
    )


def configs_from_args(args: argparse.Namespace) -> tuple[PretrainConfig, RunConfig]:
    """The checked settings of a command line.

    Raises:
        InputError: an unknown preset, or settings that do not fit together.
    """
    chosen = dict(
        img_size=args.image_size,
        num_frames=args.num_frames,
        patch_size=args.patch_size,
        decoder_depth=args.decoder_depth,
    )
    overrides = {key: value for key, value in chosen.items() if value is not None}
    warmup_epochs, warmup_steps = args.warmup_epochs, args.warmup_steps
    if warmup_epochs is None:
        warmup_epochs = (
            OptimConfig.warmup_epochs if args.epochs >= 2 * OptimConfig.warmup_epochs else args.epochs / 10
        )
        if warmup_steps is None and args.steps is not None:
            warmup_steps = args.steps // 10
    run = run_from_args(args)
    config = PretrainConfig(
        model=ModelConfig.preset(
            PUBLISHED_MODELS.get(args.model, args.model), drop_path_rate=args.drop_path, **overrides
        ),
        mask=MaskConfig(
            encoder=args.encoder_mask,
            encoder_ratio=args.encoder_ratio,
            decoder=PUBLISHED_MASKS.get(args.decoder_mask, args.decoder_mask),
            decoder_ratio=args.decoder_ratio,
        ),
        optim=OptimConfig(
            warmup_epochs=warmup_epochs, **taken(args, "lr min_lr betas eps weight_decay clip_grad")
        ),
        warmup_steps=warmup_steps,
        effective_batch=run.videos_per_step(world_size()),
        **taken(args, "data data_root stride sampling fps flip resize loader num_sample repeat"),
        **taken(args, "epochs steps seed dtype normalize_target init"),
    )
    return config, run


def run_from_args(args: argparse.Namespace) -> RunConfig:
    """Where and how, of the flags of `add_run_arguments` and of the batch."""
    speed = SpeedConfig(
        num_workers=args.workers,
        **taken(args, "backend attention compile cuda_graphs checkpointing parallel shard_size"),
    )
    names = "output device batch_size accumulate resume save_every keep keep_every async_save log_every tensorboard"
    return RunConfig(speed=speed, **taken(args, f"{names} max_bad_share allow_list_change"))


def taken(args: argparse.Namespace, names: str) -> dict[str, Any]:
    """Some of the arguments, by name (blanks between)."""
    return {name: getattr(args, name) for name in names.split()}
