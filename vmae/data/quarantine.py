"""Videos that could not be decoded: counted, written down, and too many of them stop the run."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vmae.errors import InputError
from vmae.files.json_files import read_json_lines

QUARANTINE_NAME = "quarantine.jsonl"
JUDGED_FROM, DEVIATIONS = (
    200,
    3.0,
)  # reads, before which a share says little; and by how much it is to be above the limit


class Failure(NamedTuple):
    """A video that could not be decoded, and that another one stands in for.

    Attributes:
        path: name of the file or folder.
        error: the library's reason.
        library: the backend that failed, or "worker" for a process that hung or crashed on it; None where
            none was asked.
    """

    path: str
    error: str
    library: str | None = None


def list_failures(failures: Sequence[tuple], shown: int = 3) -> str:
    """The first failures in one line."""
    # A decoder's message starts with the file; any other needs it in front.
    texts = [error if error.startswith(path) else f"{path}: {error}" for path, error, *_ in failures[:shown]]
    return "; ".join(texts)


class Quarantine:
    """What failed so far in a run, on one rank and in one start (files may have been mended between two
    starts).

    Too much is more than `max_share` of the list's videos, where one bad video is never too much unless
    `max_share` is 0. A long list is judged before it was read to its end: from 200 reads on, when so many of
    its videos were found bad that the share of all of them is above `max_share` by three standard deviations.

    Args:
        path: file that gets one JSON line (path, error, library) for each bad video, once; None writes
            nothing. What it holds already, from before a run was resumed, stays and is not written again.
        max_share: share of the list's videos that may be bad.
        videos: number of different videos of the list; None judges reads alone.

    Attributes:
        reads, failures: videos tried, and how many of these tries failed.
        bad: the failure of each bad video, by its path.

    Raises:
        InputError: a share outside 0 to 1.
    """

    def __init__(
        self, path: str | Path | None = None, max_share: float = 0.05, videos: int | None = None
    ) -> None:
        if not 0 <= max_share <= 1:
            raise InputError(f"the share of bad videos must be between 0 and 1, not {max_share}")
        self.path, self.max_share, self.videos = None if path is None else Path(path), max_share, videos
        self.reads = self.failures = 0
        self.bad: dict[str, Failure] = {}
        self._makes_folder = self.path is not None and not self.path.parent.is_dir()
        self._written = self._read_paths()

    def _read_paths(self) -> set[str]:
        if self.path is None:
            return set()
        found = read_json_lines(self.path, path=str)
        note = found.note(self.path)
        if note is not None:
            warnings.warn(note.removeprefix("note: "), stacklevel=3)
        return {record["path"] for record in found.records}

    def add(self, read: int, failed: Sequence[Failure]) -> None:
        """Count `read` good videos and those that `failed`, and write the new ones down.

        Raises:
            InputError: too many failed (with a summary), or the file cannot be written.
        """
        self.reads += read + len(failed)
        self.failures += len(failed)
        for failure in failed:
            self.bad.setdefault(failure.path, failure)
        self._write([failure for failure in dict.fromkeys(failed) if failure.path not in self._written])
        if failed and self._too_many():
            allowed = f"{self.max_share:.1%}"
            if self.allowed is not None:
                allowed = f"{self.allowed} of {self.videos}"
            raise InputError(
                f"{self.summary()}. No more than {allowed} videos may be bad (--max-bad-share "
                f"{self.max_share:g}); `python -m vmae check-data LIST` tells what is wrong with them and "
                "writes a list without them"
            )

    @property
    def allowed(self) -> int | None:
        """Bad videos that do not stop the run; None where the length of the list is not known."""
        if self.videos is None:
            return None
        return max(math.floor(self.max_share * self.videos + 1e-9), 1 if self.max_share else 0)

    def _too_many(self) -> bool:
        if self.allowed is not None and len(self.bad) > self.allowed:
            return True
        # A video counts once, however often it is read, so `reads` are at least the different videos that
        # were tried.
        expected = self.max_share * self.reads
        return self.reads >= JUDGED_FROM and len(self.bad) > expected + DEVIATIONS * math.sqrt(expected)

    def _write(self, failures: list[Failure]) -> None:
        if self.path is None or not failures:
            return
        lines = []
        for failure in failures:
            if failure.path not in self._written:
                self._written.add(failure.path)
                lines.append(json.dumps(failure._asdict(), ensure_ascii=False) + "\n")
        try:
            if self._makes_folder:  # once: a folder that is removed during a run stays away, and the run ends
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._makes_folder = False
            with open(self.path, "a+b") as file:
                file.seek(max(file.tell() - 1, 0))
                cut = file.read() not in (b"", b"\n")  # by a kill
                file.write(
                    ("\n" * cut + "".join(lines)).encode(errors="backslashreplace")
                )  # of names that are no UTF-8
        except OSError as error:
            raise InputError(
                f"cannot write the list of bad videos {str(self.path)!r}: {error.strerror}"
            ) from None

    def summary(self) -> str:
        """What failed, in a line: how many, with which libraries, the first three, and where the rest is."""
        if not self.failures:
            return f"all {self.reads} videos read could be decoded"
        libraries = Counter(failure.library or "no library" for failure in self.bad.values())
        kinds = ", ".join(f"{count} with {name}" for name, count in libraries.most_common())
        where = f"; all of them in {self.path}" if self.path is not None else ""
        return (
            f"{self.failures} of {self.reads} reads failed ({self.failures / self.reads:.1%}), of "
            f"{len(self.bad)} videos "
            f"({kinds}); the first: {list_failures(list(self.bad.values()))}{where}"
        )
