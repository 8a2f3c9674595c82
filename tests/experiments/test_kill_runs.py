"""Runs that are killed, at a small scale."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "kill_runs.py"


@pytest.mark.slow
def test_killed_runs_end_as_if_undisturbed(tmp_path):
    file = tmp_path / "kills.json"
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--steps", "30", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text())
    assert [record["ranks"] for record in content["records"]] == [1, 1, 2] and content["differences"] == []
    assert "bit for bit" in done.stdout


def test_a_rank_is_told_its_place(benches):
    kill_runs = benches("kill_runs")
    assert kill_runs.rank_environment(0, 1, 5) == {}
    told = kill_runs.rank_environment(1, 2, 5)
    assert (
        told["RANK"] == told["LOCAL_RANK"] == "1" and told["WORLD_SIZE"] == "2" and told["MASTER_PORT"] == "5"
    )
