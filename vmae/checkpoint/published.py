"""Files of weights, architectures of the published code, and strict loading that explains every key.

The released checkpoints are `torch.save`d dictionaries whose weights sit under `model` or `module`, beside an
`argparse.Namespace`; those of the published trainer hold its optimizer too. What may be in a file is in
`vmae.checkpoint.pickles`, wrappers and prefixes are in `vmae.checkpoint.names`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmae.checkpoint.content import SAFETENSORS, check_file, check_safetensors, format_of
from vmae.checkpoint.foreign import in_parts, is_optimizer_state, is_part
from vmae.checkpoint.format import read_group, read_manifest
from vmae.checkpoint.names import open_wrappers, rename
from vmae.checkpoint.pickles import read_pickle
from vmae.checkpoint.shapes import describe_shapes, flags_for, shapes_of, shown_by
from vmae.config import MaskConfig, ModelConfig
from vmae.errors import InputError
from vmae.files.json_files import parse_json
from vmae.masking import DECODER_MASKS, ENCODER_MASKS, PUBLISHED_MASKS
from vmae.model.embed import sine_cosine_positions

# Published constructor argument -> ours, of both models; encoder names lose their prefix.
_ARCH_FIELDS = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "encoder_embed_dim": "embed_dim",
    "encoder_depth": "depth",
    "encoder_num_heads": "num_heads",
    "decoder_embed_dim": "decoder_embed_dim",
    "decoder_depth": "decoder_depth",
    "decoder_num_heads": "decoder_num_heads",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "qk_scale": "qk_scale",
    "drop_path_rate": "drop_path_rate",
    "init_values": "init_values",
    "use_learnable_pos_emb": "learned_pos",
    "tubelet_size": "tubelet_size",
    "all_frames": "num_frames",
    "cos_attn": "cos_attn",
}
# Arguments that change nothing here, or that a model must have exactly so.
_ARCH_IGNORED = {
    "with_cp",
    "num_classes",
    "use_mean_pooling",
    "init_scale",
    "head_drop_rate",
    "norm_layer",
    "fc_drop_rate",
}
_ARCH_FIXED = {
    "in_chans": (0, 3),
    "encoder_in_chans": (3,),
    "encoder_num_classes": (0,),
    "drop_rate": (0.0,),
    "attn_drop_rate": (0.0,),
}


def config_from_arch(arch: dict[str, Any], what: str = "arch") -> ModelConfig:
    """The `ModelConfig` of the published constructors' arguments, with their defaults where one is missing.

    Raises:
        InputError: an argument that is not known, or whose value is not supported, by name.
    """
    # Defaults of the published constructors; depth and heads of the decoder differ from our presets'.
    values: dict[str, Any] = dict(qkv_bias=False, decoder_depth=8, decoder_num_heads=8, decoder_embed_dim=512)
    for key, value in arch.items():
        if key in _ARCH_FIELDS:
            values[_ARCH_FIELDS[key]] = value
        elif key in _ARCH_FIXED:
            if value not in _ARCH_FIXED[key]:
                raise InputError(f"{what}: {key}={value!r} is not supported; only {_ARCH_FIXED[key]}")
        elif key not in _ARCH_IGNORED and key != "decoder_num_classes":
            raise InputError(f"{what}: unknown argument {key}={value!r}")
    config = ModelConfig.from_dict(values)
    expected = arch.get("decoder_num_classes", config.tubelet_pixels)
    if expected != config.tubelet_pixels:
        raise InputError(
            f"{what}: decoder_num_classes={expected} but a tubelet has {config.tubelet_pixels} values"
        )
    return config


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file or of a training checkpoint's folder; see `read_settings_and_weights`."""
    return read_settings_and_weights(path)[1]


def read_settings_and_weights(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of `read_weights`."""
    return read_weights(path)[:2]


def read_weights(
    path: str | Path, averaged: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """What a file of weights, or a training checkpoint's folder, says of itself, and its tensors.

    The format is told by the content: torch's zip and older pickle, or safetensors.

    Args:
        averaged: the averaged weights that a file of a published trainer holds beside the others.

    Returns:
        The settings that a file written here was trained with; of a published one what the arguments of its
            training tell: `published` (`num_frames` and `img_size`), `clip`, or `stride`, `mask` and
            `normalize_target`; else nothing.
        Tensors by published name, on the CPU, in the file's dtype, without wrappers and prefixes.
        Lines on what was done to get these names, see `vmae.checkpoint.names`.

    Raises:
        InputError: the file cannot be read, is none of weights, or holds no tensors.
    """
    path = Path(path)
    if path.is_dir():
        settings, content = read_manifest(path).get("config"), read_group(path)
        return known_settings(settings), content, ()
    check_file(path)
    if is_part(path):
        raise InputError(in_parts(path))
    if is_optimizer_state(path):
        raise InputError(
            f"{path} holds an optimizer's state, no weights: give mp_rank_00_model_states.pt beside it, or "
            "the folder"
        )
    kind = format_of(path)
    if kind == SAFETENSORS:
        whole, settings = _load_safetensors(path)
    else:
        whole = read_pickle(path, kind)
        settings = _settings_of(whole)
    inner, opened = open_wrappers(whole, path, averaged)
    state, renamed = rename(inner, path)
    if not state:
        raise InputError(f"checkpoint {path} holds no weights of these models: {'; '.join(renamed)}")
    if any(value.numel() == 0 for value in state.values()):
        raise InputError(in_parts(path))
    ours = known_settings(settings)
    told = [f"told by the arguments of its training: {_said(ours)}"] if "published" in ours else []
    lines = (*(() if "model" in ours else opened), *renamed, *told, *_describe_dtypes(state))
    return ours, state, lines


def _said(told: dict[str, Any]) -> str:
    """The settings that a published training's arguments tell, in words."""
    pairs = {**told["published"], **told.get("clip", {}), **told.get("mask", {})}
    pairs |= {name: told[name] for name in ("stride", "normalize_target") if name in told}
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


def _describe_dtypes(state: dict[str, Tensor]) -> list[str]:
    """A line on tensors that are not float32, as models here are.

    Raises:
        InputError: weights as integers, which stand for other numbers.
    """
    counts = Counter(str(value.dtype).removeprefix("torch.") for value in state.values())
    whole = [
        name for name, value in state.items() if name.endswith(".weight") and not value.is_floating_point()
    ]
    if whole:
        raise InputError(
            f"the weight {whole[0]} is of {state[whole[0]].dtype}: quantised weights are not read, give "
            "those they were made from"
        )
    counts.pop("float32", None)
    return [f"{count} tensors of {dtype}; models here hold float32" for dtype, count in counts.items()]


def _settings_of(content: Any) -> Any:
    """What a dictionary of torch.save says of its training."""
    if not isinstance(content, dict):
        return None
    return known_settings(content.get("config")) or _published(content.get("args"))


def known_settings(settings: Any) -> dict[str, Any]:
    """`settings` if they are a run's or a published training's, else nothing."""
    known = isinstance(settings, dict) and (
        isinstance(settings.get("model"), dict) or "published" in settings
    )
    return settings if known else {}


def _published(args: Any) -> dict[str, Any]:
    """What the arguments of a published training tell: `published` (frames and side of its clips); of
    fine-tuning `clip` (how videos were seen), of pre-training `stride`, `mask` and `normalize_target`."""
    own = vars(args) if isinstance(args, argparse.Namespace) else {}
    found = {"num_frames": own.get("num_frames"), "img_size": own.get("input_size")}
    if isinstance(found["num_frames"], int) and isinstance(own.get("num_segments", 1), int):
        found["num_frames"] *= own.get("num_segments", 1)
    found = {name: value for name, value in found.items() if isinstance(value, int) and value > 0}
    if not found:
        return {}
    told: dict[str, Any] = {"published": found}
    stride = own.get("sampling_rate")
    stride = stride if isinstance(stride, int) and 0 < stride <= 1000 else None
    if "nb_classes" in own:
        if stride is not None:
            # Its readers of SSv2 sample sparsely whatever the flag says.
            sparse = own.get("sparse_sample") is True or own.get("data_set") == "SSV2"
            told["clip"] = {"sampling": "sparse" if sparse else "dense", "stride": stride}
        return told
    if stride is not None:
        told["stride"] = stride
    if isinstance(own.get("normlize_target"), bool):  # so spelt there
        told["normalize_target"] = own["normlize_target"]
    return told | _published_mask(own)


def _published_mask(own: dict[str, Any]) -> dict[str, Any]:
    """`mask` of a published pre-training; without a decoder's (VideoMAE V1) all hidden tokens are decoded."""
    encoder, decoder = (
        PUBLISHED_MASKS.get(kind, kind) if isinstance(kind := own.get(key), str) else ""
        for key in ("mask_type", "decoder_mask_type")
    )
    if encoder not in ENCODER_MASKS:
        return {}
    mask = {"encoder": encoder, "encoder_ratio": own.get("mask_ratio")}
    if decoder in DECODER_MASKS:
        mask |= {"decoder": decoder, "decoder_ratio": own.get("decoder_mask_ratio")}
    else:
        mask["decoder_ratio"] = 0.0
    try:
        return {"mask": MaskConfig.from_dict(mask).to_dict()}
    except InputError:  # numbers that are no shares
        return {}


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors, and `config` of the metadata."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise InputError(f"reading {path} needs the safetensors package: pip install safetensors") from error
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            config = (file.metadata() or {}).get("config", "null")
            return {name: file.get_tensor(name) for name in file.keys()}, parse_json(config)
    except Exception as error:
        raise InputError(f"checkpoint {path} cannot be read: {error}") from error


def load_into(
    model: nn.Module,
    state: dict[str, Tensor],
    path: str | Path,
    *,
    allow_encoder_only: bool = False,
    left_out: Collection[str] = (),
) -> str:
    """Load `state` into `model`, strictly, and say in a line what was done.

    With `allow_encoder_only`, a file that holds all of the encoder and nothing of the decoder is accepted
    too, and the rest of the model keeps its fresh weights. So do the tensors `left_out`, whatever the file
    has under these names.

    Raises:
        InputError: keys that are missing or left over, or shapes that differ: all of them, by name (the first
            of each).
    """
    own = model.state_dict()
    state = _fixed_tables_dropped(state, own, path)
    fresh: list[str] = []
    if allow_encoder_only and not any(name.startswith("decoder.") for name in state):
        fresh = [name for name in own if name not in state and not name.startswith("encoder.")]
    if "head.weight" in state and "encoder_to_decoder.weight" in own:
        raise InputError(
            f"{path} is of a classifier; pre-training goes on from pre-trained weights (encoder.*)"
        )
    state = {name: value for name, value in state.items() if name not in left_out}
    kept = {*fresh, *left_out}
    wanted = {name: value.shape for name, value in own.items() if name not in kept}
    check_shapes(wanted, shapes_of(state), path)
    model.load_state_dict(state, strict=not kept)
    if fresh:
        return f"{path}: encoder loaded; the file has no decoder, so {len(fresh)} other tensors start fresh"
    return f"{path}: {'' if left_out else 'all '}{len(state)} tensors loaded"


def check_shapes(own: dict[str, torch.Size], found: dict[str, torch.Size], path: str | Path) -> None:
    """Raises InputError unless the tensors `found` in a file are those of the model, by name and shape."""
    missing = [name for name in own if name not in found]
    extra = [name for name in found if name not in own]
    differing = [
        f"{name}: {list(found[name])} in the file, {list(shape)} in the model"
        for name, shape in own.items()
        if name in found and found[name] != shape
    ]
    if tokens := [name for name in extra if name.rpartition(".")[2] == "cls_token"]:
        raise InputError(
            f"checkpoint {path} has a class token ({tokens[0]}), which models of VideoMAE do not have: it is "
            "of another kind of model"
        )
    if missing or extra or differing:
        raise InputError(_mismatch(path, missing, extra, differing) + _hint(own, found))


def _hint(own: dict[str, torch.Size], found: dict[str, torch.Size]) -> str:
    """A line on the architecture that a file shows, where it is another than the model's."""
    if found and all("." in name for name in found) and any(name.startswith("videomae.") for name in found):
        return "\n  its names are those of transformers: give its folder, with config.json"
    theirs = shown_by(found)
    if not theirs or theirs == shown_by(own):
        return ""
    return f"\n  {describe_shapes(theirs)}; flags that fit it: {flags_for(theirs, shown_by(own))}"


def _fixed_tables_dropped(
    state: dict[str, Tensor], own: dict[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """`state` without fixed position tables, which some files carry and this code recomputes."""
    tables = [name for name in state if name.rsplit(".", 1)[-1] == "pos_embed" and name not in own]
    for name in tables:
        check_fixed(state[name], f"{name} of checkpoint {path}")
    return {name: value for name, value in state.items() if name not in tables}


def check_fixed(table: Tensor, what: str) -> None:
    """Raises InputError where a position table that a model with fixed positions would drop was learned."""
    if not is_fixed_table(table):
        raise InputError(
            f"{what} was learned, but the model has fixed positions (learned_pos is false): it would get lost"
        )


def is_fixed_table(table: Tensor) -> bool:
    """Whether positions [1, N, D] are the sine-cosine table, as far as a half-precision file can tell."""
    if table.ndim != 3 or table.shape[0] != 1:
        return False
    return torch.allclose(table.float(), sine_cosine_positions(*table.shape[1:]), rtol=0, atol=5e-3)


def _mismatch(
    path: str | Path, missing: list[str], extra: list[str], differing: list[str], limit: int = 8
) -> str:
    lines = [f"checkpoint {path} is of another architecture:"]
    for title, names in (
        ("shapes differ", differing),
        ("missing in the file", missing),
        ("not in the model", extra),
    ):
        if names:
            more = f" ... and {len(names) - limit} more" if len(names) > limit else ""
            lines.append(f"  {title} ({len(names)}): " + "; ".join(names[:limit]) + more)
    return "\n".join(lines)
