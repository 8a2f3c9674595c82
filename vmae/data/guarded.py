"""Videos for the main process, opened and decoded by a worker: one that hangs or crashes ends with a line,
not with the run.

Legend: an entry is a `VideoEntry` or a path.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vmae.data.decode import BACKENDS
from vmae.data.video_reader import DecodeError, memory_as_decode_error
from vmae.data.workers import VideoTask, WorkerPool, hang_limit
from vmae.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def _open_pool(maker: VideoTask, tasks: Iterator[Any], prefetch: int, hang_s: float | None) -> WorkerPool:
    for backend in BACKENDS.values():  # imports it here once, not in every worker: longer than a clip takes
        backend.missing()
    return WorkerPool(
        maker, tasks, count=1, prefetch=prefetch, hang_s=hang_limit() if hang_s is None else hang_s
    )


def is_worker() -> bool:
    """Whether this process is a worker already, which may have none of its own."""
    return multiprocessing.current_process().daemon


def _lost(path: str | Path, reason: str) -> DecodeError:
    error = DecodeError(f"{path}: {reason}")
    error.library = "worker"
    return error


class _Calls(VideoTask):
    """What runs in the worker: a function of one entry at a time; an `InputError` is handed over, not
    raised."""

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
    """`function(entry)` of each entry, in order, called in a worker process; a `DecodeError` is given, not
    raised.

    Args:
        function: a module's function, or a partial of one; its results can be pickled (tensors go by shared
            memory).
        entries: `VideoEntry`s or paths.
        hang_s: seconds that each may take; None means `hang_limit()`.

    Raises:
        InputError: `function` did.
        RuntimeError: `function` raised something else.
    """
    calls = _Calls(function, entries)
    if is_worker():
        yield from map(_good_or_undecodable, map(calls.__getitem__, range(len(entries))))
    elif entries:
        with contextlib.closing(_open_pool(calls, iter(range(len(entries))), 1, hang_s)) as pool:
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
    """What runs in the worker: (video, its part number `part`) is the next `chunk` items of a video, their
    tensors as one."""

    def __init__(self, read: Callable[[Any], Iterator[Any]], entries: Sequence[Any], chunk: int) -> None:
        super().__init__()
        self.read, self.entries, self.chunk = read, entries, chunk
        self._at = (-1, 0)
        self._left: Iterator[Any] = iter(())

    def __getitem__(self, task: tuple[int, int]) -> tuple[int, list[Any] | InputError]:
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
        notes = [item for item in items if not isinstance(item, Tensor)]
        tensors = items[len(notes) :]
        return video, notes + ([torch.stack(tensors)] if tensors else [])


def guarded_streams(
    read: Callable[[Item], Iterator[Any]],
    entries: Sequence[Item],
    *,
    chunk: int,
    hang_s: float | None = None,
) -> Iterator[Iterator[Any]]:
    """`read(entry)` of each entry, in order, run ahead in a worker process; each is to be read before the
    next one.

    Args:
        read: a module's function, or a partial of one; gives tensors of one shape, of which `chunk` travel at
            once; before them it may give notes of other types, such as the frame rate.
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

    def items_of(video: int) -> Iterator[Any]:
        nonlocal done
        try:
            for number, answer in pool:
                if number < video:  # asked for before its end was known
                    continue
                if isinstance(answer, InputError):
                    raise answer
                if not answer:
                    return
                for part in answer:
                    yield from part if isinstance(part, Tensor) else (part,)
        finally:
            done = video

    if not entries:
        return
    if is_worker():
        yield from map(read, entries)
        return
    with contextlib.closing(_open_pool(_Streams(read, entries, chunk), tasks(), 2, hang_s)) as pool:
        yield from map(items_of, range(len(entries)))
