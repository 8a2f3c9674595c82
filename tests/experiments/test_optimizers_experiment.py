"""AdamW against Muon: two short runs from nothing to the table."""

import json

import pytest


@pytest.mark.slow
def test_two_runs_to_the_table(benches, tmp_path, capsys):
    optimizers = benches("optimizers")
    flags = ["--scale", "smoke", "--seeds", "1", "--rates", "0.064"]
    assert optimizers.main([*flags, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "adamw" in out and "4 steps, 1 seeds" in out
    records = json.loads((tmp_path / "optimizers.json").read_text())["records"]
    assert [(one["opt"], one["lr"], len(one["runs"])) for one in records] == [
        ("adamw", 0.064, 1),
        ("muon", 0.064, 1),
    ]
    losses = [one["runs"][0]["loss"] for one in records]
    assert all(0 < loss < 1 for loss in losses) and losses[0] != losses[1]


def test_the_mean_of_a_tenth(benches):
    records = [{"step": step, "loss_mean": float(step)} for step in range(1, 41)]
    assert benches("optimizers").final_loss_of(records, 20) == 19.5
    assert benches("optimizers").final_loss_of(records, 50) is None
