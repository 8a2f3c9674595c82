"""What the micro-batches of all tasks share: they are joined, moved to a device, pinned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from vmae.data.channels import join_clips

_B = TypeVar("_B", bound="TensorBatch")


@dataclass
class TensorBatch:
    """A micro-batch: a dataclass of tensors [B, ...] and of lists.

    The loop needs three of the fields: `clips` (what the model sees), `ids` ((epoch, index, path) of each
    sample) and `replaced` (a `Failure` for each video that could not be read). A field that some tasks do not
    have is None, by default.
    """

    @classmethod
    def cat(cls: type[_B], batches: Sequence[_B]) -> _B:
        """Join samples (batches of B = 1) or batches, in order; tensors whose second dimension differs are
        filled up with zeros to the longest."""
        joined: dict[str, Tensor | list] = {}
        for name in (field.name for field in dataclasses.fields(cls)):
            parts = [getattr(batch, name) for batch in batches]
            if parts[0] is None:
                continue
            if isinstance(parts[0], Tensor):
                joined[name] = (join_clips if name == "clips" else torch.cat)(_filled_up(parts))
            else:
                joined[name] = [value for part in parts for value in part]
        return cls(**joined)

    def to(self: _B, device: torch.device | str, non_blocking: bool = False) -> _B:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: _B) -> _B:
        return self._each(pinned)

    def _each(self: _B, change: Callable[[Tensor], Tensor]) -> _B:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **changed)


def pinned(tensor: Tensor) -> Tensor:
    """`tensor` in page-locked host memory, unless it lies on a GPU: copies to one then wait for nothing."""
    return tensor if tensor.is_cuda else tensor.pin_memory()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, in a copy that the host does not wait for."""
    return (pinned(tensor) if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _filled_up(parts: list[Tensor]) -> list[Tensor]:
    """[B, M, ...] each -> [B, most M, ...] each"""
    if parts[0].ndim < 2:
        return parts
    most = max(part.shape[1] for part in parts)
    return [_padded(part, most) for part in parts]


def _padded(part: Tensor, most: int) -> Tensor:
    lacking = most - part.shape[1]
    if not lacking:
        return part
    return torch.cat([part, part.new_zeros(part.shape[0], lacking, *part.shape[2:])], 1)
