"""Stage two in miniature (`make stage2`): moving shapes, a CPU, from nothing, three seeds.

All arms are pre-trained on the same videos with the same FLOPs, counted: of a clip of a step 6 x the
multiply-accumulates of the student's forward and 2 x those of the target's values. A teacher's own
pre-training is part of its arms' budget.

    random           nothing: weights as they are drawn, which is what each arm starts from
    pixels           dual-masked pre-training on pixels, all the way
    salt             stage one: pixels for 0.3 of the budget; stage two: a fresh student predicts the
                     latents of that encoder, frozen (SALT, Li et al., 2025)
    salt-cells       the same with running cells on the predictor; what they save goes into more steps
    continued        as salt, but the student starts from its teacher
    hog              histograms of oriented gradients (MaskFeat), dual-masked, all the way

Each encoder is evaluated frozen, by an attentive and by a linear probe, and fine-tuned. Whatever comes out is
the result; the last lines hold it against what was asked for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
import torch
from harness.command import check_least, exit_code
from harness.environment import find_environment
from harness.results.base import OverSeeds
from harness.results.stage2 import ArmRecord, DifferenceRecord, Stage2Result
from harness.table import show
from tiny_world import (
    FINETUNE,
    FINETUNE_LR,
    PRETRAIN,
    Scale,
    Stages,
    finetune,
    pretrain,
    run_jobs,
    test,
    write_stacks,
)

from vmae import build_pretrainer
from vmae.checkpoint.folder import export_weights
from vmae.config import MaskConfig, ModelConfig
from vmae.model.cost import masked_macs
from vmae.model.target import Target
from vmae.synthetic.moving_shapes import WorldConfig, write_world
from vmae.targets.building import build_target
from vmae.targets.settings import TargetConfig, Wanted


@dataclass(frozen=True, kw_only=True)
class Stage2Scale(Scale):
    """`pretrain_steps` are those of the arm "pixels", which are the budget; `supervised_steps` those of
    fine-tuning.

    Attributes:
        stage_one: share of the budget that the teacher's pre-training gets.
        probe_steps: of each probe.
    """

    stage_one: float
    probe_steps: int


@dataclass(frozen=True)
class Arm:
    """What an arm predicts, and of which tokens.

    Attributes:
        about: in the table.
        target: a name of `vmae.targets.TARGETS`; None: it is not trained.
        mask: who sees and predicts what.
        from_teacher: whether the student starts as its teacher is, not afresh.
    """

    about: str
    target: str | None
    mask: MaskConfig
    from_teacher: bool = False


# What was tried, on videos and a seed that are not those of the table, in memory (one run each, 1000 test
# videos: 2 points are noise; TFLOP in all, attentive and linear probe in %):
# - ViT-tiny of width 128, 32 clips a step, pixels: half of the frames hidden (6 TFLOP) 67, 45; a random 3/4
#   hidden 72, 56; the same with 3 TFLOP 62, 31; 16 clips a step (3) 69, 53. So: 3/4, 16 clips.
# - Width 64, pixels: 1.5 TFLOP 66, 45; 32 clips (3) 61, 47; 3 TFLOP 67, 49; 8 clips (3) 64, 50; normalised
#   (1.5) 45, 17; half of the frames hidden (1.5) 58, 38; twice the learning rate (1.5) 64, 41. So: width 64,
#   where twice the budget gives pixels little; learning rate and clips as they were.
# - Latents of the last block, 3 TFLOP, half of it for the teacher. A fresh student: smooth L1 36, 21; L1 and
#   twice the learning rate 58, 25; with 8 clips 62, 47; with half of the tokens hidden 61, 42. One that
#   starts from its teacher: smooth L1 62, 53; L1 66, 52; L1 and twice the learning rate 68, 54; with half of
#   the tokens hidden 67, 58. So: L1, twice the learning rate.
# - A quarter of the budget for the teacher: the last block, from the teacher: 69, 45; block 2, which costs
#   half: fresh 68, 44, from the teacher 72, 47, running cells (fresh) 67, 47; block 1, fresh: 68, 52. Block 2
#   and 15 % for the teacher: fresh 69, 45, from the teacher 69, 44. So: less than half, block 2; the pixels
#   of as long a run (67, 49) are within the noise of most of these.
# By the commands below, 3 TFLOP: pixels 60, 50. Latents, 0.4 for the teacher: fresh 58, 52; 0.3: fresh 63,
# 48, from the teacher 64, 48. So: 0.3. For some 600 steps a loss of pixels stays at that of the mean of what
# is seen, and the encoder knows no motion: a teacher of 500 steps (four clips of each of four videos a step)
# left its students at chance, 10 to 13, and fine-tuned far below random weights.
# HOG, 3 TFLOP: 36, 15; by the commands below, at twice the learning rate, 1500 steps: 10, chance.
# Not tried: fine-tuning, a deeper predictor, a smaller teacher, other patches, HOG with other settings.
LAYER = "2"  # of the teacher's four blocks
STAGE_TWO: list[object] = [
    *("--teacher-layers", LAYER, "--teacher-dtype", "float32", "--target-loss", "l1", "--lr", 0.064),
]
CLIPS = 16  # of a step, each of another video
CELLS = MaskConfig(encoder="random", encoder_ratio=0.75, decoder="running_cell", decoder_ratio=0.5)
EVERY = replace(CELLS, decoder="none")
MODEL = ModelConfig.preset("vit_tiny", patch_size=8, img_size=32, num_frames=8, embed_dim=64, num_heads=2)
# On top of those of tiny_world.py; the learning rate after scaling is the same.
STUDENT = [
    *("--embed-dim", 64, "--num-heads", 2),
    *("--batch-size", CLIPS, "--num-sample", 1, "--lr", 0.032, "--min-lr", 0.00015),
]
ARMS = {
    "random": Arm("nothing", None, CELLS),
    "pixels": Arm("pixels", "pixels", CELLS),
    "salt": Arm("latents of the teacher", "teacher", EVERY),
    "salt-cells": Arm("latents of the teacher", "teacher", CELLS),
    "continued": Arm("latents of the teacher", "teacher", EVERY, from_teacher=True),
    "hog": Arm("HOG", "hog", CELLS),
}
# Probes of pixels (1.6 TFLOP, another world): attentive, 300 steps at 0.016, 0.032, 0.064, 0.128: 43, 55, 57,
# 60; 400 at 0.128: 62. Linear, 300 steps at 0.16, 0.32, 0.64, 1.28: 29, 33, 38, 43.
EVALUATIONS: dict[str, list[object]] = {
    "attentive probe": ["--probe", "attentive", "--lr", 0.128],
    "linear probe": ["--probe", "linear", "--lr", 1.28],
    "fine-tuned": [],
}
# (better arm, worse arm, evaluation, points): at least so many more; a negative number: at most so many fewer
CLAIMS = tuple(
    (better, worse, kind, points)
    for better, worse, points in (
        ("salt", "pixels", 5.0),
        ("continued", "pixels", 5.0),
        ("salt-cells", "salt", -1.0),
    )
    for kind in ("attentive probe", "linear probe")
)

_FULL = Stage2Scale(
    world=WorldConfig(size=32, frames=20, unlabeled=1400, few=40, many=1, shared=0, validation=100, seed=19),
    pretrain_steps=3300,
    supervised_steps=300,
    middle_steps=0,
    stage_one=0.3,
    probe_steps=400,
)
SCALES = {
    "full": _FULL,
    "smoke": Stage2Scale(
        world=WorldConfig(size=32, frames=16, unlabeled=28, few=2, many=1, shared=0, validation=1),
        pretrain_steps=10,
        supervised_steps=2,
        middle_steps=0,
        seeds=2,
        stage_one=0.5,
        probe_steps=2,
    ),
}


# --- Counting ---


def build(arm: Arm, teacher: Path | None) -> Target:
    """The target of a trained arm as `vmae pretrain` makes it; `teacher` is a run's folder."""
    assert arm.target is not None
    settings = TargetConfig(name=arm.target)
    if arm.target == "teacher":
        settings = replace(settings, teacher=str(teacher), teacher_layers=LAYER)
    return build_target(Wanted(MODEL, settings, normalize=False))


def step_flops(macs: float, target_macs: float) -> float:
    """Of a clip in a step: forward and backward of the student, the target's values."""
    return 6.0 * macs + 2.0 * target_macs


def clip_flops(mask: MaskConfig, target: Target) -> float:
    """`step_flops` of a mask and a target."""
    return step_flops(masked_macs(MODEL, mask, width=target.width), target.macs())


def budget(scale: Stage2Scale) -> float:
    """FLOPs for each clip of a batch, over all steps of the arm "pixels"."""
    arm = ARMS["pixels"]
    return scale.pretrain_steps * clip_flops(arm.mask, build(arm, None))


def stage_one(scale: Stage2Scale) -> tuple[int, float]:
    """Steps of the teacher's pre-training, and its FLOPs for each clip of a batch."""
    each = clip_flops(ARMS["pixels"].mask, build(ARMS["pixels"], None))
    steps = int(scale.stage_one * budget(scale) / each)
    return steps, steps * each


def arm_steps(scale: Stage2Scale, name: str, target: Target) -> int:
    """Steps that the rest of the budget pays for."""
    before = stage_one(scale)[1] if ARMS[name].target == "teacher" else 0.0
    return int((budget(scale) - before) / clip_flops(ARMS[name].mask, target))


# --- Jobs ---


def mask_flags(mask: MaskConfig) -> list[object]:
    encoder = ["--encoder-mask", mask.encoder, "--encoder-ratio", mask.encoder_ratio]
    return [*encoder, "--decoder-mask", mask.decoder, "--decoder-ratio", mask.decoder_ratio]


def run_job(out: Path, scale: Stage2Scale, job: str) -> int:
    """A seed's teacher ("0-teacher"), or an arm of it from its pre-training to the tests ("0-salt-cells"):
    the scores go to `out / JOB / scores.json`."""
    seed, _, name = job.partition("-")
    stages, world = Stages(out / job), world_lists(out)
    if name == "teacher":
        own = replace(scale, pretrain_steps=stage_one(scale)[0])
        more = [*STUDENT, *mask_flags(ARMS["pixels"].mask)]
        pretrain(stages, "pre-training", world["unlabeled"], own, int(seed), *more)
        return 0
    arm, teacher = ARMS[name], out / f"{seed}-teacher" / "pre-training"
    counts = {"steps": 0, "target_macs": 0, "width": MODEL.tubelet_pixels}
    if arm.target is None:
        trained = stages.folder / "random.pth"
        write_random(trained, int(seed))
    else:
        target = build(arm, teacher)
        counts = {
            "steps": arm_steps(scale, name, target),
            "target_macs": target.macs(),
            "width": target.width,
        }
        more = [*STUDENT, *mask_flags(arm.mask), "--target", arm.target]
        if arm.target == "teacher":
            more += ["--teacher", teacher, *STAGE_TWO]
        if arm.from_teacher:
            more += ["--init", teacher]
        own = replace(scale, pretrain_steps=counts["steps"])
        trained = pretrain(stages, "pre-training", world["unlabeled"], own, int(seed), *more)
    top1 = {}
    for kind, flags in EVALUATIONS.items():
        length = scale.probe_steps if "--probe" in flags else scale.supervised_steps
        data = (world["train_a"], world["classes_a"])
        tuned = finetune(stages, kind, *data, length, int(seed), trained, *flags)
        top1[kind] = test(stages, f"{kind}, test", tuned, world["val_a"])
    text = json.dumps({**counts, "top1": top1, "seconds": stages.seconds})
    (stages.folder / "scores.json").write_text(text + "\n")
    return 0


def write_random(path: Path, seed: int) -> None:
    """A pre-trainer's weights as they are drawn."""
    torch.manual_seed(seed)
    export_weights(path, build_pretrainer(MODEL).state_dict(), config={"model": MODEL.to_dict()})


def world_lists(out: Path) -> dict[str, Path]:
    world, stacks = out / "world", ("unlabeled", "train_a", "val_a")
    lists = {name: world / f"{name}_stacks.txt" for name in stacks}
    return {**lists, "classes_a": world / "classes_a.txt"}


# --- Report ---


def make_record(scale: Stage2Scale, name: str, found: list[dict[str, Any]]) -> ArmRecord:
    """An arm, over its seeds."""
    arm, first = ARMS[name], found[0]
    macs = masked_macs(MODEL, arm.mask, width=first["width"])
    before = stage_one(scale)[1] if arm.target == "teacher" else 0.0
    flops = before + first["steps"] * step_flops(macs, first["target_macs"])
    return ArmRecord(
        arm=name,
        about=arm.about,
        steps=first["steps"],
        macs=macs / 1e6,
        target_macs=first["target_macs"] / 1e6,
        tflops=flops * CLIPS / 1e12,
        top1={kind: OverSeeds.of([seed["top1"][kind] for seed in found]) for kind in EVALUATIONS},
    )


def differences(records: list[ArmRecord]) -> list[DifferenceRecord]:
    """Every later arm against "pixels", and running cells against none, in every evaluation."""
    by_name, found = {r.arm: r for r in records}, []
    pairs = [(name, "pixels") for name in by_name if name != "pixels"] + [("salt-cells", "salt")]
    for (better, worse), kind in itertools.product(pairs, EVALUATIONS):
        values = [by_name[arm].top1[kind].values for arm in (better, worse)]
        points = OverSeeds.of([a - b for a, b in zip(*values)])
        found.append(DifferenceRecord(better=better, worse=worse, evaluation=kind, points=points))
    return found


def verdicts(records: list[ArmRecord], found: list[DifferenceRecord]) -> list[str]:
    """What was asked for, and what came out."""
    by_name, lines = {r.arm: r for r in records}, []
    for better, worse, kind, asked in CLAIMS:
        points = next(d.points for d in found if (d.better, d.worse, d.evaluation) == (better, worse, kind))
        met = "ok" if points.mean >= asked else "NOT MET"
        text = f"{better} over {worse}, {kind}: {points.mean:+.1f} points, standard error {points.error:.1f}"
        lines.append(f"{text} (asked for: {asked:+g} or more) {met}")
    cells, every = (by_name[arm] for arm in ("salt-cells", "salt"))
    student = 100 * (1 - cells.macs / every.macs)
    step = 100 * (1 - step_flops(cells.macs, cells.target_macs) / step_flops(every.macs, every.target_macs))
    text = f"running cells save {student:.0f} % of the student's MACs, {step:.0f} % of a step's FLOPs"
    return [*lines, f"{text}: {cells.steps} steps, not {every.steps} (asked for: some)"]


def draw(records: list[ArmRecord], path: Path, chance: float) -> None:
    """Bars of each evaluation for each arm, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    width, colours = 0.8 / len(EVALUATIONS), ("#7a9cc6", "#c6a57a", "#8fb58a")
    for number, (kind, colour) in enumerate(zip(EVALUATIONS, colours)):
        places = [place + (number - 1) * width for place in range(len(records))]
        scores = [r.top1[kind] for r in records]
        means, errors = [s.mean for s in scores], [s.std for s in scores]
        axes.bar(places, means, width, yerr=errors, capsize=3, color=colour, label=kind)
        for place, one in zip(places, scores):
            axes.scatter([place] * len(one.values), one.values, color="#222", s=8, zorder=3)
            axes.annotate(f"{one.mean:.1f}", (place, 1), ha="center", va="bottom", fontsize=8)
    axes.axhline(chance, color="#a33", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(records)), [r.arm for r in records])
    title = "Equal FLOPs of pre-training, the teacher's included"
    axes.set(ylabel="top-1 on moving shapes (%)", title=title, ylim=(0, 100))
    axes.legend(fontsize=8, ncols=4, loc="upper center")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def report(out: Path, scale: Stage2Scale, count: int, minutes: float) -> None:
    """Tables, verdicts, picture and JSON."""
    found = {
        name: [json.loads((out / f"{seed}-{name}" / "scores.json").read_text()) for seed in range(count)]
        for name in ARMS
    }
    records = [make_record(scale, name, scores) for name, scores in found.items()]
    points = differences(records)
    steps, flops = stage_one(scale)
    result = Stage2Result(
        environment=find_environment(),
        records=records,
        differences=points,
        teacher={"steps": steps, "share": scale.stage_one, "tflops": flops * CLIPS / 1e12},
        verdicts=verdicts(records, points),
        minutes=minutes,
        seeds=count,
        scale=asdict(scale),
        settings=settings(),
        seconds={f"{seed}-{name}": one["seconds"] for name in ARMS for seed, one in enumerate(found[name])},
    )
    show(*result.tables())
    classes = len(world_lists(out)["classes_a"].read_text().splitlines())
    draw(records, out / "stage2.png", 100 / classes)
    result.write(out / "stage2.json")
    print(f"\n{minutes:.1f} minutes; {out}/stage2.png, stage2.json")


def settings() -> dict[str, Any]:
    """Of all runs, as the result holds them."""
    return {
        "pretrain": PRETRAIN,
        "finetune": [*FINETUNE, "--lr", FINETUNE_LR],
        "evaluations": EVALUATIONS,
        "model": MODEL.to_dict(),
        "arms": {name: asdict(arm) for name, arm in ARMS.items()},
        "student": STUDENT,
        "stage_two": STAGE_TWO,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("stage2"), help="folder of everything (stage2)")
    parser.add_argument("--scale", default="full", choices=SCALES, help="how large everything is (full)")
    parser.add_argument("--seeds", type=int, help="runs of everything (3)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    scale = SCALES[args.scale]
    if args.job:
        return exit_code(lambda: run_job(args.out, scale, args.job))
    return exit_code(lambda: run_all(args, scale))


def run_all(args: argparse.Namespace, scale: Stage2Scale) -> int:
    check_least(args, "seeds")
    began, count = time.monotonic(), args.seeds or scale.seeds
    write_world(args.out / "world", scale.world, workers=os.cpu_count() or 1)
    write_stacks(args.out / "world", ("unlabeled", "train_a", "val_a"))
    stages = {"teacher": 1}
    # Short ones last, so that no core is without work for long at the end.
    stages |= dict.fromkeys(reversed(ARMS), 1 + 2 * len(EVALUATIONS))
    jobs = {f"{seed}-{name}": stages[name] for name in stages for seed in range(count)}
    taught = [name for name, arm in ARMS.items() if arm.target == "teacher"]
    after = {f"{seed}-{name}": f"{seed}-teacher" for name in taught for seed in range(count)}
    run_jobs(__file__, jobs, args.out, args.scale, after)
    report(args.out, scale, count, (time.monotonic() - began) / 60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
