"""Shared memory, through which workers hand their batches over: on Linux what is mounted at /dev/shm.

Containers get 64 MiB of it unless they ask for more, and a worker that writes past its end dies of SIGBUS in
the middle of a run. What a run can need is known before it starts.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

from vmae.errors import InputError

FOLDER = "/dev/shm"
PREFETCH = 2  # batches that each worker makes ahead


class SharedMemory(NamedTuple):
    """Bytes of the mount, and those of them that are free."""

    total: int
    free: int


def find_shared_memory() -> SharedMemory | None:
    """None where tensors are not handed over by a mount (macOS, Windows)."""
    try:
        found = os.statvfs(FOLDER)
    except (OSError, AttributeError):
        return None
    return SharedMemory(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def batches_bytes(batch_bytes: int, workers: int, prefetch: int = PREFETCH) -> int:
    """The most that the batches of one rank's workers take: each has `prefetch` made, and one is being read.

    Args:
        batch_bytes: of a micro-batch's clips, uint8.
    """
    return batch_bytes * (workers * prefetch + 1) if workers else 0


def check_shared_memory(batch_bytes: int, workers: int, ranks: int = 1) -> None:
    """Raises InputError where the batches of this machine's ranks may not fit.

    Args:
        ranks: on this machine, each with so many workers.
    """
    found = find_shared_memory()
    needed = ranks * batches_bytes(batch_bytes, workers)
    if found is None or needed <= found.free:
        return
    each = f"{batch_bytes / 2**20:.4g} MiB"
    here = f" of each of {ranks} ranks" if ranks > 1 else ""
    raise InputError(
        f"the data workers may fill {describe(needed)} of shared memory ({workers} workers{here}, "
        f"{PREFETCH} batches of {each} each), and {FOLDER} has {describe(found.free)} free of "
        f"{describe(found.total)}: {remedy(needed)}; or take fewer --workers, or a smaller --batch-size"
    )


def remedy(needed: int) -> str:
    """What gives a container so many bytes."""
    return (
        f"start the container with `docker run --shm-size={max(math.ceil(1.25 * needed / 2**30), 1)}g` or "
        f"--ipc=host (Kubernetes: mount an emptyDir with medium: Memory at {FOLDER})"
    )


def describe(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
