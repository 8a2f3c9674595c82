"""Reading of JSON that may be damaged: texts, files, and JSON Lines line by line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmae.errors import InputError

_TOGETHER = 256  # lines
MAX_DEPTH = 100  # the parsers, `repr` and `==` all recurse; what this project reads is at most 6 deep


def parse_json(text: str) -> Any:
    """`json.loads`; raises ValueError also for lists in lists in lists."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raises ValueError where containers are nested more than `MAX_DEPTH` deep, or contain themselves."""
    level = [value]
    for _ in range(MAX_DEPTH):
        seen: dict[int, Any] = {}  # each container once a level: YAML's aliases can name one a billion times
        for one in level:
            if isinstance(one, (dict, list)):
                seen[id(one)] = one
        if not seen:
            return
        level = [part for one in seen.values() for part in (one.values() if isinstance(one, dict) else one)]
    raise ValueError("it is nested too deeply")


def read_json(path: str | Path, what: str = "file") -> Any:
    """The content of a JSON file.

    Args:
        what: of the file, for the message.

    Raises:
        InputError: it is missing, cannot be read, or is no JSON.
    """
    try:
        return parse_json(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{what} {path} is no JSON: {why_no_json(error)}") from error


def why_no_json(error: ValueError) -> str:
    """Reason why a text is no JSON, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return str(error).splitlines()[0]


@dataclass
class JsonLines:
    """Result of `read_json_lines`.

    Attributes:
        records: objects, in order.
        numbers: the line number of each, from 1.
        skipped: number and bytes of each line that is none, or lacks a key.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    skipped: list[tuple[int, bytes]] = field(default_factory=list)

    def note(self, path: str | Path) -> str | None:
        """A line on what was skipped; None where nothing was."""
        if not self.skipped:
            return None
        shown = ", ".join(str(number) for number, _ in self.skipped[:3]) + (
            ", ..." if len(self.skipped) > 3 else ""
        )
        return f"note: {path}: {len(self.skipped)} lines skipped, cut short or not ours (line {shown})"


def read_json_lines(path: str | Path, /, **keys: type | tuple[type, ...]) -> JsonLines:
    """The lines of a JSON Lines file; nothing where there is no such file. Empty lines don't count.

    Args:
        keys: what a line must have, by name: the type of its value (`bool` is no `int`).

    Raises:
        InputError: the file cannot be read.
    """
    path, found = Path(path), JsonLines()
    try:
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    for first in range(0, len(lines), _TOGETHER):
        chunk = enumerate(lines[first : first + _TOGETHER], first + 1)
        some = [(number, line) for number, line in chunk if line.strip()]
        for (number, line), record in zip(some, _parse_lines([line for _, line in some])):
            if isinstance(record, dict) and all(_is_a(record.get(name), kind) for name, kind in keys.items()):
                found.records.append(record)
                found.numbers.append(number)
            else:
                found.skipped.append((number, line))
    return found


def _parse_lines(lines: list[bytes]) -> list[Any]:
    """The value of each line; None for a line that is none.

    Whole lines are parsed together: the parser then keeps one copy of a name that many objects have.
    """
    if all(line.strip()[:1] == b"{" and line.strip()[-1:] == b"}" for line in lines):
        try:
            values = parse_json(f"[{b','.join(lines).decode('utf-8')}]")
        except ValueError:
            values = []
        if len(values) == len(lines):
            return values
    return [_parse_line(line) for line in lines]


def _parse_line(line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8"))
    except ValueError:
        return None


def _is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
