"""`python -m vmae convert SOURCE OUT`: weights into a folder that Hugging Face's transformers reads, or back
from one."""

from __future__ import annotations

import argparse
from pathlib import Path

from vmae.checkpoint import (
    Source,
    export_weights,
    find_weights,
    kind_of,
    read_checkpoint,
    save_pretrained,
    to_model,
)
from vmae.checkpoint.folder import CONFIG_NAME
from vmae.checkpoint.huggingface import is_pretrained
from vmae.config import PRESETS, ModelConfig
from vmae.errors import InputError
from vmae.model import Classifier, Pretrainer
from vmae.settings import limits
from vmae.train.checks import check_output

SUFFIXES = (".pth", ".pt", ".safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    text = "a folder of transformers, or a run, a checkpoint or weights of this or the published code"
    parser.add_argument("source", metavar="SOURCE", help=text)
    parser.add_argument(
        "output", metavar="OUT", help="the other one: a file (.pth, .safetensors), or a folder to make"
    )
    parser.add_argument(
        "--model", help=f"preset of weights that do not say what they are: {', '.join(PRESETS)}"
    )
    parser.add_argument("--num-frames", type=limits(ModelConfig, "num_frames"), help="of such weights (16)")
    parser.add_argument("--image-size", type=limits(ModelConfig, "img_size"), help="of such weights (224)")


def run(args: argparse.Namespace) -> None:
    """The command: read, write, say what."""
    output = Path(args.output)
    check_output(output.parent)
    folder = find_weights(args.source)
    is_file = output.suffix in SUFFIXES
    if is_pretrained(folder) and not is_file:
        raise InputError(f"output {output}: its name must end with {', '.join(SUFFIXES)}")
    if not is_pretrained(folder) and is_file:
        raise InputError(
            f"{folder} is no folder of transformers (no {CONFIG_NAME}), and {output} would not be one either"
        )
    source = read_checkpoint(args.source, preset=args.model, frames=args.num_frames, size=args.image_size)
    model = load_own(source)
    settings = source.settings
    if is_file:
        output.parent.mkdir(parents=True, exist_ok=True)
        export_weights(output, model.state_dict(), config=settings)
    else:
        names, multi_label = settings.get("class_names"), bool(settings.get("multi_label"))
        save_pretrained(model, output, list(names) if names else None, multi_label=multi_label)
    print(f"{args.source}: {len(model.state_dict())} tensors of a {type(model).__name__} to {output}")


def load_own(source: Source) -> Pretrainer | Classifier:
    """The model of all weights of a checkpoint; prints what was assumed of it.

    Raises:
        InputError: weights that do not say what they are, without a preset; or of another architecture.
    """
    if source.known is None and not source.unknown:
        raise InputError(
            f"{source.path} does not say what model it is of; give --model (and --num-frames, --image-size)"
        )
    if source.lines:
        text = "\n".join(source.lines)
        print(text.replace("--init-frames", "--num-frames").replace("--init-size", "--image-size"))
    model, _ = to_model(source, kind_of(source))
    return model
