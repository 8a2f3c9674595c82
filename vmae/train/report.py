"""What a run says at its start and at its end, the same lines for every task, with the task's own words in
them."""

from __future__ import annotations

import datetime
from pathlib import Path

import torch

from vmae.checkpoint.folder import AVERAGED_NAME, WEIGHTS_NAME
from vmae.data.quarantine import QUARANTINE_NAME
from vmae.train.metrics import LOG_NAME, RUN_NAME, board_folder, loss_of_last_tenth, read_log
from vmae.train.prepare import Prepared


def banner(prepared: Prepared) -> list[str]:
    """What was resolved, in words."""
    task, config, run, speed = prepared.task, prepared.config, prepared.run, prepared.run.speed
    derived = prepared.describe()["derived"]
    data, *parts = task.describe_data()
    micro = f"{run.batch_size} x {run.accumulate} micro-batches x {prepared.parallel.world_size} ranks"
    epochs = f"{prepared.total_steps / prepared.steps_per_epoch:g} epochs"
    threads = f", {torch.get_num_threads()} threads" if prepared.device.type == "cpu" else ""
    compiled = ", blocks compiled" if speed.compile else ""
    return [
        f"model: {_thousands(derived['parameters'])} parameters{task.describe_model()}",
        f"data: {data}, {prepared.steps_per_epoch} steps an epoch",
        *(f"  {line}" for line in parts),
        f"batch: effective batch {config.effective_batch} {task.unit} ({micro}), {derived['clips_per_step']} "
        f"clips a step; {task.describe_rates(prepared.optim)}",
        f"steps: {prepared.start_step} to {prepared.total_steps} ({epochs}), warm-up {config.warmup_steps}",
        f"device: {prepared.device}{threads}, {config.dtype}, parallel {prepared.parallel.kind}, backend "
        f"{speed.backend}, checkpointing {speed.checkpointing}, recompute {speed.recompute}{compiled}, "
        f"{speed.num_workers} workers a rank",
    ]


def _thousands(count: int) -> str:
    if count < 100_000:
        return f"{count / 1e3:.1f} k"
    return f"{count / 1e6:.1f} M"


def summary(prepared: Prepared, steps: int, seconds: float, done: int | None = None) -> list[str]:
    """How the run ended, where everything is, and what to do next.

    Args:
        steps, seconds: of this start.
        done: steps of the whole run, where it ended early.
    """
    task, folder = prepared.task, prepared.folder
    log, board = folder / LOG_NAME, board_folder(prepared.run)
    loss = loss_of_last_tenth(read_log(log), done or prepared.total_steps)
    final = "not logged" if loss is None else f"{loss:.4f}"
    names = " (published names)" if task.weights_name == WEIGHTS_NAME else ""
    averaged = f", {folder / AVERAGED_NAME} (averaged)" if task.averaged else ""
    shown = f"; tensorboard --logdir {board}" if board.is_dir() else ""
    return [
        f"done: {steps} steps in {datetime.timedelta(seconds=round(seconds))}",
        f"final loss (mean of the last tenth): {final}{task.describe_loss()}",
        f"weights: {folder / task.weights_name}{names}{averaged}",
        f"log: {log}; settings: {folder / RUN_NAME}{shown}",
        f"checkpoints: {', '.join(path.name for path in prepared.checkpoints.paths())} in {folder}",
        *task.closing(),
    ]


def describe_bad_videos(bad: int, failed_reads: int, folder: Path) -> str:
    """How many videos could not be decoded in this start, in a line."""
    if not bad:
        return "bad videos: none"
    return f"bad videos: {bad}, replaced by others {failed_reads} times; see {folder / QUARANTINE_NAME}"
