"""A classifier out of a checkpoint, with what the checkpoint knows of itself: for `evaluate`, `predict` and
`distil`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae.checkpoint.classifier import plain_names, start_classifier
from vmae.checkpoint.folder import AVERAGED_NAME, find_weights
from vmae.checkpoint.format import is_checkpoint, read_group
from vmae.checkpoint.published import read_settings_and_weights
from vmae.checkpoint.source import at_size, source_config
from vmae.config import ModelConfig, StartSettings
from vmae.data.classify_dataset import ClipConfig
from vmae.data.labels import HEAD_NAMES, read_label_map
from vmae.errors import InputError
from vmae.flags import add_settings
from vmae.model import Classifier, build_classifier

NO_NUMBERS = (
    "the weights are damaged, or the dtype is too narrow for them: check the run's loss, try --dtype float32"
)


@dataclass
class LoadedClassifier:
    """A classifier in eval mode on the CPU.

    Attributes:
        model: with the weights.
        path: where they come from.
        clip: how it was fine-tuned to see videos, with what the caller changed.
        class_names: by number; None where the checkpoint does not have them.
        multi_label: whether classes exclude each other.
        note: what was loaded, and `assumed`, a line each.
        assumed: lines on what was taken for granted of a file that does not say it.
    """

    model: Classifier
    path: Path
    clip: ClipConfig
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False
    note: str = field(default="", compare=False)
    assumed: tuple[str, ...] = ()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `load_from_args` reads."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR|FILE", help="a run's folder, a checkpoint, or weights"
    )
    parser.add_argument(
        "--averaged", action="store_true", help="take the averaged weights of the run (finetune --ema)"
    )
    parser.add_argument(
        "--label-map", metavar="FILE.json", help="turn a head of more classes into one of these"
    )
    clip = parser.add_argument_group("how videos are seen (default: as in training)")
    add_settings(clip, ClipConfig, "sampling stride", unset="as in training")
    add_settings(clip, ModelConfig, "num_frames img_size", unset="as in training")
    add_source_arguments(parser)


def add_source_arguments(
    parser: argparse.ArgumentParser, files: str = "official files"
) -> argparse._ArgumentGroup:
    """What official files do not say; the group of these flags. `files` says which they are."""
    model = parser.add_argument_group(f"for weights that do not say what they are ({files})")
    add_settings(model, StartSettings, "model init_frames init_size")
    return model


def load_from_args(args: argparse.Namespace, **options: Any) -> LoadedClassifier:
    """`load_classifier` with the flags of `add_model_arguments`."""
    changes = {name: getattr(args, name) for name in ("sampling", "stride", "num_frames", "image_size")}
    return load_classifier(
        args.checkpoint,
        preset=args.model,
        averaged=args.averaged,
        label_map=args.label_map,
        source=(args.init_frames, args.init_size),
        clip={name: value for name, value in changes.items() if value is not None},
        **options,
    )


def load_classifier(
    checkpoint: str | Path,
    *,
    preset: str | None = None,
    averaged: bool = False,
    label_map: str | None = None,
    source: tuple[int | None, int | None] = (None, None),
    clip: dict[str, Any] | None = None,
    backend: str = "auto",
    attention: str = "auto",
) -> LoadedClassifier:
    """The classifier of a checkpoint, ready to test.

    Args:
        checkpoint: see `find_weights`.
        preset: the architecture, for files that do not hold it.
        averaged: the run's averaged weights.
        label_map: file that says which of the head's classes to keep.
        source: frames and side of the clips that the weights are of, for files that do not say.
        clip: settings of `ClipConfig` to change.

    Raises:
        InputError: the file can't be read, does not tell its architecture, does not fit it, or has no head.
    """
    path, settings, state = _read(checkpoint, averaged)
    own, note = source_config(settings, state, path, preset, *source)
    state, assumed = plain_names(state), [note] if note else []
    if HEAD_NAMES[0] not in state:
        raise InputError(
            f"{path} has no head: it is pre-trained, not fine-tuned; `python -m vmae finetune --init` comes "
            "first"
        )
    classes = state[HEAD_NAMES[0]].shape[0]
    chosen = None if label_map is None else read_label_map(label_map, source_classes=classes)
    clip, size = clip or {}, {"num_frames": own.num_frames, "image_size": own.img_size}
    seen = ClipConfig.from_dict({**size, **settings.get("clip", {}), **clip})
    if "clip" not in settings and not {"sampling", "stride"} & clip.keys():
        how = f"{seen.sampling} sampling, stride {seen.stride}"
        assumed.append(
            f"{path}: it does not say how videos were seen, taken as {how} (--sampling and --stride say "
            "otherwise)"
        )
    config = at_size(own, num_frames=seen.num_frames, img_size=seen.image_size)
    pooling = settings.get("pooling", "first" if "norm.weight" in state else "mean")
    model = build_classifier(
        config,
        classes if chosen is None else len(chosen),
        pooling=pooling,
        backend=backend,
        attention=attention,
    )
    report = start_classifier(model, path, grid=own.pos_grid or own.grid, label_map=chosen, state=state)
    names = settings.get("class_names")
    if names is not None:
        names = tuple(names if chosen is None else [names[number] for number in chosen])
    note = "\n".join([report.describe(path), *assumed])
    return LoadedClassifier(
        model.eval(), path, seen, names, bool(settings.get("multi_label")), note, tuple(assumed)
    )


def _read(checkpoint: str | Path, averaged: bool) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    path = find_weights(checkpoint)
    if not averaged:
        return path, *read_settings_and_weights(path)
    if is_checkpoint(path):
        return path, read_settings_and_weights(path)[0], read_group(path, "ema")
    beside = path.parent / AVERAGED_NAME
    if not beside.is_file():
        raise InputError(
            f"{checkpoint} has no averaged weights ({AVERAGED_NAME}); `finetune --ema 0.9999` keeps them"
        )
    return beside, *read_settings_and_weights(beside)


@torch.no_grad()
def view_probabilities(
    model: Classifier, views: Tensor, *, device: torch.device, dtype: str, multi_label: bool, batch_size: int
) -> Tensor:
    """float64 [K], on the CPU: the softmax (or, for several labels, the sigmoid) of each view's logits,
    averaged.

    Args:
        views: uint8 [V, T, H, W, 3].
        batch_size: views at once.

    Raises:
        InputError: a probability is NaN.
    """
    total = torch.zeros(model.num_classes, dtype=torch.float64)
    for part in views.split(batch_size):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(part.to(device, non_blocking=True)).float()
        probabilities = logits.sigmoid() if multi_label else logits.softmax(1)
        total += probabilities.double().sum(0).cpu()
    if total.isnan().any():
        raise InputError(f"the model's output is no number (NaN); {NO_NUMBERS}")
    return total / len(views)


def named(numbers: Sequence[int], class_names: Sequence[str] | None) -> list[str]:
    """Names of classes, their numbers where they have none."""
    return [class_names[number] if class_names else str(number) for number in numbers]
