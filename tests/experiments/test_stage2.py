"""Stage two in miniature: its counting and its verdicts by hand, and the whole at a scale of seconds."""

import json

import pytest
import torch


@pytest.fixture
def stage2(benches):
    return benches("stage2")


def record(stage2, arm, values, steps=10, macs=10.0):
    scores = {kind: stage2.OverSeeds.of(values) for kind in stage2.EVALUATIONS}
    return stage2.ArmRecord(
        arm=arm, about=arm, steps=steps, macs=macs, target_macs=0.0, tflops=1.0, top1=scores
    )


def test_the_budget_is_the_steps_of_pixels(stage2):
    from vmae.model.cost import masked_macs

    scale, pixels = stage2.SCALES["full"], stage2.ARMS["pixels"]
    target = stage2.build(pixels, None)
    assert stage2.arm_steps(scale, "pixels", target) == scale.pretrain_steps
    each = 6 * masked_macs(stage2.MODEL, pixels.mask)
    assert stage2.budget(scale) == scale.pretrain_steps * each
    steps, flops = stage2.stage_one(scale)
    assert steps == scale.pretrain_steps * scale.stage_one and flops == steps * each


def test_an_arm_pays_for_its_teacher_and_gets_the_rest_in_steps(stage2):
    class Costly:
        width = 64

        def macs(self):
            return 10**7

    scale = stage2.SCALES["full"]
    before, found = stage2.stage_one(scale)[1], {}
    for name in ("salt", "salt-cells"):
        found[name] = stage2.arm_steps(scale, name, Costly())
        each = stage2.clip_flops(stage2.ARMS[name].mask, Costly())
        spent = before + found[name] * each
        assert stage2.budget(scale) - each < spent <= stage2.budget(scale)
    assert found["salt-cells"] > found["salt"]


def test_differences_are_paired_and_verdicts_say_what_was_asked_for(stage2):
    records = [
        record(stage2, "random", [10.0, 20.0, 30.0]),
        record(stage2, "pixels", [40.0, 50.0, 60.0]),
        record(stage2, "salt", [46.0, 57.0, 68.0]),
        record(stage2, "salt-cells", [44.0, 55.0, 66.0], steps=12, macs=8.0),
        record(stage2, "continued", [41.0, 51.0, 61.0]),
    ]
    found = stage2.differences(records)
    first = next(d for d in found if d.better == "salt")
    assert first.worse == "pixels" and first.points.values == [6.0, 7.0, 8.0]
    assert first.points.mean == 7 and first.points.std == 1 and first.points.error == pytest.approx(3**-0.5)
    assert ("random", "pixels") in {(d.better, d.worse) for d in found}
    lines = stage2.verdicts(records, found)
    assert lines[0].startswith("salt over pixels, attentive probe: +7.0 points, standard error 0.6")
    assert lines[0].endswith("(asked for: +5 or more) ok") and "linear probe" in lines[1]
    assert lines[2].endswith("(asked for: +5 or more) NOT MET") and "continued over pixels" in lines[2]
    assert lines[4].endswith("(asked for: -1 or more) NOT MET") and "-2.0 points" in lines[4]
    assert "save 20 % of the student's MACs, 20 % of a step's FLOPs: 12 steps, not 10" in lines[6]


def test_the_random_arm_is_the_seed_s_weights(stage2, tmp_path):
    from vmae import build_pretrainer
    from vmae.checkpoint.published import read_settings_and_weights

    for seed in (0, 1):
        stage2.write_random(tmp_path / f"{seed}.pth", seed)
    settings, weights = read_settings_and_weights(tmp_path / "1.pth")
    torch.manual_seed(1)
    fresh = build_pretrainer(stage2.MODEL).state_dict()
    assert settings["model"]["embed_dim"] == stage2.MODEL.embed_dim
    assert all(torch.equal(weights[name], fresh[name]) for name in fresh)
    other = read_settings_and_weights(tmp_path / "0.pth")[1]
    assert not torch.equal(
        weights["encoder.patch_embed.proj.weight"], other["encoder.patch_embed.proj.weight"]
    )


@pytest.mark.slow
def test_from_nothing_to_the_table(stage2, tmp_path, capsys):
    words = ["--scale", "smoke", "--seeds", "1", "--out", str(tmp_path)]
    assert stage2.main(words) == 0
    assert "salt over pixels, attentive probe" in capsys.readouterr().out
    from harness.results import read_result

    result = read_result(tmp_path / "stage2.json", "stage2")
    assert [r.arm for r in result.records] == list(stage2.ARMS)
    assert all(0 <= r.top1[kind].mean <= 100 for r in result.records for kind in stage2.EVALUATIONS)
    assert (tmp_path / "stage2.png").stat().st_size > 1000
    for record in result.records[1:]:
        log = (tmp_path / f"0-{record.arm}" / "pre-training" / "log.jsonl").read_text().splitlines()
        assert json.loads(log[-1])["step"] == record.steps > 0
    assert result.records[0].steps == 0
    starts = [
        (tmp_path / f"0-{name}" / "pre-training" / "config.yaml").read_text()
        for name in ("salt", "continued")
    ]
    init = f"\ninit: {tmp_path / '0-teacher' / 'pre-training'}\n"
    assert [init in text for text in starts] == [False, True]
    assert stage2.main(words) == 0  # everything is there: nothing is trained again
    assert read_result(tmp_path / "stage2.json", "stage2").seconds == result.seconds
