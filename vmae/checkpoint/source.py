"""Which model a file's weights are of, and of what clips: what the file says, what its tensors show, what the
caller gives.

Files written here say all of it. Published ones hold tensors, and sometimes the arguments of their training,
which tell frames and size; so does a position table, by its length. Weights with fixed sine-cosine positions
and nothing else fit clips of any size: then the caller's word counts, else 16 frames of 224 pixels, and a
note says so.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from vmae.checkpoint.published import is_fixed_table
from vmae.config import PUBLISHED_CLASSIFIERS, PUBLISHED_MODELS, ModelConfig
from vmae.errors import InputError

PUBLISHED_FRAMES, PUBLISHED_SIZE = 16, 224
_UNITS = {"num_frames": "frames", "img_size": "pixels"}


def source_config(
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    path: str | Path,
    preset: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    **overrides: Any,
) -> tuple[ModelConfig, str]:
    """The model that a file's weights are of, with the frames and size of their clips.

    Args:
        settings, tensors: of the file, see `read_settings_and_weights`.
        path: for messages.
        preset: name of the architecture, ours or the published one, for files that do not hold it.
        frames, size: of the weights' clips, where the caller knows (--init-frames, --init-size).
        overrides: fields that differ from the preset's.

    Returns:
        The settings, and a line on what was taken for granted; empty where all is known.

    Raises:
        InputError: an architecture that nobody names, clips that the file contradicts, or positions of none
            of such clips.
    """
    given = {name: value for name, value in (("num_frames", frames), ("img_size", size)) if value is not None}
    if "model" in settings:
        config = ModelConfig.from_dict(settings["model"])
        frames, height, width = (n * side for n, side in zip(config.pos_grid or config.grid, _token(config)))
        if given.items() - {"num_frames": frames, "img_size": height if height == width else None}.items():
            raise InputError(
                f"{path} says that its weights are of {frames} frames of {height} x {width} pixels, not of "
                f"{_said(given)}; "
                "--init-frames and --init-size are for files that do not say"
            )
        return config, ""
    if preset is None:
        raise InputError(f"{path} does not say which architecture it is of; name it with --model")
    name = {**PUBLISHED_CLASSIFIERS, **PUBLISHED_MODELS}.get(preset, preset)
    weight, table = _find(tensors, "patch_embed.proj.weight"), _find(tensors, "pos_embed")
    shown = (
        {"tubelet_size": weight.shape[2], "patch_size": weight.shape[3]}
        if weight is not None and weight.ndim == 5
        else {}
    )
    known, note = settings.get("published", {}) | given, ""
    clip = {"num_frames": PUBLISHED_FRAMES, "img_size": PUBLISHED_SIZE, **known}
    if table is not None:
        size = {**vars(ModelConfig.preset(name)), **shown}
        clip = _clip_of(table.shape[1], size["tubelet_size"], size["patch_size"], known, path)
        shown["learned_pos"] = not is_fixed_table(table)
        note = f"its {table.shape[1]} positions are taken as those of "
    elif len(known) < 2:
        note = "it does not say the frames and size of its clips, taken as "
    if len(known) == 2:
        note = ""
    note = note and f"{path}: {note}{_said(clip)} (--init-frames and --init-size say otherwise)"
    return ModelConfig.preset(name, **overrides, **shown, **clip), note


def at_size(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The same model for other clips, to test with; fixed positions stay those of the source's grid,
    interpolated."""
    grid = config.pos_grid or config.grid
    new = config.replace(**{"pos_grid": None, "drop_path_rate": 0.0, **changes})
    return new if new.learned_pos or grid == new.grid else new.replace(pos_grid=grid)


def _find(tensors: dict[str, Tensor], ending: str) -> Tensor | None:
    """Of the encoder, whatever stands before its name."""
    return next(
        (v for name, v in tensors.items() if f".{name}".endswith(f".{ending}") and "decoder." not in name),
        None,
    )


def _token(config: ModelConfig) -> tuple[int, int, int]:
    """Frames, and pixels along height and width, of a token."""
    return config.tubelet_size, config.patch_size, config.patch_size


def _said(clip: dict[str, int]) -> str:
    return " of ".join(f"{clip[name]} {unit}" for name, unit in _UNITS.items() if name in clip)


def _clip_of(count: int, tubelet: int, patch: int, known: dict[str, int], path: str | Path) -> dict[str, int]:
    """Frames and side of square clips with `count` tokens: with what is known of them, else with a published
    number.

    Raises:
        InputError: there are none.
    """
    for guess in (known,) if known else ({"num_frames": PUBLISHED_FRAMES}, {"img_size": PUBLISHED_SIZE}):
        frames, size = guess.get("num_frames"), guess.get("img_size")
        if size is None:
            size = math.isqrt(count // max(frames // tubelet, 1)) * patch
        elif frames is None:
            frames = count // max((size // patch) ** 2, 1) * tubelet
        if (frames // tubelet) * (size // patch) ** 2 == count:
            return {"num_frames": frames, "img_size": size}
    tried = _said(known) or f"{PUBLISHED_FRAMES} frames or {PUBLISHED_SIZE} pixels"
    raise InputError(
        f"{path} has {count} positions, which are none of square clips of {tried} (tokens of {tubelet} x "
        f"{patch} x {patch} "
        "pixels); name both with --init-frames and --init-size"
    )
