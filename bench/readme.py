"""Tables of results in README.md and docs/results.md: every number comes out of a result file.

A table stands in a Markdown file between two comments that name its kind (a command, see
bench/harness/results) and its file; the first table of the result is written there:

    <!-- table dual_vs_encoder bench/results/cpu/dual_vs_encoder.json -->
    <!-- end of table -->

    python bench/readme.py          # write them anew
    python bench/readme.py --check  # exit 1 if one differs from its file (a test does so)
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from harness import ROOT
from harness.results import read_result

_BLOCK = re.compile(r"(<!-- table (?P<kind>[\w-]+) (?P<path>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def rewritten(text: str, root: Path = ROOT) -> str:
    """`text` with every marked table made anew.

    Raises:
        ValueError: an unknown kind, a file that is no result, or that of a rehearsal.
    """

    def replace(found: re.Match) -> str:
        result = read_result(root / found["path"], found["kind"])
        if result.environment.rehearsed:
            raise ValueError(f"{found['path']}: a rehearsal, nothing in it was measured")
        return f"{found[1]}{result.tables()[0].to_markdown()}{found[4]}"

    return _BLOCK.sub(replace, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    check = "change nothing; exit 1 if a table differs from its file"
    parser.add_argument("--check", action="store_true", help=check)
    names = ("results", "data_at_scale", "speedrun")
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in names)]
    files = "Markdown files (README.md, and of docs/: results.md, data_at_scale.md, speedrun.md)"
    parser.add_argument("files", nargs="*", type=Path, default=pages, help=files)
    args = parser.parse_args(argv)
    differs = False
    for path in args.files:
        text = path.read_text(encoding="utf-8")
        try:
            new = rewritten(text)
        except ValueError as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            return 2
        if new == text:
            continue
        differs = True
        if args.check:
            print(f"{path}: differs from its results; run python bench/readme.py")
        else:
            path.write_text(new, encoding="utf-8")
            print(f"{path}: written")
    return 1 if differs and args.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
