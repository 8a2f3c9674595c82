"""Several sequences as one, without copies: the lists and indexes of a mix."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any


class Joined(Sequence):
    """The items of `parts`, one part after the other. A slice that is a part, or within one, is that part's.

    Attributes:
        parts: none of them empty.
    """

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self.parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self.parts)

    def __getitem__(self, index):
        if not isinstance(index, slice):
            number = operator.index(index)
            if number < 0:
                number += len(self)
            if not 0 <= number < len(self):
                raise IndexError(f"item {index} of {len(self)}")
            place = bisect_right(self._ends, number)
            return self.parts[place][number - self._start(place)]
        first, last, step = index.indices(len(self))
        if step != 1:
            return [self[number] for number in range(first, last, step)]
        pieces = []
        for place, part in enumerate(self.parts):
            start = self._start(place)
            low, high = max(first - start, 0), min(last - start, len(part))
            if low < high:
                pieces.append(part if (low, high) == (0, len(part)) else part[low:high])
        return pieces[0] if len(pieces) == 1 else Joined(pieces)

    def _start(self, place: int) -> int:
        return self._ends[place - 1] if place else 0


def join(parts: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """All parts as one sequence: a list where all are lists."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, list) for part in parts):
        return list(chain.from_iterable(parts))
    return Joined(parts)
