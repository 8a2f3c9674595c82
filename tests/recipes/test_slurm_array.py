"""recipes/slurm_array.sh, with scripts in place of sbatch and srun: what it asks for, and a whole array that
runs here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.small_videos import make_video
from vmae.cli import main

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "slurm_array.sh"
OWN = ("PARTS", "AT_ONCE", "GPUS", "CPUS", "SBATCH_ARGS", "MERGE_ARGS", "PYTHON", "VMAE_TASK", "VMAE_ROOT")
# Writes down what it is asked for; runs the tasks at once where RUN is set, and a job that waits after them.
SBATCH = """
printf '%s ' "$@" >> sbatch.txt
echo >> sbatch.txt
[ -n "${RUN:-}" ] || { echo "41;north"; exit; }
while [[ $1 == --* ]]; do
  case $1 in --array) array=$2; shift 2 ;; --parsable | --requeue | --*=*) shift ;; *) shift 2 ;; esac
done
cp "$1" slurm_script  # as Slurm does
shift
[ -n "${array:-}" ] || { bash ./slurm_script "$@" > merge.out 2>&1; echo "$?" > merge.code; exit; }
for task in $(seq 1 "${array#1-}"); do
  export SLURM_ARRAY_TASK_ID=$task SLURM_CPUS_PER_TASK=1
  bash ./slurm_script "$@" > "$task.out" 2>&1 || echo "$task: $?" >> codes
done
echo 41
"""
SRUN = '[[ $1 != --* ]] || shift\necho "cpus $SRUN_CPUS_PER_TASK"\nexec "$@"'


@pytest.fixture
def array(tmp_path):
    """`array(*words, PARTS=3)` runs the recipe in a folder of its own."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)

    def start(*words, **variables):
        clean = {name: value for name, value in os.environ.items() if name not in OWN}
        given = {name: str(value) for name, value in variables.items()}
        env = {**clean, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHON": "echo", **given}
        words = ["bash", str(SCRIPT), *map(str, words)]
        return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    return start


def test_an_array_and_a_job_that_joins(array, tmp_path):
    words = ["features", "a list.txt", "--checkpoint", "c", "--output", "o"]
    asked = {"PARTS": 16, "AT_ONCE": 4, "GPUS": 2, "SBATCH_ARGS": "--partition=video --array=3,7"}
    done = array(*words, **asked)
    assert done.returncode == 0 and "array 41 of 16 parts" in done.stdout, done.stderr
    first, second = (tmp_path / "sbatch.txt").read_text().splitlines()
    common = "--parsable --nodes 1 --ntasks 1 --export ALL --open-mode append --job-name features"
    tail = f"{SCRIPT} features a list.txt --checkpoint c --output o "
    size = "--array 1-16%4 --gpus-per-node 2 --cpus-per-task 24"
    assert first == f"{common} {size} --requeue --partition=video --array=3,7 {tail}"
    assert second == f"{common}-merge --dependency afterany:41 --cpus-per-task 4 --partition=video {tail}"


def test_what_a_task_runs(array):
    words, job = ["detect", "--output", "o"], {"PARTS": 9, "SLURM_ARRAY_TASK_ID": 7, "SLURM_CPUS_PER_TASK": 6}
    one = array(*words, **job, VMAE_TASK="part")
    assert one.stdout == "cpus 6\n-m vmae detect --output o --part 7/9\n"
    many = array(*words, **job, VMAE_TASK="part", GPUS=4)
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 4"
    assert many.stdout == f"cpus 6\n{launcher} -m vmae detect --output o --part 7/9\n"
    joined = array(*words, **job, VMAE_TASK="merge", GPUS=4)
    assert joined.stdout == "cpus 6\n-m vmae detect --output o --merge\n"
    packed = array("pack", "l", "o", **job, VMAE_TASK="part")
    assert packed.stdout == "cpus 6\n-m vmae pack --workers 6 l o --part 7/9\n"


@pytest.mark.parametrize(
    "words, variables, text",
    [
        ([], {"PARTS": 2}, "with a COMMAND of check-data, pack, features, evaluate, detect"),
        (["pretrain"], {"PARTS": 2}, "with a COMMAND of check-data"),
        (["pack", "l", "o"], {}, "PARTS= is not a number of parts"),
        (["pack", "l", "o"], {"PARTS": 0}, "PARTS=0 is not a number of parts"),
        (["pack", "l", "o", "--merge"], {"PARTS": 2}, "leave out --merge"),
        (["pack", "l", "o", "--part=1/2"], {"PARTS": 2}, "leave out --part"),
        (["pack", "l", "o"], {"PARTS": 2, "GPUS": 2}, "pack shares nothing among ranks"),
        (["detect"], {"PARTS": 2, "GPUS": "two"}, "GPUS=two is not a number of GPUs"),
        (["detect"], {"PARTS": 2, "AT_ONCE": "x"}, "AT_ONCE=x is not a number of tasks"),
    ],
)
def test_wrong_input(array, tmp_path, words, variables, text):
    done = array(*words, **variables)
    assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "sbatch.txt").exists()


@pytest.mark.slow
def test_an_array_gives_what_one_job_gives(array, tmp_path):
    """With a bad video: its part ends with 1, and all are joined."""
    for number in range(3):
        make_video(tmp_path / f"{number}.mp4")
    (tmp_path / "bad.mp4").write_text("text")
    names = ["0", "bad", "1", "2"]
    (tmp_path / "list.txt").write_text("".join(f"{tmp_path}/{name}.mp4\n" for name in names))
    words = ["check-data", tmp_path / "list.txt", "--output"]
    asked = {"PARTS": 3, "RUN": 1, "PYTHON": sys.executable}
    done = array(*words, tmp_path / "out", **asked)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "codes").read_text() == "2: 1\n" and (tmp_path / "merge.code").read_text() == "1\n"
    assert main([*map(str, words), str(tmp_path / "whole"), "--workers", "1"]) == 1
    for name in ("report.json", "clean.txt", "histogram.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
