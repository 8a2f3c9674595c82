"""Identity of a result: what its numbers depend on. `vmae.files.settled` writes it beside the result, and
compares it before a later start adds to it.

For `evaluate`, `features`, `detect`, `detect-temporal --detector` and `distil --logits`. It holds what
decides a number and nothing else: not the count of threads, workers or ranks, nor batch size or device.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vmae.data.entry_table import CHUNK
from vmae.data.manifest import VideoEntry
from vmae.data.shards.entries import ShardEntry
from vmae.data.shards.rows import entry_identity
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
