"""From a list to shards to a model, by commands alone: the shards give what the packed list gives."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vmae.data.shards.index import read_index
from vmae.synthetic.samples import sample_videos
from vmae.train.metrics import read_log

ROOT = Path(__file__).parents[2]
SIZE = "--model vit_tiny --image-size 32 --num-frames 4 --stride 2 --device cpu --workers 0".split()
LOG = "--log-every 1 --no-tensorboard".split()
PRETRAIN = [*SIZE, *LOG, *"--patch-size 8 --encoder-ratio 0.75 --lr 0.1 --steps 6 --num-sample 2".split()]
TUNE = [*SIZE, *LOG, *"--steps 3 --warmup-steps 0 --lr 0.02 --batch-size 2 --num-sample 1 --no-test".split()]
# A machine that dies, once, in step 4, before its second checkpoint.
DIES = """
import os, signal, sys
from pathlib import Path
from vmae.cli import main
from vmae.train.loop import Trainer

plain, once = Trainer.clip, Path(sys.argv.pop(1))

def clip(self, record):
    if record.step == 3 and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, record)

Trainer.clip = clip
raise SystemExit(main())
"""

pytestmark = pytest.mark.slow


def vmae(*words, ranks: int = 1, script: tuple = ("-m", "vmae"), code: int = 0) -> str:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [*launcher, *map(str, script), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A labelled list, packed as files and as shards."""
    folder = tmp_path_factory.mktemp("packed")
    lines = [f"{video} {number % 2}\n" for number, video in enumerate(sample_videos()[2:] * 2)]
    (folder / "list.txt").write_text("".join(lines))
    size = ["--short-side", "64", "--workers", "2", "--preset", "ultrafast"]
    vmae("pack", folder / "list.txt", folder / "files", *size)
    vmae("pack", folder / "list.txt", folder / "shards", "--shards", "--shard-size", "1", *size)
    return folder


def kinds(packed):
    return {"files": packed / "files" / "list.txt", "shards": packed / "shards" / "index.vmae"}


def losses(folder):
    return [record["loss"] for record in read_log(folder / "log.jsonl") if "loss" in record]


@pytest.mark.parametrize("ranks", [1, 2])
def test_pretraining(packed, tmp_path, ranks):
    for name, data in kinds(packed).items():
        batch = ["--batch-size", str(2 // ranks), "--output", str(tmp_path / name)]
        listed = ["--data", data] if name == "shards" else ["--data", unlabelled(data, tmp_path)]
        vmae("pretrain", *listed, *PRETRAIN, *batch, ranks=ranks)
    assert losses(tmp_path / "files") == losses(tmp_path / "shards")
    assert len(losses(tmp_path / "files")) == 6


def unlabelled(labelled: Path, folder: Path) -> Path:
    """The list without its labels, its paths absolute."""
    rows = [line.rsplit(" ", 1)[0] for line in labelled.read_text().splitlines() if line[0] != "#"]
    (folder / "plain.txt").write_text("".join(f"{labelled.parent / row} 0 -1\n" for row in rows))
    return folder / "plain.txt"


def test_a_run_that_is_killed_goes_on_where_its_shards_were_moved_to(packed, tmp_path):
    shutil.copytree(packed / "shards", tmp_path / "here")
    (tmp_path / "dies.py").write_text(DIES)
    own = [*PRETRAIN, "--batch-size", "2", "--save-every", "2", "--output", tmp_path / "run"]
    script = (tmp_path / "dies.py", tmp_path / "once")
    vmae("pretrain", "--data", tmp_path / "here/index.vmae", *own, script=script, code=-signal.SIGKILL)
    shutil.move(tmp_path / "here", tmp_path / "there")
    vmae("pretrain", "--data", tmp_path / "there/index.vmae", *own)
    straight = [*PRETRAIN, "--batch-size", "2", "--output", tmp_path / "straight"]
    vmae("pretrain", "--data", packed / "shards/index.vmae", *straight)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["start_step"] for start in starts] == [0, 2]


def test_fine_tuning_tests_and_features(packed, tmp_path):
    views = "--segments 2 --crops 1 --scores --device cpu --workers 0".split()
    found = {}
    for name, data in kinds(packed).items():
        run, test, features = (tmp_path / f"{name}-{what}" for what in ("run", "test", "features"))
        vmae("finetune", "--data", data, "--val", data, *TUNE, "--output", run)
        vmae("evaluate", data, "--checkpoint", run, "--output", test, *views)
        listed = data if name == "shards" else unlabelled(data, tmp_path)
        vmae("features", listed, "--checkpoint", run, "--output", features, "--step", "20", "--device", "cpu")
        scores = [json.loads(line) for line in (test / "predictions.jsonl").read_text().splitlines()]
        arrays = {path.stem: np.load(path) for path in sorted(features.glob("*.npy"))}
        found[name] = losses(run), [record["scores"] for record in scores], list(arrays.values())
    keys = [entry.key for entry in read_index(packed / "shards" / "index.vmae")]
    assert sorted(arrays) == sorted(keys)
    assert found["files"][:2] == found["shards"][:2] and len(found["files"][1]) == 4
    for one, other in zip(found["files"][2], found["shards"][2], strict=True):
        assert np.array_equal(one, other) and len(one) > 3
