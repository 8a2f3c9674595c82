"""What a run of any kind is made of beside its loss: a checked start, its folder, its batches, its end.

`pretrain`, `finetune` and `distil` prepare a `Prepared`, build a `Trainer`, and hand both to `carry_out`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmae.checkpoint.folder import AVERAGED_NAME, WEIGHTS_NAME, CheckpointFolder, export_weights, set_aside
from vmae.checkpoint.format import read_group, read_manifest, shapes_of, tensor_layouts
from vmae.checkpoint.published import check_shapes
from vmae.checkpoint.saver import Saver
from vmae.data import Prefetcher, build_loader
from vmae.data.dataset import EpochSampler
from vmae.data.list_identity import identify_list, list_changes
from vmae.data.quarantine import QUARANTINE_NAME
from vmae.data.video_dataset import VideoDataset
from vmae.errors import InputError
from vmae.files.folder_lock import FolderLock
from vmae.files.yaml_files import write_settings
from vmae.train.activations import prepare_blocks
from vmae.train.loop import LoopConfig, Trainer
from vmae.train.metrics import (
    LOG_NAME,
    RUN_NAME,
    add_to_run_file,
    describe_start,
    loss_of_last_tenth,
    read_log,
    write_run_file,
)
from vmae.train.optim import CosineSchedule, OptimConfig
from vmae.train.parallel import Parallel
from vmae.train.pretrain_settings import RunConfig
from vmae.train.resume import choose_checkpoint, setting_changes

# Settings under `model` that a resumed run may change: they concern training only.
_TRAINING_ONLY = ("model.drop_path_rate",)


@dataclass
class Prepared:
    """A run whose input was found good.

    Attributes:
        config: what decides the result, with `steps` and `warmup_steps` resolved.
        run: as given.
        parallel: this process among those of the run, with its device.
        dataset: of the list's videos.
        model: on the device, with the weights to start from, unless a checkpoint brings them.
        optim: with the learning rates of this batch.
        steps_per_epoch: optimizer steps of an epoch.
        checkpoint: the one to go on from, if any.
        start_step: the steps that it has done.
        notes: lines for the user.
        listing: of `identify_list`; stands in every checkpoint.
        lock: of the output folder, once the run writes to it; rank 0 has it.
        settings: of the command line, resolved, by key (`Settings.resolved`): `config.yaml`.
    """

    config: Any
    run: RunConfig
    parallel: Parallel
    dataset: VideoDataset
    model: nn.Module
    optim: OptimConfig
    steps_per_epoch: int
    checkpoint: Path | None
    start_step: int
    notes: list[str]
    listing: dict[str, Any]
    lock: FolderLock | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def checkpoints(self) -> CheckpointFolder:
        """Of the output folder."""
        check = {} if self.lock is None else {"check": self.lock.check}
        return CheckpointFolder(self.run.output, self.run.keep, self.run.keep_every, **check)

    @property
    def device(self) -> torch.device:
        return self.parallel.device

    def describe(self) -> dict[str, Any]:
        """The resolved settings in plain containers, with what follows from them."""
        config = self.config
        derived = {
            "device": str(self.device),
            "videos": len(self.dataset.entries),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": config.steps,
            "start_step": self.start_step,
            "ranks": self.parallel.world_size,
            "parallel": self.parallel.kind,
            "effective_batch_videos": config.effective_batch,
            "clips_per_step": config.effective_batch * config.num_sample,
            "peak_lr": self.optim.lr,
            "final_lr": self.optim.min_lr,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        return {"results": config.to_dict(), "run": self.run.to_dict(), "derived": derived}


def build_schedule(config: Any, optim: OptimConfig) -> CosineSchedule:
    """The learning rate of every step; `config` has its steps resolved.

    Raises:
        InputError: the warm-up is longer than the run.
    """
    return CosineSchedule(
        lr=optim.lr, min_lr=optim.min_lr, total_steps=config.steps, warmup_steps=config.warmup_steps
    )


def resolve_lengths(
    config: Any, run: RunConfig, parallel: Parallel, samples: int
) -> tuple[Any, OptimConfig, int]:
    """What follows from the batch and an epoch of `samples`, checked.

    Returns:
        `config` with `effective_batch`, `steps` and `warmup_steps` resolved; the optimizer's settings at that
            batch; the
        steps of an epoch.

    Raises:
        InputError: `config` was given another effective batch than the run has, or the warm-up is longer than
            the run.
    """
    batch = run.videos_per_step(parallel.world_size)
    if config.effective_batch not in (None, batch):
        raise InputError(
            f"effective_batch is {config.effective_batch}, but batch_size {run.batch_size} x accumulate "
            f"{run.accumulate} x "
            f"{parallel.world_size} ranks make {batch}: leave it out, it follows from these"
        )
    config = dataclasses.replace(config, effective_batch=batch)
    steps_per_epoch = EpochSampler(samples, batch).steps_per_epoch
    config = _with_steps(config, steps_per_epoch)
    optim = config.optim.scaled_to(batch)
    build_schedule(config, optim)
    LoopConfig(
        total_steps=config.steps, dtype=config.dtype, log_every=run.log_every, save_every=run.save_every
    )
    return config, optim, steps_per_epoch


def _with_steps(config: Any, steps_per_epoch: int) -> Any:
    steps = config.steps or config.epochs * steps_per_epoch
    warmup = config.warmup_steps
    warmup = int(config.optim.warmup_epochs * steps_per_epoch) if warmup is None else warmup
    return dataclasses.replace(config, steps=steps, warmup_steps=warmup)


def find_start(
    model: nn.Module,
    config: Any,
    run: RunConfig,
    parallel: Parallel,
    notes: list[str],
    load_init: Callable[[], str],
    dataset: VideoDataset,
) -> dict[str, Any]:
    """Where to begin: `checkpoint` (the one to go on from, whole and fitting, if any), `start_step`,
    `listing`.

    Without a checkpoint, `load_init` gives `model` the weights to start from, where the settings name some,
    and says so in a line.

    Raises:
        InputError: the checkpoint is damaged, of another architecture or batch, or was trained on another
            list.
    """
    path = choose_checkpoint(
        run.resume, CheckpointFolder(run.output, run.keep, run.keep_every), parallel, notes
    )
    listing = parallel.on_main(lambda: identify_list(dataset, root_of(config)))
    if path is None:
        if config.init is not None:
            notes.append(load_init())
        return {"checkpoint": None, "start_step": 0, "listing": listing}
    manifest = read_manifest(path)
    changes = setting_changes(manifest["config"], json.loads(json.dumps(config.to_dict())))
    architecture = [
        text for name, text in changes.items() if name.startswith("model.") and name not in _TRAINING_ONLY
    ]
    advice = "choose another --output, or --no-resume for a fresh start"
    own = {name: value.shape for name, value in model.state_dict().items()}
    try:
        check_shapes(own, shapes_of(tensor_layouts(path), "model"), path)
    except InputError as error:
        raise InputError(
            f"{error}\n  settings that differ: {'; '.join(architecture) or 'none'}\n  {advice}"
        ) from error
    if architecture:
        raise InputError(f"checkpoint {path} is of another architecture: {'; '.join(architecture)}; {advice}")
    if "effective_batch" in changes:
        wanted, now = manifest["config"].get("effective_batch"), config.effective_batch
        raise InputError(
            f"the run of {path} takes {wanted} videos a step; --batch-size {run.batch_size} x --accumulate "
            f"{run.accumulate} x "
            f"{parallel.world_size} ranks make {now}. Choose numbers whose product is {wanted}; to go on "
            "with another batch, "
            f"start a new run with --init {path}"
        )
    notes.append(f"resuming from {path}, step {manifest['step']}")
    notes += [f"note: setting changed: {text}" for text in changes.values()]
    notes += parallel.on_main(lambda: _compare_lists(path, manifest, config, run, dataset, listing))
    return {"checkpoint": path, "start_step": manifest["step"], "listing": listing}


def root_of(config: Any) -> str:
    """Folder that the relative paths of a run's list start from."""
    if hasattr(config, "videos"):
        return config.videos
    return config.data_root or (config.data if os.path.isdir(config.data) else os.path.dirname(config.data))


def _compare_lists(
    path: Path,
    manifest: dict[str, Any],
    config: Any,
    run: RunConfig,
    dataset: VideoDataset,
    listing: dict[str, Any],
) -> list[str]:
    """Notes on how the list differs from that of the checkpoint `path`, where that is allowed.

    Raises:
        InputError: it differs, and that is not allowed.
    """
    before, name = manifest.get("list"), config.annotations if hasattr(config, "annotations") else config.data
    if before is None:
        return [
            f"note: {path} was written before lists were kept: whether {name} is still the same is not known"
        ]
    changes = list_changes(before, dataset, root_of(config), listing)
    if not changes:
        return []
    text = f"{name} is not the list that {path} was trained on: {'; '.join(changes)}"
    if not run.allow_list_change:
        raise InputError(
            f"{text}. Bring the list back, or choose another --output; with --allow-list-change the run goes "
            "on from step "
            f"{manifest['step']} with samples of the new list: where videos moved, came or went, some of "
            "this epoch's come "
            "twice and others not at all"
        )
    return [f"note: {text}; allowed: from step {manifest['step']} on, samples are drawn from the new list"]


# --- The run ---


def wrap_model(prepared: Prepared, blocks: Sequence[nn.Module]) -> nn.Module:
    """The model as `Trainer` takes it: blocks compiled and checkpointed as the run says, then spread over its
    processes."""
    speed = prepared.run.speed
    prepare_blocks(
        blocks, checkpointing=speed.checkpointing, compiled=speed.compile, cuda_graphs=speed.cuda_graphs
    )
    return prepared.parallel.wrap(prepared.model, blocks, prepared.config.dtype)


def assemble_trainer(prepared: Prepared, model: nn.Module, **own: Any) -> Trainer:
    """The loop for a prepared run, at its start step.

    Args:
        model: of `wrap_model`.
        own: what the kind of training brings: `optimizer`, `compute_loss` and more arguments of `Trainer`.
    """
    run, config = prepared.run, prepared.config
    trainer = Trainer(
        model=model,
        schedule=build_schedule(config, prepared.optim),
        open_batches=lambda start_step: open_batches(prepared, start_step),
        config=LoopConfig(
            total_steps=config.steps,
            steps_per_epoch=prepared.steps_per_epoch,
            accumulate=run.accumulate,
            clip_grad=config.optim.clip_grad,
            dtype=config.dtype,
            cuda_graphs=run.speed.cuda_graphs,
            seed=config.seed,
            log_every=run.log_every,
            save_every=run.save_every,
        ),
        saver=Saver(prepared.checkpoints, prepared.parallel, background=run.async_save),
        about=config.to_dict(),
        listing=prepared.listing,
        parallel=prepared.parallel,
        sources=prepared.dataset.sources,
        count_sources=prepared.dataset.count_sources,
        tensorboard=run.tensorboard,
        **own,
    )
    if prepared.checkpoint:
        trainer.resume(prepared.checkpoint)
    return trainer


def carry_out(
    prepared: Prepared,
    introduction: Sequence[str],
    make_trainer: Callable[[], Trainer],
    summarise: Callable[[int, float], list[str]],
    averaged: bool = False,
) -> int | None:
    """A prepared run of any kind: open its folder, train, export.

    Args:
        introduction: lines to print first.
        summarise: (steps done, seconds) -> lines to print at the end.
        averaged: the checkpoints hold an average of the weights, to export too.

    Returns:
        None when the run is complete, else the signal that stopped it.

    Raises:
        InputError: the output folder is another run's, or goes away; see `Trainer.run`.
    """
    config, parallel = prepared.config, prepared.parallel
    folder = Path(prepared.run.output)
    say = print if parallel.is_main else _say_nothing
    if prepared.start_step >= config.steps:
        say(
            f"nothing to do: {folder} has done {prepared.start_step} of {config.steps} steps; more --steps "
            "go on from there"
        )
        if parallel.on_main((folder / WEIGHTS_NAME).exists):
            return None
    with contextlib.ExitStack() as stack:
        parallel.on_main(lambda: open_folder(prepared, folder, stack))
        if prepared.start_step >= config.steps:  # stopped between the last checkpoint and its export
            parallel.on_main(lambda: export_run(prepared.checkpoint, folder, averaged))
            return None
        return _train(prepared, introduction, make_trainer, summarise, averaged)


def _train(
    prepared: Prepared,
    introduction: Sequence[str],
    make_trainer: Callable[[], Trainer],
    summarise: Callable[[int, float], list[str]],
    averaged: bool,
) -> int | None:
    """`carry_out`, once the folder is open."""
    parallel, folder = prepared.parallel, Path(prepared.run.output)
    say = print if parallel.is_main else _say_nothing
    for line in (*prepared.notes, *introduction):
        say(line, flush=True)
    trainer = make_trainer()
    began, first_step = time.monotonic(), trainer.step
    stopped_by = trainer.run()
    bad = len(set().union(*parallel.gather(trainer.bad_videos)))
    if stopped_by is None:
        parallel.on_main(lambda: _export_last(prepared, folder, averaged))
    end = {"step": trainer.step, "bad_videos": bad, "failed_reads": trainer.failed_reads}
    parallel.on_main(lambda: add_to_run_file(folder, end=end))
    if stopped_by is not None:
        say(
            f"stopped by {signal.Signals(stopped_by).name} after step {trainer.step}; the same command goes "
            "on from there"
        )
        return stopped_by
    if parallel.is_main:
        for line in summarise(trainer.step - first_step, time.monotonic() - began):
            print(line)
        print(describe_bad_videos(bad, trainer.failed_reads, folder))
    return None


def _export_last(prepared: Prepared, folder: Path, averaged: bool) -> None:
    newest = prepared.checkpoints.latest()
    prepared.lock.check()
    if newest is None:
        raise InputError(
            f"the checkpoints in {folder} are gone: removed during the run; no weights are written"
        )
    export_run(newest, folder, averaged)
    prepared.lock.check()


def describe_bad_videos(bad: int, failed_reads: int, folder: Path) -> str:
    """How many videos could not be decoded in this start, in a line."""
    if not bad:
        return "bad videos: none"
    return f"bad videos: {bad}, replaced by others {failed_reads} times; see {folder / QUARANTINE_NAME}"


def _say_nothing(*text: str, **options: Any) -> None:
    """For all ranks but the first."""


def export_run(checkpoint: Path, folder: Path, averaged: bool = False) -> None:
    """`weights.pth`, and `weights_ema.pth` of averaged weights, from a run's last checkpoint."""
    about = read_manifest(checkpoint)
    for name, group in ((WEIGHTS_NAME, "model"), (AVERAGED_NAME, "ema"))[: 1 + averaged]:
        export_weights(
            folder / name, read_group(checkpoint, group), config=about["config"], step=about["step"]
        )


def open_folder(prepared: Prepared, folder: Path, stack: contextlib.ExitStack) -> None:
    """Make the output folder this run's until `stack` ends, move an earlier run out of the way, and write
    `config.yaml` and `run.json`.

    Raises:
        InputError: the folder is another run's, or was until now; it can't be written to.
    """
    prepared.lock = stack.enter_context(FolderLock(folder, "a training run"))
    if prepared.run.resume == "auto" and prepared.checkpoints.latest() != prepared.checkpoint:
        raise InputError(
            f"another run has just written to {folder}, and ended; the same command goes on from where it "
            "stopped"
        )
    if prepared.start_step >= prepared.config.steps:
        return
    moved = set_aside(folder, prepared.start_step if prepared.checkpoint else None)
    if moved:
        prepared.notes.append(f"moved what an earlier run left in {folder} to {moved}")
    write_settings(folder, prepared.settings)
    about = prepared.describe()
    note = write_run_file(
        folder, describe_start(about, device=prepared.device, start_step=prepared.start_step)
    )
    prepared.notes.extend([note] if note else [])


def open_batches(prepared: Prepared, start_step: int) -> Prefetcher:
    """This rank's micro-batches from `start_step` on."""
    decoder = getattr(prepared.config, "loader", "cpu")  # only pre-training has the choice
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = build_loader(
            prepared.dataset,
            batch_size=prepared.run.batch_size,
            accumulate=prepared.run.accumulate,
            rank=prepared.parallel.rank,
            world_size=prepared.parallel.world_size,
            num_workers=prepared.run.speed.num_workers,
            start_step=start_step,
            total_steps=prepared.config.steps,
            pin_memory=prepared.device.type == "cuda",
            quarantine=Path(prepared.run.output) / QUARANTINE_NAME,
            max_bad_share=prepared.run.max_bad_share,
            loader=decoder,
            device=prepared.device,
        )
    for warning in caught if prepared.parallel.is_main else ():
        print(f"note: {warning.message}", flush=True)
    return Prefetcher(loader, prepared.device, threaded=False if decoder == "dali" else None)


def describe_run(prepared: Prepared) -> list[str]:
    """For the start of a supervised run: its steps and where it runs, in words."""
    config, speed = prepared.config, prepared.run.speed
    return [
        f"steps: {prepared.start_step} to {config.steps} ({config.steps / prepared.steps_per_epoch:g} "
        "epochs), "
        f"warm-up {config.warmup_steps}",
        f"device: {prepared.device}, {config.dtype}, parallel {prepared.parallel.kind}, backend "
        f"{speed.backend}, "
        f"{speed.num_workers} workers a rank",
    ]


def describe_end(prepared: Prepared, steps: int, seconds: float, averaged: bool = False) -> list[str]:
    """For the end of a supervised run: how it went, and where everything is."""
    folder = Path(prepared.run.output)
    loss = loss_of_last_tenth(read_log(folder / LOG_NAME), prepared.config.steps)
    return [
        f"done: {steps} steps in {datetime.timedelta(seconds=round(seconds))}",
        f"final loss (mean of the last tenth): {'not logged' if loss is None else f'{loss:.4f}'}",
        f"weights: {folder / WEIGHTS_NAME} (published names)"
        + (f", {folder / AVERAGED_NAME} (averaged)" if averaged else ""),
        f"log: {folder / LOG_NAME}; settings: {folder / RUN_NAME}",
    ]
