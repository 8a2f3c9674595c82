"""What every command checks before it writes anything: device, backend, attention, masks, output folder."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from pathlib import Path

import torch

from vmae.config import MaskConfig, ModelConfig, SpeedConfig
from vmae.errors import InputError
from vmae.masking import DualMask
from vmae.model.attention.choice import choose
from vmae.model.attention.probes import Workload
from vmae.train.compiled import why_not_compiled
from vmae_kernels import resolve_backend
from vmae_kernels.backend import OPERATIONS


def resolve_device(name: str) -> torch.device:
    """The device that `name` ("auto", "cpu", "cuda", "cuda:1") stands for here.

    Raises:
        InputError: an unknown name, or a GPU where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; known: auto, cpu, cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} asked for, but torch {torch.__version__} finds {torch.cuda.device_count()} "
            "GPUs here"
        )
    return device


def take_cpu(args: argparse.Namespace) -> None:
    """Change the flags to those of a command that loads a model and does not run it: any machine will do."""
    args.device, args.backend, args.attention = "cpu", "auto", "auto"


def check_backend(backend: str, device: torch.device) -> None:
    """Raises InputError where an operation has no such implementation."""
    for operation in OPERATIONS:
        try:
            resolve_backend(backend, operation, torch.empty(0, device=device))
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"--backend {backend}: {error}") from error


def check_channels(model: ModelConfig, backend: str) -> None:
    """Raises InputError where the kernels cannot take a model's clips, or nothing says how its channels are
    normalised."""
    if model.has_imagenet_pixels:
        return
    if backend == "triton":
        raise InputError(
            "--backend triton: its kernels are for 3 channels with ImageNet's mean and deviation, and the "
            f"model takes {model.in_channels} with statistics of its own: leave --backend out"
        )
    if model.channel_mean is None:
        raise InputError(
            f"--in-channels {model.in_channels} needs the mean and deviation of each channel: --channel-mean "
            f"and --channel-std, {model.in_channels} numbers each (`vmae check-data LIST --in-channels "
            f"{model.in_channels} --statistics` tells them)"
        )


def check_mask(mask: MaskConfig, grid: tuple[int, int, int]) -> None:
    """Raises InputError where a mask can't be drawn, or where some draws would leave the loss nothing to
    count."""
    one = DualMask.sample(1, grid, **mask.to_dict())
    total, visible, decoded = one.num_tokens, one.visible.shape[1], one.decode.shape[1]
    if mask.encoder == mask.decoder == "frame":  # whole frames are drawn
        total, visible, decoded = (count // (grid[1] * grid[2]) for count in (total, visible, decoded))
    elif mask.decoder != "random":  # some decoded token of every clip is hidden from the encoder
        return
    chance = math.comb(visible, decoded) / math.comb(total, decoded)
    if chance > 1e-9:
        raise InputError(
            f"the loss would count no token in 1 of {1 / chance:.0f} clips: the encoder may see all "
            f"{decoded} that the decoder rebuilds; lower the decoder's mask ratio or raise the encoder's"
        )


def resolve_compile(speed: SpeedConfig, device: torch.device) -> tuple[SpeedConfig, list[str]]:
    """`speed` with `compile` decided for `device`, and a line for the user where a GPU runs uncompiled.

    Raises:
        InputError: what was asked for needs compiled blocks, and they cannot be.
    """
    if speed.compile is not None:
        return speed, []
    reason = why_not_compiled(device)
    if reason is None:
        return dataclasses.replace(speed, compile=True), []
    if speed.recompute == "budget" or (speed.cuda_graphs and device.type == "cuda"):
        flag = "--cuda-graphs" if speed.cuda_graphs else "--recompute budget"
        raise InputError(f"{flag} needs compiled blocks, and these are not: {reason}; give --compile")
    notes = [f"note: blocks are not compiled: {reason}"] if device.type == "cuda" else []
    return dataclasses.replace(speed, compile=False), notes


def check_speed(
    speed: SpeedConfig, model: ModelConfig, dtype_name: str, device: torch.device, *, dropout: bool = False
) -> None:
    """Raises InputError where the named attention does not run at the model's head dims, or has no `dropout`
    that is asked for ("auto" always does), or where CUDA graphs are asked for without a GPU."""
    if speed.cuda_graphs and device.type != "cuda":
        raise InputError(f"--cuda-graphs needs a GPU, and the device is {device}")
    if speed.attention == "auto":
        return
    dtype = torch.float32
    if dtype_name == "bfloat16":
        dtype = torch.bfloat16
    for dim, heads in (
        (model.embed_dim, model.num_heads),
        (model.decoder_embed_dim, model.decoder_num_heads),
    ):
        use = {"head_dim": dim // heads, "compiled": bool(speed.compile), "dropout": dropout}
        choose(speed.attention, Workload.on(device, dtype=dtype, **use))


def check_output(folder: Path) -> None:
    """Raises InputError unless `folder` is, or can become, a folder to write to; it is not made."""
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"output folder {folder} is not writable: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"output folder {folder} is not writable: no permission to write to {place}")
