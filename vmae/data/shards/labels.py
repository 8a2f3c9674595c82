"""Classes of the samples of an index, as a labelled list has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vmae.data.shards.index import ShardIndex
from vmae.errors import InputError

_AT_ONCE = 1 << 14


class ShardLabels(Sequence[tuple[int, ...]]):
    """Classes of each sample of an index, in order."""

    def __init__(self, index: ShardIndex) -> None:
        self.whole = index

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self.whole.labels(one) for one in range(len(self))[number]]
        return self.whole.labels(range(len(self))[number])

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        ends, labels, start = self.whole.columns["label_end"], self.whole.columns["labels"], 0
        for first in range(0, len(ends), _AT_ONCE):
            stops = ends[first : first + _AT_ONCE].tolist()
            values = labels[start : stops[-1]].tolist()
            begin = start
            for stop in stops:
                yield tuple(values[start - begin : stop - begin])
                start = stop


def check_labels(name: str, index: ShardIndex, num_classes: int | None, most: int) -> tuple[int, bool]:
    """(number of classes, whether a sample has several) of an index whose samples all have labels.

    Args:
        name: of the index, for messages.
        num_classes: labels are below it; None takes the largest plus 1.
        most: the largest number of classes there can be.

    Raises:
        InputError: a sample without a label, or with one out of range.
    """
    labels, counts = index.columns["labels"], np.diff(index.columns["label_end"].astype(np.int64), prepend=0)
    bare = np.flatnonzero(counts == 0)
    if len(bare):
        raise InputError(
            f"index {name}: {len(bare)} of {len(index)} samples have no label, the first "
            f"{index.key(int(bare[0]))!r}: pack a labelled list (`path label` a line)"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= (num_classes or most)))
    if len(wrong):
        number = int(np.searchsorted(index.columns["label_end"], wrong[0], side="right"))
        known = f"0 to {(num_classes or most) - 1}" + (f" ({num_classes} classes)" if num_classes else "")
        raise InputError(
            f"index {name}, {index.key(number)!r}: label {int(labels[wrong[0]])} is out of range; labels are "
            f"{known}"
        )
    return num_classes or int(labels.max()) + 1, bool((counts > 1).any())
