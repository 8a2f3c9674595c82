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


class Exchange(NamedTuple):
    """What every rank knows of all ranks' micro-batches.

    Attributes:
        all_present: whether every rank has a batch.
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

    @staticmethod
    def row(
        present: bool,
        stops: list[bool],
        waited_s: float,
        weight: float,
        counts: tuple[int, int],
        samples: list[int],
    ) -> list[float]:
        """Numbers that a rank sends; `counts` are its clips and replaced videos."""
        return [present, waited_s, weight, *counts, *stops, *samples]

    @classmethod
    def of(cls, rows: Tensor, signals: int) -> Exchange:
        """From `row` of every rank, float64 [ranks, 5 + signals + sources]."""
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
    torch.manual_seed(int(state[0] >> 1))
