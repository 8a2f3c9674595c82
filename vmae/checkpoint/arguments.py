"""Flags of commands that read a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from vmae.checkpoint.classifier import LoadedClassifier, load_classifier
from vmae.config import ModelConfig, StartSettings
from vmae.data.classify_dataset import ClipConfig
from vmae.flags import add_settings


def add_model_arguments(parser: argparse.ArgumentParser, *, views: bool = True) -> None:
    """Add the flags that `load_from_args` reads.

    Args:
        views: whether the command looks at test views; `features` has pixels of its own.
    """
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR|FILE", help="a run's folder, a checkpoint, or weights"
    )
    parser.add_argument(
        "--averaged", action="store_true", help="take the averaged weights of the run (finetune --ema)"
    )
    parser.add_argument(
        "--label-map",
        metavar="FILE.json",
        help="turn a head of more classes into one of these; none: take it as it is",
    )
    clip = parser.add_argument_group("how videos are seen (default: as in training)")
    add_settings(clip, ClipConfig, "sampling stride", unset="as in training")
    add_settings(clip, ModelConfig, "num_frames img_size", unset="as in training")
    if views:
        add_settings(clip, ClipConfig, "resize", unset="as in training")
        add_settings(clip, ClipConfig, "short_side", unset="as in training; with --image-size, that")
    add_source_arguments(parser)


def add_source_arguments(
    parser: argparse.ArgumentParser, files: str = "official files"
) -> argparse._ArgumentGroup:
    """Add the flags for what official files do not say of themselves.

    Args:
        files: which files these are, for the help text.

    Returns:
        The group of these flags.
    """
    model = parser.add_argument_group(f"for weights that do not say what they are ({files})")
    add_settings(model, StartSettings, "model init_frames init_size")
    return model


def load_from_args(args: argparse.Namespace, **options: Any) -> LoadedClassifier:
    """`load_classifier` with the flags of `add_model_arguments`."""
    names = ("sampling", "stride", "resize", "short_side", "num_frames", "image_size")
    changes = {name: getattr(args, name, None) for name in names}
    return load_classifier(
        args.checkpoint,
        preset=args.model,
        averaged=args.averaged,
        label_map=args.label_map,
        source=(args.init_frames, args.init_size),
        clip={name: value for name, value in changes.items() if value is not None},
        **options,
    )
