"""`python -m vmae finetune`: supervised training of an encoder on labelled videos (VideoMAE V2, sections 3.3
and 3.4).

The same command post-pre-trains (on merged labels), fine-tunes (on the target) and probes (a frozen encoder).

Legend: B clips, K classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vmae.checkpoint.start import Start, start_classifier
from vmae.data.augment import image_hw
from vmae.data.augment_classify import draw_mixing, mix_clips, mix_targets
from vmae.data.classify_dataset import ClassifyDataset, LabelledBatch
from vmae.data.data_sets import DATA_SETS, USUAL
from vmae.data.dataset import check_decodable
from vmae.data.labels import HEAD_NAMES, LabelledList, read_class_names, read_label_map, read_labelled_list
from vmae.data.video_dataset import SampleKey
from vmae.errors import InputError
from vmae.model import Classifier, build_classifier
from vmae.train.dry_run import find_absent, is_main, show_settings, tell_absent
from vmae.train.ema import WeightAverage
from vmae.train.finetune_settings import (
    TRAINING_LISTS,
    FinetuneConfig,
    add_arguments,
    configs_from_args,
    list_of,
    model_from_args,
)
from vmae.train.pretrain_settings import RunConfig
from vmae.train.published_flags import in_published_words
from vmae.train.run import run_task
from vmae.train.state import Companion
from vmae.train.tasks.supervised import Source, SupervisedTask, source_from_args

__all__ = ["FinetuneConfig", "FinetuneTask", "add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """The command."""
    absent = find_absent(args)
    if absent:
        show_without_files(args)
        return tell_absent(absent)
    try:
        config, run_config, source = settings_of(args)
    except InputError:
        if args.dry_run:
            show_without_files(args)
        raise
    return run_task(FinetuneTask(config, source), run_config, args)


def settings_of(args: argparse.Namespace) -> tuple[FinetuneConfig, RunConfig, Source | None]:
    """The settings of a command line, and the checkpoint to start from.

    Raises:
        InputError: settings that do not fit together, a checkpoint, list or class list that cannot be read.
    """
    source = source_from_args(args)
    model = model_from_args(args, None if source is None else source.settings.get("model"))
    config, run_config = configs_from_args(args, model, _count_classes(args))
    return _with_published_head(args, config, source), run_config, source


def show_without_files(args: argparse.Namespace) -> None:
    """Print the settings of a dry run that can be known without its files; see `show_settings`."""
    count = args.num_classes or (DATA_SETS[USUAL].num_classes if in_published_words(args) else None)
    data = os.path.join(args.data, TRAINING_LISTS[0]) if os.path.isdir(args.data) else args.data
    bare = argparse.Namespace(**{**vars(args), "classes": None, "data": data})
    config, run_config = configs_from_args(bare, model_from_args(args), count or 1)
    show_settings(config, run_config, **({} if count else {"num_classes": None}))


def _with_published_head(
    args: argparse.Namespace, config: FinetuneConfig, source: Source | None
) -> FinetuneConfig:
    """`config` for a data set that is named: a head of other classes than its own starts anew, as published.
    K710's heads become those of other Kinetics sets, which `start_classifier` does."""
    rows = (
        {}
        if source is None
        else {name: source.state[name].shape[0] for name in HEAD_NAMES if name in source.state}
    )
    count = max(rows.values(), default=config.num_classes)
    kept = count == config.num_classes or config.label_map or config.new_head
    if args.data_set is None or kept or (count == 710 and args.data_set.startswith("Kinetics")):
        return config
    if is_main():
        print(
            f"note: {args.init} has a head of {count} classes, {args.data_set} has {config.num_classes}: the "
            "head starts anew, as in the published program",
            file=sys.stderr,
        )
    return dataclasses.replace(config, new_head=True)


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
    found = read_labelled_list(
        list_of(args.data), args.data_root, frame_pattern=args.frame_pattern, first_frame=args.first_frame
    ).num_classes
    if in_published_words(args) and is_main():
        usual = DATA_SETS[USUAL].num_classes
        print(
            f"note: {found} classes, the list's largest label + 1; the published program takes {USUAL} and "
            f"{usual} where no --data_set is named",
            file=sys.stderr,
        )
    return found


def classification_loss(logits: Tensor, targets: Tensor, multi_label: bool) -> Tensor:
    """Cross entropy with soft targets [B, K], the mean over clips; with `multi_label` a loss for each class,
    their mean."""
    logits = logits.float()
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, targets)
    return -(targets * logits.log_softmax(1)).sum(1).mean()


class FinetuneTask(SupervisedTask[FinetuneConfig, LabelledBatch]):
    """Classification; a probe trains only what reads the frozen encoder."""

    model: Classifier
    cycle: int | None = None  # epochs after which the same samples come again
    read_logits: Callable[[Sequence[SampleKey]], Tensor] | None = None  # reads a teacher's stored logits

    @property
    def averaged(self) -> bool:
        return self.config.ema_decay is not None

    @property
    def list_file(self) -> str:
        return self.config.data

    @property
    def list_root(self) -> str:
        return self.config.data_root or super().list_root

    def read_labels(self) -> tuple[LabelledList, list[str]]:
        """The labelled list, and lines on what is wrong with it."""
        config = self.config
        labelled = read_labelled_list(
            config.data,
            config.data_root,
            num_classes=config.num_classes,
            **config.frames,
        )
        failed = check_decodable(labelled.entries)
        notes = [f"note: skipped, cannot be decoded: {error}" for _, error in failed]
        lacking = config.num_classes - len({label for own in labelled.labels for label in own})
        if lacking:
            notes.append(f"note: {lacking} of {config.num_classes} classes have no video in {config.data}")
        if labelled.multi and not config.multi_label:
            notes.append("note: some videos have several labels; each class has a loss of its own")
        return labelled, notes

    def read_data(self) -> tuple[ClassifyDataset, list[str]]:
        labelled, notes = self.read_labels()
        self.config = dataclasses.replace(self.config, multi_label=self.config.multi_label or labelled.multi)
        mixes = self.config.augment.mixup or self.config.augment.cutmix
        if mixes and self.run.batch_size * self.config.num_sample == 1:
            notes.append(
                "note: a micro-batch is a single clip, so mixup and cutmix have nothing to mix it with"
            )
        return self.build_dataset(labelled), notes

    def build_dataset(self, labelled: LabelledList) -> ClassifyDataset:
        """The samples of a run."""
        return ClassifyDataset(
            labelled,
            self.config.clip,
            self.config.augment,
            num_sample=self.config.num_sample,
            cycle=self.cycle,
            read_logits=self.read_logits,
            seed=self.config.seed,
            repeat=self.config.repeat,
        )

    def build_model(self) -> Classifier:
        model = build_classifier(
            self.config.model,
            self.config.num_classes,
            pooling=self.config.pooling,
            head_drop_rate=self.config.head_drop_rate,
            init_scale=self.config.init_scale,
            backend=self.run.speed.backend,
            attention=self.run.speed.attention,
        )
        if self.config.probe != "none":
            model.freeze_encoder()
        return model

    def load(self, source: Source) -> Start:
        config, label_map = self.config, None
        if config.label_map:
            label_map = read_label_map(config.label_map, num_classes=config.num_classes)
        return start_classifier(
            self.model,
            source.path,
            grid=source.grid,
            label_map=label_map,
            new_head=config.new_head,
            state=source.state,
        )

    def companions(self) -> dict[str, Companion]:
        if self.config.ema_decay is None:
            return {}
        self.average = WeightAverage(self.model, self.config.ema_decay)
        return {"ema": self.average}

    def after_step(self, step: int) -> None:
        if self.averaged:
            self.average.update()

    def flops_per_clip(self) -> float:
        whole = super().flops_per_clip()
        return whole if self.config.probe == "none" else whole / 3  # forward only

    def compute_loss(self, model: nn.Module, batch: LabelledBatch) -> Tensor:
        augment, size = self.config.augment, image_hw(self.config.clip.image_size)
        mixing = draw_mixing(batch.ids[0][:2], size, augment, self.config.seed)
        clips = batch.clips if mixing is None else mix_clips(batch.clips, mixing)
        logits = model(clips)
        targets = mix_targets(batch.targets, mixing, augment.smoothing)
        return self.loss_of(batch, clips, logits, targets)

    def loss_of(self, batch: LabelledBatch, clips: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss to train with.

        Args:
            clips: as the model saw them.
            logits, targets: [B, K].
        """
        return classification_loss(logits, targets, self.config.multi_label)

    # --- Words ---

    def describe_model(self) -> str:
        config, kind = self.config, "all trained"
        if config.probe != "none":
            trained = sum(
                parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad
            )
            kind = f"{config.probe} probe: {trained / 1e6:.3g} M trained"
        several = ", several a video" if config.multi_label else ""
        return f" ({kind}){super().describe_model()}, {config.num_classes} classes{several}"

    def describe_data(self) -> list[str]:
        visits = f"{len(self.dataset.entries)} videos x {self.config.repeat} visits an epoch"
        return [f"{self.config.data}, {visits}, {self.config.clip.sampling} sampling"]

    def closing(self) -> list[str]:
        folder = self.run.output
        return [f"to test: python -m vmae evaluate LIST --checkpoint {folder} --output {folder}/test"]
