"""Fails when a Markdown file names a path of this tree that does not exist.

Looked at: words in `code` and link targets that contain a slash and start with a top-level entry of the tree.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    tops = {name.split("/")[0] for name in listed if "/" in name}
    missing = []
    for document in (name for name in listed if name.endswith(".md")):
        text = (ROOT / document).read_text(encoding="utf-8")
        quoted = " ".join(a or b for a, b in re.findall(r"`([^`\n]+)`|\]\(([^)\s]+)\)", text))
        words = re.findall(r"[\w.{},*-]+/[\w.{},*/-]*", quoted)
        for word in words:
            if (
                word.split("/")[0] in tops
                and not any(c in word for c in "{}*")
                and not (ROOT / word).exists()
            ):
                missing.append(f"{document}: {word}")
    print("\n".join(missing) or "every path named in a document exists")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
