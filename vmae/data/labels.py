"""Labelled lists, class names, and the maps between label spaces.

A labelled list has one entry a line, columns apart by blanks or commas, the label last (the published
formats):

    path/to/video.mp4 17            a video of class 17
    path/to/frames 120 17           a folder of 120 images, numbered from 1
    path/to/frames 0 120 17         the same, numbered from 0
    path/to/video.mp4 3;17          several labels: every line of such a list may have one or more
    path/to/video.mp4 0 -1 17       the columns of lists for pre-training, with a label

What `vmae.data.manifest` says of blanks in paths, comments and `#!` lines holds here too.
"""

from __future__ import annotations

import argparse
import array
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vmae.data.entry_table import EntryTable, LabelTable
from vmae.data.files import path_kind
from vmae.data.list_lines import LineReader
from vmae.data.list_parsing import LABELLED_LINE, Grammar, list_contents, plain_grammar
from vmae.data.long_lists import read_all_of_long_list, read_long_list
from vmae.data.manifest import (
    DEFAULT_PATTERN,
    Line,
    VideoEntry,
    check_pattern,
    check_root,
    is_comment,
    make_entry,
    raise_problems,
    read_columns,
    read_list_with_problems,
    read_text,
    roots_of,
    split_lines,
    unquote,
    whole,
    write_list,
)
from vmae.data.shards.index import ShardIndex
from vmae.data.shards.source import check_labels, index_at
from vmae.errors import InputError
from vmae.files.json_files import parse_json
from vmae.settings import CLASSES

_LABELS = re.compile(r"(.+?)(?:\s*,\s*|\s+)([+-]?\d+(?:;[+-]?\d+)*)")
_NUMBERS = re.compile(r"(.+?)(?:\s*,\s*|\s+)(\d+)(?:(?:\s*,\s*|\s+)(\d+|-1))?")
_FORMATS = "write `path label` for a video, `folder frames label` for images, several labels as 3;17"
_FOURTH = re.compile(r"(.+?)(?:\s*,\s*|\s+)\d{1,18}(?:\s*,\s*|\s+)(\d{1,18}|-1)(?:\s*,\s*|\s+)(\d{1,18})")
_LABEL = re.compile(r"[+-]?\d+(?:;[+-]?\d+)*")
HEAD_NAMES = ("head.weight", "head.bias")


@dataclass(frozen=True)
class LabelledList:
    """Videos and what they show.

    Attributes:
        entries: the list's videos, in order.
        labels: classes of each entry, from 0; at least one each.
        num_classes: labels are below it.
        multi: whether a video can have several labels (a loss of its own for each class).
    """

    entries: Sequence[VideoEntry]
    labels: Sequence[tuple[int, ...]]
    num_classes: int
    multi: bool

    def count_classes(self) -> int:
        """How many classes have a video."""
        if isinstance(self.labels, LabelTable):
            return len(self.labels.distinct())
        return len({label for own in self.labels for label in own})

    def targets(self, numbers: Sequence[int]) -> Tensor:
        """float32 [B, num_classes] of these entries: 1 at each label."""
        return one_hot([self.labels[number] for number in numbers], self.num_classes)


def one_hot(labels: Sequence[Iterable[int]], num_classes: int) -> Tensor:
    """float32 [B, num_classes]: 1 at each label, 0 elsewhere."""
    rows = torch.zeros(len(labels), num_classes)
    for row, own in zip(rows, labels, strict=True):
        row[list(own)] = 1
    return rows


def read_labelled_list(
    path: str | Path,
    data_root: str | Path | None = None,
    *,
    num_classes: int | None = None,
    frame_pattern: str = DEFAULT_PATTERN,
    first_frame: int = 1,
) -> LabelledList:
    """Read a labelled list (format: see the module) and check that what it names is there; of a list of
    20,000 lines or more, a sample (see `vmae.data.long_lists`). Or an index of shards, whose labels are those
    of the list that was packed.

    Args:
        data_root: see `read_list`; of an index, folder or address at which the names of its shards start.
        num_classes: size of the label space; None takes the largest label plus 1.
        frame_pattern: file names of frames where no `#!` line says them; one that is not the default counts
            before the published conventions.
        first_frame: number of a folder's first image where the line does not say it.

    Raises:
        InputError: see `read_list`; a line without a label; a label out of range (with its line).
    """
    index = index_at(path, data_root)
    if index is not None:
        labels = labels_of(index)
        total = check_labels(str(path), index, num_classes, CLASSES.most)
        return LabelledList(index, labels, total, labels.several)
    grammar = _labelled_grammar(num_classes, frame_pattern, first_frame)
    check_pattern(frame_pattern, "frame pattern")
    check_root(data_root)
    found = read_long_list(path, grammar, roots_of(path, data_root))
    if found is None:
        entries, problems, own = _read_labelled(path, data_root, grammar)
        raise_problems(path, data_root, problems, len(entries))
        found = EntryTable.of(entries), LabelTable.of(own)
    table, classes = found
    assert classes is not None
    total = num_classes or classes.distinct()[-1] + 1
    return LabelledList(table, classes, total, classes.several)


def labels_of(index: ShardIndex) -> LabelTable:
    """The classes of the samples of an index."""
    values, ends = index.columns["labels"], index.columns["label_end"]
    single = len(values) == len(ends) and np.array_equal(ends, np.arange(1, len(ends) + 1))
    return LabelTable(values, None if single else ends)


_Problems = list[tuple[int, str]]


def _labelled_grammar(
    num_classes: int | None, frame_pattern: str = DEFAULT_PATTERN, first_frame: int = 1
) -> Grammar:
    """That of labelled lists, see `read_labelled_list`."""
    named = None if frame_pattern == DEFAULT_PATTERN else frame_pattern
    classes = num_classes or CLASSES.most

    def parse(
        content: str, where: str, number: int, stride: int | None, pattern: str | None
    ) -> tuple[Line, tuple[int, ...]]:
        match = _LABELS.fullmatch(content)
        if match is None:
            raise InputError(f"{where}: no label at the end of {content!r}; {_FORMATS}")
        labels = tuple(dict.fromkeys(whole(label) for label in match[2].split(";")))
        wrong = next((label for label in labels if not 0 <= label < classes), None)
        if wrong is not None:
            known = f"0 to {CLASSES.most - 1}"
            if num_classes is not None:
                known = f"0 to {num_classes - 1} ({num_classes} classes)"
            raise InputError(f"{where}: label {wrong} is out of range; labels are {known}")
        return Line(number, _readings(match[1], first_frame), stride, pattern or named), labels

    return Grammar(parse, LABELLED_LINE, frame_pattern, named, first_frame, classes)


def _read_labelled(
    path: str | Path, data_root: str | Path | None, grammar: Grammar
) -> tuple[list[VideoEntry], _Problems, list[tuple[int, ...]]]:
    """Entries, problems (see `read_list_with_problems`), and the entries' labels; line by line."""
    found: dict[int, tuple[int, ...]] = {}

    def parse_line(content: str, where: str, number: int, stride: int | None, pattern: str | None) -> Line:
        line, labels = grammar.parse(content, where, number, stride, pattern)
        found[number] = labels or ()
        return line

    entries, problems = read_list_with_problems(
        path, data_root, frame_pattern=grammar.frame_pattern, parse_line=parse_line
    )
    return entries, problems, [found[entry.line] for entry in entries]


def _readings(content: str, first: int = 1) -> tuple[tuple[str, int, int], ...]:
    """What the columns before the label can mean: (path, start, total), the likelier first."""
    match = _NUMBERS.fullmatch(content)
    if match is None:
        return ((content, 0, -1),)
    if match[3] is None:
        return ((match[1], first, whole(match[2])), (content, 0, -1))
    start, total = whole(match[2]), whole(match[3])
    return ((match[1], start, total), (f"{match[1]} {match[2]}", first, total), (content, 0, -1))


# --- Lists of either kind ---


@dataclass(frozen=True)
class AnyList:
    """A list for pre-training, a labelled one, or a folder of videos.

    Attributes:
        entries: those that are there.
        labels: classes of each entry; None for one without.
        labelled: whether its columns are those of a labelled list.
        problems: (line number, what is wrong) of the others.
    """

    entries: Sequence[VideoEntry]
    labels: Sequence[tuple[int, ...] | None]
    labelled: bool
    problems: _Problems


def read_any_list(
    path: str | Path, data_root: str | Path | None = None, labelled: bool | None = None
) -> AnyList:
    """Read a list of either kind, a folder, or an index of shards, and keep the labels.

    Args:
        data_root: see `read_list`.
        labelled: which columns the list has; None finds out (`folder 1 120` can be either: the frames there
            decide).

    Raises:
        InputError: see `read_list_with_problems` and `index_at`.
    """
    index = index_at(path, data_root)
    if index is not None:
        labels = [own or None for own in labels_of(index)]
        return AnyList(index, labels, any(own is not None for own in labels), [])
    if path_kind(path) == "a folder":
        entries, problems = read_list_with_problems(path, data_root)
        return AnyList(entries, [None] * len(entries), False, problems)
    if labelled is None:
        labelled = _looks_labelled(path, data_root)
    grammar = _labelled_grammar(None) if labelled else plain_grammar()
    check_root(data_root)
    found = read_all_of_long_list(path, grammar, roots_of(path, data_root))
    if found is not None:
        table, own, problems = found
        return AnyList(table, _fourth_columns(path, table) if own is None else own, labelled, problems)
    if labelled:
        entries, problems, classes = _read_labelled(path, data_root, grammar)
        return AnyList(entries, list(classes), True, problems)
    entries, problems = read_list_with_problems(path, data_root)
    lines = split_lines(read_text(path))
    return AnyList(
        entries, [_fourth_column(lines[entry.line - 1], entry) for entry in entries], False, problems
    )


LABELLED = {"auto": None, "yes": True, "no": False}


def add_labelled_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labelled",
        choices=list(LABELLED),
        default="auto",
        help="whether the list is one for fine-tuning, with a label at each line's end; "
        "auto finds out (auto)",
    )


def _fourth_column(content: str, entry: VideoEntry) -> tuple[int, ...] | None:
    """The label of a line `path start total label`, unless it was read as a path that ends with a number."""
    match = _FOURTH.fullmatch(unquote(content))
    if match is None or int(match[2]) != entry.total or not entry.path.endswith(match[1]):
        return None
    return tuple(map(int, match[3].split(";")))


class _SomeLabels(LabelTable):
    """Labels of entries, None for one without."""

    def __getitem__(self, index):
        return super().__getitem__(index) or None


def _fourth_columns(path: str | Path, entries: Sequence[VideoEntry]) -> _SomeLabels:
    """`_fourth_column` of each entry of a long list."""
    labels, ends = array.array("i"), np.zeros(len(entries), np.int64)
    wanted = zip(range(len(entries)), entries)
    place, entry = next(wanted, (0, None))
    for number, content in enumerate(list_contents(path), 1):
        if entry is None or number != entry.line:
            continue
        labels.extend(_fourth_column(content, entry) or ())
        ends[place] = len(labels)
        place, entry = next(wanted, (0, None))
    return _SomeLabels(np.frombuffer(labels, np.int32) if labels else np.empty(0, np.int32), ends)


def _looks_labelled(path: str | Path, data_root: str | Path | None) -> bool:
    """Whether more lines can only be those of a labelled list than can only be those of one for
    pre-training."""
    votes: Counter[str] = Counter()
    either: list[tuple[str, Line]] = []

    def look(content: str, where: str, number: int, stride: int | None, pattern: str | None) -> Line:
        *_, total, last = ("", "", *re.split(r"[\s,]+", content)[1:])
        if not _LABEL.fullmatch(last):
            votes["plain"] += 1
        elif ";" in last or not _LABEL.fullmatch(total):
            votes["labelled"] += 1
        elif last == "-1":
            votes["plain"] += 1
        elif total != "-1":
            either.append((content, Line(number, (), stride, pattern)))
        return Line(number, (), stride, pattern)

    reader, contents = LineReader(str(path), look), list_contents(path)
    try:
        for content in contents:
            reader.read(content)
    except InputError:
        for _ in contents:  # what is no text at all is said first
            pass
        raise
    if not votes:
        roots = roots_of(path, data_root)
        for content, line in either[:: max(len(either) // 64, 1)]:
            plain = filter(None, (read_columns(content, count) for count in (3, 2)))
            votes["plain"] += _fits(plain, line, roots)
            match = _LABELS.fullmatch(content)
            assert match is not None  # its last column is a label
            votes["labelled"] += _fits(_readings(match[1]), line, roots)
    return votes["labelled"] > votes["plain"]


def _fits(readings: Iterable[tuple[str, int, int]], line: Line, roots: Sequence[str]) -> bool:
    """Whether one of the readings is a file, or a folder that has just its frames."""
    for path, start, total in readings:
        for root in roots:
            entry = make_entry(os.path.join(root, path), start, total, line)
            if total < 0 and os.path.isfile(entry.path):
                return True
            if total > 0:
                first, last, behind = (os.path.isfile(entry.frame_path(i)) for i in (0, total - 1, total))
                if first and last and not behind:
                    return True
    return False


def write_labelled_list(path: Path, entries: Sequence[VideoEntry], labels: Sequence[Iterable[int]]) -> None:
    """Write a list that `read_labelled_list` reads, with absolute paths.

    Raises:
        InputError: the file cannot be written.
    """
    write_list(path, entries, labels, labelled=True)


def read_class_names(path: str | Path) -> list[str]:
    """Class names by number: a name a line, `number,name` lines in any order, or JSON (a list, or {name:
    number}).

    Raises:
        InputError: the file cannot be read, a name comes twice, or numbers are missing.
    """
    text = read_text(path)
    read = _names_from_json if Path(path).suffix == ".json" else _names_from_text
    names = read(path, text)
    if not names:
        raise InputError(f"class list {str(path)!r} names no classes")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"class list {str(path)!r}: {twice!r} comes twice")
    return names


def _names_from_text(path: str | Path, text: str) -> list[str]:
    lines = [line for line in split_lines(text) if line and not is_comment(line)]
    if lines and lines[0].lower().replace(" ", "") in ("id,name", "label,name", "class,name"):
        del lines[0]
    found = (re.fullmatch(r"(\d+)[,\s]\s*(.+)", line) for line in lines)
    numbered = [match for match in found if match is not None]
    if not lines or len(numbered) < len(lines):
        return lines
    return _by_number(path, {re.sub(r'^"(.*)"$', r"\1", match[2]): whole(match[1]) for match in numbered})


def _names_from_json(path: str | Path, text: str) -> list[str]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise InputError(f"class list {str(path)!r} is no JSON: {error}") from None
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if isinstance(content, dict) and all(str(number).isdecimal() for number in content.values()):
        return _by_number(path, {name: int(number) for name, number in content.items()})
    raise InputError(f"class list {str(path)!r} is neither a list of names nor {{name: number}}")


def _by_number(path: str | Path, numbers: dict[str, int]) -> list[str]:
    names = {number: name for name, number in numbers.items()}
    if sorted(names) != list(range(len(numbers))):
        raise InputError(f"class list {str(path)!r}: the numbers are not 0 to {len(numbers) - 1}, each once")
    return [names[number] for number in range(len(numbers))]


def read_label_map(
    path: str | Path, *, source_classes: int | None = None, num_classes: int | None = None
) -> list[int]:
    """A map from one label space to another, in the published form (`label_710to400.json`): a JSON list whose
    entry i is the number that target class i has in the larger space.

    Args:
        source_classes: classes of the larger space.
        num_classes: classes of the target.

    Raises:
        InputError: the file is no such list; it misses classes of the target, or names one that the source
            has not.
    """
    try:
        found = parse_json(read_text(path))
    except ValueError as error:
        raise InputError(f"label map {str(path)!r} is no JSON: {error}") from None
    if not isinstance(found, list) or not found or not all(type(number) is int for number in found):
        raise InputError(f"label map {str(path)!r} is no list of whole numbers, one for each target class")
    if num_classes is not None and len(found) != num_classes:
        fault = "misses classes" if len(found) < num_classes else "has too many"
        raise InputError(
            f"label map {str(path)!r} {fault}: it maps {len(found)} classes, the target has {num_classes}"
        )
    top = source_classes
    if top is None:
        top = min(max(found) + 1, CLASSES.most)
    wrong = next((number for number in found if not 0 <= number < top), None)
    if wrong is not None:
        raise InputError(
            f"label map {str(path)!r} names class {wrong}, but the source has {top} classes (0 to {top - 1})"
        )
    if len(set(found)) < len(found):
        raise InputError(f"label map {str(path)!r} gives two target classes the same source class")
    return found


def convert_head(state: dict[str, Tensor], label_map: Sequence[int]) -> dict[str, Tensor]:
    """`state` with a head for the target classes: row i is the source head's row `label_map[i]`."""
    rows = torch.from_numpy(np.asarray(label_map, dtype=np.int64))
    return {name: value[rows] if name in HEAD_NAMES else value for name, value in state.items()}
