"""The recipe of stage two: its command, what it lacks, and that its settings are taken."""

import os
import subprocess
from pathlib import Path

import pytest

from vmae.cli import build_parser
from vmae.train import pretrain_settings

ROOT = Path(__file__).parents[2]


def run(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    names = ("DATA", "INIT", "TEACHER", "GPUS", "NODES", "BATCH", "EFFECTIVE_BATCH", "OUTPUT")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    env = {**clean, "PYTHON": "echo", "GPUS": "1", **variables}
    command = ["bash", str(ROOT / "recipes" / "stage2_vitb.sh"), *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def test_it_says_what_is_missing(tmp_path):
    done = run(cwd=tmp_path, DATA="x")
    assert done.returncode == 2 and "TEACHER is not set" in done.stderr
    done = run(cwd=tmp_path, TEACHER="x")
    assert done.returncode == 2 and "DATA is not set" in done.stderr


def test_it_hands_teacher_and_start_on(tmp_path):
    more = {"DATA": "own.txt", "TEACHER": "runs/stage one", "GPUS": "8"}
    done = run("--decoder-mask", "none", "--dry-run", cwd=tmp_path, INIT="b.pth", **more)
    assert done.returncode == 0, done.stderr
    assert "--teacher runs/stage\\ one --init b.pth --decoder-mask none" in done.stdout


def test_its_settings_are_those_of_a_teacher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    file = str(ROOT / "recipes" / "stage2_vitb.yaml")
    words = ["pretrain", "--config", file, "--data", "x", "--output", "y", "--teacher", "t"]
    config, run_config = pretrain_settings.configs_from_args(build_parser("pretrain").parse_args(words))
    assert (config.target.name, config.target.teacher, config.mask.decoder) == (
        "teacher",
        "t",
        "running_cell",
    )
    assert config.model.embed_dim == 768 and run_config.videos_per_step(8) == 1024
    assert config.optim.lr == pytest.approx(1e-3)
