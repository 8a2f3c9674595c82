"""Conversion of weights and settings to and from transformers' VideoMAE: `VideoMAEForPreTraining` and
`VideoMAEForVideoClassification`.

Names change, and the weights of q, k and v are split or joined; no number changes. transformers itself is not
needed.

Biases of q and v are written twice, under `q_bias`, `v_bias` (the names on the hub) and under `query.bias`,
`value.bias`. transformers 4.50 to 5.5.0 reads the first, 5.5.1 to 5.17 only the second (it ignores the first
and starts biases from 0), 5.18 and later both. Releases that read one pair report the other as unexpected.
Either pair is read here; a `key.bias`, which 5.5.1 to 5.17 train and save, is left out: softmax does not see
it (it adds the same to a query's product with every key). Releases of each kind are tested
(`tests/checkpoint/test_transformers_releases.py`).

What cannot be expressed there is refused by name: positions that are learned or interpolated, layer scale,
cosine attention. transformers masks the encoder only (VideoMAE V1): the weights of a dual-masked decoder fit,
the masking does not. Its last norms (`fc_norm`, `decoder.norm`) have an epsilon of 1e-5 whatever the settings
say, so results differ from ours by some 1e-5.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae.checkpoint.folder import CONFIG_NAME, export_weights
from vmae.checkpoint.published import load_weights
from vmae.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import parse_json
from vmae.model import Classifier, Pretrainer

PRETRAINING, CLASSIFICATION = "VideoMAEForPreTraining", "VideoMAEForVideoClassification"
SEVERAL_LABELS = "multi_label_classification"  # their `problem_type`
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# Inside a block: ours -> theirs.
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.q_bias": "attention.attention.q_bias",
    "attn.v_bias": "attention.attention.v_bias",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = [f"attention.attention.{part}.weight" for part in ("query", "key", "value")]
# The second name of a bias -> the first.
_BIASES = {
    f"attention.attention.{part}.bias": f"attention.attention.{part[0]}_bias" for part in ("query", "value")
}
_NO_EFFECT = "attention.attention.key.bias"
_EMBEDDING = "videomae.embeddings.patch_embeddings.projection."
# Beginnings of names outside the blocks, ours -> theirs, of each of the two models.
_OUTER = {
    PRETRAINING: {
        "encoder.patch_embed.proj.": _EMBEDDING,
        "encoder.norm.": "videomae.layernorm.",
        "encoder_to_decoder.": "encoder_to_decoder.",
        "mask_token": "mask_token",
        "decoder.norm.": "decoder.norm.",
        "decoder.head.": "decoder.head.",
    },
    CLASSIFICATION: {
        "patch_embed.proj.": _EMBEDDING,
        "fc_norm.": "fc_norm.",
        "norm.": "videomae.layernorm.",
        "head.": "classifier.",
    },
}
_LAYERS = {
    PRETRAINING: {"encoder.blocks.": "videomae.encoder.layer.", "decoder.blocks.": "decoder.decoder_layers."},
    CLASSIFICATION: {"blocks.": "videomae.encoder.layer."},
}


# --- names --------------------------------------------------------------------------------------------------


def to_huggingface(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Tensors under transformers' names, from ours (the published ones); biases of q and v come twice (see
    the module).

    Args:
        state: of a `Pretrainer` (`kind` PRETRAINING) or a `Classifier` (CLASSIFICATION).

    Raises:
        InputError: a tensor that has no place there.
    """
    found: dict[str, Tensor] = {}
    strange = []
    for name, value in state.items():
        renamed = _to_theirs(name, kind)
        if renamed is None:
            strange.append(name)
        elif renamed.endswith("attn.qkv.weight"):
            prefix = renamed.removesuffix("attn.qkv.weight")
            found.update(zip((prefix + part for part in _QKV), value.chunk(3), strict=True))
        else:
            found[renamed] = value
            if second := next((new for new, old in _BIASES.items() if renamed.endswith(old)), None):
                # A copy: files hold no tensor twice.
                found[renamed.removesuffix(_BIASES[second]) + second] = value.clone()
    if strange:
        raise InputError(
            f"transformers' VideoMAE has no place for {', '.join(strange[:8])} ({len(strange)} tensors)"
        )
    return found


def from_huggingface(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Tensors under our names, from transformers'; the inverse of `to_huggingface`.

    Raises:
        InputError: a tensor that is not of this model, a layer that lacks one of query, key and value, or a
            bias whose two names hold different numbers.
    """
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, value in state.items():
        if name.endswith(("position_embeddings", _NO_EFFECT)):  # fixed, recomputed; of no effect
            continue
        for new, old in _BIASES.items():
            name = name.replace(new, old)
        part = next((part for part in _QKV if name.endswith(part)), None)
        renamed = _to_ours(name.removesuffix(part) + "attn.qkv.weight" if part else name, kind)
        if renamed is None:
            strange.append(name)
        elif part:
            parts.setdefault(renamed, {})[part] = value
        elif renamed in found and not _same(found[renamed], value):
            others = ", ".join(_BIASES)
            raise InputError(
                f"{name} and its other name ({others}) hold different numbers: which are the model's?"
            )
        else:
            found[renamed] = value
    if strange:
        raise InputError(f"not tensors of {kind}: {', '.join(strange[:8])} ({len(strange)} in all)")
    for name, own in parts.items():
        if len(own) != 3:
            raise InputError(f"{name}: only {', '.join(sorted(own))} of query, key and value are there")
        found[name] = torch.cat([own[part] for part in _QKV])
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.is_meta:
        return a.shape == b.shape
    return torch.allclose(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def _to_theirs(name: str, kind: str) -> str | None:
    for ours, theirs in _LAYERS[kind].items():
        if match := re.fullmatch(re.escape(ours) + r"(\d+)\.(.+)", name):
            inner = match[2] if match[2] == "attn.qkv.weight" else _swapped(match[2], _BLOCK)
            return None if inner is None else f"{theirs}{match[1]}.{inner}"
    return _swapped(name, _OUTER[kind])


def _to_ours(name: str, kind: str) -> str | None:
    for ours, theirs in _LAYERS[kind].items():
        if match := re.fullmatch(re.escape(theirs) + r"(\d+)\.(.+)", name):
            back = {there: here for here, there in _BLOCK.items()}
            inner = match[2] if match[2] == "attn.qkv.weight" else _swapped(match[2], back)
            return None if inner is None else f"{ours}{match[1]}.{inner}"
    return _swapped(name, {there: here for here, there in _OUTER[kind].items()})


def _swapped(name: str, table: dict[str, str]) -> str | None:
    """`name` with its beginning replaced as the table says; None where none fits."""
    for old, new in table.items():
        if name == old or name.startswith(old if old.endswith(".") else old + "."):
            return new + name.removeprefix(old)
    return None


# --- settings -----------------------------------------------------------------------------------------------


_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "decoder_hidden_size": 384,
    "decoder_intermediate_size": 1536,
}
_ONLY = {"hidden_act": "gelu", "num_channels": 3, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}


def config_to_huggingface(
    config: ModelConfig,
    kind: str,
    *,
    class_names: list[str] | None = None,
    pooling: str = "mean",
    normalize: bool = True,
    multi_label: bool = False,
) -> dict[str, Any]:
    """Content of transformers' `config.json`.

    Raises:
        InputError: a setting that cannot be expressed there.
    """
    refused = [name for name in ("learned_pos", "cos_attn") if getattr(config, name)]
    if config.init_values:
        refused.append("init_values")
    if config.qk_scale is not None:
        refused.append("qk_scale")
    if config.pos_grid not in (None, config.grid):
        refused.append(f"positions of a {config.pos_grid} grid (pos_grid)")
    if pooling == "attentive":
        refused.append(f"pooling {pooling!r}")
    if refused:
        raise InputError(f"transformers' VideoMAE cannot express {', '.join(refused)}")
    height, width = config.image_hw
    values: dict[str, Any] = {
        "architectures": [kind],
        "model_type": "videomae",
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": 3,
        "num_frames": config.num_frames,
        "tubelet_size": config.tubelet_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": config.qkv_bias,
        "use_mean_pooling": kind == CLASSIFICATION and pooling == "mean",
        "decoder_num_attention_heads": config.decoder_num_heads,
        "decoder_hidden_size": config.decoder_embed_dim,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_intermediate_size": int(config.decoder_embed_dim * config.mlp_ratio),
        "norm_pix_loss": normalize,
    }
    if multi_label:
        values["problem_type"] = SEVERAL_LABELS
    if class_names is not None:
        values["id2label"] = {str(number): name for number, name in enumerate(class_names)}
        values["label2id"] = {name: number for number, name in enumerate(class_names)}
    return values


def config_from_huggingface(values: dict[str, Any], what: str = "config.json") -> ModelConfig:
    """`ModelConfig` from the content of `config.json`, with transformers' defaults where a value is missing.

    Raises:
        InputError: not a VideoMAE, or a setting that this code does not have.
    """
    if values.get("model_type") != "videomae":
        raise InputError(f"{what}: model_type is {values.get('model_type')!r}, not 'videomae'")
    get: dict[str, Any] = _DEFAULTS | values
    for name, only in _ONLY.items():
        if get.get(name, only) != only:
            raise InputError(f"{what}: {name} is {get[name]!r}; only {only!r} is supported")
    ratio = get["intermediate_size"] / get["hidden_size"]
    while int(get["hidden_size"] * ratio) < get["intermediate_size"]:  # rounding of the division
        ratio = math.nextafter(ratio, math.inf)
    if int(get["decoder_hidden_size"] * ratio) != get["decoder_intermediate_size"]:
        raise InputError(
            f"{what}: the decoder's intermediate_size has another ratio to its width than the encoder's"
        )
    size = get.get("image_size", 224)
    return ModelConfig(
        img_size=size if isinstance(size, int) else tuple(size),
        patch_size=get.get("patch_size", 16),
        num_frames=get.get("num_frames", 16),
        tubelet_size=get.get("tubelet_size", 2),
        embed_dim=get["hidden_size"],
        depth=get.get("num_hidden_layers", 12),
        num_heads=get.get("num_attention_heads", 12),
        mlp_ratio=ratio,
        qkv_bias=get.get("qv_bias", get.get("qkv_bias", True)),
        layer_norm_eps=get.get("layer_norm_eps", 1e-12),
        decoder_embed_dim=get["decoder_hidden_size"],
        decoder_depth=get.get("decoder_num_hidden_layers", 4),
        decoder_num_heads=get.get("decoder_num_attention_heads", 6),
    )


def processor_settings(config: ModelConfig) -> dict[str, Any]:
    """Content of `preprocessor_config.json`: short side to the model's, central crop, ImageNet's mean and
    deviation."""
    height, width = config.image_hw
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": 2,
    }


# --- folders ------------------------------------------------------------------------------------------------


def save_pretrained(
    model: Pretrainer | Classifier,
    folder: str | Path,
    class_names: list[str] | None = None,
    *,
    multi_label: bool = False,
) -> None:
    """Write a model as a folder that `from_pretrained` of transformers reads.

    Args:
        class_names: of a classifier, by number.
        multi_label: whether its classes do not exclude each other.

    Raises:
        InputError: a setting that cannot be expressed there, or the folder can't be written.
    """
    folder = Path(folder)
    if isinstance(model, Classifier):
        kind = CLASSIFICATION
        class_names = class_names or [f"LABEL_{number}" for number in range(model.num_classes)]
        values = config_to_huggingface(
            model.config, kind, class_names=class_names, pooling=model.pooling, multi_label=multi_label
        )
    else:
        kind = PRETRAINING
        values = config_to_huggingface(
            model.config, kind, class_names=class_names, normalize=model.normalize_target
        )
    state = to_huggingface(model.state_dict(), kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be made: {error.strerror}") from error
    _write_json(folder / CONFIG_NAME, values)
    _write_json(folder / "preprocessor_config.json", processor_settings(model.config))
    export_weights(folder / WEIGHT_FILES[0], state)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text), binary=False)


def is_pretrained(folder: Path) -> bool:
    """Whether this is a folder of transformers (its content may still be of another model, or damaged)."""
    return (folder / CONFIG_NAME).is_file()


def read_pretrained(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of a local folder of transformers, under our names.

    Args:
        folder: holds `config.json` beside `model.safetensors` or `pytorch_model.bin`.

    Returns:
        Settings: `model` (of `ModelConfig`); of a pre-trained model also `normalize_target`, of a classifier
            `num_classes`, `class_names` (None where there are none), `pooling` and `multi_label`.
        Tensors by published name, of a `Pretrainer` or a `Classifier`, whichever `architectures` names.

    Raises:
        InputError: a missing or damaged file, another kind of model, or classes that are not named from 0 on.
    """
    folder = Path(folder)
    file = folder / CONFIG_NAME
    values = _read_json(file)
    settings: dict[str, Any] = {"model": config_from_huggingface(values, str(file)).to_dict()}
    kind = (values.get("architectures") or [None])[0]
    if kind not in _OUTER:
        raise InputError(
            f"{file}: architectures names {kind}; {PRETRAINING} and {CLASSIFICATION} can be read"
        )
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(
            f"{folder} holds none of {', '.join(WEIGHT_FILES)} (weights in several files are not read)"
        )
    state = from_huggingface(load_weights(path), kind)
    if kind == PRETRAINING:
        return {**settings, "normalize_target": values.get("norm_pix_loss", True)}, state
    settings |= {
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "class_names": _class_names(values, file),
        "pooling": "mean" if values.get("use_mean_pooling", True) else "first",
        "multi_label": values.get("problem_type") == SEVERAL_LABELS,
    }
    return settings, state


def _class_names(values: dict[str, Any], file: Path) -> list[str] | None:
    names = values.get("id2label")
    try:
        return [names[str(number)] for number in range(len(names))] if names else None
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: id2label does not name the classes from 0 on: {error!r}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object")
    return values
