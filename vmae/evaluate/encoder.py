"""Encoder of any checkpoint, pre-trained or fine-tuned, and the middle clip of a video, for the commands
`attention` and `pca`."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae.checkpoint.arguments import add_source_arguments
from vmae.checkpoint.models import to_model
from vmae.checkpoint.source import read_checkpoint
from vmae.config import ModelConfig
from vmae.data import crop_and_resize, open_video
from vmae.data.augment import center_crop
from vmae.data.guarded import guarded
from vmae.data.manifest import VideoEntry
from vmae.data.sampling import clip_starts, sample_sparse_indices, walk_frames
from vmae.data.video_reader import VideoReader
from vmae.flags import add_settings
from vmae.model import Classifier
from vmae.train.pretrain_settings import PretrainConfig, RunConfig


@dataclass
class LoadedEncoder:
    """An encoder in eval mode on the CPU.

    Attributes:
        model: encoder without a head; `model.tokens(clip)` gives its output tokens.
        path: file of the weights.
        pretrained: whether the weights are pre-trained only, so that the encoder never saw a whole clip.
        sampling, stride: how clips were sampled in training, see `middle_clip`.
        note: what was changed while reading, and settings that the file does not hold and that were assumed,
            a line each; or empty.
    """

    model: Classifier
    path: Path
    pretrained: bool
    sampling: str
    stride: int
    note: str = ""

    def describe(self) -> str:
        """Kind and size of the encoder, for titles."""
        kind = "encoder of a classifier"
        if self.pretrained:
            kind = "pre-trained encoder, shown all tubelets"
        return f"{kind}, {self.model.config.depth} blocks of {self.model.config.num_heads} heads"


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `load_encoder_from_args` reads."""
    parser.add_argument("video", metavar="VIDEO", help="a video file")
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR|FILE", help="a run's folder, a checkpoint, or weights"
    )
    add_settings(parser, RunConfig, "device")
    clip = parser.add_argument_group("clip of the video (default: as in training)")
    add_settings(clip, PretrainConfig, "stride", unset="as in training")
    add_settings(clip, ModelConfig, "num_frames img_size", unset="as in training")
    add_source_arguments(parser)


def load_encoder_from_args(args: argparse.Namespace) -> LoadedEncoder:
    """`load_encoder` with the flags of `add_encoder_arguments`; prints its note."""
    changes = {"num_frames": args.num_frames, "img_size": args.image_size}
    loaded = load_encoder(
        args.checkpoint,
        preset=args.model,
        stride=args.stride,
        source=(args.init_frames, args.init_size),
        changes={name: value for name, value in changes.items() if value is not None},
    )
    if loaded.note:
        print(loaded.note, flush=True)
    return loaded


def load_encoder(
    checkpoint: str | Path,
    *,
    preset: str | None = None,
    stride: int | None = None,
    source: tuple[int | None, int | None] = (None, None),
    changes: dict[str, Any] | None = None,
) -> LoadedEncoder:
    """The encoder of a checkpoint; decoder and head are left out.

    Args:
        checkpoint: see `read_checkpoint`.
        preset: architecture, for files that do not say it.
        stride: to see videos with; None takes that of the training.
        source: frames and side of the clips that the weights are of, for files that do not say it.
        changes: fields of the `ModelConfig` to change: `num_frames`, `img_size`; positions are interpolated.

    Raises:
        InputError: the file can't be read, does not tell its architecture, or does not fit it.
    """
    read = read_checkpoint(checkpoint, preset=preset, frames=source[0], size=source[1])
    model, _ = to_model(read, "encoder", changes)
    clip = read.settings.get("clip", {})
    if stride is None:
        stride = clip.get("stride", read.settings.get("stride", 4))
    note = "\n".join(read.lines)
    return LoadedEncoder(model, read.path, read.pretrained, clip.get("sampling", "dense"), stride, note)


def middle_clip(
    video: VideoEntry | str | Path, config: ModelConfig, stride: int, sampling: str = "dense"
) -> tuple[Tensor, list[int]]:
    """Middle clip of a video, cropped to the largest centred box of the model's aspect ratio.

    The video is decoded in a worker process, see `guarded`.

    Args:
        sampling: "dense" (the published sampling with `stride`), or "sparse" (frames spread over the whole
            video).

    Returns:
        Clip, uint8 [1, T, H, W, 3] (of other channels in the frames' dtype), and its T frame numbers.

    Raises:
        InputError: the video can't be decoded, decoding takes too long, or the stride is below 1.
    """
    return guarded(functools.partial(_decode_middle, config=config, stride=stride, sampling=sampling), video)


def _decode_middle(
    video: VideoEntry | str | Path, config: ModelConfig, stride: int, sampling: str
) -> tuple[Tensor, list[int]]:
    with open_video(video) as reader:
        reader.channels = config.in_channels
        return middle_of(reader, config, stride, sampling)


def middle_of(
    reader: VideoReader, config: ModelConfig, stride: int, sampling: str
) -> tuple[Tensor, list[int]]:
    """`middle_clip` of an open video."""
    starts = clip_starts(len(reader), config.num_frames, stride)
    if sampling == "sparse":
        indices = sample_sparse_indices(len(reader), config.num_frames, None)
    else:
        indices = walk_frames(starts[len(starts) // 2], len(reader), config.num_frames, stride)
    frames = reader.frames(indices)
    box = center_crop(frames.shape[2], frames.shape[1], config.image_hw)
    return torch.from_numpy(crop_and_resize(frames, box, config.image_hw))[None], indices.tolist()
