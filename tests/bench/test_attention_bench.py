"""The benchmark as a user runs it, at sizes of seconds; its shapes, bounds and arithmetic by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "attention.py"


@pytest.fixture
def bench(benches):
    return benches("attention")


@pytest.fixture
def runs(benches):
    return benches("attention_runs")


def run(tmp_path, *words):
    command = [
        sys.executable,
        str(SCRIPT),
        "--quick",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "r.json"),
        *words,
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((tmp_path / "r.json").read_text())


def check_records(result, backends):
    records = [r for r in result["records"] if r["kind"] == "attention"]
    assert result["schema"] == "vmae-bench/1" and result["rejected"] == {} and "flash2" in result["skipped"]
    assert {(r["backend"], r["shape"]) for r in records} == {
        (b, s) for b in backends for s in ("16 x 2 x 64", "24 x 2 x 88")
    }
    for r in records:
        assert (
            r["forward_flop_formula"] == "4 B H N^2 d"
            and r["forward_flops"] == 4 * 2 * r["tokens"] ** 2 * r["head_dim"]
        )
        assert r["forward_backward_flops"] == 3 * r["forward_flops"]
        assert r["forward_ideal_bytes"] == 4 * r["tokens"] * 2 * r["head_dim"] * 4
        for mode in ("forward", "forward_backward"):
            times = r[f"{mode}_ms"]
            assert len(times["runs"]) == 2 and 0 < times["min"] <= times["median"] <= times["max"]
            assert r[f"{mode}_tflops"] == pytest.approx(r[f"{mode}_flops"] / times["median"] / 1e9)
        assert r["gradient_error"] <= 2 * max(r["gradient_plain_error"], 1.2e-7)
        assert {*r["timed_by"].values()} == {"wall clock"} and {*r["host_us"].values()} == {None}
        assert r["saved_bytes"] > 0 and r["padding_flop_factor"] == 1.0 and r["tiles"] == [r["head_dim"]] * 2
    by_shape = {r["backend"]: r for r in records if r["tokens"] == 24}
    assert by_shape["sdpa"]["saved_bytes"] < by_shape["softmax"]["saved_bytes"]


@pytest.mark.slow
def test_measures_checks_and_writes(tmp_path):
    shown, result = run(tmp_path, "--backends", "sdpa", "--model", "none")
    check_records(result, ("softmax", "sdpa"))
    assert {r["variant"] for r in result["ratios"]} == {"sdpa"}
    assert {name for name, _ in result["order"]} == {"softmax", "sdpa"}
    assert (
        "fastest first: " in shown
        and "auto tries sdpa, softmax (measured)" in shown
        and "not here: flash2" in shown
    )


@pytest.mark.slow
def test_with_every_backend_and_a_whole_model(tmp_path):
    shown, result = run(tmp_path)
    models = [r for r in result["records"] if r["kind"] == "model"]
    assert "PREDICTED for bf16 on H100" in shown
    result["records"] = [r for r in result["records"] if r["kind"] == "attention"]
    check_records(result, ("softmax", "sdpa", "sdpa_flash", "sdpa_math"))
    plain, sdpa = models
    assert plain["loss"] == pytest.approx(sdpa["loss"], rel=1e-5)
    assert sdpa["saved_activation_bytes_per_clip"] < plain["saved_activation_bytes_per_clip"]
    assert "A training step, dual masking, batch 1, float32" in shown


def test_shapes_are_those_of_the_presets(runs):
    shapes = {(s.tokens, s.heads, s.head_dim): s.used_by for s in runs.preset_shapes(2)}
    assert shapes[160, 12, 64] == ("vit_b encoder",) and shapes[160, 16, 80] == ("vit_h encoder",)
    assert shapes[208, 16, 88] == ("vit_g encoder",) and shapes[2048, 16, 88] == ("vit_g classifier",)
    assert shapes[944, 8, 64] == ("vit_l decoder", "vit_h decoder") and shapes[1232, 8, 64] == (
        "vit_g decoder",
    )
    assert {key[0] for key in shapes} == {160, 208, 944, 1232, 1568, 2048} and {key[2] for key in shapes} == {
        64,
        80,
        88,
    }
    assert {name for key, names in shapes.items() for name in names} >= set(runs.CPU_CHOICE)


def test_one_backend_in_this_process(runs):
    job = runs.BackendJob(
        backend="sdpa", shapes=runs.QUICK, device="cpu", dtype="float32", span=0.0, threads=1
    )
    runner = runs.Runner(job)
    found = runner.prepare(1)
    assert 0 < found.errors.output < 1e-6 and 0 < found.errors.gradient_plain < 1e-6
    qkv, out = 24 * 3 * 2 * 88 * 4, 24 * 2 * 88 * 4
    assert found.saved_bytes == qkv + out + 24 * 2 * 4  # and the log-sum-exp
    assert found.peak_bytes is None or found.peak_bytes >= 0
    assert runner.turn("forward") > 0 and runner.turn("forward_backward") > 0


def test_on_a_device_calls_go_round_inputs_and_are_replayed(runs, monkeypatch):
    """The way of a GPU, in a rehearsal."""
    monkeypatch.setenv("VMAE_REHEARSE", "1")
    monkeypatch.setattr(runs, "cache_bytes", lambda device: 3 * 24 * 3 * 2 * 88 * 4)
    job = runs.BackendJob(
        backend="sdpa", shapes=runs.QUICK, device="cpu", dtype="float32", span=2.0, threads=1
    )
    runner = runs.Runner(job)
    found = runner.prepare(1)
    assert found.timed_by == dict.fromkeys(runs.MODES, "graph") == {m: runner.timed_by(m) for m in runs.MODES}
    assert found.host_us == dict.fromkeys(runs.MODES, 100.0)
    assert runner.turn("forward") == pytest.approx(0.01)  # ms: a call of the fake clock takes 10 us
    assert found.calls_per_turn["forward"] % 11 == 0  # 2 + 3 x cache / size sets


def test_padding_by_hand(benches):
    """flash-attention 2 at ViT-H's encoder: head dim 80 -> 96; 160 tokens -> 256 x 192, in the backward 192 x
    256."""
    cost, runs, floors = benches("attention_cost"), benches("attention_runs"), benches("floors")
    shape = runs.Shape(160, 16, 80, 32, ("vit_h encoder",))
    forward, both = cost.predict("flash2", shape, "H100", floors.GPUS["H100"])
    assert (forward.head_dim_padded, forward.query_rows, forward.key_rows) == (96, 256, 192)
    assert forward.head_dim_factor == 1.2 and forward.token_factor == 256 * 192 / 160**2
    assert forward.flops == 4 * 32 * 16 * 256 * 192 * 96 and forward.exponentials == 32 * 16 * 256 * 192
    assert forward.flop_factor == pytest.approx(1.2 * 1.92) and forward.programs == 32 * 16 * 2
    assert forward.bytes == 4 * 32 * 160 * 16 * 80 * 2
    assert (both.query_rows, both.key_rows, both.programs) == (192, 256, 32 * 16 * 4)
    assert both.flops == forward.flops + 10 * 32 * 16 * 192 * 256 * 96
    assert both.bytes == 12 * 32 * 160 * 16 * 80 * 2  # packed: no gradient is stacked
    (_, stacked) = cost.predict("sdpa_flash", shape, "H100", floors.GPUS["H100"])
    assert stacked.bytes == both.bytes * 18 / 12
    (_, plain) = cost.predict("softmax", shape, "H100", floors.GPUS["H100"])
    assert plain.flop_factor == 1 and plain.bytes == stacked.bytes + 9 * 32 * 16 * 160**2 * 2
    assert 0 < both.predicted_us.fast < both.predicted_us.slow


def test_every_backend_has_its_tiles_or_is_left_out(benches):
    """Head dims 64, 80, 88; 160, 208, 944 and 1232 tokens."""
    cost, bench = benches("attention_cost"), benches("attention")
    from vmae.model.attention.choice import BACKENDS

    found = bench.predictions("H100", 32)
    assert {(p.tokens, p.head_dim) for p in found} == {(160, 64), (160, 80), (208, 88), (944, 64), (1232, 64)}
    assert {p.backend for p in found} == set(cost.TOKEN_TILES)
    assert set(BACKENDS) - set(cost.TOKEN_TILES) == {"sdpa", "sdpa_cudnn", "varlen"}  # not published, no call
    for p in found:
        assert p.query_rows >= p.tokens and p.key_rows >= p.tokens and p.head_dim_padded >= p.head_dim
        assert p.flop_factor >= 1 and p.token_factor >= 1 and p.head_dim_factor >= 1


def test_predictions_alone(bench, tmp_path, capsys):
    assert bench.main(["--predict", "--json", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    assert "PREDICTED for bf16 on H100" in out and "32 x 208 x 16 x 88" in out
    from harness.results import read_result

    result = read_result(tmp_path / "a.json", "attention")
    (table,) = result.tables()
    assert {row[-1] for row in table.rows} == {"-"} and len(table.rows) == 50


def test_measured_beside_predicted(bench):
    """Where a GPU was, and for that shape and batch alone."""
    from dataclasses import replace

    from harness.environment import find_environment
    from harness.json_records import Runs
    from harness.results.attention import AttentionResult, BackendRecord

    predicted = bench.predictions("H100", 32)
    fields = dict.fromkeys(BackendRecord.__dataclass_fields__)
    fields |= dict(shape="160 x 12 x 64", backend="flash2", batch=32, host_us={}, timed_by={})
    fields |= dict(forward_ms=Runs.of([0.05]), forward_backward_ms=Runs.of([0.2]), kind="attention")
    gpu = replace(find_environment(), device="NVIDIA H100", capability=[9, 0])
    result = AttentionResult(environment=gpu, records=[*predicted, BackendRecord(**fields)])
    rows = {(row[0], row[1]): row[-2:] for row in result.cost_table().rows}
    assert rows["32 x 160 x 12 x 64", "flash2"] == ["50.0", "200.0"]
    assert {*map(tuple, rows.values())} == {("-", "-"), ("50.0", "200.0")}
    cpu = replace(result, environment=find_environment())
    assert all(row[-1] == "-" for row in cpu.cost_table().rows)


class FakeWorker:
    def __init__(self, runs, name, error):
        self.runs, self.name, self.error, self.asked = runs, name, error, []

    def ask(self, *request):
        self.asked.append(request)
        if self.error is None:
            raise RuntimeError(f"{self.name}: CUDA out of memory.\nTried to allocate")
        if request[0] == "turn":
            return 1.0
        if request[0] == "timed_by":
            return f"how {request[1]} was timed"
        errors = self.runs.Errors(self.error, 1e-7, 1e-7, 1e-7)
        return self.runs.Prepared(errors, 8, None, {}, {}, {})


def test_a_wrong_backend_gets_no_speed_and_the_others_take_turns(runs):
    errors = {"softmax": 1e-7, "off": 1e-3, "nan": float("nan"), "good": 2e-7}
    workers = [FakeWorker(runs, name, error) for name, error in errors.items()]
    found = runs.measure_shape(workers, 0, 3, torch.float32)
    right = {name for name, result in found.items() if result.wrong is None}
    assert right == {"softmax", "good"} and found["off"].runs == {"forward": [], "forward_backward": []}
    assert "output error 1.0e-03 is over 2 x the plain one's 1.0e-07" == found["off"].wrong
    assert workers[1].asked == workers[2].asked == [("prepare", 0)]
    turns = [("turn", "forward"), ("turn", "forward_backward")] * 3
    assert workers[3].asked == [("prepare", 0), *turns, *(("timed_by", mode) for mode in runs.MODES)]
    assert found["good"].timed_by["forward"] == "how forward was timed" and found["off"].timed_by == {}


def test_a_backend_that_fails_is_left_out_with_the_reason(runs, bench, monkeypatch):
    workers = [FakeWorker(runs, name, error) for name, error in {"softmax": 1e-7, "large": None}.items()]
    found = runs.measure_shape(workers, 0, 2, torch.float32)
    assert found["large"].wrong == "it failed: large: CUDA out of memory." and found["large"].prepared is None
    assert found["softmax"].wrong is None and found["softmax"].runs["forward"] == [1.0, 1.0]
    assert workers[1].asked == [("prepare", 0)]


def test_order_is_the_geometric_mean(bench):
    from harness.json_records import Spread
    from harness.results.attention import BackendRatio

    known = dict(shape="s", variant="a", baseline="softmax", saved_activations=1.0)
    speedups = [Spread.of([x]) for x in (4.0, 1.0)]
    ratios = [BackendRatio(**known, forward_speedup=x, forward_backward_speedup=x) for x in speedups]
    assert bench.measured_order(ratios) == [("a", 2.0), ("softmax", 1.0)]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--backends", "flash9"], "unknown attention backend 'flash9'"),
        (
            ["--backends", "flash2", "--quick"],
            "flash2 cannot run here: flash-attn is not installed; these can: sdpa",
        ),
        (["--turns", "0"], "--turns must be at least 1"),
        (["--device", "cuda"], "torch sees no GPU here"),
    ],
)
def test_bad_input_exits_with_2(bench, capsys, monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(words) == 2
    assert message in capsys.readouterr().err
