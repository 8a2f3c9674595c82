"""Lengths of the sequences of a packed batch: their tokens stand one after the other, none padded."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from vmae.errors import InputError


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of each sequence of a packed batch.

    Attributes:
        counts: tokens of each of B sequences, each at least 1; known on the host, so that nothing waits for a
            GPU.
        device: of the packed tokens.
    """

    counts: tuple[int, ...]
    device: torch.device

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise InputError(f"packed sequences need at least one token each, not {self.counts}")

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def longest(self) -> int:
        return max(self.counts)

    @functools.cached_property
    def starts(self) -> Tensor:
        """int32 [B + 1]: where each sequence starts, and where the last ends (`cu_seqlens`)."""
        return self._placed(torch.tensor((0, *self.counts)).cumsum(0).int())

    @functools.cached_property
    def owner(self) -> Tensor:
        """int64 [T]: the sequence of each token."""
        counts = torch.tensor(self.counts)
        return self._placed(torch.repeat_interleave(torch.arange(len(self.counts)), counts))

    @functools.cached_property
    def padded_rows(self) -> Tensor:
        """int64 [T]: each token's row among B x longest rows."""
        rows = [torch.arange(n) + i * self.longest for i, n in enumerate(self.counts)]
        return self._placed(torch.cat(rows))

    def padded(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, longest, ...]: zeros after the end of each sequence."""
        rows = x.new_zeros(len(self.counts) * self.longest, *x.shape[1:])
        return rows.index_copy(0, self.padded_rows, x).unflatten(0, (-1, self.longest))

    @functools.cached_property
    def key_mask(self) -> Tensor:
        """bool [B, 1, 1, longest]: True where a padded row holds a token."""
        counts = torch.tensor(self.counts)[:, None]
        return self._placed((torch.arange(self.longest) < counts)[:, None, None])

    def _placed(self, made: Tensor) -> Tensor:
        """What was made on the host, on the device; no copy that the host would wait for."""
        if self.device.type == "cuda":
            made = made.pin_memory()
        return made.to(self.device, non_blocking=True)
