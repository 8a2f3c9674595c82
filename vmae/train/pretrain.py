"""`python -m vmae pretrain`: dual-masked pre-training on a list of videos (VideoMAE V2, sections 3.2 and 4).

Everything that can be wrong with the input is found before the output folder gets its first file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vmae.config import MaskConfig, ModelConfig, SpeedConfig, _Checked
from vmae.data import Batch, PretrainDataset, build_loader, check_decodable, read_list
from vmae.data.dataset import EpochSampler, PretrainLoader
from vmae.errors import InputError
from vmae.interop.upstream import load_into, load_weights
from vmae.masking import DualMask
from vmae.model import Pretrainer, build_pretrainer
from vmae.model.attention_backends import choose
from vmae.model.attention_probes import Workload
from vmae.train.checkpoint import WEIGHTS_NAME, CheckpointFolder, export_weights, read_training_checkpoint, set_aside
from vmae.train.loop import LoopConfig, Trainer
from vmae.train.metrics import (
    LOG_NAME,
    RUN_NAME,
    describe_start,
    loss_of_last_tenth,
    read_log,
    trivial_losses,
    write_run_file,
)
from vmae.train.optim import CosineSchedule, OptimConfig, build_adamw
from vmae_kernels import resolve_backend

PUBLISHED_MODELS = {
    "pretrain_videomae_small_patch16_224": "vit_s",
    "pretrain_videomae_base_patch16_224": "vit_b",
    "pretrain_videomae_large_patch16_224": "vit_l",
    "pretrain_videomae_huge_patch16_224": "vit_h",
    "pretrain_videomae_giant_patch14_224": "vit_g",
}
PUBLISHED_MASKS = {"run_cell": "running_cell"}
# Settings under `model` that a resumed run may change: they concern training only.
_TRAINING_ONLY = ("model.drop_path_rate",)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(_Checked):
    """Everything that decides the weights that come out.

    Attributes:
        model, mask, optim: see their classes; `optim.lr` is for 256 videos a step.
        data: the list file.
        data_root: folder that its relative paths start from.
        stride: frames from one sampled frame to the next, where the list says nothing else.
        batch_size: videos of a step.
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
    stride: int = 4
    batch_size: int = 32
    num_sample: int = 1
    repeat: int = 1
    epochs: int = 800
    steps: int | None = None
    warmup_steps: int | None = None
    seed: int = 0
    dtype: str = "float32"
    normalize_target: bool = True
    init: str | None = None

    def __post_init__(self) -> None:
        for name in ("stride", "batch_size", "num_sample", "repeat", "epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.seed < 0 or (self.warmup_steps is not None and self.warmup_steps < 0):
            raise InputError("seed and warmup_steps must be at least 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Checked):
    """Where and how a run is carried out; nothing here decides what comes out.

    Attributes:
        output: folder of the run.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        speed: see `SpeedConfig`.
        resume: "auto" (the newest checkpoint in `output`), a checkpoint's path, or None (start afresh).
        save_every, log_every: steps from one checkpoint, or log line, to the next.
        keep: newest checkpoints that stay.
        tensorboard: also write TensorBoard files.
    """

    output: str
    device: str = "auto"
    speed: SpeedConfig = dataclasses.field(default_factory=SpeedConfig)
    resume: str | None = "auto"
    save_every: int = 1000
    keep: int = 3
    log_every: int = 10
    tensorboard: bool = True


# --- The command line ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command; the published names of the same settings work too."""
    source = parser.add_argument_group("data and output")
    source.add_argument(
        "--data", "--data_path", required=True, metavar="LIST", help="list file: one video or frame folder a line"
    )
    source.add_argument("--data-root", "--data_root", metavar="DIR", help="where the list's relative paths start")
    source.add_argument("--output", "--output_dir", required=True, metavar="DIR", help="folder of the run: checkpoints, logs")
    source.add_argument("--init", metavar="WEIGHTS", help="start from these weights (.pth or .safetensors, published names)")
    source.add_argument("--dry-run", action="store_true", help="check everything, print the resolved settings, write nothing")
    _add_result_arguments(parser.add_argument_group("settings that change results"))
    _add_optimizer_arguments(parser.add_argument_group("optimizer (changes results)"))
    _add_run_arguments(parser.add_argument_group("settings that change speed and housekeeping only"))


def _add_result_arguments(group) -> None:
    group.add_argument("--model", default="vit_b", help="preset: vit_s, vit_b, vit_l, vit_h, vit_g, vit_tiny (default vit_b)")
    group.add_argument("--image-size", "--input_size", type=_image_size, help="side in pixels, or HEIGHTxWIDTH (default 224)")
    group.add_argument("--num-frames", "--num_frames", type=int, help="frames of a clip (default 16)")
    group.add_argument("--patch-size", type=int, help="side of a tubelet in pixels (default: the preset's)")
    group.add_argument("--decoder-depth", "--decoder_depth", type=int, help="blocks of the decoder (default: the preset's)")
    group.add_argument("--drop-path", "--drop_path", type=float, default=0.0, help="stochastic depth of the encoder")
    group.add_argument("--stride", "--sampling_rate", type=int, default=4, help="frames from one sampled frame to the next (4)")
    group.add_argument("--batch-size", "--batch_size", type=int, default=32, help="videos a step (32)")
    group.add_argument("--num-sample", "--num_sample", type=int, default=1, help="clips cut from each decoded video (1)")
    group.add_argument("--repeat", type=int, default=1, help="visits of a video in an epoch, for short lists (1)")
    group.add_argument("--encoder-mask", "--mask_type", default="tube", help="tube, random, frame (tube)")
    group.add_argument("--encoder-ratio", "--mask_ratio", type=float, default=0.9, help="share hidden from the encoder (0.9)")
    group.add_argument(
        "--decoder-mask", "--decoder_mask_type", default="running_cell",
        help="running_cell, random, frame, none (encoder-only masking) (running_cell)",
    )  # fmt: skip
    group.add_argument(
        "--decoder-ratio", "--decoder_mask_ratio", type=float, default=0.5, help="share left out by the decoder (0.5)"
    )
    group.add_argument("--epochs", type=int, default=800, help="length of the run (800)")
    group.add_argument("--steps", type=int, help="length of the run in steps, instead of --epochs")
    group.add_argument("--seed", type=int, default=0, help="of weights, samples and masks (0)")
    group.add_argument("--dtype", default="float32", help="float32, or bfloat16 with float32 weights and loss (float32)")
    group.add_argument(
        "--normalize-target", action=argparse.BooleanOptionalAction, default=True, help="predict normalised tubelets (yes)"
    )


def _add_optimizer_arguments(group) -> None:
    group.add_argument("--lr", type=float, default=1.5e-4, help="peak learning rate for 256 videos a step (1.5e-4)")
    group.add_argument("--min-lr", "--min_lr", type=float, default=1e-5, help="final learning rate for 256 videos (1e-5)")
    group.add_argument(
        "--warmup-epochs", "--warmup_epochs", type=float,
        help="linear warm-up (40 as published; a tenth of runs shorter than 80 epochs)",
    )  # fmt: skip
    group.add_argument("--warmup-steps", "--warmup_steps", type=int, help="linear warm-up in steps, instead of epochs")
    group.add_argument("--weight-decay", "--weight_decay", type=float, default=0.05, help="(0.05)")
    group.add_argument("--clip-grad", "--clip_grad", type=float, help="largest gradient norm (no clipping)")
    group.add_argument("--betas", "--opt_betas", type=float, nargs=2, default=(0.9, 0.95), help="of AdamW (0.9 0.95)")
    group.add_argument("--eps", "--opt_eps", type=float, default=1e-8, help="of AdamW (1e-8)")
    group.add_argument("--opt", choices=["adamw"], default="adamw", help=argparse.SUPPRESS)


def _add_run_arguments(group) -> None:
    group.add_argument("--workers", "--num_workers", type=int, default=1, help="processes that decode video (1)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    group.add_argument("--backend", default="auto", help="fused operations: auto, torch, triton (auto)")
    group.add_argument("--attention", default="auto", help="attention: auto, or a name that `vmae doctor` lists (auto)")
    group.add_argument("--compile", action="store_true", help="compile the blocks with torch.compile")
    resume = group.add_mutually_exclusive_group()
    resume.add_argument(
        "--resume", "--auto_resume", nargs="?", const="auto", default="auto", metavar="CHECKPOINT",
        help="go on from this checkpoint; by default from the newest one in the output folder",
    )  # fmt: skip
    resume.add_argument(
        "--no-resume", "--no_auto_resume", dest="resume", action="store_const", const=None,
        help="start afresh; an earlier run in the output folder is moved to DIR/previous-N",
    )  # fmt: skip
    group.add_argument("--save-every", type=int, default=1000, help="steps from one checkpoint to the next (1000)")
    group.add_argument("--keep", type=int, default=3, help="newest checkpoints that stay (3)")
    group.add_argument("--log-every", type=int, default=10, help="steps from one log line to the next (10)")
    group.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=True, help="TensorBoard files (yes)")


def _image_size(text: str) -> int | tuple[int, int]:
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError(text)
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def configs_from_args(args: argparse.Namespace) -> tuple[PretrainConfig, RunConfig]:
    """The checked settings of a command line.

    Raises:
        InputError: an unknown preset, or settings that do not fit together.
    """
    chosen = dict(
        img_size=args.image_size, num_frames=args.num_frames, patch_size=args.patch_size, decoder_depth=args.decoder_depth
    )
    overrides = {key: value for key, value in chosen.items() if value is not None}
    warmup_epochs, warmup_steps = args.warmup_epochs, args.warmup_steps
    if warmup_epochs is None:
        warmup_epochs = OptimConfig.warmup_epochs if args.epochs >= 2 * OptimConfig.warmup_epochs else args.epochs / 10
        if warmup_steps is None and args.steps is not None:
            warmup_steps = args.steps // 10
    config = PretrainConfig(
        model=ModelConfig.preset(PUBLISHED_MODELS.get(args.model, args.model), drop_path_rate=args.drop_path, **overrides),
        mask=MaskConfig(
            encoder=args.encoder_mask,
            encoder_ratio=args.encoder_ratio,
            decoder=PUBLISHED_MASKS.get(args.decoder_mask, args.decoder_mask),
            decoder_ratio=args.decoder_ratio,
        ),
        optim=OptimConfig(warmup_epochs=warmup_epochs, **_taken(args, "lr min_lr betas eps weight_decay clip_grad")),
        warmup_steps=warmup_steps,
        **_taken(args, "data data_root stride batch_size num_sample repeat epochs steps seed dtype normalize_target init"),
    )
    speed = SpeedConfig(backend=args.backend, attention=args.attention, compile=args.compile, num_workers=args.workers)
    return config, RunConfig(speed=speed, **_taken(args, "output device resume save_every keep log_every tensorboard"))


def _taken(args: argparse.Namespace, names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names.split()}


def run(args: argparse.Namespace) -> int:
    """The command; 0 also after SIGTERM (the run goes on when it is started again), 130 after Ctrl-C."""
    config, run_config = configs_from_args(args)
    prepared = prepare(config, run_config)
    if args.dry_run:
        print(json.dumps(prepared.describe(), indent=2))
        return 0
    return 130 if pretrain(prepared) == signal.SIGINT else 0


# --- Checks: nothing is written ---


@dataclass
class Prepared:
    """A run whose input was found good.

    Attributes:
        config: with `steps` and `warmup_steps` resolved.
        run: as given.
        device: the one found.
        dataset: of the list's videos.
        model: on `device`, with the weights to start from.
        optim: with the learning rates of this batch.
        steps_per_epoch: optimizer steps of an epoch.
        checkpoint: the one to go on from, if any.
        notes: lines for the user.
    """

    config: PretrainConfig
    run: RunConfig
    device: torch.device
    dataset: PretrainDataset
    model: Pretrainer
    optim: OptimConfig
    steps_per_epoch: int
    checkpoint: dict[str, Any] | None
    notes: list[str]

    @property
    def start_step(self) -> int:
        return self.checkpoint["step"] if self.checkpoint else 0

    def describe(self) -> dict[str, Any]:
        """The resolved settings in plain containers, with what follows from them."""
        config = self.config
        derived = {
            "device": str(self.device),
            "videos": len(self.dataset.entries),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": config.steps,
            "start_step": self.start_step,
            "effective_batch_videos": config.batch_size,
            "clips_per_step": config.batch_size * config.num_sample,
            "peak_lr": self.optim.lr,
            "final_lr": self.optim.min_lr,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        return {"results": config.to_dict(), "run": self.run.to_dict(), "derived": derived}


def prepare(config: PretrainConfig, run: RunConfig) -> Prepared:
    """Check everything that a run needs, and write nothing.

    Raises:
        InputError: names what is wrong: list, videos, masks, output folder, device, weights, checkpoint.
    """
    device = resolve_device(run.device)
    check_backend(run.speed.backend, device)
    check_attention(run.speed, config, device)
    check_output(Path(run.output))
    folder = CheckpointFolder(run.output, run.keep)
    check_mask(config.mask, config.model.grid)
    entries = read_list(config.data, config.data_root)
    notes = [f"note: skipped, cannot be decoded: {error}" for _, error in check_decodable(entries)]
    dataset = PretrainDataset(
        entries,
        num_frames=config.model.num_frames,
        stride=config.stride,
        image_size=config.model.img_size,
        grid=config.model.grid,
        mask=config.mask,
        num_sample=config.num_sample,
        seed=config.seed,
        repeat=config.repeat,
    )
    steps_per_epoch = EpochSampler(len(dataset), config.batch_size).steps_per_epoch
    config = _with_steps(config, steps_per_epoch)
    optim = config.optim.scaled_to(config.batch_size)
    build_schedule(config, optim)
    LoopConfig(total_steps=config.steps, dtype=config.dtype, log_every=run.log_every, save_every=run.save_every)
    torch.manual_seed(config.seed)
    speed = run.speed
    model = build_pretrainer(
        config.model, backend=speed.backend, attention=speed.attention, normalize_target=config.normalize_target
    )
    checkpoint = _load_start(model, config, run, folder, notes)
    return Prepared(config, run, device, dataset, model.to(device), optim, steps_per_epoch, checkpoint, notes)


def resolve_device(name: str) -> torch.device:
    """The device that `name` ("auto", "cpu", "cuda", "cuda:1") stands for here.

    Raises:
        InputError: an unknown name, or a GPU where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; known: auto, cpu, cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} asked for, but torch {torch.__version__} finds {torch.cuda.device_count()} GPUs here"
        )
    return device


def check_backend(backend: str, device: torch.device) -> None:
    """Raises InputError where an operation has no such implementation."""
    for operation in ("embed_visible", "assemble_decoder_tokens", "select_decoded", "head_patch_loss"):
        try:
            resolve_backend(backend, operation, torch.empty(0, device=device))
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"--backend {backend}: {error}") from error


def check_mask(mask: MaskConfig, grid: tuple[int, int, int]) -> None:
    """Raises InputError where a mask can't be drawn, or where some draws would leave the loss nothing to count."""
    one = DualMask.sample(1, grid, **mask.to_dict())
    total, visible, picked = one.num_tokens, one.visible.shape[1], one.decode.shape[1]
    if mask.encoder == mask.decoder == "frame":  # whole frames are drawn
        total, visible, picked = (count // (grid[1] * grid[2]) for count in (total, visible, picked))
    elif mask.decoder != "random":  # every frame has hidden tokens, and every frame or hidden one is picked from
        return
    chance = math.comb(visible, picked) / math.comb(total, picked)
    if chance > 1e-9:
        raise InputError(
            f"the loss would count no token in 1 of {1 / chance:.0f} clips: the encoder may see all {picked} that the decoder "
            "rebuilds; lower the decoder's mask ratio or raise the encoder's"
        )


def check_attention(speed: SpeedConfig, config: PretrainConfig, device: torch.device) -> None:
    """Raises InputError where the named attention does not run at the model's head dims; "auto" always does."""
    if speed.attention == "auto":
        return
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    model = config.model
    for dim, heads in ((model.embed_dim, model.num_heads), (model.decoder_embed_dim, model.decoder_num_heads)):
        choose(speed.attention, Workload.on(device, dtype=dtype, head_dim=dim // heads, compiled=speed.compile))


def check_output(folder: Path) -> None:
    """Raises InputError unless `folder` is, or can become, a folder to write to; it is not made."""
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"output folder {folder} is not writable: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"output folder {folder} is not writable: no permission to write to {place}")


def build_schedule(config: PretrainConfig, optim: OptimConfig) -> CosineSchedule:
    """The learning rate of every step; `config` has its steps resolved.

    Raises:
        InputError: the warm-up is longer than the run.
    """
    return CosineSchedule(lr=optim.lr, min_lr=optim.min_lr, total_steps=config.steps, warmup_steps=config.warmup_steps)


def _with_steps(config: PretrainConfig, steps_per_epoch: int) -> PretrainConfig:
    steps = config.steps or config.epochs * steps_per_epoch
    warmup = config.warmup_steps
    warmup = int(config.optim.warmup_epochs * steps_per_epoch) if warmup is None else warmup
    return dataclasses.replace(config, steps=steps, warmup_steps=warmup)


def _load_start(
    model: Pretrainer, config: PretrainConfig, run: RunConfig, folder: CheckpointFolder, notes: list[str]
) -> dict[str, Any] | None:
    """Give `model` the weights it starts from; returns the training checkpoint to go on from, if there is one."""
    path = folder.latest() if run.resume == "auto" else run.resume and Path(run.resume)
    if path is None:
        if run.resume and folder.folder.is_dir():
            left = ", ".join(path.name for path in folder.unfinished())
            notes.append(f"{run.output} holds no complete checkpoint{f' (only {left})' if left else ''}: a fresh start")
        if config.init is not None:
            notes.append(load_into(model, load_weights(config.init), config.init, allow_encoder_only=True))
        return None
    checkpoint = read_training_checkpoint(path)
    changes = setting_changes(checkpoint["config"], config.to_dict())
    architecture = [text for name, text in changes.items() if name.startswith("model.") and name not in _TRAINING_ONLY]
    advice = "choose another --output, or --no-resume for a fresh start"
    try:
        load_into(model, checkpoint["model"], path)
    except InputError as error:
        raise InputError(f"{error}\n  settings that differ: {'; '.join(architecture) or 'none'}\n  {advice}") from error
    if architecture:
        raise InputError(f"checkpoint {path} is of another architecture: {'; '.join(architecture)}; {advice}")
    notes.append(f"resuming from {path}, step {checkpoint['step']}")
    notes += [f"note: setting changed: {text}" for text in changes.values()]
    return checkpoint


def setting_changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings (`group.name`) that differ between two nested dictionaries, each with a sentence on how."""
    changes: dict[str, str] = {}
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes |= setting_changes(old, new, f"{prefix}{name}.")
        elif old != new:
            changes[prefix + name] = f"{prefix}{name} {old} in the checkpoint, {new} now"
    return changes


# --- The run ---


def pretrain(prepared: Prepared) -> int | None:
    """Train, and leave checkpoints, logs, `run.json` and, at the end, the weights in the output folder.

    Returns:
        None when the run is complete, else the signal that stopped it.

    Raises:
        InputError: see `Trainer.run`, or the output folder can't be written.
    """
    run, config = prepared.run, prepared.config
    folder = Path(run.output)
    if prepared.start_step >= config.steps:
        print(f"nothing to do: {folder} has done {prepared.start_step} of {config.steps} steps; more --steps go on from there")
        if not (folder / WEIGHTS_NAME).exists():  # stopped between the last checkpoint and its export
            _export(prepared)
        return None
    _open_folder(prepared, folder)
    for line in (*prepared.notes, *banner(prepared)):
        print(line, flush=True)
    trivial: dict[str, float] = {}
    trainer = build_trainer(prepared, trivial)
    began, first_step = time.monotonic(), trainer.step
    stopped_by = trainer.run()
    if stopped_by is not None:
        print(f"stopped by {signal.Signals(stopped_by).name} after step {trainer.step}; the same command goes on from there")
        return stopped_by
    _export(prepared)
    for line in summary(folder, config, trivial, trainer.step - first_step, time.monotonic() - began):
        print(line)
    return None


def _export(prepared: Prepared) -> None:
    config = prepared.config
    export_weights(Path(prepared.run.output) / WEIGHTS_NAME, prepared.model, config=config.to_dict(), step=config.steps)


def build_trainer(prepared: Prepared, trivial: dict[str, float]) -> Trainer:
    """The loop for a prepared run, at its start step; fills `trivial` with the trivial predictors' losses."""
    run, config, model = prepared.run, prepared.config, prepared.model
    if run.speed.compile:
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.compile()

    def compute_loss(batch: Batch) -> torch.Tensor:
        return model(batch.clips, batch.mask)

    def show_trivial_losses(batch: Batch) -> None:
        trivial.update(trivial_losses(batch.clips, batch.mask, config.model, config.normalize_target))
        zero, mean = trivial["zero"], trivial["visible_mean"]
        tqdm.write(f"loss of trivial predictors on the first batch: zero {zero:.4f}, mean of the visible tubelets {mean:.4f}")

    trainer = Trainer(
        model=model,
        optimizer=build_adamw(model, prepared.optim),
        schedule=build_schedule(config, prepared.optim),
        open_batches=lambda start_step: _open_batches(prepared, start_step),
        compute_loss=compute_loss,
        config=LoopConfig(
            total_steps=config.steps,
            steps_per_epoch=prepared.steps_per_epoch,
            clip_grad=config.optim.clip_grad,
            dtype=config.dtype,
            seed=config.seed,
            log_every=run.log_every,
            save_every=run.save_every,
        ),
        checkpoints=CheckpointFolder(run.output, run.keep),
        about=config.to_dict(),
        device=prepared.device,
        tensorboard=run.tensorboard,
        on_first_batch=show_trivial_losses,
    )
    if prepared.checkpoint:
        trainer.resume(prepared.checkpoint)
    return trainer


def _open_folder(prepared: Prepared, folder: Path) -> None:
    """Make the output folder, move an earlier run out of the way, and write `run.json`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output folder {folder} is not writable: {error.strerror}") from error
    moved = set_aside(folder, prepared.start_step if prepared.checkpoint else None)
    if moved:
        prepared.notes.append(f"moved what an earlier run left in {folder} to {moved}")
    about = prepared.describe()
    write_run_file(folder, describe_start(about, device=prepared.device, start_step=prepared.start_step))


def _open_batches(prepared: Prepared, start_step: int) -> PretrainLoader:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = build_loader(
            prepared.dataset,
            batch_size=prepared.config.batch_size,
            num_workers=prepared.run.speed.num_workers,
            start_step=start_step,
            total_steps=prepared.config.steps,
            pin_memory=prepared.device.type == "cuda",
            quarantine=Path(prepared.run.output) / "quarantine.jsonl",
        )
    for warning in caught:
        print(f"note: {warning.message}", flush=True)
    return loader


def banner(prepared: Prepared) -> list[str]:
    """What was resolved, in words."""
    config, optim, run = prepared.config, prepared.optim, prepared.run
    model, mask, about = config.model, config.mask, prepared.describe()["derived"]
    one = DualMask.sample(1, model.grid, **mask.to_dict())
    frames, (height, width) = model.num_frames, model.image_hw
    threads = f", {torch.get_num_threads()} threads" if prepared.device.type == "cpu" else ""
    decoder = "all hidden" if mask.decoder == "none" else f"{mask.decoder} {mask.decoder_ratio:g}"
    return [
        f"model: {about['parameters'] / 1e6:.1f} M parameters, clips {frames} x {height} x {width}, {model.num_tokens} tokens "
        f"({mask.encoder} {mask.encoder_ratio:g}: {one.visible.shape[1]} visible; {decoder}: {one.decode.shape[1]} picked, "
        f"{int(one.weight.sum())} counted by the loss)",
        f"data: {about['videos']} videos x {config.repeat} visits an epoch, {prepared.steps_per_epoch} steps an epoch",
        f"batch: effective batch {config.batch_size} videos, {about['clips_per_step']} clips a step; learning rate "
        f"{config.optim.lr:g} x {config.batch_size} / 256 = {optim.lr:.3g} at its peak, {optim.min_lr:.3g} at the end",
        f"steps: {prepared.start_step} to {config.steps} ({config.steps / prepared.steps_per_epoch:g} epochs), "
        f"warm-up {config.warmup_steps}",
        f"device: {prepared.device}{threads}, {config.dtype}, backend {run.speed.backend}, {run.speed.num_workers} workers",
    ]


def summary(folder: Path, config: PretrainConfig, trivial: dict[str, float], steps: int, seconds: float) -> list[str]:
    """How the run ended, and where everything is."""
    log = folder / LOG_NAME
    loss = loss_of_last_tenth(read_log(log), config.steps)
    known = (
        f"; zero predictor {trivial['zero']:.4f}, mean of the visible tubelets {trivial['visible_mean']:.4f}" if trivial else ""
    )
    board = folder / "tensorboard"
    return [
        f"done: {steps} steps in {datetime.timedelta(seconds=round(seconds))}",
        f"final loss (mean of the last tenth): {'not logged' if loss is None else f'{loss:.4f}'}{known}",
        f"weights: {folder / WEIGHTS_NAME} (published names)",
        f"log: {log}; settings: {folder / RUN_NAME}" + (f"; tensorboard --logdir {board}" if board.is_dir() else ""),
        f"checkpoints: {', '.join(path.name for path in CheckpointFolder(folder).paths())} in {folder}",
    ]
