"""What a machine and its container allow: memory, cores, open files, room on a disk.

A container sees all of its machine in `os.cpu_count()` and /proc/meminfo, and is stopped at the limits of its
control groups (cgroups, version 2 or 1), which are looked up here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CONTAINER, MACHINE = "this container", "this machine"


class MemoryRoom(NamedTuple):
    """Bytes of memory, those of them that can be had now, and whose they are: the container's, where its
    limit is the lower one."""

    total: int
    free: int
    of: str


class OpenFiles(NamedTuple):
    """Limits of open files of a process: the one that holds, and the one up to which it can be raised."""

    soft: int
    hard: int


def find_memory(root: str | Path = "/") -> MemoryRoom | None:
    """Memory for new processes here; None where the system does not tell (no /proc).

    Args:
        root: folder that stands for /.
    """
    found = []
    told = dict(line.partition(":")[::2] for line in _read(Path(root, "proc/meminfo")).splitlines())
    if "MemTotal" in told and "MemAvailable" in told:
        total, free = (1024 * int(told[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
        found.append(MemoryRoom(total, free, MACHINE))
    for folder, version in _groups("memory", root):
        names = ("memory.max", "memory.current", "")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        limit, used = (_whole(_read(folder / name)) for name in names[:2])
        if limit is None or used is None or (found and limit >= found[0].total):
            continue
        stat = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines())
        # pages of files, which the system gives up when memory is wanted
        cached = sum(int(stat.get(f"{names[2]}{kind}_file", 0)) for kind in ("active", "inactive"))
        found.append(MemoryRoom(limit, max(0, min(limit, limit - used + cached)), CONTAINER))
    return min(found, key=lambda room: room.free, default=None)


def find_cores(root: str | Path = "/") -> float:
    """Cores that this process may use at once: those it may run on, or its container's share of time where
    that is less."""
    cores: float = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    for folder, version in _groups("cpu", root):
        if version == 2:
            quota, period = (_read(folder / "cpu.max").split() + ["", ""])[:2]
        else:
            quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        time, of = _whole(quota), _whole(period)
        if time and of and time > 0:
            cores = min(cores, time / of)
    return cores


def whole_cores() -> int:
    """`find_cores` as a number of processes, at least 1."""
    return max(int(find_cores()), 1)


def find_open_files() -> OpenFiles | None:
    """None where the system has no such limit (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    soft, hard = (
        2**63 - 1 if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return OpenFiles(soft, hard)


def raise_open_files(needed: int) -> None:
    """Raise the soft limit of open files to `needed`, or as far as the hard limit allows; never lower it."""
    found = find_open_files()
    if found is None or found.soft >= needed or found.soft >= found.hard:
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, found.hard), hard))


def free_disk(folder: str | Path) -> int | None:
    """Free bytes of the file system that `folder` lies in, or will lie in; None where it cannot be asked."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


# --- Control groups ---


def _groups(controller: str, root: str | Path) -> Iterator[tuple[Path, int]]:
    """(folder, version) of this process's control group and of those around it, where they are mounted.

    Inside a container the path may be one of the host's, which is not there: the mount's root is the
    container's own group then.
    """
    mount = Path(root, "sys/fs/cgroup")
    for line in _read(Path(root, "proc/self/cgroup")).splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            mounts, version = [mount, mount / "unified"], 2
        elif controller in names.split(","):
            mounts, version = [mount / names, mount / controller], 1
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for folder in dict.fromkeys(mounts):
            if folder.is_dir():
                for length in range(len(parts), -1, -1):
                    yield folder.joinpath(*parts[:length]), version
                break


def _read(path: Path) -> str:
    """The text of a small file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _whole(text: str) -> int | None:
    """A whole number, or None for "max" and for nothing."""
    try:
        return int(text)
    except ValueError:
        return None
