"""Time that a process waits for something else than the video it is at: an object store.

A supervisor of workers is told, so that it neither takes such a wait for a video that hangs, nor replaces a
worker for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

Told = Callable[[bool, float], None]
_told: Told = lambda begins, seconds: None  # noqa: E731


def tell_waits(told: Told) -> None:
    """Call `told(True, 0)` when a wait begins, and `told(False, seconds)` when it ends, from now on."""
    global _told
    _told = told


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """What is in it waits; for the thread that makes samples, and not within another."""
    _told(True, 0.0)
    began = time.monotonic()
    try:
        yield
    finally:
        _told(False, time.monotonic() - began)
