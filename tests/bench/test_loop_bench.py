"""The scripts on the training loop, at sizes of seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def run(script: str, *flags: str, timeout: int = 300) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(str(path) for path in (BENCH.parent, BENCH.parent / "kernels"))
    command = [sys.executable, str(BENCH / script), *flags]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def test_loop_is_timed_beside_the_bare_step(tmp_path):
    file = tmp_path / "loop.json"
    done = run(
        "loop.py", "--model", "vit_tiny", "--batch", "1", "--steps", "2", "--warmup", "0", "--json", str(file)
    )
    assert done.returncode == 0, done.stderr
    assert "loop / bare step" in done.stdout and "by the clock" in done.stdout
    content = json.loads(file.read_text())
    assert [record["variant"] for record in content["records"]] == ["bare step", "loop"]
    assert all(len(record["step_ms"]["runs"]) == 2 for record in content["records"])
    ratios = [
        loop / bare for bare, loop in zip(*(record["step_ms"]["runs"] for record in content["records"]))
    ]
    assert content["ratios"][0]["step"]["min"] == pytest.approx(min(ratios))


def test_loop_bench_names_a_wrong_device():
    done = run("loop.py", "--device", "tpu")
    assert done.returncode == 2 and "unknown device 'tpu'" in done.stderr
