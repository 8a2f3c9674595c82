"""The start of a run of any task: everything is checked and resolved before the output folder gets a file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.format import read_manifest, shapes_of, tensor_layouts
from vmae.checkpoint.published import check_shapes
from vmae.config import ModelConfig
from vmae.data.dataset import EpochSampler
from vmae.data.list_identity import identify_list, list_changes
from vmae.data.video_dataset import VideoDataset
from vmae.errors import InputError
from vmae.files.folder_lock import FolderLock
from vmae.settings import STEPS
from vmae.targets.settings import PLACES
from vmae.train.checks import check_output, resolve_compile
from vmae.train.loop import LoopConfig
from vmae.train.muon import check_matrices
from vmae.train.optim import CosineSchedule, OptimConfig, optimizer_notes, weight_decay_schedule
from vmae.train.parallel import Parallel
from vmae.train.pretrain_settings import RunConfig
from vmae.train.recompute_choice import choose_recompute, need_without
from vmae.train.resume import choose_checkpoint, setting_changes, with_defaults
from vmae.train.sinks import check_service
from vmae.train.task import Task, TaskConfig

# Settings under `model` that a resumed run may change: they concern training only.
_TRAINING_ONLY = ("model.drop_path_rate",)


@dataclass
class Prepared:
    """A run whose input was found good.

    Attributes:
        task: with its settings resolved, its data, and its model on the device: with the weights to start
            from, unless a checkpoint brings them.
        optim: with the learning rates of this batch.
        steps_per_epoch: optimizer steps of an epoch.
        checkpoint: the one to go on from, if any.
        start_step: the steps that it has done.
        notes: lines for the user.
        listing: of `identify_list`; stands in every checkpoint.
        lock: of the output folder, once the run writes to it; rank 0 has it.
        settings: of the command line, resolved, by key (`Settings.resolved`): the run's `config.yaml`.
    """

    task: Task
    optim: OptimConfig
    steps_per_epoch: int
    checkpoint: Path | None
    start_step: int
    notes: list[str]
    listing: dict[str, Any]
    lock: FolderLock | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> TaskConfig:
        """What decides the result, with `effective_batch`, `steps` and `warmup_steps` resolved."""
        return self.task.config

    @property
    def run(self) -> RunConfig:
        return self.task.run

    @property
    def parallel(self) -> Parallel:
        return self.task.parallel

    @property
    def dataset(self) -> VideoDataset:
        return self.task.dataset

    @property
    def model(self) -> nn.Module:
        return self.task.model

    @property
    def device(self) -> torch.device:
        return self.parallel.device

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.run.output)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        assert self.config.steps is not None  # `resolve_lengths` came before
        return self.config.steps

    @property
    def schedule(self) -> CosineSchedule:
        """The learning rate of every step."""
        return build_schedule(self.config, self.optim)

    @property
    def weight_decay(self) -> CosineSchedule | None:
        """The weight decay of every step; None where it stays."""
        return weight_decay_schedule(self.optim, self.total_steps)

    @property
    def checkpoints(self) -> CheckpointFolder:
        """Of the output folder."""
        check = {} if self.lock is None else {"check": self.lock.check}
        return CheckpointFolder(self.run.output, self.run.keep, self.run.keep_every, **check)

    def describe(self) -> dict[str, Any]:
        """The resolved settings in plain containers, with what follows from them."""
        batch = self.config.effective_batch or 0
        derived = {
            "device": str(self.device),
            "videos": len(self.dataset.entries),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "start_step": self.start_step,
            "ranks": self.parallel.world_size,
            "parallel": self.parallel.kind,
            "effective_batch_videos": batch,
            "clips_per_step": batch * self.config.num_sample,
            "peak_lr": self.optim.lr,
            "final_lr": self.optim.min_lr,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            **self.task.describe_more(),
        }
        return {"results": self.config.to_dict(), "run": self.run.to_dict(), "derived": derived}


def prepare(task: Task, run: RunConfig, parallel: Parallel) -> Prepared:
    """Check everything that a run needs, and write nothing. All ranks call it.

    Raises:
        InputError: names what is wrong: data, settings, output folder, device, weights, checkpoint.
    """
    speed, notes = resolve_compile(run.speed, parallel.device)
    check_service(run.log_to)
    task.run, task.parallel = dataclasses.replace(run, speed=speed), parallel
    for folder in filter(None, (run.output, run.log_dir)):
        check_output(Path(folder))
    notes += task.check()
    task.dataset, about_data = task.read_data()
    notes += [*about_data, *optimizer_notes(task.config.optim)]
    optim, steps_per_epoch = resolve_lengths(task)
    torch.manual_seed(task.config.seed)
    task.model = task.build_model()
    if optim.opt == "muon":
        check_matrices(task.model)
    checkpoint, start_step, listing = find_start(task, notes)
    task.model.to(parallel.device)
    resolve_recompute(task)
    return Prepared(task, optim, steps_per_epoch, checkpoint, start_step, notes, listing)


def resolve_recompute(task: Task) -> None:
    """Decide `--recompute` for the task's model, batch and device."""
    run, parallel, speed, config = task.run, task.parallel, task.run.speed, task.config
    need, model = None, getattr(config, "model", None)
    asks = speed.recompute == "auto" and speed.checkpointing == "none" and parallel.device.type == "cuda"
    if asks and isinstance(model, ModelConfig) and task.block_tokens():
        need = need_without(
            task.model,
            model,
            task.blocks(),
            task.block_tokens(),
            clips=run.batch_size * config.num_sample,
            dtype=config.dtype,
            sharers=parallel.mesh.shape[-1] if parallel.sharded else 1,
            accumulate=run.accumulate,
            averaged=task.averaged,
            optim=config.optim,
            beside=task.bytes_beside(),
        )
    chosen = choose_recompute(speed.recompute, parallel.device, compiled=bool(speed.compile), need=need)
    task.run = dataclasses.replace(run, speed=dataclasses.replace(speed, recompute=chosen))


# --- Lengths ---


def build_schedule(config: TaskConfig, optim: OptimConfig) -> CosineSchedule:
    """The learning rate of every step; `config` has its steps resolved.

    Raises:
        InputError: the warm-up is longer than the run.
    """
    return CosineSchedule(
        lr=optim.lr,
        min_lr=optim.min_lr,
        total_steps=config.steps or 0,
        warmup_steps=config.warmup_steps or 0,
        warmup_lr=optim.warmup_lr,
    )


def resolve_lengths(task: Task) -> tuple[OptimConfig, int]:
    """Fill in `effective_batch`, `steps`, `warmup_steps` and `save_every` of the task's settings, and check
    them.

    Returns:
        The optimizer's settings at that batch; the steps of an epoch.

    Raises:
        InputError: the settings name another effective batch than the run has, or the warm-up is longer than
            the run.
    """
    config, run, ranks = task.config, task.run, task.parallel.world_size
    batch = run.videos_per_step(ranks)
    if config.effective_batch not in (None, batch):
        raise InputError(
            f"effective_batch is {config.effective_batch}, but batch_size {run.batch_size} x accumulate "
            f"{run.accumulate} x {ranks} ranks make {batch}: leave it out, it follows from these"
        )
    steps_per_epoch = EpochSampler(len(task.dataset), batch).steps_per_epoch
    steps = config.steps or config.epochs * steps_per_epoch
    warmup = config.warmup_steps
    if warmup is None:
        warmup = int(config.optim.warmup_epochs * steps_per_epoch)
    task.config = dataclasses.replace(config, effective_batch=batch, steps=steps, warmup_steps=warmup)
    if run.save_every_epochs is not None:
        run = dataclasses.replace(run, save_every=min(run.save_every_epochs * steps_per_epoch, STEPS.most))
        task.run = run
    optim = task.scaled_optim(batch)
    build_schedule(task.config, optim)
    LoopConfig(total_steps=steps, dtype=config.dtype, log_every=run.log_every, save_every=run.save_every)
    return optim, steps_per_epoch


# --- Where to begin ---


def find_start(task: Task, notes: list[str]) -> tuple[Path | None, int, dict[str, Any]]:
    """Where to begin; without a checkpoint, the model gets the weights to start from, where the settings name
    some.

    Args:
        notes: gets lines for the user.

    Returns:
        The checkpoint to go on from, whole and fitting, if any; the steps that it has done; the list's
        identity.

    Raises:
        InputError: the checkpoint is damaged, of another architecture or batch, or was trained on another
            list.
    """
    run, parallel = task.run, task.parallel
    folder = CheckpointFolder(run.output, run.keep, run.keep_every)
    path = choose_checkpoint(run.resume, folder, parallel, notes)
    listing = parallel.on_main(lambda: identify_list(task.dataset, task.list_root))
    if path is None:
        if task.config.init is not None:
            notes.append(task.start())
        return None, 0, listing
    manifest = read_manifest(path)
    before = with_defaults(manifest["config"], task.config)
    changes = setting_changes(before, json.loads(json.dumps(task.config.to_dict())))
    _check_fit(task, path, manifest, changes)
    notes.append(f"resuming from {path}, step {manifest['step']}")
    notes += [f"note: setting changed: {text}" for text in changes.values()]
    notes += parallel.on_main(lambda: _compare_lists(task, path, manifest, listing))
    return path, manifest["step"], listing


def _check_fit(task: Task, path: Path, manifest: dict[str, Any], changes: dict[str, str]) -> None:
    """Raises InputError where the checkpoint `path` is of another architecture or of another batch.

    Args:
        changes: of `setting_changes`.
    """
    architecture = [
        text for name, text in changes.items() if name.startswith("model.") and name not in _TRAINING_ONLY
    ]
    advice = "choose another --output, or --no-resume for a fresh start"
    free = {f"target.{name}" for name in PLACES}
    if predicted := [
        text for name, text in changes.items() if name.startswith("target.") and name not in free
    ]:
        raise InputError(
            f"checkpoint {path} learned another target: {'; '.join(predicted)}; {advice}, or start a new run "
            f"with --init {path}"
        )
    own = {name: value.shape for name, value in task.model.state_dict().items()}
    try:
        check_shapes(own, shapes_of(tensor_layouts(path), "model"), path)
    except InputError as error:
        differ = "; ".join(architecture) or "none"
        raise InputError(f"{error}\n  settings that differ: {differ}\n  {advice}") from error
    if architecture:
        raise InputError(f"checkpoint {path} is of another architecture: {'; '.join(architecture)}; {advice}")
    if "optim.opt" in changes:
        raise InputError(
            f"{changes['optim.opt']}: what {path} holds of one optimizer is of no use to another; {advice}"
        )
    if "effective_batch" in changes:
        wanted, now, run = manifest["config"].get("effective_batch"), task.config.effective_batch, task.run
        raise InputError(
            f"the run of {path} takes {wanted} videos a step; --batch-size {run.batch_size} x --accumulate "
            f"{run.accumulate} x {task.parallel.world_size} ranks make {now}. Choose numbers whose product "
            f"is {wanted}; to go on with another batch, start a new run with --init {path}"
        )


def _compare_lists(task: Task, path: Path, manifest: dict[str, Any], listing: dict[str, Any]) -> list[str]:
    """Notes on how the list differs from that of the checkpoint `path`, where that is allowed.

    Raises:
        InputError: it differs, and that is not allowed.
    """
    before, name = manifest.get("list"), task.list_file
    if before is None:
        return [
            f"note: {path} was written before lists were kept: whether {name} is still the same is not known"
        ]
    changes = list_changes(before, task.dataset, task.list_root, listing)
    if not changes:
        return []
    text = f"{name} is not the list that {path} was trained on: {'; '.join(changes)}"
    if not task.run.allow_list_change:
        moved = ""
        if before.get("shards", False) != listing.get("shards", False):
            moved = " (none do where the shards were packed of that list, in its order)"
        raise InputError(
            f"{text}. Bring the list back, or choose another --output; with --allow-list-change the run goes "
            f"on from step {manifest['step']} with samples of the new list: where videos moved, came or "
            f"went, some of this epoch's come twice and others not at all{moved}"
        )
    return [f"note: {text}; allowed: from step {manifest['step']} on, samples are drawn from the new list"]
