"""Requests to stores that run before their bytes are needed: a worker knows what its next samples need.

Threads ask while the worker decodes (obstore waits without Python's lock). What is on its way or lies ready
is bounded in bytes; the rest waits, in order.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from vmae.data.shards import stores
from vmae.data.shards.entries import Shard, ShardError

# Of each worker. 64 MiB are some 200 packed clips. Threads: with answers 100 ms late, 16 get twice as many as
# 8 (bench/store.py); a worker decodes some 100 clips/s.
MOST_BYTES, AT_ONCE = 64 << 20, 16
_GRACE_S = 60.0

Wanted = tuple[Shard, int, int]  # shard, offset, length


class Ahead:
    """Requests in the order in which their answers are taken.

    Args:
        read: (shard, offset, length) to bytes.
        most_bytes: of answers that are on their way or not yet taken; a single one may be larger.
        at_once: requests.
    """

    def __init__(
        self,
        read: Callable[[Shard, int, int], bytes],
        *,
        most_bytes: int = MOST_BYTES,
        at_once: int = AT_ONCE,
    ) -> None:
        self._read, self._most = read, most_bytes
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="ahead")
        # None: not started, for want of room
        self._wanted: OrderedDict[Wanted, Future[bytes] | None] = OrderedDict()
        self._bytes = self._started = 0
        self._lock = threading.Lock()

    def want(self, wanted: Wanted) -> None:
        """Start a request, now or as soon as there is room."""
        with self._lock:
            self._wanted.setdefault(wanted, None)
            self._start()

    def _start(self) -> None:
        """What there is room for, first the one that is taken first."""
        for wanted, future in list(self._wanted.items())[self._started :]:
            if self._bytes and self._bytes + wanted[2] > self._most:
                return
            assert future is None  # requests start in order
            self._wanted[wanted] = self._threads.submit(self._read, *wanted)
            self._bytes += wanted[2]
            self._started += 1

    def take(self, wanted: Wanted) -> Future[bytes] | None:
        """The request for `wanted`, None where there is none; what was to be taken before it is given up."""
        with self._lock:
            if wanted not in self._wanted:
                return None
            found = None
            for earlier in list(self._wanted):
                future = self._wanted.pop(earlier)
                if future is not None:
                    self._bytes -= earlier[2]
                    self._started -= 1
                if earlier == wanted:
                    found = future
                    break
                if future is not None:
                    future.cancel()
            self._start()
            return found


_ahead: tuple[int, Ahead] | None = None


def ahead_of(read: Callable[[Shard, int, int], bytes]) -> Ahead | None:
    """The requests of this process, where it is a worker; no other asks ahead."""
    global _ahead
    if not multiprocessing.current_process().daemon:
        return None
    if _ahead is None or _ahead[0] != os.getpid():
        _ahead = (os.getpid(), Ahead(read))
    return _ahead[1]


def answer_of(future: Future[bytes], shard: Shard) -> bytes:
    """The bytes of a request, when they are there.

    Raises:
        ShardError: as the request did, or no answer came in the store's patience.
    """
    try:
        return future.result(stores.patience() + _GRACE_S)
    except concurrent.futures.TimeoutError:
        raise ShardError(f"shard {shard.name}: no answer in {stores.patience():.0f} s") from None
