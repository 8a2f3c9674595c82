"""Commands with a time limit: shown while they run, kept in a log, ended with all their processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT
from harness.progress import said

GRACE_S = 5.0  # from the request to end to the end


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended: "ran", "failed" or "cut off" (at its limit); `code` is None where it was ended."""

    status: str
    reason: str
    seconds: float
    code: int | None


def run_command(
    command: Sequence[str], log: Path, limit_s: float | None, environment: Mapping[str, str] | None = None
) -> Outcome:
    """Run a command in the tree's folder; what it prints goes to the terminal and into `log`.

    Args:
        environment: variables beside those of this process.
    """
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as output, _started(command, environment) as process:
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            end(process)

        timer = threading.Timer(limit_s, expire) if limit_s else None
        if timer:
            timer.start()
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                said()
                output.write(line)
                output.flush()
            code = process.wait()
        finally:
            if timer:
                timer.cancel()
    seconds = time.monotonic() - start
    if expired.is_set() and code != 0:
        return Outcome(status="cut off", reason=f"over {limit_s:.0f} s", seconds=seconds, code=None)
    if code:
        text = f"it ended with code {code}; see {log.name}"
        return Outcome(status="failed", reason=text, seconds=seconds, code=code)
    return Outcome(status="ran", reason="", seconds=seconds, code=0)


@contextlib.contextmanager
def _started(
    command: Sequence[str], environment: Mapping[str, str] | None
) -> Iterator[subprocess.Popen[str]]:
    """A process, at the head of a group of its own where there are groups; none of it outlives this."""
    settings: dict[str, Any] = {"start_new_session": True} if os.name == "posix" else {}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        **settings,
    )
    try:
        yield process
    finally:
        end(process, at_once=True)
        process.wait()
        if process.stdout:
            process.stdout.close()


def end(process: subprocess.Popen[str], at_once: bool = False) -> None:
    """End a process and those that it started: they are asked first, and killed after `GRACE_S`."""
    if not at_once and process.poll() is None:
        _send(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    _send(process, getattr(signal, "SIGKILL", signal.SIGTERM))


def _send(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(OSError):  # all of them are gone
        if os.name == "posix":
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds this process, so that what it started ends too."""

    def unwind(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
