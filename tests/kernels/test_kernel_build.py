"""Device code without a device: no spills, tensor cores, shared memory. Building and interpreting need
separate processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmae import DualMask, ModelConfig
from vmae_kernels import build
from vmae_kernels.backend import TRITON_OPERATIONS

KERNELS = Path(build.__file__).resolve().parent.parent
FIELDS = {"kernel", "target", "shape", "default", "registers", "stack_bytes", "shared_bytes", "instructions"}


def build_report(folder: Path, *options: str) -> list[dict]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "VMAE_"))
    }
    environment |= {"PYTHONPATH": str(KERNELS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vmae_kernels.build", "--json", str(folder / "build.json"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "build.json").read_text())["records"]


def assert_sound(records: list[dict], targets: set[str]) -> None:
    assert build.failures(records) == []
    assert {record["target"] for record in records} == targets
    assert {record["operation"] for record in records} == TRITON_OPERATIONS
    for target in targets:
        kernels = {record["kernel"] for record in records if record["target"] == target}
        assert kernels.issuperset(build.PROJECTIONS) and len(kernels) >= 14
    for record in records:
        assert record.keys() >= FIELDS and record["registers"] > 0 and record["shared_bytes"] >= 0


@pytest.mark.slow
def test_hopper(tmp_path):
    """sm_90, the larger shape: HGMMA in all projections, no spill; 16-byte loads of pixels at patch 16 are in
    the slow test."""
    records = build_report(tmp_path, "--targets", "sm_90", "--presets", "vit_g")
    assert_sound(records, {"sm_90"})


@pytest.mark.slow
def test_every_target(tmp_path):
    """What `python -m vmae_kernels.build` builds by default: ViT-B and ViT-g for all four targets."""
    records = build_report(tmp_path)
    assert_sound(records, set(build.TARGETS))
    for record in records:
        if record["kernel"] == "embed_visible_fwd_kernel" and record["shape"] == "vit_b":
            assert record["widest_load_bits"] == 128


def test_every_operation_is_built():
    assert build.ARGUMENTS.keys() == TRITON_OPERATIONS
    assert {job[0] for job in build.jobs(["sm_90"], ["vit_b"], False)} == TRITON_OPERATIONS


@pytest.mark.parametrize("name", build.PRESETS)
def test_shapes_are_those_of_the_presets(name):
    """The kernels know nothing of `vmae`, so the builds have the presets' shapes in a table of their own."""
    model = ModelConfig.preset(name)
    mask = DualMask.sample(1, model.grid)
    tokens = (mask.visible.shape[1], mask.decode.shape[1], mask.keep.shape[1])
    assert build.PRESETS[name] == (model.patch_size, model.embed_dim, model.decoder_embed_dim, *tokens)


def test_failures_are_found():
    good = {
        "kernel": "embed_visible_fwd_kernel",
        "target": "sm_90",
        "shape": "vit_b",
        "dtype": "bfloat16",
        "clips": "uint8",
        "default": True,
        "registers": 100,
        "stack_bytes": 0,
        "shared_bytes": 0,
        "instructions": {"HGMMA.64x128x16.F32.BF16": 4},
    }
    assert build.failures([good]) == []
    for change, what in (
        ({"stack_bytes": 8}, "8 stack bytes"),
        ({"instructions": {"HMMA.16816.F32.BF16": 4}}, "no HGMMA"),
        ({"shared_bytes": 1 << 20}, "1048576 bytes of shared memory"),
    ):
        assert what in build.failures([good | change])[0]
        assert build.failures([good | change | {"default": False}]) == []


def test_variants_of_a_kernel_have_a_row_each():
    """A flag of the kernel makes another binary, which the report counts too."""
    same = {"kernel": "k_kernel", "operation": "o", "target": "sm_90", "shape": "vit_b", "dtype": "bfloat16",
            "clips": "uint8", "default": True, "config": {"num_warps": 8}, "stack_bytes": 0,
            "shared_bytes": 0, "widest_load_bits": 128, "instructions": {}}  # fmt: skip
    records = [
        same | {"registers": 97, "flags": {"ADD": False, "UINT8": True}},
        same | {"registers": 178, "flags": {"ADD": True, "UINT8": True}},
    ]
    assert build.variants(records) == {0: "", 1: "ADD"}
    rows = [line for line in build.table(records).splitlines() if "vit_b" in line]
    assert [line.split("|")[1].strip() for line in rows] == ["k", "k ADD"]
    assert "178" in rows[1]


def test_widest_load():
    assert build.widest_load({"LDG.E.U8": 3, "LDG.E.64.CONSTANT": 1}) == 64
    assert build.widest_load({"LDGSTS.E.BYPASS.128": 3, "LDG.E": 1}) == 128
    assert build.widest_load({"LDG.E.U16": 3}) == 16
    assert build.widest_load({"LDG.E": 3}) == 32
    assert build.widest_load({"global_load_ushort": 3, "buffer_load_dwordx2": 1}) == 64
    assert build.widest_load({"HGMMA.64x128x16.F32.BF16": 4}) == 0


@pytest.mark.slow  # 3 s
def test_interpreting_and_building_need_separate_processes():
    environment = os.environ | {"PYTHONPATH": str(KERNELS), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "vmae_kernels.build"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "separate processes" in done.stderr
