"""What a prepared run needs of its machine, and a warning for each thing that is short; see
`vmae.data.needs`."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vmae.data.needs import RANK_BYTES, Load, find_needs, open_files
from vmae.data.shards.entries import is_address
from vmae.files.limits import raise_open_files
from vmae.model.cost import peak_flops
from vmae.train.prepare import Prepared
from vmae.train.pretrain_settings import local_ranks
from vmae.train.task import ModelTask

MFU = 0.35  # of a GPU's peak, assumed
CPU_RANK_BYTES = 512 << 20  # Python and torch, without CUDA


def load_of(prepared: Prepared) -> Load | None:
    """What the ranks of this machine ask of it; None for a task that reads no videos."""
    task, run, parallel = prepared.task, prepared.run, prepared.parallel
    if not isinstance(task, ModelTask):
        return None
    parameters = list(prepared.model.parameters())
    elements = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    checkpoint = 4 * (elements + 2 * trained + (elements if task.averaged else 0))
    workers = run.speed.num_workers if task.loader == "cpu" else 0
    entries = prepared.dataset.entries
    return Load(
        workers=workers,
        batch_bytes=task.batch_bytes() if task.loader == "cpu" else 0,
        ranks=local_ranks(),
        world=parallel.world_size,
        videos_per_s=_videos_per_s(prepared) if task.loader == "cpu" else None,
        num_sample=prepared.config.num_sample,
        checkpoint_bytes=checkpoint,
        checkpoints=_new_checkpoints(prepared),
        staged_bytes=checkpoint // parallel.world_size if run.async_save else 0,
        rank_bytes=max(0, rank_bytes(prepared.device, elements) - _resident_bytes()),
        output=run.output,
        remote=is_address(entries[0].path) or is_address(entries[-1].path),
        pinned=prepared.device.type == "cuda",
    )


def warn_of_shortages(prepared: Prepared) -> list[str]:
    """Raise the limit of open files to what this rank needs; on rank 0, a line for each shortage."""
    load = load_of(prepared)
    if load is None:
        return []
    raise_open_files(open_files(load.workers, load.world))
    if not prepared.parallel.is_main:
        return []
    return [f"warning: {need.describe()}" for need in find_needs(load) if need.short]


def rank_bytes(device: torch.device, parameters: int) -> int:
    """Host memory of a rank's main process, beside its batches."""
    if device.type == "cuda":
        return RANK_BYTES
    return CPU_RANK_BYTES + 16 * parameters  # weights, gradients, two moments


def device_name(device: torch.device) -> str:
    """Name of a GPU; "cpu" of anything else."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def predict_rate(name: str, dtype: str, flops_per_clip: float | None, num_sample: int) -> float | None:
    """Videos a second that a model takes on the GPU `name` at `MFU` of its peak; None where that is not
    known."""
    peak = peak_flops(name, dtype)
    return MFU * peak / flops_per_clip / num_sample if peak and flops_per_clip else None


def _videos_per_s(prepared: Prepared) -> float | None:
    """That the model of one rank takes, predicted; None where its device's peak is not known."""
    config, name = prepared.config, device_name(prepared.device)
    return predict_rate(name, config.dtype, prepared.task.flops_per_clip(), config.num_sample)


def _new_checkpoints(prepared: Prepared) -> int:
    """How many more the run's folder will hold at once than it does now."""
    run, steps = prepared.run, prepared.total_steps - prepared.start_step
    written = -(-steps // run.save_every)
    kept = run.keep + 1 + prepared.task.validates - len(prepared.checkpoints.paths())
    more = steps // run.keep_every if run.keep_every else 0
    return max(0, min(written + 1, max(1, kept) + more))


def _resident_bytes() -> int:
    """Memory that this process has already; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
