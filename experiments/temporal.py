"""Videos -> features -> segments -> mAP, from nothing, in minutes on two CPU cores: what a temporal detector
is worth here.

Makes videos of moving shapes (rest and six motions in turn), fine-tunes a small classifier on short clips of
single motions, extracts features, trains a detector on 60 videos and tests it on 20. A number means something
beside others only, so the same detector is trained on two more sets of features: those of the same classifier
untrained, and those of the trained one after each video got another's, which leaves nothing but the rhythm of
the videos to learn: chance.

    python experiments/temporal.py --out temporal    # also `make temporal`; a stage that was done is not done again
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import bench_path  # noqa: F401
import numpy as np
import torch
from harness.common import exit_code, print_table, write_json
from tiny_world import Stages, run

from vmae import InputError, build_classifier
from vmae.checkpoint.folder import export_weights
from vmae.checkpoint.published import read_settings_and_weights
from vmae.config import ModelConfig
from vmae.evaluate.temporal import THUMOS_THRESHOLDS, read_videos
from vmae.files.atomic import write_atomically
from vmae.synthetic.moving_segments import SegmentsConfig, write_segments_world

FRAMES, STEP = 8, 2
# 2 x 2 patches at 4 moments, as in tiny_world.py. Neither mirrored nor cut: left and right, large and small
# are classes.
CLIP = [
    "--num-frames",
    FRAMES,
    "--image-size",
    "32",
    "--stride",
    "1",
    "--num-sample",
    "1",
    "--augment",
    "none",
]
FINETUNE = [
    "--model",
    "vit_tiny",
    "--patch-size",
    "16",
    *CLIP,
    "--batch-size",
    "16",
    "--smoothing",
    "0.1",
    "--lr",
    "0.032",
    "--min-lr",
    "0.0001",
    "--layer-decay",
    "1",
    "--init-scale",
    "1",
    "--repeat",
    "10",
]
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
    words = [
        "finetune",
        "--data",
        world["clips"],
        "--classes",
        world["classes"],
        "--output",
        folder,
        *FINETUNE,
        "--device",
        "cpu",
    ]
    words += [
        "--workers",
        0,
        "--no-tensorboard",
        "--steps",
        steps,
        "--seed",
        seed,
        "--save-every",
        steps,
        "--log-every",
        max(steps // 20, 1),
    ]
    stages.once("classifier", folder / "weights.pth", lambda: run(*words))
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
    words = [
        "features",
        videos,
        "--checkpoint",
        checkpoint,
        "--output",
        folder,
        "--step",
        STEP,
        "--normalize",
    ]
    done = folder / "done"
    stages.once(name, done, lambda: (run(*words, "--batch-size", 32, "--device", "cpu"), done.touch()))
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
    words = [
        "detect-temporal",
        features,
        dataset,
        "--output",
        folder,
        "--epochs",
        epochs,
        "--seed",
        seed,
        "--device",
        "cpu",
    ]

    def work() -> None:
        (folder / "detector.pth").unlink(missing_ok=True)  # of a run that was stopped in its test
        run(*words, "--picture", 4 if arm == "features" else 0)

    stages.once(f"detector-{arm}", folder / "results.json", work)
    return json.loads((folder / "results.json").read_text())


def chain(out: Path, scale: Scale, seed: int) -> list[dict]:
    """Everything; a record of each arm."""
    stages = Stages(out)
    segments = out / "world"
    stages.once("world", segments / "classes.txt", lambda: write_segments_world(segments, scale.world))
    world = write_segments_world(
        segments, scale.world
    )  # there already: where things are, and that they are of these settings
    trained = finetune(stages, world, scale.steps, seed)
    stages.once(
        "weights-untrained",
        out / "untrained.pth",
        lambda: write_untrained(trained, out / "untrained.pth", seed),
    )
    folders = {"features": extract(stages, "features", world["videos"], trained)}
    folders["untrained"] = extract(stages, "untrained", world["videos"], out / "untrained.pth")
    folders["shuffled"] = out / "shuffled"
    stages.once(
        "shuffled",
        out / "shuffled" / "done",
        lambda: shuffle(folders["features"], out / "shuffled", world["dataset"]),
    )
    records = []
    for arm, folder in folders.items():
        scores = detect(stages, arm, folder, world["dataset"], scale.epochs, seed)
        records.append({"kind": "temporal", "arm": arm, "about": ARMS[arm], "seed": seed, **scores})
    return records


def report(records: list[dict]) -> None:
    head = ["features", *(f"mAP@{threshold:g}" for threshold in THUMOS_THRESHOLDS), "average"]
    rows = [
        [
            r["about"],
            *(f"{100 * r['map'][str(t)]:.1f}" for t in THUMOS_THRESHOLDS),
            f"{100 * r['average']:.1f}",
        ]
        for r in records
    ]
    print_table(head, rows)
    classes = records[0]["classes"]
    means = {label: np.mean(list(values.values())) for label, values in classes.items()}
    print(
        "\nby class, of the first row: "
        + ", ".join(f"{label} {100 * mean:.0f}" for label, mean in means.items())
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("temporal"), help="folder of videos, runs and results"
    )
    parser.add_argument("--scale", default="full", choices=SCALES)
    parser.add_argument("--seed", type=int, default=0, help="of classifier and detector")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    args = parser.parse_args(argv)

    def chained() -> int:
        scale = SCALES[args.scale]
        about = args.out / "scale.json"
        given = json.dumps({"scale": args.scale, "seed": args.seed})
        if about.exists() and about.read_text() != given:
            raise InputError(f"{args.out} holds another run ({about.read_text()}); choose another --out")
        args.out.mkdir(parents=True, exist_ok=True)
        about.write_text(given)
        records = chain(args.out, scale, args.seed)
        seconds = json.loads((args.out / "seconds.json").read_text())
        print()
        report(records)
        for path in (args.out / "temporal.json", *([args.json] if args.json else [])):
            write_json(path, records, "cpu", seconds=seconds)
        print(
            f"\n{sum(seconds.values()):.0f} s of work; {args.out}/temporal.json, "
            f"{args.out}/detector-features/segments.png"
        )
        return 0

    return exit_code(chained)


if __name__ == "__main__":
    sys.exit(main())
