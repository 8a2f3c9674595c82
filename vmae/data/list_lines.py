"""Lines of list files: what they mean, and which files they name (the format: see `vmae.data.manifest`)."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vmae.data.files import Unanswered, ask_files, special_kind
from vmae.data.video_files import is_video, looks_like_url, playlist_kind
from vmae.errors import InputError
from vmae.settings import STRIDE

DEFAULT_PATTERN = "img_{:05}.jpg"
SOURCE_STRIDES = {"SomethingV2": 2}
SOURCE_PATTERNS = {"SomethingV2": "img_{:05}.jpg", "AVA2.2": "image_{:06}.jpg"}

_SEPARATOR, _NUMBER = r"(?:\s*,\s*|\s+)", r"([+-]?\d+)"
_ENDS_WITH = {count: re.compile("(.+?)" + count * (_SEPARATOR + _NUMBER)) for count in (1, 2, 3)}
FORMATS = "write `path 0 -1` for a video, `folder start total` for frames, or a path alone for a video"
_QUOTED = re.compile(r'"(?:[^"]|"")*"(?=[\s,]|$)')
_JSON = re.compile(r'[\[{]\s*(?:$|[\[{"])')
_KINETICS = re.compile(r'(?:"?label"?\s*,\s*)?"?youtube_id"?\s*,\s*"?time_start"?', re.IGNORECASE)
_MIX = re.compile(r"(sources|mixing)\s*:")
_Reading = tuple[str, int, int]
_MOST_IMAGES = 10**9  # of a folder, and the largest number of one
_PIPED: dict[
    tuple[int, int], bytes
] = {}  # what a pipe (device, inode) held: `finetune <(COMMAND)` reads its list twice


@dataclass(frozen=True)
class VideoEntry:
    """One line of a list file.

    Attributes:
        path: the video file, or the folder of the frames.
        kind: "video" or "frames".
        start: number of a folder's first image; 0 for a video.
        total: images in the folder; -1 for a video, whose length its file tells.
        stride: frames from one sampled frame to the next; None means the run's own.
        pattern: format of a folder's file names, applied to the image's number.
        line: line number in the list file, or place in a folder, from 1; 0 when it came from elsewhere.
    """

    path: str
    kind: str = "video"
    start: int = 0
    total: int = -1
    stride: int | None = None
    pattern: str = DEFAULT_PATTERN
    line: int = 0

    def frame_path(self, index: int) -> str:
        """File of the image `index` (from 0) of a frame folder."""
        return os.path.join(self.path, self.pattern.format(self.start + index))


@dataclass(frozen=True)
class Line:
    """A parsed line whose path has not been looked up yet.

    `readings` are the (path, start, total) that it can mean, the likelier first: with three numbers at its
    end, the last is a label, or the first belongs to the path.
    """

    number: int
    readings: tuple[_Reading, ...]
    stride: int | None
    pattern: str | None


ParseLine = Callable[[str, str, int, int | None, str | None], Line]


def roots_of(path: str | Path, data_root: str | Path | None) -> list[str]:
    """Folders that the relative paths of the list file `path` may start from, the first one first."""
    if data_root is not None:
        return [str(data_root)]
    return ["", os.path.dirname(str(path))]


def read_text(path: str | Path) -> str:
    """The text of a list file. A pipe gives it once only; asked again, it is what came then.

    Raises:
        InputError: it is missing, a folder or a device, no UTF-8 text, or does not come within
            `hang_limit()`.
    """
    data = b"".join(read_pieces(path))
    return decode_lines(data, str(path))


def read_pieces(path: str | Path, size: int = 1 << 22) -> Iterator[bytes]:
    """The bytes of a list file, some `size` at a time; of a pipe (once only; asked again, what came then) at
    once.

    Raises:
        InputError: as `read_text`, but for UTF-8.
    """
    name = str(path)
    try:
        ((file, data),) = ask_files(_open_list, [name])
        with file:
            while data:
                yield data
                (data,) = ask_files(lambda file: file.read(size), [file])
    except FileNotFoundError:
        raise InputError(f"list file {name!r} does not exist") from None
    except (Unanswered, OSError) as error:
        raise InputError(
            f"list file {name!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def _open_list(name: str) -> tuple[IO[bytes], bytes]:
    """(the open file, its first bytes; all of them where it is a pipe)."""
    kind = special_kind(os.stat(name).st_mode)
    if kind not in (None, "a pipe"):
        raise InputError(f"list file {name!r} is {kind}; give a text file with one video a line")
    file = open(name, "rb")
    try:
        data = file.read(4096)
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise InputError(f"list file {name!r} is UTF-16 text; save it as UTF-8")
        if b"\0" in data:
            raise InputError(
                f"list file {name!r} is not text (a video?); give a text file with one video a line"
            )
        if kind == "a pipe":
            about = os.fstat(file.fileno())
            data += file.read()
            data = data or _PIPED.get((about.st_dev, about.st_ino), b"")
            _PIPED[about.st_dev, about.st_ino] = data
    except BaseException:
        file.close()
        raise
    return file, data


def decode_lines(data: bytes, name: str, before: int = 0) -> str:
    """Text of whole lines of list `name`, the first of which is number `before` + 1, without a byte order
    mark.

    Raises:
        InputError: it is no UTF-8 (names the line).
    """
    try:
        return data.decode("utf-8" if before else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = before + error.object[: error.start].count(b"\n") + 1
        raise InputError(f"list file {name!r}, line {line}: not UTF-8 text; save the list as UTF-8") from None


def split_lines(text: str) -> list[str]:
    """Lines of a list, whatever ends them (LF, CR LF, CR), without blanks around them."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return [line.strip() for line in text.split("\n")]


def is_comment(line: str) -> bool:
    """Whether a line (without blanks around it) is a comment or a `#!` line: `#hashtag.mp4` is neither."""
    return line[:1] == "#" and (len(line) == 1 or line[1] == "!" or line[1].isspace())


def unquote(content: str) -> str:
    """A line whose path stands in double quotes, as CSV writers put one that has a comma or a blank, without
    them."""
    if content[:1] != '"' or _QUOTED.match(content) is None:
        return content
    return " ".join(next(csv.reader([content], skipinitialspace=True)))


class LineReader:
    """Reads the lines of list `name`, some at a time, in order.

    Attributes:
        number: lines that were read.
        entries: how many of them name a video.
        stride, pattern: what the last `#!` lines set; None means the convention or the run's own.
    """

    def __init__(self, name: str, parse_line: ParseLine) -> None:
        self.name, self._parse = name, parse_line
        self.number = self.entries = 0
        self.stride: int | None = None
        self.pattern: str | None = None

    def read(self, content: str) -> Line | None:
        """What the next line, without blanks around it, means; None where it is empty, a comment or a `#!`
        line."""
        self.number += 1
        if not content:
            return None
        where = f"list file {self.name!r}, line {self.number}"
        if content[0] == "#" and is_comment(content):
            if content.startswith("#!"):
                self.stride, self.pattern = _parse_directive(content, where, self.stride, self.pattern)
            return None
        if not self.entries and (foreign := foreign_table(content)):
            raise InputError(f"{where}: {foreign}")
        self.entries += 1
        return self._parse(unquote(content), where, self.number, self.stride, self.pattern)


def parse_lines(text: str, name: str, parse_line: ParseLine) -> list[Line]:
    """What `parse_line` makes of each line of list `name` that is neither empty nor a comment."""
    reader = LineReader(name, parse_line)
    return [line for content in split_lines(text) if (line := reader.read(content)) is not None]


def foreign_table(content: str) -> str | None:
    """What kind of file that names no videos begins with this line, and what to do; None for a list."""
    if _KINETICS.match(content):
        return (
            "this is Kinetics' own table, which names YouTube clips, not files. Write a list of the clips "
            "that you have, "
            "`path label` a line (most downloaders call them YOUTUBEID_START_END.mp4, both numbers of six "
            "digits), the label "
            "being the class's number from 0 (docs/own_data.md has the lines for it); pre-training needs the "
            "paths alone"
        )
    if _MIX.match(content):
        return (
            "this is a mix (YAML), which `pretrain`, `plan` and `pack` read where its name ends in .yaml; "
            "here, give one of its lists (single images have no labels, and are for `pretrain` alone)"
        )
    if _JSON.match(content):
        return f"this looks like JSON; a list is text, one video a line: {FORMATS}"
    return None


def _parse_directive(
    content: str, where: str, stride: int | None, pattern: str | None
) -> tuple[int | None, str | None]:
    """The (stride, pattern) that hold after a `#!` line; None means the convention or the run's own."""
    settings = content[2:].split()
    if not settings:
        raise InputError(
            f"{where}: `#!` sets nothing; write e.g. `#! stride=2` (or one # less for a comment)"
        )
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "stride" and value == "default":
            stride = None
        elif key == "stride" and value.isdecimal() and STRIDE.allows(whole(value)):
            stride = whole(value)
        elif key == "pattern" and value == "default":
            pattern = None
        elif key == "pattern" and value:
            pattern = value
            check_pattern(pattern, f"{where}: pattern")
        else:
            raise InputError(
                f"{where}: cannot read {setting[:80]!r}; a `#!` line sets stride=N ({STRIDE}), "
                "pattern=NAME_{:05}.jpg, or either to `default`, with no blanks around ="
            )
    return stride, pattern


def check_pattern(pattern: str, what: str) -> None:
    try:
        distinct = pattern.format(1) != pattern.format(2)
    except (IndexError, KeyError, ValueError):
        distinct = False
    if not distinct:
        raise InputError(f"{what} {pattern!r} does not number the frames; write it like {DEFAULT_PATTERN}")


def parse_plain_line(content: str, where: str, number: int, stride: int | None, pattern: str | None) -> Line:
    read = (read_columns(content, count) for count in (3, 2))
    readings = [reading for reading in read if reading is not None]
    if not readings:
        if _ENDS_WITH[1].fullmatch(content):
            raise InputError(
                f"{where}: malformed: one number after the path in {content!r}; {FORMATS} (lists for "
                "pre-training hold no labels, so `path label` needs its label removed)"
            )
        readings = [(content, 0, -1)]
    if all(_complaint(reading) for reading in readings):
        raise InputError(f"{where}: {_complaint(readings[0])} in {content!r}; {FORMATS}")
    return Line(number, tuple(readings), stride, pattern)


def read_columns(content: str, count: int) -> _Reading | None:
    """(path, start, total) if `content` ends with `count` whole numbers; a third one is a label."""
    match = _ENDS_WITH[count].fullmatch(content)
    return (match[1], whole(match[2]), whole(match[3])) if match else None


def whole(digits: str) -> int:
    """The number that a column's digits mean; more than 18 of them mean too many, for Python too from 4,300
    on."""
    return int(digits) if len(digits) < 20 else int(digits[:19])


def _complaint(reading: _Reading) -> str | None:
    _, start, total = reading
    if start < 0:
        return f"negative start {start}"
    if total == 0:
        return "0 frames"
    if total < -1:
        return f"{total} frames (only -1 marks a video)"
    if max(start, total) > _MOST_IMAGES:
        return f"more than {_MOST_IMAGES:,} images"
    return None


def resolve_line(line: Line, roots: list[str], frame_pattern: str) -> tuple[VideoEntry | None, str | None]:
    """The entry of a line, or what is wrong with it."""
    problems = []
    for path, start, total in line.readings:
        found, there, problem = _locate(path, roots)
        complaint = _complaint((path, start, total))
        if found is None or there is None:
            problems.append((0 if complaint else 1, problem))
        elif complaint:
            problems.append((3, f"{complaint} for {found!r}; {FORMATS}"))
        else:
            entry = make_entry(found, start, total, line, frame_pattern)
            problem = _check_entry(entry, there)
            if problem is None:
                return entry, None
            problems.append((2, problem))
    _, worst = max(problems, key=lambda ranked: ranked[0])  # a fault of a path that is there says most
    return None, worst


def _locate(path: str, roots: list[str]) -> tuple[str | None, os.stat_result | None, str | None]:
    """(where a path is found, what is there, None), or (None, None, what is wrong)."""
    candidates = list(dict.fromkeys(os.path.join(root, path) for root in roots))
    for candidate in candidates:
        try:
            return candidate, os.stat(candidate), None
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue
        except OSError as error:
            return None, None, f"{candidate!r} cannot be read: {error.strerror}"
    return None, None, _explain_missing(path, roots, candidates)


def _explain_missing(path: str, roots: list[str], candidates: list[str]) -> str:
    if looks_like_url(path):
        return f"{path!r} is an address, which is not supported; download it first, and list the file's path"
    for gap in re.finditer(r"[\s,]+", path):
        shorter, rest = path[: gap.start()], path[gap.end() :]
        there = rest[:1] in "0123456789+-" and any(
            os.path.exists(os.path.join(root, shorter)) for root in roots
        )
        if there or is_video(shorter):
            return f"malformed: {rest!r} after the path {shorter!r} is no start and total; {FORMATS}"
    comment = " (for a comment, write a blank after the #)" if path[:1] == "#" else ""
    return f"{path!r} does not exist{comment} (tried {' and '.join(os.path.abspath(c) for c in candidates)})"


def make_entry(
    path: str, start: int, total: int, line: Line, frame_pattern: str = DEFAULT_PATTERN
) -> VideoEntry:
    """The entry of a reading of `line`, with what the conventions say where the line does not."""
    stride, pattern = line.stride, line.pattern
    if stride is None:
        stride = next((value for source, value in SOURCE_STRIDES.items() if source in path), None)
    if pattern is None:
        pattern = next((value for source, value in SOURCE_PATTERNS.items() if source in path), frame_pattern)
    if total == -1:
        return VideoEntry(path, "video", 0, -1, stride, pattern, line.number)
    return VideoEntry(path, "frames", start, total, stride, pattern, line.number)


def _check_entry(entry: VideoEntry, there: os.stat_result) -> str | None:
    kind = special_kind(there.st_mode)
    if entry.kind == "video":
        if kind == "a folder":
            return f"{entry.path!r} is a folder; write `folder start total` for a folder of frames"
        if kind is not None:
            return f"{entry.path!r} is {kind}, not a video file"
        playlist = playlist_kind(entry.path, there.st_size)
        if playlist is not None:
            return (
                f"{entry.path!r} is {playlist}, which makes a decoder open other files; make one video of it "
                "first: "
                "`ffmpeg -i FILE -c copy video.mp4`"
            )
        return None
    if kind != "a folder":
        return f"{entry.path!r} is {kind or 'a file'}, not a folder of frames; write `path 0 -1` for a video"
    if not os.path.isfile(entry.frame_path(0)):
        return (
            f"the first frame {entry.frame_path(0)!r} does not exist; the second column is the number of the "
            "first "
            "image, and a line `#! pattern=NAME_{:05}.jpg` above sets how files are called"
        )
    return None
