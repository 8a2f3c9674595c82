"""Files that are complete or absent (written beside, forced to the disk, then renamed), and the reason why a
write failed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from vmae.errors import InputError

_WRITING: set[Path] = set()  # files that threads of this process have not finished


def is_being_written(path: Path) -> bool:
    """Whether `path` is what a thread of this process writes just now (`write_atomically`)."""
    return path.absolute() in _WRITING


@contextlib.contextmanager
def _replacing(path: Path, mode: str) -> Iterator[IO]:
    """A file that becomes `path` when the block ends, at once and on the disk; when it fails, `path` stays as
    it was."""
    # Not the process's number alone: on a shared file system, those of two containers may be the same.
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.unfinished")
    _WRITING.add(beside.absolute())
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)
        _WRITING.discard(beside.absolute())


def sync_folder(folder: Path) -> None:
    """Force a rename to the disk; a file system that cannot sync a folder is left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(
    path: Path, write: Callable[[IO], Any], *, binary: bool = True, wanted: int | None = None
) -> None:
    """Call `write(file)` on a file that replaces `path` when all of it is on the disk.

    Args:
        wanted: about how many bytes, for the message of a full disk.

    Raises:
        InputError: the file can't be written (a full disk, no permission); `path` is then as it was.
    """
    try:
        with _replacing(path, "wb" if binary else "w") as file:
            write(file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = why_not_written(error, path, wanted)
        raise InputError(f"cannot write {path}: {reason}; what was there before is untouched") from error


def why_not_written(error: BaseException, path: Path, wanted: int | None = None) -> str:
    """Reason of a failed write, in a line: what is full, bytes wanted and bytes free.

    Args:
        error: of the write; the system's own error may be what it was raised from.
        path: what was written.
        wanted: bytes of it.
    """
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.__cause__ or cause.__context__
    free = _free_bytes(path.parent)
    reason, number = reason_of(error), None
    if isinstance(cause, OSError):
        reason, number = cause.strerror or str(cause), cause.errno
    elif "unexpected pos" in reason:  # what torch's writer makes of a write that failed
        reason = "only a part could be written"
        if wanted is not None and free is not None and free < wanted:
            reason, number = os.strerror(errno.ENOSPC), errno.ENOSPC
    sizes = []
    if wanted is not None:
        sizes.append(f"{wanted / 1e6:.1f} MB wanted")
    if free is not None and number in (errno.ENOSPC, errno.EDQUOT):
        sizes.append(f"{free / 1e6:.1f} MB free in {path.parent}")
    return f"{reason} ({', '.join(sizes)})" if sizes else reason


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def reason_of(error: BaseException) -> str:
    """A line on what went wrong; torch's own exception holds those of all ranks."""
    failures = getattr(error, "failures", None)  # of torch.distributed.checkpoint.CheckpointException
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or repr(error)).strip().splitlines()[0]
