"""Writes what the plans of docs/hundred_million.md print below their commands."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from vmae.cli import main

PAGE = Path(__file__).with_name("hundred_million.md")
# a command that is run, the text up to its output, and the output
_PLAN = re.compile(
    r"(?P<head><!-- run -->\n```bash\npython -m (?P<words>vmae plan .*?)```\n.*?```text\n).*?```", re.DOTALL
)


def rewritten(text: str) -> str:
    """The page with what its commands print now, from the recommendation on."""
    return _PLAN.sub(lambda found: f"{found['head']}{_printed(found['words'])}```", text)


def _printed(words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if main(shlex.split(words.replace("\\\n", " "))[1:]):
            raise SystemExit(f"failed: {words}")
    lines = out.getvalue().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("recommendation"))
    return "".join(f"{line}\n" for line in lines[start:] if line and not line.startswith("shared memory"))


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text("utf-8")), encoding="utf-8")
    print(f"{PAGE}: written")
