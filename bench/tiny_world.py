"""Whole trainings on moving shapes, small enough for two CPU cores: what `progressive.py` and `mask_ablation.py` share.

Every stage is a command of `python -m vmae`, run in this process; a stage whose result is there is not run again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vmae.cli import main
from vmae.data.moving_shapes import WorldConfig, write_world
from vmae.errors import InputError
from vmae.train.metrics import loss_of_last_tenth, read_log


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is.

    Attributes:
        world: the videos.
        pretrain_steps: of self-supervision, of 32 clips each.
        supervised_steps: of each arm in all, however many stages it has; 32 clips each.
        middle_steps: how many of them a middle stage gets.
        seeds: runs of everything.
    """

    world: WorldConfig
    pretrain_steps: int
    supervised_steps: int
    middle_steps: int
    seeds: int = 3


SCALES = {
    "full": Scale(
        world=WorldConfig(size=32, frames=16, unlabeled=840, few=8, many=60, shared=2, validation=20),
        pretrain_steps=1500,
        supervised_steps=200,
        middle_steps=120,
    ),
    "smoke": Scale(
        world=WorldConfig(size=32, frames=8, unlabeled=28, few=2, many=2, shared=1, validation=1),
        pretrain_steps=2,
        supervised_steps=4,
        middle_steps=2,
        seeds=2,
    ),
}
CLIP = ["--num-frames", "8", "--image-size", "32"]
# No clip is cut or mirrored: left and right, large and small are classes here.
PRETRAIN = ["--model", "vit_tiny", "--patch-size", "8", *CLIP, "--stride", "1", "--encoder-ratio", "0.75", "--batch-size", "8",
            "--num-sample", "4", "--lr", "0.032", "--min-lr", "0.0003", "--weight-decay", "0.05"]  # fmt: skip
FINETUNE = ["--stride", "1", "--batch-size", "16", "--num-sample", "2", "--augment", "none", "--smoothing", "0.1",
            "--lr", "0.016", "--min-lr", "0.0001", "--drop-path", "0.1", "--head-drop", "0.2"]  # fmt: skip


@dataclass
class Stages:
    """Runs stages in a folder and keeps time.

    Attributes:
        folder: of everything.
        total: stages that there will be, for the time left.
        seconds: of each stage done in this or an earlier run, by name.
    """

    folder: Path
    total: int
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "seconds.json"
        self.seconds = json.loads(path.read_text()) if path.exists() else {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say what begins, and take its time."""
        number, start = len(self.seconds) + 1, time.monotonic()
        left = ""
        if self.seconds:
            left = f", about {sum(self.seconds.values()) / len(self.seconds) * (self.total - number + 1) / 60:.0f} min left"
        print(f"== {number} of {self.total}: {name}{left}", flush=True)
        yield
        self.seconds[name] = time.monotonic() - start
        part = self.folder / "seconds.json.part"
        part.write_text(json.dumps(self.seconds, indent=1) + "\n")
        os.replace(part, self.folder / "seconds.json")

    def once(self, name: str, result: Path, work: Callable[[], object]) -> Path:
        """Do `work` as a stage unless its `result` is there."""
        if name not in self.seconds or not result.exists():
            with self.stage(name):
                work()
        return result


def run(*words: object) -> None:
    """One command; an error of it ends everything."""
    code = main([str(word) for word in words])
    if code:
        raise InputError(f"`python -m vmae {' '.join(map(str, words))}` ended with {code}")


def make_world(stages: Stages, scale: Scale) -> dict[str, Path]:
    """The videos, their lists, and the two label sets merged: `merged`, `classes`, `map` (to set a)."""
    folder = stages.folder / "world"
    with stages.stage("the world: videos and lists") if "the world: videos and lists" not in stages.seconds else quiet():
        paths = write_world(folder, scale.world, workers=os.cpu_count() or 1)
        lists = {name: [paths[f"{kind}_{name}"] for kind in ("classes", "train", "val")] for name in ("a", "b")}
        sources = [word for name, files in lists.items() for word in ("--source", name, *files)]
        run("merge-labels", folder / "merged", *sources, "--same", paths["same"])
    merged = folder / "merged"
    count = len((merged / "classes.txt").read_text().splitlines())
    found = {"merged": "train.txt", "classes": "classes.txt", "map": f"label_{count}toa.json"}
    return {**paths, **{name: merged / file for name, file in found.items()}}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For what was done before, and only looked up now."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def pretrain(stages: Stages, name: str, data: Path, scale: Scale, seed: int, *mask: object) -> Path:
    """Pre-train; returns the run's folder."""
    folder = stages.folder / name
    steps = ["--steps", scale.pretrain_steps, "--repeat", 100, "--seed", seed]
    words = ["pretrain", "--data", data, "--output", folder, *PRETRAIN, *mask, *steps, *run_flags(scale.pretrain_steps)]
    stages.once(name, folder / "weights.pth", lambda: run(*words))
    return folder


def finetune(
    stages: Stages, name: str, data: Path, classes: Path, steps: int, seed: int, start: Path | None, *more: object
) -> Path:
    """Train on labels, from a run or from nothing; returns the run's folder."""
    folder = stages.folder / name
    size = ["--model", "vit_tiny", "--patch-size", "8", *CLIP] if start is None else ["--init", start]
    decay = ["--layer-decay", "1.0" if start is None else "0.8"]
    words = ["finetune", "--data", data, "--classes", classes, "--output", folder, *FINETUNE, *size, *decay, *more]
    words += ["--repeat", 20, "--steps", steps, "--seed", seed, *run_flags(steps)]
    stages.once(name, folder / "weights.pth", lambda: run(*words))
    return folder


def run_flags(steps: int) -> list[object]:
    every = ["--save-every", max(steps // 2, 1), "--log-every", max(steps // 50, 1)]
    return [*every, "--workers", 1, "--no-tensorboard", "--device", "cpu"]


def test(stages: Stages, name: str, checkpoint: Path, data: Path) -> float:
    """Top-1 in percent, of two clips of each video."""
    folder = stages.folder / name
    words = ["evaluate", data, "--checkpoint", checkpoint, "--output", folder, "--segments", 2, "--crops", 1]
    stages.once(name, folder / "results.json", lambda: run(*words, "--workers", 1, "--device", "cpu"))
    return json.loads((folder / "results.json").read_text())["top1"]


def final_loss(folder: Path, steps: int) -> float | None:
    """Mean loss of the last tenth of a run."""
    return loss_of_last_tenth(read_log(folder / "log.jsonl"), steps)


def about(scale: Scale) -> dict:
    """The settings, for the record."""
    return {"scale": asdict(scale), "pretrain": PRETRAIN, "finetune": FINETUNE}
