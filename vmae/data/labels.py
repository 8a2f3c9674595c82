"""Labelled lists, class names, and the maps between label spaces.

A labelled list has one entry a line, columns apart by blanks or commas, the label last (the published formats):

    path/to/video.mp4 17            a video of class 17
    path/to/frames 120 17           a folder of 120 images, numbered from 1
    path/to/frames 0 120 17         the same, numbered from 0
    path/to/video.mp4 3;17          several labels: every line of such a list may have one or more

What `vmae.data.manifest` says of blanks in paths, comments and `#!` lines holds here too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vmae.data.manifest import DEFAULT_PATTERN, Line, VideoEntry, read_list, read_text, whole
from vmae.errors import InputError
from vmae.jsontext import parse_json
from vmae.settings import CLASSES

_LABELS = re.compile(r"(.+?)(?:\s*,\s*|\s+)([+-]?\d+(?:;[+-]?\d+)*)")
_NUMBERS = re.compile(r"(.+?)(?:\s*,\s*|\s+)(\d+)(?:(?:\s*,\s*|\s+)(\d+))?")
_FORMATS = "write `path label` for a video, `folder frames label` for images, several labels as 3;17"
HEAD_NAMES = ("head.weight", "head.bias")


@dataclass(frozen=True)
class LabelledList:
    """Videos and what they show.

    Attributes:
        entries: of the list, in order.
        labels: classes of each entry, from 0; at least one each.
        num_classes: labels are below it.
        multi: whether a video can have several labels (a loss of its own for each class).
    """

    entries: list[VideoEntry]
    labels: list[tuple[int, ...]]
    num_classes: int
    multi: bool

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
) -> LabelledList:
    """Read a labelled list (format: see the module) and check that everything it names is there.

    Args:
        data_root: see `read_list`.
        num_classes: of the label space; None takes the largest label plus 1.

    Raises:
        InputError: see `read_list`; a line without a label; a label out of range (with its line).
    """
    found: dict[int, tuple[int, ...]] = {}

    def parse_line(content: str, where: str, number: int, stride: int | None, pattern: str | None) -> Line:
        match = _LABELS.fullmatch(content)
        if match is None:
            raise InputError(f"{where}: no label at the end of {content!r}; {_FORMATS}")
        labels = tuple(dict.fromkeys(whole(label) for label in match[2].split(";")))
        wrong = next((label for label in labels if not 0 <= label < (num_classes or CLASSES.most)), None)
        if wrong is not None:
            known = f"0 to {CLASSES.most - 1}" if num_classes is None else f"0 to {num_classes - 1} ({num_classes} classes)"
            raise InputError(f"{where}: label {wrong} is out of range; labels are {known}")
        found[number] = labels
        return Line(number, _readings(match[1]), stride, pattern)

    entries = read_list(path, data_root, frame_pattern=frame_pattern, parse_line=parse_line)
    labels = [found[entry.line] for entry in entries]
    total = num_classes or max(max(own) for own in labels) + 1
    return LabelledList(entries, labels, total, any(len(own) > 1 for own in labels))


def _readings(content: str) -> tuple[tuple[str, int, int], ...]:
    """What the columns before the label can mean: (path, start, total), the likelier first."""
    match = _NUMBERS.fullmatch(content)
    if match is None:
        return ((content, 0, -1),)
    if match[3] is None:
        return ((match[1], 1, whole(match[2])), (content, 0, -1))
    start, total = whole(match[2]), whole(match[3])
    return ((match[1], start, total), (f"{match[1]} {match[2]}", 1, total), (content, 0, -1))


def write_labelled_list(path: Path, entries: Sequence[VideoEntry], labels: Sequence[Iterable[int]]) -> None:
    """Write a list that `read_labelled_list` reads, with absolute paths.

    Raises:
        InputError: the file cannot be written.
    """
    lines, stride, pattern = [], None, DEFAULT_PATTERN
    for entry, own in zip(entries, labels, strict=True):
        if (entry.stride, entry.pattern) != (stride, pattern):
            stride, pattern = entry.stride, entry.pattern
            lines.append(f"#! stride={stride or 'default'} pattern={pattern}\n")
        frames = "" if entry.kind == "video" else f"{entry.start} {entry.total} "
        lines.append(f"{os.path.abspath(entry.path)} {frames}{';'.join(map(str, own))}\n")
    part = path.with_name(path.name + ".part")
    try:
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from None


def read_class_names(path: str | Path) -> list[str]:
    """Class names by number: a name a line, `number,name` lines in any order, or JSON (a list, or {name: number}).

    Raises:
        InputError: the file cannot be read, a name comes twice, or numbers are missing.
    """
    text = read_text(path)
    names = _names_from_json(path, text) if Path(path).suffix == ".json" else _names_from_text(path, text)
    if not names:
        raise InputError(f"class list {str(path)!r} names no classes")
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise InputError(f"class list {str(path)!r}: {twice!r} comes twice")
    return names


def _names_from_text(path: str | Path, text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if lines and lines[0].lower().replace(" ", "") in ("id,name", "label,name", "class,name"):
        del lines[0]
    numbered = [re.fullmatch(r"(\d+)[,\s]\s*(.+)", line) for line in lines]
    if not lines or None in numbered:
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


def read_label_map(path: str | Path, *, source_classes: int | None = None, num_classes: int | None = None) -> list[int]:
    """A map from one label space to another, in the published form (`label_710to400.json`): a JSON list whose entry i is
    the number that target class i has in the larger space.

    Args:
        source_classes: of the larger space.
        num_classes: of the target.

    Raises:
        InputError: the file is no such list; it misses classes of the target, or names one that the source has not.
    """
    try:
        found = parse_json(read_text(path))
    except ValueError as error:
        raise InputError(f"label map {str(path)!r} is no JSON: {error}") from None
    if not isinstance(found, list) or not found or not all(type(number) is int for number in found):
        raise InputError(f"label map {str(path)!r} is no list of whole numbers, one for each target class")
    if num_classes is not None and len(found) != num_classes:
        fault = "misses classes" if len(found) < num_classes else "has too many"
        raise InputError(f"label map {str(path)!r} {fault}: it maps {len(found)} classes, the target has {num_classes}")
    top = source_classes if source_classes is not None else min(max(found) + 1, CLASSES.most)
    wrong = next((number for number in found if not 0 <= number < top), None)
    if wrong is not None:
        raise InputError(f"label map {str(path)!r} names class {wrong}, but the source has {top} classes (0 to {top - 1})")
    if len(set(found)) < len(found):
        raise InputError(f"label map {str(path)!r} gives two target classes the same source class")
    return found


def convert_head(state: dict[str, Tensor], label_map: Sequence[int]) -> dict[str, Tensor]:
    """`state` with a head for the target classes: row i is the source head's row `label_map[i]`."""
    rows = torch.from_numpy(np.asarray(label_map, dtype=np.int64))
    return {name: value[rows] if name in HEAD_NAMES else value for name, value in state.items()}
