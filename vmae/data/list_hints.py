"""What is likely wrong with a list that cannot be read, for `check-data`."""

from __future__ import annotations

import re
from pathlib import Path

from vmae.data.manifest import foreign_table, is_comment, read_text, split_lines, unquote
from vmae.errors import InputError


def explain_list(path: str | Path, data_root: str | None = None) -> list[str]:
    """What is likely wrong with a list file, in sentences; empty where nothing is found."""
    try:
        lines = [unquote(line) for line in split_lines(read_text(path)) if line and not is_comment(line)]
    except InputError:
        return []
    if lines and foreign_table(lines[0]):
        return []
    total, found = len(lines), []

    def most(pattern: str) -> bool:
        return sum(re.search(pattern, line) is not None for line in lines) > total / 2

    for delimiter, pattern in ((";", r";(?!\d+(;\d+)*$)"), ("|", r"\|")):  # several labels are 3;17
        if most(pattern):
            found.append(f"columns seem to be apart by {delimiter!r}; use a blank or a comma")
    if most(r"""^["']"""):
        found.append("paths stand in quotes; write them without")
    if lines and re.fullmatch(r"[A-Za-z_]+([,;\s]+[A-Za-z_]+)+", lines[0]) and most(r"\d\s*$|\.\w{2,4}$"):
        found.append(
            f"the first line, {lines[0]!r}, looks like a table's head; remove it, or put # and a blank "
            "before it"
        )
    if most(r"\\"):
        found.append("paths have backslashes; write / between folders")
    return found + _explain_roots(lines, Path(path), data_root)


def _explain_roots(lines: list[str], path: Path, data_root: str | None) -> list[str]:
    names = [re.split(r"[,;|]|\s+-?\d+(?=\s|$)", line.strip("\"'"))[0].strip("\"' ") for line in lines[:50]]
    start = path.resolve().parent
    bases = [Path(data_root)] if data_root else [Path("."), start]
    missing = [name for name in names if not any((base / name).exists() for base in bases)]
    for name in missing:
        parts = Path(name).parts
        for base in dict.fromkeys([*bases, start, *list(start.parents)[:3]]):
            for cut in range(len(parts)):
                if (base / Path(*parts[cut:])).exists():
                    if cut == 0:
                        return [f"paths start from another folder; try --data-root {base}"]
                    return [
                        f"{name!r} is there as {str(base / Path(*parts[cut:]))!r}: the paths' beginnings "
                        "differ"
                    ]
    if names and len(missing) == len(names):
        return [
            f"none of the first {len(names)} paths exists; --data-root sets the folder that relative paths "
            "start from"
        ]
    return []
