"""Progressive training and the mask ablation as a user starts them, at sizes of seconds; their arithmetic by
hand."""

import json
import sys

import numpy as np
import pytest

from vmae.errors import InputError


@pytest.fixture
def progressive(benches):
    return benches("progressive")


@pytest.fixture
def mask_ablation(benches):
    return benches("mask_ablation")


@pytest.fixture
def tiny_world(benches):
    return benches("tiny_world")


def seeds(**values):
    from harness.results.progressive import SeedScores

    scores = [{arm: numbers[i] for arm, numbers in values.items()} for i in range(3)]
    return [
        SeedScores(seed=i, top1=top1, dual_loss=1, others_loss=1, seconds={}) for i, top1 in enumerate(scores)
    ]


def test_summary_and_verdicts(progressive):
    values = {
        "scratch": [10, 20, 30],
        "pre-trained": [40] * 3,
        "post-pre-trained": [42] * 3,
        "encoder-only": [41, 41, 44],
    }
    rows = progressive.summarise(seeds(**values))
    assert [row.mean for row in rows] == [20, 40, 42, 42]
    assert rows[0].std == 10 and rows[0].values == [10, 20, 30]
    lines = progressive.verdicts(rows)
    assert lines[0] == "pre-trained over scratch: +20.0 points (asked for: 15 or more) ok"
    assert lines[1].endswith("+2.0 points (asked for: 3 or more) NOT MET")
    assert lines[2].endswith("-2.0 points (asked for: within 1) NOT MET")


def test_masks_of_the_paper(mask_ablation):
    assert len(mask_ablation.MASKS) == 10 and mask_ablation.MASKS[0] == ("none", 0.0)
    macs = {(mask, ratio): mask_ablation.macs_of(mask, ratio) for mask, ratio in mask_ablation.MASKS}
    # three quarters are hidden from the encoder, which is what "none" rebuilds
    assert macs["frame", 0.25] == macs["none", 0.0] > macs["random", 0.5] > macs["running_cell", 0.75]
    assert macs["frame", 0.5] == macs["random", 0.5] == macs["running_cell", 0.5]


def test_stages_are_done_once_and_timed(tiny_world, tmp_path, capsys):
    stages, done = tiny_world.Stages(tmp_path / "job"), []
    result = tmp_path / "result"
    for _ in range(2):
        stages.once("first", result, lambda: (done.append(1), result.touch()))
    again = tiny_world.Stages(tmp_path / "job")
    again.once("first", result, lambda: done.append(2))
    result.unlink()
    again.once("first", result, lambda: (done.append(3), result.touch()))
    assert done == [1, 3] and set(again.seconds) == {"first"}
    assert capsys.readouterr().out == "== job: first\n" * 2


def test_a_stage_that_was_stopped_is_not_done(tiny_world, tmp_path):
    stages = tiny_world.Stages(tmp_path)
    with pytest.raises(InputError, match="training was stopped before its end"):
        stages.once("training", tmp_path / "weights.pth", lambda: None)
    assert not stages.seconds


def test_stacks_hold_the_frames_of_a_world_s_videos_and_are_written_once(tiny_world, tmp_path):
    from vmae.data import open_video

    world = tiny_world.WorldConfig(size=32, frames=4, unlabeled=14, few=2, many=1, shared=0, validation=1)
    tiny_world.write_world(tmp_path, world)
    lists = tiny_world.write_stacks(tmp_path, ("val_a",))
    lines = [line.split() for line in lists["val_a"].read_text().splitlines()]
    videos = [line.split() for line in (tmp_path / "val_a.txt").read_text().splitlines()]
    assert len(lines) == 10 and [label for _, label in lines] == [label for _, label in videos]
    stack, video = tmp_path / lines[3][0], tmp_path / videos[3][0]
    with open_video(video) as reader, open_video(stack) as stored:
        expected = reader.frames(range(len(reader)))
        assert np.array_equal(stored.frames(range(len(stored))), expected) and expected.std() > 1
    stack.write_bytes(b"as it is")
    assert tiny_world.write_stacks(tmp_path, ("val_a",)) == lists and stack.read_bytes() == b"as it is"


def test_a_job_that_fails_shows_its_log(tiny_world, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('what went wrong')\nsys.exit(3)\n")
    with pytest.raises(InputError, match="job a ended with 3:\nwhat went wrong"):
        tiny_world.run_jobs(str(script), {"a": 1}, tmp_path, "smoke")


def test_jobs_say_how_far_they_are(tiny_world, benches, tmp_path, monkeypatch, capsys):
    progress = benches("progress")
    monkeypatch.setattr(progress, "EVERY_S", 0.3)
    script = tmp_path / "script.py"
    script.write_text("import time\nprint('step 3 of 9', flush=True)\ntime.sleep(1.5)\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "seconds.json").write_text('{"first": 2.0}')
    with progress.telling():
        tiny_world.run_jobs(str(script), {"a": 1, "b": 2}, tmp_path, "smoke")
    found = capsys.readouterr()
    assert found.out == "1 of 3 stages, 0.0 min\n"
    assert "  0.0 min: 1 of 3 stages; a: step 3 of 9; b: step 3 of 9\n" in found.err


def test_a_job_waits_for_the_one_that_it_needs(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_world.os, "cpu_count", lambda: 3)
    script, times = tmp_path / "script.py", {}
    lines = "import sys, time\nprint(time.time(), flush=True)\ntime.sleep(0.5)\nprint(time.time())\n"
    script.write_text(lines)
    after = {"student": "teacher"}
    tiny_world.run_jobs(str(script), {"student": 1, "teacher": 1, "other": 1}, tmp_path, "smoke", after)
    for name in ("student", "teacher", "other"):
        times[name] = [float(line) for line in (tmp_path / f"{name}.log").read_text().split()]
    assert times["student"][0] > times["teacher"][1] > times["other"][0]


def test_a_command_that_fails_ends_everything(tiny_world):
    with pytest.raises(InputError, match="ended with 2"):
        tiny_world.run("evaluate", "gone.txt", "--checkpoint", "gone", "--output", "out")


@pytest.mark.slow
def test_from_nothing_to_the_table(progressive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["progressive.py", "--scale", "smoke", "--seeds", "1", "--out", str(tmp_path)]
    )
    assert progressive.main() == 0
    out = capsys.readouterr().out
    assert "post-pre-trained over pre-trained" in out and "11 of 11 stages" in out
    assert "head of 14 classes converted to 10" in (tmp_path / "0-dual.log").read_text()
    result = json.loads((tmp_path / "progressive.json").read_text())
    assert [row["arm"] for row in result["records"]] == list(progressive.ARMS)
    assert all(0 <= value <= 100 for row in result["records"] for value in row["values"])
    assert (tmp_path / "progressive.png").stat().st_size > 1000
    assert progressive.main() == 0  # everything is there: nothing is trained again
    again = json.loads((tmp_path / "progressive.json").read_text())
    assert again["seeds"] == result["seeds"]


@pytest.mark.slow
def test_two_masks_to_the_table(mask_ablation, benches, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mask_ablation, "MASKS", [("none", 0.0), ("frame", 0.75)])
    monkeypatch.setattr(sys, "argv", ["mask_ablation.py", "--scale", "smoke", "--out", str(tmp_path)])
    assert mask_ablation.main() == 0
    assert "frame" in capsys.readouterr().out
    result = json.loads((tmp_path / "mask_ablation.json").read_text())
    records = result["records"]
    assert [record["mask"] for record in records] == ["none", "frame"] and all(
        record["loss"] > 0 for record in records
    )
    path = tmp_path / "mask_ablation.json"
    from harness.results import read_result

    table = read_result(path, "mask_ablation").tables()[0]
    assert [row[:2] for row in table.rows] == [["none", "0 %"], ["frame", "75 %"]] and "1 seed;" in table.note
    runs = [
        {"seed": 0, "loss": 1, "top1": 10.0, "seconds": 9.0},
        {"seed": 1, "loss": 1, "top1": 30.0, "seconds": 7},
    ]
    result["records"][0] |= {"top1": 20.0, "runs": runs}
    path.write_text(json.dumps(result))
    table = read_result(path, "mask_ablation").tables()[0]
    assert table.rows[0][4:] == ["20.0 (10.0 to 30.0)", "7"] and "2 seeds;" in table.note
