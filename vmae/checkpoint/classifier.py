"""A classifier from a checkpoint, ready to test, with what the checkpoint knows of it: for `evaluate`,
`features`, `predict`, `distil`, `export`, `serve` and `vmae.load`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmae.checkpoint.models import head_classes, to_model
from vmae.checkpoint.source import read_checkpoint
from vmae.config import ModelConfig
from vmae.data.augment import image_hw
from vmae.data.classify_dataset import ClipConfig
from vmae.data.labels import HEAD_NAMES, read_label_map
from vmae.model import Classifier

NO_MAP = "none"


@dataclass
class LoadedClassifier:
    """A classifier in eval mode on the CPU.

    Attributes:
        model: with the weights; without a head (`num_classes` 0) where the checkpoint has none and the caller
            needs none.
        path: of the weights.
        clip: how it was fine-tuned to see videos, with what the caller changed.
        class_names: by number; None where the checkpoint does not have them.
        multi_label: whether a video may have several classes.
        note: what was loaded, and `assumed`, a line each.
        assumed: lines on what was assumed of a file that does not say it.
    """

    model: Classifier
    path: Path
    clip: ClipConfig
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False
    note: str = field(default="", compare=False)
    assumed: tuple[str, ...] = ()


def load_classifier(
    checkpoint: str | Path,
    *,
    preset: str | None = None,
    averaged: bool = False,
    label_map: str | None = None,
    source: tuple[int | None, int | None] = (None, None),
    clip: dict[str, Any] | None = None,
    head: bool = True,
    backend: str = "auto",
    attention: str = "auto",
) -> LoadedClassifier:
    """The classifier of a checkpoint, ready to test.

    Args:
        checkpoint: see `read_checkpoint`.
        preset: architecture, for files that do not say it.
        averaged: the run's averaged weights instead.
        label_map: file that says which of the head's classes to keep; "none" is as without one.
        source: frames and side of the clips that the weights are of, for files that do not say it.
        clip: settings of `ClipConfig` to change. The short side of the training is of its size: another
            `image_size` drops it, unless `short_side` is given.
        head: a head is needed; False takes an encoder alone too, pre-trained or fine-tuned.

    Raises:
        InputError: the file can't be read, does not tell its architecture, does not fit it, or has no head
            that is needed.
    """
    read = read_checkpoint(checkpoint, averaged=averaged, preset=preset, frames=source[0], size=source[1])
    own, settings, clip = read.config, read.settings, clip or {}
    headless = not head and HEAD_NAMES[0] not in read.state
    named = label_map not in (None, NO_MAP)
    classes = 0 if headless and not named else head_classes(read)
    kept = read_label_map(label_map, source_classes=classes) if named and label_map is not None else None
    seen = _seen(own, settings, clip)
    model, report = to_model(
        read,
        "encoder" if headless else "classifier",
        {"num_frames": seen.num_frames, "img_size": seen.image_size},
        label_map=kept,
        backend=backend,
        attention=attention,
    )
    assumed = read.note.splitlines()
    if not {"clip", "stride"} & settings.keys() and not {"sampling", "stride"} & clip.keys():
        assumed.append(
            f"{read.path}: it does not say how videos were seen, taken as {seen.sampling} sampling, stride "
            f"{seen.stride}, {seen.resize} pixels (--sampling, --stride and --resize say otherwise)"
        )
    names = settings.get("class_names")
    if names is not None:
        names = tuple(names if kept is None else [names[number] for number in kept])
    return LoadedClassifier(
        model=model,
        path=read.path,
        clip=seen,
        class_names=names,
        multi_label=bool(settings.get("multi_label")),
        note="\n".join([report, *filter(None, [read.changed]), *assumed]),
        assumed=tuple(assumed),
    )


def _seen(own: ModelConfig, settings: dict[str, Any], changes: dict[str, Any]) -> ClipConfig:
    """How the training of a checkpoint saw videos, with the caller's changes. Runs of pre-training write
    their stride alone. The published trainer does not antialias: what is not known to be of a run of ours is
    tested as that one trains."""
    size = {"num_frames": own.num_frames, "image_size": own.img_size}
    stride = {name: settings[name] for name in ("stride",) if name in settings}
    ours = "model" in settings and {"clip", "stride"} & settings.keys()
    foreign = {} if ours else {"resize": "published"}
    stored = {**size, **foreign, **stride, **settings.get("clip", {})}
    if image_hw(changes.get("image_size", stored["image_size"])) != image_hw(stored["image_size"]):
        stored["short_side"] = None
    return ClipConfig.from_dict({**stored, **changes})
