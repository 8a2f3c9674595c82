"""Builds the kernels for GPUs that are not there, and reads what came out: `python -m vmae_kernels.build
--json FILE`.

The public functions run on CPU tensors of the presets' shapes while every kernel launch is caught instead of
done: what is built is what would be launched, specialised as Triton specialises it. The binaries tell
registers, stack bytes (spills), shared memory, tensor-core instructions and global loads. By default: ViT-B
and ViT-g, bf16, uint8 clips, the default configurations. `--full`: all presets, float32 and float clips too,
and every configuration that VMAE_AUTOTUNE=1 may choose.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import vmae_kernels
from vmae_kernels import device
from vmae_kernels import predict as model
from vmae_kernels.layer_norm import layer_norm_bwd
from vmae_kernels.recording import Recorder
from vmae_kernels.sass import read_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program may have, bytes.
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}
PROJECTIONS = (
    "embed_visible_fwd_kernel",
    "embed_visible_bwd_weight_kernel",
)
# patch, encoder width, decoder width, visible, decoded and counted tokens; 16 x 224 x 224 pixels, masks of 90
# and 50 %.
PRESETS = {
    "vit_s": (16, 384, 192, 160, 784, 704),
    "vit_b": (16, 768, 384, 160, 784, 704),
    "vit_l": (16, 1024, 512, 160, 784, 704),
    "vit_h": (16, 1280, 512, 160, 784, 704),
    "vit_g": (14, 1408, 512, 208, 1024, 920),
}
NVIDIA_OPS = r"\b((?:HGMMA|HMMA|UTC\w*MMA|LDGSTS|LDG|UTMALDG|STG|LDL|STL)(?:\.[\w.]+)?)(?!\w)"
AMD_OPS = r"\b(v_mfma\w*|(?:global|buffer)_load_\w+|global_store_\w+|scratch_(?:load|store)\w*)"


class Launch:
    """One caught launch; `grid`: programs along its axes."""

    def __init__(self, function: JITFunction, args: tuple, kwargs: dict, grid: tuple[int, ...] = ()):
        self.function, self.args, self.kwargs, self.grid = function, args, kwargs, grid


def catch_launches(call, caught: Any = None) -> Any:
    """Runs `call` with every kernel launch noted in `caught` (a list by default) and not done."""
    caught = [] if caught is None else caught
    run = JITFunction.run

    def note(self, *args, grid, warmup, **kwargs):
        caught.append(Launch(self, args, kwargs, tuple(grid(kwargs) if callable(grid) else grid)))

    JITFunction.run = note
    try:
        call()
    finally:
        JITFunction.run = run
    return caught


def compile_launch(launch: Launch, target: str):
    """Triton's own path from arguments to a binary, for a device that is not there."""
    backend = make_backend(TARGETS[target])
    function, kwargs = launch.function, {"debug": False, **launch.kwargs}
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = binder(*launch.args, **kwargs)
    options, signature, constexprs, attrs = function._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(function, signature, constexprs, attrs)
    return triton.compile(source, target=TARGETS[target], options=options.__dict__)


def disassemble(binary: bytes) -> tuple[str, str]:
    """What cuobjdump says of an NVIDIA binary's resources, and its instructions."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run(
            [tool, "--dump-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    return usage, code


def read_nvidia(binary: bytes) -> dict:
    usage, code = disassemble(binary)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "instructions": dict(Counter(re.findall(NVIDIA_OPS, code))),
    }


def read_amd(assembly: str) -> dict:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0])

    counts = Counter(re.findall(AMD_OPS, assembly))
    instructions = {name: count for name, count in counts.items() if not name.startswith("v_mfma")}
    if products := sum(count for name, count in counts.items() if name.startswith("v_mfma")):
        instructions["MFMA"] = products
    stack = field("private_segment_fixed_size") + 4 * field("vgpr_spill_count")
    return {
        "registers": field("vgpr_count") + field("agpr_count"),
        "stack_bytes": stack,
        "instructions": instructions,
    }


def widest_load(instructions: dict) -> int:
    """Bits of the widest global load of one thread; 0 where the copy engine does it all."""
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "ubyte": 8}
    widest = 0
    for name in instructions:
        if name.startswith(("LDG.", "LDGSTS.")):
            sizes = re.findall(r"\.(?:U|S)?(8|16|64|128)\b", name)
            widest = max(widest, int(sizes[0]) if sizes else 32)
        elif "_load_" in name:
            widest = max([widest, *(bits for suffix, bits in widths.items() if name.endswith(suffix))])
    return widest


def tensor_core_count(record: dict) -> int:
    name = TENSOR_CORE[record["target"]]
    return sum(count for op, count in record["instructions"].items() if op.split(".")[0] == name)


def inputs(preset: str, dtype: torch.dtype, float_clips: bool, batch: int = 2) -> dict[str, Tensor]:
    """Tensors of `batch` clips. Their values do not matter; index 0 is always legal."""
    patch, width, decoder, shown, decoded, counted = PRESETS[preset]
    tokens, values = 8 * (224 // patch) ** 2, 6 * patch * patch
    clips = torch.zeros(batch, 16, 224, 224, 3, dtype=torch.uint8)
    if float_clips:
        clips = clips.permute(0, 4, 1, 2, 3).to(dtype).contiguous()

    def index(count: int) -> Tensor:
        return torch.zeros(batch, count, dtype=torch.int32)

    def learned(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    return {
        "tokens": learned(clips.shape[0], shown, width), "block_weight": learned(width).float(),
        "block_bias": learned(width).float(),
        "clips": clips, "visible": index(shown), "decode": index(decoded), "counted": index(counted),
        "weight": learned(width, 3, 2, patch, patch), "bias": learned(width),
        "pos": learned(tokens, width).float(),
        "encoded": learned(batch, shown, decoder), "mask_token": learned(1, 1, decoder),
        "decoder_pos": torch.zeros(tokens, decoder), "hidden": learned(batch, shown + decoded, decoder),
        "uses": index(shown + decoded),
        "norm_weight": learned(decoder), "norm_bias": learned(decoder),
        "pixels": learned(batch, counted, values),
        "token_weight": torch.ones(batch, counted), "rows": learned(batch, counted, decoder),
        "head_weight": learned(values, decoder), "head_bias": learned(values),
    }  # fmt: skip


# Names of `inputs` that each operation is called with; the slowest builds first.
ARGUMENTS = {
    "embed_visible": ("clips", "visible", "weight", "bias", "pos"),
    "head_patch_loss": ("rows", "head_weight", "head_bias", "clips", "counted", "token_weight"),
    "patch_loss": ("pixels", "clips", "counted", "token_weight"),
    "layer_norm": ("tokens", "block_weight", "block_bias"),
    "select_decoded": ("hidden", "norm_weight", "norm_bias", "counted", "uses"),
    "assemble_decoder_tokens": ("encoded", "mask_token", "decoder_pos", "visible", "decode"),
}


def layer_norm_again(x: dict[str, Tensor]) -> None:
    """The backward of `norm_linear`, which gives the forward's result again."""
    tokens, weight, bias = (x[name].detach() for name in ARGUMENTS["layer_norm"])
    rows = torch.zeros(tokens.shape[0] * tokens.shape[1])
    layer_norm_bwd(tokens, tokens, weight, bias, rows, rows)


# Launches of training that the public function does not make, after its own.
ALSO = {"layer_norm": layer_norm_again}


def call_operation(operation: str, x: dict[str, Tensor]) -> None:
    """Forward and backward of one public function."""
    arguments = [x[name] for name in ARGUMENTS[operation]]
    results = getattr(vmae_kernels, operation)(*arguments, backend="triton")
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    if operation in ALSO:
        ALSO[operation](x)


def build_one(job: tuple[str, str, str, str, bool, int]) -> list[dict]:
    """All kernels of one operation for one target and shape. Runs in a process of its own."""
    operation, target, preset, dtype, float_clips, candidate = job
    torch.set_num_threads(1)
    device.BUILD_TARGET, device.BUILD_CANDIDATE = target, candidate
    x = inputs(preset, getattr(torch, dtype), float_clips)
    records, seen = [], set()
    for launch in catch_launches(lambda: call_operation(operation, x)):
        name = launch.function.__name__
        tunable = name in ("embed_visible_fwd_kernel", "embed_visible_bwd_weight_kernel")
        options = {
            key: value for key, value in launch.kwargs.items() if not key.isupper() or key.startswith("BLOCK")
        }
        flags = {key: value for key, value in launch.kwargs.items() if isinstance(value, bool)}
        key = (name, *launch.kwargs.items())
        if key in seen or (candidate and not tunable):
            continue
        seen.add(key)
        kernel = compile_launch(launch, target)
        found = read_amd(kernel.asm["amdgcn"]) if target == "gfx942" else read_nvidia(kernel.asm["cubin"])
        records.append({
            "kernel": name, "operation": operation, "target": target, "shape": preset, "dtype": dtype,
            "clips": "float" if float_clips else "uint8", "default": candidate == 0, "config": options,
            "flags": flags,
            "registers": found["registers"], "stack_bytes": found["stack_bytes"],
            "shared_bytes": kernel.metadata.shared,
            "widest_load_bits": widest_load(found["instructions"]), "instructions": found["instructions"],
        })  # fmt: skip
    return records


def call_recorded(operation: str, x: dict[str, Tensor], recorder: Recorder, **backend: str) -> None:
    """As `call_operation`, recorded: directions apart, gradients not stored. Without `backend`: the
    reference."""
    arguments = [x[name] for name in ARGUMENTS[operation]]
    learned = [tensor for tensor in arguments if tensor.requires_grad]
    recorder.given(*arguments)
    call = getattr(vmae_kernels, operation if backend else f"{operation}_ref")
    with recorder:
        found = call(*arguments, **backend)
        results = [y for y in (found if isinstance(found, tuple) else (found,)) if y.requires_grad]
        upstream = [torch.empty_like(y) for y in results]
        recorder.direction = "backward"
        grads = torch.autograd.grad(results, learned, upstream)
    recorder.given(*results, *upstream, *grads)


def predict_one(job: tuple[str, str, str, int]) -> list[dict]:
    """Records of one operation: each of its kernels, and the whole. Runs in a process of its own."""
    operation, gpu_name, preset, batch = job
    torch.set_num_threads(1)
    gpu = model.GPUS[gpu_name]
    device.BUILD_TARGET, device.BUILD_CANDIDATE = gpu.target, 0
    x = inputs(preset, torch.bfloat16, False, batch)
    x["pos"] = x["pos"].detach()  # fixed positions, as pre-training has them
    ours, rival = Recorder(enter=True, compute=False), Recorder(enter=False)
    catch_launches(lambda: call_recorded(operation, x, ours, backend="triton"), ours)
    on_meta = {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad) for name, tensor in x.items()
    }
    call_recorded(operation, on_meta, rival)
    events = [
        replace(event, what=build_for_model(event.what, gpu.target))
        if isinstance(event.what, Launch)
        else event
        for event in ours.events
    ]
    named = {
        "operation": operation,
        "preset": preset,
        "target": gpu.target,
        "device": gpu_name,
        "batch": batch,
    }
    records = model.records_of(events, gpu, named)
    moved = model.outer_bytes(events, ours.outer)
    return records + model.whole_records(records, moved, rival, gpu, named)


def build_for_model(launch: Launch, target: str) -> model.Built:
    """A caught launch with what its binary says."""
    kernel = compile_launch(launch, target)
    usage, code = disassemble(kernel.asm["cubin"])
    programs = 1
    for side in launch.grid:
        programs *= int(side)
    options = {key: value for key, value in launch.kwargs.items()}
    return model.Built(
        kernel=launch.function.__name__,
        programs=programs,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        shared_bytes=kernel.metadata.shared,
        arguments=model.Arguments(launch.function.arg_names, launch.args, launch.kwargs),
        options=options,
        code=read_kernel(code),
    )


def show_predictions(options: argparse.Namespace) -> int:
    """Predicts, prints and writes; 1 where a kernel's loops are not known."""
    presets = options.presets or ["vit_b", "vit_g"]
    work = [
        (name, options.device, preset, options.batch) for preset in presets for name in options.operations
    ]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        try:
            records = [record for found in pool.imap(predict_one, work) for record in found]
        except model.Mismatch as error:
            print(f"FAIL\n{error}")
            return 1
    print(model.table(records, model.GPUS[options.device]))
    if options.json:
        assumed = {"gpu": asdict(model.GPUS[options.device]), **model.assumptions()}
        write_json(options.json, "vmae-predict/1", records, assumptions=assumed)
    return 0


def write_json(path: Path, schema: str, records: list[dict], **more: object) -> None:
    environment = {
        "device": "cpu", "cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(), "commit": None, "clean": None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    content = {"schema": schema, "environment": environment, **more, "records": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def jobs(targets: list[str], presets: list[str], full: bool) -> list[tuple]:
    """Slow ones first."""
    found = []
    for operation in ARGUMENTS:
        for target in targets:
            for preset in presets:
                found.append((operation, target, preset, "bfloat16", False, 0))
                if full:
                    found.append((operation, target, preset, "float32", True, 0))
                    found.append((operation, target, preset, "float32", False, 0))
                    found.append((operation, target, preset, "bfloat16", True, 0))
                if full and operation == "embed_visible":
                    found += [
                        (operation, target, preset, "bfloat16", False, candidate) for candidate in (1, 2)
                    ]
    return found


def failures(records: list[dict]) -> list[str]:
    """What must not be: spills in a default, a projection without tensor cores, too much shared memory."""
    found = []
    for record in records:
        where = f"{record['kernel']} {record['target']} {record['shape']} {record['dtype']} {record['clips']}"
        if record["default"] and record["stack_bytes"]:
            found.append(f"{where}: {record['stack_bytes']} stack bytes")
        products = record["kernel"] in PROJECTIONS and record["dtype"] == "bfloat16"
        if record["default"] and products and tensor_core_count(record) == 0:
            found.append(f"{where}: no {TENSOR_CORE[record['target']]}")
        if record["default"] and record["shared_bytes"] > SHARED_LIMITS[record["target"]]:
            found.append(f"{where}: {record['shared_bytes']} bytes of shared memory")
    return found


def variants(records: list[dict]) -> dict[int, str]:
    """Of records of a kernel that was launched in several variants: the flags that tell it apart, by place
    ("AGAIN")."""
    groups: dict[tuple, list[int]] = {}
    for i, record in enumerate(records):
        kind = (record[name] for name in ("kernel", "operation", "target", "shape", "dtype", "clips"))
        groups.setdefault((*kind, *record["config"].items()), []).append(i)
    found: dict[int, str] = {}
    for places in groups.values():
        flags = [records[i]["flags"] for i in places]
        differing = [name for name in flags[0] if len({one.get(name) for one in flags}) > 1]
        found |= {i: " ".join(name for name in differing if records[i]["flags"].get(name)) for i in places}
    return found


def table(records: list[dict]) -> str:
    """Markdown, a line per kernel, shape and configuration; a cell per target: registers / stack / shared KiB
    / tensor-core instructions / widest load in bits."""
    targets = [target for target in TARGETS if any(record["target"] == target for record in records)]
    rows: dict[tuple, dict[str, str]] = {}
    names = variants(records)
    for i, record in enumerate(records):
        name = f"{record['kernel'].removesuffix('_kernel')} {names[i]}".rstrip()
        blocks = "x".join(str(value) for key, value in record["config"].items() if key.startswith("BLOCK"))
        kind = (
            ""
            if (record["dtype"], record["clips"]) == ("bfloat16", "uint8")
            else f" {record['dtype']} {record['clips']}"
        )
        config = f"{blocks} w{record['config'].get('num_warps', 4)}"
        key = (
            (name, record["shape"] + kind)
            if record["default"]
            else (name, f"{record['shape']}{kind} {config}")
        )
        shared = f"{record['shared_bytes'] / 1024:.0f}"
        cells = (
            record["registers"],
            record["stack_bytes"],
            shared,
            tensor_core_count(record),
            record["widest_load_bits"],
        )
        rows.setdefault(key, {})[record["target"]] = " / ".join(str(cell) for cell in cells)
    lines = ["| kernel | shape | " + " | ".join(targets) + " |", "|" + "---|" * (2 + len(targets))]
    for (name, shape), row in rows.items():
        lines.append(f"| {name} | {shape} | " + " | ".join(row.get(target, "") for target in targets) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vmae_kernels.build", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--full", action="store_true", help="all presets, dtypes and configurations")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--presets", nargs="+", choices=PRESETS)
    parser.add_argument("--predict", action="store_true", help="microseconds at batch 32, predicted")
    parser.add_argument("--device", choices=model.GPUS, default="h100", help="whose prediction (h100)")
    parser.add_argument("--batch", type=int, default=32, help="clips of the prediction (32)")
    parser.add_argument("--operations", nargs="+", choices=ARGUMENTS, default=list(ARGUMENTS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    if device.INTERPRET:
        sys.exit("TRITON_INTERPRET=1 is set: interpreting and building need separate processes; unset it")
    if options.predict:
        return show_predictions(options)
    presets = options.presets or (list(PRESETS) if options.full else ["vit_b", "vit_g"])
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        records = [
            record
            for found in pool.imap(build_one, jobs(options.targets, presets, options.full))
            for record in found
        ]
    print(table(records))
    print(
        "\ncells: registers / stack bytes / shared KiB / tensor-core instructions / bits of a thread's "
        "widest global load"
    )
    if options.json:
        write_json(options.json, "vmae-build/1", records)
    wrong = failures(records)
    print(
        "\n".join(["FAIL", *wrong])
        if wrong
        else f"ok: {len(records)} kernels, no spill in a default configuration"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
