"""`python -m vmae export RUN_OR_CHECKPOINT OUT`: one file of weights with published names, for this and the published code."""

from __future__ import annotations

import argparse
from pathlib import Path

from vmae.errors import InputError
from vmae.interop.upstream import read_settings_and_weights
from vmae.train.checkpoint import export_weights, find_weights
from vmae.train.checks import check_output

SUFFIXES = (".pth", ".pt", ".safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("source", metavar="RUN|CHECKPOINT", help="a run's folder (its newest checkpoint), or one checkpoint")
    parser.add_argument("output", metavar="OUT.pth|OUT.safetensors", help="the file to write")


def run(args: argparse.Namespace) -> None:
    """The command: read, write, say what."""
    output = Path(args.output)
    if output.suffix not in SUFFIXES:
        raise InputError(f"output {output}: its name must end with {', '.join(SUFFIXES)}")
    check_output(output.parent)
    source = find_weights(args.source)
    settings, weights = read_settings_and_weights(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    export_weights(output, weights, **({"config": settings} if settings else {}))
    numbers = sum(value.numel() for value in weights.values())
    print(f"{source}: {len(weights)} tensors, {numbers / 1e6:.1f} M numbers, to {output}")
