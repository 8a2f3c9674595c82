"""The GPU day: stages of commands that may fail, hang or be left out; and a rehearsal of all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "good": "import json, sys; json.dump({'done': True}, open(sys.argv[-1], 'w')); print('good')",
    "bad": "import sys; print('sorry', file=sys.stderr); sys.exit(3)",
    "slow": "import sys, time; open(sys.argv[-1], 'w').write('{}'); print('begun'); time.sleep(60)",
}


@pytest.fixture
def gpu(benches, tmp_path, monkeypatch):
    """The command with one stage of scripts that take no time, as if there was a GPU."""
    module, stages = benches("gpu"), benches("stages")
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text)

    def command(name, **more):
        return stages.Command(name=name, limit_s=2, words=stages.words(f"{name}.py"), **more)

    lost = command("lost", needs=lambda day: "no such package")
    broken = command("broken", needs=lambda day: 1 / 0)
    first = stages.Stage(
        title="first", commands=(command("bad"), command("slow"), lost, broken, command("good"))
    )
    second = stages.Stage(title="second", commands=(command("good"),))
    monkeypatch.setattr(stages, "BENCH", tmp_path)
    monkeypatch.setattr(module, "STAGES", {"a": first, "b": second})
    monkeypatch.setattr(module, "OF_A_REHEARSAL", {module.REHEARSE: "1"})
    monkeypatch.setenv(module.REHEARSE, "1")  # put back at the end
    return module


def written(folder):
    content = json.loads((folder / "gpu.json").read_text())
    return {stage["stage"]: {c["name"]: c for c in stage["commands"]} for stage in content["records"]}


@pytest.mark.slow
def test_failure_is_a_record_and_the_next_command_runs(gpu, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "bad.json").write_text("{}")  # of an earlier run: no result of this one
    assert gpu.main(["--rehearse", "--output", str(out)]) == 1
    stages = written(out)
    first = stages["a"]
    assert {name: c["status"] for name, c in first.items()} == {
        "bad": "failed",
        "slow": "cut off",
        "lost": "skipped",
        "broken": "skipped",
        "good": "ran",
    }
    assert "code 3" in first["bad"]["reason"] and first["bad"]["file"] is None
    assert first["slow"]["file"] == "slow.json" and first["slow"]["seconds"] < 30  # what it had is kept
    assert first["lost"]["reason"] == "no such package" and "ZeroDivisionError" in first["broken"]["reason"]
    assert first["good"]["file"] == "good.json" and stages["b"]["good"]["status"] == "ran"
    assert "sorry" in (out / "bad.log").read_text() and (out / "report.html").is_file()
    shown = capsys.readouterr().out
    assert "failed: it ended with code 3" in shown and "REHEARSAL: nothing is measured" in shown
    assert str(ROOT) not in json.dumps(first["good"]["command"])


@pytest.mark.slow
def test_one_stage_keeps_the_others(gpu, tmp_path):
    out = tmp_path / "out"
    assert gpu.main(["--rehearse", "--output", str(out), "--stage", "b"]) == 0
    assert gpu.main(["--rehearse", "--output", str(out), "--stage", "a"]) == 1
    assert list(written(out)) == ["a", "b"]
    assert gpu.main(["--rehearse", "--output", str(out), "--stage", "b"]) == 0  # of this start alone


@pytest.mark.slow
def test_a_stage_ends_in_time(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "STAGE_S", 1.5)
    out = tmp_path / "out"
    assert gpu.main(["--rehearse", "--output", str(out), "--stage", "a"]) == 1
    commands = written(out)["a"]
    assert commands["good"]["status"] == "cut off" and "before it began" in commands["good"]["reason"]


def test_a_rehearsal_and_a_real_day_do_not_mix(gpu, tmp_path, capsys):
    out = tmp_path / "out"
    assert gpu.main(["--rehearse", "--output", str(out), "--stage", "b"]) == 0
    content = json.loads((out / "gpu.json").read_text())
    content["environment"]["device"] = "NVIDIA H100"
    (out / "gpu.json").write_text(json.dumps(content))
    assert gpu.main(["--rehearse", "--output", str(out)]) == 2
    assert "is of a real day" in capsys.readouterr().err


def test_without_a_gpu_there_is_a_rehearsal_only(benches, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benches("gpu").main([]) == 2
    assert "--rehearse runs every stage on a CPU" in capsys.readouterr().err


def day_of(stages, folder, **changed):
    known = dict(folder=folder, rehearsed=False, device_name="NVIDIA H100 80GB HBM3", gpus=1)
    return stages.Day(**known | changed)


def test_stages_fit_their_time_and_their_commands_are_there(benches, tmp_path):
    stages = benches("stages")
    from harness.results import RESULTS

    assert list(stages.STAGES) == ["a", "b", "c", "d"]
    for rehearsed in (False, True):
        day = day_of(stages, tmp_path, rehearsed=rehearsed)
        for stage in stages.STAGES.values():
            assert sum(command.limit_s for command in stage.commands) <= stages.STAGE_S == 480
            for command in stage.commands:
                line = command.line(day)
                scripts = [Path(word) for word in line if word.endswith(".py") and "tests/" not in word]
                assert line[0] == sys.executable and all(script.is_file() for script in scripts)
                assert scripts or line[1:3] == ["-m", "vmae_kernels.build"]
                known = command.name.partition(".")[0] in RESULTS
                assert known or not command.writes or command.name == "kernel_predictions"
                if command.writes:
                    assert str(day.file(command.name)) in line


def test_results_go_before_what_is_for_another_program(benches, tmp_path):
    stages = benches("stages")
    day = day_of(stages, tmp_path, rehearsed=True)
    line = stages.STAGES["a"].commands[0].line(day)
    assert line.index("--json") < line.index("--") and line[-2:-1] != ["--json"]


def test_what_is_left_out_says_why(benches, tmp_path):
    stages = benches("stages")
    day = day_of(stages, tmp_path)
    assert stages.needs_two_gpus(day) == "one GPU here"
    assert stages.needs_two_gpus(day_of(stages, tmp_path, gpus=2)) is None
    assert "no operations.json, other.json in" in stages.needs_file("operations", "other")(day)
    (tmp_path / "operations.json").write_text("{}")
    assert stages.needs_file("operations")(day) is None
    odd = day_of(stages, tmp_path, device_name="NVIDIA L4")
    assert stages.needs_prediction("operations")(odd) == "nothing is predicted for NVIDIA L4"
    for name, gpu in {"NVIDIA H200": "H100", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA L4": None}.items():
        assert stages.predicted_gpu(name) == gpu


# --- the parts ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_outcomes_of_tests_are_written_as_they_come(benches, tmp_path, capsys):
    bench = benches("device_tests")
    (tmp_path / "test_some.py").write_text(
        "import json, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_left_out(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('gone')\n"
        "def test_broken(broken): pass\n"
    )
    (tmp_path / "test_none.py").write_text("import no_such_package\n")
    path = tmp_path / "t.json"
    words = [str(tmp_path), "--rootdir", str(tmp_path), "-c", os.devnull, "--continue-on-collection-errors"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "device_tests.py"), "--json", str(path), "--", *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    content = json.loads(path.read_text())
    found = {r["name"].rpartition("::")[2].rpartition("/")[2]: r for r in content["records"]}
    assert {name: r["outcome"] for name, r in found.items()} == {
        "test_none.py": "error",
        "test_good": "passed",
        "test_bad": "failed",
        "test_left_out": "skipped",
        "test_broken": "error",
    }
    assert found["test_left_out"]["reason"] == "no GPU" and "assert 1 == 2" in found["test_bad"]["reason"]
    assert "gone" in found["test_broken"]["reason"] and content["complete"]
    from harness.results import read_result

    result = read_result(path, "device_tests")
    assert "2 error, 1 failed, 1 passed, 1 skipped" in result.tables()[0].note
    assert bench.usual_arguments()[:2] == ["tests/device", "tests/kernels"]


@pytest.mark.slow
def test_files_of_tests_run_at_once_and_their_outcomes_are_one_result(benches, tmp_path):
    bench = benches("device_tests")
    for name, text in {"good": "pass", "bad": "assert False", "other": "pass"}.items():
        (tmp_path / f"test_{name}.py").write_text(f"def test_{name}(): {text}\n")
    path = tmp_path / "t.json"
    words = [str(tmp_path), "--rootdir", str(tmp_path), "-c", os.devnull, "-k", "not other"]
    assert bench.split(words)[0] == [str(tmp_path / f"test_{name}.py") for name in ("bad", "good", "other")]
    command = [sys.executable, str(ROOT / "bench" / "device_tests.py"), "--jobs", "2", "--json", str(path)]
    done = subprocess.run([*command, "--", *words], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert {r["name"].rpartition("::")[2]: r["outcome"] for r in content["records"]} == {
        "test_good": "passed",
        "test_bad": "failed",
    }
    assert content["complete"] and "assert False" in done.stdout


@pytest.mark.parametrize(
    ("status", "code", "text", "expected"),
    [
        ("ran", 0, "===== ERROR SUMMARY: 0 errors", ("clean", 0)),
        ("failed", 86, "===== Invalid __global__ read\n===== ERROR SUMMARY: 2 errors", ("errors", 2)),
        ("ran", 0, "===== RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)", ("errors", 1)),
        ("ran", 0, "===== RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", ("clean", 0)),
        ("failed", 1, "FAIL embed_visible\n===== ERROR SUMMARY: 0 errors", ("failed", 0)),
        ("failed", 255, "unsupported", ("failed", None)),
        ("ran", 0, "nothing of the kind", ("failed", None)),
        ("cut off", None, "===== COMPUTE-SANITIZER", ("cut off", None)),
    ],
)
def test_what_a_sanitizer_says(benches, status, code, text, expected):
    record = benches("sanitize").record_of("memcheck", status, code, 1.0, text)
    assert (record.status, record.errors) == expected
    assert ("Invalid __global__ read" in record.first) == ("Invalid" in text)


def test_no_sanitizer_is_a_record(benches, tmp_path, monkeypatch):
    sanitize = benches("sanitize")
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main(["--json", str(tmp_path / "s.json")]) == 0
    (record,) = json.loads((tmp_path / "s.json").read_text())["records"]
    assert record["status"] == "not here" and "CUDA toolkit" in record["reason"]


def predictions(tmp_path):
    whole = dict(operation="embed_visible", preset="vit_b", batch=32, kernel="all", target="sm_90")
    part = whole | dict(kernel="embed_visible_fwd_kernel", registers=177, programs_per_sm=1)
    records = [
        part | dict(direction="forward", predicted_us=[10.0, 12.0], floor_us=5.0),
        part | dict(direction="backward", predicted_us=[4.0, 5.0], floor_us=2.0),
        whole | dict(direction="forward", predicted_us=[10.0, 12.0], floor_us=5.0),
        whole | dict(direction="both", predicted_us=[30.0, 40.0], floor_us=20.0),
        whole | dict(direction="backward", predicted_us=[20.0, 28.0], floor_us=15.0),
    ]
    path = tmp_path / "predicted.json"
    path.write_text(json.dumps({"schema": "vmae-predict/1", "records": records}))
    return path


def test_kernels_against_their_predictions(benches, tmp_path, capsys):
    scores = benches("kernel_scores")
    from harness.environment import find_environment
    from harness.floors import GPUS
    from harness.results.operations import KernelRecord, OperationsResult, TimeRecord

    known = dict(operation="embed_visible", shape="vit_b", batch=32)
    time = dict(
        **known, floor_us=1.0, ceilings=GPUS["H100"], bytes=1.0, matrix=1.0, vector=0.0, error_ratio=0.1
    )
    records = [
        TimeRecord(**time, direction="forward", variant="triton", median=9.0),
        TimeRecord(**time, direction="both", variant="triton", median=50.0),
        TimeRecord(**time, direction="both", variant="eager", median=90.0),
        KernelRecord(**known, direction="both", kernel="embed_visible_fwd_kernel", us=16.0),
    ]
    measured = tmp_path / "operations.json"
    OperationsResult(environment=find_environment(), records=records).write(measured)
    words = ["--measured", str(measured), "--json", str(tmp_path / "s.json")]
    assert scores.main(["--predicted", str(predictions(tmp_path)), *words]) == 0
    content = json.loads((tmp_path / "s.json").read_text())
    found = {(r["direction"], r["kernel"]): r for r in content["records"]}
    assert {key: r["place"] for key, r in found.items()} == {
        ("forward", "all"): "faster",
        ("both", "all"): "slower",
        ("both", "embed_visible_fwd"): "inside",
    }
    both = found["both", "embed_visible_fwd"]
    assert (both["predicted_us"], both["floor_us"]) == ([14.0, 17.0], 7.0)
    assert both["model"] == {"registers": 177, "programs_per_sm": 1}
    assert found["both", "all"]["over"] == pytest.approx(50 / 35)
    assert content["unmatched"] == ["embed_visible vit_b batch 32 forward embed_visible_fwd"]
    assert "1 of 3 inside" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{}", '{"records": [{"kernel": "k"}]}', '{"records": 3}'])
def test_what_are_no_predictions(benches, tmp_path, capsys, text):
    path = tmp_path / "p.json"
    path.write_text(text)
    scores = benches("kernel_scores")
    with pytest.raises(scores.InputError, match="vmae_kernels.build --predict --json"):
        scores.read_predictions(str(path))
    with pytest.raises(scores.InputError, match="no prediction has a measurement"):
        scores.score(scores.read_predictions(str(predictions(tmp_path))), {})


def log_line(step, **changed):
    known = dict(step=step, step_s=0.1, clips_per_s=20.0, data_share=0.25, mfu=None, memory=2**30, loss=1.0)
    return known | changed


@pytest.mark.slow
def test_what_the_log_of_a_run_says(benches):
    run = benches("training_run")
    args = run.parse_args(["--device", "cpu", "--warmup", "3", "--profiled", "2"])
    record = run.record_of(args, ranks=1)
    # Four times float32 parameters and more: the plan knows the state.
    assert record.planned_memory_bytes > 4 * 4 * 1_000_000
    compiled = {"graphs": 4, "recompilations": 1, "breaks": 0, "failed": 0}
    lines = [log_line(5, step_s=9.0, data_share=0.9, compiled=compiled), log_line(10), log_line(15, mfu=0.5)]
    lines += [log_line(20, step_s=0.3, data_share=0.75, memory=2**31, loss=0.5)]
    found = run.with_log(record, lines, counted_from=5, seconds=7.0)
    assert (found.steps, found.warmup_steps, found.step_ms.median) == (15, 5, pytest.approx(100.0))
    assert found.data_share == pytest.approx(1.25 / 3) and found.mfu == 0.5 and found.last_loss == 0.5
    assert (found.graphs, found.recompilations, found.graph_breaks) == (4, 1, 0)
    assert found.peak_memory_bytes == 2**31
    late = run.with_log(record, lines[:1], counted_from=5, seconds=7.0)
    assert late.reason == "only 5 steps in 7 s" and late.step_ms is None


def test_workers_that_cores_and_shared_memory_have_room_for(benches):
    workers = benches("training_run").usual_workers
    of_batch = 32 * 16 * 224 * 224 * 3
    assert workers("vit_b", 32, 64, None) == workers("vit_b", 32, 14, 2**40) == 12
    assert workers("vit_b", 32, 8, None) == 6 and workers("vit_b", 32, 1, None) == 0
    assert workers("vit_b", 32, 64, 64 << 20) == 0  # a container's usual 64 MiB
    assert workers("vit_b", 32, 64, int(4 * 3 * of_batch / 0.8) + 1) == 4


def test_noise_is_a_function_of_the_sample(benches):
    run = benches("training_run")
    from vmae import MaskConfig
    from vmae.data import VideoEntry

    dataset = run.NoiseDataset(
        [VideoEntry(path="noise 0"), VideoEntry(path="noise 1")],
        num_frames=4,
        stride=1,
        image_size=32,
        grid=(2, 2, 2),
        mask=MaskConfig(encoder_ratio=0.5),
    )
    first, again, other = (dataset[key].clips for key in ((0, 0), (0, 0), (0, 1)))
    assert first.shape == (1, 4, 32, 32, 3) and first.dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, other)


BARE = """
import sys
for name in ("tqdm", "yaml", "PIL", "tensorboard", "av", "decord", "matplotlib"):
    sys.modules[name] = None  # as if it were not installed
sys.path.insert(0, "bench")
import training_run
sys.exit(training_run.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_training_where_small_helpers_are_missing(tmp_path):
    words = ["--device", "cpu", "--seconds", "1", "--batch", "1", "--warmup", "1", "--workers", "0"]
    command = [sys.executable, "-c", BARE, *words, "--json", str(tmp_path / "t.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["notes"] == [f"without {name}: a stand-in." for name in ("tqdm", "yaml", "PIL")]
    (record,) = content["records"]
    assert record["steps"] >= 5 and record["clips_per_s"] > 0 and record["reason"] is None


def test_several_ranks_need_one_folder(benches, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert benches("training_run").main(["--device", "cpu"]) == 2
    assert "several ranks need one --folder" in capsys.readouterr().err


def test_blocks_for_the_documents(benches, tmp_path, capsys):
    blocks = benches("blocks")
    from harness.environment import find_environment
    from harness.results.operations import CheckRecord, OperationsResult

    record = CheckRecord(operation="o", shape="s", dtype="bfloat16", error_ratio=0.5, ok=True)
    OperationsResult(environment=find_environment(), records=[record]).write(
        tmp_path / "operations.again.json"
    )
    (tmp_path / "step.json").write_text("{}")
    (tmp_path / "kernel_predictions.json").write_text("{}")  # no result: no block, no word
    assert blocks.main([str(tmp_path)]) == 0
    text = (tmp_path / "blocks.md").read_text()
    assert (
        f"## Kernels: again\n\n<!-- table operations.again {tmp_path}/operations.again.json -->\n| op" in text
    )
    assert benches("readme").rewritten(text, Path("/")) == text
    out = capsys.readouterr().out
    assert "left out" in out and "step.json" in out and "kernel_predictions" not in out
    assert blocks.main([str(tmp_path / "none")]) == 2


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Every command of every stage on a CPU, with nothing of this project on the path."""
    out = tmp_path / "out"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--rehearse", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    commands = {name: c for stage in written(out).values() for name, c in stage.items()}
    told = {name: f"{c['status']}: {c['reason']}" for name, c in commands.items() if c["status"] != "ran"}
    assert done.returncode == 0, f"{told}\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
    assert set(told) <= {"training_run.packed"}  # where there is no decoder
    assert len(commands) == 18
    for name, c in commands.items():
        if c["file"] and name != "kernel_predictions":
            content = json.loads((out / c["file"]).read_text())
            assert content["environment"]["device"] == "rehearsal", name
    assert "A rehearsal: nothing here was measured" in (out / "report.html").read_text()
    assert "REHEARSAL on a CPU" in (out / "blocks.md").read_text()
    assert "operations: slower than another way: nowhere" in done.stdout
