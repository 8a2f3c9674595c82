"""Reading a checkpoint: what it says of itself, its tensors, and the model and clips that they are of.

Files written here say which model and clips. Published ones hold tensors, and sometimes the arguments of
their training, which tell frames and size; so does a position table, by its length. Weights with fixed
sine-cosine positions and nothing else fit clips of any size: then the caller's numbers count, else 16 frames
of 224 pixels, and a note says so.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vmae.checkpoint.folder import AVERAGED_NAME, WEIGHTS_NAME, locate_weights
from vmae.checkpoint.format import is_checkpoint, read_group, read_manifest
from vmae.checkpoint.huggingface import is_pretrained, read_pretrained
from vmae.checkpoint.published import (
    is_fixed_table,
    known_settings,
    read_settings_and_weights,
    read_weights,
)
from vmae.checkpoint.shapes import (
    ARCHITECTURE,
    check_preset,
    describe_shapes,
    preset_of,
    shapes_of,
    shown_by,
)
from vmae.config import NORMED, PUBLISHED_CLASSIFIERS, PUBLISHED_MODELS, ModelConfig
from vmae.data.labels import HEAD_NAMES
from vmae.errors import InputError

PUBLISHED_FRAMES, PUBLISHED_SIZE = 16, 224
HEAD = ("decoder.head.weight", "decoder.head.bias")  # of a pre-trainer's decoder
PIXELS = "pixels"  # the published target
_UNITS = {"num_frames": "frames", "img_size": "pixels"}


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint that was read.

    Attributes:
        path: of the file or folder that was read: for a run's folder, its newest checkpoint.
        settings: what it says of itself: the run's settings (`model`, `clip`, `class_names`, ...); for a
            published file at most `published` (`num_frames`, `img_size`); else empty.
        state: tensors by published name, on the CPU, without the prefixes of wrappers.
        known: architecture, with frames and size of the clips that the weights are of; None where neither
            the checkpoint nor the caller names it.
        note: line on what was assumed about its clips; empty where the checkpoint or the caller says it.
        changes: lines on what was done to wrappers, names and dtypes while it was read, such as "prefix
            module. removed from 222 names"; empty where nothing was.
    """

    path: Path
    settings: dict[str, Any]
    state: dict[str, Tensor]
    known: ModelConfig | None
    note: str = ""
    changes: tuple[str, ...] = ()
    unknown: str = ""

    @property
    def config(self) -> ModelConfig:
        """`known`.

        Raises:
            InputError: the architecture is not known.
        """
        if self.known is None:
            raise InputError(self.unknown or _no_architecture(self.path, self.state))
        return self.known

    @property
    def shown(self) -> dict[str, Any]:
        """Fields of the architecture of weights that do not say it: those of `config` that decide the
        shapes; empty where the checkpoint says it."""
        if "model" in self.settings:
            return {}
        return {name: getattr(self.config, name) for name in ARCHITECTURE}

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width that its positions are made for."""
        return self.config.pos_grid or self.config.grid

    @property
    def pretrained(self) -> bool:
        """Whether it is of pre-training: its encoder has never seen a whole clip."""
        return any(name.startswith("encoder.") for name in self.state)

    @property
    def head_shape(self) -> tuple[int, int] | None:
        """Values that the decoder's head gives of a token, and its width; None where there is none such."""
        if not all(name in self.state for name in HEAD):
            return None
        weight, bias = (self.state[name].shape for name in HEAD)
        return (weight[0], weight[1]) if len(weight) == 2 and weight[:1] == bias else None

    @property
    def target(self) -> str | None:
        """Name of what its decoder predicts, "pixels" for the published models; None where it has no head, or
        one of another width than pixels need and no name for what that predicts."""
        if self.head_shape is None:
            return None
        told = self.settings.get("target")
        if isinstance(told, dict) and told.get("name", PIXELS) != PIXELS:
            return str(told["name"])
        return PIXELS if self._pixels in (None, self.head_shape[0]) else None

    @property
    def _pixels(self) -> int | None:
        """Values of a tubelet's pixels, as its encoder embeds them; None where that is not known."""
        weight = self.state.get("encoder.patch_embed.proj.weight")
        return None if weight is None or weight.ndim != 5 else math.prod(weight.shape[1:])

    @property
    def predicted(self) -> str:
        """What its decoder predicts, in words; empty where these are pixels, or it has no head."""
        if self.target == PIXELS or self.head_shape is None:
            return ""
        values = f"{self.head_shape[0]} values a token"
        if self.target is None:
            return f"{values} (a tubelet has {self._pixels} of pixels)"
        of = f" ({told})" if (told := self.settings["target"].get("teacher")) else ""
        return f"the target {self.target}{of}, {values}"

    @property
    def pooling(self) -> str:
        """How an encoder's tokens are pooled. A pre-trained one ends with a norm over each token, and was
        never pooled: the mean of what the norm gives. So is an encoder with that norm and without a head,
        unless it says otherwise. A classifier that has this norm pools the first token (--use_cls)."""
        told = self.settings.get("pooling")
        normed = "norm.weight" in self.state
        if self.pretrained or (told is None and normed and HEAD_NAMES[0] not in self.state):
            return NORMED
        return told or ("first" if normed else "mean")

    @property
    def tuned_pooling(self) -> str | None:
        """The pooling that a checkpoint of fine-tuning goes on with: "mean" or "first"; None where it is of
        pre-training, an encoder alone, or a probe's."""
        headed = HEAD_NAMES[0] in self.state or "pooling" in self.settings
        return self.pooling if headed and not self.pretrained and self.pooling != "attentive" else None

    def fit(self, model: ModelConfig) -> ModelConfig:
        """`model` with positions of this checkpoint's kind; fixed ones are made for its grid and interpolated
        to the model's."""
        model = model.replace(learned_pos=self.config.learned_pos)
        if model.learned_pos or self.grid == model.grid:
            return model
        return model.replace(pos_grid=self.grid)

    def describe(self, report: str) -> str:
        """`report` of a load, what was changed while reading, and the note, a line each."""
        return "\n".join(filter(None, (report, *self.lines)))

    @property
    def changed(self) -> str:
        """`changes` in a line with the file's name; empty where there are none but a usual wrapper opened."""
        worth = [line for line in self.changes if not re.fullmatch(r"weights taken from \w+", line)]
        return f"{self.path}: {'; '.join(self.changes)}" if worth else ""

    @property
    def lines(self) -> list[str]:
        """What was changed while reading, and what was assumed, a line each."""
        return [line for line in (self.changed, *self.note.splitlines()) if line]


def read_checkpoint(
    checkpoint: str | Path,
    *,
    averaged: bool = False,
    preset: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    **overrides: Any,
) -> Source:
    """Read a checkpoint of this code, of the published code, or of transformers.

    Args:
        checkpoint: a run's folder, a training checkpoint's folder, a .pth, .pt or .safetensors file, or a
            folder of transformers (`config.json` beside its weights).
        averaged: the run's averaged weights instead (`finetune --ema`).
        preset: architecture, ours or by its published name, for files that do not say it.
        frames, size: of the clips that the weights are of, for files that do not say it.
        overrides: fields of `ModelConfig` that differ from the preset's.

    Raises:
        InputError: it is missing, damaged, holds no weights or more than weights; contradicts `frames` or
            `size`; or its positions fit no such clips.
    """
    path, choice = locate_weights(checkpoint)
    changes: tuple[str, ...] = ()
    if averaged:
        path, settings, state, changes = _read_averaged(checkpoint, path)
    elif is_pretrained(path):
        settings, state = read_pretrained(path)
    else:
        settings, state, changes = read_weights(path)
    changes = (*((choice,) if choice else ()), *changes)
    if "model" in settings or preset is not None:
        config, note = source_config(settings, state, path, preset, frames, size, **overrides)
        return Source(path, settings, state, config, note, changes)
    preset = preset_of(shown_by(shapes_of(state)), overrides)
    if preset is None:
        return Source(path, settings, state, None, "", changes)
    try:
        config, note = source_config(settings, state, path, preset, frames, size, **overrides)
    except InputError as error:  # of use to those who need no model
        return Source(path, settings, state, None, "", changes, unknown=str(error))
    taken = f"{path}: taken as {preset} by its shapes (--model says otherwise)"
    return Source(path, settings, state, config, "\n".join(filter(None, (taken, note))), changes)


def _read_averaged(
    checkpoint: str | Path, path: Path
) -> tuple[Path, dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """The averaged weights of a run: in its checkpoint, in a file beside its weights, or in a file of a
    published trainer."""
    if is_checkpoint(path):
        return path, known_settings(read_manifest(path).get("config")), read_group(path, "ema"), ()
    beside = path.parent / AVERAGED_NAME
    ours = path.name in (WEIGHTS_NAME, AVERAGED_NAME) or path.suffix == ".safetensors"
    if path.is_file() and beside.is_file() and ours:
        return beside, *read_settings_and_weights(beside), ()
    if path.is_file() and not ours:
        return path, *read_weights(path, averaged=True)
    raise InputError(
        f"{checkpoint} has no averaged weights ({AVERAGED_NAME}); `finetune --ema 0.9999` keeps them"
    )


def _no_architecture(path: str | Path, state: dict[str, Tensor]) -> str:
    shown = shown_by(shapes_of(state))
    also = f" ({describe_shapes(shown)})" if shown else ""
    return f"{path} does not say which architecture it is of; name it with --model{also}"


def source_config(
    settings: dict[str, Any],
    state: dict[str, Tensor],
    path: str | Path,
    preset: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    **overrides: Any,
) -> tuple[ModelConfig, str]:
    """The model that a file's weights are of, with the frames and size of their clips; see `read_checkpoint`.

    Returns:
        The settings, and a line on what was assumed; empty where nothing was.

    Raises:
        InputError: an architecture that nobody names, clips that the file contradicts, or positions that fit
            no such clips.
    """
    given = {name: value for name, value in (("num_frames", frames), ("img_size", size)) if value is not None}
    if "model" in settings:
        config = ModelConfig.from_dict(settings["model"])
        _check_clip(config, given, path)
        return config, ""
    if preset is None:
        raise InputError(_no_architecture(path, state))
    name = {**PUBLISHED_CLASSIFIERS, **PUBLISHED_MODELS}.get(preset, preset)
    found = shown_by(shapes_of(state))
    check_preset(path, name, overrides, found)
    known = settings.get("published", {}) | given
    clip, assumed = {"num_frames": PUBLISHED_FRAMES, "img_size": PUBLISHED_SIZE, **known}, ""
    table = _find(state, "pos_embed")
    if table is not None:
        token = {**vars(ModelConfig.preset(name, **overrides)), **found}
        clip = _clip_of(table.shape[1], token["tubelet_size"], token["patch_size"], known, path)
        found["learned_pos"] = not is_fixed_table(table)
        assumed = f"its {table.shape[1]} positions are taken as those of "
    elif len(known) < 2:
        assumed = "it does not say the frames and size of its clips, taken as "
    note = ""
    if assumed and len(known) < 2:
        note = f"{path}: {assumed}{_said(clip)} (--init-frames and --init-size say otherwise)"
    return ModelConfig.preset(name, **{**overrides, **found, **clip}), note


def _check_clip(config: ModelConfig, given: dict[str, int], path: str | Path) -> None:
    """Raises InputError where a file that says which clips its weights are of contradicts those `given`."""
    token = (config.tubelet_size, config.patch_size, config.patch_size)
    frames, height, width = (n * side for n, side in zip(config.pos_grid or config.grid, token))
    own = {"num_frames": frames, **({"img_size": height} if height == width else {})}
    if any(own.get(name) != value for name, value in given.items()):
        raise InputError(
            f"{path} says that its weights are of {frames} frames of {height} x {width} pixels, not of "
            f"{_said(given)}; --init-frames and --init-size are for files that do not say"
        )


def at_size(config: ModelConfig, **changes: Any) -> ModelConfig:
    """`config` with `changes` (such as `num_frames`, `img_size`) and without stochastic depth; fixed
    positions stay those of the old grid, interpolated to the new one."""
    grid = config.pos_grid or config.grid
    new = config.replace(**{"pos_grid": None, "drop_path_rate": 0.0, **changes})
    return new if new.learned_pos or grid == new.grid else new.replace(pos_grid=grid)


def _find(state: dict[str, Tensor], ending: str) -> Tensor | None:
    """The encoder's tensor whose name ends so, under any prefix."""
    return next(
        (v for name, v in state.items() if f".{name}".endswith(f".{ending}") and "decoder." not in name),
        None,
    )


def _said(clip: dict[str, int]) -> str:
    return " of ".join(f"{clip[name]} {unit}" for name, unit in _UNITS.items() if name in clip)


def _clip_of(count: int, tubelet: int, patch: int, known: dict[str, int], path: str | Path) -> dict[str, int]:
    """Frames and side of square clips with `count` tokens: with what is known of them, else with a published
    number.

    Raises:
        InputError: there are none.
    """
    published = ({"num_frames": PUBLISHED_FRAMES}, {"img_size": PUBLISHED_SIZE})
    for guess in (known,) if known else published:
        frames, size = guess.get("num_frames", 0), guess.get("img_size", 0)  # 0: not known
        if not size:
            size = math.isqrt(count // max(frames // tubelet, 1)) * patch
        elif not frames:
            frames = count // max((size // patch) ** 2, 1) * tubelet
        if (frames // tubelet) * (size // patch) ** 2 == count:
            return {"num_frames": frames, "img_size": size}
    tried = _said(known) or f"{PUBLISHED_FRAMES} frames or {PUBLISHED_SIZE} pixels"
    raise InputError(
        f"{path} has {count} positions, which are none of square clips of {tried} (tokens of {tubelet} x "
        f"{patch} x {patch} pixels); name both with --init-frames and --init-size"
    )
