"""Signals that ask a run to stop: it does so between two steps, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

# A scheduler's end, its warning (no such signal on Windows), Ctrl-C.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)


class StopSignals:
    """While open, SIGTERM, SIGUSR1 and Ctrl-C ask for a stop between two steps; a second Ctrl-C interrupts at
    once.

    One that comes while `waiting` for a batch does not wait for it (a store may be gone): `interrupt` ends
    that.

    A data worker that dies (of the same signal, most often) must not interrupt a step half done either: its
    error is raised only while `waiting` for a batch.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.waiting = False
        self.interrupt: Callable[[], None] = lambda: None
        self._before: dict[int, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._on_stop)
        return self

    def guard_workers(self) -> None:
        """Take over from the loader's own handler of workers' deaths; call it once the loader is there."""
        if not hasattr(signal, "SIGCHLD"):  # Windows: nothing signals a worker's death
            return
        raise_error = signal.getsignal(signal.SIGCHLD)
        if self._before and callable(raise_error):
            self._before.setdefault(signal.SIGCHLD, raise_error)
            signal.signal(signal.SIGCHLD, lambda *received: raise_error(*received) if self.waiting else None)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_stop(self, number: int, frame: object) -> None:
        if os.getpid() != self._owner:  # a forked data worker: the run's process decides
            return
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self.waiting:
            self.interrupt()
