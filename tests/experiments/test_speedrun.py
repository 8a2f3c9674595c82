"""The speedrun: its scores by hand, its flags, a user's own videos, and an entry from nothing in seconds."""

import json

import pytest


@pytest.fixture
def speedrun(benches):
    return benches("speedrun")


def seed_run(speedrun, seed, *percents):
    passes = [speedrun.Pass(flops=1e12 * number, top1=top1) for number, top1 in enumerate(percents)]
    return speedrun.SeedRun(seed=seed, seconds=10.0, probe_s=1.0, passes=passes)


def record(speedrun, entry, *runs):
    about = dict(about=entry, date="2026-01-01", commit="c" * 40, goal=60.0, legs=[])
    return speedrun.EntryRecord(entry=entry, runs=list(runs), **about)


def test_a_score_is_the_mean_of_the_seeds_and_needs_all_of_them(speedrun):
    both = record(speedrun, "x", seed_run(speedrun, 0, 50, 55, 60), seed_run(speedrun, 1, 50, 61))
    one = record(speedrun, "y", seed_run(speedrun, 0, 50, 70), seed_run(speedrun, 1, 50, 58, 57))
    assert both.score == 1.5e12 and one.score is None and one.best == 58
    environment = speedrun.find_environment()
    result = speedrun.SpeedrunResult(environment=environment, records=[one, both], race={})
    (table,) = result.tables()
    first, last = table.rows
    assert table.head[2:4] == ["TFLOP to 60 %", "to 57 %"]
    assert first[0] == "x" and first[2:4] == ["1.50 (1.00 to 2.00)"] * 2
    assert last[2:4] == ["not reached by 1 of 2 (58.0 % by all)", "1.00 (1.00 to 1.00)"]


def test_every_entry_is_a_command_that_pretrain_takes(speedrun, tmp_path):
    """And names each teacher by the folder of its leg."""
    from vmae.cli import build_parser

    race = speedrun.Race(goal=60.0, flags=["--data", "x.txt", "--probe-data", "y.txt", "--probe-every", "9"])
    for entry in speedrun.ENTRIES.values():
        folders = []
        for number in range(len(entry.legs)):
            folders.append(tmp_path / str(number))
            flags = speedrun.leg_flags(race, entry, number, 1, folders)
            words = ["pretrain", "--output", "run", *map(str, flags)]
            settings = build_parser("pretrain").parse_args(words)
            assert settings.probe_goal == 60 and not any("{" in word for word in words)
            if "--teacher" in words:
                assert settings.teacher == words[words.index("--teacher") + 1] == str(tmp_path / "0")


def test_a_user_s_videos_keep_the_method_and_the_shares_of_the_legs(speedrun, tmp_path):
    legs = (speedrun.Leg(100, ("--one",)), speedrun.Leg(300, ("--teacher", "{0}")))
    entry = speedrun.Entry("two", legs)
    race = speedrun.Race(goal=40.0, flags=["--data", "x"], own=["--model", "vit_b"], steps=3000)
    first, second = (speedrun.leg_flags(race, entry, number, 0, [tmp_path]) for number in (0, 1))
    assert first[:3] == ["--model", "vit_b", "--one"] and first[first.index("--steps") + 1] == 1000
    assert second[2:4] == ["--teacher", str(tmp_path)] and second[second.index("--steps") + 1] == 3000


@pytest.mark.parametrize(
    "words, text",
    [
        ("--goal 50", "--labels, --queries, --goal and flags after `--` go with --data"),
        ("-- --lr 1", "go with --data"),
        ("--seeds 1 --records x.json", "a record has the seeds 0 to 2"),
        ("--data x.txt --labels y.txt", "--data needs --labels LIST, to probe on, and --goal PERCENT"),
        ("--data x.txt --labels y.txt --goal 50", "needs a model and a length: -- --model NAME --steps N"),
        ("--seeds 0", "--seeds must be at least 1"),
        ("--first-seed -1", "--first-seed must be at least 0"),
        ("--data x --labels y --goal 50 -- --steps=many", "--steps many: must be a whole number from 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(speedrun, tmp_path, capsys, words, text):
    assert speedrun.main(["--out", str(tmp_path / "out"), *words.split()]) == 2
    assert text in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_corrected_command_may_take_the_folder(speedrun, tmp_path, capsys):
    words = ["--out", str(tmp_path), "--seeds", "1", "--data", "gone.txt", "--labels", "x.txt", "--goal"]
    flags = ["--", "--model", "vit_tiny", "--steps", "2", "--device", "cpu"]
    for goal in ("5", "6"):
        assert speedrun.main([*words, goal, *flags]) == 2
        assert "list file 'gone.txt' does not exist" in capsys.readouterr().err
    (tmp_path / "baseline_0" / "leg-1").mkdir(parents=True)
    assert speedrun.main([*words, "7", *flags]) == 2
    assert "holds runs of another race" in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [("{", "not a result of speedrun"), ("{}", "not a result of")])
def test_a_file_of_records_that_holds_something_else_is_named(speedrun, tmp_path, text, message):
    path, race = tmp_path / "records.json", speedrun.Race(goal=1.0, flags=[])
    assert speedrun.read_records(None, race) == speedrun.read_records(path, race) == []
    path.write_text(text)
    with pytest.raises(speedrun.InputError, match=f"records.json: {message}"):
        speedrun.read_records(path, race)


@pytest.mark.slow
def test_an_entry_from_nothing_and_on_videos_of_one_s_own(speedrun, tmp_path, capsys):
    from harness.results import read_result

    own, file = tmp_path / "made", tmp_path / "records.json"
    words = ["--scale", "smoke", "--seeds", "1", "--records", str(file)]
    assert speedrun.main([*words, "--out", str(own)]) == 0
    assert "TFLOP to" in capsys.readouterr().out
    again = ["--out", str(tmp_path / "elsewhere"), "--entry", "lean"]
    assert speedrun.main([*words, *again]) == 0  # the same race, from another folder: its records stay
    assert {one.entry for one in read_result(file, "speedrun").records} == {"baseline", "lean"}
    found = read_result(file, "speedrun").records[0]
    (run,) = found.runs
    log = [json.loads(line) for line in (own / "baseline_0/leg-1/log.jsonl").read_text().splitlines()]
    assert [one.flops for one in run.passes] == [one["probe_flops"] for one in log if "probe_flops" in one]
    assert (own / "speedrun.png").stat().st_size > 1000
    world = own / "world"
    lists = ["--data", f"{world}/unlabeled.txt", "--labels", f"{world}/train_a.txt", "--goal", "1"]
    model = "--model vit_tiny --patch-size 8 --num-frames 8 --image-size 32 --stride 1 --batch-size 2"
    rest = "--steps 2 --probe-every 1 --device cpu --workers 0 --no-tensorboard"
    words = ["--seeds", "1", "--out", str(tmp_path / "own"), *lists]
    flags = ["--", *model.split(), *rest.split()]
    assert speedrun.main([*words, "--records", str(file), *flags]) == 2
    assert "records.json holds records of another race" in capsys.readouterr().err
    assert speedrun.main([*words, *flags]) == 0
    (found,) = read_result(tmp_path / "own" / "speedrun.json", "speedrun").records
    assert found.goal == 1 and 1 < len(found.runs[0].passes) <= 3
    assert speedrun.main([*words, "--goal", "2", *flags]) == 2
    assert "holds runs of another race" in capsys.readouterr().err
