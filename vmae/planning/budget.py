"""What a pre-training run needs of given machines: memory of one GPU, the largest batch, FLOPs, hours, clips
a second.

Bytes are counted (`vmae.planning.memory`); hours follow from FLOPs and an assumed utilisation. Nothing here
is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vmae.config import CHECKPOINTING, DTYPE, MaskConfig, ModelConfig, OptimConfig, _Checked
from vmae.errors import InputError
from vmae.model import build_pretrainer
from vmae.model.cost import masked_macs
from vmae.model.target import Pixels, Target
from vmae.planning.memory import Activations, Memory, count_activations, state_bytes
from vmae.settings import BATCH, SHARE_ABOVE_0, SHARE_BELOW_1, STEPS, WORKERS, Real, Whole, ranged, setting
from vmae.train.optim import USUAL_OPTIM
from vmae.train.recompute_choice import RESERVE

UNLABELED_HYBRID = 1_350_000  # videos, VideoMAE V2, section 4.1
# The fewest clips on a GPU at once that a recommendation avoids recomputation for: below, its matrix products
# are small.
ENOUGH_CLIPS = 16
_GPUS = Whole(1, 10**6)
MACHINES = "machines and assumptions"


class MemorySize(Real):
    """Bytes; on a command line "80GiB", "80GB" or "80" (GiB)."""

    units = {"": 2**30, "G": 2**30, "GIB": 2**30, "GB": 10**9, "MIB": 2**20, "MB": 10**6}

    def read(self, text: str) -> float:
        match = re.fullmatch(r"([\d.]+)\s*([a-zA-Z]*)", text.strip())
        if not match or match[2].upper() not in self.units:
            raise ValueError(text)
        return float(match[1]) * self.units[match[2].upper()]

    def __str__(self) -> str:
        return "a memory size above 0 and at most 1 PiB, such as 80GiB or 80GB"


def published_recipe(model: str) -> Path | None:
    """The settings file of a model's published pre-training; None where there is none."""
    package = Path(__file__).parents[1]
    folders = (package / "recipes", package.parent / "recipes")  # installed; in the repository
    found = (folder / f"pretrain_{model.replace('_', '')}.yaml" for folder in folders)
    return next((path for path in found if path.is_file()), None)


@dataclass(frozen=True, kw_only=True)
class Cluster(_Checked):
    """The machines of a run.

    Attributes:
        shard_size: GPUs that share one copy of the state in hybrid sharding; None means those of a node.
        peak_flops: of one GPU in the run's dtype, FLOP/s; None where it is not known: then no time is told.
    """

    group = MACHINES

    gpus: int = setting(8, "all GPUs of the run", _GPUS)
    gpus_per_node: int = setting(8, "GPUs of one machine", _GPUS)
    shard_size: int | None = ranged(None, _GPUS)
    memory: float = setting(
        80.0 * 2**30, "of one GPU: 80GiB, 40GB", MemorySize(above=0, most=2**50), unset="80GiB"
    )
    reserve: float = setting(RESERVE, "share left to CUDA, NCCL and the allocator", SHARE_BELOW_1)
    peak_flops: float | None = ranged(989e12, Real(above=0, most=1e18))
    mfu: float = setting(0.5, "share of the peak FLOP/s that is reached", SHARE_ABOVE_0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise InputError(
                f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}; give --gpus-per-node"
            )

    @property
    def nodes(self) -> int:
        return max(1, self.gpus // self.gpus_per_node)

    def shardings(self, parallel: str = "auto") -> dict[str, int]:
        """Name of every way to spread the state, least communication first: number of GPUs that share one
        copy of it.

        Raises:
            InputError: `parallel` names one that these machines don't have.
        """
        part = self.shard_size or self.gpus_per_node
        if self.gpus % part:
            raise InputError(f"--shard-size {part} does not divide {self.gpus} GPUs")
        known = {"none": 1} if self.gpus == 1 else {"ddp": 1, "hybrid": part, "fsdp": self.gpus}
        if parallel == "auto":
            return {
                name: sharers for name, sharers in known.items() if name != "hybrid" or 1 < part < self.gpus
            }
        if parallel not in known:
            raise InputError(
                f"--parallel {parallel} does not fit {self.gpus} GPUs; known there: {', '.join(known)}"
            )
        return {parallel: known[parallel]}


@dataclass(frozen=True, kw_only=True)
class Workload(_Checked):
    """One optimizer step, and how many of them.

    Attributes:
        batch_size: videos on a GPU at once.
        num_sample: clips of a video.
        effective_batch: videos of an optimizer step, over all GPUs and accumulated batches.
        videos: of the list, times its repeats.
        epochs: of the run; `steps` instead of epochs where it is given.
        dtype: "bfloat16" (autocast or FSDP's mixed precision) or "float32".
        num_workers: processes of a GPU that decode.
    """

    group = MACHINES

    batch_size: int = ranged(32, BATCH)
    num_sample: int = ranged(4, BATCH)
    effective_batch: int = ranged(2048, Whole(1, 2**40))
    videos: int = setting(
        UNLABELED_HYBRID, "in the list", Whole(1, 10**15), unset="those of --data, else {default}"
    )
    epochs: int = ranged(300, Whole(1, 10**9))
    steps: int | None = ranged(None, STEPS)
    dtype: str = ranged("bfloat16", DTYPE)
    num_workers: int = ranged(1, WORKERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.videos < self.effective_batch:
            raise InputError(
                f"{self.videos} videos do not fill one step of {self.effective_batch}; "
                "give --repeat (visits of a video in an epoch), or a smaller effective batch"
            )

    @property
    def total_steps(self) -> int:
        return self.steps or self.epochs * (self.videos // self.effective_batch)

    @property
    def clips_per_step(self) -> int:
        return self.effective_batch * self.num_sample

    def accumulate(self, gpus: int) -> int:
        """Batches of an optimizer step on each GPU."""
        return max(1, round(self.effective_batch / (gpus * self.batch_size)))

    def batch_within(self, largest: int, gpus: int) -> int:
        """The largest batch up to `largest` that gives the effective batch by accumulation, if any does."""
        share = self.effective_batch // gpus
        return next((b for b in range(min(largest, share), 0, -1) if share % b == 0), 0)


@dataclass(frozen=True)
class Row:
    """One way to run: a checkpointing and a sharding, at the requested batch.

    Attributes:
        recompute: "on", "off" or "budget", see `vmae.train.activations`; bytes of budget are those of on.
        memory: at `batch_size` videos.
        fits: into the GPU's memory, less the reserve.
        largest_batch: videos that fit, with recomputation where they ask for it; 0 where the state alone is
            too large.
        executed_flops: of an optimizer step on all GPUs, recomputation included.
        mfu: what is left of the assumed utilisation when recomputed FLOPs don't count.
        step_s, hours, clips_per_s: at the assumed utilisation of what is executed; None without a known peak.
    """

    checkpointing: str
    recompute: str
    sharding: str
    batch_size: int
    memory: Memory
    fits: bool
    largest_batch: int
    executed_flops: float
    mfu: float
    step_s: float | None
    hours: float | None
    clips_per_s: float | None


@dataclass(frozen=True)
class Plan:
    """All rows, and what they share: `model_flops` of a step (3 forward passes, and one of the target's), the
    parameters' number, the target in words, the values that it has for a token, the MACs of a clip's."""

    config: ModelConfig
    mask: MaskConfig
    cluster: Cluster
    workload: Workload
    parameters: int
    model_flops: float
    rows: list[Row]
    target: str = ""
    target_width: int = 0
    target_macs: int = 0
    student_macs: int = 0

    @property
    def best(self) -> Row | None:
        """Least recomputation, then least communication, of what fits: at the batch asked for, else at the
        largest."""
        fitting = [row for row in self.rows if row.fits]
        if fitting:
            return min(fitting, key=lambda row: row.executed_flops)  # rows come in the order of communication
        enough = math.ceil(ENOUGH_CLIPS / self.workload.num_sample)
        smaller = [row for row in self.rows if row.largest_batch >= enough]
        if smaller:
            return min(smaller, key=lambda row: row.executed_flops)
        largest = max(self.rows, key=lambda row: row.largest_batch)
        return largest if largest.largest_batch else None


def make_plan(
    config: ModelConfig,
    mask: MaskConfig,
    cluster: Cluster,
    workload: Workload,
    *,
    checkpointing: str | None = None,
    parallel: str = "auto",
    recompute: Sequence[str] = ("off", "budget"),
    optim: OptimConfig = USUAL_OPTIM,
    target: Target | None = None,
) -> Plan:
    """Every checkpointing with every sharding, or the named ones. Seconds for any model; nothing of its size
    is allocated.

    Args:
        recompute: the first of these that fits, else the last, stands in a row without checkpointing; the
            last in the others.
        optim: whose state is counted.
        target: what is predicted; None are pixels.
    """
    shardings = cluster.shardings(parallel)
    predicted = target or Pixels(config)
    target = None if isinstance(predicted, Pixels) else predicted  # counted alike, once
    with torch.device("meta"):
        model = build_pretrainer(config, backend="torch", target=predicted)
    student, values = masked_macs(config, mask, width=predicted.width), predicted.macs()
    model_flops = (6.0 * student + 2.0 * values) * workload.clips_per_step
    counted = functools.lru_cache(count_activations)
    plain = counted(config, mask, workload.dtype, "none", target=target)
    rows = []
    for name in [checkpointing] if checkpointing else CHECKPOINTING:
        for sharding, sharers in shardings.items():
            state = state_bytes(model, sharers, workload.dtype, workload.accumulate(cluster.gpus), optim)
            ways = []
            for way in recompute if name == "none" else recompute[-1:]:
                activations = counted(
                    config, mask, workload.dtype, name, recompute=way != "off", target=target
                )
                recomputed = (activations.flops - plain.flops) * workload.clips_per_step
                kind = (name, way, sharding)
                held = (*state, predicted.state_bytes())
                ways.append(_row(*kind, held, activations, model_flops, recomputed, cluster, workload))
            row = next((row for row in ways if row.fits), ways[-1])
            rows.append(dataclasses.replace(row, largest_batch=max(row.largest_batch for row in ways)))
    parameters = sum(p.numel() for p in model.parameters())
    about = (predicted.describe(), predicted.width, values, student)
    return Plan(config, mask, cluster, workload, parameters, model_flops, rows, *about)


def _row(
    checkpointing: str,
    recompute: str,
    sharding: str,
    held: tuple[int, int, int, int, int],
    activations: Activations,
    model_flops: float,
    recomputed: float,
    cluster: Cluster,
    workload: Workload,
) -> Row:
    clips = workload.batch_size * workload.num_sample
    parameters, gradients, optimizer, gathered, target = held
    memory = Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        gathered=gathered,
        activations=activations.saved(clips),
        working=activations.working(clips),
        target=target,
    )
    usable = cluster.memory * (1 - cluster.reserve)
    fitting = activations.most_clips(usable - sum(held)) / workload.num_sample
    executed = model_flops + recomputed
    rate = cluster.gpus * (cluster.peak_flops or 0) * cluster.mfu
    step_s = executed / rate if rate else None
    return Row(
        checkpointing,
        recompute,
        sharding,
        workload.batch_size,
        memory,
        memory.total <= usable,
        max(0, math.floor(fitting)),
        executed,
        cluster.mfu * model_flops / executed,
        step_s,
        workload.total_steps * step_s / 3600 if step_s else None,
        workload.clips_per_step / step_s if step_s else None,
    )
