"""A process of its own that does what it is asked, one request at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch

Job = TypeVar("Job")
# What torch, CUDA and cuBLAS say of memory in errors that have no type of their own.
NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class WorkerError(RuntimeError):
    """A request failed, or the process died; it answers no further request.

    Attributes:
        reason: without the worker's name.
        out_of_memory: memory was the reason, as far as can be told: a process that was killed counts.
    """

    def __init__(self, name: str, reason: str, out_of_memory: bool):
        super().__init__(f"{name}: {reason}")
        self.reason, self.out_of_memory = reason, out_of_memory


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
            WorkerError: it raised, or the process died.
        """
        with contextlib.suppress(OSError):  # a dead process: `_receive` tells
            self.pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            good, result = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            killed = code in (-getattr(signal, "SIGKILL", 9), -signal.SIGTERM)
            reason = "was killed (out of memory?)" if killed else f"died with code {code}"
            raise WorkerError(self.name, f"its process {reason}", killed) from None
        if not good:
            raise WorkerError(self.name, *result)
        return result

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the device or of the machine, was what lacked."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def _serve(make: Callable[[Any], Any], job: Any, pipe: Connection) -> None:
    """Answer each request with (True, result), until None comes or one fails: (False, (message, whether
    memory lacked))."""
    try:
        served = make(job)
        pipe.send((True, None))
        while (request := pipe.recv()) is not None:
            method, arguments = request
            pipe.send((True, getattr(served, method)(*arguments)))
    except EOFError:
        pass
    except BaseException as error:  # the parent reports it
        with contextlib.suppress(OSError):
            pipe.send((False, (f"{type(error).__name__}: {error}", is_out_of_memory(error))))
