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
import json
import signal
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vmae.checkpoint.identity import list_hash, model_identity
from vmae.checkpoint.load import LoadedClassifier, load_classifier
from vmae.data.classify_dataset import ClassifyDataset, LabelledBatch
from vmae.data.manifest import VideoEntry
from vmae.errors import InputError
from vmae.files.json_files import parse_json
from vmae.flags import chosen
from vmae.train.distil_settings import DistilConfig, add_arguments
from vmae.train.finetune import (
    Extra,
    Source,
    build_dataset,
    finetune,
    prepare_finetune,
    read_data,
    settings_of,
)
from vmae.train.finetune_settings import FinetuneConfig
from vmae.train.logit_store import LogitStore, fill_store
from vmae.train.parallel import Parallel, open_parallel
from vmae.train.pretrain_settings import RunConfig
from vmae.train.run import Prepared

__all__ = [
    "DistilConfig",
    "add_arguments",
    "distillation_loss",
    "prepare_distillation",
    "run",
    "store_logits",
]


def run(args: argparse.Namespace) -> int:
    """The command; 0 also after SIGTERM or SIGUSR1 (the run goes on when it is started again), 130 after
    Ctrl-C."""
    if args.store is not None and args.logits is None:
        raise InputError("--store needs the folder to store to: --logits DIR")
    base, run_config, source = settings_of(args)
    speed = run_config.speed
    teacher = load_classifier(
        args.teacher,
        preset=args.teacher_model,
        label_map=args.teacher_map,
        clip=base.clip.to_dict(),
        backend=speed.backend,
        attention=speed.attention,
    )
    config = _distil_config(args, base, teacher)
    with open_parallel(speed.parallel, run_config.device, shard_size=speed.shard_size) as parallel:
        for line in teacher.assumed if parallel.is_main else ():
            print(line)
        if args.store is not None:
            with parallel.hold(args.logits, "a teacher's logits being stored"):
                store_logits(config, teacher, parallel, batch_size=run_config.batch_size)
            return 0
        prepared, extra = prepare_distillation(config, run_config, parallel, teacher, source)
        prepared.settings = args.settings.resolved(args, prepared.config, prepared.run)
        if args.dry_run:
            if parallel.is_main:
                print(json.dumps(prepared.describe(), indent=2))
            return 0
        return 130 if finetune(prepared, extra) == signal.SIGINT else 0


def _distil_config(args: argparse.Namespace, base: FinetuneConfig, teacher: LoadedClassifier) -> DistilConfig:
    if teacher.model.num_classes != base.num_classes:
        raise InputError(
            f"the teacher {teacher.path} has {teacher.model.num_classes} classes, the labels have "
            f"{base.num_classes}; "
            "--teacher-map FILE.json says which of the teacher's they are"
        )
    if teacher.multi_label:
        raise InputError(f"the teacher {teacher.path} gives several labels a video; distillation needs one")
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    fields["teacher"] = str(teacher.path)
    return DistilConfig(
        **{**chosen(DistilConfig, args), **fields},
        teacher_identity=model_identity(teacher.model),
        stored_epochs=args.store if args.logits else None,
    )


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


def prepare_distillation(
    config: DistilConfig, run: RunConfig, parallel: Parallel, teacher: LoadedClassifier, source: Source | None
) -> tuple[Prepared, Extra]:
    """A student's run, checked, and what makes its loss; nothing is written.

    Raises:
        InputError: see `prepare_finetune`; stored logits that are of other views, or not complete.
    """
    store = None
    if config.logits is not None:
        store = _open_store(config, read_data(config)[0].entries)
        config = dataclasses.replace(config, stored_epochs=store.about["epochs"])
        missing = store.missing()
        if missing:
            raise InputError(
                f"{config.logits} lacks the logits of {len(missing)} samples; finish it with --store first"
            )
    prepared = prepare_finetune(config, run, parallel, source, cycle=config.stored_epochs)
    samples, batch = len(prepared.dataset), prepared.config.effective_batch
    if store is not None and samples < batch:
        raise InputError(
            f"an epoch of {samples} samples is less than a batch of {batch}; stored logits need whole "
            "batches: lower "
            "--batch-size, or raise --repeat"
        )
    model = None if store is not None else teacher.model.to(parallel.device).requires_grad_(False)

    def extra(batch: LabelledBatch, clips: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        if store is not None:
            taught = store.read([(epoch, index) for epoch, index, _ in batch.ids]).to(logits.device)
        else:
            with torch.no_grad():
                taught = model(clips)
        return (
            config.kl_weight * distillation_loss(logits, taught, config.temperature)
            + (1 - config.kl_weight) * loss
        )

    return prepared, extra


# --- Stored logits ---


def _about_views(config: DistilConfig, entries: Sequence[VideoEntry], epochs: int) -> dict[str, Any]:
    """What decides the views and what the teacher makes of them; labels do not."""
    views = {
        "clip": config.clip.to_dict(),
        "augment": {**config.augment.to_dict(), "smoothing": 0.0},
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


def _open_store(config: DistilConfig, entries: Sequence[VideoEntry]) -> LogitStore:
    """The store of a run; how many epochs it has, it says itself, unless `config` does."""
    epochs = config.stored_epochs
    if epochs is None:
        try:
            with open(f"{config.logits}/logits.json", encoding="utf-8") as file:
                epochs = int(parse_json(file.read())["epochs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{config.logits} holds no stored logits ({error}); --store EPOCHS makes them"
            ) from error
    return LogitStore(config.logits, _about_views(config, entries, epochs))


def store_logits(
    config: DistilConfig, teacher: LoadedClassifier, parallel: Parallel, *, batch_size: int
) -> LogitStore:
    """Run the teacher over all views of `config.stored_epochs` epochs; what a stopped pass has stored is not
    done again.

    Raises:
        InputError: the folder holds logits of other views; the list or its videos cannot be read.
    """
    labelled, notes = read_data(config)
    if parallel.is_main:
        print(f"list: {config.data}, {len(labelled.entries)} videos")
        for note in notes:
            print(note)
        _open_store(config, labelled.entries).create()
    parallel.barrier()
    store = _open_store(config, labelled.entries)
    dataset: ClassifyDataset = build_dataset(config, labelled)
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
        samples, _, classes = store.shape
        print(
            f"{config.logits}: bf16 logits of {store.about['epochs']} epochs x {samples} samples, {classes} "
            "classes"
        )
    return store
