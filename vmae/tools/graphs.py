"""A model as one file that runs without this package: `torch.export` (.pt2) and ONNX (.onnx), checked before
it is kept.

Input: float32 [B, 3, T, H, W], any B, values in [0, 1] minus ImageNet's mean over its deviation. The file
holds a description of this (`read_about`): frames, size, output, and class names where they are known.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmae.config import IMAGENET_MEAN, IMAGENET_STD
from vmae.errors import InputError
from vmae.files.json_files import parse_json
from vmae.model import Classifier

OUTPUTS = ("logits", "features", "tokens")
SUFFIXES = (".pt2", ".onnx")
TOLERANCE = 1e-4  # of the largest value
_ABOUT = "vmae.json"


class ExportError(InputError):
    """The file that was written does not do what the model does."""


class ClipModel(nn.Module):
    """A classifier as plain operators.

    Args:
        model: in eval mode, on the CPU, with torch's attention ("sdpa" or "softmax").
        output: "logits" [B, K], "features" [B, D] (what the head reads), or "tokens" [B, N, D] (after the
            last block).
    """

    def __init__(self, model: Classifier, output: str = "logits"):
        super().__init__()
        if output not in OUTPUTS:
            raise InputError(f"unknown output {output!r}; known: {', '.join(OUTPUTS)}")
        if output == "logits" and not model.num_classes:
            raise InputError("a model without a head has no logits; take --what features or tokens")
        self.model, self.output = model, output
        self.eval()

    def forward(self, clips: Tensor) -> Tensor:
        """float32 [B, 3, T, H, W], normalised."""
        x_BND = self.model.patch_embed.proj(clips).flatten(2).transpose(1, 2)
        if self.output == "tokens":
            return self.model.tokens_of_embedded(x_BND)
        features = self.model.features_of_embedded(x_BND)
        return self.model.head(features) if self.output == "logits" else features


def export_graph(model: ClipModel, path: Path, about: dict[str, Any] | None = None) -> float:
    """Write `path` (.pt2 or .onnx), load it again and compare it with the model on batches of 1 and 3.

    Args:
        about: additions to the description inside the file.

    Returns:
        The largest difference, as a share of the largest value.

    Raises:
        InputError: another ending, or a package is missing.
        ExportError: torch or ONNX refuses the model, the file can't be written, or its results are off; it is
            not kept.
    """
    check_packages(path)
    if not model.model.config.has_imagenet_pixels:
        raise InputError(
            f"a graph is for clips of 3 channels with ImageNet's mean and deviation, and the model takes "
            f"{model.model.config.in_channels} with statistics of its own"
        )
    write, load = (_write_pt2, _load_pt2) if path.suffix == ".pt2" else (_write_onnx, _load_onnx)
    config = model.model.config
    shape = (3, config.num_frames, *config.image_hw)
    known = {
        "input": "float32 [B, 3, T, H, W], RGB in [0, 1], minus mean, over std",
        "frames": config.num_frames,
        "size": list(config.image_hw),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "output": model.output,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, torch.no_grad(), _quiet():
        part = Path(folder) / path.name
        with _told(path):
            write(model, torch.zeros(2, *shape), part, json.dumps({**known, **(about or {})}))
            loaded = load(part)
        off = _compare(model, loaded, shape, path)
        # Large ONNX files have their weights beside; the named file comes last.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == part):
            os.replace(file, path.parent / file.name)
    return off


def check_packages(path: Path) -> None:
    """Check that the packages for a file of this ending are installed.

    Raises:
        InputError: another ending than .pt2 and .onnx, or a package is missing.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"output {path}: its name must end with {' or '.join(SUFFIXES)}")
    for name in ("onnx", "onnxscript", "onnxruntime") if path.suffix == ".onnx" else ():
        _import(name)


def read_about(path: str | Path) -> dict[str, Any]:
    """Description inside an exported file, see the module."""
    if Path(path).suffix == ".pt2":
        extra = {_ABOUT: ""}
        torch.export.load(path, extra_files=extra)
        return parse_json(extra[_ABOUT])
    onnx = _import("onnx")
    entries = onnx.load(path, load_external_data=False).metadata_props
    return parse_json({entry.key: entry.value for entry in entries}[_ABOUT])


def _compare(
    model: ClipModel, loaded: Callable[[Tensor], Tensor], shape: tuple[int, ...], path: Path
) -> float:
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in (1, 3):
        clips = torch.randn(batch, *shape, generator=generator)
        expected = model(clips)
        off = ((loaded(clips) - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
        if not off <= TOLERANCE:  # nor NaN
            raise ExportError(
                f"{path} is not written: its {model.output} of {batch} clips are {off:.1e} off the model's"
            )
        worst = max(worst, off)
    return worst


def _any_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1)},)


def _write_pt2(model: ClipModel, clips: Tensor, path: Path, about: str) -> None:
    program = torch.export.export(model, (clips,), dynamic_shapes=_any_batch())
    torch.export.save(program, path, extra_files={_ABOUT: about})


def _load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _write_onnx(model: ClipModel, clips: Tensor, path: Path, about: str) -> None:
    program = torch.onnx.export(
        model,
        (clips,),
        dynamo=True,
        verbose=False,
        input_names=["clips"],
        output_names=[model.output],
        dynamic_shapes=_any_batch(),
    )
    assert program is not None  # with dynamo
    program.model.metadata_props[_ABOUT] = about
    program.save(path)


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    session = _import("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])


def _import(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(f"ONNX needs {name} ({error}): `pip install onnx onnxscript onnxruntime`") from None


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns what the exporters raise into one line."""
    try:
        yield
    except Exception as error:  # theirs have no common class; a full disk is an OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"{path} is not written: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences notes of torch's exporter on packages that are not needed here."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(before)
