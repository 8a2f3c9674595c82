"""One step of the training loop: what it reads, what it notes, and what seeds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

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


def seed_random(seed: int, step: int, part: int) -> None:
    """Seed torch for micro-batch number `part` (over all ranks) of a step: random numbers are a function of
    these three."""
    state = np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))
