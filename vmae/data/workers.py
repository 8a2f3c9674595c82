"""Processes that make batches, in order; one that hangs or crashes is replaced, not waited for.

Why not torch's `DataLoader`: a worker of it that hangs stops the run, one that a decoder crashes raises an
error at any moment in the main process, and neither can be replaced. Here each worker has a pipe of its own
and writes down which video it is at, so the main process knows the cause: that video is blocked (another one
replaces it) and the tasks that the worker had left are done again by a new one. A worker that is killed from
outside, most often because memory runs out, counts against its video only when the same video does it twice.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing.connection
import multiprocessing.sharedctypes
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.multiprocessing

from vmae.data.waiting import tell_waits
from vmae.errors import InputError

_log = logging.getLogger(__name__)
HANG_S = 120.0  # that one video may take, where nothing else is said

CRASHES = {
    -getattr(signal, name)
    for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGKILL")
    if hasattr(signal, name)  # Windows has not all of them
}
# Restarts of workers for which no video is to blame, in a row without a batch; one each where they are more.
MAX_IDLE_RESTARTS = 5
_POLL_S, _GRACE_S = 1.0, 5.0
_NOTE_S = 30.0  # waits for a store that are said
# Forked also where Python's default is another (3.14): workers share the list's memory, and start in
# milliseconds.
_START_METHOD = "fork" if sys.platform.startswith("linux") else None


def hang_limit(default: float = HANG_S) -> float:
    """Seconds that one video may take: the environment's VMAE_HANG_S, else `default`.

    Raises:
        InputError: VMAE_HANG_S is no number above 0.
    """
    text = os.environ.get("VMAE_HANG_S")
    try:
        seconds = default if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"VMAE_HANG_S must be seconds above 0, not {text!r}")
    return seconds


class Maker(Protocol):
    """What runs in the workers."""

    def __getitem__(self, task: Any) -> Any:
        """The result of a task."""

    def set_watch(self, watch: Callable[[int], None]) -> None:
        """Call `watch(video number)` before each video from now on."""

    def block(self, video: int, reason: str) -> None:
        """Treat a video as undecodable from now on."""

    # ahead(task), where a maker has it: called as soon as a worker knows of a task, between two videos of an
    # earlier one; starts what needs no work of this thread.


class VideoTask(ABC):
    """A `Maker` that does something to one video at a time; a subclass says what in `__getitem__`, and calls
    `watch` before it opens one.

    Attributes:
        blocked: number of a video -> why it is not to be opened any more.
        watch: told the number of the video that comes next.
    """

    def __init__(self) -> None:
        self.blocked: dict[int, str] = {}
        self.watch: Callable[[int], None] = lambda video: None

    @abstractmethod
    def __getitem__(self, task: Any) -> Any: ...

    def set_watch(self, watch: Callable[[int], None]) -> None:
        self.watch = watch

    def block(self, video: int, reason: str) -> None:
        self.blocked[video] = reason


def _folder_for_sockets() -> str:
    """The folder for temporary files, or one with a shorter name: a socket's address has 107 bytes at most
    (unix(7))."""
    usual, inside = tempfile.gettempdir(), len("/pymp-12345678/listener-12345678")
    candidates = [usual, "/tmp", "/var/tmp", "/dev/shm"]
    fitting = (
        path
        for path in candidates
        if len(os.fsencode(path)) + inside <= 107 and os.access(path, os.W_OK | os.X_OK)
    )
    return next(fitting, usual)


class _Worker:
    """A process, its pipe, the tasks it owes, and the video it is at."""

    def __init__(self, context, maker: Maker) -> None:
        self.tasks: deque[tuple[int, Any]] = deque()
        # (when its video began, when that was found too long)
        self.suspected: tuple[float, float] | None = None
        # Its video (-1: none, or it waits for a store) and since when; seconds of waits for stores so far,
        # and since when it waits (0: it does not).
        self.slot = multiprocessing.sharedctypes.RawArray("d", [-1.0, 0.0, 0.0, 0.0])
        self.pipe, theirs = context.Pipe()
        # A worker that is killed cannot remove the folder of the socket by which its tensors are handed over.
        folder = tempfile.mkdtemp(prefix="pymp-", dir=_folder_for_sockets())
        self._clear = multiprocessing.util.Finalize(self, shutil.rmtree, (folder, True), exitpriority=-1)
        self.process = context.Process(
            target=_work, args=(maker, theirs, self.slot, os.getpid(), folder), daemon=True
        )
        self.process.start()
        theirs.close()

    def give(self, number: int, task: Any) -> None:
        self.tasks.append((number, task))
        self.tell("make", number, task)

    def tell(self, *message: Any) -> None:
        try:
            self.pipe.send(message)
        except OSError:  # it has died; `_wait` finds out
            pass

    @property
    def video(self) -> int:
        return int(self.slot[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self._clear()


def _end_with(parent: int, folder: str) -> None:
    """End this process soon after its parent, also while a file hangs it. (Its pipe alone would not tell:
    workers that were forked later hold the other end too.)"""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    shutil.rmtree(folder, True)
    os.kill(os.getpid(), signal.SIGKILL)


class _Inbox:
    """What a worker has been told and not done yet."""

    def __init__(self, maker: Maker, pipe) -> None:
        self.tasks: deque[tuple[int, Any]] = deque()
        self._maker, self._pipe = maker, pipe
        self._ahead: Callable[[Any], None] | None = getattr(maker, "ahead", None)

    def next(self) -> tuple[int, Any]:
        """The next task; raises EOFError where none will come."""
        while not self.tasks or self._pipe.poll():
            self._receive()
        return self.tasks.popleft()

    def look(self) -> None:
        """Take in what has come meanwhile, where the maker wants to know of it."""
        with contextlib.suppress(EOFError):
            while self._ahead is not None and self._pipe.poll():
                self._receive()

    def _receive(self) -> None:
        kind, *content = self._pipe.recv()
        if kind == "block":
            self._maker.block(*content)
            return
        number, task = content
        self.tasks.append((number, task))
        if self._ahead is not None:
            with contextlib.suppress(Exception):  # it comes again when the task is done
                self._ahead(task)


def _work(maker: Maker, pipe, slot, parent: int, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the workers share the cores; more threads in each only get in each other's way
    threading.Thread(target=_end_with, args=(parent, folder), daemon=True).start()
    process = multiprocessing.current_process()
    process._config["tempdir"] = folder  # type: ignore[attr-defined]  # private: where get_temp_dir() looks

    inbox = _Inbox(maker, pipe)

    def watch(video: int) -> None:
        inbox.look()
        slot[1] = time.monotonic()
        slot[0] = video

    at: list[float] = []  # the video and its begin while a store is waited for

    def waits(begins: bool, seconds: float) -> None:
        if begins:
            at[:] = slot[:2]
            slot[0], slot[3] = -1, time.monotonic()
        else:
            slot[2], slot[3] = slot[2] + seconds, 0
            slot[1] = at[1] + seconds
            slot[0] = at[0]

    maker.set_watch(watch)
    tell_waits(waits)
    while True:
        try:
            number, task = inbox.next()
        except EOFError:
            return
        try:
            answer = (number, True, maker[task])
        except InputError as error:
            answer = (number, False, error)
        except Exception:
            answer = (number, False, traceback.format_exc())
        watch(-1)
        try:
            pipe.send(answer)
        except ConnectionError:  # nobody reads any more
            return
        except Exception:  # it cannot be pickled, or handed over
            pipe.send((number, False, traceback.format_exc()))


class WorkerPool:
    """Iterator over the results of `tasks`, in order, made ahead by `count` processes.

    Args:
        maker: copied into each process.
        tasks: arguments of `maker[task]`; drawn as workers become free.
        count: processes.
        prefetch: results for each that may be under way or made before they are taken; what is made while one
            video takes long is bounded by it, and so are shared memory and open files.
        hang_s: seconds that one video may take.

    Attributes:
        lost: (video number, reason) of each video that hung or crashed a worker; its reader empties it.

    Raises:
        InputError: on iteration: `maker` did, or workers keep dying.
        RuntimeError: `maker` raised something else, or a worker was stopped by somebody else.
    """

    def __init__(
        self, maker: Maker, tasks: Iterator[Any], *, count: int, prefetch: int, hang_s: float
    ) -> None:
        self.lost: list[tuple[int, str]] = []
        self._maker = maker
        self._tasks: Iterator[tuple[int, Any]] = enumerate(tasks)
        self._prefetch, self._hang_s = prefetch, hang_s
        self._context = torch.multiprocessing.get_context(_START_METHOD)
        self._given = 0  # tasks so far
        self._ready: dict[int, Any] = {}
        # Video -> the task at which it was there when its worker was killed.
        self._killed: dict[int, int] = {}
        self._next = self._idle_restarts = 0
        self._waited_s = 0.0  # of workers that were replaced
        self._noted = False
        self._interrupted = False
        self._workers = [_Worker(self._context, maker) for _ in range(count)]
        for _ in range(prefetch * count):
            self._feed()

    def _feed(self) -> None:
        """Give a task to the worker that has the fewest, unless as many as allowed are ahead."""
        if self._given - self._next >= self._prefetch * len(self._workers):
            return
        for number, task in self._tasks:
            self._given = number + 1
            min(self._workers, key=lambda worker: len(worker.tasks)).give(number, task)
            return

    def __iter__(self) -> WorkerPool:
        return self

    def __next__(self) -> Any:
        while self._next not in self._ready:
            if self._interrupted:
                raise StopIteration
            if not any(worker.tasks for worker in self._workers):
                self.close()
                raise StopIteration
            self._wait()
        good, result = self._ready.pop(self._next)
        self._next += 1
        self._feed()
        self._idle_restarts = 0
        if not good:
            self.close()
            if isinstance(result, InputError):
                raise result
            raise RuntimeError(f"a data worker failed:\n{result}")
        return result

    def _wait(self) -> None:
        """Take what has arrived, within a second, and replace who hangs or has died."""
        owing: dict[object, _Worker] = {worker.pipe: worker for worker in self._workers if worker.tasks}
        pipes = [worker.pipe for worker in owing.values()]
        for pipe in multiprocessing.connection.wait(pipes, min(_POLL_S, self._hang_s / 4)):
            worker = owing[pipe]
            try:
                number, good, result = worker.pipe.recv()
            except (EOFError, OSError):  # also when it dies while its tensors are handed over
                self._replace(worker, None)
                continue
            worker.tasks.popleft()
            self._ready[number] = (good, result)
            if self._killed:  # done this time
                self._killed = {video: task for video, task in self._killed.items() if task != number}
        now = time.monotonic()
        self._note_waits(now)
        for worker in list(self._workers):
            if not worker.process.is_alive() and not worker.pipe.poll():
                self._replace(worker, None)
            elif worker.tasks and self._hangs(worker, now):
                self._replace(
                    worker, f"took more than {self._hang_s:g} s (VMAE_HANG_S); its worker was stopped"
                )

    def _note_waits(self, now: float) -> None:
        """Say once that a store does not answer, while it does not."""
        longest = max((now - worker.slot[3] for worker in self._workers if worker.slot[3]), default=0.0)
        if longest > _NOTE_S and not self._noted:
            _log.warning(
                f"note: data workers have waited for an object store for {longest:.0f} s; they go on when it "
                "answers"
            )
        self._noted = longest > _NOTE_S

    def _hangs(self, worker: _Worker, now: float) -> bool:
        """Whether its video takes too long, also a moment after that was first seen (all may have been
        suspended)."""
        video, began = worker.slot[:2]
        if video < 0 or now - began < self._hang_s:
            worker.suspected = None
            return False
        if worker.suspected is None or worker.suspected[0] != began:
            worker.suspected = (began, now)
        return now - worker.suspected[1] >= min(_GRACE_S, self._hang_s / 2)

    def _replace(self, worker: _Worker, reason: str | None) -> None:
        """Put a new worker in the place of one that died, or that is stopped for `reason`."""
        video = worker.video
        if reason is None:
            reason = self._cause_of_death(worker)
        worker.kill()
        self._waited_s += worker.slot[2]
        if reason is not None and video >= 0:
            self.lost.append((video, reason))
            self._maker.block(video, reason)
            for other in self._workers:
                other.tell("block", video, reason)
        else:
            self._idle_restarts += 1
            if self._idle_restarts > max(MAX_IDLE_RESTARTS, len(self._workers)):
                self.close()
                raise InputError(
                    "data workers keep dying, most likely because memory runs out; try fewer, or a smaller "
                    "batch"
                )
        fresh = _Worker(self._context, self._maker)
        self._workers[self._workers.index(worker)] = fresh
        for number, task in worker.tasks:
            fresh.give(number, task)

    def _cause_of_death(self, worker: _Worker) -> str | None:
        """What its video is to blame for; None where it is not, or not yet."""
        worker.process.join(1)
        code, video = worker.process.exitcode, worker.video
        if code not in CRASHES:
            self.close()
            raise RuntimeError(f"a data worker was stopped (exit code {code})")
        if code != -signal.SIGKILL:
            return f"crashed its worker ({signal.Signals(-code).name})"
        # Out of memory, most likely, and once that may be any video's fault. A video that does it again,
        # before it was decoded, would do it for ever.
        if video in self._killed:
            return "its worker was killed twice at this video (SIGKILL; out of memory?)"
        if video >= 0 and worker.tasks:
            self._killed[video] = worker.tasks[0][0]
        return None

    @property
    def waited_s(self) -> float:
        """Seconds that the workers have waited for object stores so far, together."""
        return self._waited_s + sum(worker.slot[2] for worker in self._workers)

    def interrupt(self) -> None:
        """End iteration within a second, also where another thread waits in `next`; the processes stay until
        `close`."""
        self._interrupted = True

    def close(self) -> None:
        """End the processes; iteration is over."""
        for worker in self._workers:
            worker.kill()
        self._waited_s = self.waited_s
        self._workers, self._tasks = [], iter(())

    def __del__(self) -> None:
        self.close()
