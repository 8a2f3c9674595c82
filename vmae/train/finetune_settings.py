"""Settings of supervised training (`finetune`, `distil`), and what they share with `finetune-detection`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmae.config import DATA, POOLINGS, START, VALIDATION, ModelConfig, OptimConfig, StartSettings
from vmae.data.augment import image_hw
from vmae.data.augment_classify import AugmentConfig, RandAugmentText
from vmae.data.classify_dataset import ClipConfig, ViewConfig
from vmae.data.data_sets import DATA_SETS
from vmae.data.labels import read_class_names
from vmae.data.manifest import DEFAULT_PATTERN
from vmae.data.shards.source import refuse_folder_of_shards
from vmae.errors import InputError
from vmae.flags import Settings, chosen
from vmae.settings import (
    CLASSES,
    COUNT,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    OneOf,
    Real,
    Whole,
    setting,
    setting_like,
)
from vmae.train.pretrain_settings import (
    EPOCHS,
    OPTIMIZER,
    PretrainConfig,
    RunConfig,
    TrainingConfig,
    model_from_args,
    run_from_args,
    training_from_args,
)
from vmae.train.published_flags import FINETUNE_FLAGS, adapt_finetune

__all__ = ["FinetuneConfig", "add_arguments", "configs_from_args", "list_of", "model_from_args"]

PROBES = ("none", "linear", "attentive")
TEST_WEIGHTS = ("best", "last")
# Of a folder that is given for a list. The published code trains on train.csv, and validates and tests on
# val.csv; that of VideoMAE V1 tests on test.csv.
TRAINING_LISTS, VALIDATION_LISTS, TEST_LISTS = ("train.csv",), ("val.csv",), ("test.csv", "val.csv")
NO_LIST = "none"  # written for a list: leave it out, also where the data's folder has one


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(TrainingConfig):
    """What classifiers and detectors share of what decides the weights; `optim.lr` is for 256 clips or videos
    a step."""

    model: ModelConfig
    optim: OptimConfig
    epochs: int = setting_like(TrainingConfig, "epochs", 30)
    layer_decay: float = setting(
        0.75,
        "factor on the learning rate, from a layer to the one before",
        SHARE_ABOVE_0,
        aliases=("--layer_decay",),
        group=OPTIMIZER,
    )
    init_scale: float = setting(
        0.001, "factor on a new head's weights", Real(least=0, most=1000), aliases=("--init_scale",)
    )
    drop_rate: float = setting(
        0.0,
        "dropout of embedded tokens, of attention's and of the MLPs' results",
        SHARE_BELOW_1,
        name="drop",
    )
    attn_drop_rate: float = setting(
        0.0, "dropout of attention's weights", SHARE_BELOW_1, name="attn_drop", aliases=("--attn_drop_rate",)
    )
    init: str | None = setting_like(
        TrainingConfig,
        "init",
        None,
        help="pre-trained or fine-tuned: run folder, or file",
        aliases=("--finetune",),
        metavar="CHECKPOINT",
        group=START,
    )
    new_head: bool = setting(False, "leave the checkpoint's head out", group=START, overrules=("label_map",))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(SupervisedConfig):
    """Everything that decides the weights that come out.

    Attributes:
        class_names: by number, where they are known; kept with the weights.
        label_map: file that says which of a larger head's classes to keep.
        ema_decay: None keeps no average.
        val: list to validate on; None validates on nothing. It decides no weights, but where a run with
            `patience` ends.
        segments, crops: views of the test at the end; None means the published number.
    """

    clip: ClipConfig
    augment: AugmentConfig
    data: str = setting_like(
        PretrainConfig,
        "data",
        dataclasses.MISSING,
        help="labelled list, `path label` a line, a folder with train.csv, or an index of shards (.vmae)",
    )
    num_classes: int = setting(
        help="without --classes",
        within=CLASSES,
        aliases=("--nb_classes",),
        unset_words=("-1",),
        unset="largest label + 1",
        group=DATA,
    )
    data_root: str | None = setting_like(PretrainConfig, "data_root", None)
    frame_pattern: str = setting_like(PretrainConfig, "frame_pattern", DEFAULT_PATTERN)
    first_frame: int = setting(
        1,
        "number of a frame folder's first image, where the list says nothing else",
        Whole(0, 10**9),
        aliases=("--start_idx",),
        group=DATA,
    )
    class_names: tuple[str, ...] | None = None
    multi_label: bool = setting(False, "a loss for each class (found in the list otherwise)")
    probe: str = setting(
        "none", "freeze the encoder, train a linear or attentive reader", OneOf("probe", PROBES), group=START
    )
    pooling: str = setting(
        "mean",
        "of the tokens: mean, first (after norm)",
        OneOf("pooling", POOLINGS),
        constants=((("--use_mean_pooling",), "mean", None), (("--use_cls",), "first", None)),
    )
    ema_decay: float | None = setting(
        None,
        "average the weights, 0.9999 say",
        SHARE_BELOW_1,
        name="ema",
        aliases=("--model_ema_decay",),
        metavar="DECAY",
        unset="no",
    )
    head_drop_rate: float = setting(
        0.0,
        "dropout before the head",
        SHARE_BELOW_1,
        name="head_drop",
        aliases=("--head_drop_rate", "--fc_drop_rate"),
    )
    num_sample: int = setting_like(PretrainConfig, "num_sample", 2)
    label_map: str | None = setting(
        None,
        "turn the checkpoint's head of more classes into one of these",
        metavar="FILE.json",
        group=START,
        overrules=("new_head",),
    )
    val: str | None = setting(
        None,
        "labelled list to validate on, one clip of each video",
        metavar="LIST",
        group=VALIDATION,
        unset="val.csv of the folder --data, if there is one",
        constants=((("--no-val", "--disable_eval_during_finetuning"), NO_LIST, "validate on nothing"),),
    )
    val_every: int = setting(
        1, "epochs from one validation to the next; the last step has one too", EPOCHS, group=VALIDATION
    )
    val_average: bool = setting(
        True,
        "validate the averaged weights too, where there are any",
        aliases=("--model_ema_eval",),
        group=VALIDATION,
    )
    patience: int | None = setting(
        None,
        "end after so many validations without a better one",
        COUNT,
        metavar="N",
        group=VALIDATION,
        unset="never",
    )
    segments: int | None = setting_like(
        ViewConfig, "segments", None, unset="5; 2 for sparse sampling", group=VALIDATION
    )
    crops: int | None = setting_like(ViewConfig, "crops", None, unset="3", group=VALIDATION)

    @property
    def frames(self) -> dict[str, Any]:
        """Options of `read_labelled_list`: how frame folders are read."""
        return {"frame_pattern": self.frame_pattern, "first_frame": self.first_frame}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None and self.val is None:
            raise InputError("--patience counts validations: name a list to validate on with --val")
        if self.probe != "none" and self.init is None:
            raise InputError("a probe reads a trained encoder: name its checkpoint with --init")
        if self.probe != "none" and (self.drop_rate or self.attn_drop_rate):
            raise InputError("--drop and --attn-drop are for an encoder that is trained; a probe's is frozen")
        if (self.label_map or self.new_head) and self.init is None:
            raise InputError("--label-map and --new-head are about a checkpoint's head: name it with --init")
        if self.label_map and self.new_head:
            raise InputError("--label-map keeps a checkpoint's head, --new-head leaves it out: choose one")
        self.augment.check_size(image_hw(self.clip.image_size))
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise InputError(
                f"the class list has {len(self.class_names)} names, but num_classes is {self.num_classes}"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(StartSettings):
    """Of `finetune` and `distil`, beside their configurations."""

    data_set: str | None = setting(
        None,
        f"published rules of a data set (class count, sampling, flips): {', '.join(DATA_SETS)}",
        OneOf("data set", DATA_SETS),
        aliases=("--data_set",),
        metavar="NAME",
        unset="the list's labels decide",
        group=DATA,
    )
    classes: str | None = setting(None, "class names: a name a line, or JSON", metavar="FILE", group=DATA)
    augment: str = setting(
        "published",
        "what the others start from: published, none",
        OneOf("augmentation", ("published", "none")),
        group=AugmentConfig.group,
        overrules=("aa", *(field.name for field in dataclasses.fields(AugmentConfig))),
    )
    aa: str = setting(
        RandAugmentText.example,
        "RandAugment as the published code writes it; none: off",
        RandAugmentText(),
        unset="{default}, unless --augment none",
        group=AugmentConfig.group,
        overrules=RandAugmentText.sets,
    )
    test: str | None = setting(
        None,
        "labelled list to test on at the end, many clips of each video",
        metavar="LIST",
        group=VALIDATION,
        unset="test.csv of the folder --data, else its val.csv",
        constants=((("--no-test",), NO_LIST, "no test at the end"),),
    )
    test_weights: str = setting(
        "best",
        "what is tested at the end: best (of the validations), last (as published)",
        OneOf("weights to test", TEST_WEIGHTS),
        group=VALIDATION,
    )
    eval: bool = setting(
        False, "only the test, of the run's weights, else of --resume's or --init's", group=VALIDATION
    )
    validation: bool = setting(False, "only a validation, of the same weights", group=VALIDATION)


DEFAULTS = {"lr": 1e-3, "min_lr": 1e-6, "betas": (0.9, 0.999), "batch_size": 64, "drop_path": 0.1}
SETTINGS = Settings(
    FinetuneConfig,
    RunConfig,
    FinetuneSettings,
    defaults=DEFAULTS,
    others=FINETUNE_FLAGS,
    adapt=adapt_finetune,
)
add_arguments = SETTINGS.add_to


def configs_from_args(
    args: argparse.Namespace, model: ModelConfig, num_classes: int
) -> tuple[FinetuneConfig, RunConfig]:
    """The checked settings of a command line.

    Args:
        model: with the grid of its positions.
        num_classes: of the class list, the flag, or the labels.

    Raises:
        InputError: settings that do not fit together.
    """
    args.settings.complete(args)
    run = run_from_args(args)
    start = AugmentConfig if args.augment == "published" else AugmentConfig.none
    drawn = {} if args.aa is None else RandAugmentText.settings(args.aa)
    seen = {"num_frames": model.num_frames, "image_size": model.img_size}
    follows = {
        "data": list_of(args.data),
        "num_classes": num_classes,
        "val": list_beside(args.data, args.val, VALIDATION_LISTS),
    }
    if args.probe == "attentive":
        follows["pooling"] = "attentive"
    config = FinetuneConfig(
        model=model,
        clip=ClipConfig.from_dict({**seen, **chosen(ClipConfig, args)}),
        augment=start(**{**drawn, **chosen(AugmentConfig, args)}),
        class_names=tuple(read_class_names(args.classes)) if args.classes else None,
        **{**training_from_args(args, FinetuneConfig, run, usual_warmup(args)), **follows},
    )
    return config, run


def list_beside(data: str, given: str | None, names: Sequence[str]) -> str | None:
    """The list that `given` means (`NO_LIST`: none); where nothing is given, the first of `names` in the
    folder `data`, if it is one and has one.

    Raises:
        InputError: `given` is a folder that holds none of them.
    """
    if given is not None:
        return None if given == NO_LIST else list_of(given, names)
    found = (Path(data) / name for name in names)
    return next((str(path) for path in found if path.is_file()), None)


def usual_warmup(args: argparse.Namespace) -> float:
    """Epochs of the warm-up of supervised training where nothing is set."""
    return min(5.0, args.epochs / 6)


def list_of(path: str, names: Sequence[str] = TRAINING_LISTS) -> str:
    """The list file that `path` means: itself, or the first of `names` that is in this folder.

    Raises:
        InputError: a folder that holds none of them.
    """
    if not Path(path).is_dir():
        return path
    found = next((name for name in names if (Path(path) / name).is_file()), None)
    if found is None:
        refuse_folder_of_shards(path)
        raise InputError(
            f"folder {path} holds no {' and no '.join(names)}; give a list, `path label` a line "
            "(docs/own_data.md has lines that make one of a folder for each class)"
        )
    return str(Path(path) / found)
