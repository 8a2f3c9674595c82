"""`python -m vmae finetune-detection`: train a detector of actions on annotated key frames, as on AVA.

Everything that can be wrong with the input is found before the output folder gets its first file; for that
every video is opened once.

Legend: B clips, M boxes of a clip, K actions.
"""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae.checkpoint.classifier import Start, start_classifier
from vmae.data.augment import image_hw
from vmae.data.ava import AvaBox, read_actions, read_annotations, read_excluded
from vmae.data.detection_dataset import DetectionBatch, DetectionDataset, KeyFrame, find_videos, key_frames
from vmae.errors import InputError
from vmae.model.cost import classifier_macs
from vmae.model.detector import Detector, build_detector
from vmae.train.checks import check_backend, check_output, check_speed
from vmae.train.detection_settings import DetectionConfig, add_arguments, configs_from_args
from vmae.train.finetune import Source, read_start
from vmae.train.layer_decay import build_layer_adamw
from vmae.train.loop import Trainer
from vmae.train.parallel import Parallel, open_parallel
from vmae.train.pretrain_settings import RunConfig
from vmae.train.run import (
    Prepared,
    assemble_trainer,
    carry_out,
    describe_end,
    describe_run,
    find_start,
    resolve_lengths,
    wrap_model,
)

__all__ = ["add_arguments", "build_trainer", "prepare_detection", "run", "settings_of"]


def run(args: argparse.Namespace) -> int:
    """The command; 0 also after SIGTERM or SIGUSR1 (the run goes on when it is started again), 130 after
    Ctrl-C."""
    config, run_config, source = settings_of(args)
    speed = run_config.speed
    with open_parallel(speed.parallel, run_config.device, shard_size=speed.shard_size) as parallel:
        prepared = prepare_detection(config, run_config, parallel, source)
        prepared.settings = args.settings.resolved(args, prepared.config, prepared.run)
        if args.dry_run:
            if parallel.is_main:
                print(json.dumps(prepared.describe(), indent=2))
            return 0
        stopped_by = carry_out(
            prepared,
            _banner(prepared),
            lambda: build_trainer(prepared),
            lambda steps, seconds: _summary(prepared, steps, seconds),
        )
        return 130 if stopped_by == signal.SIGINT else 0


# --- Checks: nothing is written ---


def settings_of(args: argparse.Namespace) -> tuple[DetectionConfig, RunConfig, Source | None]:
    """The settings of a command line; what they leave open comes from the checkpoint and the action list.

    Raises:
        InputError: settings that do not fit together, a checkpoint or action list that cannot be read.
    """
    model, source, settings = read_start(args)
    if source is not None:
        args.new_head = args.new_head or "action_ids" not in settings  # another head is of no use
    return *configs_from_args(args, model, read_actions(args.actions)), source


def start_detector(model: Detector, source: Source, *, new_head: bool) -> Start:
    """Load a checkpoint's encoder, and its head unless `new_head`, into `model`.

    As published, the `norm` of a pre-trained file is kept; in one fine-tuned for classification there is a
    norm of pooled clips instead, and the detector's starts fresh.

    Raises:
        InputError: see `start_classifier`.
    """
    state = dict(source.state)
    own, note = model.state_dict(), None
    pooled = [
        name for name in state if name.rsplit(".", 1)[0].endswith("fc_norm") or name.startswith("pool.")
    ]
    if pooled:
        prefix = next((name.split("fc_norm")[0] for name in pooled if "fc_norm" in name), "")
        state = {name: value for name, value in state.items() if name not in pooled}
        state |= {f"{prefix}{name}": own[name] for name in ("norm.weight", "norm.bias")}
        note = f"{len(pooled)} dropped (fc_norm and pooling, of whole clips), norm starts fresh"
    head = next(
        (value for name, value in state.items() if name.endswith("head.weight") and "decoder." not in name),
        None,
    )
    if not new_head and head is not None and head.shape[0] != model.num_classes:
        raise InputError(
            f"checkpoint {source.path} has a head of {head.shape[0]} actions, the action list has "
            f"{model.num_classes}: "
            "--new-head starts a fresh one"
        )
    report = start_classifier(model, source.path, grid=source.grid, new_head=new_head, state=state)
    if note:
        report.notes.append(note)
        report.loaded -= 2
    return report


def read_data(config: DetectionConfig) -> tuple[list[KeyFrame], list[str]]:
    """The key frames of a run, and lines on what was left out.

    Raises:
        InputError: files that cannot be read; see `read_annotations`, `key_frames`; nothing is left.
    """
    notes: list[str] = []
    rows = read_annotations(config.annotations, config.action_ids, skip_unlisted=config.skip_unlisted)
    if config.excluded is not None:
        excluded = read_excluded(config.excluded)
        rows = _left([row for row in rows if row.key not in excluded], rows, "on excluded key frames", notes)
    entries = find_videos(config.videos, [row.video for row in rows], pattern=config.frame_pattern)
    if config.skip_missing:
        rows = _left(
            [row for row in rows if row.video in entries],
            rows,
            f"of videos that are not in {config.videos}",
            notes,
        )
    frames = key_frames(
        rows,
        config.annotations,
        entries,
        config.clip,
        actions=config.action_ids,
        fps=config.fps,
        videos=config.videos,
    )
    lacking = config.num_classes - len({row.action for row in rows})
    if lacking:
        notes.append(f"note: {lacking} of {config.num_classes} actions have no box in {config.annotations}")
    return frames, notes


def _left(kept: list[AvaBox], rows: list[AvaBox], why: str, notes: list[str]) -> list[AvaBox]:
    if not kept:
        raise InputError(f"no annotation is left: all {len(rows)} are {why}")
    if len(kept) < len(rows):
        notes.append(f"note: {len(rows) - len(kept)} of {len(rows)} annotations left out, {why}")
    return kept


def prepare_detection(
    config: DetectionConfig, run: RunConfig, parallel: Parallel, source: Source | None = None
) -> Prepared:
    """Check everything that a run needs, and write nothing. All ranks call it.

    Args:
        source: what `config.init` names, as `settings_of` reads it.

    Raises:
        InputError: names what is wrong: annotations, videos, output folder, device, checkpoint.
    """
    device = parallel.device
    check_backend(run.speed.backend, device)
    check_speed(run.speed, config.model, config.dtype, device)
    check_output(Path(run.output))
    frames, notes = read_data(config)
    dataset = DetectionDataset(
        frames, config.num_classes, config.clip, config.augment, seed=config.seed, repeat=config.repeat
    )
    config, optim, steps_per_epoch = resolve_lengths(config, run, parallel, len(dataset))
    torch.manual_seed(config.seed)
    model = build_detector(
        config.model,
        config.num_classes,
        init_scale=config.init_scale,
        backend=run.speed.backend,
        attention=run.speed.attention,
    )
    start = find_start(
        model,
        config,
        run,
        parallel,
        notes,
        lambda: source.describe(start_detector(model, source, new_head=config.new_head)),
        dataset,
    )
    return Prepared(
        config, run, parallel, dataset, model.to(device), optim, steps_per_epoch, notes=notes, **start
    )


# --- The run ---


def detection_loss(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Binary cross entropy of each action, the mean over boxes and actions.

    The published loss is this times the boxes of the batch; the loop weighs micro-batches by their boxes
    instead.

    Args:
        logits, targets: [B, M, K].
        valid: [B, M], 0 for rows that pad.
    """
    each = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(-1)
    return (each * valid).sum() / valid.sum()


def build_trainer(prepared: Prepared) -> Trainer:
    """The loop for a prepared run, at its start step."""
    config, model, frames = prepared.config, prepared.model, prepared.dataset.entries
    wrapped = wrap_model(prepared, list(model.blocks))
    usual = prepared.run.batch_size * sum(len(frame.boxes) for frame in frames) / len(frames)

    def compute_loss(batch: DetectionBatch) -> Tensor:
        return detection_loss(wrapped(batch.clips, batch.boxes), batch.targets, batch.valid)

    return assemble_trainer(
        prepared,
        wrapped,
        optimizer=build_layer_adamw(model, prepared.optim, config.model.depth, config.layer_decay),
        compute_loss=compute_loss,
        weigh=lambda batch: batch.count / usual,
        flops_per_clip=6.0 * classifier_macs(config.model, config.num_classes),
    )


def _banner(prepared: Prepared) -> list[str]:
    """What was resolved, in words."""
    config, optim, run = prepared.config, prepared.optim, prepared.run
    frames, (height, width) = prepared.dataset.entries, image_hw(config.clip.image_size)
    about = prepared.describe()["derived"]
    boxes, videos = sum(len(frame.boxes) for frame in frames), len({frame.video for frame in frames})
    return [
        f"model: {about['parameters'] / 1e6:.1f} M parameters, clips {config.clip.num_frames} x {height} x "
        f"{width}, "
        f"{config.model.num_tokens} tokens, {config.num_classes} actions",
        f"data: {boxes} boxes on {len(frames)} key frames of {videos} videos, {prepared.steps_per_epoch} "
        "steps an epoch",
        f"batch: effective batch {config.effective_batch} key frames ({run.batch_size} x {run.accumulate} "
        "micro-batches x "
        f"{prepared.parallel.world_size} ranks); learning rate {config.optim.lr:g} x "
        f"{config.effective_batch} / 256 = "
        f"{optim.lr:.3g} at its peak, {optim.min_lr:.3g} at the end, layer decay {config.layer_decay:g}",
        *describe_run(prepared),
    ]


def _summary(prepared: Prepared, steps: int, seconds: float) -> list[str]:
    """How the run ended, and what to do next."""
    folder = Path(prepared.run.output)
    test = f"to test: python -m vmae detect --checkpoint {folder} --annotations CSV --videos DIR --output {folder / 'test'}"
    return [*describe_end(prepared, steps, seconds), test]
