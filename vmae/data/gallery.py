"""Labelled videos for a probe: a gallery to learn from, and queries to test on.

One list is cut in two, half of each class's videos; or a second list gives the queries. A cap takes as large
a share of each class. Which videos that are is a function of the lists and the cap: every run on the same
lists, whatever its seed, is probed on the same videos.

Legend: M videos of the gallery, Q queries.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vmae.data.entry_table import CHUNK, as_entries, encode
from vmae.data.labels import LabelledList
from vmae.data.manifest import VideoEntry
from vmae.data.shards.facts import contents, indexes_in
from vmae.errors import InputError


@dataclass(frozen=True)
class Gallery:
    """What a probe sees.

    Attributes:
        entries: the gallery's videos, then the queries.
        labels: int64, of each of them.
        size: M, how many are the gallery's.
        num_classes: labels are below it.
        notes: lines for the user.
    """

    entries: Sequence[VideoEntry]
    labels: np.ndarray
    size: int
    num_classes: int
    notes: tuple[str, ...] = ()

    @property
    def gallery(self) -> range:
        """Numbers of the gallery's videos."""
        return range(self.size)

    @property
    def queries(self) -> range:
        """Numbers of the queries."""
        return range(self.size, len(self.entries))


def split_list(labelled: LabelledList, most: int, name: str) -> Gallery:
    """A list cut into gallery and queries; the gallery has one more where a class has an odd number.

    Args:
        most: videos of both together, at least two.
        name: of the list, for messages.

    Raises:
        InputError: a video has several labels, or no class has two videos.
    """
    labels = _one_label_each(labelled, name)
    single = np.bincount(labels)[labels] == 1
    if single.all():
        raise InputError(
            f"{name} has no class of two videos, and a probe needs one to learn from and one to test on: "
            "give more videos, or queries of their own with --probe-val LIST"
        )
    numbers, places = _spread(labels, np.flatnonzero(~single))
    notes = []
    if single.any():
        notes.append(
            f"note: {int(single.sum())} classes of {name} have one video each and are left out of the probe, "
            "which needs one to learn from and one to test on"
        )
    taken, second = numbers[:most], places[:most] % 2 == 1
    return _gallery((labelled, labels, taken[~second]), (labelled, labels, taken[second]), notes)


def join_lists(gallery: LabelledList, queries: LabelledList, most: int, names: tuple[str, str]) -> Gallery:
    """The gallery of one list and the queries of another: half of `most` each, or more of one where the other
    has less.

    Raises:
        InputError: a video has several labels, or the lists share no class.
    """
    first, second = _one_label_each(gallery, names[0]), _one_label_each(queries, names[1])
    size = min(len(first), max(most // 2, most - len(second)))
    taken = _spread(first, np.arange(len(first)))[0][:size]
    asked = _spread(second, np.arange(len(second)))[0][: most - size]
    strange = int((~np.isin(second[asked], first[taken])).sum())
    if strange == len(asked):
        raise InputError(f"the videos taken of {names[0]} and of {names[1]} have no class in common")
    notes = []
    if strange:
        notes.append(
            f"note: {strange} of the {len(asked)} queries of {names[1]} are of classes that no video taken "
            f"of {names[0]} shows; a probe gets them wrong"
        )
    return _gallery((gallery, first, taken), (queries, second, asked), notes)


_Half = tuple[LabelledList, np.ndarray, np.ndarray]


def _gallery(first: _Half, second: _Half, notes: Sequence[str]) -> Gallery:
    """Of (list, its labels, numbers taken) twice, each in the order of its list."""
    entries: list[VideoEntry] = []
    for labelled, _, taken in (first, second):
        entries += [labelled.entries[number] for number in sorted(taken.tolist())]
    labels = np.concatenate([own[np.sort(taken)] for _, own, taken in (first, second)])
    return Gallery(entries, labels, len(first[2]), int(labels.max()) + 1, tuple(notes))


def _one_label_each(labelled: LabelledList, name: str) -> np.ndarray:
    """int64, the class of each video; raises InputError where one has several."""
    if labelled.multi:
        raise InputError(f"{name} has videos of several labels; a probe takes one class of each video")
    return np.fromiter((own[0] for own in labelled.labels), np.int64, len(labelled.labels))


def _spread(labels: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`numbers` in an order of which any beginning has about the same share of each class, and the place of
    each within its class; the places 2 i and 2 i + 1 follow one another."""
    shuffled = np.random.default_rng(0).permutation(numbers)
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]
    own = labels[grouped]
    counts = np.bincount(own)
    places = np.arange(len(own)) - (np.cumsum(counts) - counts)[own]
    order = np.argsort((places // 2 + 0.5) / -(-counts[own] // 2), kind="stable")
    return grouped[order], places[order]


def count_shared(entries: Sequence[VideoEntry], others: Sequence[VideoEntry]) -> int:
    """How many of `entries` are videos of `others` too: of files by their paths, of shards by content."""
    if indexes_in(entries) or indexes_in(others):
        return len(contents(entries) & contents(others))
    left, found = Counter(_normal(encode(entry.path)) for entry in entries), 0
    listed = as_entries(getattr(others, "entries", others))  # of a mix
    for first in range(0, len(listed), CHUNK):
        for path in listed.path_bytes(first, min(first + CHUNK, len(listed))):
            found += left.pop(_normal(path), 0)
    return found


def _normal(path: bytes) -> bytes:
    """A path as `os.path.abspath` gives it, which takes its time for each of millions."""
    plain = path.startswith(b"/") and b"//" not in path and b"/." not in path and not path.endswith(b"/")
    return path if plain and b"\\" not in path else os.path.abspath(path)
