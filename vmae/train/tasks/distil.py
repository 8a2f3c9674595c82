"""`python -m vmae distil`: a small student learns from a large fine-tuned teacher (VideoMAE V2, section 4.4).

The loss is `kl_weight * T^2 * KL(teacher / T || student / T) + (1 - kl_weight) * cross entropy`, with the
teacher seeing the clip that the student sees (Hinton et al., 2015; Beyer et al., 2022). The paper says that
ViT-g taught B and S, which started from post-pre-training; temperature and weights are not published, so the
defaults here are our choice.

The teacher runs beside the student, or once before, its logits stored in bf16 with the views' seeds
(`--store`).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vmae.checkpoint.classifier import LoadedClassifier, load_classifier
from vmae.checkpoint.hub_names import is_hub_name
from vmae.checkpoint.identity import list_hash, model_identity
from vmae.data.augment_classify import AugmentConfig
from vmae.data.classify_dataset import LabelledBatch
from vmae.data.labels import LabelledList
from vmae.data.manifest import VideoEntry
from vmae.data.view_store import LogitStore, fill_store
from vmae.errors import InputError
from vmae.flags import chosen
from vmae.model import Classifier
from vmae.train.distil_settings import DistilConfig, add_arguments
from vmae.train.parallel import Parallel, open_parallel
from vmae.train.run import AtEnd, run_task
from vmae.train.tasks.finetune import FinetuneTask, settings_of, test_from_args
from vmae.train.tasks.supervised import Source, settled

__all__ = ["DistilConfig", "DistilTask", "add_arguments", "run"]


def run(args: argparse.Namespace, at_end: AtEnd | None = None) -> int:
    """The command; with `--store`, the teacher's pass alone. `at_end`: what follows a complete run."""
    args.settings.complete(args)
    if args.store is not None and args.logits is None:
        raise InputError("--store needs the folder to store to: --logits DIR")
    base, run_config, source = settings_of(args)
    speed = run_config.speed
    teacher = load_classifier(
        settled(args.teacher, args),
        preset=args.teacher_model,
        label_map=args.teacher_map,
        clip=base.clip.to_dict(),
        backend=speed.backend,
        attention=speed.attention,
    )
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    fields["teacher"] = args.teacher if is_hub_name(args.teacher) else str(teacher.path)
    config = DistilConfig(
        **{**chosen(DistilConfig, args), **fields}, stored_epochs=args.store if args.logits else None
    )
    task = DistilTask(config, source, teacher)
    if args.store is None:
        task.test = test_from_args(args, config)
        return run_task(task, run_config, args, at_end)
    with open_parallel(speed.parallel, run_config.device, shard_size=speed.shard_size) as parallel:
        for line in teacher.assumed if parallel.is_main else ():
            print(line)
        task.adopt(teacher)
        with parallel.hold(args.logits, "a teacher's logits being stored"):
            store_logits(task.config, teacher, parallel, batch_size=run_config.batch_size)
    return 0


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))`, the mean over clips, float32.

    Args:
        student, teacher: logits [B, K].
    """
    student, teacher = (logits.float() / temperature for logits in (student, teacher))
    divergence = F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean"
    )
    return temperature**2 * divergence


class DistilTask(FinetuneTask):
    """Fine-tuning with a teacher beside the labels.

    Args:
        source: what `config.init` names, where the caller has read it.
        teacher: what `config.teacher` names, the same.
    """

    config: DistilConfig

    def __init__(
        self, config: DistilConfig, source: Source | None = None, teacher: LoadedClassifier | None = None
    ) -> None:
        super().__init__(config, source)
        self.teacher = teacher
        self.store: LogitStore | None = None

    def check(self) -> list[str]:
        if self.teacher is None:
            self.teacher = load_classifier(
                self.config.teacher,
                label_map=self.config.teacher_map,
                clip=self.config.clip.to_dict(),
                backend=self.run.speed.backend,
                attention=self.run.speed.attention,
            )
        self.adopt(self.teacher)
        return [*self.teacher.assumed, *super().check()]

    def adopt(self, teacher: LoadedClassifier) -> None:
        """Note in `config` which teacher it is.

        Raises:
            InputError: it has other classes, or several labels a video.
        """
        if teacher.model.num_classes != self.config.num_classes:
            raise InputError(
                f"the teacher {teacher.path} has {teacher.model.num_classes} classes, the labels have "
                f"{self.config.num_classes}; --teacher-map FILE.json says which of the teacher's they are"
            )
        if (channels := teacher.model.config.in_channels) != self.config.model.in_channels:
            raise InputError(
                f"the teacher {teacher.path} takes clips of {channels} channels, the student of "
                f"{self.config.model.in_channels}"
            )
        if teacher.multi_label:
            raise InputError(
                f"the teacher {teacher.path} gives several labels a video; distillation needs one"
            )
        identity = model_identity(teacher.model)
        self.config = dataclasses.replace(self.config, teacher_identity=identity)

    def read_labels(self) -> tuple[LabelledList, list[str]]:
        labelled, notes = super().read_labels()
        if self.config.logits is not None:
            self._open_logits(labelled)
        return labelled, notes

    def _open_logits(self, labelled: LabelledList) -> None:
        """Read from the store what to train with.

        Raises:
            InputError: it is of other views, or not complete; an epoch is less than a batch.
        """
        store = open_store(self.config, labelled.entries)
        self.store, self.cycle, self.read_logits = store, store.about["epochs"], store.read
        self.config = dataclasses.replace(self.config, stored_epochs=self.cycle)
        store.check_complete(self.run.videos_per_step(self.parallel.world_size))

    def build_model(self) -> Classifier:
        model = super().build_model()
        assert self.teacher is not None  # `check` came before
        if self.store is None:
            self.teacher.model.to(self.parallel.device).requires_grad_(False)
        return model

    def teach(self, batch: LabelledBatch, clips: Tensor) -> Tensor:
        """The teacher's logits [B, K] of the clips that the student saw."""
        if batch.taught is not None:
            return batch.taught
        assert self.teacher is not None
        with torch.no_grad():
            return self.teacher.model(clips)

    def loss_of(self, batch: LabelledBatch, clips: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        config, labels = self.config, super().loss_of(batch, clips, logits, targets)
        taught = distillation_loss(logits, self.teach(batch, clips), config.temperature)
        return config.kl_weight * taught + (1 - config.kl_weight) * labels


# --- Stored logits ---


# Settings that came after the first stores were written: a store tells of those that differ from what held
# before.
_LATER = (
    *("increasing", "interpolation", "erase_mode", "erase_count"),
    *("cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode"),
)


def _about_views(config: DistilConfig, entries: Sequence[VideoEntry], epochs: int) -> dict[str, Any]:
    """What decides the views and what the teacher makes of them; labels do not."""
    usual = AugmentConfig().to_dict()
    augment = {**config.augment.to_dict(), "smoothing": 0.0}
    views = {
        "clip": config.clip.to_dict(),
        "augment": {
            name: value for name, value in augment.items() if name not in _LATER or value != usual[name]
        },
        "seed": config.seed,
    }
    samples = len(entries) * config.repeat
    size = {
        "epochs": epochs,
        "samples": samples,
        "num_sample": config.num_sample,
        "classes": config.num_classes,
    }
    return {
        **views,
        **size,
        "dtype": config.dtype,
        "list": list_hash(entries),
        "teacher": config.teacher_identity,
    }


def open_store(config: DistilConfig, entries: Sequence[VideoEntry]) -> LogitStore:
    """The store of a run; how many epochs it has, it says itself, unless `config` does."""
    assert config.logits is not None
    epochs = config.stored_epochs or LogitStore.epochs_in(config.logits)
    return LogitStore(config.logits, _about_views(config, entries, epochs))


def store_logits(
    config: DistilConfig, teacher: LoadedClassifier, parallel: Parallel, *, batch_size: int
) -> LogitStore:
    """Run the teacher over all views of `config.stored_epochs` epochs; what a stopped pass has stored is not
    done again.

    Raises:
        InputError: the folder holds logits of other views; the list or its videos cannot be read.
    """
    views = FinetuneTask(config)
    labelled, notes = views.read_labels()
    if parallel.is_main:
        print(f"list: {config.data}, {len(labelled.entries)} videos")
        for note in notes:
            print(note)
        open_store(config, labelled.entries).create()
    parallel.barrier()
    store = open_store(config, labelled.entries)
    dataset = views.build_dataset(labelled)
    model = teacher.model.to(parallel.device)

    def compute(keys: list[tuple[int, int]]) -> Tensor:
        clips = torch.cat([dataset[key].clips for key in keys]).to(parallel.device)
        with (
            torch.no_grad(),
            torch.autocast(parallel.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"),
        ):
            return model(clips)

    def progress(parts: list) -> Any:
        return tqdm(parts, unit="batch", disable=None if parallel.is_main else True)

    fill_store(
        store,
        compute,
        batch_size=batch_size,
        rank=parallel.rank,
        world_size=parallel.world_size,
        progress=progress,
    )
    parallel.barrier()
    if parallel.is_main:
        print(
            f"{config.logits}: bf16 logits of {store.about['epochs']} epochs x {store.about['samples']} "
            f"samples, {store.about['classes']} classes"
        )
    return store
