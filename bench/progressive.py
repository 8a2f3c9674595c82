"""`make progressive`: does progressive training work? On moving shapes, on a CPU, from nothing, with three seeds.

Four arms see the same few labelled clips of label set a, and take the same number of supervised steps:

    scratch             fresh weights, fine-tuned
    pre-trained         dual-masked pre-training on unlabelled videos, then fine-tuned
    post-pre-trained    the same pre-training, then the merged sets a and b, then fine-tuned (VideoMAE V2, section 3.3)
    encoder-only        pre-training with encoder-only masking, then fine-tuned

Each is tested on set a's validation videos. Whatever comes out is the result; the last lines hold it against what was
asked for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import print_table, write_json
from tiny_world import SCALES, Scale, Stages, about, final_loss, finetune, make_world, pretrain, test

ARMS = ("scratch", "pre-trained", "post-pre-trained", "encoder-only")
STAGES_A_SEED = 2 + 5 + 4
# (better arm, worse arm, points): at least so many more; the last one at most so far apart
CLAIMS = (("pre-trained", "scratch", 15.0), ("post-pre-trained", "pre-trained", 3.0))
CLOSE = ("pre-trained", "encoder-only", 1.0)


def run_seed(stages: Stages, paths: dict[str, Path], scale: Scale, seed: int) -> dict[str, Any]:
    """All arms of one seed: top-1 of each, and the losses and seconds of their pre-training."""
    few, classes, prefix = paths["train_a"], paths["classes_a"], f"seed {seed}"
    dual = pretrain(stages, f"{prefix}, dual-masked pre-training", paths["unlabeled"], scale, seed)
    single = pretrain(
        stages, f"{prefix}, encoder-only pre-training", paths["unlabeled"], scale, seed, "--decoder-mask", "none"
    )
    steps, middle = scale.supervised_steps, scale.middle_steps
    post = finetune(stages, f"{prefix}, post-pre-training", paths["merged"], paths["classes"], middle, seed, dual)
    starts = {"scratch": (None, steps), "pre-trained": (dual, steps), "post-pre-trained": (post, steps - middle)}
    starts["encoder-only"] = (single, steps)
    found: dict[str, Any] = {"seed": seed, "top1": {}}
    for arm, (start, own) in starts.items():
        more = ["--label-map", paths["map"]] if start is post else []
        tuned = finetune(stages, f"{prefix}, {arm}, fine-tuning", few, classes, own, seed, start, *more)
        found["top1"][arm] = test(stages, f"{prefix}, {arm}, test", tuned, paths["val_a"])
    for name, folder in (("dual", dual), ("encoder_only", single)):
        found[f"{name}_loss"] = final_loss(folder, scale.pretrain_steps)
        found[f"{name}_seconds"] = stages.seconds[folder.name]
    return found


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
    return [*lines, f"{CLOSE[0]} (dual-masked) against {CLOSE[1]}: {gap:+.1f} points (asked for: within {CLOSE[2]:g}) {met}"]


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
    axes.set(ylabel="top-1 on moving shapes (%)", title="Same labelled clips, same supervised steps", ylim=(0, 100))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("progressive"), help="folder of everything (progressive)")
    parser.add_argument("--scale", default="full", choices=SCALES)
    parser.add_argument("--seeds", type=int, help="runs of everything (3)")
    args = parser.parse_args()
    scale, began = SCALES[args.scale], time.monotonic()
    count = args.seeds or scale.seeds
    stages = Stages(args.out, 1 + count * STAGES_A_SEED)
    paths = make_world(stages, scale)
    seeds = [run_seed(stages, paths, scale, seed) for seed in range(count)]
    rows = summarise(seeds)
    classes = len(paths["classes_a"].read_text().splitlines())
    print(f"\ntop-1 in percent, {count} seeds, {classes} classes, {scale.world.few} labelled videos of each\n")
    print_table(
        ["arm", "mean", "std", *(f"seed {seed['seed']}" for seed in seeds)],
        [[row["arm"], f"{row['mean']:.1f}", f"{row['std']:.1f}", *(f"{value:.1f}" for value in row["values"])] for row in rows],
    )
    lines = verdicts(rows)
    print("\n" + "\n".join(lines))
    minutes, all_minutes = (time.monotonic() - began) / 60, sum(stages.seconds.values()) / 60
    draw(rows, args.out / "progressive.png", 100 / classes)
    write_json(
        args.out / "progressive.json", rows, "cpu", seeds=seeds, verdicts=lines, minutes=all_minutes, seconds=stages.seconds,
        **about(scale),
    )  # fmt: skip
    print(f"\n{all_minutes:.1f} minutes of stages ({minutes:.1f} in this run); {args.out}/progressive.png, progressive.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
