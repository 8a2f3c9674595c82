"""What a teacher makes of the very views that a student will see, on disk: logits, or latents.

A view is a function of (seed, epoch, index), so its number says what the teacher saw. One file an epoch, bf16
[samples, S, ...], and one that marks the samples done; whatever is marked is complete, so a stopped pass goes
on.

Legend: B videos, S clips of each, K classes, Nk counted tokens, C values of a token.
"""

from __future__ import annotations

import abc
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import parse_json
from vmae.files.limits import free_disk
from vmae.files.settled import check_same

Key = tuple[int, int]  # epoch, index


class ViewStore(abc.ABC):
    """The store in a folder.

    Args:
        folder: of the store.
        about: what decides the views and the teacher, plain containers; with `epochs`, `samples`, and the
            numbers that `row` is made of.

    Raises:
        InputError: the folder holds what is of other views or of another teacher (names what differs).
    """

    noun: ClassVar[str]  # what it holds; the flag of its folder
    command: ClassVar[str]  # that fills it

    def __init__(self, folder: str | Path, about: dict[str, Any]) -> None:
        self.folder, self.about = Path(folder), json.loads(json.dumps(about))
        before = self.read_about(folder)
        self.exists = before is not None
        if before is not None:
            holds = f"the {self.noun} in {folder} are of other views or another teacher"
            check_same(before, self.about, holds, f"choose another --{self.noun} folder, or remove {folder}")

    @property
    @abc.abstractmethod
    def row(self) -> tuple[int, ...]:
        """(S, ...): the shape of a sample."""

    @classmethod
    def read_about(cls, folder: str | Path) -> dict[str, Any] | None:
        """What decides the content of a folder, as it was written; None where there is no store."""
        path = Path(folder) / f"{cls.noun}.json"
        try:
            return dict(parse_json(path.read_text(encoding="utf-8"))) if path.exists() else None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"the stored {cls.noun} in {folder} cannot be read: {error}") from error

    @classmethod
    def epochs_in(cls, folder: str | Path) -> int:
        """Epochs that a folder holds.

        Raises:
            InputError: it holds no store.
        """
        about = cls.read_about(folder)
        if about is None or not isinstance(about.get("epochs"), int):
            raise cls.nothing_in(folder)
        return about["epochs"]

    @classmethod
    def nothing_in(cls, folder: str | Path) -> InputError:
        return InputError(
            f"{folder} holds no stored {cls.noun}; `{cls.command} --{cls.noun} {folder} --store EPOCHS` "
            "makes them"
        )

    @property
    def size_bytes(self) -> int:
        """Of all epochs, marks left out."""
        return 2 * self.about["epochs"] * self.about["samples"] * int(np.prod(self.row))

    def check_room(self) -> int | None:
        """Free bytes of the disk, None where they are not known.

        Raises:
            InputError: a new store would not fit.
        """
        free = free_disk(self.folder)
        if not self.exists and free is not None and free < self.size_bytes:
            raise InputError(
                f"the {self.noun} would take {self.size_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are "
                f"free in {self.folder}: store fewer epochs, or choose another --{self.noun} folder"
            )
        return free

    def create(self) -> None:
        """Make room for all epochs, unless that was done.

        Raises:
            InputError: there is none on the disk.
        """
        if self.exists:
            return
        self.check_room()
        samples = self.about["samples"]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for epoch in range(self.about["epochs"]):
                for path, size in (
                    (self._values(epoch), 2 * samples * int(np.prod(self.row))),
                    (self._marks(epoch), samples),
                ):
                    with open(path, "wb") as file:
                        file.truncate(size)
        except OSError as error:
            raise InputError(
                f"cannot make the files of {self.noun} in {self.folder}: {error.strerror}"
            ) from error
        write_atomically(
            self.folder / f"{self.noun}.json",
            lambda file: file.write(json.dumps(self.about) + "\n"),
            binary=False,
        )
        self.exists = True

    def _values(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.bf16"

    def _marks(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.done"

    def missing(self) -> list[Key]:
        """(epoch, index) of all samples that are not stored yet.

        Raises:
            InputError: there is no store, or a file of it is not there.
        """
        if not self.exists:
            raise self.nothing_in(self.folder)
        left = {
            epoch: np.flatnonzero(self._map(self._marks(epoch), np.uint8) == 0)
            for epoch in range(self.about["epochs"])
        }
        return [(epoch, int(index)) for epoch, indices in left.items() for index in indices]

    def check_complete(self, batch: int) -> None:
        """Raises InputError where a sample is not stored yet, or an epoch is less than a batch (which is
        filled up with views that are not stored)."""
        missing, samples = self.missing(), self.about["samples"]
        if missing:
            raise InputError(
                f"{self.folder} lacks the {self.noun} of {len(missing)} samples; finish it with --store first"
            )
        if samples < batch:
            raise InputError(
                f"an epoch of {samples} samples is less than a batch of {batch}; stored {self.noun} need "
                "whole batches: lower --batch-size, or raise --repeat"
            )

    def _map(self, path: Path, dtype: type) -> np.memmap:
        try:
            return np.memmap(path, dtype=dtype, mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"the stored {self.noun} {path} cannot be read: {error}") from error

    def write(self, keys: Sequence[Key], values: Tensor) -> None:
        """Store the values [B*S, ...] of samples, then mark them.

        Raises:
            InputError: they cannot be written.
        """
        rows = values.to(torch.bfloat16).cpu().view(torch.int16).numpy().reshape(len(keys), *self.row)
        try:
            for path_of, parts in ((self._values, rows), (self._marks, np.ones((len(keys), 1), np.uint8))):
                for epoch in sorted({epoch for epoch, _ in keys}):
                    with open(path_of(epoch), "r+b") as file:
                        own = [(i, part) for (e, i), part in zip(keys, parts, strict=True) if e == epoch]
                        _write_rows(file, own)
        except OSError as error:
            raise InputError(
                f"cannot write the {self.noun} in {self.folder}: {error.strerror}; the same command goes on "
                "from what is stored"
            ) from error

    def read(self, keys: Sequence[Key]) -> Tensor:
        """bf16 [B*S, ...] of samples."""
        shape = (self.about["samples"], *self.row)
        rows = [self._map(self._values(epoch), np.int16).reshape(shape)[index] for epoch, index in keys]
        return torch.from_numpy(np.concatenate(rows)).view(torch.bfloat16)


def _write_rows(file: BinaryIO, rows: list[tuple[int, np.ndarray]]) -> None:
    """Rows of one size at their numbers, on the disk when this returns."""
    for number, row in rows:
        file.seek(number * row.nbytes)
        file.write(np.ascontiguousarray(row).tobytes())
    file.flush()
    os.fsync(file.fileno())


class LogitStore(ViewStore):
    """A teacher's logits, [S, K] a sample; `about` has `num_sample` and `classes`."""

    noun, command = "logits", "distil"

    @property
    def row(self) -> tuple[int, ...]:
        return self.about["num_sample"], self.about["classes"]

    def read(self, keys: Sequence[Key]) -> Tensor:
        """float32 [B*S, K] of samples."""
        return super().read(keys).float()


class LatentStore(ViewStore):
    """A teacher's latents of counted tokens, [S, Nk, C] a sample; `about` has `num_sample`, `tokens` and
    `width`."""

    noun, command = "latents", "pretrain"

    @property
    def row(self) -> tuple[int, ...]:
        return self.about["num_sample"], self.about["tokens"], self.about["width"]


def shares(store: ViewStore, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[Key]]:
    """What is missing, in batches of videos; ranks take samples in turn."""
    own = store.missing()[rank::world_size]
    return [own[i : i + batch_size] for i in range(0, len(own), batch_size)]


def fill_store(
    store: ViewStore,
    compute: Callable[[list[Key]], Tensor],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[list], Any] = lambda parts: parts,
) -> None:
    """Store what is missing; ranks take samples in turn.

    Args:
        compute: (epoch, index) keys -> values [B*S, ...].
        batch_size: videos at once.
        progress: wraps the list of batches.
    """
    for keys in progress(shares(store, batch_size, rank, world_size)):
        store.write(keys, compute(keys))
