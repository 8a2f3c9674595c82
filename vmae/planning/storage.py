"""What packed clips take to make, to keep and to read while a planned model trains on them: bytes, shards,
index, requests, cores, core hours, money.

Rates were measured on a CPU by `bench/needs.py` and `bench/data.py`, on four short real videos; flags put
your own in their place. Prices are inputs only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vmae.config import _Checked
from vmae.data.manifest import VideoEntry
from vmae.data.mix import Mix
from vmae.data.needs import PACKED, Load, open_files
from vmae.data.shards.index import ShardIndex, bytes_per_sample
from vmae.data.shared_memory import PREFETCH, describe
from vmae.planning.budget import MemorySize, Plan
from vmae.settings import Real, Whole, setting

# --- Measured: bench/results/cpu/needs.json ---

PACKED_BYTES_PER_S = 62_400.0  # of a second of video, short side 256
PACK_CPU_S = 0.14  # of a second of video
CHECK_CPU_S = 0.016  # of a video

# --- Given ---

KEY_BYTES = 36  # a UUID, which curation pipelines name clips by
LINE_BYTES = len("clips/.mp4 0 -1\n") + KEY_BYTES  # of a list
ORDER_BYTES = 4  # of a sample, in the order of an epoch that each rank holds
TAR_BYTES = 3 * 1024  # of a sample: the heads of three members, and what fills them to 512
PREFIX_READS = 5500  # a second and prefix, that Amazon S3 says it gives at least (its performance guidelines)
SLOW_READS = 1e-4  # share of reads that are assumed to be slow, to show how many steps meet one
STORE = "data in shards, and the store that they lie in"


@dataclass(frozen=True, kw_only=True)
class Storage(_Checked):
    """Packed videos, and what they cost.

    Attributes:
        packed_bytes: of a video; None: by its seconds.
        videos_per_core: that one core decodes in a second; None: by the cost of decoding and of each clip.
        price_month, price_requests, price_transfer: in any currency; None: no costs are told.
    """

    group = STORE

    clip_seconds: float = setting(10.0, "of a video", Real(above=0, most=1e6), metavar="S")
    packed_bytes: float | None = setting(
        None,
        "of a packed video",
        Real(above=0, most=1e12),
        metavar="BYTES",
        unset=f"{PACKED_BYTES_PER_S:,.0f} a second, measured",
    )
    videos_per_core: float | None = setting(
        None,
        "packed videos that one core decodes in a second",
        Real(above=0, most=1e6),
        metavar="N",
        unset="measured",
    )
    pack_cpu: float = setting(
        PACK_CPU_S, "CPU seconds that packing a second of video takes", Real(above=0, most=1e6), metavar="S"
    )
    check_cpu: float = setting(
        CHECK_CPU_S, "CPU seconds that checking a video takes", Real(above=0, most=1e6), metavar="S"
    )
    pack_cores: int = setting(1000, "that pack and check, over all machines", Whole(1, 10**7), metavar="N")
    shard_bytes: float = setting(
        float(2**30), "of a shard: 1GiB, 512MiB", MemorySize(above=0, most=2**50), unset="1GiB"
    )
    price_month: float | None = setting(
        None, "of a GB that is kept for a month", Real(least=0, most=1e9), unset="not told"
    )
    price_requests: float | None = setting(
        None, "of a million reads", Real(least=0, most=1e9), unset="not told"
    )
    price_transfer: float | None = setting(
        None, "of a GB that is read", Real(least=0, most=1e9), unset="not told"
    )


@dataclass(frozen=True, kw_only=True)
class StoragePlan:
    """What follows for a list and a plan; rates and what rests on them are None without a known peak FLOP/s.

    Attributes:
        video_bytes: of a packed video in its shard.
        total_bytes, shards, index_bytes, list_bytes: of all.
        order_bytes: of one rank, for an epoch's order.
        pack_core_hours, check_core_hours: on one core; `pack_days`, `check_days`: on `pack_cores`.
        reads_per_s: requests, over all ranks; `read_bytes_per_s` too.
        epoch_reads: requests of an epoch.
        prefixes: that these reads need at `PREFIX_READS` each.
        cores: that decode, over all ranks; `gpu_cores`: for one GPU.
        ahead_s: seconds of training that the workers' batches made ahead last.
        slow_steps: share of steps that meet a slow read, where `SLOW_READS` are.
        checkpoint_bytes: of one checkpoint.
        month_price, epoch_price: of keeping, and of reading once; None without prices.
    """

    videos: int
    video_bytes: float
    total_bytes: float
    shards: int
    index_bytes: int
    list_bytes: int
    order_bytes: int
    pack_core_hours: float
    pack_days: float
    check_core_hours: float
    check_days: float
    epoch_reads: int
    reads_per_s: float | None
    read_bytes_per_s: float | None
    prefixes: int | None
    videos_per_core: float
    cores: float | None
    gpu_cores: float | None
    ahead_s: float | None
    slow_steps: float
    checkpoint_bytes: int
    month_price: float | None
    epoch_price: float | None


def with_known_bytes(storage: Storage, entries: Sequence[VideoEntry]) -> Storage:
    """`storage` with the mean bytes of a video and its packet table, of an index."""
    index = entries.entries if isinstance(entries, Mix) else entries
    if storage.packed_bytes is not None or not isinstance(index, ShardIndex) or not len(index):
        return storage
    mean = float(index.columns["length"].mean() + index.columns["table_length"].mean())
    return storage.replace(packed_bytes=mean)


def plan_storage(plan: Plan, storage: Storage, videos: int) -> StoragePlan:
    """What `videos` of a list take, while the recommended row of `plan` trains on them.

    Args:
        videos: of the list, without repeats.
    """
    work, gpus, best = plan.workload, plan.cluster.gpus, plan.best
    packed = storage.packed_bytes or storage.clip_seconds * PACKED_BYTES_PER_S
    video_bytes = packed + TAR_BYTES
    pack_hours = videos * storage.clip_seconds * storage.pack_cpu / 3600
    check_hours = videos * storage.check_cpu / 3600
    rate = None if best is None or best.clips_per_s is None else best.clips_per_s / work.num_sample
    per_core = storage.videos_per_core or PACKED.videos_per_s(work.num_sample)
    epoch_price = month_price = None
    if storage.price_requests is not None or storage.price_transfer is not None:
        epoch_price = work.videos / 1e6 * (storage.price_requests or 0)
        epoch_price += work.videos * packed / 1e9 * (storage.price_transfer or 0)
    total = videos * video_bytes
    if storage.price_month is not None:
        month_price = total / 1e9 * storage.price_month
    ahead = work.num_workers * PREFETCH * work.batch_size
    return StoragePlan(
        videos=videos,
        video_bytes=video_bytes,
        total_bytes=total,
        shards=math.ceil(total / storage.shard_bytes),
        index_bytes=videos * bytes_per_sample(KEY_BYTES),
        list_bytes=videos * LINE_BYTES,
        order_bytes=work.videos * ORDER_BYTES,
        pack_core_hours=pack_hours,
        pack_days=pack_hours / storage.pack_cores / 24,
        check_core_hours=check_hours,
        check_days=check_hours / storage.pack_cores / 24,
        epoch_reads=work.videos,
        reads_per_s=rate,
        read_bytes_per_s=rate and rate * packed,
        prefixes=None if rate is None else math.ceil(rate / PREFIX_READS),
        videos_per_core=per_core,
        cores=rate and rate / per_core,
        gpu_cores=rate and rate / per_core / gpus,
        ahead_s=rate and ahead * gpus / rate,
        slow_steps=1 - (1 - SLOW_READS) ** work.effective_batch,
        checkpoint_bytes=12 * plan.parameters,
        month_price=month_price,
        epoch_price=epoch_price,
    )


def node_load(plan: Plan, batch_bytes: int, checkpoints: int, remote: bool = False) -> Load:
    """What the ranks of one of the planned machines ask of it.

    Args:
        batch_bytes: clips of a micro-batch; 0 where no workers make them.
        checkpoints: kept at once.
        remote: whether shards are read from an object store.
    """
    work, cluster, best = plan.workload, plan.cluster, plan.best
    rate = None if best is None or best.clips_per_s is None else best.clips_per_s / work.num_sample
    return Load(
        workers=work.num_workers if batch_bytes else 0,
        batch_bytes=batch_bytes,
        ranks=min(cluster.gpus_per_node, cluster.gpus),
        world=cluster.gpus,
        videos_per_s=rate and rate / cluster.gpus,
        num_sample=work.num_sample,
        checkpoint_bytes=12 * plan.parameters,
        checkpoints=checkpoints,
        remote=remote,
    )


def storage_lines(found: StoragePlan, storage: Storage, gpus: int) -> list[str]:
    """The plan of the data, for people."""
    lines = [
        "",
        f"data: {found.videos:,} videos of {storage.clip_seconds:g} s, packed: {_tera(found.total_bytes)} in "
        f"{found.shards:,} shards of {describe(int(storage.shard_bytes))}; index {_giga(found.index_bytes)}, "
        f"list {_giga(found.list_bytes)}",
        f"packing: {found.pack_core_hours:,.0f} core hours, {found.pack_days:.3g} days on "
        f"{storage.pack_cores:,} cores; checking: {found.check_core_hours:,.0f} core hours, "
        f"{found.check_days:.2g} days",
        f"memory for it: index {_giga(found.index_bytes)} a machine (mapped, shared by its ranks), order of "
        f"an epoch {_giga(found.order_bytes)} a rank",
    ]
    if found.reads_per_s is not None and found.cores is not None and found.read_bytes_per_s is not None:
        lines += [
            f"reading: {found.reads_per_s:,.0f} requests/s, {found.read_bytes_per_s / 1e9:.3g} GB/s; "
            f"{found.epoch_reads:,} requests an epoch; {found.prefixes} prefix"
            f"{'es' * (found.prefixes != 1)} at {PREFIX_READS:,} reads/s each",
            f"slow reads: {found.slow_steps:.0%} of steps meet a read that is as slow as 1 in "
            f"{1 / SLOW_READS:,.0f}; {found.ahead_s:.2g} s of batches are made ahead",
            f"decoding: {found.cores:,.1f} cores at {found.videos_per_core:.3g} videos/s each, "
            f"{found.gpu_cores:.3g} a GPU",
        ]
    seconds = found.checkpoint_bytes / 1e9
    lines.append(f"checkpoint: {_giga(found.checkpoint_bytes)}, {seconds:.3g} s for a disk of 1 GB/s")
    if found.month_price is not None:
        lines.append(f"keeping the shards: {found.month_price:,.0f} a month")
    if found.epoch_price is not None:
        lines.append(f"reading them: {found.epoch_price:,.0f} an epoch")
    return lines


def need_line(load: Load) -> str:
    """What one machine needs beside GPUs and shared memory, for people."""
    cores = "" if load.cores is None else f"{load.cores:.3g} cores for decoding, "
    workers = ""
    if load.videos_per_s is not None and load.workers:
        wanted = math.ceil(load.videos_per_s / load.decode.videos_per_s(load.num_sample))
        workers = f" (--workers {wanted})" if wanted > load.workers else ""
    return (
        f"a machine needs: {cores}{describe(load.memory_bytes)} of memory, "
        f"{open_files(load.workers, load.world)} open files a process, {describe(load.disk_bytes)} of disk "
        f"for checkpoints{workers}; `vmae doctor` tells what it has"
    )


def _tera(size: float) -> str:
    return f"{size / 1e12:.3g} TB"


def _giga(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
