"""One process or many: who this one is, how a model is split over all, and how their gradients become one.

Torch's own parts: DDP, and FSDP2 (`fully_shard`, a block at a time), started by torchrun or by anything else
that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Tensors of a GPU travel by NCCL; host
numbers, and all tensors of a CPU, by gloo, so that agreeing on a number never waits for a GPU.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vmae.config import PARALLEL
from vmae.data.ranks import Ranks, process_group
from vmae.errors import InputError
from vmae.train.checks import resolve_device
from vmae.train.pretrain_settings import world_size

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@dataclass(eq=False)
class Parallel(Ranks):
    """This process among those of a run; as it is constructed, the only one. Made by `open_parallel`.

    Attributes:
        kind: "none", "ddp" (each rank holds all), "fsdp" (each holds its part of weights, gradients and
            optimizer state), or "hybrid" (parts within a group of ranks, copies across groups).
        device: of this rank.
        rank, world_size: see `Ranks`.
        mesh: of the ranks, for "fsdp" [ranks] and "hybrid" [groups, ranks of a group].
        save_group: for the numbers that background saves exchange.
    """

    kind: str = "none"
    device: torch.device = torch.device("cpu")
    mesh: Any = None
    save_group: Any = None

    @property
    def copy(self) -> tuple[int, int]:
        """(which copy of the model this rank holds, or a part of, how many copies there are)."""
        if self.kind == "ddp":
            return self.rank, self.world_size
        if self.kind == "hybrid":
            return self.mesh.get_local_rank("copies"), self.mesh.size(0)
        return 0, 1

    @property
    def sharded(self) -> bool:
        return self.kind in ("fsdp", "hybrid")

    def wrap(self, model: nn.Module, blocks: Sequence[nn.Module] = (), dtype: str = "float32") -> nn.Module:
        """What to call in training instead of `model`, which lies on `device` with the same weights on every
        rank.

        Wrap before an optimizer is made: sharding replaces the parameters. Their names stay, see `bare`.

        Args:
            blocks: parts of `model` that are gathered one at a time, in the order in which they run.
            dtype: "bfloat16" gathers weights in bfloat16 and sums gradients in float32 (sharded kinds only:
                the others have autocast alone).
        """
        if self.kind == "none":
            return model
        if self.kind == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(
                model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        half = dtype == "bfloat16"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            cast_forward_inputs=False,  # autocast decides, as without sharding
        )
        for block in blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        fully_shard(model, mesh=self.mesh, mp_policy=policy)
        return model

    @contextlib.contextmanager
    def gradients(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: only the `last` one of a step exchanges
        gradients."""
        if self.sharded:
            cast("FSDPModule", model).set_requires_gradient_sync(last)
        if self.kind == "ddp" and not last:
            with cast(nn.parallel.DistributedDataParallel, model).no_sync():
                yield
        else:
            yield

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over the ranks, in place, on its device; nothing waits for it."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value


def bare(model: nn.Module) -> nn.Module:
    """The model itself, whose parameters have the published names."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module
    return model


def resolve_kind(kind: str, ranks: int) -> str:
    """The kind that "auto" stands for, or `kind`, checked.

    Raises:
        InputError: an unknown kind, or "none" for many processes.
    """
    if kind not in PARALLEL:
        raise InputError(f"unknown --parallel {kind!r}; known: {', '.join(PARALLEL)}")
    if kind == "none" and ranks > 1:
        raise InputError(
            f"--parallel none, but {ranks} processes were started: each trains alone; use ddp, fsdp or hybrid"
        )
    return kind if kind != "auto" else ("ddp" if ranks > 1 else "none")


def _mesh_shape(kind: str, ranks: int, shard_size: int | None) -> tuple[int, ...] | None:
    """Ranks along the mesh's dimensions: the last one shards."""
    if shard_size is not None and kind != "hybrid":
        raise InputError(f"--shard-size is for --parallel hybrid, not {kind}")
    if kind == "fsdp":
        return (ranks,)
    if kind != "hybrid":
        return None
    size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if size < 1 or ranks % size:
        raise InputError(
            f"--shard-size {size} does not divide {ranks} ranks; by default it is the ranks of a node"
        )
    return (ranks // size, size)


def _rank_device(name: str) -> torch.device:
    device = resolve_device(name)
    if device.type != "cuda" or device.index is not None:
        return device
    return resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")


# Of a rank beside its connections to the others: data workers' pipes, shared tensors, libraries, files.
_OTHER_FILES = 1024
_GROUPS = 2  # over all ranks: the default one, and that of background saves


def allow_connections(ranks: int) -> str | None:
    """Let this process open a connection to each of the other ranks in each group (gloo connects all pairs):
    raise the soft limit of open files, which most systems set to 1024.

    Returns:
        What was done, or what is still too low, in a line; None where the limit was high enough.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    needed = _GROUPS * (ranks - 1) + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    reached = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (reached, hard))
    why = f"{ranks} ranks need {needed}: {_GROUPS} connections to each other one, and {_OTHER_FILES} more"
    if reached < needed:
        return (
            f"warning: open files are limited to {hard}, and {why}; raise the hard limit "
            f"(`ulimit -Hn {needed}`, LimitNOFILE= in slurmd's unit, `docker run --ulimit nofile=...`)"
        )
    return f"note: raised the limit of open files from {soft} to {reached}; {why}"


@contextlib.contextmanager
def open_parallel(
    kind: str = "auto",
    device: str = "auto",
    *,
    shard_size: int | None = None,
    timeout: datetime.timedelta | None = None,
) -> Iterator[Parallel]:
    """Join the other processes of this run, as the launcher's environment describes them, and leave them at
    the end.

    Args:
        kind: see `Parallel`; "auto" is "ddp" with several processes, else "none".
        device: "auto", "cpu" or "cuda" (each rank takes the GPU of its LOCAL_RANK).
        shard_size: ranks that share one copy, for "hybrid"; None means those of a node.
        timeout: that a rank waits for another one; None: torch's own, for the steps of a training.

    Raises:
        InputError: a kind, device or shard size that does not fit what was started.
    """
    ranks = world_size()
    kind = resolve_kind(kind, ranks)
    shape = _mesh_shape(kind, ranks, shard_size)
    found = _rank_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if kind == "none":
        yield Parallel(device=found)
        return
    said = allow_connections(ranks)
    if said is not None and os.environ.get("RANK", "0") == "0":
        print(said, flush=True)
    with process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo", timeout):
        mesh = None
        if shape is not None:
            from torch.distributed.device_mesh import init_device_mesh

            mesh = init_device_mesh(found.type, shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        save_group = dist.new_group(backend="gloo")
        yield Parallel(
            rank=dist.get_rank(), world_size=ranks, kind=kind, device=found, mesh=mesh, save_group=save_group
        )
