"""What a checkpoint is, which architecture its shapes fit, what can be done with it, and what becomes of each
of its tensors. For `vmae weights inspect`.

The answers come from the code that loads: the same reader, and the same strict loading into models on torch's
meta device, which take no memory.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae.checkpoint.folder import CONFIG_NAME, find_weights
from vmae.checkpoint.format import is_checkpoint
from vmae.checkpoint.huggingface import CLASSIFICATION, PRETRAINING, from_huggingface
from vmae.checkpoint.models import check_pixels, head_classes, kind_of, start_pretrainer
from vmae.checkpoint.outline import Outline, TensorOutline, read_outline
from vmae.checkpoint.published import is_fixed_table
from vmae.checkpoint.shapes import DECIDED, contradictions, fitting_presets, shapes_of, shown_by
from vmae.checkpoint.source import HEAD, Source, read_checkpoint
from vmae.checkpoint.start import start_classifier
from vmae.config import MODEL, PRESETS, ModelConfig
from vmae.data.labels import HEAD_NAMES
from vmae.errors import InputError
from vmae.files.json_files import parse_json
from vmae.model import build_classifier, build_pretrainer

# Heads of published classifiers: classes -> data.
PUBLISHED_HEADS = {
    710: "Kinetics-710",
    700: "Kinetics-700",
    600: "Kinetics-600",
    400: "Kinetics-400",
    174: "Something-Something",
    101: "UCF101",
    51: "HMDB51",
    80: "AVA",
}
MAIN_ARGUMENTS = (
    "model",
    "data_set",
    "data_path",
    "epochs",
    "batch_size",
    "lr",
    "num_frames",
    "sampling_rate",
    "input_size",
    "mask_ratio",
    "decoder_mask_type",
    "nb_classes",
)
_DEEPSPEED = {"ds_config", "ds_version", "dp_world_size", "mp_world_size", "csr_tensor_module_names"}
_MMENGINE = {"mmengine_version", "mmcv_version", "mmaction_version"}
_QKV = re.compile(r"(.*attention\.attention\.)(query|key|value)\.(weight|bias)")


@dataclass(frozen=True)
class Fit:
    """How a preset's shapes differ from a checkpoint's; `differs` is empty where they fit."""

    preset: str
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Use:
    """Whether a command takes the checkpoint, and why (not)."""

    command: str
    works: bool
    why: str


@dataclass(frozen=True)
class Key:
    """A tensor of the file and what would become of it.

    Attributes:
        name: in the file.
        shape, dtype: in the file.
        fate: "loaded", "renamed", "converted", "dropped" or "unknown".
        detail: new name, or reason.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fate: str
    detail: str = ""


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect_weights` found.

    Attributes:
        path: of the file or folder that was read.
        what: what it is, in a line.
        format: of the file.
        place: path inside the file of the dictionary that holds the weights; "" for the file itself.
        tensors, parameters, bytes: of the weights.
        dtypes: count of tensors by dtype.
        changes: lines on what the reader did to names and dtypes.
        shown: numbers of the architecture that the shapes show.
        fits: presets, those that fit first.
        config: the architecture that the keys were held against; None where nothing says it.
        uses: what can be done with it.
        keys: every tensor.
        missing: names that the model has and the file lacks.
        beside: what stands beside the weights, a line each.
        note: what was assumed.
    """

    path: Path
    what: str
    format: str
    place: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    changes: tuple[str, ...]
    shown: dict[str, Any]
    fits: tuple[Fit, ...]
    config: ModelConfig | None
    uses: tuple[Use, ...]
    keys: tuple[Key, ...]
    missing: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def inspect_weights(
    checkpoint: str | Path,
    *,
    preset: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    averaged: bool = False,
) -> Inspection:
    """Look at a checkpoint; see `read_checkpoint` for the arguments.

    Raises:
        InputError: it cannot be read.
    """
    named, note = None, ""
    try:
        source = read_checkpoint(checkpoint, averaged=averaged, preset=preset, frames=frames, size=size)
        note = source.note
    except InputError as error:
        if preset is None:
            raise
        # Perhaps of another architecture than was named: then each of its tensors is held against that one.
        source, note = read_checkpoint(checkpoint, averaged=averaged), " ".join(str(error).split())
        named = ModelConfig.preset(MODEL.read(preset))
    folder = find_weights(checkpoint)
    outline = _outline(source)
    place, table = _table_of(outline, source)
    shown = shown_by(shapes_of(source.state))
    fits = fits_of(shown)
    config = named or _config(source, shown)
    uses, dropped = _uses(source, config)
    keys, missing = _keys(table, source, config, dropped)
    return Inspection(
        path=source.path,
        what=_what(source, outline, folder),
        format=outline.format,
        place=place,
        tensors=len(table),
        parameters=sum(one.count for one in table.values()),
        bytes=sum(one.bytes for one in table.values()),
        dtypes=dict(Counter(one.dtype for one in table.values()).most_common()),
        changes=tuple(getattr(source, "changes", ())),
        shown=shown,
        fits=fits,
        config=config,
        uses=uses,
        keys=keys,
        missing=missing,
        beside=_beside(outline, place),
        note=note,
        extra=outline.beside,
    )


# --- the file -----------------------------------------------------------------------------------------------


def _outline(source: Source) -> Outline:
    path = source.path
    if path.is_file():
        return read_outline(path)
    parts: list[Path] = []
    if not is_checkpoint(path):
        parts = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if parts:
        outlines = [read_outline(part) for part in parts]
        tensors: dict[str, TensorOutline] = {}
        for one in outlines:
            for table in one.tensors.values():
                tensors |= table
        return Outline(outlines[0].format, {"": tensors})
    own = {name: _outlined(value) for name, value in source.state.items()}
    return Outline("training checkpoint", {"": own})


def _outlined(value: Tensor) -> TensorOutline:
    return TensorOutline(tuple(value.shape), str(value.dtype).removeprefix("torch."))


def _table_of(outline: Outline, source: Source) -> tuple[str, dict[str, TensorOutline]]:
    """The dictionary of the file that the weights were read from: the one whose shapes are most like them."""
    wanted = Counter(tuple(value.shape) for value in source.state.values())

    def alike(place: str) -> tuple[int, int]:
        found = Counter(one.shape for one in outline.tensors[place].values())
        named = {name for own in outline.tensors[place] for name in _endings(own)}
        return len(named & source.state.keys()), (found & wanted).total()

    place = max(outline.tensors, key=alike, default="")
    return place, outline.tensors.get(place, {})


def _what(source: Source, outline: Outline, folder: Path) -> str:
    """What the checkpoint is, in a line."""
    origin = _origin(source, outline, folder)
    if source.pretrained:
        decoder = any(name.startswith("decoder.") for name in source.state)
        kind = "pre-trained weights" if decoder else "the encoder of pre-trained weights, without a decoder"
        if source.predicted:
            kind += f", whose decoder predicts {source.predicted}"
    elif HEAD_NAMES[0] in source.state:
        classes = head_classes(source)
        data = PUBLISHED_HEADS.get(classes)
        kind = f"a classifier of {classes} classes" + (f" (as {data} has)" if data else "")
    else:
        kind = "an encoder without a head"
    return f"{origin}: {kind}"


def _origin(source: Source, outline: Outline, folder: Path) -> str:
    names = {name for table in outline.tensors.values() for name in table}
    if (folder / CONFIG_NAME).is_file() and not is_checkpoint(folder):
        kind = _model_type(folder / CONFIG_NAME)
        if kind == "videomae":
            return "folder of transformers (VideoMAE)"
        return f"folder of the hub ({kind})"
    if "model" in source.settings:
        return "training checkpoint of this code" if is_checkpoint(source.path) else "weights of this code"
    if _DEEPSPEED & outline.beside.keys():
        return "DeepSpeed's states of a published training"
    if _MMENGINE & {*outline.beside, *_inner(outline.beside.get("meta"))} or any(
        name.startswith("cls_head.") for name in names
    ):
        return "file of mmaction2"
    args = _inner(outline.beside.get("args"))
    if args:
        version = (
            "VideoMAE V2" if "decoder_mask_type" in args or "num_sample" in args else "VideoMAE V1 or V2"
        )
        return f"file of the published trainer ({version})"
    return "weights under published names"


def _model_type(file: Path) -> str:
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "?"
    return str(values.get("model_type", "?")) if isinstance(values, dict) else "?"


def _inner(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _beside(outline: Outline, place: str) -> tuple[str, ...]:
    """A line for each other thing in the file."""
    lines = [
        f"{other or 'the file itself'}: {len(table)} more tensors by name"
        for other, table in outline.tensors.items()
        if other != place
    ]
    for name, value in outline.beside.items():
        if name == place or name == "class":
            continue
        if name == "args" and isinstance(value, Mapping):
            main = [f"{key} {value[key]}" for key in MAIN_ARGUMENTS if value.get(key) is not None]
            lines.append(f"args: {len(value)} arguments of the training; {', '.join(main)}")
        elif isinstance(value, Mapping) and "param_groups" in value:
            lines.append(f"{name}: state of an optimizer, learning rate {_rate(value['param_groups'])}")
        elif isinstance(value, (Mapping, list)):
            lines.append(f"{name}: {len(value)} values")
        else:
            lines.append(f"{name}: {str(value)[:80]}")
    return tuple(lines)


def _rate(groups: Any) -> str:
    """The largest learning rate of an optimizer's groups."""
    rates = [group.get("lr") for group in groups if isinstance(group, Mapping)]
    known = [rate for rate in rates if isinstance(rate, (int, float))]
    return f"{max(known):.3g}" if known else "-"


# --- the architecture ---------------------------------------------------------------------------------------


def fits_of(shown: Mapping[str, Any]) -> tuple[Fit, ...]:
    """Every published preset with what differs, the nearest first."""
    if "depth" not in shown:
        return tuple(Fit(name, ("the file has no blocks",)) for name in PRESETS)
    fields = tuple(shown)
    fits = [Fit(name, tuple(contradictions(ModelConfig.preset(name), shown, fields))) for name in PRESETS]
    return tuple(sorted(fits, key=lambda fit: len(fit.differs)))


def _config(source: Source, shown: Mapping[str, Any]) -> ModelConfig | None:
    """The architecture to hold the tensors against: the source's own, else that of the preset that fits (in
    all but what shapes decide beside it: patches, tubelets, the decoder, ...)."""
    free = {name: value for name, value in shown.items() if name not in DECIDED}
    if source.known is not None:
        decoder = {name: value for name, value in free.items() if name.startswith("decoder")}
        try:
            return source.known.replace(**decoder)
        except InputError:
            return source.known
    for name in fitting_presets(shown):
        try:
            return ModelConfig.preset(name, **free, img_size=free.get("patch_size", 16) * 14)
        except InputError:
            continue
    return None


# --- what can be done with it -------------------------------------------------------------------------------


def _uses(source: Source, config: ModelConfig | None) -> tuple[tuple[Use, ...], dict[str, str]]:
    """What each command says to the checkpoint, and the reasons for which an encoder's use drops tensors."""
    dropped: dict[str, str] = {}
    if config is None:
        why = "its shapes fit no preset" if source.state else "it holds no weights"
        return tuple(Use(command, False, why) for command in _COMMANDS), dropped
    grid = config.pos_grid or config.grid
    chosen: ModelConfig = config

    def encoder(classes: int, *, new_head: bool) -> str:
        model = _meta(lambda: build_classifier(chosen, classes, pooling=source.pooling))
        start = start_classifier(model, source.path, grid=grid, state=dict(source.state), new_head=new_head)
        if not classes or new_head:
            dropped.update((name, reason) for reason, names in start.dropped.items() for name in names)
        return start.describe("").removeprefix(": ")

    def pretrainer(*, decoder: bool) -> str:
        if not source.pretrained:
            raise InputError("it is no pre-training: its names are those of a classifier")
        model = _meta(lambda: build_pretrainer(chosen))
        if decoder:
            check_pixels(source, "it")
        return start_pretrainer(model, source, "").removeprefix(": ")

    def classifier() -> str:
        if HEAD_NAMES[0] not in source.state:
            raise InputError("it has no head: fine-tune it first")
        return encoder(head_classes(source), new_head=False)

    asked: dict[str, Callable[[], str]] = {
        "pretrain --init": lambda: pretrainer(decoder=False),
        "finetune --init": lambda: encoder(2, new_head=True),
        "evaluate, predict": classifier,
        "features, vmae.load": lambda: encoder(0, new_head=False),
        "reconstruct": lambda: pretrainer(decoder=True),
    }
    return tuple(_ask(command, asked[command]) for command in _COMMANDS), dropped


_COMMANDS = ("pretrain --init", "finetune --init", "evaluate, predict", "features, vmae.load", "reconstruct")


def _ask(command: str, function: Callable[[], str]) -> Use:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
            return Use(command, True, function())
    except InputError as error:
        # Of each kind of misfit the first: the list of tensors has them all.
        lines = [line.strip().split("; ")[0] for line in str(error).splitlines()]
        return Use(command, False, re.sub(r"checkpoint \S* ?is", "it is", " ".join(lines)))


def _meta(build: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return build()


# --- every tensor -------------------------------------------------------------------------------------------


def _keys(
    table: Mapping[str, TensorOutline], source: Source, config: ModelConfig | None, dropped: Mapping[str, str]
) -> tuple[tuple[Key, ...], tuple[str, ...]]:
    """What becomes of each tensor of the file in the model that holds all of them, and what that lacks."""
    wanted = {} if config is None else _wanted(source, config)
    places = _read_as(table, source.state, PRETRAINING if source.pretrained else CLASSIFICATION)
    keys = [_key(name, one, places[name], source, wanted, dropped) for name, one in table.items()]
    missing = tuple(name for name in wanted if name not in source.state)
    return tuple(keys), missing


def _wanted(source: Source, config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of the model that holds all tensors of the checkpoint."""
    if source.pretrained:
        own = _meta(lambda: build_pretrainer(config)).state_dict()
        if source.predicted:
            own |= {name: source.state[name] for name in HEAD}
        if kind_of(source) != "pretrainer":
            own = {name: value for name, value in own.items() if name.startswith("encoder.")}
    else:
        classes = head_classes(source) if HEAD_NAMES[0] in source.state else 0
        own = _meta(lambda: build_classifier(config, classes, pooling=source.pooling)).state_dict()
    return {name: value.shape for name, value in own.items()}


def _read_as(
    table: Mapping[str, TensorOutline], state: Mapping[str, Tensor], kind: str
) -> dict[str, str | None]:
    """The name under which each tensor of the file was read; None where it was left out."""
    found: dict[str, str | None] = {}
    for name in table:
        known = next((ending for ending in _endings(name) if ending in state), None)
        if known is None:
            known = _of_huggingface(name, kind)
        found[name] = known if known in state else None
    # The rest: a reader that renames keeps the order, so tensors of one shape follow each other.
    taken = {name for name in found.values() if name is not None}
    rest: dict[tuple[int, ...], list[str]] = {}
    for name, value in state.items():
        if name not in taken:
            rest.setdefault(tuple(value.shape), []).append(name)
    strange: dict[tuple[int, ...], list[str]] = {}
    for name, one in table.items():
        if found[name] is None:
            strange.setdefault(one.shape, []).append(name)
    for shape, names in strange.items():
        if len(names) == len(rest.get(shape, ())):
            found.update(zip(names, rest[shape]))
    return found


def _endings(name: str) -> list[str]:
    """A name, and what is left of it without its first parts: `module.blocks.0` gives `blocks.0`, `0` too."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _of_huggingface(name: str, kind: str) -> str | None:
    """Our name of one tensor of transformers' model `kind`; None for another, or one of no effect."""
    tensors = {name: torch.empty(1)}
    if (match := _QKV.fullmatch(name)) and match[3] == "weight":
        tensors = {f"{match[1]}{part}.weight": torch.empty(1, 1) for part in ("query", "key", "value")}
    try:
        return next(iter(from_huggingface(tensors, kind)), None)
    except InputError:
        return None


def _key(
    name: str,
    one: TensorOutline,
    read_as: str | None,
    source: Source,
    wanted: Mapping[str, torch.Size],
    dropped: Mapping[str, str],
) -> Key:
    def made(fate: str, detail: str = "") -> Key:
        return Key(name, one.shape, one.dtype, fate, detail)

    if read_as is None:
        if name.endswith("key.bias"):
            return made("dropped", "of no effect: softmax cancels it")
        if name.rsplit(".", 1)[-1] in ("pos_embed", "position_embeddings"):
            return made("dropped", "fixed positions, made again")
        return made("dropped", "no weight of this model") if wanted else made("unknown")
    if (
        read_as.rsplit(".", 1)[-1] == "pos_embed"
        and read_as not in wanted
        and source.state[read_as].ndim == 3
    ):
        if is_fixed_table(source.state[read_as]):
            return made("dropped", "fixed positions, made again")
    if read_as not in wanted:
        return made("unknown", "not in the model" if wanted else "no architecture fits")
    if wanted[read_as] != source.state[read_as].shape:
        return made("unknown", f"the model's has the shape {list(wanted[read_as])}")
    later = f"; finetune, features: dropped ({dropped[read_as]})" if read_as in dropped else ""
    if one.shape != tuple(source.state[read_as].shape):
        return made("converted", f"joined into {read_as}{later}")
    if read_as != name:
        return made("renamed", f"to {read_as}{later}")
    return made("loaded", later.removeprefix("; "))


# --- lines --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Tensors of several blocks that share everything but the block's number."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fate: str
    detail: str
    count: int


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def rows_of(keys: Iterable[Key]) -> list[Row]:
    """Keys grouped by block: `blocks.0-11.attn.qkv.weight`."""
    groups: dict[tuple, list[int | None]] = {}
    for key in keys:
        match = _NUMBER.search(key.name)
        number = int(match[0]) if match else None
        name = _NUMBER.sub("#", key.name, count=1) if match else key.name
        detail = re.sub(rf"(?<=\.){number}(?=\.)", "#", key.detail, count=1) if match else key.detail
        groups.setdefault((name, key.shape, key.dtype, key.fate, detail), []).append(number)
    rows = []
    for (name, shape, dtype, fate, detail), numbers in groups.items():
        span = _span([number for number in numbers if number is not None])
        name, detail = name.replace("#", span, 1), detail.replace("#", span, 1)
        rows.append(Row(name, shape, dtype, fate, detail, len(numbers)))
    return rows


def _span(numbers: list[int]) -> str:
    """`0-11`, or `0-3,5` where one is missing between."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
