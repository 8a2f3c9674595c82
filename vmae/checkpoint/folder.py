"""A run's folder: its checkpoints by name, the newest one, what is deleted when, and files of weights.

A training checkpoint `checkpoint-00001000/` (`vmae.checkpoint.format`) is complete or absent, and a run needs
nothing else to go on: samples and the model's random numbers are functions of the seed and the step.
`weights.pth` at the end of a run is one file with published names, which the published code reads too.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae.checkpoint.foreign import find_foreign
from vmae.checkpoint.format import MANIFEST, find_damage, is_checkpoint
from vmae.checkpoint.hub import fetch
from vmae.checkpoint.hub_names import is_hub_name, proposal
from vmae.errors import InputError
from vmae.files.atomic import is_being_written, write_atomically

WEIGHTS_NAME, AVERAGED_NAME, BEST_WEIGHTS_NAME = "weights.pth", "weights_ema.pth", "weights_best.pth"
BEST_NAME = "checkpoint-best"  # a link to the checkpoint of the best validation
TEST_NAME = "test"  # folder of the test at the end of a run
CONFIG_NAME = "config.json"  # of a folder of transformers
_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d{8,})")


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.rpartition("-")[2])


class CheckpointFolder:
    """The training checkpoints of one run.

    Args:
        folder: of the run; it need not exist yet.
        keep: newest checkpoints to keep; older ones are deleted once a newer one is complete.
        keep_every: checkpoints of steps that this divides stay for ever.
        check: raises InputError where the folder is no longer the run's, see `FolderLock.check`.

    Attributes:
        best_step: of a checkpoint that stays until another one is the best; None where there is none.
    """

    best_step: int | None = None

    def __init__(
        self,
        folder: str | Path,
        keep: int = 3,
        keep_every: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if keep < 1:
            raise InputError(f"a run must keep at least 1 checkpoint, not {keep}")
        if keep_every is not None and keep_every < 1:
            raise InputError(f"keep_every must be at least 1, not {keep_every}")
        self.folder, self.keep, self.keep_every, self.check = Path(folder), keep, keep_every, check

    def path_of(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step:08d}"

    def named(self) -> list[Path]:
        """Everything with a checkpoint's name, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)

    def paths(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return [path for path in self.named() if is_checkpoint(path)]

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return paths[-1] if (paths := self.paths()) else None

    def passed_over(self) -> list[str]:
        """Names newer than `latest` that are no complete checkpoints, each with the reason."""
        newest = self.latest()
        newer = [path for path in self.named() if newest is None or step_of(path) > step_of(newest)]
        why = f"it has no {MANIFEST} that can be read"
        return [f"{path.name}: {why if path.is_dir() else 'it is no folder'}" for path in newer]

    def describe_latest(self) -> str:
        """Text for errors: the newest complete checkpoint."""
        if (newest := self.latest()) is None:
            return "there is no whole one yet"
        return f"the newest whole one is {newest}"

    def last_good(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose every file is as it was written, and what is wrong with newer ones."""
        problems: list[str] = []
        for path in reversed(self.paths()):
            try:
                damage = find_damage(path)
            except InputError as error:
                damage = [str(error)]
            if not damage:
                return path, problems
            problems.append(f"{path.name}: {'; '.join(damage)}")
        return None, problems

    def unfinished(self) -> list[Path]:
        """What killed runs left unfinished; never read, deleted by the next save. Files that another thread
        is writing just now are not among it."""
        found = self.folder.glob(".*.unfinished") if self.folder.is_dir() else ()
        return sorted(path for path in found if not is_being_written(path))

    def remove(self, path: Path) -> None:
        """Delete a checkpoint; should that be cut short, it no longer has a checkpoint's name."""
        stale = path.with_name(f".{path.name}.old.unfinished")
        os.replace(path, stale)
        shutil.rmtree(stale, ignore_errors=True)

    def prune(self) -> None:
        """Delete checkpoints older than the newest `keep`, except the best and those of every `keep_every`
        steps."""
        for path in self.paths()[: -self.keep]:
            stays = self.keep_every is not None and step_of(path) % self.keep_every == 0
            if not stays and step_of(path) != self.best_step:
                self.remove(path)

    def set_best(self, step: int) -> str:
        """Make `checkpoint-best` a link to the checkpoint of `step`: replaced in one move, so that a kill
        leaves the old one or the new one.

        Returns:
            What the user should know, in a line: the checkpoint is gone, or there can be no link; else empty.

        Raises:
            InputError: the folder is no longer the run's.
        """
        self.check()
        link, target = self.folder / BEST_NAME, self.path_of(step)
        if not is_checkpoint(target):
            if link.is_symlink() and not link.exists():
                link.unlink()
            return f"note: the best checkpoint so far, {target.name}, is gone from {self.folder}"
        if link.is_symlink() and os.readlink(link) == target.name:
            return ""
        beside = self.folder / f".{BEST_NAME}.new"
        try:
            beside.unlink(missing_ok=True)
            os.symlink(target.name, beside)
            os.replace(beside, link)
        except OSError as error:  # a file system without links, or a folder of that name
            return f"note: no link {link} ({error.strerror}): the best checkpoint is {target.name}"
        return ""


def find_weights(checkpoint: str | Path) -> Path:
    """The path to read; see `locate_weights`."""
    return locate_weights(checkpoint)[0]


def locate_weights(checkpoint: str | Path) -> tuple[Path, str]:
    """The path to read, and a line on why this one of several (empty where there is no choice).

    That is `checkpoint` itself (a file, a training checkpoint's folder, or a folder of the hub's format), or
    a run's newest checkpoint, else its weights, else what `find_foreign` finds of a published trainer's. A
    name of the hub (`hub:OWNER/NAME`) is fetched.

    Raises:
        InputError: there is no such file, or none in the folder; or it can't be fetched, see `hub.fetch`.
    """
    path = fetch(checkpoint) if is_hub_name(checkpoint) else Path(checkpoint)
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist{proposal(checkpoint)}")
    if not path.is_dir() or is_checkpoint(path):
        return path, ""
    run = CheckpointFolder(path)
    found = run.latest() or path / WEIGHTS_NAME
    if not found.exists() and (path / CONFIG_NAME).is_file():
        return path, ""
    if not found.exists():
        try:
            foreign = find_foreign(path)
        except OSError as error:
            raise InputError(f"folder {path} cannot be read: {error.strerror}") from error
        if foreign is None:
            raise InputError(
                f"{path} holds no complete checkpoint and no {WEIGHTS_NAME} (nor checkpoint-N.pth, or "
                "DeepSpeed's mp_rank_00_model_states.pt)"
            )
        return foreign
    for text in run.passed_over():
        _LOG.warning("note: passed over, newer than %s: %s", found.name, text)
    return found, ""


def folder_beside(checkpoint: str | Path) -> Path:
    """Where a command writes "beside the checkpoint": the current folder for a name of the hub, whose cache
    is no place for anything else."""
    return Path() if is_hub_name(checkpoint) else find_weights(checkpoint).parent


def export_weights(path: str | Path, state: dict[str, Tensor], **about: Any) -> None:
    """Write named tensors as one file for this and the published code; `about` (plain containers) stands
    beside them.

    Args:
        path: ends in .safetensors for that format (`about` is then its metadata, as JSON); else `{"model":
            state}` of torch.

    Raises:
        InputError: it can't be written.
    """
    path = Path(path)
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    wanted = sum(value.nbytes for value in state.values())
    if path.suffix != ".safetensors":
        write_atomically(path, lambda file: torch.save({"model": state, **about}, file), wanted=wanted)
        return
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise InputError(f"writing {path} needs the safetensors package: pip install safetensors") from error
    metadata = {key: json.dumps(value) for key, value in about.items()}
    write_atomically(path, lambda file: file.write(save(state, {"format": "pt", **metadata})), wanted=wanted)


def set_aside(folder: str | Path, after_step: int | None = None) -> Path | None:
    """Move an earlier run's files into `folder/previous-N`, so that another run neither mixes with nor
    deletes them.

    Args:
        after_step: move only the checkpoints of later steps: the run goes on from this one.

    Returns:
        That folder, or None when there was nothing to move.

    Raises:
        InputError: the files can't be moved.
    """
    folder = Path(folder)
    found = [
        path for path in CheckpointFolder(folder).named() if after_step is None or step_of(path) > after_step
    ]
    if after_step is None:
        names = (
            "log.jsonl",
            "log.skipped",
            "run.json",
            "config.yaml",
            "nonfinite.json",
            "tensorboard",
            "sinks.json",
            "wandb",
            WEIGHTS_NAME,
            AVERAGED_NAME,
            BEST_WEIGHTS_NAME,
            BEST_NAME,
            TEST_NAME,
        )
        found += [folder / name for name in names if os.path.lexists(folder / name)]
    if not found:
        return None
    number = next(n for n in range(1, len(os.listdir(folder)) + 2) if not (folder / f"previous-{n}").exists())
    target = folder / f"previous-{number}"
    try:
        target.mkdir()
        for path in found:
            path.rename(target / path.name)
    except OSError as error:
        raise InputError(
            f"cannot move the earlier run in {folder} aside to {target}: {error.strerror}"
        ) from error
    return target
