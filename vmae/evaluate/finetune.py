"""`python -m vmae finetune` and `distil`, whole: the training, then the multi-view test of the best weights.

    RUN/test/       what `evaluate` writes: predictions.jsonl, results.json, ...

A test that was stopped goes on with the same command; one that is done is not made again. `--eval` is the
test alone, `--validation` a validation alone: of the run's weights where it has some, else of `--init`'s.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
from pathlib import Path

from vmae.checkpoint.classifier import LoadedClassifier, load_classifier
from vmae.checkpoint.folder import (
    BEST_NAME,
    BEST_WEIGHTS_NAME,
    TEST_NAME,
    WEIGHTS_NAME,
    CheckpointFolder,
)
from vmae.checkpoint.models import head_classes
from vmae.checkpoint.source import Source
from vmae.errors import InputError
from vmae.evaluate.classify import EvaluationConfig, evaluate
from vmae.train.checks import check_output
from vmae.train.finetune_settings import FinetuneConfig
from vmae.train.parallel import Parallel, open_parallel
from vmae.train.prepare import Prepared, prepare
from vmae.train.pretrain_settings import RunConfig
from vmae.train.tasks import TASKS
from vmae.train.tasks.finetune import FinetuneTask, PlannedTest, settings_of, test_from_args
from vmae.train.validation import ValidationSet, describe_scores


def run(args: argparse.Namespace) -> int:
    """The command `args.command`."""
    if (args.eval or args.validation) and not args.dry_run:
        return run_alone(args)
    train = importlib.import_module(TASKS[args.command][0]).run
    return train(args, at_end=test_at_end)


# --- After a run ---


def test_at_end(prepared: Prepared) -> None:
    """The test that a complete run ends with, if it was asked for one; all ranks call it."""
    task = prepared.task
    assert isinstance(task, FinetuneTask)
    planned = task.test
    if planned is None or planned.data is None:
        return
    weights = prepared.parallel.on_main(functools.partial(weights_of, prepared.folder, planned.weights))
    loaded = load_run(weights, task.config, prepared.run)
    test(loaded, planned, task.config, prepared.run, prepared.parallel)


def weights_of(folder: Path, which: str) -> Path | None:
    """The weights to test of a run: those of the best validation ("best"), where there is one, else its
    newest checkpoint, else its file of weights; None where it has none."""
    best = [folder / BEST_NAME, folder / BEST_WEIGHTS_NAME] if which == "best" else []
    latest = CheckpointFolder(folder).latest()
    last = [folder / WEIGHTS_NAME] if latest is None else [latest]
    return next((path for path in (*best, *last) if path.exists()), None)


def load_run(weights: Path, config: FinetuneConfig, run: RunConfig) -> LoadedClassifier:
    """The classifier of a run's own checkpoint."""
    return load_classifier(
        weights, clip=config.clip.to_dict(), backend=run.speed.backend, attention=run.speed.attention
    )


def test(
    loaded: LoadedClassifier, planned: PlannedTest, config: FinetuneConfig, run: RunConfig, parallel: Parallel
) -> None:
    """Test into the run's folder; what is left there of another test moves aside."""
    assert planned.data is not None
    folder = Path(run.output) / TEST_NAME
    if parallel.is_main:
        print(f"test of {loaded.path}, into {folder}", flush=True)
    settings = EvaluationConfig(
        data=planned.data,
        data_root=config.data_root,
        **config.frames,
        views=planned.views,
        dtype=config.dtype,
    )
    with parallel.hold(folder, "a test"):
        evaluate(
            loaded,
            settings,
            folder,
            parallel=parallel,
            class_names=config.class_names or loaded.class_names,
            batch_size=run.batch_size * config.num_sample,
            workers=run.speed.num_workers,
            move_other=True,
        )


# --- Without a run ---


def run_alone(args: argparse.Namespace) -> int:
    """`--eval` or `--validation`: no training."""
    config, run, source = settings_of(args)
    planned = test_from_args(args, config)
    if args.eval and planned.data is None:
        raise InputError(
            f"--eval needs a list to test on: --test LIST, or a folder --data with test.csv or val.csv, not "
            f"{args.data}"
        )
    if args.validation and config.val is None:
        raise InputError(
            f"--validation needs a list: --val LIST, or a folder --data with val.csv, not {args.data}"
        )
    with open_parallel(run.speed.parallel, run.device, shard_size=run.speed.shard_size) as parallel:
        check_output(Path(run.output))
        loaded = load_alone(config, run, source, planned, parallel)
        if args.validation:
            validate(loaded, config, run, parallel)
        if args.eval:
            test(loaded, planned, config, run, parallel)
    return 0


def load_alone(
    config: FinetuneConfig, run: RunConfig, source: Source | None, planned: PlannedTest, parallel: Parallel
) -> LoadedClassifier:
    """The weights that `--resume` names, else those of the run in the output folder, else those of `--init`.

    Raises:
        InputError: there are none, they have no head, or one of other classes.
    """
    weights: Path | None = None
    if run.resume in ("auto", "last-good"):
        weights = parallel.on_main(functools.partial(weights_of, Path(run.output), planned.weights))
    elif run.resume is not None:
        weights = Path(run.resume)
    if weights is not None:
        loaded = load_run(weights, config, run)
        if loaded.model.num_classes != config.num_classes:
            raise InputError(
                f"{weights} has a head of {loaded.model.num_classes} classes, the labels have "
                f"{config.num_classes}"
            )
        return loaded
    if source is None:
        raise InputError(
            f"nothing to test: {run.output} holds no weights, and no --init (--finetune) names some"
        )
    head_classes(source)
    if config.new_head:
        raise InputError("--new-head leaves out the head that is to be tested")
    task = FinetuneTask(config, source)
    prepared = prepare(task, dataclasses.replace(run, resume=None), parallel)
    for note in prepared.notes if parallel.is_main else ():
        print(note, flush=True)
    return LoadedClassifier(
        task.model.eval(), source.path, task.config.clip, task.config.class_names, task.config.multi_label
    )


def validate(loaded: LoadedClassifier, config: FinetuneConfig, run: RunConfig, parallel: Parallel) -> None:
    """One validation of a model, printed."""
    task = FinetuneTask(config)
    task.run, task.parallel = run, parallel
    labelled, notes = task.read_list("validate", config.val, "--no-val")
    videos = ValidationSet(
        labelled,
        loaded.clip,
        parallel=parallel,
        dtype=config.dtype,
        multi_label=loaded.multi_label or config.multi_label,
        batch_size=run.batch_size * config.num_sample,
        num_workers=run.speed.num_workers,
    )
    with videos.opened():
        loaded.model.to(parallel.device)
        scores, failed = videos.score(loaded.model)
    if parallel.is_main:
        print("\n".join([*notes, f"validation of {loaded.path} on {config.val}: {describe_scores(scores)}"]))
