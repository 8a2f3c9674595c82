"""Checkpoints that are complete or absent: written beside, forced to the disk, then renamed.

A training checkpoint `checkpoint-00001000.pth` holds `model` (published names), `optimizer`, `step` (optimizer steps done)
and `config` (plain containers). Nothing else is needed to go on: samples and the model's random numbers are functions of
the seed and the step. All files load with `weights_only=True`, and the published code reads `model` out of them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from vmae.errors import InputError

WEIGHTS_NAME = "weights.pth"
_NAME = re.compile(r"checkpoint-(\d{8,})\.pth")
_KEYS = ("model", "optimizer", "step", "config")


@contextlib.contextmanager
def _replacing(path: Path, mode: str) -> Iterator[IO]:
    """A file that becomes `path` when the block ends, at once and on the disk; when it fails, `path` stays as it was."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The rename itself must reach the disk; file systems that can't sync a folder need no help."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, write: Callable[[IO], Any], *, binary: bool = True) -> None:
    """Call `write(file)` on a file that replaces `path` when all of it is on the disk.

    Raises:
        InputError: the file can't be written (a full disk, no permission); `path` is then as it was.
    """
    try:
        with _replacing(path, "wb" if binary else "w") as file:
            write(file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise InputError(f"cannot write {path}: {reason}; what was there before is untouched") from error


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(_NAME.fullmatch(path.name)[1])


class CheckpointFolder:
    """The training checkpoints of one run.

    Args:
        folder: of the run; it need not exist yet.
        keep: newest checkpoints to keep; older ones are deleted once a newer one is complete.
    """

    def __init__(self, folder: str | Path, keep: int = 3) -> None:
        if keep < 1:
            raise InputError(f"a run must keep at least 1 checkpoint, not {keep}")
        self.folder, self.keep = Path(folder), keep

    def paths(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return paths[-1] if (paths := self.paths()) else None

    def unfinished(self) -> list[Path]:
        """What killed runs left beside; never read, deleted by the next `save`."""
        return sorted(self.folder.glob(".*.unfinished")) if self.folder.is_dir() else []

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`, then delete those that are too old.

        Args:
            content: `model`, `optimizer` and `config`; tensors and plain containers.

        Raises:
            InputError: it can't be written; the earlier checkpoints are all still there.
        """
        path = self.folder / f"checkpoint-{step:08d}.pth"
        for left_over in self.unfinished():
            left_over.unlink(missing_ok=True)
        write_atomically(path, lambda file: torch.save({**content, "step": step}, file))
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path


def read_training_checkpoint(path: str | Path) -> dict[str, Any]:
    """`model`, `optimizer`, `step` and `config` of a training checkpoint, on the CPU.

    Raises:
        InputError: the file is missing, damaged, or holds weights only.
    """
    from vmae.interop.upstream import read_checkpoint

    content = read_checkpoint(path)
    missing = [key for key in _KEYS if key not in content] if isinstance(content, dict) else list(_KEYS)
    if missing:
        raise InputError(
            f"{path} is not a training checkpoint (it has no {', '.join(missing)}); to start from weights use --init"
        )
    return content


def export_weights(path: str | Path, model: torch.nn.Module, **about: Any) -> None:
    """Write `{"model": state_dict}` for this and the published code; `about` (plain containers) stands beside it.

    Raises:
        InputError: it can't be written.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(Path(path), lambda file: torch.save({"model": state, **about}, file))


def set_aside(folder: str | Path, after_step: int | None = None) -> Path | None:
    """Move an earlier run's files into `folder/previous-N`, so that another run neither mixes with nor deletes them.

    Args:
        after_step: move only the checkpoints of later steps: the run goes on from this one.

    Returns:
        That folder, or None when there was nothing to move.

    Raises:
        InputError: the files can't be moved.
    """
    folder = Path(folder)
    found = [path for path in CheckpointFolder(folder).paths() if after_step is None or step_of(path) > after_step]
    if after_step is None:
        names = ("log.jsonl", "run.json", "nonfinite.json", "tensorboard", WEIGHTS_NAME)
        found += [folder / name for name in names if (folder / name).exists()]
    if not found:
        return None
    number = next(n for n in range(1, len(os.listdir(folder)) + 2) if not (folder / f"previous-{n}").exists())
    target = folder / f"previous-{number}"
    try:
        target.mkdir()
        for path in found:
            path.rename(target / path.name)
    except OSError as error:
        raise InputError(f"cannot move the earlier run in {folder} aside to {target}: {error.strerror}") from error
    return target
