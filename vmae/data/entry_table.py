"""Videos of a list without a Python object for each: flat arrays, and a `VideoEntry` made when it is asked
for.

A list of a million videos as objects takes a gigabyte in each process, and a worker that reads them makes
the pages of their reference counts private. Here the paths are one array of bytes and the rest is a few
arrays of numbers, which may lie in a mapped file (see `vmae.data.list_cache`): shared by all processes,
private to none.

Legend: n entries.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import os
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np

from vmae.data.list_lines import DEFAULT_PATTERN, VideoEntry

CHUNK = 1 << 14  # entries that are looked at in one go
KINDS = ("video", "frames", "image")
# Columns of a table beside its paths, and their types; a column of one value in a file holds it once.
COLUMNS = {
    "kind": np.uint8,  # place in KINDS
    "start": np.int32,
    "total": np.int32,
    "stride": np.int32,  # 0 where an entry has none
    "pattern": np.int32,  # place in `patterns`
    "line": np.int32,
    "root": np.uint8,  # place in `roots`
}
_IDENTITY_ENDS = {0: "\n", 2: "\0image\n"}  # of what is one file, by its place in KINDS
EntryT = TypeVar("EntryT", bound=VideoEntry, covariant=True)


class Entries(Sequence[EntryT]):
    """Videos in order, and questions about all of them; a subclass may answer without making entries."""

    @overload
    def __getitem__(self, index: int) -> EntryT: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EntryT]: ...
    @abstractmethod
    def __getitem__(self, index): ...

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, (str, bytes)):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def strides(self) -> list[int]:
        """The strides that entries have of their own, each once, sorted."""
        return sorted({entry.stride for entry in self if entry.stride is not None})

    def images(self) -> int:
        """Images of all frame folders."""
        return sum(entry.total for entry in self if entry.kind == "frames")

    def numbers_of(self, kind: str) -> Sequence[int] | np.ndarray:
        """Numbers of the entries of a kind, in order."""
        return [number for number, entry in enumerate(self) if entry.kind == kind]

    def with_stride(self, stride: int | None) -> Entries[EntryT]:
        """The same, with this stride where an entry has none of its own."""
        if stride is None:
            return self
        return EntryList(
            [dataclasses.replace(entry, stride=stride) if entry.stride is None else entry for entry in self]
        )

    def path_bytes(self, first: int, last: int) -> list[bytes]:
        """Paths of the entries from `first` to before `last`."""
        return [encode(self[number].path) for number in range(first, last)]

    def count_paths(self) -> int:
        """Number of different paths; by a hash of 64 bits for each, so that no path is kept."""
        return count_distinct([path_hashes(self, first) for first in range(0, len(self), CHUNK)])

    def identity_lines(self, first: int, last: int, start: str) -> bytes:
        """What decides the samples of these entries, a line each (see `vmae.data.list_identity`).

        Args:
            start: cut off where a path begins with it; a folder with a slash behind.
        """
        return b"".join(encode(_identity_line(self[number], start)) for number in range(first, last))


def _identity_line(entry: VideoEntry, start: str) -> str:
    path = entry.path.removeprefix(start)
    if entry.kind != "frames":
        return f"{path}\0{entry.stride}{_IDENTITY_ENDS[KINDS.index(entry.kind)]}"
    return f"{path}\0{entry.stride}\0{entry.start}\0{entry.total}\0{entry.pattern}\n"


def encode(text: str) -> bytes:
    """The bytes of a path, also of one that is no UTF-8."""
    return text.encode("utf-8", "surrogatepass")


class EntryList(Entries[EntryT]):
    """Entries that exist as objects."""

    def __init__(self, entries: Sequence[EntryT]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index):
        return self._entries[index]


class EntryChain(Entries[EntryT]):
    """Several sequences one after the other, of which nothing is copied."""

    def __init__(self, parts: Sequence[Sequence[EntryT]]) -> None:
        flat = (part._parts if isinstance(part, EntryChain) else [as_entries(part)] for part in parts)
        self._parts: list[Entries[EntryT]] = [part for part in itertools.chain(*flat) if len(part)]
        self._starts = [0, *itertools.accumulate(map(len, self._parts))]

    @property
    def parts(self) -> Sequence[Entries[EntryT]]:
        """The sequences, none of them empty and none a chain."""
        return self._parts

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step != 1:
                return EntryList([self[number] for number in range(first, last, step)])
            parts = [part[a:b] for part, a, b in self._within(first, last)]
            return parts[0] if len(parts) == 1 else EntryChain(parts)
        number = _place(index, len(self))
        part = bisect_right(self._starts, number) - 1
        return self._parts[part][number - self._starts[part]]

    def __iter__(self) -> Iterator[EntryT]:
        return itertools.chain(*self._parts)

    def _within(self, first: int, last: int) -> Iterator[tuple[Entries[EntryT], int, int]]:
        """(part, first, last) of what lies in a range."""
        for part, start in zip(self._parts, self._starts):
            a, b = max(first - start, 0), min(last - start, len(part))
            if a < b:
                yield part, a, b

    def strides(self) -> list[int]:
        return sorted({stride for part in self._parts for stride in part.strides()})

    def images(self) -> int:
        return sum(part.images() for part in self._parts)

    def numbers_of(self, kind: str) -> np.ndarray:
        numbers = [
            np.asarray(part.numbers_of(kind), np.int64) + start
            for part, start in zip(self._parts, self._starts)
        ]
        return np.concatenate([np.empty(0, np.int64), *numbers])

    def with_stride(self, stride: int | None) -> EntryChain[EntryT]:
        return EntryChain([part.with_stride(stride) for part in self._parts])

    def path_bytes(self, first: int, last: int) -> list[bytes]:
        return [path for part, a, b in self._within(first, last) for path in part.path_bytes(a, b)]

    def identity_lines(self, first: int, last: int, start: str) -> bytes:
        return b"".join(part.identity_lines(a, b, start) for part, a, b in self._within(first, last))


class EntryTable(Entries[VideoEntry]):
    """Entries in flat arrays, read-only. A slice without a step is a view.

    Args:
        text: uint8, the paths as the list has them, each with a line end behind.
        ends: unsigned [n], where each path ends in `text`, behind its line end.
        columns: by name, [n] each; see `COLUMNS`.
        patterns, roots: what the columns of these names count; a path starts from its root.
        first: where the first path begins.
        stride: of the entries that have none of their own.
        paths: number of different paths, where it is known.
    """

    def __init__(
        self,
        text: np.ndarray,
        ends: np.ndarray,
        columns: dict[str, np.ndarray],
        *,
        patterns: Sequence[str] = (DEFAULT_PATTERN,),
        roots: Sequence[str] = ("",),
        first: int = 0,
        stride: int | None = None,
        paths: int | None = None,
    ) -> None:
        self._text, self._ends, self._columns = text, ends, columns
        self.patterns, self.roots = tuple(patterns), tuple(roots)
        self._first, self._stride, self._paths = first, stride, paths

    @classmethod
    def of(cls, entries: Sequence[VideoEntry]) -> EntryTable:
        """A table of plain entries, as lists and folders give them."""
        numbers: dict[str, int] = {}
        values = {name: np.empty(len(entries), dtype) for name, dtype in COLUMNS.items()}
        values["root"][:] = 0
        text, ends = bytearray(), np.empty(len(entries), np.int64)
        for place, entry in enumerate(entries):
            text += encode(entry.path) + b"\n"
            ends[place] = len(text)
            values["kind"][place] = KINDS.index(entry.kind)
            values["start"][place], values["total"][place] = entry.start, entry.total
            values["stride"][place], values["line"][place] = entry.stride or 0, entry.line
            values["pattern"][place] = numbers.setdefault(entry.pattern, len(numbers))
        columns = {name: spread(constant(column), len(entries)) for name, column in values.items()}
        return cls(np.frombuffer(bytes(text), np.uint8), ends, columns, patterns=tuple(numbers))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step != 1:
                return EntryList([self[number] for number in range(first, last, step)])
            return self._part(first, max(first, last))
        return self._entry(_place(index, len(self)))

    def _part(self, first: int, last: int) -> EntryTable:
        return EntryTable(
            self._text,
            self._ends[first:last],
            {name: column[first:last] for name, column in self._columns.items()},
            patterns=self.patterns,
            roots=self.roots,
            first=self._begin(first),
            stride=self._stride,
        )

    def _begin(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else self._first

    def _entry(self, number: int) -> VideoEntry:
        columns = self._columns
        return VideoEntry(
            self._path(number),
            KINDS[columns["kind"][number]],
            int(columns["start"][number]),
            int(columns["total"][number]),
            int(columns["stride"][number]) or self._stride,
            self.patterns[columns["pattern"][number]],
            int(columns["line"][number]),
        )

    def _path(self, number: int) -> str:
        root = self.roots[self._columns["root"][number]]
        return os.path.join(root, self.written_path(number))

    def written_path(self, number: int) -> str:
        """The path of an entry as the list has it."""
        text = self._text[self._begin(number) : int(self._ends[number]) - 1]
        return text.tobytes().decode("utf-8", "surrogatepass")

    def root_of(self, number: int) -> int:
        """Which of the `roots` an entry's path starts from."""
        return int(self._columns["root"][number])

    def __iter__(self) -> Iterator[VideoEntry]:
        return map(self._entry, range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled are the entries of this part alone, in memory of their own where they are read."""
        begin, end = self._begin(0), self._begin(len(self))
        columns = {name: constant(column) for name, column in self._columns.items()}
        ends = np.asarray(self._ends, np.int64) - begin
        more = (self.patterns, self.roots, self._stride)
        return _unpickled, (np.array(self._text[begin:end]), ends, columns, *more)

    def strides(self) -> list[int]:
        own = {int(stride) or self._stride for stride in distinct(self._columns["stride"])}
        return sorted(stride for stride in own if stride is not None)

    def images(self) -> int:
        total, images = self._columns["total"], 0
        for first in range(0, len(self), CHUNK):
            part = slice(first, first + CHUNK)
            images += int(total[part].sum(where=self._columns["kind"][part] == 1, dtype=np.int64))
        return images

    def numbers_of(self, kind: str) -> Sequence[int] | np.ndarray:
        wanted, column = KINDS.index(kind), self._columns["kind"]
        if _same(column) is not None:
            return range(len(self)) if _same(column) == wanted else range(0)
        return np.flatnonzero(column == wanted)

    def with_stride(self, stride: int | None) -> EntryTable:
        table = self._part(0, len(self))
        table._stride, table._paths = self._stride or stride, self._paths
        return table

    def as_images(self) -> EntryTable:
        """The same paths as single images, which have no stride."""
        table = self._part(0, len(self))
        image, none = (np.array([value], COLUMNS["kind"]) for value in (KINDS.index("image"), 0))
        table._columns |= {"kind": spread(image, len(self)), "stride": spread(none, len(self))}
        table._paths = self._paths
        return table

    def count_paths(self) -> int:
        if self._paths is None:
            self._paths = super().count_paths()
        return self._paths

    def path_bytes(self, first: int, last: int) -> list[bytes]:
        lines = self._path_lines(first, last)
        if lines is None:
            return [encode(self._path(number)) for number in range(first, last)]
        return lines.split(b"\n")[:-1]

    def _path_lines(self, first: int, last: int) -> bytes | None:
        """The paths of some entries with their root, and a line end behind each; None where they are not
        alike."""
        text = self._text[self._begin(first) : self._begin(last)].tobytes()
        number = _same(self._columns["root"][first:last])
        if number is None or text.count(b"\n") != last - first or os.sep != "/":
            return None
        root = encode(os.path.join(self.roots[number], ""))
        if not root or first == last:
            return text
        if text.startswith(b"/") or b"\n/" in text:
            return None
        return root + text[:-1].replace(b"\n", b"\n" + root) + b"\n"

    def identity_lines(self, first: int, last: int, start: str) -> bytes:
        kind, stride = (_same(self._columns[name][first:last]) for name in ("kind", "stride"))
        end = None if kind is None or stride is None else _IDENTITY_ENDS.get(kind)
        lines = None if end is None else self._path_lines(first, last)
        if lines is None or end is None:
            return super().identity_lines(first, last, start)
        lines = (b"\n" + lines).replace(b"\n" + encode(start), b"\n")[1:]
        return lines.replace(b"\n", encode(f"\0{stride or self._stride}{end}"))


def _unpickled(
    text: np.ndarray,
    ends: np.ndarray,
    columns: dict[str, np.ndarray],
    patterns: tuple[str, ...],
    roots: tuple[str, ...],
    stride: int | None,
) -> EntryTable:
    columns = {name: spread(column, len(ends)) for name, column in columns.items()}
    return EntryTable(text, ends, columns, patterns=patterns, roots=roots, stride=stride)


class LabelTable(Sequence[tuple[int, ...]]):
    """Labels of each entry in flat arrays.

    Args:
        values: int32, the labels of all entries, one after the other.
        ends: unsigned [n], where each entry's labels end in `values`; None where each has one.
    """

    def __init__(self, values: np.ndarray, ends: np.ndarray | None = None) -> None:
        self.values, self.ends = values, ends

    @classmethod
    def of(cls, labels: Sequence[Sequence[int]]) -> LabelTable:
        counts = np.fromiter(map(len, labels), np.int64, len(labels))
        values = np.fromiter(itertools.chain(*labels), np.int32, int(counts.sum()))
        return cls(values, None if (counts == 1).all() else counts.cumsum())

    def __len__(self) -> int:
        return len(self.values if self.ends is None else self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = _place(index, len(self))
        if self.ends is None:
            return (int(self.values[number]),)
        begin = int(self.ends[number - 1]) if number else 0
        return tuple(self.values[begin : int(self.ends[number])].tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, (str, bytes)):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def distinct(self) -> list[int]:
        """Every label that comes, once, sorted."""
        return distinct(self.values).tolist()

    @property
    def several(self) -> bool:
        """Whether an entry has more than one label."""
        return self.ends is not None and bool((np.diff(self.ends, prepend=0) > 1).any())


def as_entries(entries: Sequence[EntryT]) -> Entries[EntryT]:
    """`entries`, which can be asked what `Entries` can."""
    return entries if isinstance(entries, Entries) else EntryList(entries)


def path_hashes(entries: Entries[VideoEntry], first: int = 0, count: int = CHUNK) -> np.ndarray:
    """int64, a hash of each path from number `first` on; the same within this process only."""
    paths = entries.path_bytes(first, min(first + count, len(entries)))
    return np.fromiter(map(hash, paths), np.int64, len(paths))


def count_distinct(parts: Sequence[np.ndarray]) -> int:
    """How many different numbers there are."""
    numbers = np.concatenate([np.empty(0, np.int64), *parts])
    numbers.sort()
    return len(numbers) - int((numbers[1:] == numbers[:-1]).sum())


def distinct(column: np.ndarray) -> np.ndarray:
    """The values of a column, each once, sorted; looked at in parts."""
    parts = [np.unique(column[first : first + CHUNK]) for first in range(0, len(column), CHUNK)]
    return np.unique(np.concatenate([column[:0], *parts]))


def constant(column: np.ndarray) -> np.ndarray:
    """A column as it is stored: one value where all are the same."""
    return np.array(column[:1] if len(column) > 1 and _same(column) is not None else column)


def spread(column: np.ndarray, count: int) -> np.ndarray:
    """A stored column as one of `count` values."""
    return np.broadcast_to(column, count) if len(column) == 1 else column


def _same(column: np.ndarray) -> int | None:
    """The value that all of a column have; None where they differ, or there is none."""
    if not len(column) or (column.strides[0] and bool((column != column[0]).any())):
        return None
    return int(column[0])


def _place(index: Any, length: int) -> int:
    number = operator.index(index)
    if not -length <= number < length:
        raise IndexError(f"entry {number} of {length}")
    return number % length
