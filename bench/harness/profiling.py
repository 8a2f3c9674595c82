"""Kinds of work in a profile: what a kernel or operator belongs to, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_OURS = r"embed_visible|assemble_decoder|select_decoded|patch_loss|head_error|weighted_mean|_partials"
_COPIES = r"copy|memcpy|memset|\bto\b|cat|index|gather|scatter|fill|zero|arange|sort|stack|contiguous|clone"
# The first pattern that a kernel's or operator's name matches decides its kind.
KINDS = (
    ("ours (Triton)", rf"{_OURS}|column_sum"),
    ("fused by torch.compile", r"triton_(poi|per|red|tem)|cpp_fused"),
    ("attention", r"flash|fmha|attention|softmax|cudnn_generated"),
    ("matrix products", r"gemm|gemv|\bmm\b|addmm|bmm|baddbmm|cutlass|cublas|nvjet|matmul|linear|conv"),
    ("optimizer", r"adam|multi_tensor|foreach|lerp"),
    ("normalisation", r"norm|var_mean|\bvar\b|std"),
    ("GELU", r"gelu"),
    ("gather and copy", _COPIES),
    ("sums", r"sum|mean|reduce"),
    ("element by element", r"elementwise|add|mul|sub|div|pow|sqrt|neg|where|clamp|exp|square|bernoulli"),
)


@dataclass
class Total:
    """Milliseconds and calls of a kind."""

    ms: float = 0.0
    calls: int = 0


def kind_of(name: str) -> str:
    """The kind of a kernel or operator; "other" where no pattern fits."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def union_us(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def summarise(events: Iterable[Any], on_gpu: bool) -> tuple[dict[str, Total], float]:
    """Totals by kind, and the milliseconds in which the device was busy."""
    kinds: dict[str, Total] = {}
    spans = []
    for event in events:
        if on_gpu != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue
        us = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        if not on_gpu and not event.name.startswith(("aten::", "vmae", "Optimizer")):
            continue
        found = kinds.setdefault(kind_of(event.name), Total())
        found.ms += us / 1e3
        found.calls += 1
        spans.append((event.time_range.start, event.time_range.end))
    if on_gpu:
        return kinds, union_us(spans) / 1e3
    return kinds, sum(kind.ms for kind in kinds.values())
