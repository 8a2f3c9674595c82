"""One step of the training loop: what it reads, what it notes, and what seeds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vmae.train.guard import LateNumbers


class TrainingBatch(Protocol):
    """What the loop needs of a micro-batch; `vmae.data.Batch` is one."""

    clips: Tensor
    ids: list
    replaced: list

    def to(self, device, non_blocking: bool = False) -> TrainingBatch: ...


@dataclass
class StepRecord:
    """What one step did; `ids` are this rank's, `loss_sum` too, the other counts are sums over the ranks.

    Attributes:
        step: optimizer steps before it.
        weight: of all its micro-batches.
        loss_sum: sum of weight * loss of this rank's micro-batches, on the device.
        samples: clips by source.
        numbers: loss, gradient norm and whether anything failed, on their way to the host.
    """

    step: int
    lr: float
    weight: float = 0.0
    loss_sum: Tensor | None = None
    ids: list = field(default_factory=list)
    clips: int = 0
    replaced: int = 0
    samples: list[int] = field(default_factory=list)
    data_s: float = 0.0
    step_s: float = 0.0
    numbers: LateNumbers | None = None


@dataclass
class Read:
    """What a rank has read since the ranks last told each other.

    Attributes:
        present: whether it had every micro-batch that it wanted; stays False.
        waited_s: that its device had nothing to do, in seconds.
        weight: sum over the micro-batches.
        samples: clips by source.
    """

    present: bool = True
    waited_s: float = 0.0
    weight: float = 0.0
    clips: int = 0
    replaced: list = field(default_factory=list)
    samples: list[int] = field(default_factory=list)

    def row(self, stops: list[bool]) -> list[float]:
        """Numbers that a rank sends."""
        counts = (self.clips, len(self.replaced))
        return [self.present, self.waited_s, self.weight, *counts, *stops, *self.samples]

    def clear(self) -> None:
        self.waited_s = self.weight = 0.0
        self.clips, self.replaced, self.samples = 0, [], [0] * len(self.samples)


class Exchange(NamedTuple):
    """What every rank knows of all ranks' micro-batches.

    Attributes:
        all_present: whether every rank has had all its micro-batches.
        stops: for each stop signal, whether a rank received it.
        waited_s: the longest wait for a batch, in seconds.
        weight, clips, replaced: sums over the ranks.
        samples: clips by source, summed over the ranks.
    """

    all_present: bool
    stops: list[bool]
    waited_s: float
    weight: float
    clips: int
    replaced: int
    samples: list[int]

    @classmethod
    def of(cls, rows: Tensor, signals: int) -> Exchange:
        """From `Read.row` of every rank, float64 [ranks, 5 + signals + sources]."""
        (present, _, weight, clips, replaced), stops, samples = _split(rows.sum(0).tolist(), signals)
        longest = rows[:, 1].max().item()
        return cls(
            present == len(rows),
            [count > 0 for count in stops],
            longest,
            weight,
            int(clips),
            int(replaced),
            [int(count) for count in samples],
        )


def _split(row: list[float], signals: int) -> tuple[list[float], list[float], list[float]]:
    """Fixed numbers, those by signal, and those by source."""
    return row[:5], row[5 : 5 + signals], row[5 + signals :]


def seed_random(seed: int, step: int, part: int) -> None:
    """Seed torch for micro-batch number `part` (over all ranks) of a step: random numbers are a function of
    these three."""
    state = np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)  # numpy 1 shifts no uint64 by an int
