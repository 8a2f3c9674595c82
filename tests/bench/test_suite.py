"""The suite on scripts of its own that take no time; its page."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"device": "cpu", "cpu": "a cpu", "cores": 2, "torch": "2"}
ENVIRONMENT |= {"commit": "0123456789abc", "clean": True, "date": "2026-01-02"}

GOOD = """
import json, sys
print("working")
environment = {"device": "cpu", "cpu": "a cpu", "cores": 2, "torch": "2", "commit": None, "clean": None}
environment["date"] = "2026-01-02"
classes = [{"name": "matrix products", "ms": 7.25, "share": 0.9, "calls": 3.0}]
classes.append({"name": "host gaps", "ms": 0.8, "share": 0.1, "calls": None})
record = {"model": "m", "variant": "v", "batch": 1, "dtype": "float32", "device": "cpu", "masking": "dual"}
record |= {"threads": 1, "input": "synthetic", "workers": 1, "profiled_step_ms": 8.5, "classes": classes}
record["step_ms"] = {"median": 8.125, "min": 8.0, "max": 9.0, "runs": [8.125, 8.0, 9.0]}
json.dump({"environment": environment, "records": [record]}, open(sys.argv[-1], "w"))
"""


HANGS = """
import json, os, subprocess, sys, time
environment = {"device": "cpu", "cpu": "a cpu", "cores": 2, "torch": "2", "commit": None, "clean": None}
environment["date"] = "2026-01-02"
record = {"kind": "clip", "videos": "half of them", "variant": "v", "default": False, "error_levels": 1}
json.dump({"environment": environment, "records": [record]}, open(sys.argv[-1], "w"))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print('begun', child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def suite(benches, tmp_path, monkeypatch):
    """The suite with four parts: one that works, one that fails, one that hangs, one that is not there."""
    module = benches("suite")
    (tmp_path / "step.py").write_text(GOOD)
    (tmp_path / "attention.py").write_text("raise SystemExit(3)")
    (tmp_path / "data.py").write_text(HANGS)
    names = ("step", "attention", "data", "operations")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "parts_for", lambda device: [module.Part(name) for name in names])
    monkeypatch.setattr(module, "QUICK_S", {"cpu": 4, "cuda": 4})
    return module


@pytest.mark.slow
def test_what_is_done_stays_and_the_rest_says_why(suite, tmp_path, capsys):
    assert suite.main(["--quick", "--output", str(tmp_path / "out")]) == 1
    parts = {
        part["name"]: part for part in json.loads((tmp_path / "out" / "suite.json").read_text())["parts"]
    }
    assert {name: part["status"] for name, part in parts.items()} == {
        "step": "ran",
        "attention": "failed",
        "data": "cut off",
        "operations": "skipped",
    }
    assert "code 3" in parts["attention"]["reason"] and parts["data"]["seconds"] < 30
    assert parts["data"]["file"] == "data.json" and "what it had is kept" in parts["data"]["reason"]
    log = (tmp_path / "out" / "data.log").read_text()
    assert "begun" in log and ended(int(log.split()[1]))  # nothing that it started goes on
    assert (
        parts["attention"]["file"] is None
        and "half of them" in (tmp_path / "out" / "report.html").read_text()
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "matrix products" in page and "7.2" in page and "cut off" in page
    assert 'src="' not in page and "<script" not in page and "<link" not in page  # nothing from a network
    assert "page:" in capsys.readouterr().out


def ended(process: int) -> bool:
    """Whether a process has ended; one that nobody waits for stays as a zombie."""
    for _ in range(50):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_file_of_an_earlier_run_is_no_result_of_this_one(suite, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "attention.json").write_text("{}")
    assert suite.main(["--only", "attention", "--output", str(tmp_path / "out")]) == 1
    (part,) = json.loads((tmp_path / "out" / "suite.json").read_text())["parts"]
    assert (part["status"], part["file"]) == ("failed", None)


def test_a_part_that_wrote_no_record_is_told_on_the_page(suite, tmp_path):
    environment = json.dumps(ENVIRONMENT)
    empty = (
        f"import sys; open(sys.argv[-1], 'w').write('{{\"environment\": {environment}, \"records\": []}}')"
    )
    (tmp_path / "step.py").write_text(empty)
    assert suite.main(["--only", "step", "--output", str(tmp_path / "out")]) == 0
    assert "it has no records" in (tmp_path / "out" / "report.html").read_text()


def test_on_a_gpu_no_part_takes_the_time_of_the_others(benches):
    suite = benches("suite")
    parts = suite.parts_for("cuda")
    assert [part.name for part in parts[:4]] == [
        "dual_vs_encoder",
        "dual_vs_encoder.vit_g",
        "operations",
        "attention",
    ]
    assert all(part.quick_s for part in parts if part.command("cuda-quick"))
    assert sum(part.quick_s or 0 for part in parts) <= suite.QUICK_S["cuda"]
    assert suite.limit_of(parts[0], "cuda", 0.0) == parts[0].quick_s
    assert suite.limit_of(parts[0], "cuda", 460.0) == 10.0 and suite.limit_of(parts[0], "cuda", 500.0) == 1.0
    assert suite.limit_of(parts[0], "cpu", 10.0) == suite.QUICK_S["cpu"] - 10


def test_two_parts_of_one_command_have_names_of_their_own(benches):
    suite = benches("suite")
    from harness.results import RESULTS, result_type
    from harness.results.suite import PartRecord, SuiteResult

    assert result_type("dual_vs_encoder.vit_g") is RESULTS["dual_vs_encoder"] is result_type("steps.other")
    known = suite.Environment(**ENVIRONMENT)
    table = SuiteResult(environment=known, parts=[PartRecord(name="dual_vs_encoder.vit_g")]).parts_table()
    assert table.rows[0][0] == "Dual against encoder-only masking: vit_g"


def test_a_part_that_is_silent(suite, benches, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benches("progress"), "EVERY_S", 0.2)
    (tmp_path / "step.py").write_text("import time; time.sleep(1.5)" + GOOD)
    assert suite.main(["--only", "step", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.count(" min: step\n") >= 3


def test_only_some_parts(suite, tmp_path, capsys):
    assert suite.main(["--only", "step", "--output", str(tmp_path / "out")]) == 0
    assert [p["name"] for p in json.loads((tmp_path / "out" / "suite.json").read_text())["parts"]] == ["step"]
    with pytest.raises(SystemExit):
        suite.main(["--only", "stpe"])
    assert "unknown part 'stpe'; known: step" in capsys.readouterr().err


def test_results_have_a_folder_by_device_date_and_commit(benches):
    suite = benches("suite")
    gpu = suite.Environment(**ENVIRONMENT | {"device": "NVIDIA H100 80GB HBM3"})
    assert suite.result_folder(gpu).parts[-2:] == ("nvidia-h100-80gb-hbm3", "2026-01-02-012345678")


def test_every_part_has_a_kind_of_result(benches):
    suite = benches("suite")
    from harness.results import RESULTS

    for device in ("cpu", "cuda"):
        assert {part.script for part in suite.parts_for(device)} <= set(RESULTS)


def test_absent_packages_are_told(benches, monkeypatch):
    suite = benches("suite")
    found = lambda name: None if name in ("decord", "matplotlib") else object()  # noqa: E731
    monkeypatch.setattr(suite.importlib.util, "find_spec", found)
    assert set(suite.missing_packages()) == {"decord", "matplotlib"}


@pytest.mark.slow
def test_the_page_needs_no_matplotlib(tmp_path):
    """In a process where importing it fails."""
    (tmp_path / "step.py").write_text(GOOD)
    subprocess.run([sys.executable, str(tmp_path / "step.py"), str(tmp_path / "step.json")], check=True)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "bench")!r})
sys.modules["matplotlib"] = None
from pathlib import Path
from harness.environment import Environment
from harness.report import write_report
from harness.results.suite import PartRecord, SuiteResult
part = PartRecord(name="step", status="ran", seconds=1.0, file="step.json")
write_report(Path({str(tmp_path)!r}), SuiteResult(environment=Environment(**{ENVIRONMENT!r}), parts=[part]))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    page = (tmp_path / "report.html").read_text()
    assert "matrix products" in page and "<svg" not in page


def steps_result() -> dict:
    counts = {"saved_activation_bytes_per_clip": 2**20, "forward_macs_per_clip": 10**9}
    shared = {"model": "vit_b", "masking": "dual", "dtype": "float32", "device": "cpu", "batch": 2}
    shared |= {"loss": 1.0, **counts}
    times = {"median": 123.0, "min": 120.0, "max": 130.0, "runs": [123.0]}
    timed = {f"{part}_ms": times for part in ("step", "forward", "backward", "optimizer")}
    good = {**shared, "variant": "reference", "clips_per_s": 16.26, "peak_memory_bytes": 2**20, **timed}
    off = {**shared, "variant": "off", "clips_per_s": None, "peak_memory_bytes": None, "step_ms": None}
    ratio = {"model": "vit_b", "variant": "off dual", "baseline": "reference dual", "saved_activations": 1.0}
    rejected = {"off": "loss 2 differs"}
    return {"environment": ENVIRONMENT, "records": [good, off], "ratios": [ratio], "rejected": rejected}


def test_a_wrong_variant_has_no_speed_on_the_page_and_in_tables(benches, tmp_path):
    report = benches("report")
    from harness.results import read_result
    from harness.results.suite import PartRecord, SuiteResult

    path = tmp_path / "dual_vs_encoder.json"
    path.write_text(json.dumps(steps_result()))
    result = read_result(path, "dual_vs_encoder")
    part = PartRecord(name="dual_vs_encoder", status="failed", reason="code 1", file=path.name)
    suite = SuiteResult(environment=result.environment, parts=[part])
    page = report.write_report(tmp_path, suite).read_text()
    assert "NO SPEED for off: loss 2 differs" in page
    row = next(row for row in result.tables()[0].rows if row[0].startswith("off"))
    assert row[1:4] == ["-", "-", "-"] and row[-1] == "-"
    assert "16.26" in page and "123 (120 to 130)" in page
