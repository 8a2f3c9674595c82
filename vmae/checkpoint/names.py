"""From what a file holds to tensors by published name: wrappers opened, prefixes removed, names of
mmaction2 replaced. Every such change is a line.

Prefixes are put before names, or before any part of them, by torch.compile, DistributedDataParallel, FSDP,
DeepSpeed, Lightning and mmaction2, in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae.errors import InputError

# Keys that weights lie under; those of averaged weights (timm's, mmengine's and others').
WRAPPERS = ("model", "module", "state_dict", "model_state", "model_state_dict", "net")
AVERAGES = ("model_ema", "ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict")
_PAIRS = {"teacher", "student"}
_DEEPEST = 3  # wrappers inside each other

_ANYWHERE = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_IF_ALL = ("model", "net", "network")  # first parts that go where every name has them
_IF_ANY = ("backbone",)  # and where any has: mmaction2's head stands beside it

# mmaction2's VisionTransformer (mmaction/models/backbones/vit_mae.py, with mmcv's layers) -> ours.
_MMACTION = {
    "patch_embed.projection.": "patch_embed.proj.",
    ".mlp.layers.0.0.": ".mlp.fc1.",
    ".mlp.layers.1.": ".mlp.fc2.",
    "cls_head.fc_cls.": "head.",
}
# Beginnings of names that are no weights of these models, and what they are.
_NO_WEIGHTS = {
    "n_averaged": "a counter of averaged weights",
    "data_preprocessor.": "mean and deviation of mmaction2's input",
    "roi_head.": "mmaction2's detection head, which counts a background class",
}


def open_wrappers(
    content: Any, path: str | Path, averaged: bool = False
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The dictionary of a file that holds its tensors, and lines on where it was.

    Args:
        content: what the file holds.
        averaged: that of the averaged weights.

    Raises:
        InputError: there is none, or nothing says which of several it is.
    """
    if not isinstance(content, Mapping):
        raise InputError(
            f"checkpoint {path} holds no weights: it is a {type(content).__name__}, not tensors by name; "
            "save the model's state_dict()"
        )
    inner: Mapping[str, Any] = content
    way: list[str] = []
    beside: tuple[str, ...] = ()
    if averaged:
        key = next((key for key in AVERAGES if _holds_tensors(content.get(key))), None)
        if key is None:
            raise InputError(
                f"checkpoint {path} has no averaged weights (looked for {', '.join(AVERAGES)}); leave "
                "--averaged out"
            )
        inner, way = content[key], [key]
    for _ in range(_DEEPEST):  # a file may hold a dictionary inside itself
        key = next((key for key in WRAPPERS if _holds_tensors(inner.get(key))), None)
        if key is None:
            break
        beside = beside or tuple(str(other) for other in inner if other != key)
        inner, way = inner[key], [*way, key]
    if not any(isinstance(value, Tensor) for value in inner.values()):
        raise InputError(_no_weights(content, path))
    lines = []
    if way:
        also = f" (not read, beside it: {_some(beside)})" if beside else ""
        lines.append(f"weights taken from {' / '.join(way)}{also}")
    left = [key for key in AVERAGES if not averaged and _holds_tensors(content.get(key))]
    if left and way:
        lines.append(f"averaged weights lie under {left[0]}; --averaged takes them")
    return inner, tuple(lines)


def _holds_tensors(value: Any, depth: int = 2) -> bool:
    """Whether this is a dictionary with tensors, its own or those of a wrapper in it."""
    if not isinstance(value, Mapping):
        return False
    own = any(isinstance(inner, Tensor) for inner in value.values())
    return own or (depth > 0 and any(_holds_tensors(value.get(key), depth - 1) for key in WRAPPERS))


def _no_weights(content: Mapping[Any, Any], path: str | Path) -> str:
    keys = [str(key) for key in content]
    what = f"checkpoint {path} holds no weights under {', '.join(WRAPPERS)}; its keys are: {_some(keys)}"
    if _PAIRS.intersection(keys):
        what += "; which of them is the model? Save that one alone, as {'model': ...}"
    return what if keys else f"checkpoint {path} holds no weights: it is empty"


def _some(names: Any, limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def rename(content: Mapping[str, Any], path: str | Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under published names, and lines on what was done to get there.

    Raises:
        InputError: two tensors have the same name then, and other numbers; or the names are of two models.
    """
    values = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    lines = [f"left out, no tensors: {_some(others)}"] if others else []
    new, counts = _without_prefixes({name: name for name in values})
    tops = {name.split(".")[0] for name in new.values()}
    if tops >= _PAIRS:
        raise InputError(
            f"checkpoint {path} holds two models, student.* and teacher.*: save the one you want alone"
        )
    lines += [f"prefix {prefix}. removed from {count} names" for prefix, count in counts.items()]
    if "patch_embed.projection.weight" in new.values() or "cls_head.fc_cls.weight" in new.values():
        renamed = {old: _of_mmaction(name) for old, name in new.items()}
        lines.append(f"{sum(renamed[old] != new[old] for old in new)} names of mmaction2 replaced")
        new = renamed
    for beginning, what in _NO_WEIGHTS.items():
        if gone := [old for old, name in new.items() if name.startswith(beginning)]:
            lines.append(f"left out, {what}: {_some(gone)}")
            new = {old: name for old, name in new.items() if old not in gone}
    return _merged(values, new, path, lines), tuple(lines)


def _without_prefixes(new: dict[str, str]) -> tuple[dict[str, str], Counter[str]]:
    """Names without prefixes, by their own name, and from how many each prefix was removed."""
    counts: Counter[str] = Counter()
    while True:
        before = dict(new)
        for old, name in new.items():
            *parts, last = name.split(".")
            counts.update({part for part in parts if part in _ANYWHERE})
            new[old] = ".".join([*(part for part in parts if part not in _ANYWHERE), last])
        for prefix in (*_IF_ALL, *_IF_ANY):
            having = [old for old, name in new.items() if name.startswith(f"{prefix}.")]
            if having and (prefix in _IF_ANY or len(having) == len(new)):
                counts[prefix] += len(having)
                new |= {old: new[old].removeprefix(f"{prefix}.") for old in having}
        if new == before:
            return new, counts


def _of_mmaction(name: str) -> str:
    for theirs, ours in _MMACTION.items():
        name = name.replace(theirs, ours)
    return name


def _merged(
    values: dict[str, Tensor], new: dict[str, str], path: str | Path, lines: list[str]
) -> dict[str, Tensor]:
    """Tensors by their new names; adds a line to `lines` where two of the same numbers became one."""
    state: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    twice = 0
    for old, name in new.items():
        value = values[old]
        if name not in state:
            state[name], first[name] = value, old
            continue
        twice += 1
        if state[name].shape != value.shape or not torch.equal(state[name].float(), value.float()):
            raise InputError(
                f"checkpoint {path} holds {first[name]} and {old}, which are both {name} without their "
                "prefixes and differ: which is the model's?"
            )
    if twice:
        lines.append(f"{twice} tensors were there twice, under two prefixes, with the same numbers")
    return state
