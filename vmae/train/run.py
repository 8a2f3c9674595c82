"""One run of any task: its folder, its loop, its end; from the command line (`run_task`) or from Python
(`train`)."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmae.checkpoint.folder import AVERAGED_NAME, BEST_WEIGHTS_NAME, export_weights, set_aside
from vmae.checkpoint.format import is_checkpoint, read_group, read_manifest
from vmae.checkpoint.saver import Saver
from vmae.config import SpeedConfig
from vmae.data import Prefetcher, build_loader
from vmae.data.quarantine import QUARANTINE_NAME
from vmae.errors import InputError
from vmae.files.folder_lock import FolderLock
from vmae.files.yaml_files import write_settings
from vmae.flags import settled
from vmae.train.activations import prepare_blocks
from vmae.train.dry_run import show_settings
from vmae.train.loop import LoopConfig, Trainer
from vmae.train.metrics import (
    LOG_NAME,
    add_to_run_file,
    board_folder,
    describe_start,
    read_log,
    service_of,
    write_run_file,
)
from vmae.train.needs import warn_of_shortages
from vmae.train.parallel import open_parallel
from vmae.train.prepare import Prepared, prepare
from vmae.train.pretrain_settings import RunConfig
from vmae.train.report import banner, describe_bad_videos, summary
from vmae.train.skipping import Skipping
from vmae.train.task import Task, TaskConfig
from vmae.train.tasks import task_of
from vmae.train.validation import Validation

AtEnd = Callable[[Prepared], None]


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        folder: of the run.
        steps: done, of the whole run.
        loss: of the last step that was logged; None where none was.
        weights: the file, once the run is complete.
        stopped_by: the signal that stopped the run before its end (`signal.SIGTERM`, say).
    """

    folder: Path
    steps: int
    loss: float | None
    weights: Path | None
    stopped_by: int | None = None


def train(task: Task | TaskConfig, run: RunConfig | None = None, **settings: Any) -> Result:
    """Train; the same as the command, without the command line: `vmae.train(config, output="runs/a")`.

    A folder that holds checkpoints of the same run is gone on with. SIGTERM, SIGUSR1 and Ctrl-C stop after
    the step that they find, with a checkpoint.

    Args:
        task: its settings (`PretrainConfig`, `FinetuneConfig`, `DetectionConfig`, `DistilConfig`), or the
            task itself, for one of your own.
        run: where and how.
        settings: fields of `RunConfig`, and of its `SpeedConfig`, that differ from `run` or the defaults.

    Raises:
        InputError: what is wrong, in a line; see `prepare` and `Trainer.run`.
    """
    task = task if isinstance(task, Task) else task_of(task)
    run = _run_config(run, settings)
    with open_parallel(run.speed.parallel, run.device, shard_size=run.speed.shard_size) as parallel:
        prepared = prepare(task, run, parallel)
        if own := settled(prepared.config):  # none where no command has these settings
            prepared.settings = own | settled(run)
        return carry_out(prepared)


def _run_config(run: RunConfig | None, settings: dict[str, Any]) -> RunConfig:
    of_speed = {field.name for field in dataclasses.fields(SpeedConfig)} & settings.keys()
    speed = {name: settings.pop(name) for name in of_speed}
    if run is None:
        if "output" not in settings:
            raise InputError("the run's folder is missing: output=...")
        run = RunConfig(output=str(settings["output"]))
    known = {field.name for field in dataclasses.fields(RunConfig)}
    if unknown := sorted(settings.keys() - known):
        raise InputError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if "output" in settings:
        settings["output"] = str(settings["output"])
    return dataclasses.replace(run, **{"speed": dataclasses.replace(run.speed, **speed), **settings})


def run_task(task: Task, run: RunConfig, args: argparse.Namespace, at_end: AtEnd | None = None) -> int:
    """A task's command.

    Args:
        args: the command line; with `dry_run`, the resolved settings are printed as JSON, and nothing is
            written.
        at_end: what follows a complete run, on all ranks: a test.

    Returns:
        The exit code: 0, also after SIGTERM or SIGUSR1 (the same command goes on), 130 after Ctrl-C.
    """
    speed = run.speed
    with open_parallel(speed.parallel, run.device, shard_size=speed.shard_size) as parallel:
        try:
            prepared = prepare(task, run, parallel)
        except InputError:
            if args.dry_run and parallel.is_main:
                show_settings(task.config, run)
            raise
        prepared.settings = args.settings.resolved(args, prepared.config, run)
        if args.dry_run:
            shortages = warn_of_shortages(prepared)
            if parallel.is_main:
                print(json.dumps(prepared.describe(), indent=2))
                print("\n".join(shortages), end="\n" * bool(shortages), file=sys.stderr)
            return 0
        stopped_by = carry_out(prepared).stopped_by
        if stopped_by is None and at_end is not None:
            at_end(prepared)
        return 130 if stopped_by == signal.SIGINT else 0


# --- The run ---


def carry_out(prepared: Prepared) -> Result:
    """A prepared run: open its folder, train, export the weights.

    Raises:
        InputError: the output folder is another run's, can't be written, or goes away; see `Trainer.run`.
    """
    parallel, folder = prepared.parallel, prepared.folder
    complete = prepared.start_step >= prepared.total_steps
    if complete:
        if parallel.is_main:
            print(
                f"nothing to do: {folder} has done {prepared.start_step} of {prepared.total_steps} steps; "
                "more --steps go on from there"
            )
        if parallel.on_main((folder / prepared.task.weights_name).exists):
            return _result(prepared, prepared.start_step)
    with contextlib.ExitStack() as stack:
        parallel.on_main(lambda: open_folder(prepared, folder, stack))
        if complete and not prepared.task.validates:  # stopped between the last checkpoint and its export
            parallel.on_main(lambda: _export_last(prepared, prepared.checkpoint))
            return _result(prepared, prepared.start_step)
        return _train(prepared)


def _train(prepared: Prepared) -> Result:
    """`carry_out`, once the folder is open."""
    parallel, folder = prepared.parallel, prepared.folder
    shortages = warn_of_shortages(prepared)
    if parallel.is_main:
        for line in (*prepared.notes, *banner(prepared), *shortages):
            print(line, flush=True)
    trainer = build_trainer(prepared)
    began, first_step = time.monotonic(), trainer.step
    stopped_by = trainer.run()
    bad = len(set().union(*parallel.gather(trainer.bad_videos)))
    if stopped_by is None:
        parallel.on_main(lambda: _export_best(prepared, trainer.validation))  # the last one marks the end
        parallel.on_main(lambda: _export_last(prepared, prepared.checkpoints.latest()))
    end = {"step": trainer.step, "bad_videos": bad, "failed_reads": trainer.failed_reads}
    parallel.on_main(lambda: add_to_run_file(folder, end=end))
    if parallel.is_main:
        if stopped_by is None:
            lines = summary(prepared, trainer.step - first_step, time.monotonic() - began, trainer.step)
            lines += [] if trainer.validation is None else trainer.validation.closing()
            lines.append(describe_bad_videos(bad, trainer.failed_reads, folder))
        else:
            name = signal.Signals(stopped_by).name
            lines = [f"stopped by {name} after step {trainer.step}; the same command goes on from there"]
        for line in lines:
            print(line)
    return _result(prepared, trainer.step, stopped_by)


def _result(prepared: Prepared, steps: int, stopped_by: int | None = None) -> Result:
    def last_loss() -> float | None:
        records = read_log(prepared.folder / LOG_NAME, loss=(int, float))
        return records[-1]["loss"] if records else None

    loss = prepared.parallel.on_main(last_loss)
    weights = None
    if stopped_by is None:
        weights = prepared.folder / prepared.task.weights_name
    return Result(prepared.folder, steps, loss, weights, stopped_by)


def build_trainer(prepared: Prepared) -> Trainer:
    """The loop of a prepared run, at its start step."""
    task, run, config = prepared.task, prepared.run, prepared.config
    blocks = task.blocks()
    prepare_blocks(
        blocks,
        checkpointing=run.speed.checkpointing,
        compiled=bool(run.speed.compile),
        cuda_graphs=run.speed.cuda_graphs,
        recompute=run.speed.recompute,
        shapes=task.shape_count,
    )
    model = prepared.parallel.wrap(prepared.model, blocks, config.dtype)
    trainer = Trainer(
        model=model,
        optimizer=task.build_optimizer(prepared.optim),
        schedule=prepared.schedule,
        weight_decay=prepared.weight_decay,
        open_batches=lambda start_step: open_batches(prepared, start_step),
        compute_loss=lambda batch: task.compute_loss(model, batch),
        config=LoopConfig(
            total_steps=prepared.total_steps,
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
        weigh=task.weigh,
        companions=task.companions(),
        after_step=task.after_step,
        sources=prepared.dataset.sources,
        count_sources=prepared.dataset.count_sources,
        flops_per_clip=task.flops_per_clip(),
        tensorboard=run.tensorboard,
        board=board_folder(run),
        service=service_of(run, config.to_dict()),
        on_first_batch=task.on_first_batch,
        validation=task.build_validation(model, prepared.steps_per_epoch),
        skipping=Skipping.of(config.optim),
    )
    if prepared.checkpoint:
        trainer.resume(prepared.checkpoint)
    return trainer


def open_batches(prepared: Prepared, start_step: int) -> Prefetcher:
    """This rank's micro-batches from `start_step` on."""
    task, run = prepared.task, prepared.run
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = build_loader(
            prepared.dataset,
            batch_size=run.batch_size,
            accumulate=run.accumulate,
            rank=prepared.parallel.rank,
            world_size=prepared.parallel.world_size,
            num_workers=run.speed.num_workers,
            start_step=start_step,
            total_steps=prepared.total_steps,
            pin_memory=prepared.device.type == "cuda",
            quarantine=prepared.folder / QUARANTINE_NAME,
            max_bad_share=run.max_bad_share,
            loader=task.loader,
            device=prepared.device,
        )
    for warning in caught if prepared.parallel.is_main else ():
        print(f"note: {warning.message}", flush=True)
    return Prefetcher(loader, prepared.device, threaded=False if task.loader == "dali" else None)


# --- The folder ---


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
    if prepared.start_step >= prepared.total_steps:
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


def _export_best(prepared: Prepared, validation: Validation | None) -> None:
    """Write the weights of the best validation, where its checkpoint is still there."""
    best, checkpoints = None if validation is None else validation.best, prepared.checkpoints
    if best is not None and is_checkpoint(checkpoint := checkpoints.path_of(best["step"])):
        checkpoints.check()
        export_group(checkpoint, "model", prepared.folder / BEST_WEIGHTS_NAME)


def _export_last(prepared: Prepared, checkpoint: Path | None) -> None:
    """Write the weights of `checkpoint`; before and after, the folder must be there, and this run's."""
    lock, folder = prepared.lock, prepared.folder
    assert lock is not None  # `open_folder` came before
    lock.check()
    if checkpoint is None:
        raise InputError(
            f"the checkpoints in {folder} are gone: removed during the run; no weights are written"
        )
    export_run(checkpoint, folder, prepared.task)
    lock.check()


def export_run(checkpoint: Path, folder: Path, task: Task) -> None:
    """The weights of a run's last checkpoint as one file, and `weights_ema.pth` where they were averaged."""
    export_group(checkpoint, "model", folder / task.weights_name)
    if task.averaged:
        export_group(checkpoint, "ema", folder / AVERAGED_NAME)


def export_group(checkpoint: Path, group: str, path: Path) -> None:
    """A group of a checkpoint's tensors as one file of weights."""
    about = read_manifest(checkpoint)
    export_weights(path, read_group(checkpoint, group), config=about["config"], step=about["step"])
