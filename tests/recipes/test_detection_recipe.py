"""The detection recipe, as small as can be: every stage runs, and a second start only goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_from_videos_to_frame_map(tmp_path):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    small = {"OUT": str(tmp_path / "out"), "STEPS": "2", "TRAIN": "2", "VALIDATION": "1", "WORKERS": "0"}
    env = {**os.environ, **small, "PYTHON": sys.executable, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "recipes" / "detection_tiny.sh")]
    first = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert "% trained, " in first.stdout and "done: 2 steps" in first.stdout
    test = tmp_path / "out" / "run" / "test"
    assert (test / "detections.csv").exists() and list(test.glob("key_frame_*.png"))
    again = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert again.stdout.splitlines()[-2] == first.stdout.splitlines()[-2]  # the same scores
