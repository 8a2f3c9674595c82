"""Lists of many lines: read once on a machine, and looked at by a sample.

A short list is checked line by line by each process that reads it. For a long one that would be a question to
the file system for every line on every rank, so rank 0 looks up some hundreds of lines, spread over the list;
`vmae check-data` looks at all.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from vmae.data.entry_table import EntryTable, LabelTable
from vmae.data.files import Unanswered, ask_files
from vmae.data.list_cache import Table, forget, raise_looked_up, read_all, read_cached
from vmae.data.list_lines import Line, read_pieces
from vmae.data.list_parsing import Grammar, ListParser, spread_sample
from vmae.errors import InputError

_LOG = logging.getLogger("vmae.data")
LONG = 20_000  # lines from which on a list is long
LONG_BYTES = 8 << 20  # or bytes
SAMPLE = 500  # lines of a long list that are looked up when a run starts


def read_long_list(path: str | Path, grammar: Grammar, roots: Sequence[str]) -> Table | None:
    """Entries (and labels) of a long list; None for a short one, which is to be read line by line.

    Args:
        roots: see `roots_of`.

    Raises:
        InputError: what `read_list` says of the list's text; a line that was looked up names what is not
            there.
    """
    if not is_long(path):
        return None
    table, labels = read_cached(path, grammar, roots)
    if os.environ.get("RANK", "0") != "0":
        return table, labels
    if not _check_sample(path, table, grammar, roots):
        # Files moved from one of the roots to the other since the list was read.
        forget(path, grammar, roots)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError(
                f"list file {str(path)!r}: its files moved since it was last read, and it will be read anew: "
                "start again"
            )
        table, labels = read_cached(path, grammar, roots)
        _check_sample(path, table, grammar, roots)
    return table, labels


def read_all_of_long_list(
    path: str | Path, grammar: Grammar, roots: Sequence[str]
) -> tuple[EntryTable, LabelTable | None, list[tuple[int, str]]] | None:
    """Like `read_long_list`, with a look at every line on every rank; and (line number, what is wrong) of the
    lines that cannot be used."""
    return read_all(path, grammar, roots) if is_long(path) else None


def is_long(path: str | Path) -> bool:
    """Whether a list has many lines. What is no regular file counts as short."""

    def size(path: str | Path) -> int:
        try:
            about = os.stat(path)
        except (OSError, ValueError):
            return -1
        return about.st_size if stat.S_ISREG(about.st_mode) else -1

    try:
        (found,) = ask_files(size, [path])
    except Unanswered:  # as a short one, it says so
        return False
    if found > LONG_BYTES:
        return True
    return found > LONG and sum(max(map(data.count, (b"\n", b"\r"))) for data in read_pieces(path)) >= LONG


def _check_sample(path: str | Path, table: EntryTable, grammar: Grammar, roots: Sequence[str]) -> bool:
    """Look up some entries; False where one is found elsewhere than the table says.

    Raises:
        InputError: what one of them names cannot be used.
    """
    looker = ListParser(str(path), grammar, roots)
    numbers = spread_sample(range(len(table)), SAMPLE)
    lines = []
    for number in numbers:
        entry = table[number]
        reading = (table.written_path(number), entry.start, entry.total)
        lines.append(Line(entry.line, (reading,), entry.stride, entry.pattern))
    found = looker.look_up(lines)
    problems = [(line.number, problem) for line, (way, problem) in zip(lines, found) if way is None]
    if problems:
        raise_looked_up(path, problems, len(lines), roots)
    _LOG.info(
        "list %s: %d of %d paths looked up; `vmae check-data` looks at all", path, len(lines), len(table)
    )
    return all(table.root_of(number) == way[1] for number, (way, _) in zip(numbers, found) if way is not None)
