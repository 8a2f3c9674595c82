"""The one formatter of results: a `Table` for the terminal, for Markdown and for an HTML page."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from harness.json_records import Spread

MIB = 2**20
HEAD_WIDTH = 16  # of a column on a terminal, where its cells are not wider
_NUMBER = re.compile(r"-?\d|-?$")


@dataclass(frozen=True)
class Table:
    """A head and rows of text cells.

    Attributes:
        title: stands over it; not in Markdown, where a page has its own headings.
        note: stands under it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def to_text(self) -> str:
        """Text for a terminal: columns aligned, numbers to the right, long heads over several lines."""
        text = self._text_columns(first=True)
        cells = [max((len(row[i]) for row in self.rows), default=0) for i in range(len(self.head))]
        heads = []
        for name, width in zip(self.head, cells):
            lines = textwrap.wrap(
                name, max(width, HEAD_WIDTH), break_long_words=False, break_on_hyphens=False
            )
            heads.append(lines or [""])
        widths = [max(width, *map(len, lines)) for width, lines in zip(cells, heads)]

        def line(parts: Sequence[str]) -> str:
            aligned = zip(parts, widths, text)
            return "  ".join(p.ljust(w) if left else p.rjust(w) for p, w, left in aligned).rstrip()

        height = max(map(len, heads), default=0)
        padded = [[""] * (height - len(lines)) + lines for lines in heads]
        shown = [line(parts) for parts in zip(*padded)]
        shown += ["-" * (sum(widths) + 2 * (len(widths) - 1)), *(line(row) for row in self.rows)]
        return "\n".join(text for text in (self.title, *shown, self.note) if text)

    def to_markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
        return table + f"\n{self.note}\n" if self.note else table

    def to_html(self) -> str:
        text = self._text_columns(first=False)

        def line(cells: Sequence[str], tag: str) -> str:
            marked = zip(cells, (" class=text" if is_text else "" for is_text in text))
            return f"<tr>{''.join(f'<{tag}{mark}>{html.escape(cell)}</{tag}>' for cell, mark in marked)}</tr>"

        rows = "\n".join(line(row, "td") for row in self.rows)
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        table = f'<div class="wide"><table>{line(self.head, "th")}\n{rows}</table></div>'
        return f"<h3>{html.escape(self.title)}</h3>{table}{note}"

    def _text_columns(self, first: bool) -> list[bool]:
        """Which columns hold text, not numbers; `first`: the first column counts as text in any case."""
        columns = range(len(self.head))
        return [(first and i == 0) or not all(_NUMBER.match(row[i]) for row in self.rows) for i in columns]


def show(*tables: Table) -> None:
    """Print tables, an empty line before each."""
    for table in tables:
        print(f"\n{table.to_text()}")


def number(value: float | None, unit: float = 1, digits: int = 0, after: str = "") -> str:
    """`value / unit`, "-" where there is none."""
    return "-" if value is None else f"{value / unit:.{digits}f}{after}"


def median_of(value: Spread | None) -> float | None:
    return None if value is None else value.median


def spread_text(value: Spread | None, digits: int) -> str:
    """median (min to max)"""
    if value is None:
        return "-"
    return f"{value.median:.{digits}f} ({value.min:.{digits}f} to {value.max:.{digits}f})"
