"""Who this process is among those of a command that torchrun started, and how they agree.

For work that needs no model: host numbers and small objects travel by gloo. `vmae.train.parallel.Parallel`,
which splits a model, is one of these too.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from vmae.errors import InputError
from vmae.files.folder_lock import FolderLock

# Groups that were left, one a run, kept until the process ends. A DDP model that outlives its group would be
# the last to hold it, and takes it down holding Python's lock; gloo's thread may want that lock to drop a
# collective's tensors, while it holds the group's: both wait for ever (torch 2.13, one end in some 40 on a
# busy machine). Python's own reference is dropped without the lock.
_LEFT: list[Any] = []

# How long a rank waits for another one that has more of a list left; torch's 30 minutes are for steps. A rank
# that dies ends the others at once, whatever this says.
PATIENCE = datetime.timedelta(days=30)


@dataclass(eq=False)
class Ranks:
    """This process among those of a command; as it is constructed, the only one. Made by `open_ranks`.

    Attributes:
        rank, world_size: among all processes.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and manifests."""
        return self.rank == 0

    def exchange(self, numbers: Sequence[float]) -> Tensor:
        """Host numbers of all ranks: float64 [world_size, len(numbers)], on the CPU."""
        own = torch.tensor(list(numbers), dtype=torch.float64)
        if self.world_size == 1:
            return own[None]
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(found, own)
        return torch.stack(found)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.exchange([0.0])

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """Small picklable `value` of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        found = [None] * self.world_size
        dist.all_gather_object(found, value, group=group)
        return found

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on rank 0 (small, picklable), on every rank; an `InputError` there is one on
        every rank."""
        result = failure = None
        if self.is_main:
            try:
                result = work()
            except InputError as error:
                if self.world_size == 1:
                    raise
                failure = str(error)
        result, failure = self.from_main((result, failure))
        if failure is not None:
            raise InputError(failure)
        return result

    @contextlib.contextmanager
    def hold(self, folder: str | Path, what: str) -> Iterator[None]:
        """Be the only ones who write to `folder` (rank 0 has its lock); where someone else does, all ranks
        raise InputError."""
        with contextlib.ExitStack() as stack:
            self.on_main(lambda: (stack.enter_context(FolderLock(folder, what)), None)[1])
            yield

    def from_main(self, value: Any, group: Any = None) -> Any:
        """Rank 0's small picklable `value`, on every rank."""
        return self.gather(value if self.is_main else None, group)[0]


@contextlib.contextmanager
def open_ranks() -> Iterator[Ranks]:
    """Join the other processes of this command, as the launcher's environment describes them, and leave them
    at the end."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    with process_group("gloo", PATIENCE):
        yield Ranks(dist.get_rank(), dist.get_world_size())


@contextlib.contextmanager
def process_group(backend: str, timeout: datetime.timedelta | None = None) -> Iterator[None]:
    """torch's default group of all processes.

    Args:
        timeout: that a rank waits for another one; None: torch's own.
    """
    dist.init_process_group(backend, timeout=timeout, **_meeting_place())
    try:
        yield
    except Exception as error:
        get_error_handler().record_exception(error)  # for torchrun, which shows the first rank's that failed
        raise
    _LEFT.append(dist.group.WORLD)
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def _meeting_place() -> dict[str, Any]:
    """Where the ranks find each other, when the launcher's environment alone does not say it well."""
    given = os.environ
    if "RANK" not in given:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # torchrun (2.5 to 2.13) keeps its store over restarts: without a name of its own, a start may find the
    # addresses of the one before, and fail. With --rdzv-backend c10d on several nodes the counts may differ
    # from node to node: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun there, and each start has a
    # store of its own.
    if given.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        shared = dist.TCPStore(given["MASTER_ADDR"], int(given["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"start-{given['TORCHELASTIC_RESTART_COUNT']}", shared)
        return {"store": store, "rank": int(given["RANK"]), "world_size": int(given["WORLD_SIZE"])}
    return {}
