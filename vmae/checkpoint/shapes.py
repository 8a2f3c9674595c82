"""The architecture that a file's tensors show by their names and shapes, and the preset that it is.

Shapes tell everything but the number of heads (with cosine attention that too).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vmae.config import PRESETS, USUAL_MODEL, ModelConfig
from vmae.errors import InputError

# Fields that a preset or the caller decides, and that a file may contradict.
DECIDED = ("embed_dim", "depth", "num_heads", "mlp_ratio")
ARCHITECTURE = (*DECIDED, "patch_size", "tubelet_size", "qkv_bias", "init_values", "cos_attn")
_WORDS = {
    "embed_dim": "a width of {}",
    "depth": "{} blocks",
    "num_heads": "{} heads",
    "mlp_ratio": "an MLP ratio of {}",
    "decoder_embed_dim": "a decoder's width of {}",
    "decoder_depth": "a decoder of {} blocks",
    "patch_size": "patches of {} pixels",
    "tubelet_size": "tubelets of {} frames",
    "qkv_bias": "qkv biases: {}",
    "init_values": "layer scale: {}",
    "cos_attn": "cosine attention: {}",
}
SCALE = 1e-5  # `init_values` of a file with layer scale: any above 0 would do, the scales are loaded
Shapes = Mapping[str, torch.Size]


def shapes_of(state: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def shown_by(shapes: Shapes) -> dict[str, Any]:
    """Fields of `ModelConfig` that tensors of these names and shapes show; none of what they do not."""
    prefix = "encoder." if any(name.startswith("encoder.") for name in shapes) else ""
    found: dict[str, Any] = {}
    embedding = shapes.get(f"{prefix}patch_embed.proj.weight")
    if embedding is not None and len(embedding) == 5:
        found |= {"embed_dim": embedding[0], "tubelet_size": embedding[2], "patch_size": embedding[3]}
    depth = _blocks(shapes, f"{prefix}blocks.")
    block = f"{prefix}blocks.0."
    hidden, qkv = shapes.get(f"{block}mlp.fc1.weight"), shapes.get(f"{block}attn.qkv.weight")
    if depth and hidden is not None and qkv is not None:
        found |= {
            "embed_dim": hidden[1],
            "depth": depth,
            "mlp_ratio": _ratio(hidden[0], hidden[1]),
            "qkv_bias": f"{block}attn.q_bias" in shapes,
            "cos_attn": f"{block}attn.scale" in shapes,
            "init_values": SCALE if f"{block}gamma_1" in shapes else 0.0,
        }
        if found["cos_attn"]:
            found["num_heads"] = shapes[f"{block}attn.scale"].numel()
    if (bridge := shapes.get("encoder_to_decoder.weight")) is not None and len(bridge) == 2:
        found |= {"decoder_embed_dim": bridge[0], "decoder_depth": _blocks(shapes, "decoder.blocks.")}
    return found


def _blocks(shapes: Shapes, prefix: str) -> int:
    numbers = {match[1] for name in shapes if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    return len(numbers)


def _ratio(hidden: int, width: int) -> float:
    """The MLP ratio, as a preset writes it where one gives the same `hidden`."""
    known = [values.get("mlp_ratio", ModelConfig.mlp_ratio) for values in PRESETS.values()]
    if (found := next((ratio for ratio in known if int(width * ratio) == hidden), None)) is not None:
        return found
    return ratio_of(hidden, width)


def ratio_of(hidden: int, width: int) -> float:
    """The ratio whose product with `width`, rounded down, is `hidden`."""
    ratio = hidden / width
    while int(width * ratio) < hidden:  # rounding of the division
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def contradictions(config: ModelConfig, shown: Mapping[str, Any], fields: tuple[str, ...]) -> list[str]:
    """What a file shows otherwise than `config`, in words."""
    found = []
    for name in fields:
        if name not in shown:
            continue
        own, seen = getattr(config, name), shown[name]
        if name == "init_values":
            own, seen = own > 0, seen > 0
        if own != seen:
            found.append(f"{_WORDS[name].format(_said(seen))} instead of {_said(own)}")
    return found


def _said(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:.6g}"


def fitting_presets(shown: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> list[str]:
    """Names of the presets (with `overrides`) whose encoder has the shapes that a file shows."""
    if not {"embed_dim", "depth", "mlp_ratio"} <= shown.keys():
        return []
    return [name for name in PRESETS if _fits(name, shown, overrides or {})]


def _fits(name: str, shown: Mapping[str, Any], overrides: Mapping[str, Any]) -> bool:
    given = {"cos_attn": False, **PRESETS[name]}
    if given["cos_attn"] != shown.get("cos_attn", False) and "cos_attn" in PRESETS[name]:
        return False  # a preset that has it by its name
    try:
        config = ModelConfig.preset(name, **overrides)
    except InputError:  # the overrides do not fit this one
        return False
    return not contradictions(config, shown, DECIDED)


def preset_of(shown: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> str | None:
    """The preset that a file's shapes are of; None where none is, or nothing tells which."""
    found = fitting_presets(shown, overrides)
    if len(found) > 1 and overrides:
        return USUAL_MODEL if USUAL_MODEL in found else found[0]
    return found[0] if len(found) == 1 else None


def describe_shapes(shown: Mapping[str, Any]) -> str:
    """What a file shows of its encoder, in words, with the preset's name where one fits."""
    words = [_WORDS[name].format(_said(shown[name])) for name in DECIDED if name in shown]
    if not words:
        return "it shows no encoder of these models"
    name = preset_of(shown)
    return f"it shows {', '.join(words)}: " + (f"those of {name}" if name else "no preset's")


_FLAGS = {
    "embed_dim": "--embed-dim",
    "depth": "--depth",
    "mlp_ratio": "--mlp-ratio",
    "patch_size": "--patch-size",
    "tubelet_size": "--tubelet-size",
    "decoder_embed_dim": "--decoder-embed-dim",
    "decoder_depth": "--decoder-depth",
    "init_values": "--layer-scale",
    "qkv_bias": "--qkv-bias",
    "cos_attn": "--cos-attn",
}


def flags_for(shown: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Flags for a model of what a file shows, where the `model` at hand shows otherwise."""
    preset, words, base = preset_of(shown), [], dict(model)
    if preset is not None and any(shown.get(name) != model.get(name) for name in DECIDED):
        words, base = [f"--model {preset}"], vars(ModelConfig.preset(preset))
    for name, flag in _FLAGS.items():
        if name in shown and base.get(name) != shown[name]:
            yes, no = flag, flag.replace("--", "--no-")
            value = shown[name]
            words.append((no, yes)[value] if isinstance(value, bool) else f"{flag} {value:.12g}")
    return " ".join(words)


def check_preset(
    path: str | Path,
    preset: str,
    overrides: Mapping[str, Any],
    shown: Mapping[str, Any],
) -> None:
    """Raises InputError where a file's shapes contradict the named preset, or what was asked for beside it;
    the message names the preset that fits."""
    config = ModelConfig.preset(preset, **overrides)
    fields = (*DECIDED, *(name for name in overrides if name not in DECIDED and name in _WORDS))
    if wrong := contradictions(config, shown, fields):
        fitting = preset_of(shown)
        remedy = f"take --model {fitting}" if fitting and fitting != preset else "no preset has such shapes"
        if fitting == preset:
            remedy = "leave out what the file shows by itself"
        raise InputError(
            f"{path} is of another architecture than {preset}: it has {', '.join(wrong)}; {remedy}"
        )
