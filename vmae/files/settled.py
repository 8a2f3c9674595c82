"""What a folder's result depends on: written beside it, and compared before a later start adds to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import read_json


def check_same(before: dict[str, Any], now: dict[str, Any], holds: str, remedy: str) -> None:
    """Raises InputError unless `before`, of an earlier start, has every value of `now`; names those that
    differ.

    Args:
        holds: the beginning of the message: which folder, and what is in it.
        remedy: what to do, beside taking the same settings.
    """
    if differing := differences(before, json.loads(json.dumps(now))):
        raise InputError(f"{holds} (there and now: {'; '.join(differing)}); {remedy}")


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted name of each value of `now` that `before` has otherwise or not at all, with both values where
    they are short."""
    found: list[str] = []
    for name, value in now.items():
        old = before.get(name) if isinstance(before, dict) else None
        if isinstance(value, dict) and isinstance(old, dict):
            found += differences(old, value, f"{prefix}{name}.")
        elif old != value:
            texts = [json.dumps(one) for one in (old, value)]
            short = all(len(text) < 40 for text in texts)
            found.append(f"{prefix}{name} {', '.join(texts) if short else 'differs'}")
    return found


def settle(path: Path, decides: dict[str, Any], what: str, **noted: Any) -> None:
    """Make the folder of `path` that of this result, or check that it is.

    Args:
        path: file that says what the folder's result depends on; written where it is missing.
        decides: what decides the result: has to be the same.
        what: the folder's content, such as "another test".
        noted: written, not compared.

    Raises:
        InputError: the folder holds another result (names what differs), or cannot be used.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {folder}: {error.strerror}") from error
    before = read_json(path, "settings file") if path.exists() else None
    if before is not None:
        check_same(before, decides, f"{folder} holds {what}", f"choose another --output, or remove {folder}")
        return
    text = json.dumps({**decides, **noted}, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text), binary=False)
