"""A folder that several parts of a job fill: each writes files of its own, and one command joins them.

    OUT/                    the joined result; of a job that is one part, its records too
    OUT/parts/2-of-7/       of part 2/7: its lock, what its numbers depend on, its records

No part waits for another one, or writes what another one writes; a part that was stopped goes on from its
records. Joining moves all records to OUT, removes OUT/parts, and then does what the end of a job of one part
does, so that the result is the same. It may be stopped anywhere, and done again.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vmae.data.parts import Part
from vmae.data.ranks import Ranks
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.folder_lock import refuse_if_locked
from vmae.files.json_files import read_json, read_json_lines
from vmae.files.settled import check_same, differences, settle

PARTS = "parts"
Record = dict[str, Any]


@dataclass(frozen=True)
class PartFolder:
    """Where a part of a job writes.

    Attributes:
        folder: of the joined result.
        part: this one.
        what: the job, for messages, such as "a test".
        other: what a folder of other settings holds, such as "another test".
        settings: name of the file that says what the numbers depend on.
        together: neighbouring items that one part has, see `Part.share`.
    """

    folder: Path
    part: Part
    what: str
    other: str
    settings: str
    together: int = 1

    @property
    def own(self) -> Path:
        """The folder that no other part writes to."""
        return self.folder if self.part.whole else self._of(self.part)

    def _of(self, part: Part) -> Path:
        return self.folder / PARTS / f"{part.number}-of-{part.count}"

    def found(self) -> list[Part]:
        """Parts that were started, in order.

        Raises:
            InputError: they are of different numbers of parts.
        """
        names = [path.name for path in self.folder.glob(f"{PARTS}/*")]
        matches = [re.fullmatch(r"([1-9]\d*)-of-([1-9]\d*)", name) for name in names]
        parts = sorted(
            (Part(int(match[1]), int(match[2])) for match in matches if match),
            key=lambda part: (part.count, part.number),
        )
        if len({part.count for part in parts}) > 1:
            counts = _listed(sorted({part.count for part in parts}))
            raise InputError(
                f"{self.folder / PARTS} holds parts of different numbers of parts ({counts}); remove those "
                "that are not to be joined"
            )
        return parts

    def folders(self) -> list[Path]:
        """Folders of the parts that were started, in order."""
        return [self._of(part) for part in self.found()]

    @contextlib.contextmanager
    def hold(self, ranks: Ranks, *, merge: bool = False) -> Iterator[None]:
        """Be the only ones who do this part; others may do other parts. A SIGTERM ends the block as an error
        does, so that the lock is removed and the part can go on anywhere.

        Args:
            merge: join the parts that are there.

        Raises:
            InputError: the same part is at work, or the whole job, or a merge; the folder has parts of
                another number.
        """
        if not merge:
            ranks.on_main(self._check_count)
        what = self.what
        if not self.part.whole:
            ranks.on_main(lambda: (refuse_if_locked(self.folder), None)[1])
            what = f"part {self.part} of {self.what}"
        with _ends_by_sigterm():
            with ranks.hold(self.own, what):
                yield
            # A rank that ends with 1 makes torchrun stop the others: the lock must be gone before.
            ranks.barrier()

    def _check_count(self) -> None:
        found = self.found()
        if found and found[0].count != self.part.count:
            other = found[0].count
            raise InputError(
                f"{self.folder / PARTS} holds parts of {other} ({_listed(map(str, found))}), and this is "
                f"{self.part}: go on with --part i/{other}, join them with --merge, or choose another "
                "--output"
            )

    def is_of(self, decides: dict[str, Any]) -> bool:
        """Whether what the folder holds, if anything, is of this result; see `settle`."""
        path = self.folder / self.settings
        return not path.exists() or not differences(read_json(path, "settings file"), decides)

    def settle(self, decides: dict[str, Any], of_parts: dict[str, Any] | None = None, **noted: Any) -> None:
        """Make the folder that of this result, or check that it is; see `vmae.files.settled`.

        Args:
            of_parts: what has to be the same for parts that are joined, beside `decides`.

        Raises:
            InputError: the folder, or another part in it, is of another result; names what differs.
        """
        whole = {**decides, **(of_parts or {})}
        for folder in self.folders():
            remedy = f"choose another --output, or remove {folder}"
            files = sorted(folder.glob("*.json"))  # before: a part that begins writes its settings first
            if (folder / self.settings).exists():
                before = read_json(folder / self.settings, "settings file")
                check_same(before, whole, f"{folder} holds {self.other}", remedy)
            elif files:
                raise InputError(f"{folder} holds a part of something else ({files[0].name}); {remedy}")
        settle(self.folder / self.settings, decides, self.other, **noted)
        if not self.part.whole:
            settle(self.own / self.settings, whole, self.other, **noted)

    def share(self, items: int) -> list[int]:
        """Numbers of this part's items."""
        return list(self.part.share(items, self.together))

    def check_complete(self, items: int, done: Collection[int], unit: str) -> None:
        """Raises InputError where items are missing: how many, and which parts are to be run again.

        Args:
            items: of the whole job.
            done: numbers of those that are there.
            unit: what an item is, such as "videos".
        """
        missing = [number for number in range(items) if number not in done]
        if not missing:
            return
        found = self.found()
        if not found:
            raise InputError(
                f"{self.folder} has no parts to join: {len(missing)} of {items} {unit} are missing; run the "
                "parts first (--part i/n)"
            )
        count = found[0].count
        missing_of = Counter(Part.having(number, count, self.together) for number in missing)
        lines = []
        for part, lacking in sorted(missing_of.items(), key=lambda pair: pair[0].number):
            state = "not started" if part not in found else "stopped"
            if part in found and _locked(self._of(part)):
                state = "at work"
            lines.append(f"{part} ({lacking} {unit}, {state})")
        raise InputError(
            f"{len(missing)} of {items} {unit} are missing in {self.folder}: parts {_listed(lines)}; run "
            "them to their end, then --merge again"
        )

    def remove_parts(self) -> None:
        """Remove what was joined, and nothing else."""
        for folder in self.folders():
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.folder / PARTS).rmdir()


def _locked(folder: Path) -> bool:
    try:
        refuse_if_locked(folder)
    except InputError:
        return True
    return False


def _listed(names: Iterable[object], shown: int = 8) -> str:
    texts = [str(name) for name in names]
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more


@contextlib.contextmanager
def _ends_by_sigterm() -> Iterator[None]:
    """SIGTERM, which schedulers send before SIGKILL, ends the block by SystemExit (143, as a shell says)."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- Records ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Records:
    """A line of JSON for each item that is done, written at once, so that a stopped part loses nothing.

    `FOLDER/NAME.jsonl` has those of earlier starts, and each rank adds to `FOLDER/NAME-RANK.part.jsonl`.

    Attributes:
        place: the part's folder.
        name: of the file that holds all records.
        key: name of the item's number in a record.
        ranks: name of a rank's file, with {} for its number.
        header: first line of the file, for readers of that file alone; None: none.
    """

    place: PartFolder
    name: str
    key: str
    ranks: str
    header: Record | None = None

    def read(self) -> list[Record]:
        """Records of this part and of the whole job, of all starts, by their item's number."""
        return self._read(*dict.fromkeys([self.place.folder, self.place.own]))

    def _read(self, *folders: Path) -> list[Record]:
        found = {
            record[self.key]: record
            for folder in folders
            for path in (folder / self.name, *sorted(folder.glob(self.ranks.format("*"))))
            for record in read_json_lines(path, **{self.key: int}).records
        }
        return [found[number] for number in sorted(found)]

    def collect(self) -> list[Record]:
        """Records of this part, or of the whole job; files of ranks become one."""
        found = self._read(self.place.own)
        self._write(found, self.place.own, [self.place.own])
        return found

    def clear(self) -> None:
        """Remove all records of the whole job, and what they depend on."""
        for path in (self.place.folder / self.name, *self.place.folder.glob(self.ranks.format("*"))):
            path.unlink(missing_ok=True)
        (self.place.folder / self.place.settings).unlink(missing_ok=True)

    def join(self, items: int, unit: str) -> list[Record]:
        """All records, of which those of the parts are moved to the folder of the whole job.

        Args:
            items, unit: see `PartFolder.check_complete`.

        Raises:
            InputError: items are missing.
        """
        folders = [self.place.folder, *self.place.folders()]
        found = self._read(*folders)
        self.place.check_complete(items, {record[self.key] for record in found}, unit)
        self._write(found, self.place.folder, folders)
        self.place.remove_parts()
        return found

    def _write(self, found: list[Record], target: Path, folders: list[Path]) -> None:
        """Write the records of these folders as one file, where they are in several."""
        pieces = [path for folder in folders for path in sorted(folder.glob(self.ranks.format("*")))]
        if pieces or len(folders) > 1:
            lines = ([] if self.header is None else [self.header]) + found

            def write(file: IO) -> None:
                file.writelines(json.dumps(record) + "\n" for record in lines)

            write_atomically(target / self.name, write, binary=False)
            for path in pieces:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def writer(self, rank: int) -> Iterator[Callable[[Record], None]]:
        """A function that writes a record of this part at once.

        Raises:
            InputError: the file can't be written.
        """
        path = self.place.own / self.ranks.format(rank)
        try:
            file = open(path, "w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write to {path.parent}: {error.strerror}") from error

        def write(record: Record) -> None:
            try:
                file.write(json.dumps(record) + "\n")
                file.flush()
            except OSError as error:
                raise InputError(f"cannot write to {path.parent}: {error.strerror}") from error

        try:
            yield write
        finally:
            with contextlib.suppress(OSError):  # all that was written is on its way already
                file.close()
