"""Long lists, fast: plain lines are read many at a time by one regular expression, all others as those of a
short list (`vmae.data.list_lines`), which decides what a line means.

A line that can mean two things (three numbers at its end, or one before a label) and a relative path that can
start from two folders are settled by looking at the files, as in short lists; but where a sample of a part's
lines, spread over it, agrees, so do the others of that part.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
import string
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from vmae.data.files import Unanswered, ask_files
from vmae.data.list_lines import (
    DEFAULT_PATTERN,
    FORMATS,
    SOURCE_PATTERNS,
    SOURCE_STRIDES,
    Line,
    LineReader,
    decode_lines,
    foreign_table,
    is_comment,
    parse_plain_line,
    read_pieces,
    resolve_line,
    split_lines,
    unquote,
)
from vmae.errors import InputError

SAMPLE = 32  # lines of a part that are looked up where something is to be settled
FEW = 1000  # lines up to which all are
_GAP = r"(?:[ \t]*,[ \t]*|[ \t]+)"
# A path, maybe in quotes, whose last word is no number, so that the numbers behind it have one meaning each.
_PATH = r'("?)(?![\s"#])([^\n"]*[^\s",\d+-][\d+-]*)\1'
_COUNT = r"(-1|0*[1-9]\d{0,8})"
# Groups: the quote, path, start, total, last column, any other line.
PLAIN_LINE = re.compile(
    rf"^(?:{_PATH}(?:{_GAP}(\d{{1,9}}){_GAP}{_COUNT}(?:{_GAP}(\d{{1,9}}))?)?|(.*))$", re.MULTILINE
)
LABELLED_LINE = re.compile(
    rf"^(?:{_PATH}(?:(?:{_GAP}(\d{{1,9}}))?{_GAP}{_COUNT})?{_GAP}(\d{{1,9}}(?:;\d{{1,9}})*)|(.*))$",
    re.MULTILINE,
)
# What a part of the plainest lines is made of: no blank, quote, comma or bracket, nothing but ASCII.
_END, _PLAIN_BYTES = b" 0 -1\n", (string.ascii_letters + string.digits + "/._-+=~@%:&()\n").encode()
_SOURCES = {*SOURCE_STRIDES, *SOURCE_PATTERNS}
Item = TypeVar("Item")


@dataclass(frozen=True)
class Grammar:
    """What the columns of a list mean.

    Attributes:
        parse: (line's content, where, number, stride, pattern) -> the line, and its labels.
        plain: groups as those of `PLAIN_LINE`; an expression that gives no plain line a wrong meaning.
        frame_pattern: see `read_list`.
        named_pattern: counts before the published conventions.
        first_frame: number of a folder's first image where a line has none.
        classes: labels are below it; None for a list without labels.
    """

    parse: Callable[[str, str, int, int | None, str | None], tuple[Line, tuple[int, ...] | None]]
    plain: re.Pattern[str]
    frame_pattern: str = DEFAULT_PATTERN
    named_pattern: str | None = None
    first_frame: int = 1
    classes: int | None = None

    @property
    def settings(self) -> str:
        """All that decides, beside a list's content, what its lines mean."""
        return repr(
            (self.plain.pattern, self.frame_pattern, self.named_pattern, self.first_frame, self.classes)
        )


def plain_grammar(frame_pattern: str = DEFAULT_PATTERN) -> Grammar:
    """That of lists for pre-training."""
    return Grammar(lambda *line: (parse_plain_line(*line), None), PLAIN_LINE, frame_pattern)


@dataclass
class Piece:
    """Entries of some lines that follow each other; n of them.

    Attributes:
        text: the paths, each with a line end behind.
        ends: int64 [n], where each path ends in `text`, behind its line end.
        columns: see `vmae.data.entry_table.COLUMNS`; [n], or [1] where all are the same.
        labels: (int32, the labels one after the other; int64 [n], how many each entry has, or None for one
            each); None for a list without.
    """

    text: bytes
    ends: np.ndarray
    columns: dict[str, np.ndarray]
    labels: tuple[np.ndarray, np.ndarray | None] | None


@dataclass
class _Lines:
    """Lines of a part, a column each; `path` is empty where a line has no entry.

    Attributes:
        open: numbers of the plain ones that have more than one reading.
        odd: those that were read one by one, by number.
        settings: (number, stride, pattern) that hold from this line on.
        labels: see `Piece`.
        root: of each line, or of all.
    """

    path: list[str]
    start: list[str]
    total: list[str]
    last: list[str]
    open: list[int] = field(default_factory=list)
    odd: dict[int, Line] = field(default_factory=dict)
    settings: list[tuple[int, int | None, str | None]] = field(default_factory=list)
    labels: tuple[np.ndarray, np.ndarray | None] | None = None
    root: np.ndarray | int = 0


class ListParser:
    """Entries of a list, in parts.

    Args:
        name: of the list, for messages.
        roots: see `roots_of`.
        every: look up every line, and leave those out that cannot be used.

    Attributes:
        patterns: those of the column `pattern`.
        looked_up: how many lines' files were looked up.
        problems: (line number, what is wrong) of those that cannot be used.
    """

    def __init__(self, name: str, grammar: Grammar, roots: Sequence[str], *, every: bool = False) -> None:
        self.name, self.grammar, self.roots, self._every = name, grammar, list(roots), every
        self.looked_up = 0
        self.patterns: dict[str, int] = {}
        self.problems: list[tuple[int, str]] = []
        self._labels: tuple[int, ...] | None = None
        self._reader = LineReader(name, self._parse_one)

    def pieces(self, data: Iterable[bytes]) -> Iterator[Piece]:
        """The entries of a list whose bytes are `data`, cut anywhere.

        Raises:
            InputError: what `read_list` says of the list's text.
        """
        parts = whole_lines(data)
        before = 0
        for part in parts:
            piece = self._plainest(part)
            count = part.count(b"\n")
            if piece is not None:
                before += count
                yield piece
                continue
            text = decode_lines(part, self.name, before)
            before += count
            try:
                piece = self._piece(text)
            except InputError:
                for rest in parts:  # what is no text at all is said first
                    decode_lines(rest, self.name, before)
                    before += rest.count(b"\n")
                raise
            if len(piece.ends):
                yield piece
        if not self._reader.entries:
            raise InputError(f"list file {self.name!r} has no entries; {FORMATS}")

    def _parse_one(
        self, content: str, where: str, number: int, stride: int | None, pattern: str | None
    ) -> Line:
        line, self._labels = self.grammar.parse(content, where, number, stride, pattern)
        return line

    def _piece(self, text: str) -> Piece:
        text = _unended(text)
        before = copy.copy(self._reader)
        try:
            lines = self._read_lines(text)
        except InputError:  # the first wrong line of all is the one to name
            for content in split_lines(text):
                before.read(content)
            raise
        first = self._reader.number - len(lines.path)
        self._settle(lines, first, text)
        return self._columns(lines, first, text)

    def _read_lines(self, text: str) -> _Lines:
        """The lines of a part, without a look at any file."""
        grammar, reader = self.grammar, self._reader
        if not reader.entries:
            begin = next((line for line in split_lines(text) if line and not is_comment(line)), "")
            if foreign := foreign_table(begin):
                raise InputError(foreign)
            reader.entries = len(begin)
        rows = grammar.plain.findall(text)
        _, path, start, total, last, others = (list(column) for column in zip(*rows, strict=True))
        lines, first = _Lines(path, start, total, last), reader.number
        lines.settings.append((0, reader.stride, reader.pattern))
        for place in [place for place, other in enumerate(others) if other]:
            reader.number = first + place
            line = reader.read(others[place].strip())
            if line is None:
                lines.settings.append((place, reader.stride, reader.pattern))
                continue
            lines.odd[place] = line
            lines.last[place] = ";".join(map(str, self._labels or ()))
            _take(lines, place, 0, line)
        reader.number = first + len(others)
        several = lines.last if grammar.classes is None else lines.total
        lines.open = [place for place, column in enumerate(several) if column and place not in lines.odd]
        if grammar.classes is not None:
            labels, counts = _parse_labels([last for path, last in zip(lines.path, lines.last) if path])
            if len(labels) and labels.max() >= grammar.classes:
                raise InputError(f"a label is not below {grammar.classes}")
            lines.labels = labels, counts
        return lines

    # --- What the files decide ---

    def _settle(self, lines: _Lines, first: int, text: str) -> None:
        """Choose the readings of lines that have several, and the roots of relative paths."""
        contents: list[str] = []
        set_from = [place for place, *_ in lines.settings]

        def line_at(place: int) -> Line:
            if place in lines.odd:
                return lines.odd[place]
            if not contents:
                contents.extend(text.split("\n"))
            _, stride, pattern = lines.settings[bisect_right(set_from, place) - 1]
            where = f"list file {self.name!r}, line {first + place + 1}"
            content = unquote(contents[place].strip())
            return self.grammar.parse(content, where, first + place + 1, stride, pattern)[0]

        if self._every:
            lines.root = np.zeros(len(lines.path), np.uint8)
            wrong = len(self.problems)
            self._choose(lines, [place for place, path in enumerate(lines.path) if path], line_at)
            for number, _ in self.problems[wrong:]:
                lines.path[number - first - 1] = ""
            if lines.labels is not None:
                lines.labels = _parse_labels(list(itertools.compress(lines.last, lines.path)))
            return
        odd = [place for place, line in lines.odd.items() if len(line.readings) > 1]
        relative: list[int] = []
        if len({os.path.join(root, "") for root in self.roots}) > 1:
            settled = {*odd, *lines.open}
            relative = [
                place
                for place, path in enumerate(lines.path)
                if path and path[0] != "/" and not os.path.isabs(path) and place not in settled
            ]
        if not (odd or relative or lines.open):
            return
        lines.root = np.zeros(len(lines.path), np.uint8)
        self._choose(lines, odd, line_at)
        for places in (lines.open, relative):
            if len(places) > FEW:
                chosen = self._choose(lines, spread_sample(places, SAMPLE), line_at)
                if not chosen:  # nothing is there: that is an error
                    continue
                if len(chosen) == 1 and next(iter(chosen))[0] == 0:
                    lines.root[places] = next(iter(chosen))[1]
                    continue
            self._choose(lines, places, line_at)

    def _choose(
        self, lines: _Lines, places: Sequence[int], line_at: Callable[[int], Line]
    ) -> set[tuple[int, int]]:
        """Look these lines up, and keep what they mean; the (reading, root) that were found."""
        assert not isinstance(lines.root, int)
        asked = [line_at(place) for place in places]
        chosen = set()
        for place, line, (found, problem) in zip(places, asked, self.look_up(asked), strict=True):
            if found is None:
                self.problems.append((line.number, problem))
                continue
            lines.root[place] = found[1]
            _take(lines, place, found[0], line)
            chosen.add(found)
        return chosen

    def look_up(self, lines: Sequence[Line]) -> list[tuple[tuple[int, int] | None, str]]:
        """((number of the reading, of the root), "") of each line, or (None, what is wrong).

        Raises:
            InputError: the file system does not answer.
        """
        pattern = self.grammar.frame_pattern
        try:
            found = ask_files(lambda line: resolve_line(line, self.roots, pattern), lines, threads=8)
        except Unanswered as error:
            raise InputError(f"list file {self.name!r}, line {lines[error.item].number}: {error}") from None
        self.looked_up += len(lines)
        results: list[tuple[tuple[int, int] | None, str]] = []
        for line, (entry, problem) in zip(lines, found, strict=True):
            if entry is None:
                results.append((None, problem or ""))
                continue
            ways = itertools.product(range(len(line.readings)), range(len(self.roots)))
            results.append(
                (
                    next(
                        (reading, root)
                        for reading, root in ways
                        if os.path.join(self.roots[root], line.readings[reading][0]) == entry.path
                        and line.readings[reading][2] == entry.total
                    ),
                    "",
                )
            )
        return results

    # --- Columns ---

    def _columns(self, lines: _Lines, first: int, text: str) -> Piece:
        """The entries of lines whose meaning is settled."""
        count = len(lines.path)
        total, start = np.array([-1], np.int32), np.array([0], np.int32)
        if not set(lines.total) <= {"-1", ""}:
            total = _numbers(lines.total, -1)
            start = _numbers(lines.start, self.grammar.first_frame)
            start[total == -1] = 0
        columns = {
            "kind": (total != -1).astype(np.uint8),
            "start": start,
            "total": total,
            "stride": self._strides(lines, text),
            "pattern": self._patterns(lines, text),
            "line": np.arange(first + 1, first + 1 + count, dtype=np.int32),
            "root": np.atleast_1d(np.asarray(lines.root, np.uint8)),
        }
        if not all(lines.path):
            kept = np.fromiter(map(bool, lines.path), bool, count)
            columns = {
                name: column[kept] if len(column) == count else column for name, column in columns.items()
            }
        paths = "".join(f"{path}\n" for path in lines.path if path).encode()
        ends = np.flatnonzero(np.frombuffer(paths, np.uint8) == ord("\n")) + 1
        return Piece(paths, ends, columns, lines.labels)

    def _plainest(self, part: bytes) -> Piece | None:
        """The entries of a part that has nothing but videos without blanks or labels, each line as `path 0
        -1` or all as `path`; None for any other, which is read line by line.

        It takes a tenth of the time, and most lists of millions of videos are of this kind.
        """
        count = part.count(b"\n")
        if self._every or self.grammar.classes is not None or not part.endswith(b"\n"):
            return None
        text = part.replace(_END, b"\n") if part.count(_END) == count else part
        if text.translate(None, _PLAIN_BYTES) or text.startswith(b"\n") or b"\n\n" in text:
            return None
        if any(source in root for source in _SOURCES for root in self.roots):
            return None
        if any(source.encode() in text for source in _SOURCES):
            return None
        data = np.frombuffer(text, np.uint8)
        ends = np.flatnonzero(data == ord("\n")) + 1
        begins = np.append(0, ends[:-1])
        first = self._reader.number
        root = self._root_of_all(text, begins, ends, np.flatnonzero(data[begins] != ord("/")))
        if root is None:
            return None
        self._reader.number += count
        self._reader.entries += count
        stride, pattern = self._reader.stride, self._reader.pattern or self.grammar.frame_pattern
        values = {"kind": 0, "start": 0, "total": -1, "stride": stride or 0, "root": root}
        values["pattern"] = self.patterns.setdefault(pattern, len(self.patterns))
        columns = {name: np.array([value]) for name, value in values.items()}
        columns["line"] = np.arange(first + 1, first + 1 + count, dtype=np.int32)
        return Piece(text, ends, columns, None)

    def _root_of_all(
        self, text: bytes, begins: np.ndarray, ends: np.ndarray, relative: np.ndarray
    ) -> int | None:
        """Where the relative paths of a part start from, by a sample of them; None where the sample is not of
        one mind, or names what is not there."""
        if not len(relative) or len({os.path.join(root, "") for root in self.roots}) < 2:
            return 0
        if len(relative) <= FEW:
            return None
        first, reader = self._reader.number + 1, self._reader
        lines = []
        for number in spread_sample(range(len(relative)), SAMPLE):
            place = int(relative[number])
            path = text[begins[place] : ends[place] - 1].decode()
            lines.append(Line(first + place, ((path, 0, -1),), reader.stride, reader.pattern))
        found = {-1 if way is None else way[1] for way, _ in self.look_up(lines)}
        return found.pop() if len(found) == 1 and -1 not in found else None

    def _strides(self, lines: _Lines, text: str) -> np.ndarray:
        set_by_list = [(place, stride or 0) for place, stride, _ in lines.settings]
        column = _steps(set_by_list, len(lines.path))
        by_source = self._by_source(lines, text, SOURCE_STRIDES, 0)
        if by_source is not None:
            column = np.where(column == 0, by_source, column)
        return column

    def _patterns(self, lines: _Lines, text: str) -> np.ndarray:
        def number(pattern: str) -> int:
            return self.patterns.setdefault(pattern, len(self.patterns))

        grammar, unset = self.grammar, -1
        named = [(place, pattern or grammar.named_pattern) for place, _, pattern in lines.settings]
        column = _steps(
            [(place, unset if pattern is None else number(pattern)) for place, pattern in named],
            len(lines.path),
        )
        if (column == unset).any():
            sources = {source: number(pattern) for source, pattern in SOURCE_PATTERNS.items()}
            usual = number(grammar.frame_pattern)
            by_source = self._by_source(lines, text, sources, usual)
            column = np.where(column == unset, usual if by_source is None else by_source, column)
        return column

    def _by_source(
        self, lines: _Lines, text: str, values: Mapping[str, int], other: int
    ) -> np.ndarray | None:
        """int32 [n], what the published conventions say of each path; None where they say nothing."""
        if not any(source in place for source in values for place in (*self.roots, text)):
            return None
        roots = itertools.repeat(lines.root) if isinstance(lines.root, int) else lines.root
        paths = (os.path.join(self.roots[root], path) for root, path in zip(roots, lines.path))
        found = (next((value for source, value in values.items() if source in path), other) for path in paths)
        return np.fromiter(found, np.int32, len(lines.path))


def _take(lines: _Lines, place: int, reading: int, line: Line) -> None:
    """Let a line have one of its readings."""
    path, start, total = line.readings[reading]
    lines.path[place], lines.start[place], lines.total[place] = path, str(start), str(total)


def _numbers(column: Sequence[str], missing: int) -> np.ndarray:
    """int32 [n] of numbers as text, `missing` for an empty one."""
    values = np.fromiter((int(text) if text else missing for text in column), np.int64, len(column))
    limits = np.iinfo(np.int32)  # what is beyond them was found wrong before
    return values.clip(limits.min, limits.max).astype(np.int32)


def _steps(settings: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """int32 [count], or [1] where there is one setting only; each holds from its place on."""
    values = np.array([value for _, value in settings], np.int32)
    if len(set(values)) == 1:
        return values[:1]
    places = [place for place, _ in settings]
    return np.repeat(values, np.diff([*places, count]))


def _parse_labels(column: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels as text, several as 3;17, as in `Piece.labels`."""
    try:
        return _numbers(column, 0), None
    except ValueError:  # several of one video
        own = [dict.fromkeys(map(int, text.split(";"))) for text in column]
    counts = np.fromiter(map(len, own), np.int64, len(own))
    return np.fromiter(itertools.chain(*own), np.int32, int(counts.sum())), counts


def spread_sample(items: Sequence[Item], count: int) -> list[Item]:
    """Up to `count` of some items, spread over them."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def _unended(text: str) -> str:
    """Whole lines with LF between them, and none behind the last one."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\n")


def list_contents(path: str | Path) -> Iterator[str]:
    """The lines of a list, without blanks around them.

    Raises:
        InputError: see `read_text`.
    """
    before = 0
    for part in whole_lines(read_pieces(path)):
        yield from split_lines(_unended(decode_lines(part, str(path), before)))
        before += part.count(b"\n")


def whole_lines(data: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, cut behind line ends (LF, CR LF, CR) only."""
    kept: list[bytes] = []
    for piece in data:
        cut = piece.rfind(b"\n") + 1
        if not cut:  # a CR at the end may belong to the next LF
            cut = piece.rfind(b"\r", 0, len(piece) - 1) + 1
        if cut:
            yield b"".join([*kept, piece[:cut]])
            kept = []
        kept.append(piece[cut:])
    if any(kept):
        yield b"".join(kept)
