"""Progressive training in miniature (`make progressive`): moving shapes, a CPU, from nothing, three seeds.

Four arms see the same few labelled clips of label set a, in the same number of supervised steps:

    scratch             fresh weights, fine-tuned
    pre-trained         dual-masked pre-training on unlabelled videos, then fine-tuned
    post-pre-trained    the same pre-training, then the merged sets a and b, then fine-tuned (VideoMAE V2)
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

import bench_path  # noqa: F401
from harness.command import check_least, exit_code
from harness.environment import find_environment
from harness.results.progressive import ArmRecord, ProgressiveResult, SeedScores
from harness.table import show
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


def run_part(out: Path, scale: Scale, job: str) -> int:
    """Some arms of a seed ("0-dual"): pre-training, fine-tuning and test; the scores go to `out / JOB /
    scores.json`."""
    seed, part = int(job.split("-")[0]), job.split("-")[1]
    stages, paths = Stages(out / job), world_paths(out)
    steps, middle = scale.supervised_steps, scale.middle_steps
    mask = [] if part == "dual" else ["--decoder-mask", "none"]
    trained = pretrain(stages, "pre-training", paths["unlabeled"], scale, seed, *mask)
    arms: dict[str, tuple[Path | None, int, list[object]]] = {}  # start, steps, more arguments
    if part == "dual":
        post = finetune(stages, "post-pre-training", paths["merged"], paths["classes"], middle, seed, trained)
        last = ["--label-map", paths["map"], "--lr", LAST_LR]
        arms["pre-trained"], arms["post-pre-trained"] = (trained, steps, []), (post, steps - middle, last)
    else:
        arms["encoder-only"], arms["scratch"] = (trained, steps, []), (None, steps, [])
    top1, data = {}, (paths["train_a"], paths["classes_a"])
    for arm, (start, own, more) in arms.items():
        tuned = finetune(stages, f"{arm}, fine-tuning", *data, own, seed, start, *more)
        top1[arm] = test(stages, f"{arm}, test", tuned, paths["val_a"])
    loss = final_loss(trained, scale.pretrain_steps)
    text = json.dumps({"seed": seed, "top1": top1, f"{part}_loss": loss, "seconds": stages.seconds})
    (stages.folder / "scores.json").write_text(text + "\n")
    return 0


def collect(out: Path, count: int) -> list[SeedScores]:
    """The scores of each seed, of all its parts."""
    seeds = []
    for seed in range(count):
        parts = {part: json.loads((out / f"{seed}-{part}" / "scores.json").read_text()) for part in PARTS}
        scores = SeedScores(
            seed=seed,
            top1={arm: score for part in parts.values() for arm, score in part["top1"].items()},
            dual_loss=parts["dual"]["dual_loss"],
            others_loss=parts["others"]["others_loss"],
            seconds={name: part["seconds"] for name, part in parts.items()},
        )
        seeds.append(scores)
    return seeds


def summarise(seeds: list[SeedScores]) -> list[ArmRecord]:
    """Mean and standard deviation of each arm's top-1."""
    rows = []
    for arm in ARMS:
        values = [seed.top1[arm] for seed in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(ArmRecord(arm=arm, mean=statistics.mean(values), std=spread, values=values))
    return rows


def verdicts(rows: list[ArmRecord]) -> list[str]:
    """What was asked for, and what came out."""
    means = {row.arm: row.mean for row in rows}
    lines = []
    for better, worse, asked in CLAIMS:
        gap = means[better] - means[worse]
        met = "ok" if gap >= asked else "NOT MET"
        lines.append(f"{better} over {worse}: {gap:+.1f} points (asked for: {asked:g} or more) {met}")
    dual, encoder_only, near = CLOSE
    gap = means[dual] - means[encoder_only]
    met = "ok" if abs(gap) <= near or gap > 0 else "NOT MET"
    text = f"{dual} (dual-masked) against {encoder_only}: {gap:+.1f} points"
    return [*lines, f"{text} (asked for: within {near:g}) {met}"]


def draw(rows: list[ArmRecord], path: Path, chance: float) -> None:
    """A bar for each arm, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    names, means, errors = [row.arm for row in rows], [row.mean for row in rows], [row.std for row in rows]
    axes.bar(names, means, yerr=errors, capsize=4, color="#7a9cc6")
    for place, row in enumerate(rows):
        axes.scatter([place] * len(row.values), row.values, color="#222", s=14, zorder=3)
        axes.annotate(f"{row.mean:.1f}", (place + 0.05, row.mean), ha="left", va="bottom")
    axes.axhline(chance, color="#a33", linestyle="--", linewidth=1, label="chance")
    title = "Same labelled clips, same supervised steps"
    axes.set(ylabel="top-1 on moving shapes (%)", title=title, ylim=(0, 100))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def report(out: Path, scale: Scale, seeds: list[SeedScores], minutes: float) -> None:
    """Table, verdicts, picture and JSON."""
    rows, classes = summarise(seeds), len(world_paths(out)["classes_a"].read_text().splitlines())
    result = ProgressiveResult(
        environment=find_environment(),
        records=rows,
        seeds=seeds,
        verdicts=verdicts(rows),
        minutes=minutes,
        **about(scale),
    )
    labelled = f"{classes} classes, {scale.world.few} labelled videos of each"
    print(f"\ntop-1 in percent, {len(seeds)} seeds, {labelled}")
    show(*result.tables())
    print("\n" + "\n".join(result.verdicts))
    draw(rows, out / "progressive.png", 100 / classes)
    result.write(out / "progressive.json")
    print(f"\n{minutes:.1f} minutes; {out}/progressive.png, progressive.json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("progressive"), help="folder of everything (progressive)"
    )
    parser.add_argument("--scale", default="full", choices=SCALES, help=f"{SCALE_HELP}; default: full")
    parser.add_argument("--seeds", type=int, help="runs of everything (3)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    scale = SCALES[args.scale]
    if args.job:
        return exit_code(lambda: run_part(args.out, scale, args.job))
    return exit_code(lambda: run_all(args, scale))


def run_all(args: argparse.Namespace, scale: Scale) -> int:
    check_least(args, "seeds")
    began, count = time.monotonic(), args.seeds or scale.seeds
    make_world(args.out, scale)
    jobs = {f"{seed}-{part}": stages for seed in range(count) for part, stages in PARTS.items()}
    run_jobs(__file__, jobs, args.out, args.scale)
    report(args.out, scale, collect(args.out, count), (time.monotonic() - began) / 60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
