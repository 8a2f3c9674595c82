"""A process of its own that does what it is asked, one request at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")


class Worker(Generic[Job]):
    """A process in which the methods of `make(job)` are called."""

    def __init__(self, make: Callable[[Job], Any], job: Job, name: str):
        self.job, self.name = job, name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, job, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def wait_ready(self) -> None:
        """Until `make` has returned."""
        self._receive()

    def ask(self, method: str, *arguments: Any) -> Any:
        """The method's result.

        Raises:
            RuntimeError: it raised, or the process died.
        """
        self.pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            good, result = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise RuntimeError(f"{self.name}: its process died with code {code} (out of memory?)") from None
        if not good:
            raise RuntimeError(f"{self.name}: {result}")
        return result

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


def _serve(make: Callable[[Any], Any], job: Any, pipe: Connection) -> None:
    """Answer each request with (True, result) or (False, message), until None comes."""
    try:
        served = make(job)
        pipe.send((True, None))
        while (request := pipe.recv()) is not None:
            method, arguments = request
            pipe.send((True, getattr(served, method)(*arguments)))
    except EOFError:
        pass
    except BaseException as error:  # the parent reports it and stops the others
        with contextlib.suppress(OSError):
            pipe.send((False, f"{type(error).__name__}: {error}"))
