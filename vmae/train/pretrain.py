"""`python -m vmae pretrain`: dual-masked pre-training on a list of videos (VideoMAE V2, sections 3.2 and 4).

Everything that can be wrong with the input is found before the output folder gets its first file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vmae.data import Batch, Prefetcher, PretrainDataset, Quarantine, build_loader, check_decodable, describe_data, read_data
from vmae.data.dataset import EpochSampler, check_loader
from vmae.errors import InputError
from vmae.interop.upstream import load_into, load_weights
from vmae.masking import DualMask
from vmae.model import Pretrainer, build_pretrainer
from vmae.train.checkpoint import WEIGHTS_NAME, CheckpointFolder, export_weights, read_training_checkpoint, set_aside
from vmae.train.checks import check_attention, check_backend, check_mask, check_output, resolve_device
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
from vmae.train.pretrain_settings import PretrainConfig, RunConfig, add_arguments, configs_from_args

__all__ = ["Prepared", "add_arguments", "build_trainer", "prepare", "pretrain", "run", "setting_changes"]

# Settings under `model` that a resumed run may change: they concern training only.
_TRAINING_ONLY = ("model.drop_path_rate",)


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
    check_attention(run.speed, config.model, config.dtype, device)
    check_output(Path(run.output))
    folder = CheckpointFolder(run.output, run.keep)
    check_mask(config.mask, config.model.grid)
    Quarantine(max_share=run.max_bad_share)
    check_loader(config.loader)
    entries = read_data(config.data, config.data_root)
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
        sampling=config.sampling,
        fps=config.fps,
        flip=config.flip,
        resize=config.resize,
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
        count=prepared.dataset.count_sources,
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


def _open_batches(prepared: Prepared, start_step: int) -> Prefetcher:
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
            max_bad_share=prepared.run.max_bad_share,
            loader=prepared.config.loader,
            device=prepared.device,
        )
    for warning in caught:
        print(f"note: {warning.message}", flush=True)
    return Prefetcher(loader, prepared.device, threaded=False if prepared.config.loader == "dali" else None)


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
        *(f"  {line}" for line in describe_data(prepared.dataset.data)),
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
