"""Run the commands of a how-to: `python tests/run_docs.py docs/own_data.md`; without a name, of all of them.

A block of commands is run if the line above its fence is `<!-- run -->`; `<!-- run: PACKAGE ... -->` leaves
the whole page out where a package is not installed, and `<!-- not run: REASON -->` marks what cannot be run
everywhere. The blocks of a page run in order, each under `bash -euo pipefail`, in one fresh copy of the tree,
with this interpreter as `python`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """Block of commands of a page: its line, its code, and the packages that it needs."""

    line: int
    code: str
    needs: tuple[str, ...] = ()


def pages() -> list[Path]:
    """All how-tos."""
    return sorted((ROOT / "docs").glob("*.md"))


def read_blocks(page: Path) -> list[Block]:
    """The blocks to run.

    Raises:
        ValueError: a block is marked neither as run nor with the reason why it is not.
    """
    text, blocks = page.read_text(encoding="utf-8"), []
    for found in _BLOCK.finditer(text):
        if found["language"] not in ("bash", "python"):
            continue
        line, mark = text.count("\n", 0, found.start()) + 1, found["mark"] or ""
        code = found["code"]
        if found["language"] == "python":
            code = f"python - <<'END_OF_BLOCK'\n{code}END_OF_BLOCK\n"
        if run := re.fullmatch(r"run(?:: (?P<needs>[\w ]+))?", mark):
            blocks.append(Block(line, code, tuple((run["needs"] or "").split())))
        elif not re.fullmatch(r"not run: .+", mark):
            raise ValueError(
                f"{page.name}:{line}: the line above the block must be <!-- run --> or "
                "<!-- not run: REASON -->"
            )
    return blocks


def missing_packages(blocks: list[Block]) -> list[str]:
    """Packages that the blocks need and that are not installed."""
    return sorted(
        {name for block in blocks for name in block.needs if importlib.util.find_spec(name) is None}
    )


def copy_tree(folder: Path) -> None:
    """Copy the files that git tracks or would add, as in a fresh clone."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith("bench/results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_page(page: Path, folder: Path) -> None:
    """Run a page's blocks in `folder`.

    Raises:
        AssertionError: a block failed; the message has its line, its commands and the end of its output.
    """
    copy_tree(folder)
    (folder / ".bin").mkdir()
    paths = os.pathsep.join([str(folder), str(folder / "kernels")])
    # not a link: through one, a virtual environment's interpreter does not find its packages
    launcher = folder / ".bin" / "python"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    launcher.chmod(0o755)
    own = {
        "PATH": f"{launcher.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": paths,
        "PYTHON": str(launcher),
    }
    for block in read_blocks(page):
        command = ["bash", "-euo", "pipefail", "-c", block.code]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=600
        )
        output = (done.stdout + done.stderr)[-3000:]
        assert done.returncode == 0, (
            f"{page.name}:{block.line} ended with {done.returncode}\n{block.code}\n{output}"
        )


def main() -> int:
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or pages()
    for page in chosen:
        if missing := missing_packages(read_blocks(page)):
            print(f"{page.name}: left out, {', '.join(missing)} not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                run_page(page, Path(folder))
            except AssertionError as error:
                print(f"FAILED {error}")
                return 1
        print(f"{page.name}: {len(read_blocks(page))} blocks ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
