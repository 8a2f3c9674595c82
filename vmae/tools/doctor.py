"""`python -m vmae doctor`: installed packages, what runs on this machine, and the cost of each missing
package.

A package counts as found only if it imports in this process; version numbers alone prove nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmae.config import ModelConfig, ModelSettings
from vmae.data.dali import dali_missing
from vmae.data.decode import BACKENDS as VIDEO_BACKENDS
from vmae.data.decode import video_backends
from vmae.data.needs import Load, find_needs
from vmae.data.shards.entries import is_address
from vmae.data.shared_memory import FOLDER, SharedMemory, batches_bytes, describe, find_shared_memory, remedy
from vmae.errors import InputError
from vmae.files.limits import find_cores, find_memory, find_open_files
from vmae.flags import Settings, add_settings
from vmae.model import build_pretrainer
from vmae.model.attention.choice import BACKENDS, auto_order, runnable
from vmae.model.attention.probes import Workload
from vmae.model.cost import masked_macs
from vmae.settings import Whole
from vmae.train import pretrain_settings
from vmae.train.compiled import why_not_compiled
from vmae.train.needs import MFU, device_name, predict_rate, rank_bytes
from vmae.train.pretrain_settings import PretrainConfig, RunConfig
from vmae_kernels import resolve_backend
from vmae_kernels.device import why_too_old
from vmae_kernels.optional_triton import WHY_MISSING

SCHEMA = "vmae-doctor/1"
HEAD_DIMS = (64, 80, 88)  # ViT-S, B, L; ViT-H; ViT-g


@dataclass(frozen=True, kw_only=True)
class Part:
    """Optional package.

    Attributes:
        name: name shown to the user.
        group: purpose: kernels, video, attention or files.
        module: import name.
        packages: distributions that may provide the module.
        install: command that installs it.
        without: cost of not having it.
        gpu: whether it is useful with a GPU only.
        probe: function that gives the reason why the package does not work although it imports, or None.
    """

    name: str
    group: str
    module: str
    packages: tuple[str, ...]
    install: str
    without: str
    gpu: bool = False
    probe: Callable[[], str | None] = lambda: None


def video_parts() -> list[Part]:
    """The libraries of the decoding backends."""
    parts = []
    for name in video_backends():
        backend = VIDEO_BACKENDS[name]
        if backend.library is not None:
            parts.append(Part(**vars(backend.library), group="video", probe=backend.missing))
    return parts


def _attention_install(name: str) -> str:
    """Command that installs an optional attention backend."""
    return BACKENDS[name].install or ""


PARTS = (
    Part(
        name="triton",
        group="kernels",
        module="triton",
        packages=("triton",),
        gpu=True,
        install="pip install triton (Linux only; the version that torch requires)",
        without="the fused operations run in PyTorch: more kernel launches and more memory traffic",
    ),
    *video_parts(),
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
        install=_attention_install("flash2"),
        without="attention falls to torch's kernels, which stack three gradients a layer",
    ),
    Part(
        name="flash-attn-3",
        group="attention",
        module="flash_attn_interface",
        packages=("flash_attn_3", "flash-attn-3"),
        gpu=True,
        install=_attention_install("flash3"),
        without="Hopper's own attention kernels are not used",
    ),
    Part(
        name="flash-attn-4",
        group="attention",
        module="flash_attn.cute",
        packages=("flash-attn-4",),
        gpu=True,
        install=_attention_install("flash4"),
        without="Blackwell's own attention kernels are not used",
    ),
    Part(
        name="xformers",
        group="attention",
        module="xformers.ops",
        packages=("xformers",),
        gpu=True,
        install=_attention_install("xformers"),
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
        name="huggingface_hub",
        group="files",
        module="huggingface_hub",
        packages=("huggingface_hub",),
        install="pip install 'vmae[hub]'",
        without="names of the Hugging Face hub (hub:OWNER/NAME) are refused; files need a download by hand",
    ),
    Part(
        name="obstore",
        group="files",
        module="obstore",
        packages=("obstore",),
        install="pip install 'vmae[store]'",
        without="indexes and shards in object stores (s3://, gs://, az://, https://) are refused",
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
    """(name, version) of the first of these distributions that is installed."""
    for package in packages:
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def look_for(part: Part) -> dict[str, Any]:
    """Record of an optional package: whether it works, its version, and the reason if it does not."""
    package, version = _version(part.packages) or (None, None)
    record: dict[str, Any] = {
        "name": part.name,
        "group": part.group,
        "found": False,
        "package": package,
        "version": version,
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
        itself = error.name and part.module.startswith(error.name)
        record["reason"] = "not installed" if itself else f"does not import: {error}"
    except Exception as error:  # shared libraries of another torch or CUDA: OSError, RuntimeError and more
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        record["reason"] = f"does not import: {first_line}"
    return record


def look_at_attention(
    device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Record of each attention backend: the head dims that it runs with, for training on batches and on
    packed sequences, and the reason why it does not run with the others."""
    workloads = [Workload.on(device, dtype=dtype, head_dim=head_dim) for head_dim in head_dims]
    packed = [Workload.on(device, dtype=dtype, head_dim=head_dim, packed=True) for head_dim in head_dims]
    records = []
    for name, backend in BACKENDS.items():
        dense_reasons = {w.head_dim: backend.why_not(w) for w in workloads}
        packed_reasons = {w.head_dim: backend.why_not(w) for w in packed}
        reasons = packed_reasons if backend.call is None else dense_reasons
        runs = [head_dim for head_dim, reason in reasons.items() if reason is None]
        failed = [(head_dim, reason) for head_dim, reason in reasons.items() if reason is not None]
        reason = None
        if failed:
            head_dim, reason = failed[0]
            if runs:
                reason = f"head dim {head_dim}: {reason}"
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
    """Attention backend that `auto` chooses, by head dim; its order, and whether that order was measured."""
    chosen = {}
    for head_dim in head_dims:
        workload = Workload.on(device, dtype=dtype, head_dim=head_dim)
        order, _ = auto_order(workload)
        chosen[head_dim] = next(name for name in order if name in runnable(workload))
    order, measured = auto_order(Workload.on(device, dtype=dtype, head_dim=head_dims[0]))
    return {"takes": chosen, "order": list(order), "measured": measured}


def look_at_video() -> dict[str, Any]:
    """Which decoders `auto` tries, the first first, and what is wrong with those that are installed, if
    anything."""
    order = [name for name in video_backends() if VIDEO_BACKENDS[name].missing() is None]
    note = None
    for part in video_parts():
        several = [package for package in part.packages if _version((package,)) is not None]
        if len(several) > 1:
            note = (
                f"{' and '.join(several)} are both installed and share an import name: pip uninstall one, "
                "reinstall the other"
            )
    return {"order": order, "note": note}


def look_at_machine(device: torch.device) -> dict[str, Any]:
    """Record of the machine: Python, torch, GPUs, and what the fused operations run with."""
    gpus, shared = [], find_shared_memory()
    memory, files = find_memory(), find_open_files()
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        capability = f"{known.major}.{known.minor}"
        gpus.append({"name": known.name, "capability": capability, "gib": round(known.total_memory / 2**30)})
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": find_cores(),
        "machine_cores": os.cpu_count(),
        "memory": memory and memory._asdict(),
        "open_files": files and files._asdict(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": gpus,
        "shared_memory": shared and shared._asdict(),
        "kernels": resolve_backend("auto", "embed_visible", torch.empty(0, device=device)),
        "compile_note": why_not_compiled(device),
        "kernels_note": WHY_MISSING or (why_too_old(device) if device.type == "cuda" else None),
    }


def planned_load(file: str | None, device: torch.device) -> tuple[Load, str]:
    """What a pre-training run asks of this machine, one rank for each of its GPUs; and that run in words.

    Args:
        file: settings of the run; None: ViT-B, batches of 32 videos, 4 workers.
    """
    usual = {**pretrain_settings.SETTINGS.defaults, "data": "", "output": "."}
    usual |= {"workers": 4} if file is None else {}
    settings = Settings(ModelSettings, PretrainConfig, RunConfig, defaults=usual)
    parser = argparse.ArgumentParser()
    settings.add_to(parser)
    args = settings.complete(parser.parse_args([] if file is None else ["--config", file]))
    args.effective_batch = None  # of all machines
    config, run = pretrain_settings.configs_from_args(args)
    with torch.device("meta"):
        model = build_pretrainer(config.model, backend="torch")
    parameters = sum(p.numel() for p in model.parameters())
    checkpoint = 12 * parameters
    ranks = max(1, torch.cuda.device_count()) if device.type == "cuda" else 1
    flops = 6.0 * masked_macs(config.model, config.mask)
    reads, name = config.loader == "cpu", device_name(device)
    load = Load(
        workers=run.speed.num_workers if reads else 0,
        batch_bytes=run.batch_size * config.num_sample * config.model.most_clip_bytes if reads else 0,
        ranks=ranks,
        world=ranks,
        videos_per_s=predict_rate(name, config.dtype, flops, config.num_sample) if reads else None,
        num_sample=config.num_sample,
        checkpoint_bytes=checkpoint,
        checkpoints=run.keep + 1,
        rank_bytes=rank_bytes(device, parameters),
        staged_bytes=checkpoint // ranks if run.async_save else 0,
        output=run.output,
        remote=is_address(args.data),
        pinned=device.type == "cuda",
    )
    words = (
        f"{args.model}, {ranks} rank{'s' * (ranks > 1)}, batches of {run.batch_size} videos x "
        f"{config.num_sample} clips, {load.workers} workers a rank"
    )
    return load, words


def look_at_needs(file: str | None, device: torch.device) -> dict[str, Any]:
    """Record of what such a run needs, and of what is here."""
    load, words = planned_load(file, device)
    needs = [
        {
            "name": need.name,
            "needed": need.needed,
            "has": need.has,
            "short": need.short,
            "line": need.describe(),
        }
        for need in find_needs(load)
    ]
    return {"run": words, "needs": needs, "mfu": MFU}


def examine(
    device: torch.device,
    dtype: torch.dtype,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    settings_file: str | None = None,
) -> dict[str, Any]:
    """Everything that `doctor` prints, in containers that JSON can hold."""
    return {
        "schema": SCHEMA,
        "machine": look_at_machine(device),
        "workload": {
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "head_dims": list(head_dims),
        },
        "needs": look_at_needs(settings_file, device),
        "attention": look_at_attention(device, dtype, head_dims),
        "auto": look_at_auto(device, dtype, head_dims),
        "video": look_at_video(),
        "parts": [look_for(part) for part in PARTS],
    }


# --- print --------------------------------------------------------------------------------------------------


def _table(rows: Sequence[tuple[str, ...]], say: Callable[[str], None]) -> None:
    """Print aligned columns; the last one is not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        say("  " + "  ".join([cell.ljust(width) for cell, width in zip(row, widths)] + [row[-1]]).rstrip())


def _attention_row(record: dict[str, Any], head_dims: list[int]) -> tuple[str, ...]:
    runs = ", ".join(map(str, record["runs"])) or "no"
    if record["runs"] == head_dims:
        runs = "yes"
    padded = []
    for head_dim, tiles in record["tiles"].items():
        if tiles is None:
            padded.append("?")
        elif tiles != (head_dim, head_dim):
            padded.append(f"{head_dim} to {' and '.join(str(w) for w in dict.fromkeys(tiles))}")
    pads = ", ".join(padded) or "none"
    if "?" in padded:
        pads = "?"
    return record["name"], runs, record["version"] or "-", pads, record["reason"] or record["text"]


def report(found: dict[str, Any], say: Callable[[str], None] = print) -> None:
    """Print what `examine` found."""
    _report_machine(found["machine"], say)
    _report_needs(found["needs"], say)
    _report_attention(found, say)
    _report_video(found["video"], say)
    _report_packages(found["parts"], bool(found["machine"]["gpus"]), say)


def _report_machine(machine: dict[str, Any], say: Callable[[str], None]) -> None:
    cores = f"{machine['cores']:.3g} cores"
    if machine["cores"] != machine["machine_cores"]:
        cores += f" of the machine's {machine['machine_cores']}"
    say(f"python {machine['python']}, {machine['system']}, {cores}")
    built = "built without CUDA"
    if machine["cuda"]:
        built = f"CUDA {machine['cuda']}, cuDNN {machine['cudnn']}"
    elif machine["hip"]:
        built = f"ROCm {machine['hip']}"
    say(f"torch {machine['torch']}: {built}")
    for gpu in machine["gpus"]:
        say(f"GPU: {gpu['name']}, compute capability {gpu['capability']}, {gpu['gib']} GiB")
    if not machine["gpus"]:
        say("no GPU: everything runs on the CPU")
    if machine["shared_memory"]:
        _report_shared_memory(SharedMemory(**machine["shared_memory"]), say)
    runs_with = machine["kernels"]
    if machine["kernels_note"]:
        runs_with += f" ({machine['kernels_note']})"
    say(f"fused operations: {runs_with}")
    note = machine["compile_note"]
    if note is None:
        say("blocks: compiled unless --no-compile; norms and GELU kept where that fits (--recompute auto)")
    else:
        say(f"blocks: not compiled unless --compile: {note}")


def _report_needs(found: dict[str, Any], say: Callable[[str], None]) -> None:
    say(f"\nwhat a pre-training run needs ({found['run']})")
    for need in found["needs"]:
        if need["needed"] is not None:
            say(f"  {need['line']}")


def _report_shared_memory(found: SharedMemory, say: Callable[[str], None]) -> None:
    say(f"shared memory: {FOLDER} has {describe(found.free)} free of {describe(found.total)}")
    clip = ModelConfig.preset("vit_b").clip_bytes
    needed = batches_bytes(32 * clip, 4)
    if found.free < needed:
        say(f"  little: 4 workers with batches of 32 clips may fill {describe(needed)}; {remedy(needed)}")


def _report_attention(found: dict[str, Any], say: Callable[[str], None]) -> None:
    workload, auto = found["workload"], found["auto"]
    head_dims = workload["head_dims"]
    shapes = ", ".join(map(str, head_dims))
    say(f"\nattention backends, training on {workload['device']} in {workload['dtype']}, head dims {shapes}")
    header = ("backend", "runs", "version", "pads to", "what it is, or why not")
    _table([header, *(_attention_row(record, head_dims) for record in found["attention"])], say)
    chosen = ", ".join(dict.fromkeys(auto["takes"].values()))
    evidence = "expected, not measured on this class of device"
    if auto["measured"]:
        evidence = "measured on this class of device"
    say(f"  auto takes {chosen}; its order, {evidence}: {', '.join(auto['order'])}")


def _report_video(video: dict[str, Any], say: Callable[[str], None]) -> None:
    if video["order"]:
        say(f"\nvideo files: auto decodes with the first of {', '.join(video['order'])}")
    else:
        say("\nvideo files: none can be decoded")
    if video["note"]:
        say(f"  {video['note']}")


def _report_packages(parts: Sequence[dict[str, Any]], has_gpu: bool, say: Callable[[str], None]) -> None:
    say("\npackages")
    rows = [("package", "for", "version", "")]
    for part in parts:
        state = "" if part["found"] else part["reason"]
        rows.append((part["name"], part["group"], part["version"] or "-", state))
    _table(rows, say)
    missing = [part for part in parts if not part["found"]]
    if missing:
        say("\nmissing packages, and their cost")
    for part in missing:
        cost = part["without"]
        if part["gpu"] and not has_gpu:
            cost += " (no use on this machine: it has no GPU)"
        say(f"  {part['name']}: {cost}\n    {part['install']}")


# --- command line -------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_settings(parser, RunConfig, "device")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="dtype of attention (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--head-dim",
        type=Whole(1, 4096),
        nargs="+",
        default=list(HEAD_DIMS),
        metavar="N",
        help="head dims of attention (default: those of the presets)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="settings of a pre-training run: what it needs is held against this machine (vit_b)",
    )
    parser.add_argument("--json", metavar="FILE", help="file for all results")


def run(args: argparse.Namespace) -> int:
    """Run the command: examine the machine, and print what was found."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {args.device}: torch knows no such device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: torch sees no GPU here; use --device cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.dtype:
        dtype = DTYPES[args.dtype]
    found = examine(device, dtype, tuple(dict.fromkeys(args.head_dim)), args.config)
    report(found)
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"--json {args.json}: {error.strerror}") from error
        print(f"\nwritten: {args.json}")
    return 0
