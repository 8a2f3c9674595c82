"""What `python -m vmae pretrain` says at its start and its end."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vmae.checkpoint.folder import WEIGHTS_NAME, CheckpointFolder
from vmae.data import describe_data
from vmae.masking import DualMask
from vmae.train.metrics import LOG_NAME, RUN_NAME, loss_of_last_tenth, read_log
from vmae.train.pretrain_settings import PretrainConfig

if TYPE_CHECKING:
    from vmae.train.run import Prepared


def banner(prepared: Prepared) -> list[str]:
    """What was resolved, in words."""
    config, optim, run, speed = prepared.config, prepared.optim, prepared.run, prepared.run.speed
    model, mask, about = config.model, config.mask, prepared.describe()["derived"]
    one = DualMask.sample(1, model.grid, **mask.to_dict())
    frames, (height, width) = model.num_frames, model.image_hw
    threads = f", {torch.get_num_threads()} threads" if prepared.device.type == "cpu" else ""
    decoder = "all hidden" if mask.decoder == "none" else f"{mask.decoder} {mask.decoder_ratio:g}"
    return [
        f"model: {about['parameters'] / 1e6:.1f} M parameters, clips {frames} x {height} x {width}, "
        f"{model.num_tokens} tokens "
        f"({mask.encoder} {mask.encoder_ratio:g}: {one.visible.shape[1]} visible; {decoder}: "
        f"{one.decode.shape[1]} picked, "
        f"{int(one.weight.sum())} counted by the loss)",
        f"data: {about['videos']} videos x {config.repeat} visits an epoch, {prepared.steps_per_epoch} steps "
        "an epoch",
        *(f"  {line}" for line in describe_data(prepared.dataset.data)),
        f"batch: effective batch {config.effective_batch} videos ({run.batch_size} x {run.accumulate} "
        "micro-batches x "
        f"{prepared.parallel.world_size} ranks), {about['clips_per_step']} clips a step; learning rate "
        f"{config.optim.lr:g} x "
        f"{config.effective_batch} / 256 = {optim.lr:.3g} at its peak, {optim.min_lr:.3g} at the end",
        f"steps: {prepared.start_step} to {config.steps} ({config.steps / prepared.steps_per_epoch:g} "
        "epochs), "
        f"warm-up {config.warmup_steps}",
        f"device: {prepared.device}{threads}, {config.dtype}, parallel {prepared.parallel.kind}, backend "
        f"{speed.backend}, "
        f"checkpointing {speed.checkpointing}{', compiled' if speed.compile else ''}, {speed.num_workers} "
        "workers a rank",
    ]


def summary(
    folder: Path, config: PretrainConfig, trivial: dict[str, float], steps: int, seconds: float
) -> list[str]:
    """How the run ended, and where everything is."""
    log = folder / LOG_NAME
    loss = loss_of_last_tenth(read_log(log), config.steps)
    known = (
        f"; zero predictor {trivial['zero']:.4f}, mean of the visible tubelets {trivial['visible_mean']:.4f}"
        if trivial
        else ""
    )
    board = folder / "tensorboard"
    return [
        f"done: {steps} steps in {datetime.timedelta(seconds=round(seconds))}",
        f"final loss (mean of the last tenth): {'not logged' if loss is None else f'{loss:.4f}'}{known}",
        f"weights: {folder / WEIGHTS_NAME} (published names)",
        f"log: {log}; settings: {folder / RUN_NAME}"
        + (f"; tensorboard --logdir {board}" if board.is_dir() else ""),
        f"checkpoints: {', '.join(path.name for path in CheckpointFolder(folder).paths())} in {folder}",
    ]
