"""List files: which videos and frame folders to train on.

One entry a line, columns apart by blanks or commas (the formats of the published VideoMAE V2 lists):

    path/to/video.mp4 0 -1            a video: the start is ignored, -1 means "all frames"
    path/to/frames 1 120              a folder of 120 images, numbered from 1
    path/to/frames 1 120 17           a fourth column (a label) is accepted and ignored
    path/to/video.mp4                 a path alone is a video

Numbers are read from the right, so a path may contain blanks; it may stand in double quotes, as CSV writers
put it. Blank lines and comments (`#` and a blank; `#clip.mp4` is a path) are skipped. `#!` sets the temporal
stride or the file names of frames for the lines below it:

    #! stride=2 pattern=frame_{:06}.jpg
    #! stride=default pattern=default

Without such a line, the published conventions hold: a path that contains `SomethingV2` has stride 2 (its
material has 12 frames a second) and `img_{:05}.jpg`; one that contains `AVA2.2` has `image_{:06}.jpg`. The
published code looks for those names in frame folders only; here stride 2 holds for a video of that source
too.

A folder in place of a list stands for all videos under it (see `vmae.data.video_files`).
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmae.data.files import Unanswered, ask_files, path_kind, special_kind
from vmae.data.video_files import find_videos, is_video, looks_like_url, playlist_kind
from vmae.errors import InputError
from vmae.settings import STRIDE

DEFAULT_PATTERN = "img_{:05}.jpg"
SOURCE_STRIDES = {"SomethingV2": 2}
SOURCE_PATTERNS = {"SomethingV2": "img_{:05}.jpg", "AVA2.2": "image_{:06}.jpg"}

_SEPARATOR, _NUMBER = r"(?:\s*,\s*|\s+)", r"([+-]?\d+)"
_ENDS_WITH = {count: re.compile("(.+?)" + count * (_SEPARATOR + _NUMBER)) for count in (1, 2, 3)}
_FORMATS = "write `path 0 -1` for a video, `folder start total` for frames, or a path alone for a video"
_QUOTED = re.compile(r'"(?:[^"]|"")*"(?=[\s,]|$)')
_JSON = re.compile(r'[\[{]\s*(?:$|[\[{"])')
_KINETICS = re.compile(r'(?:"?label"?\s*,\s*)?"?youtube_id"?\s*,\s*"?time_start"?', re.IGNORECASE)
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


def read_list(
    path: str | Path,
    data_root: str | Path | None = None,
    *,
    frame_pattern: str = DEFAULT_PATTERN,
    parse_line: ParseLine | None = None,
) -> list[VideoEntry]:
    """Read a list file (format: see the module) and check that everything it names is there; or find a
    folder's videos.

    Args:
        path: the list file, UTF-8 text, or a folder, whose videos come in order of their names.
        data_root: folder that relative paths start from. Without it they start from the working directory,
            and where nothing is found there, from the list file's own folder.
        frame_pattern: file names of frames for sources that neither a `#!` line nor a published convention
            covers.
        parse_line: for lists with other columns: (content, where it stands, line number, stride, pattern) ->
            `Line`.

    Returns:
        One entry for each line, in order; at least one.

    Raises:
        InputError: the file is missing, no text, empty, has a malformed line (with its number), a negative
            start or 0 frames, or names a video, folder or first frame that does not exist, a playlist, or
            what is no regular file.
    """
    entries, problems = read_list_with_problems(
        path, data_root, frame_pattern=frame_pattern, parse_line=parse_line
    )
    raise_problems(path, data_root, problems, len(entries))
    return entries


def raise_problems(
    path: str | Path, data_root: str | Path | None, problems: list[tuple[int, str]], good: int
) -> None:
    """Raise InputError with the first of `problems`, of a list that has `good` other entries, if there is
    one."""
    if problems:
        line, problem = problems[0]
        tried = "no --data-root given"
        if data_root is not None:
            tried = f"--data-root {str(data_root)!r}"
        raise InputError(
            f"list file {str(path)!r}, line {line}: {problem}; {len(problems)} of {good + len(problems)} "
            f"entries cannot be used ({tried}). Correct the paths, or the --data-root that they start from"
        )


def folder_entries(folder: str | Path) -> list[VideoEntry]:
    """The videos under `folder`, in order of their names, with the published strides; see `find_videos`.

    Raises:
        InputError: a folder cannot be read, or there is no video.
    """
    videos = find_videos(folder)
    return [make_entry(path, 0, -1, Line(number, (), None, None)) for number, path in enumerate(videos, 1)]


def read_list_with_problems(
    path: str | Path,
    data_root: str | Path | None = None,
    *,
    frame_pattern: str = DEFAULT_PATTERN,
    parse_line: ParseLine | None = None,
) -> tuple[list[VideoEntry], list[tuple[int, str]]]:
    """Like `read_list`, for a list that names things which are not there: (entries, [(line number, what is
    wrong)]).

    Raises:
        InputError: the file is missing, no text, empty, or has a malformed line.
    """
    name = str(path)
    _check_pattern(frame_pattern, "frame pattern")
    if parse_line is None and path_kind(path) == "a folder":
        return folder_entries(path), []
    if data_root is not None and path_kind(data_root) != "a folder":
        raise InputError(f"data root {str(data_root)!r} is not a folder")
    lines = parse_lines(read_text(path), name, parse_line or _parse_line)
    if not lines:
        raise InputError(f"list file {name!r} has no entries; {_FORMATS}")
    roots = roots_of(path, data_root)
    try:  # by threads: a network file system takes long for one question, not for many side by side
        resolved = ask_files(lambda line: _resolve(line, roots, frame_pattern), lines, threads=8)
    except Unanswered as error:
        raise InputError(f"list file {name!r}, line {lines[error.item].number}: {error}") from None
    problems = [(line.number, problem) for line, (_, problem) in zip(lines, resolved, strict=True) if problem]
    return [entry for entry, _ in resolved if entry is not None], problems


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
    name = str(path)
    try:
        (data,) = ask_files(_read_list_file, [name])
    except FileNotFoundError:
        raise InputError(f"list file {name!r} does not exist") from None
    except (Unanswered, OSError) as error:
        raise InputError(
            f"list file {name!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"list file {name!r}, line {line}: not UTF-8 text; save the list as UTF-8") from None


def _read_list_file(name: str) -> bytes:
    kind = special_kind(os.stat(name).st_mode)
    if kind not in (None, "a pipe"):
        raise InputError(f"list file {name!r} is {kind}; give a text file with one video a line")
    with open(name, "rb") as file:
        data = file.read(4096)
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise InputError(f"list file {name!r} is UTF-16 text; save it as UTF-8")
        if b"\0" in data:
            raise InputError(
                f"list file {name!r} is not text (a video?); give a text file with one video a line"
            )
        data += file.read()
        about = os.fstat(file.fileno())
    if kind == "a pipe":
        data = data or _PIPED.get((about.st_dev, about.st_ino), b"")
        _PIPED[about.st_dev, about.st_ino] = data
    return data


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


def parse_lines(text: str, name: str, parse_line: ParseLine) -> list[Line]:
    """What `parse_line` makes of each line of list `name` that is neither empty nor a comment."""
    lines: list[Line] = []
    stride: int | None = None
    pattern: str | None = None
    for number, content in enumerate(split_lines(text), 1):
        if not content:
            continue
        where = f"list file {name!r}, line {number}"
        if content[0] == "#" and is_comment(content):
            if content.startswith("#!"):
                stride, pattern = _parse_directive(content, where, stride, pattern)
            continue
        if not lines and (foreign := foreign_table(content)):
            raise InputError(f"{where}: {foreign}")
        lines.append(parse_line(unquote(content), where, number, stride, pattern))
    return lines


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
    if _JSON.match(content):
        return f"this looks like JSON; a list is text, one video a line: {_FORMATS}"
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
            _check_pattern(pattern, f"{where}: pattern")
        else:
            raise InputError(
                f"{where}: cannot read {setting[:80]!r}; a `#!` line sets stride=N ({STRIDE}), "
                "pattern=NAME_{:05}.jpg, or either to `default`, with no blanks around ="
            )
    return stride, pattern


def _check_pattern(pattern: str, what: str) -> None:
    try:
        distinct = pattern.format(1) != pattern.format(2)
    except (IndexError, KeyError, ValueError):
        distinct = False
    if not distinct:
        raise InputError(f"{what} {pattern!r} does not number the frames; write it like {DEFAULT_PATTERN}")


def _parse_line(content: str, where: str, number: int, stride: int | None, pattern: str | None) -> Line:
    read = (read_columns(content, count) for count in (3, 2))
    readings = [reading for reading in read if reading is not None]
    if not readings:
        if _ENDS_WITH[1].fullmatch(content):
            raise InputError(
                f"{where}: malformed: one number after the path in {content!r}; {_FORMATS} (lists for "
                "pre-training hold no labels, so `path label` needs its label removed)"
            )
        readings = [(content, 0, -1)]
    if all(_complaint(reading) for reading in readings):
        raise InputError(f"{where}: {_complaint(readings[0])} in {content!r}; {_FORMATS}")
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


def _resolve(line: Line, roots: list[str], frame_pattern: str) -> tuple[VideoEntry | None, str | None]:
    """The entry of a line, or what is wrong with it."""
    problems = []
    for path, start, total in line.readings:
        found, there, problem = _locate(path, roots)
        complaint = _complaint((path, start, total))
        if found is None or there is None:
            problems.append((0 if complaint else 1, problem))
        elif complaint:
            problems.append((3, f"{complaint} for {found!r}; {_FORMATS}"))
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
            return f"malformed: {rest!r} after the path {shorter!r} is no start and total; {_FORMATS}"
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


def write_list(
    path: Path,
    entries: Sequence[VideoEntry],
    labels: Sequence[Iterable[int] | None] | None = None,
    *,
    root: Path | None = None,
    labelled: bool = False,
) -> None:
    """Write a list that `read_list` reads, or, `labelled`, `read_labelled_list`; complete or not at all.

    Args:
        labels: classes of each entry, None for an entry without.
        root: folder of the list; videos under it get relative paths, all else absolute ones.
        labelled: columns `path label` and `folder start total label`, else `path 0 -1` (and a fourth column
            for labels).

    Raises:
        InputError: a name that no list can hold, or the file cannot be written.
    """
    lines, stride, pattern = [], None, DEFAULT_PATTERN
    for entry, own in zip(entries, labels or [None] * len(entries), strict=True):
        if (entry.stride, entry.pattern) != (stride, pattern):
            stride, pattern = entry.stride, entry.pattern
            lines.append(f"#! stride={stride or 'default'} pattern={pattern}\n")
        columns = []
        if not labelled or entry.kind != "video":
            columns += [str(entry.start), str(entry.total)]
        if own is not None:
            columns.append(";".join(map(str, own)))
        lines.append(" ".join([_listed(entry, root), *columns]) + "\n")
    part = path.with_name(path.name + ".part")
    try:
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from None


def _listed(entry: VideoEntry, root: Path | None) -> str:
    """The path of an entry as a list holds it."""
    if root is not None and entry.kind == "video" and Path(entry.path).is_relative_to(root):
        return Path(entry.path).relative_to(root).as_posix()
    path = os.path.abspath(entry.path)
    check_listable(path)
    return path


def check_listable(path: str) -> None:
    """See that a list can hold `path`.

    Raises:
        InputError: it has a line end, is no UTF-8, or ends with a blank or a comma.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InputError(f"{path!r}: a list holds UTF-8 names only; rename the file") from None
    if path != path.rstrip().rstrip(",") or "\n" in path or "\r" in path:
        raise InputError(
            f"{path!r}: a list cannot hold a line end, or a blank or comma at a name's end; rename the file"
        )
