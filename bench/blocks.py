"""Markdown blocks of every result in a folder, as `bench/readme.py` keeps them in the documents.

    python bench/blocks.py bench/results/DEVICE/DATE-COMMIT    # writes blocks.md there

A block that is moved to a page stays current: its comment names the result.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from harness import ROOT
from harness.command import exit_code
from harness.progress import at
from harness.results import RESULTS, read_result
from harness.results.base import Result

from vmae import InputError

NAME = "blocks.md"


def results_of(folder: Path) -> dict[Path, Result]:
    """Every readable result of a folder, in the order of `RESULTS`."""
    order, found = list(RESULTS), {}
    paths = [path for path in folder.glob("*.json") if path.stem.partition(".")[0] in RESULTS]
    for path in sorted(paths, key=lambda path: (order.index(path.stem.partition(".")[0]), path.stem)):
        at(path.name)
        try:
            found[path] = read_result(path, path.stem)
        except ValueError as error:
            print(f"left out: {error}")
    return found


def blocks(results: dict[Path, Result]) -> str:
    """A heading and a block for each."""
    parts = []
    for path, result in results.items():
        name = os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)
        variety = path.stem.partition(".")[2]
        title = f"{result.title}: {variety}" if variety else result.title
        marked = f"<!-- table {path.stem} {name} -->\n{result.tables()[0].to_markdown()}<!-- end of table -->"
        parts.append(f"## {title}\n\n{marked}\n")
    return "\n".join(parts)


def run(folder: Path) -> int:
    results = results_of(folder)
    if not results:
        raise InputError(f"{folder}: no results there")
    path = folder / NAME
    path.write_text(blocks(results), encoding="utf-8")
    print(f"{len(results)} blocks: {path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args.folder.absolute()))


if __name__ == "__main__":
    raise SystemExit(main())
