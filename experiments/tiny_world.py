"""Whole trainings on moving shapes, small enough for two CPU cores: what `progressive.py` and
`mask_ablation.py` share.

Every stage is a command of `python -m vmae`, run in this process; a stage whose result is there is not run
again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
import numpy as np
from harness.progress import at

from vmae.cli import main
from vmae.data import open_video
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.synthetic.moving_shapes import WorldConfig, write_world
from vmae.train.metrics import loss_of_last_tenth, read_log


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is.

    Attributes:
        world: the videos.
        pretrain_steps: of self-supervision, of 16 clips each.
        supervised_steps: of each arm in all, however many stages it has; 16 clips each.
        middle_steps: how many of them a middle stage gets.
        seeds: runs of everything.
    """

    world: WorldConfig
    pretrain_steps: int
    supervised_steps: int
    middle_steps: int
    seeds: int = 3


FULL = Scale(
    world=WorldConfig(size=32, frames=20, unlabeled=1400, few=8, many=60, shared=2, validation=40, seed=7),
    pretrain_steps=2400,
    supervised_steps=400,
    middle_steps=300,
)
SCALES = {
    "full": FULL,
    "half": replace(FULL, pretrain_steps=1200),
    "long": replace(FULL, pretrain_steps=4800, world=replace(FULL.world, validation=100)),
    "smoke": Scale(
        world=WorldConfig(size=32, frames=16, unlabeled=28, few=2, many=2, shared=1, validation=1),
        pretrain_steps=2,
        supervised_steps=4,
        middle_steps=2,
        seeds=2,
    ),
}
SCALE_HELP = "steps of pre-training: " + ", ".join(
    f"{scale.pretrain_steps} ({name})" for name, scale in SCALES.items()
)
CLIP = "--patch-size 8 --num-frames 8 --image-size 32".split()
# What differs from the published settings, and why (each was tried in short runs on other videos):
# - Whole frames are hidden from the encoder, half of them. Of 4 x 4 patches a tube hides parts of a shape
#   whose rest is seen in the same frame, so that no motion has to be known to rebuild it; hidden frames can
#   only be rebuilt by it.
# - Pixels are predicted as they are. Normalised, each patch of a still background counts as much as the shape
#   that moves.
# - The learning rate is high (0.002 after scaling) and gradients are clipped: there are 2400 steps, not a
#   million.
PRETRAIN = [
    *("--model", "vit_tiny"),
    *CLIP,
    *("--stride", "2"),
    *("--encoder-mask", "frame", "--encoder-ratio", "0.5", "--no-normalize-target"),
    *("--batch-size", "8", "--num-sample", "4"),
    *("--lr", "0.064", "--min-lr", "0.0003", "--clip-grad", "1"),
]
# No clip is mirrored or cut for the classifier: left and right, large and small are classes here.
FINETUNE = [
    *("--stride", "2"),
    *("--batch-size", "16", "--num-sample", "1", "--augment", "none", "--smoothing", "0.1"),
    *("--min-lr", "0.0001", "--layer-decay", "1", "--init-scale", "1", "--drop-path", "0"),
    *("--clip-grad", "1"),
]
# For 256 videos; after a middle stage, which brings head and encoder already, a quarter.
FINETUNE_LR, LAST_LR = 0.016, 0.004


@dataclass
class Stages:
    """Runs stages in a folder, and writes down how long each took; what is written down is done.

    Attributes:
        folder: of all stages of a job.
        seconds: of each stage done, by name.
    """

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds = read_seconds(self.folder)

    def once(self, name: str, result: Path, work: Callable[[], object]) -> Path:
        """Do `work` unless it was done and its `result` is there."""
        if name in self.seconds and result.exists():
            return result
        print(f"== {self.folder.name}: {name}", flush=True)
        at(f"{self.folder.name}: {name}")
        start = time.monotonic()
        work()
        if not result.exists():
            raise InputError(f"{name} was stopped before its end; the same command goes on from there")
        self.seconds[name] = time.monotonic() - start
        part = self.folder / "seconds.json.part"
        part.write_text(json.dumps(self.seconds, indent=1) + "\n")
        os.replace(part, self.folder / "seconds.json")
        return result


def read_seconds(folder: Path) -> dict[str, float]:
    """Seconds of each stage done in a job's folder."""
    path = folder / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run_jobs(
    script: str, jobs: dict[str, int], out: Path, scale: str, after: Mapping[str, str] | None = None
) -> None:
    """Run `python SCRIPT --job NAME` for every job, one on each core, and say how far they are.

    Args:
        jobs: by name, how many stages each has; its folder is `out / name`, its output goes to `out /
            NAME.log`.
        after: by name, the job that must have ended before this one starts.

    Raises:
        InputError: a job failed; the end of its log is in the message.
    """
    waiting, progress, after = list(jobs), _Progress(jobs, out), after or {}
    running: dict[str, subprocess.Popen] = {}
    try:
        while waiting or running:
            ready = [name for name in waiting if after.get(name) not in (*waiting, *running)]
            for name in ready[: (os.cpu_count() or 1) - len(running)]:
                waiting.remove(name)
                running[name] = _start_job(script, name, out, scale)
            time.sleep(0.2 if scale == "smoke" else 1)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    _check_ended(name, process, out)
            progress.tell(running)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def _start_job(script: str, name: str, out: Path, scale: str) -> subprocess.Popen:
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, script, "--job", name, "--out", str(out), "--scale", scale]
    with open(out / f"{name}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _check_ended(name: str, process: subprocess.Popen, out: Path) -> None:
    if process.returncode:
        tail = (out / f"{name}.log").read_text()[-2000:]
        raise InputError(f"job {name} ended with {process.returncode}:\n{tail}")


class _Progress:
    """A line for each stage done; in between, `telling` has what the running jobs say."""

    def __init__(self, jobs: dict[str, int], out: Path) -> None:
        self.jobs, self.out, self.began, self.said = jobs, out, time.monotonic(), -1
        self.before = self._done()

    def _done(self) -> int:
        return sum(len(read_seconds(self.out / name)) for name in self.jobs)

    def tell(self, running: Iterable[str]) -> None:
        done, passed, total = self._done(), time.monotonic() - self.began, sum(self.jobs.values())
        if done != self.said:
            new = done - self.before
            left = ""
            if new:
                left = f", about {passed / new * (total - done) / 60:.0f} min left"
            print(f"{done} of {total} stages, {passed / 60:.1f} min{left}", flush=True)
            self.said = done
        logs = {name: (self.out / f"{name}.log").read_text().splitlines() for name in running}
        states = [f"{name}: {lines[-1] if lines else 'starting'}" for name, lines in logs.items()]
        at("; ".join([f"{done} of {total} stages", *states]))


def run(*arguments: object) -> None:
    """One command; an error of it ends everything."""
    texts = [str(argument) for argument in arguments]
    if code := main(texts):
        raise InputError(f"`python -m vmae {' '.join(texts)}` ended with {code}")


def make_world(out: Path, scale: Scale) -> dict[str, Path]:
    """Make the videos, their lists, and the two label sets merged; see `world_paths`."""
    at("making videos")
    folder = out / "world"
    paths = write_world(folder, scale.world, workers=os.cpu_count() or 1)
    lists = {name: [paths[f"{kind}_{name}"] for kind in ("classes", "train", "val")] for name in ("a", "b")}
    sources = [argument for name, files in lists.items() for argument in ("--source", name, *files)]
    run("merge-labels", folder / "merged", *sources, "--same", paths["same"])
    return world_paths(out)


def world_paths(out: Path) -> dict[str, Path]:
    """Paths: `unlabeled`, `train_a`, `val_a`, `classes_a`, `merged`, `classes`, and `map`
    (merged to set a)."""
    folder = out / "world"
    names = {name: folder / f"{name}.txt" for name in ("unlabeled", "train_a", "val_a", "classes_a")}
    count = len((folder / "merged" / "classes.txt").read_text().splitlines())
    files = {"merged": "train.txt", "classes": "classes.txt", "map": f"label_{count}toa.json"}
    return {**names, **{name: folder / "merged" / file for name, file in files.items()}}


def write_stacks(world: Path, names: Iterable[str]) -> dict[str, Path]:
    """Decode the videos of a world's lists once: a numpy stack beside each video, and a list of the stacks
    beside each list. Of videos as small as these, decoding takes longer than a step of training on them."""
    lists = {}
    for name in names:
        text = (world / f"{name}.txt").read_text()
        for line in text.splitlines():
            video = world / line.split()[0]
            stack = video.with_suffix(".npy")
            if not stack.exists():
                with open_video(video) as reader:
                    frames = reader.frames(range(len(reader)))
                write_atomically(stack, partial(np.save, arr=frames))
        lists[name] = world / f"{name}_stacks.txt"
        lists[name].write_text(text.replace(".mp4", ".npy"))
    return lists


def pretrain(stages: Stages, name: str, data: Path, scale: Scale, seed: int, *mask: object) -> Path:
    """Pre-train; returns the run's folder."""
    folder, steps = stages.folder / name, scale.pretrain_steps
    place = ["--data", data, "--output", folder]
    length = ["--steps", steps, "--repeat", 100, "--seed", seed, *run_flags(steps)]
    arguments = ["pretrain", *place, *PRETRAIN, *mask, *length]
    stages.once(name, folder / "weights.pth", lambda: run(*arguments))
    return folder


def finetune(
    stages: Stages,
    name: str,
    data: Path,
    classes: Path,
    steps: int,
    seed: int,
    start: Path | None,
    *more: object,
) -> Path:
    """Train on labels, from a run or from nothing; returns the run's folder."""
    folder = stages.folder / name
    model: list[object] = ["--init", start]
    if start is None:
        model = ["--model", "vit_tiny", *CLIP]
    place = ["--data", data, "--classes", classes, "--output", folder]
    length = ["--repeat", 20, "--steps", steps, "--seed", seed, *run_flags(steps)]
    arguments = ["finetune", *place, *FINETUNE, "--lr", FINETUNE_LR, *model, *more, *length]
    stages.once(name, folder / "weights.pth", lambda: run(*arguments))
    return folder


def run_flags(steps: int) -> list[object]:
    """Flags of any training: how often it saves and logs, and where it runs."""
    every = ["--save-every", max(steps // 2, 1), "--log-every", max(steps // 50, 1)]
    return [*every, "--workers", 0, "--no-tensorboard", "--device", "cpu"]


def test(stages: Stages, name: str, checkpoint: Path, data: Path) -> float:
    """Top-1 in percent, of two clips of each video."""
    folder = stages.folder / name
    views = ["--segments", 2, "--crops", 1, "--workers", 0, "--device", "cpu"]
    arguments = ["evaluate", data, "--checkpoint", checkpoint, "--output", folder, *views]
    stages.once(name, folder / "results.json", lambda: run(*arguments))
    return json.loads((folder / "results.json").read_text())["top1"]


def final_loss(folder: Path, steps: int) -> float | None:
    """Mean loss of the last tenth of a run."""
    return loss_of_last_tenth(read_log(folder / "log.jsonl"), steps)


def about(scale: Scale) -> dict[str, Any]:
    """Settings of all runs, as results hold them."""
    return {"scale": asdict(scale), "pretrain": PRETRAIN, "finetune": FINETUNE, "lr": [FINETUNE_LR, LAST_LR]}
