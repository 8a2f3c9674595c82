"""Clips to step on: real ones or noise."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from harness.stepping import SEED
from vmae import InputError, MaskConfig, ModelConfig

if TYPE_CHECKING:
    from vmae.data import PretrainDataset, VideoEntry

STRIDE = 4


def add_input(parser: argparse.ArgumentParser) -> None:
    text = "real (the sample clips), synthetic, a list file; auto: real if there"
    parser.add_argument("--input", default="auto", help=text)


def choose_input(source: str) -> str:
    """`source`; "auto" becomes "real" where the sample videos and a decoder are, else "synthetic", with a
    note."""
    if source != "auto":
        return source
    from vmae.data.decode import find_backends
    from vmae.synthetic.samples import sample_videos

    try:
        sample_videos()
        find_backends("video", "auto")
    except InputError as error:
        print(f"note: synthetic clips, nothing is decoded: {error}")
        return "synthetic"
    return "real"


def read_entries(source: str) -> Sequence[VideoEntry]:
    """Entries of the sample videos ("real") or of a list file."""
    from vmae.data import read_list
    from vmae.synthetic.samples import write_sample_list

    with tempfile.TemporaryDirectory() as folder:
        if source == "real":
            return read_list(write_sample_list(Path(folder) / "samples.txt"))
        return read_list(source)


def open_dataset(source: str, batch: int, config: ModelConfig) -> PretrainDataset:
    """Dataset of at least `batch` samples an epoch, with the default masks."""
    from vmae.data import PretrainDataset

    entries = read_entries(source)
    return PretrainDataset(
        entries,
        num_frames=config.num_frames,
        stride=STRIDE,
        image_size=config.image_hw,
        grid=config.grid,
        mask=MaskConfig(),
        repeat=-(-batch // len(entries)),
        seed=SEED,
    )


def load_clips(source: str, batch: int, config: ModelConfig) -> torch.Tensor:
    """uint8 [B, T, H, W, 3]: real clips of the sample videos or of a list, or noise."""
    if source == "synthetic":
        shape = (batch, config.num_frames, *config.image_hw, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))
    dataset = open_dataset(source, batch, config)
    return torch.cat([dataset[(0, i)].clips for i in range(batch)])
