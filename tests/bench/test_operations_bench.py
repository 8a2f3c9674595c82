"""bench/operations.py where there may be no GPU: the check mode, and the floors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmae_kernels.backend import OPERATIONS

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "operations.py"


def test_check_mode(tmp_path):
    """From another folder, with nothing of this project on the path."""
    command = [sys.executable, str(SCRIPT), "--check", "--json", str(tmp_path / "check.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["schema"] == "vmae-bench/1"
    known = {"device", "cpu", "cores", "torch", "triton", "python", "commit", "clean", "date"}
    assert known <= report["environment"].keys()
    assert len(report["records"]) == 4 * len(OPERATIONS) and all(record["ok"] for record in report["records"])


def test_floors_count_what_the_design_says(benches):
    """ViT-B, batch 32, by hand: 32 * 160 tubelets of 1536 bytes, a 1536 x 768 weight, 768-wide tokens; 12.08
    GFLOP."""
    floors = benches("floors")
    shape = floors.preset_shape("vit_b", 32)
    forward, _ = floors.work_of("embed_visible", shape)
    assert forward.bytes == 32 * 160 * 1536 + 768 * 1536 * 2 + 32 * 160 * 768 * 2 + 1568 * 768 * 4
    assert forward.matrix == 2 * 32 * 160 * 1536 * 768
    assert floors.Work(bytes=3.35e6).floor_us(floors.GPUS["H100"]) == 1.0
    forward, backward = floors.work_of("patch_loss", shape)
    assert forward.bytes == 32 * 704 * 1536 * 3 and backward.bytes == 32 * 704 * 1536 * 5


def test_shapes_are_those_of_the_presets(benches):
    g = benches("floors").preset_shape("vit_g", 8)
    assert (g.patch, g.width, g.decoder, g.tokens, g.values) == (14, 1408, 512, 2048, 1176)
    assert (g.visible, g.decoded, g.counted) == (208, 1024, 920)


def test_a_floor_is_that_of_both_directions(benches):
    floors = benches("floors")
    shape, rates = floors.preset_shape("vit_s", 2), floors.GPUS["A100"]
    forward, backward = floors.work_of("head_patch_loss", shape)
    us, work = floors.floor_of("head_patch_loss", shape, "both", rates)
    assert us == forward.floor_us(rates) + backward.floor_us(rates)
    assert work.bytes == forward.bytes + backward.bytes and work.matrix == forward.matrix + backward.matrix


def test_without_a_gpu_there_are_floors(benches, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benches("operations").main(["--presets", "vit_s"]) == 0
    out = capsys.readouterr().out
    assert out.count("vit_s, batch 32") == 2 * len(OPERATIONS) and "Floors from: H100 SXM datasheet" in out


def test_a_wrong_variant_is_found_and_gets_no_time(benches):
    calls_of = benches("operation_calls")
    shape = calls_of.CHECK_SHAPES[0]
    eager = calls_of.variants("patch_loss", compiled=False)["eager"]
    calls = {"eager": eager, "wrong": lambda *x: eager(*x) * 1.01}
    ratios = calls_of.error_ratios("patch_loss", shape, calls, "cpu", torch.bfloat16)
    assert ratios["eager"] <= 1 < ratios["wrong"]
    operations = benches("operations")
    floor = operations.floor_record("patch_loss", shape, "both", operations.GPUS["H100"])
    wrong = operations.time_record(floor, "wrong", ratios["wrong"], None)
    right = operations.time_record(floor, "eager", ratios["eager"], [2 * floor.floor_us])
    assert wrong.median is None and right.over_floor == pytest.approx(2) and right.kind == "time"


def test_measuring_times_what_is_right(benches, monkeypatch):
    """As on a GPU, but for the clock and the inputs."""
    operations = benches("operations")
    from harness.results.operations import floor_table

    shape, rates = benches("floors").preset_shape("vit_s", 1), operations.GPUS["H100"]
    monkeypatch.setattr(operations, "variants", lambda operation, compiled: {"triton": None, "eager": None})
    monkeypatch.setattr(operations, "error_ratios", lambda *arguments: {"triton": 0.5, "eager": 1.5})
    monkeypatch.setattr(operations, "input_sets", lambda operation, shape: [()])
    monkeypatch.setattr(operations, "time_call", lambda call, inputs, backward: 8.0 if backward else 4.0)
    records = operations.measure("patch_loss", shape, rates, rounds=3)
    found = {(r.variant, r.direction): r.median for r in records}
    assert found == {
        ("triton", "forward"): 4.0,
        ("eager", "forward"): None,
        ("triton", "both"): 8.0,
        ("eager", "both"): None,
    }
    assert records[0].gb_per_s == pytest.approx(records[0].bytes / 4.0 / 1e3)
    rows = floor_table(records, "here").rows
    assert [row[3] for row in rows] == ["triton", "eager"] * 2 and rows[1][-2:] == ["wrong", "-"]
