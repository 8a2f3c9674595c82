"""A folder that one process writes to: a lock file in it, which names its holder.

The lock is complete or absent: it is written beside and linked into place, which only one can do, on NFS too;
where a file system has no links, it is created exclusively (atomic on NFS from version 3 on). A holder that
has ended without removing it (kill -9, a reboot) is recognised by its process id and the time at which that
process started, on the same machine since the same boot, or by a boot since; a job that its scheduler or
torchrun started again ended before; of another job of its cluster, a Slurm job asks `squeue`. Of any other
machine or container nothing can be known: its lock is respected until someone deletes it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from vmae.errors import InputError
from vmae.files.json_files import parse_json

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # Windows has no such module

LOCK_NAME = "run.lock"
_SQUEUE_S = 30.0  # that `squeue` may take to answer
_HELD: set[str] = set()  # tokens of the locks that this process holds


class FolderLock:
    """Lock on a folder, `with FolderLock(folder, "a run"):`, whose holder is the only writer.

    Makes the folder where it is missing, and removes one that it made and that is empty at the end.

    Args:
        what: description of the holder, for the message to others.

    Raises:
        InputError: someone else holds it (in one line: who, where, since when), or the lock cannot be
            written.
    """

    def __init__(self, folder: str | Path, what: str = "a run") -> None:
        self.folder, self.path = Path(folder), Path(folder) / LOCK_NAME
        self.about = {**_this_process(), "what": what, "token": uuid.uuid4().hex}
        self._handle: int | None = None
        self._made = False

    def __enter__(self) -> FolderLock:
        try:
            for _ in range(10):  # more than one turn only where another one takes or leaves it at this moment
                self._made = not self.folder.exists()
                self.folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(
                    FileNotFoundError
                ):  # its last holder had made the folder, and took it away
                    if self._create():
                        break
                    self._clear(refuse_if_locked(self.folder))
            else:
                raise InputError(
                    f"output folder {self.folder} is in use: {self.path} changes hands all the time; try "
                    "again"
                )
            self._handle = os.open(
                self.folder, os.O_RDONLY
            )  # held open: some file systems number a folder anew otherwise
        except OSError as error:
            raise InputError(
                f"output folder {self.folder} is not writable: {self.path}: {error.strerror}"
            ) from error
        _HELD.add(self.about["token"])
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handle is None or self.about["pid"] != os.getpid():  # a forked child's copy
            return
        _HELD.discard(self.about["token"])
        os.close(self._handle)
        self._handle = None
        with contextlib.suppress(OSError):
            if (_read(self.path) or {}).get("token") == self.about["token"]:
                self.path.unlink()
                if self._made:
                    self.folder.rmdir()

    def check(self) -> None:
        """See that the folder is still there, and still this holder's; call it before something is written.

        Raises:
            InputError: it was removed, renamed, unmounted or replaced, or someone else took it.
        """
        try:
            same = self._handle is not None and os.path.samestat(os.fstat(self._handle), os.stat(self.folder))
        except OSError:
            same = False
        if not same:
            raise InputError(
                f"output folder {self.folder} is gone: removed, renamed or unmounted while the run wrote to "
                "it; "
                "nothing more is written"
            )
        with contextlib.suppress(OSError):  # of a file system that fails: the write itself will tell
            holder = _read(self.path)
            if holder is None and self._create():  # someone deleted the lock, and nobody took it
                return
            holder = holder or _read(self.path) or {}
            if holder.get("token") != self.about["token"]:
                raise InputError(
                    f"output folder {self.folder} was taken over by {_describe(holder)}: this run ends, and "
                    "writes nothing more"
                )

    def _create(self) -> bool:
        """Whether the lock was free, and is this holder's now."""
        text = (json.dumps(self.about, indent=1) + "\n").encode()
        beside = self.folder / f".{LOCK_NAME}.{self.about['token']}"
        try:
            _write(beside, text)
            try:
                os.link(beside, self.path)
            except FileExistsError:
                return os.stat(beside).st_nlink == 2  # NFS may answer so after a repeated request
            except OSError:
                with contextlib.suppress(FileExistsError):
                    _write(self.path, text)
                    return True
                return False
            return True
        finally:
            beside.unlink(missing_ok=True)

    def _clear(self, stale: dict[str, Any] | None) -> None:
        """Remove the lock that was found stale, and no other one that replaced it meanwhile.

        One after the other, as far as the file system has `flock` (else a moment remains in which two may do
        it; then the first one to hold finds out by `check`).
        """
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(self.path, os.O_RDWR if os.access(self.path, os.W_OK) else os.O_RDONLY)
            try:
                if fcntl is not None:
                    with contextlib.suppress(OSError):
                        fcntl.flock(handle, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(handle), os.stat(self.path)) and _read(self.path) == stale:
                    self.path.unlink()
            finally:
                os.close(handle)


def refuse_if_locked(folder: str | Path) -> dict[str, Any] | None:
    """See whether someone holds the folder; nothing is written.

    Returns:
        What a stale lock says; None where there is none.

    Raises:
        InputError: someone does, or that cannot be known.
    """
    path = Path(folder) / LOCK_NAME
    try:
        holder = _read(path)
    except OSError as error:
        raise InputError(
            f"output folder {folder} is in use: {path} cannot be read: {error.strerror}"
        ) from error
    if holder is not None and (reason := _why_alive(holder, _this_process())):
        raise InputError(
            f"output folder {folder} is in use by {_describe(holder)}. {reason.format(path=path)}"
        )
    return holder


# --- Who holds it ---


def _write(path: Path, text: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict[str, Any] | None:
    """Content of a lock; None without one, empty where it cannot be understood."""
    try:
        content = parse_json(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _first_line("/etc/machine-id"),
        "boot": _first_line("/proc/sys/kernel/random/boot_id"),
        "pids": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": time.time(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv)[:500],
        "launches": _launches(),
    }


def _first_line(path: str) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return Path(path).read_text().strip() or None
    return None


def _link(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return None


def _start_of(pid: int) -> int | None:
    """Start of a living process, in ticks since the boot; None where there is none (a zombie counts as none).

    Field 22 of /proc/PID/stat, see proc(5); the second field, the name, may hold blanks and brackets.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _launches() -> dict[str, int]:
    """Count of restarts by launchers that restart this command themselves, by the job's name."""
    given, found = os.environ, {}
    for job, count in (
        ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    ):
        if given.get(job, "none") != "none":  # torchrun's default name
            cluster = f"{given.get('SLURM_CLUSTER_NAME', '')} " if job.startswith("SLURM") else ""
            with contextlib.suppress(ValueError):
                found[f"{job} {cluster}{given[job]}"] = int(given.get(count) or 0)
    return found


def _slurm_job_ended(launches: dict[str, int], own: dict[str, int]) -> bool:
    """Whether a lock is of a Slurm job of the cluster that this job is in, and `squeue` says that it is over.

    Args:
        launches, own: of the lock and of this process, see `_launches`.
    """
    here = [job.split() for job in own if job.startswith("SLURM_JOB_ID")]
    theirs = [job.split() for job in launches if job.startswith("SLURM_JOB_ID") and job not in own]
    if not here or not theirs or theirs[0][:-1] != here[0][:-1] or not theirs[0][-1].isdigit():
        return False
    command = ["squeue", "--noheader", "--format", "%T", "--jobs", theirs[0][-1]]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_S)
    except (OSError, subprocess.SubprocessError):
        return False
    if told.returncode:  # jobs that ended some minutes ago are forgotten
        return "Invalid job id" in told.stderr
    return not told.stdout.strip()


def _boot_time() -> float:
    """Seconds since the epoch; 0 where it is not known."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/stat").read_text().splitlines()
        return float(next(line for line in lines if line.startswith("btime ")).split()[1])
    return 0.0


def _why_alive(holder: dict[str, Any], own: dict[str, Any]) -> str | None:
    """Reason why a holder may be alive, and what to do; None where it has certainly ended."""
    launches, pid, since = (holder.get(key) for key in ("launches", "pid", "since"))
    if not isinstance(launches, dict) or not isinstance(pid, int) or not isinstance(since, (int, float)):
        return "Its lock is not to be understood: if you are sure that no run writes there, delete {path}"
    if any(count > launches.get(job, count) for job, count in own["launches"].items()):
        return None  # started again by its launcher, which has ended it before
    if _slurm_job_ended(launches, own["launches"]):
        return None
    wait = "Wait for its end, stop it, or choose another --output"
    sure = ": if you are sure that it has ended, delete {path}"
    if own["boot"] is not None and holder.get("boot") == own["boot"]:
        if holder.get("pids") != own["pids"]:
            return f"{wait}. It is in another container, where its process cannot be looked up{sure}"
        if pid == own["pid"] and holder.get("token") not in _HELD:
            return None
        return wait if _start_of(pid) == holder.get("started") is not None else None
    same_name = (holder.get("host"), holder.get("machine")) == (own["host"], own["machine"])
    if same_name and own["boot"] is not None and since < _boot_time():
        return None
    return f"{wait}. It is on another machine, where its process cannot be looked up{sure}"


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "someone unknown"
    what, pid, host, date = (holder.get(key, "unknown") for key in ("what", "pid", "host", "date"))
    return f"{what} (process {pid} on {host}, since {date})"
