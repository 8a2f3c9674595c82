"""`make progressive`: does progressive training work? On moving shapes, on a CPU, from nothing, with three
seeds.

Four arms see the same few labelled clips of label set a, and take the same number of supervised steps:

    scratch             fresh weights, fine-tuned
    pre-trained         dual-masked pre-training on unlabelled videos, then fine-tuned
    post-pre-trained    the same pre-training, then the merged sets a and b, then fine-tuned (VideoMAE V2,
    section 3.3)
    encoder-only        pre-training with encoder-only masking, then fine-tuned

Each is tested on set a's validation videos. Whatever comes out is the result; the last lines hold it against
what was asked for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
from harness.common import print_table, write_json
from harness.telling import telling
from tiny_world import (
    LAST_LR,
    SCALE_HELP,
    SCALES,
    Scale,
    Stages,
    about,
    final_loss,
    finetune,
    make_world,
    pretrain,
    run_jobs,
    test,
    world_paths,
)

ARMS = ("scratch", "pre-trained", "post-pre-trained", "encoder-only")
PARTS = {"dual": 6, "others": 5}  # what a seed is split into, to fill the cores; stages of each
# (better arm, worse arm, points): at least so many more; the last one at most so far apart
CLAIMS = (("pre-trained", "scratch", 15.0), ("post-pre-trained", "pre-trained", 3.0))
CLOSE = ("pre-trained", "encoder-only", 1.0)


def run_part(out: Path, scale: Scale, job: str) -> None:
    """Some arms of a seed ("0-dual"): pre-training, fine-tuning and test; the scores go to `out / JOB /
    scores.json`."""
    seed, part = int(job.split("-")[0]), job.split("-")[1]
    stages, paths = Stages(out / job), world_paths(out)
    steps, middle = scale.supervised_steps, scale.middle_steps
    mask = [] if part == "dual" else ["--decoder-mask", "none"]
    trained = pretrain(stages, "pre-training", paths["unlabeled"], scale, seed, *mask)
    if part == "dual":
        post = finetune(stages, "post-pre-training", paths["merged"], paths["classes"], middle, seed, trained)
        last = ["--label-map", paths["map"], "--lr", LAST_LR]
        arms = {"pre-trained": (trained, steps, []), "post-pre-trained": (post, steps - middle, last)}
    else:
        arms = {"encoder-only": (trained, steps, []), "scratch": (None, steps, [])}
    top1 = {}
    for arm, (start, own, more) in arms.items():
        tuned = finetune(
            stages, f"{arm}, fine-tuning", paths["train_a"], paths["classes_a"], own, seed, start, *more
        )
        top1[arm] = test(stages, f"{arm}, test", tuned, paths["val_a"])
    loss = final_loss(trained, scale.pretrain_steps)
    text = json.dumps({"seed": seed, "top1": top1, f"{part}_loss": loss, "seconds": stages.seconds})
    (stages.folder / "scores.json").write_text(text + "\n")


def collect(out: Path, count: int) -> list[dict[str, Any]]:
    """The scores of each seed, of all its parts."""
    seeds = []
    for seed in range(count):
        parts = {part: json.loads((out / f"{seed}-{part}" / "scores.json").read_text()) for part in PARTS}
        top1 = {arm: score for part in parts.values() for arm, score in part["top1"].items()}
        losses = {key: part[key] for part in parts.values() for key in part if key.endswith("_loss")}
        seeds.append(
            {
                "seed": seed,
                "top1": top1,
                **losses,
                "seconds": {name: part["seconds"] for name, part in parts.items()},
            }
        )
    return seeds


def summarise(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, smallest, largest and standard deviation of each arm's top-1."""
    rows = []
    for arm in ARMS:
        values = [seed["top1"][arm] for seed in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append({"arm": arm, "mean": statistics.mean(values), "std": spread, "values": values})
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What was asked for, and what came out."""
    means = {row["arm"]: row["mean"] for row in rows}
    lines = []
    for better, worse, asked in CLAIMS:
        gap = means[better] - means[worse]
        met = "ok" if gap >= asked else "NOT MET"
        lines.append(f"{better} over {worse}: {gap:+.1f} points (asked for: {asked:g} or more) {met}")
    gap = means[CLOSE[0]] - means[CLOSE[1]]
    met = "ok" if abs(gap) <= CLOSE[2] or gap > 0 else "NOT MET"
    return [
        *lines,
        f"{CLOSE[0]} (dual-masked) against {CLOSE[1]}: {gap:+.1f} points (asked for: within {CLOSE[2]:g}) "
        f"{met}",
    ]


def draw(rows: list[dict[str, Any]], path: Path, chance: float) -> None:
    """A bar for each arm, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    names, means, errors = ([row[key] for row in rows] for key in ("arm", "mean", "std"))
    axes.bar(names, means, yerr=errors, capsize=4, color="#7a9cc6")
    for place, row in enumerate(rows):
        axes.scatter([place] * len(row["values"]), row["values"], color="#222", s=14, zorder=3)
        axes.annotate(f"{row['mean']:.1f}", (place + 0.05, row["mean"]), ha="left", va="bottom")
    axes.axhline(chance, color="#a33", linestyle="--", linewidth=1, label="chance")
    axes.set(
        ylabel="top-1 on moving shapes (%)", title="Same labelled clips, same supervised steps", ylim=(0, 100)
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def report(out: Path, scale: Scale, seeds: list[dict[str, Any]], minutes: float) -> None:
    """Table, verdicts, picture and JSON."""
    rows, classes = summarise(seeds), len(world_paths(out)["classes_a"].read_text().splitlines())
    print(
        f"\ntop-1 in percent, {len(seeds)} seeds, {classes} classes, {scale.world.few} labelled videos of "
        "each\n"
    )
    print_table(
        ["arm", "mean", "std", *(f"seed {seed['seed']}" for seed in seeds)],
        [
            [row["arm"], *(f"{value:.1f}" for value in (row["mean"], row["std"], *row["values"]))]
            for row in rows
        ],
    )
    lines = verdicts(rows)
    print("\n" + "\n".join(lines))
    draw(rows, out / "progressive.png", 100 / classes)
    write_json(
        out / "progressive.json", rows, "cpu", seeds=seeds, verdicts=lines, minutes=minutes, **about(scale)
    )
    print(f"\n{minutes:.1f} minutes; {out}/progressive.png, progressive.json")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("progressive"), help="folder of everything (progressive)"
    )
    parser.add_argument("--scale", default="full", choices=SCALES, help=f"{SCALE_HELP}; default: full")
    parser.add_argument("--seeds", type=int, help="runs of everything (3)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    scale = SCALES[args.scale]
    if args.job:
        run_part(args.out, scale, args.job)
        return 0
    with telling():
        return run_all(args, scale)


def run_all(args: argparse.Namespace, scale: Scale) -> int:
    began, count = time.monotonic(), args.seeds or scale.seeds
    make_world(args.out, scale)
    jobs = {f"{seed}-{part}": stages for seed in range(count) for part, stages in PARTS.items()}
    run_jobs(__file__, jobs, args.out, args.scale)
    report(args.out, scale, collect(args.out, count), (time.monotonic() - began) / 60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
