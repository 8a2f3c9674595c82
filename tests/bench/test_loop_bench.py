"""The training loop beside a bare step, at sizes of seconds."""

import json

import pytest


def test_loop_is_timed_beside_the_bare_step(benches, tmp_path, capsys):
    file = tmp_path / "loop.json"
    flags = ["--model", "vit_tiny", "--batch", "1", "--steps", "2", "--warmup", "0", "--json", str(file)]
    assert benches("loop").main(flags) == 0
    out = capsys.readouterr().out
    assert "loop / bare step" in out and "by the clock" in out
    content = json.loads(file.read_text())
    assert [record["variant"] for record in content["records"]] == ["bare step", "loop"]
    bare, loop = (record["step_ms"]["runs"] for record in content["records"])
    assert len(bare) == len(loop) == 2
    assert content["ratios"][0]["step"]["min"] == pytest.approx(min(b / a for a, b in zip(bare, loop)))


def test_loop_bench_names_a_wrong_device(benches, capsys):
    assert benches("loop").main(["--device", "tpu"]) == 2
    assert "unknown device 'tpu'" in capsys.readouterr().err
