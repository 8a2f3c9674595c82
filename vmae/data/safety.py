"""Opening files that may be anything: regular ones only, within a time limit, and not at the main process's peril.

A pipe without a writer, a device and a dead mount hang whoever opens them; a damaged file may crash its decoder. Workers
are replaced then (`vmae.data.workers`). What the main process wants of a video, it gets from such a worker too (`guarded`);
what it asks of a file system, it asks in a thread that it can leave behind (`ask_files`).
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vmae.data.video_reader import DecodeError
from vmae.data.workers import VideoTask, WorkerPool, hang_limit
from vmae.errors import InputError

_KINDS = (
    (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)  # fmt: skip
_POLL_S = 0.2
Item, Result = TypeVar("Item"), TypeVar("Result")


def special_kind(mode: int) -> str | None:
    """What a file is by its `st_mode`, in words; None for a regular one."""
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
        raise DecodeError(f"{path}: is a folder; for frames give a list file with a line `folder start total`")
    if kind != ("a folder" if folder else None):
        raise DecodeError(f"{path}: is {kind or 'a file'}, not {'a folder of frames' if folder else 'a file'}")


@contextlib.contextmanager
def memory_as_decode_error(path: str | Path) -> Iterator[None]:
    """Turn a lack of memory, numpy's or torch's, into a `DecodeError` that names the file."""
    try:
        yield
    except MemoryError:
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
    else:
        return
    raise DecodeError(f"{path}: cannot be decoded: it needs more memory than there is")


# --- For the main process ---


def _lost(path: str | Path, reason: str) -> DecodeError:
    error = DecodeError(f"{path}: {reason}")
    error.library = "worker"
    return error


class _Calls(VideoTask):
    """What runs in the worker: a function of one entry at a time; an `InputError` is handed over, not raised."""

    def __init__(self, function: Callable[[Any], Any], entries: Sequence[Any]) -> None:
        super().__init__()
        self.function, self.entries = function, entries

    def __getitem__(self, number: int) -> Any:
        entry = self.entries[number]
        path = getattr(entry, "path", entry)
        if number in self.blocked:
            return _lost(path, self.blocked[number])
        self.watch(number)
        try:
            with memory_as_decode_error(path):
                return self.function(entry)
        except InputError as error:
            return error


def guarded_each(
    function: Callable[[Item], Result], entries: Sequence[Item], *, hang_s: float | None = None
) -> Iterator[Result | DecodeError]:
    """`function(entry)` of each entry, in order, called in a worker process; a `DecodeError` is given, not raised.

    Args:
        function: of a module, or a partial of one; its results can be pickled (tensors go by shared memory).
        entries: `VideoEntry`s or paths.
        hang_s: seconds that each may take; None means `hang_limit()`.

    Raises:
        InputError: `function` did.
        RuntimeError: `function` raised something else.
    """
    calls = _Calls(function, entries)
    if multiprocessing.current_process().daemon:  # a worker already, which may have none of its own
        yield from map(_good_or_undecodable, map(calls.__getitem__, range(len(entries))))
    elif entries:
        pool = WorkerPool(calls, iter(range(len(entries))), count=1, prefetch=1, hang_s=hang_s or hang_limit())
        with contextlib.closing(pool):
            yield from map(_good_or_undecodable, pool)


def _good_or_undecodable(answer: Any) -> Any:
    if isinstance(answer, InputError) and not isinstance(answer, DecodeError):
        raise answer
    return answer


def guarded(function: Callable[[Item], Result], entry: Item, *, hang_s: float | None = None) -> Result:
    """`function(entry)`, called in a worker process; see `guarded_each`.

    Raises:
        DecodeError: it took longer than `hang_s`, or crashed.
        InputError: as `function` does.
    """
    (answer,) = guarded_each(function, [entry], hang_s=hang_s)
    if isinstance(answer, DecodeError):
        raise answer
    return answer


class _Streams(VideoTask):
    """What runs in the worker: (video, its part number `part`) is the next `chunk` tensors of a video, as one."""

    def __init__(self, read: Callable[[Any], Iterator[Tensor]], entries: Sequence[Any], chunk: int) -> None:
        super().__init__()
        self.read, self.entries, self.chunk = read, entries, chunk
        self._at, self._left = (-1, 0), iter(())

    def __getitem__(self, task: tuple[int, int]) -> tuple[int, Tensor | InputError | None]:
        video, part = task
        path = getattr(self.entries[video], "path", self.entries[video])
        if video in self.blocked:
            return video, _lost(path, self.blocked[video])
        self.watch(video)
        if self._at != task:  # another video, or a new worker in the middle of this one
            self._left = itertools.islice(self.read(self.entries[video]), part * self.chunk, None)
        self._at = (video, part + 1)
        try:
            with memory_as_decode_error(path):
                items = list(itertools.islice(self._left, self.chunk))
        except InputError as error:
            self._left = iter(())
            return video, error
        return video, torch.stack(items) if items else None


def guarded_streams(
    read: Callable[[Item], Iterator[Tensor]], entries: Sequence[Item], *, chunk: int, hang_s: float | None = None
) -> Iterator[Iterator[Tensor]]:
    """`read(entry)` of each entry, in order, run ahead in a worker process; each is to be read before the next one.

    Args:
        read: of a module, or a partial of one; gives tensors of one shape, of which `chunk` travel at once.
        hang_s: seconds that `chunk` of them may take; None means `hang_limit()`.

    Yields:
        Iterators that raise as `guarded` does.
    """
    done = -1  # the last video that was read

    def tasks() -> Iterator[tuple[int, int]]:
        for video in range(len(entries)):
            part = 0
            while done < video:
                yield video, part
                part += 1

    def items_of(video: int) -> Iterator[Tensor]:
        nonlocal done
        try:
            for number, answer in pool:
                if number < video:  # asked for before its end was known
                    continue
                if isinstance(answer, InputError):
                    raise answer
                if answer is None:
                    return
                yield from answer
        finally:
            done = video

    if not entries:
        return
    pool = WorkerPool(_Streams(read, entries, chunk), tasks(), count=1, prefetch=2, hang_s=hang_s or hang_limit())
    with contextlib.closing(pool):
        yield from map(items_of, range(len(entries)))


class Unanswered(InputError):
    """A file system did not answer in time.

    Attributes:
        item: number of what was asked about.
    """

    def __init__(self, item: int, limit_s: float) -> None:
        super().__init__(f"its file system does not answer within {limit_s:g} s (a dead mount, a pipe without a writer?)")
        self.item = item


def ask_files(
    function: Callable[[Item], Result], items: Sequence[Item], *, threads: int = 1, limit_s: float | None = None
) -> list[Result]:
    """[function(item)] by some threads at once, which are left behind where a file system does not answer.

    For questions and small texts; what decodes goes to `guarded`.

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
