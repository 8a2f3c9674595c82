"""A teacher's logits on disk, for the very views that a student will see.

A view is a function of (seed, epoch, index), so its number says what the teacher saw. One file an epoch, bf16
[samples, S, K], and one that marks the samples done; whatever is marked is complete, so a stopped pass goes
on.

Legend: B videos, S clips of each, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import parse_json
from vmae.files.settled import check_same

ABOUT = "logits.json"


class LogitStore:
    """The logits in a folder.

    Args:
        folder: of the store.
        about: what decides the views and the teacher, plain containers; with `epochs`, `samples`,
            `num_sample`, `classes`.

    Raises:
        InputError: the folder holds logits of other views or of another teacher (names what differs).
    """

    def __init__(self, folder: str | Path, about: dict[str, Any]) -> None:
        self.folder, self.about = Path(folder), json.loads(json.dumps(about))
        path = self.folder / ABOUT
        before = None
        try:
            if path.exists():
                before = dict(parse_json(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"the stored logits in {folder} cannot be read: {error}") from error
        self.exists = before is not None
        if before is not None:
            holds = f"the logits in {folder} are of other views or another teacher"
            check_same(before, self.about, holds, f"choose another --logits folder, or remove {folder}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(samples, S, K) of an epoch."""
        return self.about["samples"], self.about["num_sample"], self.about["classes"]

    def create(self) -> None:
        """Make room for all epochs, unless that was done.

        Raises:
            InputError: there is none on the disk.
        """
        if self.exists:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for epoch in range(self.about["epochs"]):
                for path, size in (
                    (self._logits(epoch), 2 * int(np.prod(self.shape))),
                    (self._marks(epoch), self.shape[0]),
                ):
                    with open(path, "wb") as file:
                        file.truncate(size)
        except OSError as error:
            raise InputError(f"cannot make the logits' files in {self.folder}: {error.strerror}") from error
        write_atomically(
            self.folder / ABOUT, lambda file: file.write(json.dumps(self.about) + "\n"), binary=False
        )
        self.exists = True

    def _logits(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.bf16"

    def _marks(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.done"

    def missing(self) -> list[tuple[int, int]]:
        """(epoch, index) of all samples that are not stored yet.

        Raises:
            InputError: there is no store, or a file of it is not there.
        """
        if not self.exists:
            raise InputError(
                f"{self.folder} holds no stored logits; `distil --logits {self.folder} --store EPOCHS` makes "
                "them"
            )
        left = {
            epoch: np.flatnonzero(self._map(self._marks(epoch), np.uint8) == 0)
            for epoch in range(self.about["epochs"])
        }
        return [(epoch, int(index)) for epoch, indices in left.items() for index in indices]

    def _map(self, path: Path, dtype: type, mode: Literal["r", "r+"] = "r") -> np.memmap:
        try:
            return np.memmap(path, dtype=dtype, mode=mode)
        except (OSError, ValueError) as error:
            raise InputError(f"the stored logits {path} cannot be read: {error}") from error

    def write(self, keys: Sequence[tuple[int, int]], logits: Tensor) -> None:
        """Store the logits [B*S, K] of samples, then mark them."""
        rows = logits.to(torch.bfloat16).cpu().view(torch.int16).numpy().reshape(len(keys), *self.shape[1:])
        for path_of, dtype, values in (
            (self._logits, np.int16, rows),
            (self._marks, np.uint8, [1] * len(keys)),
        ):
            for (epoch, index), value in zip(keys, values, strict=True):
                file = self._map(path_of(epoch), dtype, "r+")
                file.reshape(self.shape[0], -1)[index] = np.asarray(value).reshape(-1)
                file.flush()

    def read(self, keys: Sequence[tuple[int, int]]) -> Tensor:
        """float32 [B*S, K] of samples."""
        rows = [self._map(self._logits(epoch), np.int16).reshape(self.shape)[index] for epoch, index in keys]
        return torch.from_numpy(np.concatenate(rows)).view(torch.bfloat16).float()


def fill_store(
    store: LogitStore,
    compute: Callable[[list[tuple[int, int]]], Tensor],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[list], Any] = lambda parts: parts,
) -> None:
    """Store what is missing; ranks take samples in turn.

    Args:
        compute: (epoch, index) keys -> logits [B*S, K].
        batch_size: videos at once.
        progress: wraps the list of batches.
    """
    own = store.missing()[rank::world_size]
    for keys in progress([own[i : i + batch_size] for i in range(0, len(own), batch_size)]):
        store.write(keys, compute(keys))
