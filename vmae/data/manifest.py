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

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from vmae.data.entry_table import EntryTable
from vmae.data.files import Unanswered, ask_files, path_kind
from vmae.data.list_lines import (
    DEFAULT_PATTERN,
    FORMATS,
    Line,
    ParseLine,
    VideoEntry,
    check_pattern,
    foreign_table,
    is_comment,
    make_entry,
    parse_lines,
    parse_plain_line,
    read_columns,
    read_text,
    resolve_line,
    roots_of,
    split_lines,
    unquote,
    whole,
)
from vmae.data.list_parsing import plain_grammar
from vmae.data.long_lists import read_long_list
from vmae.data.video_files import find_videos
from vmae.errors import InputError

__all__ = [
    "DEFAULT_PATTERN",
    "Line",
    "VideoEntry",
    "check_listable",
    "check_pattern",
    "check_root",
    "folder_entries",
    "foreign_table",
    "is_comment",
    "make_entry",
    "parse_lines",
    "raise_problems",
    "read_columns",
    "read_list",
    "read_list_with_problems",
    "read_text",
    "roots_of",
    "split_lines",
    "unquote",
    "whole",
    "write_list",
]


def read_list(
    path: str | Path,
    data_root: str | Path | None = None,
    *,
    frame_pattern: str = DEFAULT_PATTERN,
) -> EntryTable:
    """Read a list file (format: see the module) and check that what it names is there; or find a folder's
    videos.

    Of a list of 20,000 lines or more, only a sample is looked up, see `vmae.data.long_lists`.

    Args:
        path: the list file, UTF-8 text, or a folder, whose videos come in order of their names.
        data_root: folder that relative paths start from. Without it they start from the working directory,
            and where nothing is found there, from the list file's own folder.
        frame_pattern: file names of frames for sources that neither a `#!` line nor a published convention
            covers.

    Returns:
        One entry for each line, in order; at least one. A sequence of `VideoEntry`.

    Raises:
        InputError: the file is missing, no text, empty, has a malformed line (with its number), a negative
            start or 0 frames, or names a video, folder or first frame that does not exist, a playlist, or
            what is no regular file.
    """
    check_pattern(frame_pattern, "frame pattern")
    if path_kind(path) != "a folder":
        check_root(data_root)
        found = read_long_list(path, plain_grammar(frame_pattern), roots_of(path, data_root))
        if found is not None:
            return found[0]
    entries, problems = read_list_with_problems(path, data_root, frame_pattern=frame_pattern)
    raise_problems(path, data_root, problems, len(entries))
    return EntryTable.of(entries)


def check_root(data_root: str | Path | None) -> None:
    """See that a data root that was given is a folder.

    Raises:
        InputError: it is not.
    """
    if data_root is not None and path_kind(data_root) != "a folder":
        raise InputError(f"data root {str(data_root)!r} is not a folder")


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
    """Like `read_list`, line by line, for a list that names things which are not there: (entries, [(line
    number, what is wrong)]).

    Args:
        parse_line: for lists with other columns: (content, where it stands, line number, stride, pattern) ->
            `Line`.

    Raises:
        InputError: the file is missing, no text, empty, or has a malformed line.
    """
    name = str(path)
    check_pattern(frame_pattern, "frame pattern")
    if parse_line is None and path_kind(path) == "a folder":
        return folder_entries(path), []
    check_root(data_root)
    lines = parse_lines(read_text(path), name, parse_line or parse_plain_line)
    if not lines:
        raise InputError(f"list file {name!r} has no entries; {FORMATS}")
    roots = roots_of(path, data_root)
    try:  # by threads: a network file system takes long for one question, not for many side by side
        resolved = ask_files(lambda line: resolve_line(line, roots, frame_pattern), lines, threads=8)
    except Unanswered as error:
        raise InputError(f"list file {name!r}, line {lines[error.item].number}: {error}") from None
    problems = [(line.number, problem) for line, (_, problem) in zip(lines, resolved, strict=True) if problem]
    return [entry for entry, _ in resolved if entry is not None], problems


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
