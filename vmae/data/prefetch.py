"""Batches that are on the device before they are asked for: pinned and copied beside the computation of the
one before.

A thread reads the loader, pins what it gets and copies it on a stream of its own; both release Python's lock.
Without it a GPU waits each step for the pinning (some 10 ms for 32 clips of 224 x 224) and the copy.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_POLL_S = 0.2


class Prefetcher:
    """Iterator over the batches of `source`, in order, on `device`. On a CPU it hands them through, without a
    thread.

    An error of `source` is raised where its batch would have come, after all the batches before it.

    Args:
        source: iterator over batches: dataclasses of tensors (nested ones too) with `to(device,
            non_blocking)`. It is closed with this one; `interrupt()`, where it has one, makes a `next` that
            waits end soon.
        device: device that the batches are copied to.
        depth: batches that are made ahead, beside the one being copied.
        threaded: None is True on a GPU and False on a CPU.
    """

    def __init__(
        self,
        source: Iterator[Any],
        device: torch.device | str,
        *,
        depth: int = 1,
        threaded: bool | None = None,
    ) -> None:
        self.source, self.device = source, torch.device(device)
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._closing = self._over = False
        self._thread = None
        if self.device.type == "cuda" if threaded is None else threaded:
            self._ready: queue.Queue = queue.Queue(depth)
            self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
            self._thread.start()

    def _fill(self) -> None:
        if self._side is not None:  # a thread starts at GPU 0, where pinning would make a context
            torch.cuda.set_device(self.device)
        item: tuple[Any, Any] = (None, None)
        while not self._closing and item[1] is None:
            try:
                item = (self._copy(next(self.source)), None)
            except BaseException as error:  # StopIteration too: raised again in the reading thread
                item = (None, error)
            while not self._closing:
                try:
                    self._ready.put(item, timeout=_POLL_S)
                    break
                except queue.Full:
                    continue

    def _copy(self, batch: Any) -> tuple[Any, torch.cuda.Event | None]:
        """(the batch on the device, what to wait for before it is read)."""
        if self._side is None:
            return batch.to(self.device), None
        with torch.cuda.stream(self._side):
            return batch.to(self.device, non_blocking=True), self._side.record_event()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        if self._over or self._closing:
            raise StopIteration
        if self._thread is None:
            return next(self.source).to(self.device, non_blocking=True)
        content, error = self._ready.get()
        if error is not None:
            self._over = True
            raise error
        batch, copied = content
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for tensor in _tensors(
                batch
            ):  # their memory is not given away before this stream is done with them
                tensor.record_stream(stream)
        return batch

    @property
    def store_s(self) -> float:
        """What `source` says of its waits for object stores."""
        return getattr(self.source, "store_s", 0.0)

    def interrupt(self) -> None:
        """Make a `next` that waits end soon, where `source` can."""
        getattr(self.source, "interrupt", lambda: None)()

    def close(self) -> None:
        """Stop reading ahead and close `source`; iteration is over."""
        self._closing = True
        if self._thread is not None:
            self.interrupt()
            self._thread.join()
            self._thread, self._ready = None, queue.Queue()
        getattr(self.source, "close", lambda: None)()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
