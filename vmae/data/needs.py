"""What a run needs of a machine, before it starts: open files, memory, shared memory, cores, room for
checkpoints; and which of it is short, a line each.

The numbers were measured by `bench/needs.py` and `bench/data.py` (docs/data_at_scale.md, docs/results.md). A
shortage is a warning, since they are estimates; only too little shared memory is refused, because a worker
that writes past its end dies (`vmae.data.shared_memory`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmae.data.shards.ahead import MOST_BYTES
from vmae.data.shared_memory import FOLDER, PREFETCH, batches_bytes, describe, find_shared_memory, remedy
from vmae.files.limits import CONTAINER, find_cores, find_memory, find_open_files, free_disk

# --- Measured: bench/results/cpu/needs.json, data.json ---

TENSORS = 5  # of a batch; each that is handed over by shared memory is an open file on both sides
WORKER_FILES = 3  # of the main process for each worker: two of its pipe's ends, and a socket
GROUPS = 2  # of ranks; in each, a rank has a connection to every other one
LIBRARY_FILES = 256  # allowance for Python, logs, shards (64 stay open), CUDA and NCCL
WORKER_BYTES = 100 << 20  # memory of a worker's own, beside a batch of samples that are not joined yet
RANK_BYTES = 4 << 30  # allowance for a rank's main process: Python, torch, CUDA's host memory; not measured


@dataclass(frozen=True)
class DecodeCost:
    """CPU milliseconds on one core: of a video that is opened and decoded, and of each clip cut from it."""

    video_ms: float
    clip_ms: float

    def videos_per_s(self, num_sample: int) -> float:
        """Videos a second on one core, `num_sample` clips cut from each."""
        return 1000 / (self.video_ms + num_sample * self.clip_ms)


PACKED = DecodeCost(video_ms=11.1, clip_ms=1.5)
ORIGINAL = DecodeCost(video_ms=69.7, clip_ms=3.0)


# --- What is needed ---


def open_files(workers: int, ranks: int = 1, prefetch: int = PREFETCH) -> int:
    """The most files that the main process of a rank, or one of its workers, has open.

    Args:
        workers: of one rank.
        ranks: of the whole run.
    """
    if not workers:
        return GROUPS * (ranks - 1) + LIBRARY_FILES
    # a worker that is started in place of another one inherits all that the main process has open
    batches = workers * prefetch + 1 + prefetch + 1
    return GROUPS * (ranks - 1) + WORKER_FILES * (workers + 1) + TENSORS * batches + LIBRARY_FILES


@dataclass(frozen=True, kw_only=True)
class Load:
    """What runs on one machine.

    Attributes:
        workers: of a rank.
        batch_bytes: clips of a micro-batch, uint8.
        ranks: on this machine; `world`: in the run.
        videos_per_s: that a rank's model takes; None where that is not known.
        num_sample: clips cut from a video.
        checkpoint_bytes: of one checkpoint; 0 for none. `checkpoints`: that are kept at once, the one that is
            being written included.
        staged_bytes: copies of a rank's state in host memory, while it is saved in the background.
        output: folder of the run; None where there is none yet.
        rank_bytes: of a rank's main process, beside its batches.
        remote: whether shards are read from an object store.
        pinned: whether batches are copied to pinned memory, for a GPU.
        decode: cost of the videos.
    """

    workers: int
    batch_bytes: int
    ranks: int = 1
    world: int = 1
    videos_per_s: float | None = None
    num_sample: int = 1
    checkpoint_bytes: int = 0
    checkpoints: int = 0
    staged_bytes: int = 0
    rank_bytes: int = RANK_BYTES
    output: str | Path | None = None
    remote: bool = False
    pinned: bool = True
    decode: DecodeCost = PACKED

    @property
    def shared_bytes(self) -> int:
        """Shared memory of all ranks here."""
        return self.ranks * batches_bytes(self.batch_bytes, self.workers)

    @property
    def memory_bytes(self) -> int:
        """Memory of all ranks here, shared memory included: a container's limit counts that too."""
        worker = WORKER_BYTES + self.batch_bytes + (MOST_BYTES if self.remote else 0)
        pinned = 2 * self.batch_bytes if self.pinned else 0
        rank = self.rank_bytes + self.workers * worker + pinned + self.staged_bytes
        return self.ranks * rank + self.shared_bytes

    @property
    def cores(self) -> float | None:
        """Cores that decode what the models here take."""
        if self.videos_per_s is None:
            return None
        return self.ranks * self.videos_per_s / self.decode.videos_per_s(self.num_sample)

    @property
    def disk_bytes(self) -> int:
        return self.checkpoint_bytes * self.checkpoints


@dataclass(frozen=True)
class Need:
    """One thing that a run needs of its machine.

    Attributes:
        name: what it is, for a table.
        needed, has: None where not known.
        remedy: what to do where `has` is less.
        show: makes words of a number.
    """

    name: str
    needed: float | None
    has: float | None
    remedy: str
    show: Callable[[float], str]

    @property
    def short(self) -> bool:
        """Whether it is known to be too little."""
        return self.needed is not None and self.has is not None and self.has < self.needed

    def describe(self) -> str:
        """A line: what is needed, what is there, and what to do where that is less."""
        needed = "need not known" if self.needed is None else f"{self.show(self.needed)} needed"
        has = "not known" if self.has is None else self.show(self.has)
        return f"{self.name}: {needed}, {has} here" + (f": {self.remedy}" if self.short else "")


def find_needs(load: Load) -> list[Need]:
    """What `load` needs, against what this machine and its container have."""
    shared, memory, files = find_shared_memory(), find_memory(), find_open_files()
    where = f"memory of {memory.of}" if memory else "memory"
    less = "fewer --workers or a smaller --batch-size"
    limit = (
        "a higher limit (`docker run --memory`, Slurm's --mem), " if memory and memory.of == CONTAINER else ""
    )
    needed_files = open_files(load.workers, load.world)
    needs = [
        Need(
            "open files of a process",
            needed_files,
            files and files.hard,
            f"raise the hard limit (`ulimit -Hn`, `docker run --ulimit nofile={needed_files}`, "
            "LimitNOFILE= in slurmd's unit), or take fewer --workers",
            _count,
        ),
        Need(where, load.memory_bytes, memory and memory.free, f"take {limit}{less}", _bytes),
        Need(
            f"shared memory ({FOLDER})",
            load.shared_bytes,
            shared and shared.free,
            f"{remedy(load.shared_bytes)}; or take {less}",
            _bytes,
        ),
        Need(
            "cores for decoding",
            load.cores,
            find_cores(),
            "the model will wait for clips: pack the videos (`vmae pack`), cut more clips from each "
            "(--num-sample), or ask for more cores (Slurm's --cpus-per-task, `docker run --cpus`)",
            _cores,
        ),
    ]
    if load.videos_per_s is not None and load.workers:
        rate = load.workers * load.decode.videos_per_s(load.num_sample)
        wanted = math.ceil(load.videos_per_s / load.decode.videos_per_s(load.num_sample))
        needs.append(
            Need(
                "videos a second of a rank's workers",
                load.videos_per_s,
                rate,
                f"the model will wait for clips: --workers {wanted}",
                _cores,
            )
        )
    if load.disk_bytes and load.output is not None:
        needs.append(
            Need(
                "disk for checkpoints",
                load.disk_bytes,
                free_disk(load.output),
                f"a checkpoint takes {describe(load.checkpoint_bytes)}: make room, take another --output, or "
                "keep fewer (--keep)",
                _bytes,
            )
        )
    return needs


def _count(number: float) -> str:
    return f"{number:.0f}" if number < 2**62 else "unlimited"


def _bytes(number: float) -> str:
    return describe(int(number))


def _cores(number: float) -> str:
    return f"{number:.3g}"
