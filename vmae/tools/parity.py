"""`python -m vmae parity FILE...`: this code against golden files of the published code.

A file holds inputs and outputs in float32; weights are made from the parameters' names. Everything is read
from the file's `meta`, so any architecture that the published constructors describe is checked, whatever the
file is called.
"""

from __future__ import annotations

import argparse
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae.checkpoint.published import config_from_arch
from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.files.json_files import parse_json
from vmae.masking import DualMask, running_cell_states
from vmae.model import (
    Pretrainer,
    ReferencePretrainer,
    build_classifier,
    build_pretrainer,
    build_reference,
)
from vmae.train.optim import OptimConfig, build_optimizer, clip_gradients

# Largest error allowed in float32 on a CPU, by kind of output.
BOUNDS = {
    "loss": 1e-4,  # relative
    "trajectory": 1e-4,  # relative
    "pred": 1e-4,  # absolute
    "features": 1e-4,  # absolute
    "logits": 1e-4,  # absolute
    "gradients": 1e-3,  # relative
    "masks": 0.0,  # exact
}
TINY = 1e-12  # gradients below this are rounding in float32


def golden_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """float32 weights that golden files assume for parameter `name`."""
    values = 0.02 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    weight = torch.from_numpy(np.asarray(values, dtype=np.float32))
    if name.endswith(".weight") and len(shape) == 1:
        weight = weight + 1
    if name.endswith((".gamma_1", ".gamma_2")):
        weight = weight + 0.1
    return weight


@torch.no_grad()
def fill_golden(model: nn.Module) -> nn.Module:
    """Give every parameter its golden weight; returns `model` in eval mode."""
    for name, parameter in model.named_parameters():
        parameter.copy_(golden_weight(name, tuple(parameter.shape)))
    return model.eval()


def golden_clip(arrays: dict[str, np.ndarray], meta: dict[str, Any], config: ModelConfig) -> Tensor:
    """uint8 [B, T, H, W, 3]: stored, or made from the seed when it was too large to store."""
    if arrays["clip"].size:
        return torch.from_numpy(arrays["clip"])
    shape = (meta["batch"], config.num_frames, *config.image_hw, 3)
    return torch.from_numpy(np.random.RandomState(meta["clip_seed"]).randint(0, 256, shape).astype(np.uint8))


def relative(got: float, expected: float) -> float:
    return abs(got - expected) / max(abs(expected), TINY)


def gradient_errors(model: nn.Module, arrays: dict[str, np.ndarray]) -> float:
    """Largest relative error over the stored norms, and over the stored first entries of gradients.

    Entries are compared as vectors: the norm of their difference over the norm of what is stored.
    """
    worst = 0.0
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for key, stored in arrays.items():
        kind, _, name = key.partition("/")
        if kind not in ("grad", "gradnorm"):
            continue
        if name not in gradients:
            raise InputError(
                f"the file has a gradient of {name}, which this model does not have or does not train"
            )
        gradient = gradients[name].double()
        if kind == "gradnorm":
            worst = max(worst, relative(float(gradient.norm()), float(stored)))
        else:
            expected = torch.from_numpy(stored).double()
            got = gradient.flatten()[: expected.numel()]
            worst = max(worst, float((got - expected).norm() / expected.norm().clamp_min(TINY)))
    return worst


def train_like_published(
    model: nn.Module, compute_loss: Callable[[], Tensor], settings: dict[str, Any]
) -> list[float]:
    """Losses of `steps` AdamW steps on one batch, with gradient clipping."""
    if settings["name"].lower() != "adamw":
        raise InputError(f"optimizer {settings['name']!r} of the file is not supported; only AdamW")
    optim = OptimConfig(
        lr=settings["lr"],
        betas=settings["betas"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        clip_grad=settings.get("clip_grad"),
    )
    optimizer = build_optimizer(model, optim)
    losses = []
    for _ in range(settings["steps"]):
        optimizer.zero_grad(set_to_none=True)
        loss = compute_loss()
        loss.backward()
        clip_gradients(model, optim.clip_grad)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def freeze_untrained(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """The published code detaches some parameters (learned positions): those without a stored gradient do not
    train."""
    stored = {key.partition("/")[2] for key in arrays if key.startswith("gradnorm/")}
    if stored:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in stored)


def check_training(
    model: nn.Module, compute_loss: Callable[[], Tensor], arrays: dict[str, np.ndarray], meta: dict[str, Any]
) -> dict[str, float]:
    """Errors of loss, gradients and trajectory; trains `model`."""
    freeze_untrained(model, arrays)
    loss = compute_loss()
    loss.backward()
    errors = {"loss": relative(float(loss.detach()), float(arrays["loss"]))}
    if any(key.startswith(("grad/", "gradnorm/")) for key in arrays):
        errors["gradients"] = gradient_errors(model, arrays)
    if "trajectory" in arrays and arrays["trajectory"].size:
        settings = {**meta["optimizer"], "steps": arrays["trajectory"].size}
        losses = train_like_published(model, compute_loss, settings)
        errors["trajectory"] = max(
            relative(got, float(want)) for got, want in zip(losses, arrays["trajectory"])
        )
    return errors


def check_pretrain(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], backend: str, attention: str
) -> dict[str, float]:
    config = config_from_arch(meta["arch"])
    normalize = bool(meta.get("normalize_target", True))
    model: Pretrainer | ReferencePretrainer
    if backend == "reference":
        model = build_reference(config, normalize_target=normalize)
    else:
        model = build_pretrainer(config, backend=backend, attention=attention, normalize_target=normalize)
    fill_golden(model)
    clips = golden_clip(arrays, meta, config)
    masks = (torch.from_numpy(arrays[key]) for key in ("enc_mask", "dec_mask"))
    mask = DualMask.from_bool(*masks)
    errors = {}
    if "pred" in arrays:
        with torch.no_grad():
            pred = model.predict(clips, mask)
        expected = torch.from_numpy(arrays["pred"])
        errors["pred"] = float((pred[:, : expected.shape[1]] - expected).abs().max())
    return errors | check_training(model, lambda: model(clips, mask), arrays, meta)


def check_classify(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], backend: str, attention: str
) -> dict[str, float]:
    arch = meta["arch"]
    config = config_from_arch(arch)
    backend = "torch" if backend == "reference" else backend
    pooling = "mean" if arch.get("use_mean_pooling", True) else "first"
    model = build_classifier(
        config, arch["num_classes"], pooling=pooling, backend=backend, attention=attention
    )
    fill_golden(model)
    clips, labels = golden_clip(arrays, meta, config), torch.from_numpy(arrays["labels"]).long()
    errors = {}
    with torch.no_grad():
        outputs: dict[str, Callable[[Tensor], Tensor]] = {"features": model.features, "logits": model}
        for key in outputs.keys() & arrays.keys():
            errors[key] = float((outputs[key](clips) - torch.from_numpy(arrays[key])).abs().max())
    if "loss" in arrays:
        errors |= check_training(model, lambda: F.cross_entropy(model(clips), labels), arrays, meta)
    return errors


def check_running_cell(arrays: dict[str, np.ndarray], meta: dict[str, Any], *_: str) -> dict[str, float]:
    states = running_cell_states(tuple(meta["window"]), meta["ratio"]).numpy()
    stored = arrays["masks"].reshape(arrays["masks"].shape[0], -1).astype(bool)
    return {"masks": float((states != stored).mean()) if states.shape == stored.shape else 1.0}


CHECKS: dict[str, Callable[..., dict[str, float]]] = {
    "pretrain": check_pretrain,
    "classify": check_classify,
    "running_cell": check_running_cell,
}


def check_file(path: str | Path, backend: str = "torch", attention: str = "auto") -> dict[str, float]:
    """Largest error of each kind of output in one golden file.

    Raises:
        InputError: the file is missing, no golden file, or describes what this code does not know; it is
            named.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        meta = parse_json(str(arrays.pop("meta")))
        check = CHECKS[meta["kind"]]
    except FileNotFoundError as error:
        raise InputError(f"golden file {path} does not exist") from error
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        known = ", ".join(CHECKS)
        raise InputError(f"{path} is not a golden file with a meta of kind {known}: {error}") from error
    try:
        return check(arrays, meta, backend, attention)
    except KeyError as error:
        raise InputError(f"{path}: the file lacks {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def passed(errors: dict[str, float]) -> bool:
    """Whether every error is a number within its bound."""
    return all(error <= BOUNDS[kind] for kind, error in errors.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="golden .npz files")
    parser.add_argument(
        "--backend",
        default="torch",
        choices=("torch", "triton", "auto", "reference"),
        help="fused operations to check; reference is the plain model (default: torch)",
    )
    parser.add_argument(
        "--attention", default="auto", help="attention backend; `doctor` lists them (default: auto)"
    )


def run(args: argparse.Namespace) -> int:
    failed = 0
    width = max(len(Path(file).name) for file in args.files)
    for file in args.files:
        errors = check_file(file, args.backend, args.attention)
        good = passed(errors)
        failed += not good
        text = "  ".join(f"{kind} {error:.1e}" for kind, error in errors.items())
        print(f"{'ok  ' if good else 'FAIL'}  {Path(file).name:{width}}  {text}", flush=True)
    print(f"{len(args.files) - failed} of {len(args.files)} files ok")
    return 1 if failed else 0
