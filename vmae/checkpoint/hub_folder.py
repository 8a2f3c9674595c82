"""Files of a folder in the Hugging Face hub's format: weights in one file or several, and `config.json` held
against them.

`config.json` is written by people, and nothing ties it to the weights beside it. So each of its numbers is
checked: its type, and what the tensors' shapes say of the same thing. Names of shards come from a file too:
only plain names of files in the folder are opened.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from vmae.checkpoint.hub_names import INDEX_FILES, WEIGHT_FILES, refuse_pointer, shard_names
from vmae.checkpoint.published import config_from_arch, load_weights
from vmae.checkpoint.shapes import ratio_of
from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.files.json_files import parse_json, why_no_json

# --- files --------------------------------------------------------------------------------------------------


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        InputError: it is missing, cannot be read, or holds anything else.
    """
    try:
        values = parse_json(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        refuse_pointer(path)
        raise InputError(f"{path} is no JSON: {why_no_json(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object")
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of a folder by name, from one file or from the several that an index names.

    Raises:
        InputError: there are none; a file is missing, damaged or a pointer of git LFS; an index names
            anything but files of the folder, or tensors that they do not hold.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            refuse_pointer(folder / name)
            return load_weights(folder / name)
    index = next((folder / name for name in INDEX_FILES if (folder / name).is_file()), None)
    if index is None:
        there = sorted(path.name for path in folder.iterdir())
        raise InputError(
            f"{folder} holds none of {', '.join((*WEIGHT_FILES, *INDEX_FILES))}; it holds "
            f"{', '.join(there[:8])}{', ...' if len(there) > 8 else ''}"
        )
    content = read_object(index)
    names = shard_names(content, index)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(
            f"{folder}: {', '.join(missing[:4])} missing, {len(missing)} of the {len(names)} files that "
            f"{index.name} names: fetch the folder again"
        )
    state: dict[str, Tensor] = {}
    for name in names:
        refuse_pointer(folder / name)
        found = load_weights(folder / name)
        if twice := found.keys() & state.keys():
            raise InputError(f"{folder / name}: {min(twice)} is in another file of {index.name} too")
        state |= found
    if lacking := [name for name in content["weight_map"] if name not in state]:
        raise InputError(
            f"{index} names {len(lacking)} tensors that are in none of its files: {', '.join(lacking[:4])}"
        )
    return state


# --- config.json against the weights ------------------------------------------------------------------------


def shown_by(state: dict[str, Tensor]) -> dict[str, Any]:
    """What tensors under our names (the published ones) say of their architecture.

    Returns:
        Fields of `ModelConfig`, `in_chans`, `hidden` and `decoder_hidden` (of the MLPs), `positions` (of a
        position table), `num_classes` and `pooling` ("mean", "first" or None), as far as the tensors tell.
    """
    prefix = "encoder." if any(name.startswith("encoder.") for name in state) else ""
    found: dict[str, Any] = {}
    weight = state.get(f"{prefix}patch_embed.proj.weight")
    if weight is not None and weight.ndim == 5:
        found |= dict(zip(("embed_dim", "in_chans", "tubelet_size"), weight.shape))
        height, width = weight.shape[3:]
        found["patch_size"] = height if height == width else [height, width]
    for part, where in (("", f"{prefix}blocks"), ("decoder_", "decoder.blocks")):
        numbers = [int(m[1]) for name in state if (m := re.match(rf"{re.escape(where)}\.(\d+)\.", name))]
        if not numbers:
            continue
        found[f"{part}depth"] = max(numbers) + 1
        first = f"{where}.{min(numbers)}."
        if (fc1 := state.get(f"{first}mlp.fc1.weight")) is not None and fc1.ndim == 2:
            found[f"{part}hidden"], found[f"{part}embed_dim"] = fc1.shape
        found[f"{part}qkv_bias"] = f"{first}attn.q_bias" in state
        found[f"{part}init_values"] = f"{first}gamma_1" in state
        found[f"{part}cos_attn"] = f"{first}attn.scale" in state
    if (table := state.get(f"{prefix}pos_embed")) is not None and table.ndim == 3:
        found["positions"] = table.shape[1]
    head = state.get("head.weight")
    found["num_classes"] = head.shape[0] if head is not None and head.ndim == 2 else 0
    found["pooling"] = (
        "mean" if "fc_norm.weight" in state else "first" if f"{prefix}norm.weight" in state else None
    )
    return found


class Fields:
    """Values of `config.json`, each with its type checked and held against what the weights show.

    Args:
        values: the object.
        where: the file, and the place in it, for messages.
        shown: of `shown_by`; {} checks the types alone.
        trust: take what the weights show where a value is not given, not the default.
    """

    def __init__(
        self, values: dict[str, Any], where: str, shown: dict[str, Any] | None = None, *, trust: bool = False
    ) -> None:
        self.values, self.where, self.shown, self.trust = values, where, shown or {}, trust

    def _get(self, name: str, default: Any, field: str) -> Any:
        if name in self.values:
            return self.values[name]
        return self.shown.get(field, default) if self.trust else default

    def _text(self, name: str, value: Any) -> str:
        return (
            f"{name} is {said(value)}" if name in self.values else f"{name} is not given ({said(value)} then)"
        )

    def refuse(self, name: str, value: Any, wrong: str, field: str = "") -> InputError:
        """Error on a value: what it says, what is wrong, and what the weights show of it."""
        shows = f"; the weights show {said(self.shown[field])}" if field in self.shown else ""
        return InputError(f"{self.where}: {self._text(name, value)}, {wrong}{shows}")

    def agree(self, name: str, value: Any, field: str) -> None:
        """Raises InputError where the weights show another value than `value`, the one of `name`."""
        if field in self.shown and self.shown[field] != value:
            raise InputError(
                f"{self.where}: {self._text(name, value)}, the weights show {said(self.shown[field])}"
            )

    def whole(self, name: str, default: int, field: str = "", least: int = 1) -> int:
        """A whole number, `field` of `shown`."""
        value = self._get(name, default, field)
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.refuse(name, value, f"no whole number of at least {least}", field)
        self.agree(name, value, field)
        return value

    def real(self, name: str, default: float, least: float = 0.0) -> float:
        """A finite number above `least`."""
        value = self._get(name, default, "")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.refuse(name, value, "no number")
        if value <= least:
            raise self.refuse(name, value, f"not above {least:g}")
        return float(value)

    def flag(self, name: str, default: bool, field: str = "") -> bool:
        """true or false, `field` of `shown`."""
        value = self._get(name, default, field)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "neither true nor false", field)
        self.agree(name, value, field)
        return value

    def side(self, name: str, default: int) -> int | tuple[int, int]:
        """Side of a clip, or height and width."""
        value = self._get(name, default, "")
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(one) is int for one in value):
            if min(value) < 1:
                raise self.refuse(name, value, "no size")
            return value[0] if value[0] == value[1] else (value[0], value[1])
        return self.whole(name, default)

    def divides(self, small: tuple[str, int], large: tuple[str, int]) -> None:
        """Raises InputError where the first number does not divide the second one; each with its name."""
        if large[1] % small[1]:
            raise InputError(
                f"{self.where}: {large[0]} is {large[1]}, which {small[0]} {small[1]} does not divide"
            )

    def check_clip(
        self, frames: tuple[str, int], tubelet: tuple[str, int], side: tuple[str, Any], patch: tuple[str, int]
    ) -> None:
        """Raises InputError where tubelets do not divide the clips, or the weights hold other positions."""
        self.divides(tubelet, frames)
        sides = side[1] if isinstance(side[1], tuple) else (side[1], side[1])
        for one in sides:
            self.divides(patch, (side[0], one))
        count = frames[1] // tubelet[1] * math.prod(one // patch[1] for one in sides)
        if self.shown.get("positions", count) != count:
            raise InputError(
                f"{self.where}: {frames[0]} {frames[1]} and {side[0]} {said(side[1])} make {count} "
                f"positions, the weights show {self.shown['positions']}"
            )


def said(value: Any) -> str:
    """A value of JSON in a message, as JSON writes it, cut short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- VideoMAEv2-Base, -Large, -Huge, -giant -----------------------------------------------------------------

V2_PREFIX = "model."
# The folders hold encoders: a decoder put behind one is ours.
_NO_DECODER = {
    name: getattr(ModelConfig, name) for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
}
# Arguments that change no number of an encoder at rest.
_IDLE = {
    "num_classes", "drop_rate", "attn_drop_rate", "drop_path_rate", "head_drop_rate", "fc_drop_rate",
    "init_scale", "with_cp", "use_checkpoint", "norm_layer",
}  # fmt: skip
_KNOWN = _IDLE | {
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
    "qk_scale", "layer_norm_eps", "init_values", "use_learnable_pos_emb", "all_frames", "num_frames",
    "tubelet_size", "use_mean_pooling", "cos_attn",
}  # fmt: skip


def is_v2(values: dict[str, Any]) -> bool:
    """Whether a `config.json` is of VideoMAEv2-Base and its like: constructor arguments in `model_config`."""
    kind = values.get("model_type")
    return "model_config" in values or (isinstance(kind, str) and kind.lower().startswith("videomaev2"))


def v2_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the published classifier's names."""
    return {name.removeprefix(V2_PREFIX): value for name, value in state.items()}


def v2_config(values: dict[str, Any], file: Path, state: dict[str, Tensor]) -> tuple[ModelConfig, str]:
    """The architecture that a `config.json` describes, and how tokens are pooled ("mean" or "first").

    Args:
        state: of `v2_names`.

    Raises:
        InputError: a value that is none of its kind, that the weights contradict, or that is not supported.
    """
    arch = values.get("model_config")
    if not isinstance(arch, dict):
        raise InputError(f"{file}: model_config is {said(arch)}, no JSON object")
    if "patch_embed.proj.weight" not in state:
        raise InputError(
            f"{file} is of a VideoMAEv2 encoder, the weights beside it show no patch_embed.proj.weight but "
            f"{', '.join(sorted(state)[:3])}, ..."
        )
    told = Fields(arch, f"{file}: model_config", shown_by(state), trust=True)
    for name in arch.keys() - _KNOWN:
        if arch[name]:
            raise told.refuse(name, arch[name], "an argument that is not known here")
    if not str(arch.get("norm_layer") or "LayerNorm").endswith("LayerNorm"):
        raise told.refuse("norm_layer", arch["norm_layer"], "only LayerNorm is supported")
    told.whole("in_chans", 3, "in_chans")
    told.whole("num_classes", 0, "num_classes", least=0)
    found = {**_v2_clip(told), **_v2_blocks(told)}
    eps = told.real("layer_norm_eps", 1e-6)
    try:
        config = config_from_arch(found).replace(layer_norm_eps=eps, **_NO_DECODER)
    except InputError as error:
        raise InputError(f"{file}: model_config: {error}") from None
    return config, _v2_pooling(told)


def _v2_clip(told: Fields) -> dict[str, Any]:
    """Arguments on clips, tubelets and positions."""
    frames = "all_frames" if "all_frames" in told.values else "num_frames"
    found: dict[str, Any] = {
        "img_size": told.side("img_size", 224),
        "patch_size": told.whole("patch_size", 16, "patch_size"),
        "tubelet_size": told.whole("tubelet_size", 2, "tubelet_size"),
        "all_frames": told.whole(frames, 16),
        "use_learnable_pos_emb": told.flag("use_learnable_pos_emb", False),
    }
    if "num_frames" in told.values and told.whole("num_frames", 16) != found["all_frames"]:
        raise told.refuse("num_frames", told.values["num_frames"], f"but all_frames is {found['all_frames']}")
    if found["use_learnable_pos_emb"] and "positions" not in told.shown:
        raise InputError(f"{told.where}: use_learnable_pos_emb is true, the weights show no pos_embed")
    told.check_clip(
        (frames, found["all_frames"]),
        ("tubelet_size", found["tubelet_size"]),
        ("img_size", found["img_size"]),
        ("patch_size", found["patch_size"]),
    )
    return found


def _v2_blocks(told: Fields) -> dict[str, Any]:
    """Arguments on the blocks."""
    found: dict[str, Any] = {
        "embed_dim": told.whole("embed_dim", 768, "embed_dim"),
        "depth": told.whole("depth", 12, "depth"),
        "num_heads": told.whole("num_heads", 12),
        "qkv_bias": told.flag("qkv_bias", True, "qkv_bias"),
        "cos_attn": told.flag("cos_attn", False, "cos_attn"),
        "qk_scale": None if told.values.get("qk_scale") is None else told.real("qk_scale", 1.0),
    }
    width = found["embed_dim"]
    told.divides(("num_heads", found["num_heads"]), ("embed_dim", width))
    hidden = told.shown.get("hidden")
    if "mlp_ratio" in told.values or hidden is None:
        ratio = told.real("mlp_ratio", 4.0)
        if hidden not in (None, int(width * ratio)):
            raise InputError(
                f"{told.where}: mlp_ratio is {said(ratio)}, {int(width * ratio)} hidden numbers of {width}; "
                f"the weights show {hidden}"
            )
    else:
        ratio = ratio_of(hidden, width)
    scale = told.real("init_values", 0.0, -1.0) if told.values.get("init_values") is not None else 0.0
    if told.shown.get("init_values", scale > 0) != (scale > 0):
        shows = "gamma_1" if told.shown["init_values"] else "no gamma_1"
        raise told.refuse("init_values", scale, f"the weights show {shows}")
    return {**found, "mlp_ratio": ratio, "init_values": scale}


def _v2_pooling(told: Fields) -> str:
    """How tokens are pooled: fc_norm of their mean, or norm and the first one."""
    shown = told.shown["pooling"]
    mean = told.flag("use_mean_pooling", shown != "first")
    if shown != ("mean" if mean else "first"):
        norms = {"mean": "fc_norm", "first": "norm", None: "no last norm"}
        wants = norms["mean" if mean else "first"]
        raise told.refuse("use_mean_pooling", mean, f"which wants {wants}; the weights show {norms[shown]}")
    return "mean" if mean else "first"
