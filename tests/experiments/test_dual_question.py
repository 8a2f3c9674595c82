"""Dual against encoder-only masking: the arithmetic by hand, and the command at a size of seconds."""

import json
import sys

import pytest


@pytest.fixture
def question(benches):
    return benches("dual_question")


def runs(question, hidden, **values):
    make = question.ArmRun
    return [
        make(
            hidden=hidden, arm=arm.replace("_", "-"), seed=seed, steps=10, top1=top1, scores=[top1], macs=1.0
        )
        for arm, scores in values.items()
        for seed, top1 in enumerate(scores)
    ]


def test_differences_are_paired_by_seed(question):
    found = question.differences(
        runs(question, 50, dual=[70, 72, 77], encoder_only=[71, 70, 75])
        + runs(question, 75, dual=[60, 60], encoder_only=[60, 61], dual_longer=[65, 67])
    )
    assert [(one.hidden, one.arm, one.values) for one in found] == [
        (50, "dual", [-1, 2, 2]),
        (75, "dual", [0, -1]),
        (75, "dual-longer", [5, 6]),
    ]
    first = found[0]
    assert first.mean == 1 and first.std == pytest.approx(3**0.5) and first.error == pytest.approx(1)
    assert question.verdict(first).endswith(
        "error 1.00 (asked for: under 0.7) NOT MET; no difference is seen"
    )
    assert question.verdict(found[2]).endswith(
        "(asked for: under 0.7) ok; dual masking is ahead by more than two standard errors"
    )
    assert question.differences(runs(question, 50, dual=[70], encoder_only=[71])) == []
    (only,) = question.differences(runs(question, 50, dual=[70, 71, 72, 73], encoder_only=[71, 71]))
    assert only.values == [-1, 0]  # seeds that both arms have


def test_one_arm_trains_as_long_as_encoder_only_masking(question, tmp_path):
    (tmp_path / "times.json").write_text('{"dual": 0.08, "encoder-only": 0.1}')
    scale = question.MANY["full"]
    steps = {arm: question.steps_of(tmp_path, scale, arm) for arm in question.ARMS}
    assert steps == {"dual": 2400, "encoder-only": 2400, "dual-longer": 3000}
    assert question.measure_times(tmp_path / "times.json", 1)["dual"] == 0.08  # measured once
    counts = question.jobs_of(question.HIDDEN, 8)
    assert len(counts) == 8 * 5 and "50_dual-longer_0" not in counts
    assert list(question.jobs_of([50], 1)) == ["50_dual_0", "50_encoder-only_0"]
    some = question.jobs_of([50, 75], 1, ["encoder-only", "dual-longer"])
    assert list(some) == ["50_encoder-only_0", "75_encoder-only_0", "75_dual-longer_0"]


@pytest.mark.slow
def test_a_seed_from_nothing(question, tmp_path, monkeypatch, capsys):
    command = [
        "dual_question.py",
        "--scale",
        "smoke",
        "--seeds",
        "1",
        "--hidden",
        "75",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", command)
    assert question.main() == 0
    assert "21 of 21 stages" in capsys.readouterr().out
    content = json.loads((tmp_path / "dual_question.json").read_text())
    assert {run["arm"] for run in content["runs"]} == set(question.ARMS) and content["records"] == []
    for run in content["runs"]:
        assert len(run["scores"]) == 3 and run["top1"] == pytest.approx(sum(run["scores"]) / 3)
    assert min(content["step_s"].values()) > 0
