"""Which checkpoint a run goes on from, whether it is whole, and what has changed since it was written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.format import find_damage
from vmae.config import _Checked
from vmae.errors import InputError
from vmae.files.folder_lock import refuse_if_locked
from vmae.train.parallel import Parallel


def choose_checkpoint(
    resume: str | None, folder: CheckpointFolder, parallel: Parallel, notes: list[str]
) -> Path | None:
    """The checkpoint that `resume` means, every file of it as it was written; None for a fresh start.

    Rank 0 chooses, and all ranks share the reading. `notes` gets a line on what was passed over.

    Args:
        resume: "auto" (the newest), "last-good" (the newest that is not damaged), a path, or None.

    Raises:
        InputError: it does not exist, or is damaged: names the files. Another run writes to the folder.
    """

    def choose() -> Path | None:
        refuse_if_locked(folder.folder)
        found: Path | None = None
        if resume == "last-good":
            found, problems = folder.last_good()
            notes.extend(f"note: passed over, damaged: {problem}" for problem in problems)
        elif resume is not None:
            found = folder.latest() if resume == "auto" else Path(resume)
        if resume in ("auto", "last-good"):
            notes.extend(f"note: passed over, incomplete: {text}" for text in folder.passed_over())
        if found is None and resume and folder.folder.is_dir():
            left = ", ".join(path.name for path in folder.unfinished())
            notes.append(
                f"{folder.folder} holds no complete checkpoint{f' (only {left})' if left else ''}: a fresh "
                "start"
            )
        return found

    path = parallel.on_main(choose)
    if path is None:
        return None
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist")
    damage = parallel.gather(find_damage(path, parallel.rank, parallel.world_size))
    if any(damage):
        text = "; ".join(problem for rank in damage for problem in rank)
        raise InputError(
            f"checkpoint {path} is damaged: {text}. --resume last-good goes on from the newest that is not"
        )
    return path


def with_defaults(saved: dict[str, Any], config: _Checked) -> dict[str, Any]:
    """Settings of a checkpoint as JSON holds them, with the defaults of fields that came after it."""
    whole = dict(saved)
    for field in dataclasses.fields(config):
        own = getattr(config, field.name)
        if field.name not in saved:
            if isinstance(field.default, _Checked):
                whole[field.name] = json.loads(json.dumps(field.default.to_dict()))
            elif field.default is not dataclasses.MISSING:
                whole[field.name] = json.loads(json.dumps(field.default))
        elif isinstance(own, _Checked) and isinstance(saved[field.name], dict):
            whole[field.name] = with_defaults(saved[field.name], own)
    return whole


def setting_changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings (`group.name`) that differ between two nested dictionaries, each with a sentence on how."""
    changes: dict[str, str] = {}
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes |= setting_changes(old, new, f"{prefix}{name}.")
        elif old != new:
            changes[prefix + name] = f"{prefix}{name} {old} in the checkpoint, {new} now"
    return changes
