"""What may be opened, and how long a file system may take.

A pipe without a writer, a device and a dead mount hang the process that opens them. Only regular files are
opened (`check_regular`), and what the main process asks of a file system, it asks in a thread that it can
leave behind (`ask_files`). Whatever decodes belongs into a worker, see `vmae.data.guarded`.
"""

from __future__ import annotations

import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vmae.data.video_reader import DecodeError
from vmae.data.workers import hang_limit
from vmae.errors import InputError

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)
_POLL_S = 0.2
Item = TypeVar("Item")
Result = TypeVar("Result")


def cache_home() -> Path:
    """Folder of what can be made again: $XDG_CACHE_HOME/vmae, or ~/.cache/vmae."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vmae")


def special_kind(mode: int) -> str | None:
    """Name of a file's kind by its `st_mode`; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "no file")


def check_regular(path: str | Path, *, folder: bool = False) -> None:
    """See, without opening it, that a path leads to a regular file, or to a folder.

    Raises:
        DecodeError: it is not there, or is a pipe, a socket, a device, or the other of the two.
    """
    try:
        kind = special_kind(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise DecodeError(f"{path}: does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise DecodeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if kind == "a folder" and not folder:
        raise DecodeError(
            f"{path}: is a folder; for frames give a list file with a line `folder start total`"
        )
    if kind != ("a folder" if folder else None):
        raise DecodeError(
            f"{path}: is {kind or 'a file'}, not {'a folder of frames' if folder else 'a file'}"
        )


class Unanswered(InputError):
    """A file system did not answer in time.

    Attributes:
        item: number of what was asked about.
    """

    def __init__(self, item: int, limit_s: float) -> None:
        super().__init__(
            f"its file system does not answer within {limit_s:g} s (a dead mount, a pipe without a writer?)"
        )
        self.item = item


def ask_files(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    threads: int = 1,
    limit_s: float | None = None,
) -> list[Result]:
    """[function(item)] by some threads at once, which are left behind where a file system does not answer.

    For questions and small texts; what decodes goes to `vmae.data.guarded`.

    Args:
        limit_s: seconds for one item; None means `hang_limit()`.

    Raises:
        Unanswered: an item took longer.
    """
    limit_s = limit_s or hang_limit()
    results: list[Any] = [None] * len(items)
    numbers = iter(range(len(items)))  # drawn by all threads
    at: list[tuple[int, float] | None] = [None] * threads
    done: queue.SimpleQueue = queue.SimpleQueue()

    def work(thread: int) -> None:
        failure = None
        try:
            for number in numbers:
                at[thread] = (number, time.monotonic())
                results[number] = function(items[number])
        except BaseException as error:  # raised again by who asked
            failure = error
        at[thread] = None
        done.put(failure)

    for thread in range(threads):  # daemons: the process can end while one of them waits for ever
        threading.Thread(target=work, args=(thread,), name="ask-files", daemon=True).start()
    left = threads
    while left:
        try:
            failure = done.get(timeout=min(_POLL_S, limit_s / 4))
        except queue.Empty:
            late = [number for number, began in filter(None, at) if time.monotonic() - began > limit_s]
            if late:
                raise Unanswered(min(late), limit_s) from None
            continue
        if failure is not None:
            raise failure
        left -= 1
    return results


def path_kind(path: str | Path) -> str | None:
    """What lies there: "a file", "a folder", "a pipe", "a socket", "a device"; None for nothing.

    Raises:
        InputError: its file system does not answer.
    """

    def look(path: str | Path) -> str | None:
        try:
            return special_kind(os.stat(path).st_mode) or "a file"
        except (OSError, ValueError):
            return None

    try:
        return ask_files(look, [path])[0]
    except Unanswered as error:
        raise InputError(f"{str(path)!r}: {error}") from None
