"""Progress of a benchmark: shown at least every 30 seconds, however long one of its steps takes.

    with telling():                      # in `main`; `command.exit_code` does it
        for turn in range(turns):
            at(f"round {turn + 1} of {turns}")
            ...

On a terminal each place is shown as it comes, on one line. Elsewhere (a log, a pipe) a thread prints the
place after 25 seconds of silence: half a dozen system calls a minute, which no timing here can see.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

EVERY_S = 25.0
_CLEAR = "\x1b[K"


class _State:
    where, began, said, running = "starting", 0.0, 0.0, False


def at(where: str) -> None:
    """The benchmark does this now."""
    _State.where = where
    if _State.running and sys.stderr.isatty():
        # What is printed next overwrites the line.
        print(f"\r  {where}{_CLEAR}\r", end="", file=sys.stderr, flush=True)


def said() -> None:
    """Something else was printed just now."""
    _State.said = time.monotonic()


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Show the progress while this lasts; inside another `telling`, nothing more."""
    if _State.running:
        yield
        return
    _State.where, _State.running, _State.began = "starting", True, time.monotonic()
    said()
    over = threading.Event()
    thread = threading.Thread(target=_tell, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _State.running = False
        if sys.stderr.isatty():
            print(_CLEAR, end="", file=sys.stderr, flush=True)


def _tell(over: threading.Event) -> None:
    while not over.wait(max(_State.said + EVERY_S - time.monotonic(), 0.01)):
        now = time.monotonic()
        if now >= _State.said + EVERY_S:
            _State.said = now
            if not sys.stderr.isatty():
                print(f"  {(now - _State.began) / 60:.1f} min: {_State.where}", file=sys.stderr, flush=True)
