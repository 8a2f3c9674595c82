"""Identity of a result: what its numbers depend on, written beside it and compared before a later start adds
to it.

For `evaluate`, `features`, `detect`, `detect-temporal --detector` and `distil --logits`. It holds what
decides a number and nothing else: not the count of threads, workers or ranks, nor batch size or device.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmae.data.entry_table import CHUNK
from vmae.data.manifest import VideoEntry
from vmae.data.shards.entries import ShardEntry
from vmae.data.shards.rows import entry_identity
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import read_json
from vmae.model import Classifier


def fingerprint(model: nn.Module, *, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of all parameters and buffers, in hexadecimal.

    Args:
        without: prefixes of names to leave out.
    """
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(without):
            total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def model_identity(model: Classifier, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What decides the numbers that a classifier or detector gives: its weights, and the settings that these
    do not show.

    Args:
        without: prefixes of the names of weights that do not count.
    """
    config = model.config
    shown = {name: getattr(config, name) for name in ("num_heads", "cos_attn", "layer_norm_eps")}
    shown["qk_scale"] = config.qk_scale or (config.embed_dim // config.num_heads) ** -0.5
    shown |= {
        "frames": config.num_frames,
        "size": list(config.image_hw),
        "pooling": model.pooling,
    }
    shown["positions"] = "learned" if config.learned_pos else list(config.pos_grid or config.grid)
    return {"weights": fingerprint(model, without=without), "model": shown}


def frames_identity(entry: VideoEntry) -> list[Any]:
    """The frames of an entry: its absolute path, and for a folder of images which of them; of one in a shard,
    its key and checksum, wherever the shard lies."""
    if isinstance(entry, ShardEntry):
        return entry_identity(entry)
    images = [] if entry.kind == "video" else [entry.start, entry.total, entry.pattern]
    return [os.path.abspath(entry.path), *images]


def content_hash(content: Any) -> str:
    """SHA-256 of plain containers, in hexadecimal."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def list_hash(entries: Sequence[VideoEntry], labels: Sequence[tuple[int, ...]] | None = None) -> str:
    """SHA-256 of a list's content, in its order; the list's own path does not count.

    It is `content_hash` of [[[stride, frames' identity] of each entry], labels], made in parts.
    """
    total = hashlib.sha256(b"[[")
    for first in range(0, len(entries), CHUNK):
        part = [[entry.stride, *frames_identity(entry)] for entry in entries[first : first + CHUNK]]
        total.update((", " * (first > 0) + json.dumps(part)[1:-1]).encode())
    total.update(b"], ")
    if labels is None:
        total.update(b"null]")
        return total.hexdigest()
    total.update(b"[")
    for first in range(0, len(labels), CHUNK):
        text = json.dumps(list(labels[first : first + CHUNK]))[1:-1]
        total.update((", " * (first > 0) + text).encode())
    total.update(b"]]")
    return total.hexdigest()


def check_same(before: dict[str, Any], now: dict[str, Any], holds: str, remedy: str) -> None:
    """Raises InputError unless `before`, of an earlier start, has every value of `now`; names those that
    differ.

    Args:
        holds: the beginning of the message: which folder, and what is in it.
        remedy: what to do, beside taking the same settings.
    """
    if differing := differences(before, json.loads(json.dumps(now))):
        raise InputError(f"{holds} (there and now: {'; '.join(differing)}); {remedy}")


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted name of each value of `now` that `before` has otherwise or not at all, with both values where
    they are short."""
    found: list[str] = []
    for name, value in now.items():
        old = before.get(name) if isinstance(before, dict) else None
        if isinstance(value, dict) and isinstance(old, dict):
            found += differences(old, value, f"{prefix}{name}.")
        elif old != value:
            texts = [json.dumps(one) for one in (old, value)]
            short = all(len(text) < 40 for text in texts)
            found.append(f"{prefix}{name} {', '.join(texts) if short else 'differs'}")
    return found


def settle(path: Path, decides: dict[str, Any], what: str, **noted: Any) -> None:
    """Make the folder of `path` that of this result, or check that it is.

    Args:
        path: file that says what the folder's result depends on; written where it is missing.
        decides: what decides the result: has to be the same.
        what: the folder's content, such as "another test".
        noted: written, not compared.

    Raises:
        InputError: the folder holds another result (names what differs), or cannot be used.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {folder}: {error.strerror}") from error
    before = read_json(path, "settings file") if path.exists() else None
    if before is not None:
        check_same(before, decides, f"{folder} holds {what}", f"choose another --output, or remove {folder}")
        return
    text = json.dumps({**decides, **noted}, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text), binary=False)
