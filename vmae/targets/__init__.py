"""Targets of pre-training, one file each, named as the target.

A new target is a new file here: a subclass of `vmae.model.target.Target`, half a line `ABOUT` it, and
`build(wanted)`, which makes it. `--target` and its help, `vmae plan`, docs/settings.md and the tests then
know it. No target is imported before it is built: the files are read for their `ABOUT`.
"""

from __future__ import annotations

import ast
from pathlib import Path


def _about(path: Path) -> str | None:
    """The `ABOUT` of a file; None where it is of no target."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ABOUT":
            return ast.literal_eval(node.value)
    return None


def _find() -> dict[str, str]:
    files = sorted(Path(__file__).parent.glob("*.py"), key=lambda path: (path.stem != "pixels", path.stem))
    return {path.stem: about for path in files if (about := _about(path)) is not None}


TARGETS: dict[str, str] = _find()  # name: what is predicted, in half a line; the published one first
