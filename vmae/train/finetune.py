"""`python -m vmae finetune`: supervised training of an encoder on labelled videos (VideoMAE V2, sections 3.3
and 3.4).

The same command post-pre-trains (on merged labels), fine-tunes (on the target) and probes (a frozen encoder).
Everything that can be wrong with the input is found before the output folder gets its first file.

Legend: B clips, K classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae.checkpoint.classifier import Start, start_classifier
from vmae.checkpoint.folder import find_weights
from vmae.checkpoint.published import read_settings_and_weights
from vmae.checkpoint.source import source_config
from vmae.config import ModelConfig
from vmae.data.augment import image_hw
from vmae.data.augment_classify import draw_mixing, mix_clips, mix_targets
from vmae.data.classify_dataset import ClassifyDataset, LabelledBatch
from vmae.data.dataset import check_decodable
from vmae.data.labels import LabelledList, read_class_names, read_label_map, read_labelled_list
from vmae.errors import InputError
from vmae.model import Classifier, build_classifier
from vmae.model.cost import classifier_macs
from vmae.train.checks import check_backend, check_output, check_speed
from vmae.train.ema import WeightAverage
from vmae.train.finetune_settings import (
    FinetuneConfig,
    add_arguments,
    configs_from_args,
    list_of,
    model_from_args,
)
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

__all__ = ["add_arguments", "build_trainer", "finetune", "prepare_finetune", "run", "settings_of"]

# (batch, clips as the model sees them, logits, classification loss) -> the loss to train with
Extra = Callable[[LabelledBatch, Tensor, Tensor, Tensor], Tensor]


def run(args: argparse.Namespace) -> int:
    """The command; 0 also after SIGTERM or SIGUSR1 (the run goes on when it is started again), 130 after
    Ctrl-C."""
    config, run_config, source = settings_of(args)
    speed = run_config.speed
    with open_parallel(speed.parallel, run_config.device, shard_size=speed.shard_size) as parallel:
        prepared = prepare_finetune(config, run_config, parallel, source)
        prepared.settings = args.settings.resolved(args, prepared.config, prepared.run)
        if args.dry_run:
            if parallel.is_main:
                print(json.dumps(prepared.describe(), indent=2))
            return 0
        return 130 if finetune(prepared) == signal.SIGINT else 0


# --- Checks: nothing is written ---


@dataclasses.dataclass
class Source:
    """What a run starts from, read once.

    Attributes:
        path: of the checkpoint.
        state: its tensors.
        grid: of its positions.
        note: what was taken for granted of a file that does not say it, in a line.
    """

    path: Path
    state: dict[str, Tensor]
    grid: tuple[int, int, int]
    note: str = ""

    def describe(self, report: Start) -> str:
        """What became of the tensors, and `note`."""
        return "\n".join(filter(None, (report.describe(self.path), self.note)))


def settings_of(args: argparse.Namespace) -> tuple[FinetuneConfig, RunConfig, Source | None]:
    """The settings of a command line; what they leave open comes from the checkpoint and the labels.

    Raises:
        InputError: settings that do not fit together, a checkpoint, list or class list that cannot be read.
    """
    model, source, _ = read_start(args)
    return *configs_from_args(args, model, _count_classes(args)), source


def read_start(args: argparse.Namespace) -> tuple[ModelConfig, Source | None, dict]:
    """The model of a command line, the checkpoint that it starts from, and what that says of itself.

    Raises:
        InputError: settings that do not fit together, a checkpoint that cannot be read.
    """
    if args.init is None:
        return model_from_args(args, None), None, {}
    path = find_weights(args.init)
    settings, state = read_settings_and_weights(path)
    found = settings.get("model")
    model = model_from_args(args, found)
    init, note = source_config(settings, state, path, args.model or "vit_b", args.init_frames, args.init_size)
    grid = init.pos_grid or init.grid
    return (
        _with_positions(model.replace(learned_pos=init.learned_pos), grid),
        Source(path, state, grid, note),
        settings,
    )


def _with_positions(model: ModelConfig, grid: tuple[int, int, int]) -> ModelConfig:
    """`model` with fixed positions that are made for `grid` and interpolated to its own."""
    return model if model.learned_pos or grid == model.grid else model.replace(pos_grid=grid)


def _count_classes(args: argparse.Namespace) -> int:
    if args.classes is not None:
        names = read_class_names(args.classes)
        if args.num_classes not in (None, len(names)):
            raise InputError(
                f"--num-classes {args.num_classes}, but {args.classes} names {len(names)} classes"
            )
        return len(names)
    if args.num_classes is not None:
        return args.num_classes
    return read_labelled_list(list_of(args.data), args.data_root).num_classes


def read_data(config: FinetuneConfig) -> tuple[LabelledList, list[str]]:
    """The labelled list of a run, and lines on what is wrong with it.

    Raises:
        InputError: it cannot be read, a label is out of range, or no video can be decoded.
    """
    labelled = read_labelled_list(config.data, config.data_root, num_classes=config.num_classes)
    notes = [f"note: skipped, cannot be decoded: {error}" for _, error in check_decodable(labelled.entries)]
    seen = {label for own in labelled.labels for label in own}
    if len(seen) < config.num_classes:
        notes.append(
            f"note: {config.num_classes - len(seen)} of {config.num_classes} classes have no video in "
            f"{config.data}"
        )
    if labelled.multi and not config.multi_label:
        notes.append("note: some videos have several labels; each class has a loss of its own")
    return labelled, notes


def prepare_finetune(
    config: FinetuneConfig,
    run: RunConfig,
    parallel: Parallel,
    source: Source | None = None,
    cycle: int | None = None,
) -> Prepared:
    """Check everything that a run needs, and write nothing. All ranks call it.

    Args:
        source: what `config.init` names, as `settings_of` reads it.
        cycle: see `ClassifyDataset`.

    Raises:
        InputError: names what is wrong: list, labels, videos, output folder, device, checkpoint, head.
    """
    device = parallel.device
    check_backend(run.speed.backend, device)
    check_speed(run.speed, config.model, config.dtype, device)
    check_output(Path(run.output))
    labelled, notes = read_data(config)
    config = dataclasses.replace(config, multi_label=config.multi_label or labelled.multi)
    dataset = build_dataset(config, labelled, cycle)
    if run.batch_size * config.num_sample == 1 and (config.augment.mixup or config.augment.cutmix):
        notes.append("note: a micro-batch is a single clip, so mixup and cutmix have nothing to mix it with")
    config, optim, steps_per_epoch = resolve_lengths(config, run, parallel, len(dataset))
    torch.manual_seed(config.seed)
    model = build_model(config, run)

    def load_init() -> str:
        label_map = (
            read_label_map(config.label_map, num_classes=config.num_classes) if config.label_map else None
        )
        report = start_classifier(
            model,
            source.path,
            grid=source.grid,
            label_map=label_map,
            new_head=config.new_head,
            state=source.state,
        )
        return source.describe(report)

    start = find_start(model, config, run, parallel, notes, load_init, dataset)
    return Prepared(
        config, run, parallel, dataset, model.to(device), optim, steps_per_epoch, notes=notes, **start
    )


def build_dataset(
    config: FinetuneConfig, labelled: LabelledList, cycle: int | None = None
) -> ClassifyDataset:
    """The samples of a run."""
    return ClassifyDataset(
        labelled,
        config.clip,
        config.augment,
        num_sample=config.num_sample,
        cycle=cycle,
        seed=config.seed,
        repeat=config.repeat,
    )


def build_model(config: FinetuneConfig, run: RunConfig) -> Classifier:
    """The classifier of a run, fresh; a probe's encoder is frozen."""
    model = build_classifier(
        config.model,
        config.num_classes,
        pooling=config.pooling,
        head_drop_rate=config.head_drop_rate,
        init_scale=config.init_scale,
        backend=run.speed.backend,
        attention=run.speed.attention,
    )
    if config.probe != "none":
        model.freeze_encoder()
    return model


# --- The run ---


def finetune(prepared: Prepared, extra: Extra | None = None) -> int | None:
    """Train, and leave checkpoints, logs, `run.json` and, at the end, the weights in the output folder.

    Args:
        extra: makes the loss to train with from the classification loss, for distillation.

    Returns:
        None when the run is complete, else the signal that stopped it.

    Raises:
        InputError: see `Trainer.run`, or the output folder can't be written.
    """
    averaged = prepared.config.ema_decay is not None
    return carry_out(
        prepared,
        _banner(prepared),
        lambda: build_trainer(prepared, extra),
        lambda steps, seconds: _summary(prepared, steps, seconds),
        averaged,
    )


def classification_loss(logits: Tensor, targets: Tensor, multi_label: bool) -> Tensor:
    """Cross entropy with soft targets [B, K], the mean over clips; with `multi_label` a loss for each class,
    their mean."""
    logits = logits.float()
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, targets)
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def build_trainer(prepared: Prepared, extra: Extra | None = None) -> Trainer:
    """The loop for a prepared run, at its start step."""
    config, model = prepared.config, prepared.model
    wrapped = wrap_model(prepared, list(model.blocks))
    average = WeightAverage(model, config.ema_decay) if config.ema_decay is not None else None
    size = image_hw(config.clip.image_size)

    def compute_loss(batch: LabelledBatch) -> Tensor:
        mixing = draw_mixing(len(batch.clips), batch.ids[0][:2], size, config.augment, config.seed)
        clips = batch.clips if mixing is None else mix_clips(batch.clips, mixing)
        logits = wrapped(clips)
        loss = classification_loss(
            logits, mix_targets(batch.targets, mixing, config.augment.smoothing), config.multi_label
        )
        return loss if extra is None else extra(batch, clips, logits, loss)

    return assemble_trainer(
        prepared,
        wrapped,
        optimizer=build_layer_adamw(model, prepared.optim, config.model.depth, config.layer_decay),
        compute_loss=compute_loss,
        companions={} if average is None else {"ema": average},
        after_step=None if average is None else lambda step: average.update(),
        flops_per_clip=(2.0 if config.probe != "none" else 6.0)
        * classifier_macs(config.model, config.num_classes),
    )


def _banner(prepared: Prepared) -> list[str]:
    """What was resolved, in words."""
    config, optim, run = prepared.config, prepared.optim, prepared.run
    about, frames, (height, width) = (
        prepared.describe()["derived"],
        config.clip.num_frames,
        image_hw(config.clip.image_size),
    )
    trained = sum(parameter.numel() for parameter in prepared.model.parameters() if parameter.requires_grad)
    kind = {"none": "all trained"}.get(config.probe, f"{config.probe} probe: {trained / 1e6:.3g} M trained")
    return [
        f"model: {about['parameters'] / 1e6:.1f} M parameters ({kind}), clips {frames} x {height} x {width}, "
        f"{config.model.num_tokens} tokens, {config.num_classes} "
        f"classes{', several a video' if config.multi_label else ''}",
        f"data: {config.data}, {about['videos']} videos x {config.repeat} visits an epoch, "
        f"{prepared.steps_per_epoch} steps an "
        f"epoch, {config.clip.sampling} sampling",
        f"batch: effective batch {config.effective_batch} videos ({run.batch_size} x {run.accumulate} "
        "micro-batches x "
        f"{prepared.parallel.world_size} ranks), {about['clips_per_step']} clips a step; learning rate "
        f"{config.optim.lr:g} x "
        f"{config.effective_batch} / 256 = {optim.lr:.3g} at its peak, {optim.min_lr:.3g} at the end, layer "
        "decay "
        f"{config.layer_decay:g}",
        *describe_run(prepared),
    ]


def _summary(prepared: Prepared, steps: int, seconds: float) -> list[str]:
    """How the run ended, and what to do next."""
    folder = Path(prepared.run.output)
    test = f"to test: python -m vmae evaluate LIST --checkpoint {folder} --output {folder / 'test'}"
    return [*describe_end(prepared, steps, seconds, prepared.config.ema_decay is not None), test]
