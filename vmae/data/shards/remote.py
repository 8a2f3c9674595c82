"""What the main process asks of object stores: an index, whether shards are there, small objects.

It asks through a process of its own, since one that has asked a store must not be forked (see
`vmae.data.shards.stores`), and the main process forks workers. Data workers, which nobody forks, ask
themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vmae.data.files import cache_home
from vmae.data.shards import stores
from vmae.data.shards.entries import Shard, ShardError, is_address
from vmae.data.shards.stores import Found
from vmae.errors import InputError
from vmae.files.atomic import write_atomically

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # Windows has no such module

_log = logging.getLogger(__name__)
# Seconds for which faults that may pass are repeated before a run: long enough for a lost packet, short
# enough for a mistyped name.
BEFORE_S = 5.0
MOST_CHECKED, AT_ONCE = 1000, 32  # shards, and requests, of `check_shards`
_POLL_S, _UNUSED_S, _LARGE = 1.0, 86400.0, 100_000_000
_DECIDING = ("AWS_", "GOOGLE_", "AZURE_", "VMAE_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy")
_START_METHOD = "fork" if sys.platform.startswith("linux") else None


# --- the process that asks ----------------------------------------------------------------------------------


class _Asker:
    """A child process that calls functions one after the other, for as long as its parent lives."""

    def __init__(self) -> None:
        self.parent, self.environment = os.getpid(), _environment()
        context: Any = multiprocessing.get_context(_START_METHOD)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_answer, args=(theirs, self.parent), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def stale(self) -> bool:
        """Whether it is another process's, or knows an older environment."""
        return (self.parent, self.environment) != (os.getpid(), _environment())

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Raises EOFError or OSError where the process has died."""
        self.pipe.send((function, arguments))
        return self.pipe.recv()


def _environment() -> dict[str, str]:
    """What decides about stores and credentials."""
    return {name: value for name, value in os.environ.items() if name.startswith(_DECIDING)}


def _answer(pipe, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while os.getppid() == parent:
        if not pipe.poll(_POLL_S):
            continue
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except InputError as error:
            answer = (False, error)
        except Exception:
            answer = (False, RuntimeError(f"a request to a store failed:\n{traceback.format_exc()}"))
        try:
            pipe.send(answer)
        except ConnectionError:
            return


_asker: _Asker | None = None
_lock = threading.Lock()


def ask_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, in the process that asks stores for this one.

    Args:
        function: of a module, so that it can be sent; it is called again where the process died.

    Raises:
        InputError: `function` did.
        RuntimeError: `function` raised something else, or the process keeps dying.
    """
    global _asker
    if multiprocessing.current_process().daemon:  # a worker: nobody forks it, and it may have no child
        return function(*arguments)
    with _lock:
        for _ in range(3):
            if _asker is None or _asker.stale:
                if _asker is not None and _asker.parent == os.getpid():
                    _asker.process.kill()
                _asker = _Asker()
            try:
                good, answer = _asker.ask(function, *arguments)
                break
            except (EOFError, OSError):
                _asker.process.kill()
                _asker = None
        else:
            raise RuntimeError("the process that asks object stores keeps dying")
    if not good:
        raise answer
    return answer


# --- what is asked ------------------------------------------------------------------------------------------


def head(address: str) -> Found:
    """Size and ETag of an object.

    Raises:
        InputError: it is not there, or cannot be asked for; the line says which.
    """
    return ask_apart(stores.find_object, address, BEFORE_S)


def fetch_index(address: str) -> Path:
    """A local copy of an index that lies in a store.

    It is fetched once for each machine and version (address, ETag, size); the others wait for the one that
    fetches it, and map the same file.

    Raises:
        InputError: it is not there or cannot be read, or the copy cannot be written; the line says which.
    """
    stores.check_limits()
    return ask_apart(_fetch, address, str(cache_folder()))


def cache_folder() -> Path:
    """Folder of what was fetched: $XDG_CACHE_HOME/vmae or ~/.cache/vmae, else one of the temporary files."""
    own = f"vmae-{os.getuid()}" if hasattr(os, "getuid") else "vmae"
    for folder in (cache_home(), Path(tempfile.gettempdir(), own)):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    raise InputError(
        f"no folder for fetched indexes: {cache_home()} and {tempfile.gettempdir()} cannot be written"
    )


def _fetch(address: str, cache: str) -> Path:
    found = stores.find_object(address, BEFORE_S)
    folder, place = Path(cache, "indexes"), hashlib.sha256(address.encode()).hexdigest()[:16]
    written = found.etag or found.modified or time.time_ns()
    version = hashlib.sha256(f"{written} {found.size}".encode()).hexdigest()[:16]
    path = folder / f"{place}-{version}.vmae"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{place}.lock"):
            for piece in folder.glob(f".{place}-*"):  # of a process that was killed
                piece.unlink(missing_ok=True)
            if not (path.is_file() and path.stat().st_size == found.size):
                if found.size > _LARGE:
                    _log.info(f"note: fetching {address}, {found.size / 1e6:.0f} MB, to {path}")
                write_atomically(
                    path,
                    lambda file: stores.download(address, file, found, stores.patience()),
                    wanted=found.size,
                )
            os.utime(path)
            _remove_unused(folder, place, path)
    except OSError as error:
        raise InputError(f"the copy of {address} cannot be written: {path}: {error.strerror}") from None
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process of this machine at a time."""
    with open(path, "a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_unused(folder: Path, place: str, kept: Path) -> None:
    """Remove older versions of an index that nobody has asked for since a day."""
    for path in folder.glob(f"{place}-*.vmae"):
        with contextlib.suppress(OSError):
            if path != kept and time.time() - path.stat().st_mtime > _UNUSED_S:
                path.unlink()


def check_shards(shards: Sequence[Shard]) -> None:
    """See that shards are what their index says, by size and ETag: all, or a thousand spread over them.

    Raises:
        ShardError: one is missing, cannot be read, or is another one; the line names the first and how many
            there are.
    """
    step = -(-len(shards) // MOST_CHECKED) or 1
    chosen = list(shards[::step])
    remote = [shard for shard in chosen if is_address(shard.name)]
    wrong = [text for shard in chosen if not is_address(shard.name) and (text := _check_file(shard))]
    if remote:
        stores.check_limits()
        wrong += ask_apart(_check_objects, remote)
    if wrong:
        more = f" (and {len(wrong) - 1} more of {len(chosen)} that were looked at)" if len(wrong) > 1 else ""
        raise ShardError(wrong[0] + more)


def _check_file(shard: Shard) -> str:
    try:
        size = os.stat(shard.name).st_size
    except OSError as error:
        return f"shard {shard.name} cannot be read: {error.strerror}"
    return _compare(shard, Found(size, ""))


def _check_objects(shards: list[Shard]) -> list[str]:
    """What is wrong with each, as far as something is. A first one alone: where the store refuses or is not
    there, all would say so."""

    def look(shard: Shard) -> str:
        try:
            return _compare(shard, stores.find_object(shard.name, BEFORE_S))
        except InputError as error:
            return f"shard {error}"

    first = look(shards[0])
    with ThreadPoolExecutor(1 if first else AT_ONCE) as threads:
        rest = [] if first else threads.map(look, shards[1:])
        return [text for text in (first, *rest) if text]


def _compare(shard: Shard, found: Found) -> str:
    if found.size != shard.size:
        return f"shard {shard.name} has {found.size} bytes, and its index says {shard.size}: {AGAIN}"
    if shard.etag and found.etag and shard.etag.strip('"') != found.etag.strip('"'):
        return f"shard {shard.name} was changed since its index was made (ETag): {AGAIN}"
    return ""


AGAIN = "copy it again, or make the index anew with `vmae index`"
