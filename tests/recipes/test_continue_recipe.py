"""Continued pre-training on one's own domain, in miniature: from another domain's model through the recipe,
then a few labels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmae.cli import build_parser, main
from vmae.train import pretrain_settings
from vmae.train.metrics import read_log

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "continue_vitb.sh"
TINY = "--patch-size 8 --num-frames 4 --image-size 32 --stride 2 --device cpu --workers 0 --no-tensorboard"


def run(*words: str, cwd: Path, python: str = "echo", **variables: str) -> subprocess.CompletedProcess:
    names = ("DATA", "INIT", "GPUS", "NODES", "BATCH", "EFFECTIVE_BATCH", "OUTPUT")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    env = {**clean, "PYTHON": python, "OMP_NUM_THREADS": "1", "GPUS": "1", **variables}
    command = ["bash", str(RECIPE), *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_it_says_what_is_missing(tmp_path):
    done = run(cwd=tmp_path, DATA="x")
    assert done.returncode == 2 and "INIT is not set" in done.stderr and "with its decoder" in done.stderr
    done = run(cwd=tmp_path, INIT="x")
    assert done.returncode == 2 and "DATA is not set" in done.stderr


def test_it_starts_from_the_checkpoint_at_a_tenth_of_the_published_rate(tmp_path, monkeypatch):
    done = run("--epochs", "7", "--dry-run", cwd=tmp_path, INIT="mae b.bin", DATA="own.txt", GPUS="8")
    assert done.returncode == 0 and "--init mae\\ b.bin --epochs 7" in done.stdout
    monkeypatch.setenv("WORLD_SIZE", "8")

    def settings(name):
        words = [
            "pretrain",
            "--config",
            str(ROOT / "recipes" / f"{name}.yaml"),
            "--data",
            "x",
            "--output",
            "y",
        ]
        return pretrain_settings.configs_from_args(build_parser("pretrain").parse_args(words))[0]

    own, published = settings("continue_vitb"), settings("pretrain_vitb")
    assert own.optim.lr == pytest.approx(published.optim.lr / 10)
    same = ("model", "mask", "num_sample", "stride", "sampling", "crop", "normalize_target")
    assert all(getattr(own, name) == getattr(published, name) for name in same)


@pytest.mark.slow
def test_from_another_domain_to_a_few_labels(tmp_path, monkeypatch):
    """The other domain: real clips; one's own: moving shapes, with two labelled videos of a class."""
    monkeypatch.chdir(tmp_path)
    assert main("samples clips.txt --frames frames --square --short-side 32".split()) == 0
    shapes = (
        "moving-shapes own --size 32 --frames 16 --unlabeled 16 --few 2 --many 1 --shared 1 --validation 1"
    )
    assert main([*shapes.split(), "--workers", "1"]) == 0
    more = f"{TINY} --model vit_demo --no-normalize-target --encoder-ratio 0.75 --batch-size 8 --num-sample 2"
    start = f"pretrain --data clips.txt --output runs/other {more} --repeat 20 --steps 80 --lr 0.1"
    assert main(start.split()) == 0
    own = [*more.split(), *"--steps 40 --warmup-steps 5 --lr 0.03 --log-every 4".split()]
    where = {"INIT": "runs/other", "DATA": "own/unlabeled.txt", "OUTPUT": "runs/continued"}
    done = run(*own, cwd=tmp_path, python=sys.executable, EFFECTIVE_BATCH="8", **where)
    assert done.returncode == 0, done.stderr
    losses = [record["loss"] for record in read_log(tmp_path / "runs/continued/log.jsonl")]
    zero = float(re.search(r"zero predictor ([\d.]+)", done.stdout)[1])
    assert losses[0] < zero < 0.3  # a fresh model starts at 0.7
    assert sum(losses[-3:]) / 3 < 0.95 * sum(losses[:2]) / 2, losses
    few = (
        "finetune --data own/train_a.txt --classes own/classes_a.txt --init runs/continued --output runs/few"
    )
    few += " --steps 3 --batch-size 4 --stride 2 --no-flip --device cpu --workers 0 --no-tensorboard"
    assert main(few.split()) == 0 and (tmp_path / "runs/few/weights.pth").is_file()
