"""Counting without a GPU, and scoring predictions when one was there."""

import json

import pytest

from vmae_kernels.backend import OPERATIONS


@pytest.mark.slow
def test_counts_intervals_and_floors(benches, tmp_path, capsys):
    words = ["--presets", "vit_s", "--variants", "reference", "triton", "triton+compile"]
    words += ["--json", str(tmp_path / "r.json")]
    assert benches("predict").main(words) == 0
    content = json.loads((tmp_path / "r.json").read_text())
    steps = {(r["variant"], r["masking"]): r for r in content["records"] if r["kind"] == "step"}
    assert set(steps) == {(v, m) for v in words[3:6] for m in ("encoder_only", "dual")}
    ours, base = steps["triton", "dual"], steps["reference", "encoder_only"]
    expected = ours["saved_activation_bytes_per_clip"] / base["saved_activation_bytes_per_clip"]
    assert ours["over_reference_encoder_only"] == pytest.approx(expected) and expected < 0.25
    for record in steps.values():
        assert set(record["predicted_step_ms"]) >= {"H100"}
        for span in record["predicted_step_ms"].values():
            assert 0 < span["fast"] < span["slow"]
    fast = {name: record["predicted_step_ms"]["H100"]["fast"] for name, record in steps.items()}
    assert fast["triton+compile", "dual"] < fast["triton", "dual"] < fast["triton", "encoder_only"]
    parts = {r["part"]: r for r in content["records"] if r["kind"] == "part"}
    assert {r["variant"] for r in parts.values()} == {"triton+compile"}
    assert {"products", "attention backward", "embed_visible", "host", "optimizer", "step"} <= set(parts)
    done = [r["ms"]["fast"] for name, r in parts.items() if name not in ("host", "optimizer", "step")]
    assert parts["step"]["ms"]["fast"] == pytest.approx(max(sum(done), parts["host"]["ms"]["fast"]))
    assert all(r["source"] for r in parts.values())
    floors = [r for r in content["records"] if r["kind"] == "floor"]
    assert len(floors) == 2 * len(OPERATIONS) and all(r["floor_us"]["H100"] > 0 for r in floors)
    best, worst = content["assumptions"]["product_share"]
    assert best > worst
    assert "PREDICTED, not measured" in capsys.readouterr().out


def measured(step_ms: float | None) -> dict:
    counts = {"saved_activation_bytes_per_clip": 60 * 2**20, "forward_macs_per_clip": 24 * 10**9}
    names = {"model": "vit_b", "variant": "triton", "masking": "dual", "batch": 32, "dtype": "bfloat16"}
    record = {**names, **counts, "device": "cuda"}
    if step_ms is not None:
        record["step_ms"], record["optimizer_ms"] = times(step_ms), times(0.0)
    return record


def times(ms: float) -> dict:
    return {"median": ms, "min": ms, "max": ms, "runs": [ms]}


def write(path, records) -> None:
    environment = {"device": "gpu", "cpu": "c", "cores": 1, "torch": "2", "commit": None, "clean": None}
    environment["date"] = "2026-01-02"
    path.write_text(json.dumps({"environment": environment, "records": records}))


def test_scoring(benches, tmp_path, capsys):
    predict, path = benches("predict"), tmp_path / "m.json"
    expected = predict.step_parts.step_interval("triton", "dual", "vit_b", 32, "h100")
    middle = (expected.fast + expected.slow) / 2
    write(path, [measured(1.0), measured(middle), measured(1000.0), measured(None)])
    found = predict.score(predict.read_steps(path), "H100")
    assert [r.place for r in found] == ["faster", "inside", "slower"]
    write(path, [measured(middle)])
    assert predict.main(["--score", str(path)]) == 0
    assert "inside" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file"),
        ("{}", "not a result of dual_vs_encoder: StepsResult"),
        ("[1]", "[1] is no StepsResult"),
        ("untimed", "no timed step"),
    ],
)
def test_scoring_bad_files(benches, tmp_path, capsys, text, message):
    path = tmp_path / "m.json"
    if text == "untimed":
        write(path, [measured(None)])
    elif text is not None:
        path.write_text(text)
    assert benches("predict").main(["--score", str(path)]) == 2
    assert message in capsys.readouterr().err
