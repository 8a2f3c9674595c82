"""The files of AVA (Gu et al., CVPR 2018): annotations, detections and person boxes, excluded key frames,
action lists.

    annotations   video_id,timestamp,x1,y1,x2,y2,action_id,person_id   a line for each action of each box
    (person_id may lack)
    detections    video_id,timestamp,x1,y1,x2,y2,action_id,score
    person boxes  the same; the action may be empty, and is not read
    empty frames  video_id,timestamp in any of these: a key frame without a box, as in AVA-Kinetics
    excluded      video_id,timestamp
    actions       blocks `item { name: "..." id: 1 }` or `label { name: "..." label_id: 1 }` (.pbtxt)

Timestamps are seconds of the movie: whole ones, or with up to six digits behind the point (AVA-Kinetics).
`0902`, `902` and `902.000000` are one key frame, as in ActivityNet's script since 2020. Coordinates are
shares of the frame's width and height from its top left corner.

Ground truth that is wrong is refused. Wrong rows of detections and person boxes are dropped and counted where
the caller asks for it (`dropped`).
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmae.data.manifest import read_text, whole
from vmae.errors import InputError

Box = tuple[float, float, float, float]
Key = tuple[str, float]  # (video, timestamp) of a key frame
_ROUNDING = 1e-3  # a coordinate so far outside the frame is moved to its edge
_MOST = 10**9  # an id; a second of a video
_BLOCK = re.compile(r"\b(?:item|label)\s*:?\s*\{([^{}]*)\}")
_ANNOTATION = "video_id,timestamp,x1,y1,x2,y2,action_id,person_id"
_DETECTION = "video_id,timestamp,x1,y1,x2,y2,action_id,score"
_EMPTY = "video_id,timestamp for a key frame without a box"


@dataclass(frozen=True)
class AvaBox:
    """One line: a box of a key frame.

    Attributes:
        video: its id.
        timestamp: seconds, an int where they are whole.
        box: x1, y1, x2, y2 in [0, 1], x1 < x2 and y1 < y2.
        action: its id; None for a person box.
        score: score of a detection or a person box.
        person: id within the video, of an annotation.
        line: number in its file, from 1; 0 when it came from elsewhere.
    """

    video: str
    timestamp: float
    box: Box
    action: int | None = None
    score: float = 1.0
    person: int | None = None
    line: int = field(default=0, compare=False)

    @property
    def key(self) -> Key:
        return self.video, self.timestamp


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """An annotation file.

    Attributes:
        rows: its boxes of listed actions, in order; may be none.
        frames: every key frame that it names, also those with boxes of other actions only.
        empty: rows of two columns: key frames without a box.
    """

    rows: list[AvaBox]
    frames: set[Key]
    empty: int


def read_ground_truth(
    path: str | Path, actions: Iterable[int] | None = None, *, skip_unlisted: bool = False
) -> GroundTruth:
    """An annotation file: its boxes, and the key frames that it names.

    Args:
        actions: the ids that may occur; None takes any from 1.
        skip_unlisted: leave other ids out, as the AVA evaluation does, instead of refusing them.

    Raises:
        InputError: the file can't be read, or a line is malformed, has a box outside the frame or an unknown
            action, or repeats another; with file and line; no boxes are left.
    """
    known = None if actions is None else set(actions)
    rows: list[AvaBox] = []
    frames: set[Key] = set()
    seen: dict[tuple, int] = {}
    empty = 0
    for where, number, cells in _lines(path):
        if len(cells) == 2:
            frames.add(_key(where, cells))
            empty += 1
            continue
        _check_columns(where, cells, (7, 8), f"{_ANNOTATION}, or {_EMPTY}")
        video, timestamp, box = _place(where, cells)
        frames.add((video, timestamp))
        action = _action(where, cells[6], known, skip_unlisted)
        if action is None:
            continue
        person = None
        if len(cells) == 8 and cells[7]:
            person = _whole(where, "person_id", cells[7])
        row = AvaBox(video, timestamp, box, action, person=person, line=number)
        same = seen.setdefault((video, timestamp, box, action, person), number)
        if same != number:
            raise InputError(f"{where}: says the same as line {same}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} has no boxes of listed actions")
    return GroundTruth(rows=rows, frames=frames, empty=empty)


def read_annotations(
    path: str | Path, actions: Iterable[int] | None = None, *, skip_unlisted: bool = False
) -> list[AvaBox]:
    """The boxes of an annotation file, in order, at least one; see `read_ground_truth`."""
    return read_ground_truth(path, actions, skip_unlisted=skip_unlisted).rows


def read_detections(
    path: str | Path,
    actions: Iterable[int] | None = None,
    *,
    skip_unlisted: bool = False,
    dropped: list[str] | None = None,
) -> list[AvaBox]:
    """The lines of a file of scored actions, in order; none where the file is empty.

    Args:
        actions, skip_unlisted: see `read_ground_truth`.
        dropped: takes a line on each row that is wrong (columns, box, action, a score that is not from 0 to
            1), which is then left out; None refuses the file instead.

    Raises:
        InputError: the file can't be read; without `dropped`, a row is wrong: with file and line.
    """
    known = None if actions is None else set(actions)
    rows = _scored(path, dropped, lambda where, text: _action(where, text, known, skip_unlisted))
    return [row for row in rows if row.action is not None]


def read_person_boxes(
    path: str | Path, min_score: float = 0.0, *, dropped: list[str] | None = None
) -> list[AvaBox]:
    """The boxes of a file of person boxes that score at least `min_score`, each once: `action` is None.

    Args:
        dropped: see `read_detections`.

    Raises:
        InputError: see `read_detections`; no box is left.
    """
    rows: dict[tuple, AvaBox] = {}
    for row in _scored(path, dropped, lambda where, text: None):
        if row.score >= min_score:
            rows.setdefault((row.video, row.timestamp, row.box), row)
    if not rows:
        wrong = f" ({len(dropped)} rows are wrong: {dropped[0]})" if dropped else ""
        raise InputError(f"{path} has no person box with a score of at least {min_score:g}{wrong}")
    return list(rows.values())


def _scored(
    path: str | Path, dropped: list[str] | None, read_action: Callable[[str, str], int | None]
) -> Iterator[AvaBox]:
    """The scored boxes of a file, in order; see `read_detections`.

    Args:
        read_action: (place, cell) -> action.
    """
    for where, number, cells in _lines(path):
        try:
            if len(cells) == 2:
                _key(where, cells)
                continue
            _check_columns(where, cells, (8,), _DETECTION)
            video, timestamp, box = _place(where, cells)
            action = read_action(where, cells[6])
            score = _score(where, cells[7])
        except InputError as error:
            if dropped is None:
                raise
            dropped.append(str(error))
            continue
        yield AvaBox(video, timestamp, box, action, score, line=number)


def read_excluded(path: str | Path) -> set[Key]:
    """The key frames that are not counted.

    Raises:
        InputError: the file can't be read or a line is malformed; with file and line.
    """
    keys = set()
    for where, _, cells in _lines(path):
        _check_columns(where, cells, (2,), "video_id,timestamp")
        keys.add(_key(where, cells))
    return keys


def read_actions(path: str | Path) -> dict[int, str]:
    """Names by id, ascending, of an action list (.pbtxt).

    Raises:
        InputError: the file can't be read, has no blocks, or a block lacks name or id, or repeats an id; with
            its line.
    """
    text = re.sub(r"^\s*#.*$", "", read_text(path), flags=re.MULTILINE)
    actions: dict[int, str] = {}
    for block in _BLOCK.finditer(text):
        where = f"{path}, line {text.count(chr(10), 0, block.start()) + 1}"
        name = re.search(r'\bname\s*:\s*"([^"]*)"', block[1])
        number = re.search(r"\b(?:label_)?id\s*:\s*(\d+)", block[1])
        if name is None or number is None or not 1 <= whole(number[1]) <= _MOST:
            raise InputError(f'{where}: a block needs name: "..." and id (or label_id) from 1 to {_MOST:,}')
        if int(number[1]) in actions:
            raise InputError(f"{where}: id {number[1]} is also that of {actions[int(number[1])]!r}")
        actions[int(number[1])] = name[1]
    if not actions:
        raise InputError(f'{path} is no action list: it has no block like item {{ name: "stand" id: 12 }}')
    return dict(sorted(actions.items()))


# --- Writing ------------------------------------------------------------------------------------------------


def write_annotations(path: str | Path, rows: Iterable[AvaBox]) -> None:
    """Write an annotation file; a box without a person has one column less.

    Raises:
        InputError: the file can't be written.
    """
    _write(path, rows, lambda row: [row.action] + ([] if row.person is None else [row.person]))


def write_detections(path: str | Path, rows: Iterable[AvaBox]) -> None:
    """Write a file of scored actions, or of person boxes.

    Raises:
        InputError: the file can't be written.
    """
    _write(path, rows, lambda row: ["" if row.action is None else row.action, f"{row.score:.6g}"])


def write_excluded(path: str | Path, keys: Iterable[Key]) -> None:
    """Write a file of excluded key frames.

    Raises:
        InputError: the file can't be written.
    """
    _write_csv(path, ([video, seconds_text(timestamp)] for video, timestamp in sorted(keys)))


def write_actions(path: str | Path, actions: dict[int, str]) -> None:
    """Write an action list.

    Raises:
        InputError: the file can't be written.
    """
    text = "".join(f'item {{\n  name: "{name}"\n  id: {number}\n}}\n' for number, name in actions.items())
    _write_text(Path(path), text)


def seconds_text(timestamp: float) -> str:
    """A timestamp as AVA writes it (`0902`), or as AVA-Kinetics does (`12.345000`)."""
    return f"{int(timestamp):04}" if timestamp == int(timestamp) else f"{timestamp:.6f}"


def _write(path: str | Path, rows: Iterable[AvaBox], last: Callable[[AvaBox], list]) -> None:
    _write_csv(
        path,
        (
            [row.video, seconds_text(row.timestamp), *(f"{x:.6g}" for x in row.box), *last(row)]
            for row in rows
        ),
    )


def _write_csv(path: str | Path, rows: Iterable[Sequence]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    _write_text(Path(path), text.getvalue())


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from None


# --- Reading cells ------------------------------------------------------------------------------------------


def _lines(path: str | Path) -> Iterator[tuple[str, int, list[str]]]:
    """(where it stands, line number, cells) of each line that is not empty."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            cells = [cell.strip() for cell in next(csv.reader([line]))]
        except csv.Error as error:
            raise InputError(f"{where}: no line of a CSV file: {error}") from None
        yield where, number, cells


def _check_columns(where: str, cells: list[str], columns: tuple[int, ...], form: str) -> None:
    if len(cells) not in columns:
        raise InputError(f"{where}: {len(cells)} columns; write {form}")
    if not cells[0]:
        raise InputError(f"{where}: no video_id; write {form}")


def _key(where: str, cells: list[str]) -> Key:
    if not cells[0]:
        raise InputError(f"{where}: no video_id; write video_id,timestamp")
    return cells[0], _timestamp(where, cells[1])


def _place(where: str, cells: list[str]) -> tuple[str, float, Box]:
    timestamp = _timestamp(where, cells[1])
    given = [_number(where, name, cell) for name, cell in zip(("x1", "y1", "x2", "y2"), cells[2:6])]
    if min(given) < -_ROUNDING or max(given) > 1 + _ROUNDING:
        raise InputError(f"{where}: box {given} leaves the frame; coordinates are shares of it, from 0 to 1")
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in given)
    if x1 >= x2 or y1 >= y2:
        raise InputError(f"{where}: box {given} is empty: it needs x1 < x2 and y1 < y2")
    return cells[0], timestamp, (x1, y1, x2, y2)


def _timestamp(where: str, cell: str) -> float:
    """Seconds, rounded to six digits behind the point as ActivityNet's script compares them."""
    value = _number(where, "timestamp", cell)
    if not 0 <= value <= _MOST:
        raise InputError(f"{where}: timestamp {cell!r} is no number of seconds from 0 to {_MOST:,}")
    value = float(f"{value:.6f}")
    return int(value) if value.is_integer() else value


def _action(where: str, cell: str, known: set[int] | None, skip_unlisted: bool) -> int | None:
    """The action of a row; None for one to leave out."""
    action = _whole(where, "action_id", cell)
    if known is None or action in known:
        return action
    if skip_unlisted:
        return None
    raise InputError(f"{where}: action {action} is not in the action list, which has {_ids(known)}")


def _score(where: str, cell: str) -> float:
    value = _number(where, "score", cell)
    if not 0 <= value <= 1:
        raise InputError(f"{where}: score {cell!r} is not from 0 to 1")
    return value


def _whole(where: str, name: str, cell: str) -> int:
    if not cell.isdecimal():
        raise InputError(f"{where}: {name} {cell!r} is no whole number from 0")
    return whole(cell)


def _number(where: str, name: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: {name} {cell!r} is no number")
    return value


def _ids(known: set[int]) -> str:
    listed = sorted(known)
    if len(listed) <= 8:
        return ", ".join(map(str, listed))
    return f"{len(listed)} ids from {listed[0]} to {listed[-1]}"
