"""Weights of any checkpoint (pre-trained, post-pre-trained or fine-tuned; of this code or the published one)
loaded into a classifier.

Every key of the file is loaded, or dropped for a reason that is named, or an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vmae.checkpoint.published import check_fixed, check_shapes, load_weights
from vmae.data.labels import HEAD_NAMES, convert_head
from vmae.errors import InputError
from vmae.model.classifier import Classifier
from vmae.model.embed import interpolate_positions

_PRETRAINING = ("decoder.", "encoder_to_decoder.", "mask_token")


@dataclass
class Start:
    """Report of a load: what became of each of a checkpoint's tensors.

    Attributes:
        loaded: count of those that were loaded, as they are or converted.
        dropped: reason -> names that were left out.
        fresh: names of the model that the file does not have; they start anew.
        notes: what was converted.
    """

    loaded: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, names: Sequence[str]) -> None:
        if names:
            self.dropped.setdefault(reason, []).extend(names)

    def describe(self, path: str | Path) -> str:
        """One line: counts, reasons, and what starts fresh."""
        parts = [f"{self.loaded} tensors loaded", *self.notes]
        parts += [f"{len(names)} dropped ({reason})" for reason, names in self.dropped.items()]
        if self.fresh:
            parts.append(
                f"{len(self.fresh)} start fresh "
                f"({', '.join(sorted({name.split('.')[0] for name in self.fresh}))})"
            )
        return f"{path}: {', '.join(parts)}"


def start_classifier(
    model: Classifier,
    path: str | Path,
    *,
    grid: tuple[int, int, int],
    label_map: Sequence[int] | None = None,
    new_head: bool = False,
    state: dict[str, Tensor] | None = None,
) -> Start:
    """Load a checkpoint's encoder, and its head if it has one, into `model`.

    Args:
        path: the checkpoint, for messages too.
        grid: of its positions, see `source_config`.
        label_map: for a head of more classes: which of them each class of `model` is.
        new_head: leave the checkpoint's head out.
        state: its tensors by name, where the caller has read them.

    Raises:
        InputError: the file can't be read; keys that are missing or unknown, shapes that differ; a head of
            other classes and neither `label_map` nor `new_head`; a map that does not fit.
    """
    report = Start()
    state = load_weights(path) if state is None else state
    pretrained = any(name.startswith("encoder.") for name in state)
    if pretrained:
        state = _encoder_of(state, report, keep_norm=model.fc_norm is None)
    else:
        state = _fit_norm(state, model, path, report)
    headless = not any(name in state for name in HEAD_NAMES)
    state = _fit_head(state, model, path, report, label_map, new_head)
    state = _fit_positions(state, model, grid, report, path)
    own = model.state_dict()
    may_be_fresh = (
        ("pool.",)
        + (("head.", "fc_norm.") if pretrained else ())
        + (("head.",) if new_head or headless else ())
        + (("fc_norm.",) if headless and model.fc_norm is not None and not _norms(state) else ())
    )
    report.fresh = [name for name in own if name not in state and name.startswith(may_be_fresh)]
    wanted = {name: value.shape for name, value in own.items() if name not in report.fresh}
    check_shapes(wanted, {name: value.shape for name, value in state.items()}, path)
    model.load_state_dict(state, strict=False)
    report.loaded = len(state)
    return report


def _encoder_of(state: dict[str, Tensor], report: Start, *, keep_norm: bool) -> dict[str, Tensor]:
    """The encoder of a pre-training checkpoint, under a classifier's names."""
    decoder = [name for name in state if name.startswith(_PRETRAINING)]
    report.drop("decoder", decoder)
    kept = {name.removeprefix("encoder."): value for name, value in state.items() if name not in decoder}
    if not keep_norm:  # as published: the mean over tokens has a norm of its own, which starts fresh
        report.drop(
            "the encoder's final norm, for which fc_norm stands", [n for n in kept if n.startswith("norm.")]
        )
        kept = {name: value for name, value in kept.items() if not name.startswith("norm.")}
    return kept


def _norms(state: dict[str, Tensor]) -> set[str]:
    """The last norms of a classifier's file: "fc_norm" of the mean over tokens, "norm" of each token."""
    return {name.split(".")[0] for name in state if name.startswith(("fc_norm.", "norm."))}


def _fit_norm(
    state: dict[str, Tensor], model: Classifier, path: str | Path, report: Start
) -> dict[str, Tensor]:
    """The tensors of a file of fine-tuning, whose last norm says how it pools tokens.

    Raises:
        InputError: the model pools otherwise.
    """
    norms, pooled = _norms(state), model.fc_norm is not None
    if norms == {"norm"} and pooled:
        if not any(name in state for name in HEAD_NAMES):  # an encoder alone: as a pre-trained one
            names = [name for name in state if name.startswith("norm.")]
            report.drop("the encoder's final norm, for which fc_norm stands", names)
            return {name: value for name, value in state.items() if name not in names}
        raise InputError(
            f"checkpoint {path} was fine-tuned on the first token (--use_cls: it has norm and no fc_norm), "
            f"but the model pools {model.pooling!r}; --pooling first goes on as it was"
        )
    if norms == {"fc_norm"} and not pooled:
        raise InputError(
            f"checkpoint {path} was fine-tuned on the mean over tokens (it has fc_norm and no norm), but the "
            f"model pools {model.pooling!r}; --pooling mean goes on as it was"
        )
    return state


def _fit_head(
    state: dict[str, Tensor],
    model: Classifier,
    path: str | Path,
    report: Start,
    label_map: Sequence[int] | None,
    new_head: bool,
) -> dict[str, Tensor]:
    found = [name for name in HEAD_NAMES if name in state]
    if label_map is not None:
        if not found:
            raise InputError(f"checkpoint {path} has no head to convert; a label map is of no use for it")
        classes = state[found[0]].shape[0]
        if len(label_map) != model.num_classes or max(label_map) >= classes:
            raise InputError(
                f"the label map has {len(label_map)} classes of {max(label_map) + 1} or more, but the model "
                "has "
                f"{model.num_classes} and the head of checkpoint {path} has {classes}"
            )
        report.notes.append(f"head of {classes} classes converted to {len(label_map)}")
        return convert_head(state, label_map)
    if found and (new_head or not model.num_classes):
        report.drop("head", found)
        return {name: value for name, value in state.items() if name not in found}
    if found and state[found[0]].shape[0] != model.num_classes:
        raise InputError(
            f"checkpoint {path} has a head of {state[found[0]].shape[0]} classes, the labels have "
            f"{model.num_classes}: "
            "--label-map FILE.json converts it, --new-head starts a fresh one"
        )
    return state


def _fit_positions(
    state: dict[str, Tensor], model: Classifier, grid: tuple[int, int, int], report: Start, path: str | Path
) -> dict[str, Tensor]:
    """Learned positions interpolated to the model's grid; fixed ones left out, the model makes its own."""
    if "pos_embed" not in state:
        return state
    if not model.config.learned_pos:
        check_fixed(state["pos_embed"], f"pos_embed of checkpoint {path}")
        report.drop("fixed positions", ["pos_embed"])
        return {name: value for name, value in state.items() if name != "pos_embed"}
    table = state["pos_embed"]
    if table.shape[1] != grid[0] * grid[1] * grid[2]:
        raise InputError(
            f"the checkpoint has {table.shape[1]} positions, which is no {' x '.join(map(str, grid))} grid"
        )
    if grid != model.config.grid:
        report.notes.append(f"positions interpolated from {grid} to {model.config.grid} tokens")
    with torch.no_grad():
        return {**state, "pos_embed": interpolate_positions(table.float(), grid, model.config.grid)}
