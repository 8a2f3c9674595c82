"""torchrun on real clips: restarts that go on, tracebacks that are seen, a scheduler's end that leaves a
checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmae.checkpoint.folder import CheckpointFolder, step_of
from vmae.synthetic.samples import sample_videos
from vmae.train.metrics import read_log

ROOT = Path(__file__).parents[2]
FLAGS = (
    "pretrain --model vit_tiny --image-size 32 --patch-size 8 --num-frames 8 --stride 1 --encoder-ratio 0.75 "
    "--batch-size 1 "
    "--workers 0 --lr 0.1 --log-every 1 --save-every 2 --device cpu --parallel fsdp --no-tensorboard"
).split()
# What a user's machine does to a run: a rank of the first start goes down in step 5.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from vmae.cli import main
from vmae.train.loop import Trainer

plain, once, rank = Trainer.clip, Path(sys.argv.pop(1)), int(sys.argv.pop(1))

def clip(self, record):
    if record.step == 4 and self.parallel.rank == rank and not once.exists():
        once.touch()
        {how}
    return plain(self, record)

Trainer.clip = clip
raise SystemExit(main())
"""

pytestmark = pytest.mark.slow


def start(tmp_path: Path, how: str, steps: int, *options: str, rank: int = 1) -> subprocess.Popen:
    (tmp_path / "list.txt").write_text("".join(f"{video} 0 -1\n" for video in sample_videos()[2:]))
    (tmp_path / "script.py").write_text(SCRIPT.format(how=how))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *options]
    place = ["--data", str(tmp_path / "list.txt"), "--output", str(tmp_path / "run"), "--steps", str(steps)]
    command = [*launcher, str(tmp_path / "script.py"), str(tmp_path / "once"), str(rank), *FLAGS, *place]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("rank", [0, 1])  # the rank 0 holds the output folder
def test_a_killed_rank_brings_all_down_and_a_restart_goes_on(tmp_path, rank):
    process = start(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", 8, "--max-restarts=1", rank=rank)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["start_step"] for start in starts] == [0, 4]
    assert [record["step"] for record in read_log(tmp_path / "run" / "log.jsonl")] == list(range(1, 9))
    assert (tmp_path / "run" / "weights.pth").is_file()


def test_a_rank_that_fails_is_named_with_its_traceback(tmp_path):
    process = start(tmp_path, "raise RuntimeError('the disk of this rank is gone')", 8)
    err = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    report = err[err.index("Root Cause") :]
    assert "rank      : 1" in report and "the disk of this rank is gone" in report and "in clip" in report
    assert CheckpointFolder(tmp_path / "run").latest().name == "checkpoint-00000004"


def test_the_launchers_end_leaves_a_checkpoint(tmp_path):
    process = start(tmp_path, "pass", 100_000)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while len(read_log(log)) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "stopped by SIGTERM" in out, err
    assert step_of(CheckpointFolder(tmp_path / "run").latest()) == len(read_log(log)) >= 3
