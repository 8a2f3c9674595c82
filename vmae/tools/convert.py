"""`python -m vmae convert SOURCE OUT`: weights to and from a folder that Hugging Face's transformers
reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vmae.checkpoint.folder import export_weights, find_weights
from vmae.checkpoint.huggingface import load_pretrained, read_class_names, read_multi_label, save_pretrained
from vmae.checkpoint.published import load_into, read_settings_and_weights
from vmae.checkpoint.source import source_config
from vmae.config import PRESETS, ModelConfig
from vmae.errors import InputError
from vmae.model import Classifier, Pretrainer, build_classifier, build_pretrainer
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
    source, output = Path(args.source), Path(args.output)
    check_output(output.parent)
    if (source / "config.json").is_file():
        if output.suffix not in SUFFIXES:
            raise InputError(f"output {output}: its name must end with {', '.join(SUFFIXES)}")
        model = load_pretrained(source, backend="torch")
        settings = {"model": model.config.to_dict()}
        if isinstance(model, Classifier):
            settings |= {
                "num_classes": model.num_classes,
                "class_names": read_class_names(source),
                "pooling": model.pooling,
            }
            settings["multi_label"] = read_multi_label(source)
        else:
            settings["normalize_target"] = model.normalize_target
        output.parent.mkdir(parents=True, exist_ok=True)
        export_weights(output, model.state_dict(), config=settings)
    else:
        if output.suffix in SUFFIXES:
            raise InputError(
                f"{source} is no folder of transformers (no config.json), and {output} would not be one "
                "either"
            )
        model, about = load_own(find_weights(source), args.model, args.num_frames, args.image_size)
        save_pretrained(model, output, **about)
    print(f"{source}: {len(model.state_dict())} tensors of a {type(model).__name__} to {output}")


def load_own(
    path: Path, preset: str | None, num_frames: int | None, image_size: int | None
) -> tuple[Pretrainer | Classifier, dict[str, Any]]:
    """The model of weights with published names, and what else `save_pretrained` wants to know.

    Raises:
        InputError: weights that do not say what they are, without a preset; or of another architecture.
    """
    settings, state = read_settings_and_weights(path)
    if "model" not in settings and preset is None:
        raise InputError(
            f"{path} does not say what model it is of; give --model (and --num-frames, --image-size)"
        )
    config, note = source_config(settings, state, path, preset, num_frames, image_size)
    if note:
        print(note.replace("--init-frames", "--num-frames").replace("--init-size", "--image-size"))
    if "mask_token" in state:
        model: Pretrainer | Classifier = build_pretrainer(
            config, normalize_target=settings.get("normalize_target", True)
        )
    else:
        classes = state["head.weight"].shape[0] if "head.weight" in state else 0
        pooling = "first" if "norm.weight" in state else "mean"
        model = build_classifier(config, classes, pooling=pooling)
    load_into(model, state, path)
    names = settings.get("class_names")
    return model, {
        "class_names": list(names) if names else None,
        "multi_label": bool(settings.get("multi_label")),
    }
