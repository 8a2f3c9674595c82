"""Conversion of weights and settings to and from transformers' VideoMAE: `VideoMAEForPreTraining` and
`VideoMAEForVideoClassification`; and reading of all folders of the hub's format: these, the bare
`VideoMAEModel`, and VideoMAEv2-Base, -Large, -Huge and -giant (the published classifier without a head).

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
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae.checkpoint.folder import CONFIG_NAME, export_weights
from vmae.checkpoint.hub_folder import (
    Fields,
    is_v2,
    read_object,
    read_weights,
    said,
    shown_by,
    v2_config,
    v2_names,
)
from vmae.checkpoint.hub_names import PROCESSOR, WEIGHT_FILES
from vmae.checkpoint.shapes import ratio_of
from vmae.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.model import Classifier, Pretrainer

PRETRAINING, CLASSIFICATION = "VideoMAEForPreTraining", "VideoMAEForVideoClassification"
BARE, _BASE = "VideoMAEModel", "videomae."  # the encoder alone, whose names lack the prefix of the others
SEVERAL_LABELS = "multi_label_classification"  # their `problem_type`
_LOG = logging.getLogger(__name__)

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
    if not config.has_imagenet_pixels:
        refused.append(f"{config.in_channels} channels with statistics of their own (in_channels)")
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


def config_from_huggingface(
    values: dict[str, Any], what: str = "config.json", shown: dict[str, Any] | None = None
) -> ModelConfig:
    """`ModelConfig` from the content of `config.json`, with transformers' defaults where a value is missing.

    Args:
        shown: what the weights show of the same, see `shown_by`.

    Raises:
        InputError: not a VideoMAE, a setting that this code does not have, a value that is none of its kind,
            or one that the weights contradict.
    """
    if values.get("model_type") != "videomae":
        raise InputError(f"{what}: model_type is {values.get('model_type')!r}, not 'videomae'")
    for name, only in _ONLY.items():
        if values.get(name, only) != only:
            raise InputError(f"{what}: {name} is {values[name]!r}; only {only!r} is supported")
    told = Fields(values, what, shown)
    told.agree("num_channels", 3, "in_chans")
    image, frames = told.side("image_size", 224), told.whole("num_frames", 16)
    patch, tubelet = told.whole("patch_size", 16, "patch_size"), told.whole("tubelet_size", 2, "tubelet_size")
    told.check_clip(
        ("num_frames", frames), ("tubelet_size", tubelet), ("image_size", image), ("patch_size", patch)
    )
    width, heads, ratio = _widths(told, "", "hidden_size")
    decoder_width, decoder_heads, _ = _widths(told, "decoder_", "decoder_hidden_size", ratio)
    try:
        return ModelConfig(
            img_size=image,
            patch_size=patch,
            num_frames=frames,
            tubelet_size=tubelet,
            embed_dim=width,
            depth=told.whole("num_hidden_layers", 12, "depth"),
            num_heads=heads,
            mlp_ratio=ratio,
            qkv_bias=told.flag("qv_bias" if "qv_bias" in values else "qkv_bias", True, "qkv_bias"),
            layer_norm_eps=told.real("layer_norm_eps", 1e-12),
            decoder_embed_dim=decoder_width,
            decoder_depth=told.whole("decoder_num_hidden_layers", 4, "decoder_depth"),
            decoder_num_heads=decoder_heads,
        )
    except InputError as error:
        raise InputError(str(error) if what in str(error) else f"{what}: {error}") from None


def _widths(told: Fields, part: str, name: str, ratio: float | None = None) -> tuple[int, int, float]:
    """Width, heads and MLP ratio of the encoder (`part` "") or of the decoder ("decoder_"), whose ratio is
    the encoder's `ratio`."""
    width = told.whole(name, _DEFAULTS[name], f"{part}embed_dim")
    heads = told.whole(f"{part}num_attention_heads", 6 if part else 12)
    told.divides((f"{part}num_attention_heads", heads), (name, width))
    hidden = told.whole(f"{part}intermediate_size", _DEFAULTS[f"{part}intermediate_size"], f"{part}hidden")
    if ratio is None:
        return width, heads, ratio_of(hidden, width)
    if int(width * ratio) != hidden:
        raise InputError(
            f"{told.where}: the decoder's intermediate_size has another ratio to its width than the encoder's"
        )
    return width, heads, ratio


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
    """Whether this is a folder of the hub's format (its content may be of another model, or damaged)."""
    return (folder / CONFIG_NAME).is_file()


def read_pretrained(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of a local folder of the hub's format, under our names.

    Remote code that `auto_map` names is neither executed nor needed; a line says so.

    Args:
        folder: holds `config.json` beside `model.safetensors` or `pytorch_model.bin`, or beside the several
            files that an index names.

    Returns:
        Settings: `model` (of `ModelConfig`); of a pre-trained model also `normalize_target`, of a classifier
            `num_classes`, `class_names` (None where there are none), `pooling` and `multi_label`.
        Tensors by published name: of a `Pretrainer`, of its encoder (`VideoMAEModel`), or of a `Classifier`.

    Raises:
        InputError: a missing or damaged file, another kind of model, a value that is none of its kind or that
            the weights contradict, or classes that are not named from 0 on.
    """
    folder = Path(folder)
    file = folder / CONFIG_NAME
    values = read_object(file)
    settings, state = (_read_v2 if is_v2(values) else _read_transformers)(values, file)
    if values.get("auto_map"):
        _LOG.info("note: %s: auto_map names code of its own: not executed, nor needed", file)
    _compare_processor(folder)
    return settings, state


def _read_v2(values: dict[str, Any], file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = v2_names(read_weights(file.parent))
    config, pooling = v2_config(values, file, state)
    return {"model": config.to_dict(), **_about_classes(values, file, state), "pooling": pooling}, state


def _read_transformers(values: dict[str, Any], file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if values.get("model_type") != "videomae":
        config_from_huggingface(values, str(file))  # says so
    kind = _named(values, file)
    weights = read_weights(file.parent)
    shows = _kind_shown(weights)
    if kind not in (None, shows):
        raise InputError(f"{file}: architectures names {kind}, the weights show {shows}")
    if shows == BARE:
        if not any(name.startswith(_BASE) for name in weights):
            weights = {_BASE + name: value for name, value in weights.items()}
        state = from_huggingface(weights, CLASSIFICATION)
    else:
        state = from_huggingface(weights, shows)
    table = next(
        (v for name, v in weights.items() if name.endswith("position_embeddings") and v.ndim == 3), None
    )
    shown = shown_by(state) | ({} if table is None else {"positions": table.shape[1]})
    settings: dict[str, Any] = {"model": config_from_huggingface(values, str(file), shown).to_dict()}
    told = Fields(values, str(file), shown)
    if shows == PRETRAINING:
        return {**settings, "normalize_target": told.flag("norm_pix_loss", True)}, state
    mean = told.flag("use_mean_pooling", True)
    if shows == BARE and "norm.weight" in state:  # as the encoder of a pre-trained model
        return settings, {f"encoder.{name}": value for name, value in state.items()}
    if shows == CLASSIFICATION and shown["pooling"] != ("mean" if mean else "first"):
        norms = {"mean": "fc_norm", "first": "videomae.layernorm", None: "no last norm"}
        raise InputError(
            f"{file}: use_mean_pooling is {said(mean)}, the weights show {norms[shown['pooling']]}"
        )
    return {**settings, **_about_classes(values, file, state), "pooling": "mean" if mean else "first"}, state


def _named(values: dict[str, Any], file: Path) -> str | None:
    """The class that `architectures` names, if any."""
    names = values.get("architectures")
    if not names:
        return None
    kind = names[0] if isinstance(names, list) else names
    if kind not in (PRETRAINING, CLASSIFICATION, BARE):
        raise InputError(
            f"{file}: architectures names {said(kind)}; {PRETRAINING}, {CLASSIFICATION} and {BARE} can be "
            "read"
        )
    return kind


def _kind_shown(weights: dict[str, Tensor]) -> str:
    """The class that has tensors of these names."""
    if any(name.startswith("decoder.") for name in weights):
        return PRETRAINING
    return CLASSIFICATION if any(name.startswith(("classifier.", "fc_norm.")) for name in weights) else BARE


def _about_classes(values: dict[str, Any], file: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Settings on the classes of a head."""
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    names = _class_names(values, file) if classes else None
    if names is not None and len(names) != classes:
        raise InputError(f"{file}: id2label names {len(names)} classes, the weights show {classes}")
    multi_label = values.get("problem_type") == SEVERAL_LABELS
    return {"num_classes": classes, "class_names": names, "multi_label": multi_label}


def _class_names(values: dict[str, Any], file: Path) -> list[str] | None:
    names = values.get("id2label")
    try:
        return [str(names[str(number)]) for number in range(len(names))] if names else None
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: id2label does not name the classes from 0 on: {error!r}") from None


def _compare_processor(folder: Path) -> None:
    """Say so where the folder's images were normalised otherwise than they are here."""
    file = folder / PROCESSOR
    if not file.is_file():
        return
    values = read_object(file)
    for name, ours in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        theirs = values.get(name)
        if theirs is not None and theirs != list(ours):
            _LOG.warning(
                "note: %s: %s is %s; here it is ImageNet's, %s", file, name, said(theirs), list(ours)
            )
