"""Models made from checkpoints: any `Source` as a model of a given kind, with changed frames or size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, overload

from vmae.checkpoint.published import load_into
from vmae.checkpoint.source import HEAD, PIXELS, Source, at_size
from vmae.checkpoint.start import start_classifier
from vmae.data.labels import HEAD_NAMES
from vmae.errors import InputError
from vmae.model import Classifier, Pretrainer, build_classifier, build_pretrainer
from vmae.model.detector import Detector, build_detector

Kind = Literal["pretrainer", "encoder", "classifier", "detector"]


def head_classes(source: Source) -> int:
    """Classes of a checkpoint's head.

    Raises:
        InputError: it has no head.
    """
    if HEAD_NAMES[0] not in source.state:
        raise InputError(
            f"{source.path} has no head: it is pre-trained, not fine-tuned; `python -m vmae finetune --init` "
            "comes first"
        )
    return source.state[HEAD_NAMES[0]].shape[0]


def kind_of(source: Source) -> Literal["pretrainer", "encoder", "classifier"]:
    """The kind of model that holds all tensors of a checkpoint; a detector has those of a classifier."""
    if "mask_token" in source.state:
        return "pretrainer"
    return "classifier" if HEAD_NAMES[0] in source.state else "encoder"


def start_pretrainer(model: Pretrainer, source: Source, path: str | Path | None = None) -> str:
    """Load a checkpoint's encoder and decoder into `model`, and say in a line what was done. The head starts
    fresh where the checkpoint's predicts something else than the model's; so does all but the encoder where
    the checkpoint has no decoder.

    Args:
        path: the checkpoint, for messages; None is the source's.

    Raises:
        InputError: tensors are missing or left over, or their shapes differ: by name.
    """
    path = source.path if path is None else path
    left_out = () if _predicts_the_same(model, source) else HEAD
    report = load_into(model, source.state, path, allow_encoder_only=True, left_out=left_out)
    if not left_out:
        return report
    return (
        f"{report}; it predicts {source.predicted or PIXELS}, this model {model.target.describe()} "
        f"({model.target.width} values a token): the head starts fresh"
    )


def _predicts_the_same(model: Pretrainer, source: Source) -> bool:
    """Whether a checkpoint's head is of use to `model`. One that shows another width of the decoder is so
    too: then the loading says what is wrong."""
    own = model.decoder.head.weight.shape
    if source.head_shape is None or source.head_shape[1] != own[1]:
        return True
    return source.target == model.target.name and source.head_shape == tuple(own)


def check_pixels(source: Source, path: str | Path | None = None) -> None:
    """Raises InputError where a checkpoint has no decoder, or one that predicts something else than pixels.

    Args:
        path: the checkpoint, for messages; None is the source's.
    """
    path = source.path if path is None else path
    if not any(name.startswith("decoder.") for name in source.state):
        raise InputError(
            f"{path} has no decoder, so it rebuilds nothing: give pre-trained weights, with their decoder"
        )
    if source.predicted:
        raise InputError(
            f"{path} rebuilds no pixels: it predicts {source.predicted}. Its encoder is of use as any "
            "(finetune --init, features, vmae.load)"
        )


KINDS: tuple[Kind, ...] = get_args(Kind)
Changes = Mapping[str, Any] | None


@overload
def to_model(
    source: Source,
    kind: Literal["pretrainer"],
    changes: Changes = ...,
    *,
    backend: str = ...,
    attention: str = ...,
) -> tuple[Pretrainer, str]: ...
@overload
def to_model(
    source: Source,
    kind: Literal["encoder", "classifier"],
    changes: Changes = ...,
    *,
    label_map: Sequence[int] | None = ...,
    backend: str = ...,
    attention: str = ...,
) -> tuple[Classifier, str]: ...
@overload
def to_model(
    source: Source,
    kind: Literal["detector"],
    changes: Changes = ...,
    *,
    num_classes: int | None = ...,
    backend: str = ...,
    attention: str = ...,
) -> tuple[Detector, str]: ...
def to_model(
    source: Source,
    kind: Kind,
    changes: Changes = None,
    *,
    num_classes: int | None = None,
    label_map: Sequence[int] | None = None,
    backend: str = "auto",
    attention: str = "auto",
) -> tuple[Pretrainer | Classifier, str]:
    """A model with the weights of a checkpoint, in eval mode on the CPU.

    Args:
        source: see `read_checkpoint`.
        kind: "pretrainer" (encoder and a decoder that predicts pixels), "encoder" (a `Classifier` without a
            head: `tokens` and `features` of clips), "classifier", or "detector" (actions of boxes).
        changes: fields of `ModelConfig` to change, such as `num_frames` and `img_size`; the encoder's
            positions are interpolated.
        num_classes: a detector's actions, where the caller knows them; None counts the head's.
        label_map: for a classifier with fewer classes than the head: which of the head's each of them is.
        backend, attention: see `SpeedConfig`.

    Returns:
        The model, and a line on what was loaded, left out or started fresh.

    Raises:
        InputError: the architecture is not known, the checkpoint has no decoder (or head) or one that
            predicts no pixels, or its tensors do not fit: each by name.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of model {kind!r}; known: {', '.join(KINDS)}")
    if kind == "pretrainer":
        check_pixels(source)
    config = at_size(source.config, **(changes or {}))
    speed = {"backend": backend, "attention": attention}
    if kind == "pretrainer":
        normalize = source.settings.get("normalize_target", True)
        pretrainer = build_pretrainer(config, normalize_target=normalize, **speed)
        return pretrainer.eval(), load_into(pretrainer, source.state, source.path)
    if kind == "detector":
        sees = {
            "roi": source.settings.get("roi", "aligned"),
            "preprocess": source.settings.get("clip", {}).get("preprocess", "resize"),
        }
        detector = build_detector(config, num_classes or head_classes(source), **sees, **speed)
        return detector.eval(), load_into(detector, source.state, source.path)
    classes = 0
    if kind == "classifier":
        classes = head_classes(source) if label_map is None else len(label_map)
    model = build_classifier(config, classes, pooling=source.pooling, **speed)
    start = start_classifier(model, source.path, grid=source.grid, label_map=label_map, state=source.state)
    return model.eval(), start.describe(source.path)
