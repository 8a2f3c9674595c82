"""`python -m vmae COMMAND`: one table of commands; each lives in the module that does the work.

A command's module has `add_arguments(parser)` and `run(args) -> int | None`. Input that a person can mend
ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from typing import NoReturn

from vmae.errors import InputError

# name: (module, what it does)
COMMANDS = {
    "pretrain": ("vmae.train.pretrain", "pre-train a model with dual masking on a list of videos"),
    "finetune": (
        "vmae.train.finetune",
        "train a classifier on labelled videos: post-pre-training, fine-tuning, probes",
    ),
    "finetune-detection": (
        "vmae.train.detection",
        "train a detector of actions on annotated key frames, as on AVA",
    ),
    "distil": ("vmae.train.distill", "train a small classifier on what a large one makes of the clips"),
    "evaluate": (
        "vmae.evaluate.classify",
        "test a classifier on many views of each video: top-1, top-5, a table, a picture",
    ),
    "detect": (
        "vmae.evaluate.detection",
        "what the people in given boxes do at key frames: AVA's CSV, frame mAP, pictures",
    ),
    "predict": ("vmae.evaluate.predict", "name the classes of one video"),
    "features": ("vmae.evaluate.features", "features of a video's windows, for temporal detection"),
    "detect-temporal": (
        "vmae.evaluate.temporal_detect",
        "train a temporal detector on features, and test it: segments, mAP",
    ),
    "export": (
        "vmae.tools.export",
        "write a run's weights (.pth, .safetensors) or the model itself (.pt2, .onnx) as a file",
    ),
    "convert": (
        "vmae.tools.convert",
        "weights to and from a folder that transformers (Hugging Face) reads",
    ),
    "plan": (
        "vmae.planning.plan",
        "tell what a pre-training run will need: memory, largest batch, hours, clips a second",
    ),
    "curves": ("vmae.tools.curves", "plot the logs of several runs together"),
    "reconstruct": (
        "vmae.evaluate.reconstruct",
        "draw what a checkpoint rebuilds of a video, as a picture or an animation",
    ),
    "masks": ("vmae.evaluate.mask_pictures", "draw every type of mask, with its counts"),
    "attention": ("vmae.evaluate.attention_maps", "draw where the encoder's attention goes in a video"),
    "pca": ("vmae.evaluate.pca", "draw the principal components of the encoder's tokens beside a video"),
    "serve": (
        "vmae.tools.serve",
        "a page on this machine: drop in a video, see masks, reconstruction and classes",
    ),
    "samples": (
        "vmae.synthetic.samples",
        "write a list file of the four real clips that come with a test dependency",
    ),
    "moving-shapes": (
        "vmae.synthetic.moving_shapes",
        "make videos whose class is a motion, with two label sets that overlap",
    ),
    "moving-actors": (
        "vmae.synthetic.moving_actors",
        "make videos of two actors with boxes and actions as AVA has them",
    ),
    "moving-segments": (
        "vmae.synthetic.moving_segments",
        "make videos of several motions, and their temporal detection set",
    ),
    "merge-labels": ("vmae.data.merge_labels", "make one label set from several, as Kinetics-710 is made"),
    "check-data": (
        "vmae.data.check",
        "open every video of a list: table, report, histogram, a list without the bad ones",
    ),
    "pack": (
        "vmae.data.pack",
        "re-encode a list's videos so that clips decode fast: short side 256, a key frame every 12",
    ),
    "parity": ("vmae.tools.parity", "check golden files of the published code"),
    "doctor": ("vmae.tools.doctor", "tell what is installed, what runs here, and what is missing"),
}


# Commands whose flags are made in a module of their own: their `--help` imports no model.
SETTINGS = {
    "pretrain": "vmae.train.pretrain_settings",
    "finetune": "vmae.train.finetune_settings",
    "finetune-detection": "vmae.train.detection_settings",
    "distil": "vmae.train.distil_settings",
}


class _Parser(argparse.ArgumentParser):
    """A wrong command line gets one line, like any other wrong input, not the list of all flags before it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (`{self.prog} --help` tells what there is)")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only `command`'s module is imported, so that others' optional packages are not needed."""
    parser = _Parser(prog="python -m vmae", description="Pre-training of video transformers.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            importlib.import_module(SETTINGS.get(name, module)).add_arguments(sub)
            sub.set_defaults(module=module)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command = next((word for word in argv if word in COMMANDS), None)
    # What this package says of itself (which attention backend "auto" took) goes to stderr, as plain lines.
    logging.getLogger("vmae").setLevel(logging.INFO)
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.INFO)
    try:
        args = build_parser(command).parse_args(argv)
        if "settings" in args:
            args.settings.complete(args)
        return importlib.import_module(args.module).run(args) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
