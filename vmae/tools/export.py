"""`python -m vmae export RUN_OR_CHECKPOINT OUT`: weights under published names, or the model itself, as one
file.

`.pth` and `.safetensors` hold weights for this and the published code; `.pt2` (torch.export) and `.onnx` run
without either.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vmae.checkpoint.arguments import add_source_arguments
from vmae.checkpoint.classifier import load_classifier
from vmae.checkpoint.folder import AVERAGED_NAME, export_weights
from vmae.checkpoint.source import read_checkpoint
from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.evaluate.encoder import load_encoder
from vmae.flags import add_settings
from vmae.model import Classifier
from vmae.tools import graphs
from vmae.train.checks import check_output

SUFFIXES = (".pth", ".pt", ".safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument(
        "source", metavar="RUN|CHECKPOINT", help="a run's folder (its newest checkpoint), or one checkpoint"
    )
    parser.add_argument("output", metavar="OUT", help="the file to write: .pth, .safetensors; .pt2, .onnx")
    graph = parser.add_argument_group("for .pt2 and .onnx")
    graph.add_argument("--what", choices=graphs.OUTPUTS, help="of a clip; tokens of any encoder (logits)")
    graph.add_argument(
        "--averaged", action="store_true", help="take the averaged weights of the run (finetune --ema)"
    )
    add_settings(graph, ModelConfig, "num_frames img_size", unset="as in training")
    add_source_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """The command: read, write, say what."""
    output = Path(args.output)
    if output.suffix not in (*SUFFIXES, *graphs.SUFFIXES):
        raise InputError(
            f"output {output}: its name must end with {', '.join((*SUFFIXES, *graphs.SUFFIXES))}"
        )
    check_output(output.parent)
    if output.suffix in graphs.SUFFIXES:
        export_model(args, args.what or "logits", output)
        return
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("what", "averaged", "num_frames", "image_size")
        if getattr(args, name)
    ]
    if given:
        raise InputError(
            f"{', '.join(given)}: for {' and '.join(graphs.SUFFIXES)} only; {output.suffix} takes the "
            f"weights as they are (a run's averaged ones are in its {AVERAGED_NAME})"
        )
    export_file(args, output)


def export_file(args: argparse.Namespace, output: Path) -> None:
    """Write weights under their published names."""
    source = read_checkpoint(args.source)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"config": source.settings} if "model" in source.settings else {}
    export_weights(output, source.state, **about)
    if source.changed:
        print(source.changed)
    numbers = sum(value.numel() for value in source.state.values())
    print(f"{source.path}: {len(source.state)} tensors, {numbers / 1e6:.1f} M numbers, to {output}")


def export_model(args: argparse.Namespace, what: str, output: Path) -> None:
    """Write the model as a graph."""
    graphs.check_packages(output)
    source = (args.init_frames, args.init_size)
    model: Classifier
    if what == "tokens":
        if args.averaged:
            raise InputError(f"--averaged with --what tokens: name the run's {AVERAGED_NAME} as the source")
        changes = _given(num_frames=args.num_frames, img_size=args.image_size)
        encoder = load_encoder(args.source, preset=args.model, source=source, changes=changes)
        model, note, about = encoder.model, encoder.note, {}
    else:
        classifier = load_classifier(
            args.source,
            preset=args.model,
            averaged=args.averaged,
            source=source,
            clip=_given(num_frames=args.num_frames, image_size=args.image_size),
            attention="sdpa",
        )
        model, note = classifier.model, classifier.note
        about = {
            "classes": classifier.class_names,
            "stride": classifier.clip.stride,
            "sampling": classifier.clip.sampling,
        }
    if note:
        print(note, flush=True)
    off = graphs.export_graph(graphs.ClipModel(model, what), output, about)
    size = " x ".join(map(str, (model.config.num_frames, *model.config.image_hw)))
    print(
        f"{output}: {what} of clips 3 x {size}, any batch; loaded again, {off:.1e} off the model (of the "
        "largest value)"
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
