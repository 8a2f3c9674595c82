"""Steps of one shape each, where the sources of a mix have clips of several (`vmae.data.shapes`).

All clips of a step, on every rank and in every micro-batch, have one shape, so tensors are as dense as with
one shape for all, and ranks have equal work. Which shape a step has is drawn without replacement: of each
`BLOCK` steps, every shape gets its share of the samples, to a step. The sources of a shape go through their
samples in an order of their own, from step to step and from epoch to epoch, with nothing left out.

Legend: K shapes; a turn is a step counted among those of its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vmae.data.dataset import EpochSampler
from vmae.data.sampling import permutation
from vmae.data.video_dataset import Purpose, SampleKey, numpy_rng

BLOCK = 64  # steps


class ShapeSampler(EpochSampler):
    """`EpochSampler` where each step's samples are of one of K shapes; a key's epoch is the round of its
    shape.

    Args:
        groups: for each shape, the samples of an epoch that have it: ranges that together are all `size`.
        size, batch_size, options: see `EpochSampler`.
    """

    def __init__(self, groups: Sequence[Sequence[range]], size: int, batch_size: int, **options: Any) -> None:
        super().__init__(size, batch_size, **options)
        self._samples = [
            np.concatenate([np.arange(part.start, part.stop) for part in group]) for group in groups
        ]
        self._rounds: dict[int, tuple[int, np.ndarray]] = {}
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def fewest(self) -> int:
        return min(len(samples) for samples in self._samples if len(samples))

    def turn(self, step: int) -> tuple[int, int]:
        """(the shape of a step, how many steps of that shape come before it)."""
        block, place = divmod(step, BLOCK)
        order = self._block_order(block)
        shape = int(order[place])
        return shape, self._counts(block * BLOCK)[shape] + int((order[:place] == shape).sum())

    def __getitem__(self, step: int) -> list[SampleKey]:
        shape, turn = self.turn(step)
        own = self.batch_size * self.accumulate
        first = turn * self.global_batch_size + self.rank * own
        count, keys = len(self._samples[shape]), []
        for place in range(first, first + own):
            number, offset = divmod(place, count)
            keys.append((number, int(self._round(shape, number)[offset])))
        return keys

    def _counts(self, steps: int) -> list[int]:
        """How many of the first `steps` steps each shape gets: its share of what those before it leave."""
        counts, left = [], self.size
        for samples in self._samples:
            own = (2 * steps * len(samples) + left) // (2 * left) if left else 0
            counts.append(own)
            steps, left = steps - own, left - len(samples)
        return counts

    def _block_order(self, block: int) -> np.ndarray:
        """int64 [BLOCK]: the shapes of a block's steps."""
        if self._block[0] != block:
            before, after = self._counts(block * BLOCK), self._counts((block + 1) * BLOCK)
            shapes = np.repeat(np.arange(len(before)), np.subtract(after, before))
            self._block = (block, numpy_rng(self.seed, block, Purpose.SHAPES).permutation(shapes))
        return self._block[1]

    def _round(self, shape: int, number: int) -> np.ndarray:
        """A shape's samples in the order of a round."""
        if self._rounds.get(shape, (-1,))[0] != number:
            rng = numpy_rng(self.seed, number, Purpose.SHAPES, shape)
            samples = self._samples[shape]
            self._rounds[shape] = (number, samples[permutation(len(samples), rng)])
        return self._rounds[shape][1]
