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
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vmae.checkpoint.start import Start, start_classifier
from vmae.data.augment import image_hw
from vmae.data.augment_classify import draw_mixing, mix_clips, mix_targets
from vmae.data.classify_dataset import ClassifyDataset, LabelledBatch, ViewConfig
from vmae.data.data_sets import DATA_SETS, USUAL
from vmae.data.dataset import check_decodable
from vmae.data.gallery import count_shared
from vmae.data.label_maps import (
    check_mapped_names,
    describe_lack,
    find_kinetics_map,
    is_kinetics,
    map_by_names,
    places_of_maps,
)
from vmae.data.labels import (
    HEAD_NAMES,
    LabelledList,
    read_class_names,
    read_label_map,
    read_labelled_list,
)
from vmae.data.video_dataset import SampleKey
from vmae.errors import InputError
from vmae.model import Classifier, build_classifier
from vmae.train.dry_run import find_absent, is_main, show_settings, tell_absent
from vmae.train.ema import WeightAverage
from vmae.train.finetune_settings import (
    TEST_LISTS,
    TRAINING_LISTS,
    FinetuneConfig,
    add_arguments,
    configs_from_args,
    list_beside,
    list_of,
)
from vmae.train.pretrain_settings import RunConfig
from vmae.train.published_flags import in_published_words
from vmae.train.run import AtEnd, run_task
from vmae.train.state import Companion
from vmae.train.tasks.supervised import Source, SupervisedTask, model_for, source_from_args
from vmae.train.validation import Validation, ValidationSet

__all__ = ["FinetuneConfig", "FinetuneTask", "add_arguments", "run"]


def run(args: argparse.Namespace, at_end: AtEnd | None = None) -> int:
    """The command. `at_end`: what follows a complete run."""
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
    task = FinetuneTask(config, source)
    task.test = test_from_args(args, config)
    return run_task(task, run_config, args, at_end)


def test_from_args(args: argparse.Namespace, config: FinetuneConfig) -> PlannedTest:
    """The test at the end that a command line asks for."""
    data = list_beside(args.data, args.test, TEST_LISTS)
    if data is not None:
        args.given["test"] = data
    return PlannedTest(data, config.clip.published_views(config.segments, config.crops), args.test_weights)


def settings_of(args: argparse.Namespace) -> tuple[FinetuneConfig, RunConfig, Source | None]:
    """The settings of a command line, and the checkpoint to start from.

    Raises:
        InputError: settings that do not fit together, a checkpoint, list or class list that cannot be read.
    """
    source = source_from_args(args)
    config, run_config = configs_from_args(args, model_for(args, source), _count_classes(args))
    if source is not None and config.pooling == "mean" and "pooling" not in args.given:
        config = dataclasses.replace(config, pooling=source.tuned_pooling or "mean")
    return _with_published_head(args, config, source), run_config, source


def show_without_files(args: argparse.Namespace) -> None:
    """Print the settings of a dry run that can be known without its files; see `show_settings`."""
    count = args.num_classes or (DATA_SETS[USUAL].num_classes if in_published_words(args) else None)
    data = os.path.join(args.data, TRAINING_LISTS[0]) if os.path.isdir(args.data) else args.data
    bare = argparse.Namespace(**{**vars(args), "classes": None, "data": data})
    config, run_config = configs_from_args(bare, model_for(args, None), count or 1)
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


@dataclass(frozen=True)
class PlannedTest:
    """The test at the end of a run.

    Attributes:
        data: its list; None makes no test.
        views: of each video.
        weights: "best" or "last".
    """

    data: str | None
    views: ViewConfig
    weights: str = "best"


class FinetuneTask(SupervisedTask[FinetuneConfig, LabelledBatch]):
    """Classification; a probe trains only what reads the frozen encoder."""

    model: Classifier
    cycle: int | None = None  # epochs after which the same samples come again
    read_logits: Callable[[Sequence[SampleKey]], Tensor] | None = None  # reads a teacher's stored logits
    test: PlannedTest | None = None  # that the caller makes at the end: its list is checked before the run
    validated: LabelledList | None = None  # the list to validate on

    @property
    def validates(self) -> bool:  # type: ignore[override]  # an attribute of tasks that know it
        return self.config.val is not None

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
        failed = check_decodable(labelled.entries, channels=config.model.in_channels)
        notes = [f"note: skipped, cannot be decoded: {error}" for _, error in failed]
        lacking = config.num_classes - labelled.count_classes()
        if lacking:
            notes.append(f"note: {lacking} of {config.num_classes} classes have no video in {config.data}")
        if labelled.multi and not config.multi_label:
            notes.append("note: some videos have several labels; each class has a loss of its own")
        return labelled, notes

    def check(self) -> list[str]:
        lines, augment = super().check(), self.config.augment
        if augment.operations or augment.erase:
            self.config.model.check_rgb("published augmentation (--augment none, or --aa none --erase 0)")
        return lines

    def read_data(self) -> tuple[ClassifyDataset, list[str]]:
        labelled, notes = self.read_labels()
        self.config = dataclasses.replace(self.config, multi_label=self.config.multi_label or labelled.multi)
        notes += self.read_lists_of_tests(labelled)
        clips = self.run.batch_size * self.config.num_sample
        if self.config.augment.mixes and clips == 1:
            notes.append(
                "note: a micro-batch is a single clip, so mixup and cutmix have nothing to mix it with"
            )
        elif self.config.augment.mixes and clips % 2:
            notes.append(
                f"note: of the {clips} clips of a micro-batch, the middle one is mixed with the first; the "
                "published code takes even numbers only"
            )
        return self.build_dataset(labelled), notes

    def read_lists_of_tests(self, trained: LabelledList) -> list[str]:
        """Read the list to validate on, and see that the one to test on can be read; lines on what is wrong
        with them."""
        config = self.config
        notes: list[str] = []
        if config.val is not None:
            self.validated, notes = self.read_list("validate", config.val, "--no-val")
            shared = count_shared(self.validated.entries, trained.entries)
            if shared:
                notes.append(
                    f"note: {shared} of the {len(self.validated.entries)} videos of {config.val} are trained "
                    "on too"
                )
        if self.test is not None and self.test.data not in (None, config.val):
            self.read_list("test", self.test.data, "--no-test")
        return notes

    def read_list(self, what: str, path: str | None, without: str) -> tuple[LabelledList, list[str]]:
        """A list to validate or test on, and lines on what is wrong with it.

        Args:
            what: "validate" or "test", for messages.
            without: the flag that leaves it out.
        """
        config = self.config
        assert path is not None
        try:
            labelled = read_labelled_list(
                path,
                config.data_root,
                num_classes=config.num_classes,
                **config.frames,
            )
            failed = check_decodable(labelled.entries, channels=config.model.in_channels)
        except InputError as error:
            raise InputError(f"list to {what} on: {error} ({without} goes on without one)") from None
        if labelled.multi and not config.multi_label:
            raise InputError(
                f"list to {what} on: {path} has videos of several labels, {config.data} has not; "
                "--multi-label gives each class a loss of its own"
            )
        return labelled, [f"note: {path}: cannot be decoded: {error}" for _, error in failed]

    def build_validation(self, model: nn.Module, steps_per_epoch: int) -> Validation | None:
        config, run = self.config, self.run
        if self.validated is None:
            return None
        videos = ValidationSet(
            self.validated,
            config.clip,
            parallel=self.parallel,
            dtype=config.dtype,
            multi_label=config.multi_label,
            batch_size=run.batch_size * config.num_sample,
            num_workers=run.speed.num_workers,
            channels=config.model.in_channels,
        )
        assert config.steps is not None  # `resolve_lengths` came before
        return Validation(
            videos,
            model,
            every=config.val_every * steps_per_epoch,
            total_steps=config.steps,
            steps_per_epoch=steps_per_epoch,
            average=self.average if self.averaged and config.val_average else None,
            patience=config.patience,
        )

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
            channels=self.config.model.in_channels,
        )

    def build_model(self) -> Classifier:
        model = build_classifier(
            self.config.model,
            self.config.num_classes,
            pooling=self.config.pooling,
            head_drop_rate=self.config.head_drop_rate,
            drop_rate=self.config.drop_rate,
            attn_drop_rate=self.config.attn_drop_rate,
            init_scale=self.config.init_scale,
            backend=self.run.speed.backend,
            attention=self.run.speed.attention,
        )
        if self.config.probe != "none":
            model.freeze_encoder()
        return model

    def load(self, source: Source) -> Start:
        label_map, notes = (None, []) if self.config.new_head else self.find_label_map(source)
        start = start_classifier(
            self.model,
            source.path,
            grid=source.grid,
            label_map=label_map,
            new_head=self.config.new_head,
            state=source.state,
        )
        start.notes += notes
        return start

    def find_label_map(self, source: Source) -> tuple[list[int] | None, list[str]]:
        """Which of the head's classes each class is, and in words where that comes from: the file that the
        settings name, else the class names of both sides, else the published map of Kinetics-710. None where
        the head is taken as it is.

        Raises:
            InputError: a map that is none, or that does not fit the names; a head of Kinetics-710 without a
                map.
        """
        config = self.config
        known, wanted = source.settings.get("class_names") or (), config.class_names or ()
        both = bool(known and wanted)
        if config.label_map:
            found = read_label_map(config.label_map, num_classes=config.num_classes)
            if both and max(found) < len(known):
                check_mapped_names(config.label_map, found, known, wanted)
            return found, []
        if HEAD_NAMES[0] not in source.state:
            return None, []
        head = source.state[HEAD_NAMES[0]].shape[0]
        if both and len(known) == head and (by_name := map_by_names(known, wanted)) is not None:
            same = by_name == list(range(head))
            return (None, []) if same else (by_name, ["classes found by their names"])
        if not is_kinetics(head, config.num_classes):
            others = both and head == config.num_classes
            return None, ["its head is of classes with other names: --new-head starts a fresh one"] * others
        places = places_of_maps(config.init or source.path, config.data)
        map_found = find_kinetics_map(config.num_classes, places)
        if map_found is None:
            raise InputError(describe_lack(source.path, config.num_classes, places))
        path, numbers = map_found
        if both and len(known) == head:
            check_mapped_names(path, numbers, known, wanted)
        return numbers, [f"label map {path}"]

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
        mixing = draw_mixing(batch.ids[0][:2], size, augment, self.config.seed, len(batch.clips))
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
        lines = [f"{self.config.data}, {visits}, {self.config.clip.sampling} sampling"]
        if self.validated is not None:
            every = "epoch" if self.config.val_every == 1 else f"{self.config.val_every} epochs"
            lines.append(
                f"validation: {self.config.val}, {len(self.validated.entries)} videos, one clip each, every "
                f"{every}"
            )
        if self.test is not None and self.test.data is not None:
            views = self.test.views
            lines.append(f"test at the end: {self.test.data}, {views.segments} x {views.crops} clips a video")
        return lines

    def describe_more(self) -> dict[str, Any]:
        if self.test is None:
            return {}
        views, weights = self.test.views.to_dict(), self.test.weights
        return {"test": {"list": self.test.data, **views, "weights": weights}}

    def closing(self) -> list[str]:
        folder = self.run.output
        if self.test is not None and self.test.data is not None:
            return []
        return [f"to test: python -m vmae evaluate LIST --checkpoint {folder} --output {folder}/test"]
