"""Temporal detection in miniature (`make temporal`): videos, features, segments, mAP, from nothing.

Makes videos of moving shapes (rest and six motions in turn), fine-tunes a small classifier on short clips of
single motions, extracts features, trains a detector on 60 videos and tests it on 20. A number means something
beside others only, so the same detector is trained on two more sets of features: those of the same classifier
untrained, and those of the trained one after each video got another's, which leaves nothing but the rhythm of
the videos to learn: chance.

    python experiments/temporal.py --out temporal    # also `make temporal`; goes on from the last stage done
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
import torch
from harness.command import add_json, exit_code, write_result
from harness.environment import find_environment
from harness.results.temporal import DetectorRecord, TemporalResult
from harness.table import show
from tiny_world import Stages, run

from vmae import InputError, build_classifier
from vmae.checkpoint.folder import export_weights
from vmae.checkpoint.published import read_settings_and_weights
from vmae.config import ModelConfig
from vmae.evaluate.temporal import read_videos
from vmae.files.atomic import write_atomically
from vmae.synthetic.moving_segments import SegmentsConfig, write_segments_world

FRAMES, STEP = 8, 2
# 2 x 2 patches at 4 moments, as in tiny_world.py. Neither mirrored nor cut: left and right, large and small
# are classes.
CLIP = ["--num-frames", FRAMES, *"--image-size 32 --stride 1 --num-sample 1 --augment none".split()]
OPTIMIZER = "--batch-size 16 --smoothing 0.1 --lr 0.032 --min-lr 0.0001 --layer-decay 1 --init-scale 1"
MODEL = "--model vit_tiny --patch-size 16"
FINETUNE = [*MODEL.split(), *CLIP, *OPTIMIZER.split(), "--repeat", "10"]
ARMS = {
    "features": "of the trained classifier",
    "untrained": "of the same classifier, untrained",
    "shuffled": "trained, but of another video: chance",
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Videos, steps of the classifier, epochs of the detector."""

    world: SegmentsConfig
    steps: int
    epochs: int


SCALES = {
    "full": Scale(world=SegmentsConfig(), steps=1200, epochs=40),
    "smoke": Scale(world=SegmentsConfig(seconds=9, training=3, test=2, clips=3), steps=4, epochs=2),
}


def finetune(stages: Stages, world: dict[str, Path], steps: int, seed: int) -> Path:
    """A classifier of single motions and rest; returns its run's folder."""
    folder = stages.folder / "classifier"
    place = ["--data", world["clips"], "--classes", world["classes"], "--output", folder]
    length = ["--steps", steps, "--seed", seed, "--save-every", steps, "--log-every", max(steps // 20, 1)]
    machine = ["--device", "cpu", "--workers", 0, "--no-tensorboard"]
    arguments = ["finetune", *place, *FINETUNE, *machine, *length]
    stages.once("classifier", folder / "weights.pth", lambda: run(*arguments))
    return folder


def write_untrained(trained: Path, target: Path, seed: int) -> None:
    """Fresh weights of the same classifier."""
    settings, _ = read_settings_and_weights(trained / "weights.pth")
    torch.manual_seed(seed)
    model = build_classifier(ModelConfig.from_dict(settings["model"]), settings["num_classes"])
    export_weights(target, model.state_dict(), config=settings)


def extract(stages: Stages, name: str, videos: Path, checkpoint: Path) -> Path:
    """Features, normalised as the classifier was trained."""
    folder = stages.folder / name
    place = [videos, "--checkpoint", checkpoint, "--output", folder]
    settings = ["--step", STEP, "--normalize", "--batch-size", 32, "--device", "cpu"]

    def work() -> None:
        run("features", *place, *settings)
        (folder / "done").touch()

    stages.once(name, folder / "done", work)
    return folder


def shuffle(source: Path, target: Path, dataset: Path) -> None:
    """Give each video the features of the next of its subset."""
    target.mkdir(exist_ok=True)
    shutil.copy(source / "features.json", target)
    videos = read_videos(dataset)
    for subset in sorted({info.subset for info in videos.values()}):
        names = [name for name, info in videos.items() if info.subset == subset]
        for name, other in zip(names, names[1:] + names[:1]):
            shutil.copy(source / f"{other}.npy", target / f"{name}.npy")
    write_atomically(target / "done", lambda file: None)


def detect(stages: Stages, arm: str, features: Path, dataset: Path, epochs: int, seed: int) -> dict:
    """Train and test a detector; its scores."""
    folder = stages.folder / f"detector-{arm}"
    settings = ["--epochs", epochs, "--seed", seed, "--device", "cpu"]
    arguments = ["detect-temporal", features, dataset, "--output", folder, *settings]

    def work() -> None:
        (folder / "detector.pth").unlink(missing_ok=True)  # of a run that was stopped in its test
        run(*arguments, "--picture", 4 if arm == "features" else 0)

    stages.once(f"detector-{arm}", folder / "results.json", work)
    return json.loads((folder / "results.json").read_text())


def chain(out: Path, scale: Scale, seed: int) -> list[DetectorRecord]:
    """Everything; a record of each arm."""
    stages, segments = Stages(out), out / "world"
    stages.once("world", segments / "classes.txt", lambda: write_segments_world(segments, scale.world))
    # Made already: this says where things are, and refuses a world of other settings.
    world = write_segments_world(segments, scale.world)
    trained = finetune(stages, world, scale.steps, seed)
    untrained, shuffled = out / "untrained.pth", out / "shuffled"
    stages.once("weights-untrained", untrained, lambda: write_untrained(trained, untrained, seed))
    folders = {"features": extract(stages, "features", world["videos"], trained)}
    folders["untrained"] = extract(stages, "untrained", world["videos"], untrained)
    folders["shuffled"] = shuffled
    source, dataset = folders["features"], world["dataset"]
    stages.once("shuffled", shuffled / "done", lambda: shuffle(source, shuffled, dataset))
    records = []
    for arm, folder in folders.items():
        scores = detect(stages, arm, folder, dataset, scale.epochs, seed)
        records.append(make_record(arm, seed, scores))
    return records


def make_record(arm: str, seed: int, scores: dict[str, Any]) -> DetectorRecord:
    """Record of a detector's `results.json`."""
    return DetectorRecord(
        arm=arm,
        about=ARMS[arm],
        seed=seed,
        map=scores["map"],
        average=scores["average"],
        classes=scores["classes"],
    )


def claim_folder(out: Path, settings: dict[str, Any]) -> None:
    """Write down what `out` is of.

    Raises:
        InputError: it holds a run of other settings.
    """
    about, text = out / "scale.json", json.dumps(settings)
    if about.exists() and about.read_text() != text:
        raise InputError(f"{out} holds another run ({about.read_text()}); choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    about.write_text(text)


def run_all(args: argparse.Namespace) -> int:
    claim_folder(args.out, {"scale": args.scale, "seed": args.seed})
    records = chain(args.out, SCALES[args.scale], args.seed)
    seconds = json.loads((args.out / "seconds.json").read_text())
    result = TemporalResult(environment=find_environment(), records=records, seconds=seconds)
    show(*result.tables())
    write_result(result, str(args.out / "temporal.json"))
    write_result(result, args.json)
    print(f"picture: {args.out}/detector-features/segments.png")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("temporal"), help="folder of videos, runs and results")
    add("--scale", default="full", choices=SCALES)
    add("--seed", type=int, default=0, help="of classifier and detector")
    add_json(parser)
    args = parser.parse_args(argv)
    return exit_code(lambda: run_all(args))


if __name__ == "__main__":
    sys.exit(main())
