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


@pytest.mark.slow
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


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_truth_is_float64_throughout(benches, operation):
    """References normalise pixels in float32 whatever the dtype: beside their own result, they would have no
    error."""
    calls_of = benches("operation_calls")
    inputs = calls_of.make_inputs(operation, calls_of.CHECK_SHAPES[0], "cpu", torch.float32)
    reference = getattr(calls_of.vmae_kernels, f"{operation}_ref")
    exact, widened = (
        calls_of._outcome(call, inputs, torch.float64)
        for call in (calls_of._exact(operation, "cpu"), reference)
    )
    errors = [calls_of._error(*pair) for pair in zip(widened, exact, strict=True)]
    sees_pixels = operation in ("embed_visible", "patch_loss", "head_patch_loss")
    assert all(truth.dtype == torch.float64 for truth in exact)
    assert (max(errors) > 0) == sees_pixels and max(errors) < 1e-6


def test_measuring_times_what_is_right(benches, monkeypatch):
    """As on a GPU, but for the clock, which knows how long each variant takes."""
    operations, timing = benches("operations"), benches("device_timing")
    from harness.results.operations import KernelRecord, floor_table

    shape, rates = benches("operation_calls").CHECK_SHAPES[0], operations.GPUS["H100"]
    truth = operations.variants("patch_loss", compiled=False)

    def broken(*inputs):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    calls = {"triton": truth["eager"], "eager": truth["eager"], "wrong": truth["eager"], "large": broken}
    monkeypatch.setattr(operations, "variants", lambda operation, compiled, device: calls)
    ratios = {"triton": 0.5, "eager": 0.9, "wrong": 1.5, "large": 0.1}
    monkeypatch.setattr(operations, "error_ratios", lambda *arguments: ratios)
    monkeypatch.setattr(operations, "cache_bytes", lambda device: 0)
    clock = timing.FakeClock(device_us=lambda work: 8.0 if work.__name__ == "both" else 4.0)
    records = list(operations.measure("patch_loss", shape, rates, clock, "cpu", rounds=3))
    kernels = [r for r in records if isinstance(r, KernelRecord)]
    times = [r for r in records if not isinstance(r, KernelRecord)]
    found = {(r.variant, r.direction): r.median for r in times}
    assert found == {
        ("triton", "forward"): 4.0,
        ("eager", "forward"): 4.0,
        ("wrong", "forward"): None,
        ("large", "forward"): None,
        ("triton", "both"): 8.0,
        ("eager", "both"): 8.0,
        ("wrong", "both"): None,
        ("large", "both"): None,
    }
    assert times[0].gb_per_s == pytest.approx(times[0].bytes / 4.0 / 1e3)
    assert (times[0].timed_by, times[0].host_us, times[0].rounds, times[0].input_sets) == (
        "graph",
        100.0,
        3,
        2,
    )
    assert {(r.direction, r.kernel, r.us) for r in kernels} == {
        ("forward", "first_kernel", 3.0),
        ("forward", "second_kernel", 1.0),
        ("both", "first_kernel", 6.0),
        ("both", "second_kernel", 2.0),
    }
    rows = floor_table(times, "here").rows
    assert [row[3] for row in rows] == ["triton", "eager", "wrong", "large"] * 2
    assert rows[0][-4:] == ["4.0", f"{times[0].over_floor:.2f} x", "100", "graph"]
    assert rows[2][-4:] == ["wrong", "-", "-", "-"] and rows[3][-4] == "CUDA out of memory."


def test_ours_alone(benches, monkeypatch):
    operations, timing = benches("operations"), benches("device_timing")
    monkeypatch.setattr(operations, "cache_bytes", lambda device: 0)
    shape, rates = benches("operation_calls").CHECK_SHAPES[0], operations.GPUS["H100"]
    found = []
    for _ in range(2):  # of the same inputs, whatever was drawn before
        made = operations.measure("head_patch_loss", shape, rates, timing.FakeClock(), "cpu", 1, True)
        found.append({(r.variant, r.error_ratio) for r in made if r.kind == "time"})
    assert found[0] == found[1] and [variant for variant, _ in found[0]] == ["triton"]


def test_a_timed_call_builds_no_tensor(benches):
    """But for what the operation returns: no gradient of ones, no constants."""
    from torch.overrides import TorchFunctionMode

    calls_of = benches("operation_calls")
    made = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            if getattr(function, "__name__", "") in ("tensor", "ones_like", "zeros_like", "ones", "zeros"):
                made.append(function.__name__)
            return function(*arguments, **(keywords or {}))

    shape = calls_of.CHECK_SHAPES[0]
    for operation in calls_of.OPERATIONS:
        prepared = calls_of.prepare(operation, shape, "cpu", torch.float32)
        eager = calls_of.variants(operation, compiled=False)["eager"]
        with Watch():
            gradients = prepared.work(eager, backward=True)()
            results = prepared.work(eager, backward=False)()
        assert made == [], operation
        assert len(gradients) == sum(x.requires_grad for x in prepared.inputs)
        assert calls_of.differentiable(results) == []


def test_our_eager_baseline_is_the_reference(benches):
    import vmae_kernels

    calls_of = benches("operation_calls")
    for operation in calls_of.OPERATIONS:
        inputs = calls_of.make_inputs(operation, calls_of.CHECK_SHAPES[1], "cpu", torch.float32)
        eager = calls_of.variants(operation, compiled=False)["eager"]
        reference = getattr(vmae_kernels, f"{operation}_ref")
        both = [calls_of.differentiable(call(*inputs)) for call in (eager, reference)]
        assert all(torch.equal(x, y) for x, y in zip(*both, strict=True)) and both[0], operation


def test_several_results_are_checked_and_differentiated(benches):
    calls_of = benches("operation_calls")
    x = torch.ones(3, requires_grad=True)
    assert [y.shape for y in calls_of.differentiable((2 * x, torch.ones(2), None, x.sum()))] == [(3,), ()]


def test_a_shape_is_compiled_for_itself(benches):
    """A second shape would be compiled with symbolic sizes."""
    calls_of = benches("operation_calls")
    compiled = []

    def note(call, **settings):
        compiled.append(settings)
        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "compile", lambda call=None, **s: note(call, **s) if call else lambda f: note(f, **s)
        )
        calls_of.variants("embed_visible", compiled=True)
    assert compiled == [{"dynamic": False}] * 2


def test_every_record_is_written_as_it_comes(benches, monkeypatch, tmp_path):
    operations = benches("operations")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    written = []
    make = operations.make_records

    def watched(args, device):
        for record in make(args, device):
            yield record
            written.append(len(json.loads((tmp_path / "o.json").read_text())["records"]))

    monkeypatch.setattr(operations, "make_records", watched)
    words = ["--presets", "vit_s", "--operations", "patch_loss", "--json", str(tmp_path / "o.json")]
    assert operations.main(words) == 0 and written == [1, 2]
