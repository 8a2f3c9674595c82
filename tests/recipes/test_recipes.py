"""The recipes: published numbers, the same effective batch on any number of GPUs, dry runs, wrong input,
Slurm."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmae.checkpoint.folder import CheckpointFolder
from vmae.cli import build_parser
from vmae.tools.curves import REFERENCES, read_curve
from vmae.train import pretrain_settings
from vmae.train.metrics import read_log

RECIPES = Path(__file__).parents[2] / "recipes"
# Released scripts of VideoMAE V2; all of their numbers: test_published_numbers.py.
TABLE = {  # effective batch, epochs, warm-up, learning rate for 256 videos, clipping
    "vitb": (1024, 200, 20, 1e-3, None),
    "vitl": (1536, 300, 30, 1e-3, None),
    "vith": (2048, 300, 30, 1e-3, None),
    "vitg": (2048, 300, 30, 6e-4, 0.02),
}


def run(recipe: str, *words: str, cwd: Path, python: str = "echo", timeout: float = 60, **variables: object):
    """A recipe, started from a folder of its own; with `echo` for an interpreter it tells what it would
    run."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("DATA", "GPUS", "NODES", "BATCH", "EFFECTIVE_BATCH", "OUTPUT")
    }
    env = {
        **clean,
        "PYTHON": python,
        "OMP_NUM_THREADS": "1",
        **{key: str(value) for key, value in variables.items()},
    }
    command = ["bash", str(RECIPES / recipe), *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def command_of(done: subprocess.CompletedProcess) -> list[str]:
    line = next(line for line in done.stdout.splitlines() if line.startswith("command:"))
    return shlex.split(line.removeprefix("command:"))


def settings_of(command: list[str], ranks: int, monkeypatch):
    """The settings that `pretrain` makes of a command line, started on so many ranks."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    words = command[command.index("pretrain") :]
    return pretrain_settings.configs_from_args(build_parser("pretrain").parse_args(words))


@pytest.mark.parametrize("gpus", [1, 8, 64])
@pytest.mark.parametrize("name", TABLE)
def test_numbers_are_the_published_ones_on_any_number_of_gpus(name, gpus, tmp_path, monkeypatch):
    batch, epochs, warmup, lr, clip = TABLE[name]
    done = run(f"pretrain_{name}.sh", "--dry-run", cwd=tmp_path, GPUS=gpus)
    assert done.returncode == 0, done.stderr
    command = command_of(done)
    config, settings = settings_of(command, gpus, monkeypatch)
    assert (config.effective_batch, config.epochs, config.steps) == (batch, epochs, None)
    assert (
        settings.batch_size == min(32, batch // gpus)
        and settings.batch_size * settings.accumulate * gpus == batch
    )
    assert (config.optim.warmup_epochs, config.optim.lr, config.optim.clip_grad) == (warmup, lr, clip)
    assert (config.optim.betas, config.optim.weight_decay, config.optim.min_lr) == ((0.9, 0.95), 0.05, 1e-5)
    mask, model = config.mask, config.model
    assert (mask.encoder, mask.encoder_ratio, mask.decoder, mask.decoder_ratio) == (
        "tube",
        0.9,
        "running_cell",
        0.5,
    )
    assert (model.decoder_depth, model.num_frames, model.img_size, config.stride, config.num_sample) == (
        4,
        16,
        224,
        4,
        4,
    )
    assert model.embed_dim == {"vitb": 768, "vitl": 1024, "vith": 1280, "vitg": 1408}[name]
    nodes = max(1, gpus // 8)
    assert command[command.index("--nproc-per-node") + 1] == str(gpus // nodes)
    assert ("--standalone" in command) == (nodes == 1)
    rate = f"{lr * batch / 256:g}"
    assert f"effective batch {batch} videos = {gpus} (GPUs) x " in done.stdout
    assert f"effective learning rate {lr:g} x {batch} / 256 = {rate}\n" in done.stdout


@pytest.mark.parametrize("gpus", [1, 64])
@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_needs_no_launcher(name, gpus, monkeypatch):
    """The file alone makes up the effective batch, where the GPUs divide it."""
    words = ["pretrain", "--config", str(RECIPES / f"pretrain_{name}.yaml"), "--data", "x", "--output", "y"]
    config, settings = settings_of(
        [*words, "--batch-size", str(min(32, TABLE[name][0] // gpus))], gpus, monkeypatch
    )
    assert config.effective_batch == settings.videos_per_step(gpus) == TABLE[name][0]


def test_variables_and_arguments_reach_the_command(tmp_path, monkeypatch):
    words = ["--dry-run", "--checkpointing", "selective", "--seed", "7"]
    where = dict(
        NODE_RANK=1, MASTER_ADDR="first", MASTER_PORT=1234, DATA="list.txt", DATA_ROOT="/a b", OUTPUT="out"
    )
    done = run("pretrain_vitg.sh", *words, cwd=tmp_path, GPUS=16, NODES=4, BATCH=8, **where)
    command = command_of(done)
    config, settings = settings_of(command, 16, monkeypatch)
    assert (config.effective_batch, settings.batch_size, settings.accumulate) == (2048, 8, 16)
    assert (config.data, config.data_root, settings.output, config.seed) == ("list.txt", "/a b", "out", 7)
    assert settings.speed.checkpointing == "selective"
    launch = " ".join(command[: command.index("pretrain")])
    assert (
        "--nproc-per-node 4 --max-restarts 3 --nnodes 4 --node-rank 1 --master-addr first --master-port 1234"
        in launch
    )
    # The plan gets the same flags, and the list.
    plan = next(line for line in done.stdout.splitlines() if line.startswith("-m vmae plan"))
    assert "--gpus 16 --gpus-per-node 4 --memory 80GiB" in plan and "--data list.txt" in plan
    assert "--batch-size 8 --accumulate 16" in plan and "--checkpointing selective" in plan


@pytest.mark.parametrize(
    "variables, told",
    [
        (dict(GPUS=7), "GPUS=7 do not divide the effective batch of 1024 videos"),
        (dict(GPUS=8, BATCH=3), "BATCH=3 does not divide the 128 videos of a GPU in a step (1024 / 8 GPUs)"),
        (dict(GPUS="many"), "GPUS=many is not a number of GPUs"),
        (dict(GPUS=8, NODES=3), "GPUS=8 do not fill NODES=3 machines"),
        (dict(GPUS=8, BATCH=0), "BATCH=0 is not a number of videos"),
        (dict(GPUS=8), "DATA is not set: set it to the list file"),
    ],
)
def test_wrong_variables_are_named(variables, told, tmp_path):
    done = run("pretrain_vitb.sh", cwd=tmp_path, **variables)
    assert done.returncode == 2 and told in done.stderr and done.stdout.count("\n") <= 1


@pytest.mark.slow
def test_a_real_dry_run_prints_plan_command_and_first_videos(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.txt").write_text("a.mp4 0 -1\n")
    words = ["--dry-run", "--checkpointing", "none"]
    done = run("pretrain_tiny.sh", *words, cwd=tmp_path, python=sys.executable, DATA="list.txt", timeout=200)
    assert done.returncode == 0, done.stderr
    assert "recommendation: --parallel none" in done.stdout and "  a.mp4" in done.stdout
    assert "-m vmae pretrain --data list.txt" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "list.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_the_giants_dry_run(gpus, tmp_path):
    done = run("pretrain_vitg.sh", "--dry-run", cwd=tmp_path, python=sys.executable, GPUS=gpus, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1026.3 M parameters" in done.stdout and "DATA is not set: set it to" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith(("none ", "selective ", "full "))]
    assert len(rows) == {1: 3, 8: 6, 64: 9}[gpus]


def test_slurm_starts_one_torchrun_on_each_node(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "sbatch": 'printf "%s\\n" "$@" > sbatch.txt',
        "scontrol": "echo node7; echo node8",
        "srun": 'echo "cpus: $SRUN_CPUS_PER_TASK"; shift; '
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    recipe, path = str(RECIPES / "pretrain_vitl.sh"), f"{tools}{os.pathsep}{os.environ['PATH']}"
    submitted = run(
        "slurm.sh",
        recipe,
        "--seed",
        "3",
        cwd=tmp_path,
        PATH=path,
        GPUS=16,
        SBATCH_ARGS="--partition=video -t 9",
    )
    assert submitted.returncode == 0, submitted.stderr
    asked = (tmp_path / "sbatch.txt").read_text().split("\n")[:-1]
    assert asked[-4:] == [str(RECIPES / "slurm.sh"), recipe, "--seed", "3"]
    wanted = "--job-name pretrain_vitl --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --cpus-per-task 96"
    assert " ".join(asked).startswith(wanted)
    assert asked[-7:-4] == ["--partition=video", "-t", "9"]
    job = dict(PATH=path, GPUS=16, NODES=2, DATA="x", SLURM_JOB_ID=1, SLURM_JOB_NODELIST="node[7-8]")
    job["SLURM_CPUS_PER_TASK"] = 96
    started = run("slurm.sh", recipe, "--seed", "3", cwd=tmp_path, **job)
    assert "cpus: 96\n" in started.stdout  # srun takes nothing over from sbatch
    launches = [line for line in started.stdout.splitlines() if "torch.distributed.run" in line]
    assert [re.search(r"--node-rank (\d) --master-addr (\w+)", line).groups() for line in launches] == [
        ("0", "node7"),
        ("1", "node7"),
    ]
    assert all("/pretrain_vitl.yaml " in line and line.endswith("--seed 3") for line in launches)


def test_slurm_without_a_recipe(tmp_path):
    done = run("slurm.sh", cwd=tmp_path)
    assert done.returncode == 2 and "recipes/slurm.sh RECIPE" in done.stderr


@pytest.mark.slow
def test_the_tiny_recipe_learns_on_real_clips(tmp_path):
    """Two processes by gloo: another path to the same loss as that of the reference curve, which one process
    made."""
    done = run("pretrain_tiny.sh", cwd=tmp_path, python=sys.executable, OUTPUT="out", GPUS=2, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "parallel ddp" in done.stdout and "(2 x 1 micro-batches x 2 ranks)" in done.stdout
    found = re.search(r"zero predictor ([\d.]+), mean of the visible tubelets ([\d.]+)", done.stdout)
    loss, reference = (
        read_curve(path).summary()["loss_of_last_tenth"]
        for path in (tmp_path / "out", REFERENCES / "tiny.jsonl")
    )
    assert loss < 0.5 * min(map(float, found.groups()))
    assert loss == pytest.approx(reference, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_reaches_the_run_through_torchrun(number, tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "OUTPUT": "out", "GPUS": "2", "OMP_NUM_THREADS": "1"}
    words = ["bash", str(RECIPES / "pretrain_tiny.sh"), "--no-tensorboard", "--log-every", "1"]
    with open(tmp_path / "told.txt", "w") as told:
        job = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=told, stderr=told)
        log, patience = tmp_path / "out" / "log.jsonl", time.monotonic() + 120
        while not read_log(log) and time.monotonic() < patience:
            time.sleep(0.2)
        job.send_signal(number)
        assert job.wait(timeout=60) == 0
    text = (tmp_path / "told.txt").read_text()
    assert f"stopped by {number.name} after step" in text, text
    assert CheckpointFolder(tmp_path / "out").latest() is not None
