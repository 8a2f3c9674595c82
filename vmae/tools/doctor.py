"""`python -m vmae doctor`: what is installed here, what runs, and what each missing thing costs.

Nothing is assumed from version numbers alone: a package is found by importing it, in this process.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmae.data.dali import dali_missing
from vmae.data.decode import BACKENDS as VIDEO_BACKENDS
from vmae.errors import InputError
from vmae.flags import add_settings
from vmae.model.attention.choice import BACKENDS, auto_order, runnable
from vmae.model.attention.probes import Workload
from vmae.settings import Whole
from vmae.train.pretrain_settings import RunConfig
from vmae_kernels import resolve_backend
from vmae_kernels.device import why_too_old

SCHEMA = "vmae-doctor/1"
HEAD_DIMS = (64, 80, 88)  # ViT-S, B, L; ViT-H; ViT-g


@dataclass(frozen=True, kw_only=True)
class Part:
    """An optional package.

    Attributes:
        name: shown to the user.
        group: what it is for.
        module: import name.
        packages: distributions that may provide it.
        install: what to type.
        without: what it costs not to have it.
        gpu: of no use without a GPU.
        probe: what else keeps it from working once it imports; None where nothing does.
    """

    name: str
    group: str
    module: str
    packages: tuple[str, ...]
    install: str
    without: str
    gpu: bool = False
    probe: Callable[[], str | None] = lambda: None


def video_lack(name: str) -> Callable[[], str | None]:
    """The probe of a decoding backend."""
    return lambda: VIDEO_BACKENDS[name].missing()


PARTS = (
    Part(
        name="triton",
        group="kernels",
        module="triton",
        packages=("triton",),
        gpu=True,
        install="pip install triton (the version that torch requires)",
        without="the fused operations run in PyTorch: more kernel launches and more memory traffic",
    ),
    Part(
        name="decord",
        group="video",
        module="decord",
        packages=("decord", "decord2"),
        install="pip install decord, or decord2 (newer Pythons, AV1); never both",
        without="nothing: PyAV reads all that it reads; only bench/data.py's baseline is gone",
    ),
    Part(
        name="torchcodec",
        group="video",
        module="torchcodec",
        packages=("torchcodec",),
        install="pip install 'torchcodec>=0.13,<0.14', and FFmpeg's libraries (apt-get install ffmpeg); 0.13 loads with torch "
        "2.13 on a CPU, 0.14 to 0.17 link CUDA libraries",
        without="nothing: PyAV reads the same files, H.264 faster",
        probe=video_lack("torchcodec"),
    ),
    Part(
        name="PyAV",
        group="video",
        module="av",
        packages=("av",),
        install="pip install av",
        probe=video_lack("pyav"),
        without="AVI, MPEG-TS and many open GOPs are refused, H.264 is slower, `vmae pack` and DALI's loader do not run",
    ),
    Part(
        name="DALI",
        group="video",
        module="nvidia.dali",
        packages=("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        gpu=True,
        install="pip install nvidia-dali-cuda130 (200 MB)",
        probe=dali_missing,
        without="videos are decoded by CPU cores instead of the GPU's decoder",
    ),
    Part(
        name="flash-attn",
        group="attention",
        module="flash_attn",
        packages=("flash-attn",),
        gpu=True,
        install=BACKENDS["flash2"].install,
        without="attention falls to torch's kernels, which stack three gradients a layer",
    ),
    Part(
        name="flash-attn-3",
        group="attention",
        module="flash_attn_interface",
        packages=("flash_attn_3", "flash-attn-3"),
        gpu=True,
        install=BACKENDS["flash3"].install,
        without="Hopper's own attention kernels are not used",
    ),
    Part(
        name="flash-attn-4",
        group="attention",
        module="flash_attn.cute",
        packages=("flash-attn-4",),
        gpu=True,
        install=BACKENDS["flash4"].install,
        without="Blackwell's own attention kernels are not used",
    ),
    Part(
        name="xformers",
        group="attention",
        module="xformers.ops",
        packages=("xformers",),
        gpu=True,
        install=BACKENDS["xformers"].install,
        without="nothing where another attention backend runs",
    ),
    Part(
        name="safetensors",
        group="files",
        module="safetensors",
        packages=("safetensors",),
        install="pip install safetensors",
        without=".safetensors weights can be neither read nor written",
    ),
    Part(
        name="transformers",
        group="files",
        module="transformers",
        packages=("transformers",),
        install="pip install transformers",
        without="no exchange of models with Hugging Face's VideoMAE classes",
    ),
    Part(
        name="tensorboard",
        group="files",
        module="tensorboard",
        packages=("tensorboard",),
        install="pip install tensorboard",
        without="metrics go to log.jsonl only",
    ),
    Part(
        name="matplotlib",
        group="files",
        module="matplotlib",
        packages=("matplotlib",),
        install="pip install matplotlib",
        without="no plots and no reconstruction pictures",
    ),
)


def _version(packages: tuple[str, ...]) -> tuple[str, str] | None:
    for package in packages:
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def look_for(part: Part) -> dict[str, Any]:
    """Whether it imports, its version, and the reason if it does not."""
    known = _version(part.packages)
    record = {
        "name": part.name,
        "group": part.group,
        "found": False,
        "package": known and known[0],
        "version": known and known[1],
        "reason": None,
        "install": part.install,
        "without": part.without,
        "gpu": part.gpu,
    }
    try:
        if importlib.util.find_spec(part.module) is None:
            record["reason"] = "not installed"
            return record
        module = importlib.import_module(part.module)
        record["reason"] = part.probe()
        record["found"] = record["reason"] is None
        record["version"] = record["version"] or getattr(module, "__version__", None)
    except ModuleNotFoundError as error:
        here = error.name and part.module.startswith(error.name)
        record["reason"] = "not installed" if here else f"does not import: {error}"
    except Exception as error:  # shared libraries of another torch or CUDA: OSError, RuntimeError and more
        record["reason"] = f"does not import: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return record


def look_at_attention(
    device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...]
) -> list[dict[str, Any]]:
    """One record per backend: head dims it runs with, and the reason why not, for training on equal and
    packed sequences."""
    workloads = [Workload.on(device, dtype=dtype, head_dim=head_dim) for head_dim in head_dims]
    packed = [Workload.on(device, dtype=dtype, head_dim=head_dim, packed=True) for head_dim in head_dims]
    records = []
    for name, backend in BACKENDS.items():
        dense_reasons = {w.head_dim: backend.why_not(w) for w in workloads}
        packed_reasons = {w.head_dim: backend.why_not(w) for w in packed}
        reasons = dense_reasons if backend.call is not None else packed_reasons
        runs = [head_dim for head_dim, reason in reasons.items() if reason is None]
        failed = {head_dim: reason for head_dim, reason in reasons.items() if reason is not None}
        reason = None
        if failed:
            first = next(iter(failed))
            reason = failed[first] if not runs else f"head dim {first}: {failed[first]}"
        records.append(
            {
                "name": name,
                "text": backend.text,
                "runs": runs,
                "packed": [head_dim for head_dim, text in packed_reasons.items() if text is None],
                "reason": reason,
                "version": backend.version(),
                "tiles": {head_dim: backend.tiles(head_dim, device.type == "cuda") for head_dim in head_dims},
                "install": backend.install,
            }
        )
    return records


def look_at_auto(device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...]) -> dict[str, Any]:
    """What `auto` takes, by head dim, and whether the order behind it was measured."""
    workloads = [Workload.on(device, dtype=dtype, head_dim=head_dim) for head_dim in head_dims]
    taken = {w.head_dim: next(name for name in auto_order(w)[0] if name in runnable(w)) for w in workloads}
    return {
        "takes": taken,
        "order": list(auto_order(workloads[0])[0]),
        "measured": auto_order(workloads[0])[1],
    }


def look_at_video() -> dict[str, Any]:
    """Which decoders `auto` tries, the first first, and what is wrong with those that are installed, if
    anything."""
    order = [
        name
        for name, backend in VIDEO_BACKENDS.items()
        if "video" in backend.kinds and backend.missing() is None
    ]
    clash = _version(("decord",)) is not None and _version(("decord2",)) is not None
    note = "decord and decord2 are both installed and share an import name: pip uninstall one, reinstall the other"
    return {"order": order, "note": note if clash else None}


def look_at_machine(device: torch.device) -> dict[str, Any]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        capability = f"{known.major}.{known.minor}"
        gpus.append({"name": known.name, "capability": capability, "gib": round(known.total_memory / 2**30)})
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": gpus,
        "kernels": resolve_backend("auto", "embed_visible", torch.empty(0, device=device)),
        "kernels_note": why_too_old(device) if device.type == "cuda" else None,
    }


def examine(
    device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...] = HEAD_DIMS
) -> dict[str, Any]:
    """Everything that `doctor` prints, as JSON can hold it."""
    return {
        "schema": SCHEMA,
        "machine": look_at_machine(device),
        "workload": {
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "head_dims": list(head_dims),
        },
        "attention": look_at_attention(device, dtype, head_dims),
        "auto": look_at_auto(device, dtype, head_dims),
        "video": look_at_video(),
        "parts": [look_for(part) for part in PARTS],
    }


# --- print --------------------------------------------------------------------------------------------------


def _table(rows: list[tuple[str, ...]], say: Callable[[str], None]) -> None:
    """The last column is not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        say("  " + "  ".join([cell.ljust(width) for cell, width in zip(row, widths)] + [row[-1]]).rstrip())


def _attention_row(record: dict[str, Any], head_dims: list[int]) -> tuple[str, ...]:
    runs = "yes" if record["runs"] == head_dims else ", ".join(map(str, record["runs"])) or "no"
    padded = []
    for head_dim, tiles in record["tiles"].items():
        if tiles is None:
            padded.append("?")
        elif tiles != (head_dim, head_dim):
            padded.append(f"{head_dim} to {' and '.join(str(w) for w in dict.fromkeys(tiles))}")
    text = record["text"] if record["reason"] is None else record["reason"]
    return (
        record["name"],
        runs,
        record["version"] or "-",
        "?" if "?" in padded else ", ".join(padded) or "none",
        text,
    )


def report(found: dict[str, Any], say: Callable[[str], None] = print) -> None:
    machine, workload = found["machine"], found["workload"]
    say(f"python {machine['python']}, {machine['system']}, {machine['cores']} cores")
    cuda = f"CUDA {machine['cuda']}, cuDNN {machine['cudnn']}" if machine["cuda"] else None
    hip = f"ROCm {machine['hip']}" if machine["hip"] else None
    say(f"torch {machine['torch']}: {cuda or hip or 'built without CUDA'}")
    for gpu in machine["gpus"]:
        say(f"GPU: {gpu['name']}, compute capability {gpu['capability']}, {gpu['gib']} GiB")
    if not machine["gpus"]:
        say("no GPU: everything runs on the CPU")
    say(
        f"fused operations: {machine['kernels']}"
        + (f" ({machine['kernels_note']})" if machine["kernels_note"] else "")
    )

    head_dims = workload["head_dims"]
    shapes = ", ".join(map(str, head_dims))
    say(f"\nattention backends, training on {workload['device']} in {workload['dtype']}, head dims {shapes}")
    rows = [("backend", "runs", "version", "pads to", "what it is, or why not")]
    _table(rows + [_attention_row(record, head_dims) for record in found["attention"]], say)
    auto = found["auto"]
    taken = ", ".join(dict.fromkeys(auto["takes"].values()))
    order = (
        "measured on this class of device"
        if auto["measured"]
        else "expected, not measured on this class of device"
    )
    say(f"  auto takes {taken}; its order, {order}: {', '.join(auto['order'])}")

    order = ", ".join(found["video"]["order"])
    say(
        f"\nvideo files: auto decodes with the first of {order}"
        if order
        else "\nvideo files: none can be decoded"
    )
    if found["video"]["note"]:
        say(f"  {found['video']['note']}")

    say("\npackages")
    rows = [("package", "for", "version", "")]
    for part in found["parts"]:
        rows.append(
            (part["name"], part["group"], part["version"] or "-", "" if part["found"] else part["reason"])
        )
    _table(rows, say)
    missing = [part for part in found["parts"] if not part["found"]]
    if missing:
        say("\nmissing, and what that costs")
    for part in missing:
        use = " (of no use here: there is no GPU)" if part["gpu"] and not machine["gpus"] else ""
        say(f"  {part['name']}: {part['without']}{use}\n    {part['install']}")


# --- command line -------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, RunConfig, "device")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="of attention (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    parser.add_argument(
        "--head-dim",
        type=Whole(1, 4096),
        nargs="+",
        default=list(HEAD_DIMS),
        metavar="N",
        help="of attention (default: the presets')",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there")


def run(args: argparse.Namespace) -> int:
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        )
    except RuntimeError as error:
        raise InputError(f"--device {args.device}: torch knows no such device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: torch sees no GPU here; use --device cpu")
    dtype = DTYPES[args.dtype] if args.dtype else (torch.bfloat16 if device.type == "cuda" else torch.float32)
    found = examine(device, dtype, tuple(dict.fromkeys(args.head_dim)))
    report(found)
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"--json {args.json}: {error.strerror}") from error
        print(f"\nwritten: {args.json}")
    return 0
