import importlib.machinery
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from vmae import ModelConfig
from vmae.cli import main
from vmae.model.attention.choice import BACKENDS
from vmae.tools import doctor
from vmae_kernels import device as kernel_device

CPU = torch.device("cpu")

ROOT = Path(__file__).resolve().parents[2]


def test_prints_backends_packages_and_what_is_missing(capsys, tmp_path):
    assert main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    shown = capsys.readouterr().out
    for word in (
        *BACKENDS,
        *(part.name for part in doctor.PARTS),
        f"torch {torch.__version__}",
        "auto takes sdpa",
        "what a pre-training run needs (vit_b, 1 rank, batches of 32 videos x 1 clips, 4 workers a rank)",
        "open files of a process: ",
        "disk for checkpoints: ",
    ):
        assert word in shown, word
    found = json.loads((tmp_path / "d.json").read_text())
    assert "blocks: not compiled unless --compile: " in shown and "GPU" in found["machine"]["compile_note"]
    assert found["schema"] == "vmae-doctor/1" and found["machine"]["torch"] == torch.__version__
    records = {record["name"]: record for record in found["attention"]}
    assert records.keys() == BACKENDS.keys()
    assert (
        records["sdpa"]["runs"] == records["softmax"]["packed"] == [64, 80, 88]
        and records["sdpa"]["reason"] is None
    )
    takes = {"64": "sdpa", "80": "sdpa", "88": "sdpa"}
    assert found["auto"] == {"takes": takes, "order": ["sdpa", "softmax"], "measured": True}
    for part in found["parts"]:
        assert part["found"] == (part["reason"] is None) and part["install"] and part["without"]
        # What is missing is listed again with its cost and what to type.
        assert part["found"] or (part["without"] in shown and part["install"] in shown)
    assert next(part for part in found["parts"] if part["name"] == "decord")["found"]
    assert (
        found["video"]["order"][0] == "pyav"
        and "decord" in found["video"]["order"]
        and found["video"]["note"] is None
    )
    assert f"auto decodes with the first of {', '.join(found['video']['order'])}" in shown


def test_blocks_are_compiled_where_they_can_be(monkeypatch):
    said = []
    for reason in (None, "Triton needs a C compiler (gcc or clang), which is not there"):
        monkeypatch.setattr(doctor, "why_not_compiled", lambda device, reason=reason: reason)
        doctor._report_machine(doctor.look_at_machine(CPU), said.append)
    lines = [line for line in said if line.startswith("blocks: ")]
    assert "compiled unless --no-compile" in lines[0]
    assert "needs a C compiler" in lines[1]


def test_auto_on_a_cpu_depends_on_the_dtype():
    for dtype, name in ((torch.float32, "sdpa"), (torch.bfloat16, "softmax")):
        assert doctor.look_at_auto(CPU, dtype, (64,))["takes"] == {64: name}


def test_two_decord_packages_get_a_note(capsys, monkeypatch):
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "3.4.0" if name == "decord2" else version(name)
    )
    assert main(["doctor"]) == 0
    assert "decord and decord2 are both installed and share an import name" in capsys.readouterr().out


def test_a_package_that_imports_and_does_not_work_has_a_reason():
    part = doctor.Part(
        name="x",
        group="video",
        module="json",
        packages=("x",),
        install="-",
        without="-",
        probe=lambda: "too old for this",
    )
    assert doctor.look_for(part)["reason"] == "too old for this" and not doctor.look_for(part)["found"]


def test_every_backend_that_needs_a_package_has_a_reason_and_a_remedy():
    for record in doctor.look_at_attention(CPU, torch.float32, (64,)):
        if not record["runs"]:
            assert record["reason"] and (record["install"] or "GPU" in record["reason"])
    packages = {backend.package for backend in BACKENDS.values() if backend.package}
    assert packages <= {package for part in doctor.PARTS for package in part.packages}


def test_dtype_and_head_dims_are_settings(capsys):
    assert main(["doctor", "--dtype", "float16", "--head-dim", "20", "264"]) == 0
    shown = capsys.readouterr().out
    assert "training on cpu in float16, head dims 20, 264" in shown and "20 to 32" in shown


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device", "toaster"], "--device toaster: torch knows no such device"),
        (["--device", "cuda"], "torch sees no GPU here"),
        (["--head-dim", "0"], "--head-dim: must be a whole number from 1 to 4,096, not 0"),
        (["--config", "/no/such/run.yaml"], "/no/such/run.yaml"),
        (["--json", "/no/such/folder/d.json"], "--json /no/such/folder/d.json: No such file or directory"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", *flags]) == 2
    assert message in capsys.readouterr().err


def test_what_a_run_needs_follows_from_its_settings(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: vit_tiny\nbatch_size: 3\nnum_sample: 2\nworkers: 5\nkeep: 1\nasync_save: true\n")
    load, words = doctor.planned_load(str(file), torch.device("cpu"))
    assert words == "vit_tiny, 1 rank, batches of 3 videos x 2 clips, 5 workers a rank"
    clip = ModelConfig.preset("vit_tiny").clip_bytes
    assert (load.workers, load.batch_bytes, load.checkpoints) == (5, 6 * clip, 2)
    assert load.staged_bytes == load.checkpoint_bytes > 0 and load.videos_per_s is None
    assert load.rank_bytes < 2**30  # no CUDA
    recipe, words = doctor.planned_load(str(ROOT / "recipes" / "pretrain_vitb.yaml"), torch.device("cpu"))
    assert recipe.num_sample == 4 and words.startswith("vit_b, ")
    needs = doctor.look_at_needs(str(file), torch.device("cpu"))["needs"]
    assert {need["name"] for need in needs if need["short"]} == set()
    assert all(need["line"].startswith(need["name"]) for need in needs)


def part_of(module: str) -> doctor.Part:
    return doctor.Part(
        name="x", group="video", module=module, packages=("no-such-package",), install="pip x", without="y"
    )


def test_a_package_is_found_by_importing_it(monkeypatch, tmp_path):
    made = types.ModuleType("some_decoder")
    made.__spec__, made.__version__ = importlib.machinery.ModuleSpec("some_decoder", None), "1.2"
    monkeypatch.setitem(sys.modules, "some_decoder", made)
    found = doctor.look_for(part_of("some_decoder"))
    assert found["found"] and found["version"] == "1.2" and found["reason"] is None
    assert doctor.look_for(part_of("no_such_decoder"))["reason"] == "not installed"
    assert doctor.look_for(part_of("no_such_package.inner"))["reason"] == "not installed"

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_decoder.py").write_text(
        "raise RuntimeError('libavutil.so.60 not found\\nmany more lines')"
    )
    broken = doctor.look_for(part_of("broken_decoder"))
    assert not broken["found"] and broken["reason"] == "does not import: libavutil.so.60 not found"


def test_a_gpu_is_described(monkeypatch):
    known = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: known)
    found = doctor.examine(CPU, torch.float32)
    lines = []
    doctor.report(found, lines.append)
    assert "GPU: NVIDIA H100, compute capability 9.0, 80 GiB" in lines
    assert not any("there is no GPU" in line for line in lines)


def test_a_gpu_that_is_too_old_for_the_kernels_has_its_reason(monkeypatch):
    gpu = torch.device("cuda", 0)
    kernel_device._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(
        torch, "empty", lambda *shape, device: types.SimpleNamespace(is_cuda=True, device=device)
    )
    machine = doctor.look_at_machine(gpu)
    kernel_device._capability.cache_clear()
    monkeypatch.undo()
    lines = []
    doctor.report({**doctor.examine(CPU, torch.float32), "machine": machine}, lines.append)
    assert any(
        line.startswith("fused operations: torch (cuda:0 has compute capability 7.5; before 8.0 ")
        for line in lines
    )
