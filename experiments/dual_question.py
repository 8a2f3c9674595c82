"""Does dual masking cost accuracy? Dual against encoder-only masking on moving shapes, with enough seeds.

Two encoder masks. Half of the frames hidden, as in progressive.py: running cells decode as many tokens as
encoder-only masking then, so equal steps take equal time, and half of what they decode is not counted.
Three quarters hidden: running cells decode two thirds as many; there the third arm trains for as long as
encoder-only masking, by the CPU time of a step, measured once, in turn.

Each arm and seed: pre-training, then fine-tuning on a few labelled clips, three times with other seeds, each
tested on 4,000 videos (400 of them, as progressive.py has, leave 3 points of noise on a difference); the mean
of the three is the seed's top-1. What counts is the difference of the arms of a seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import bench_path  # noqa: F401
import torch
from harness.command import check_least, exit_code
from harness.environment import find_environment
from harness.json_records import from_json, to_json, write_json
from harness.results.dual_question import ArmRun, Difference, DualQuestionResult
from harness.table import show
from tiny_world import (
    FULL,
    SCALES,
    Scale,
    Stages,
    about,
    finetune,
    make_world,
    pretrain,
    run_jobs,
    test,
    world_paths,
)

from vmae import DualMask, build_pretrainer
from vmae.config import MaskConfig, ModelConfig
from vmae.model.cost import masked_macs

MODEL = ModelConfig.preset("vit_tiny", patch_size=8, img_size=32, num_frames=8)
HIDDEN = (50, 75)  # percent of the frames, hidden from the encoder
FINETUNINGS = 3  # of each pre-training
ARMS = ("dual", "encoder-only", "dual-longer")  # the last one only where it differs from the first
MANY = {
    "full": replace(FULL, seeds=8, world=replace(FULL.world, validation=400)),
    "smoke": SCALES["smoke"],
}


def mask_of(hidden: int, arm: str) -> MaskConfig:
    decoder = "none" if arm == "encoder-only" else "running_cell"
    return MaskConfig(encoder="frame", encoder_ratio=hidden / 100, decoder=decoder)


def jobs_of(shares: Sequence[int], seeds: int, arms: Sequence[str] = ARMS) -> dict[str, int]:
    """Stages of each job, by name: percent hidden, arm, seed."""
    own = {hidden: [arm for arm in arms if hidden == 75 or arm in ARMS[:2]] for hidden in shares}
    names = [f"{hidden}_{arm}_{seed}" for hidden in shares for seed in range(seeds) for arm in own[hidden]]
    return dict.fromkeys(names, 1 + 2 * FINETUNINGS)


def measure_times(path: Path, rounds: int) -> dict[str, float]:
    """CPU seconds of a pre-training step on one thread, by arm, with three quarters hidden: medians, the arms
    in turn; kept in a file, so that all seeds train as long."""
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    clips = torch.randint(0, 256, (32, 8, 32, 32, 3), dtype=torch.uint8)
    models: dict[str, tuple] = {}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS[:2]}
    for arm in ARMS[:2]:
        drawn = DualMask.sample(32, MODEL.grid, **mask_of(75, arm).to_dict())
        model = build_pretrainer(MODEL, normalize_target=False)
        models[arm] = (model, drawn, torch.optim.AdamW(model.parameters(), fused=True))
    for _ in range(rounds):
        for arm, (model, drawn, optimizer) in models.items():
            began = time.process_time()
            optimizer.zero_grad()
            model(clips, drawn).backward()
            optimizer.step()
            times[arm].append(time.process_time() - began)
    found = {arm: statistics.median(values[rounds // 10 :]) for arm, values in times.items()}
    write_json(path, found)
    return found


def steps_of(out: Path, scale: Scale, arm: str) -> int:
    """Pre-training steps of an arm."""
    if arm != "dual-longer":
        return scale.pretrain_steps
    times = json.loads((out / "times.json").read_text())
    return round(scale.pretrain_steps * times["encoder-only"] / times["dual"])


def run_arm(out: Path, scale: Scale, job: str) -> int:
    """Top-1 of one arm and seed, to `out / JOB / scores.json`."""
    hidden, arm, seed = job.split("_")
    stages, paths, mask = Stages(out / job), world_paths(out), mask_of(int(hidden), arm)
    flags = [
        "--encoder-mask",
        mask.encoder,
        "--encoder-ratio",
        mask.encoder_ratio,
        "--decoder-mask",
        mask.decoder,
    ]
    longer = replace(scale, pretrain_steps=steps_of(out, scale, arm))
    trained = pretrain(stages, "pre-training", paths["unlabeled"], longer, int(seed), *flags)
    data = (paths["train_a"], paths["classes_a"])
    scores = []
    for number in range(FINETUNINGS):
        after = f"-{number + 1}" if number else ""
        own_seed = int(seed) + 1000 * number
        tuned = finetune(stages, f"fine-tuning{after}", *data, scale.supervised_steps, own_seed, trained)
        scores.append(test(stages, f"test{after}", tuned, paths["val_a"]))
    run = ArmRun(
        hidden=int(hidden), arm=arm, seed=int(seed), steps=longer.pretrain_steps,
        top1=statistics.mean(scores), scores=scores, macs=masked_macs(MODEL, mask) / 1e6,
    )  # fmt: skip
    write_json(stages.folder / "scores.json", to_json(run))
    return 0


def differences(runs: list[ArmRun]) -> list[Difference]:
    """Each dual arm minus encoder-only masking, paired by seed."""
    top1 = {(run.hidden, run.arm, run.seed): run.top1 for run in runs}
    found = []
    for hidden in HIDDEN:
        for arm in (ARMS[0], ARMS[2]):
            seeds = sorted(seed for h, a, seed in top1 if (h, a) == (hidden, arm))
            seeds = [seed for seed in seeds if (hidden, ARMS[1], seed) in top1]
            values = [top1[hidden, arm, seed] - top1[hidden, ARMS[1], seed] for seed in seeds]
            if len(values) > 1:
                found.append(Difference.of(values, hidden=hidden, arm=arm))
    return found


def verdict(one: Difference) -> str:
    """What a difference says, and whether its standard error is what was asked for."""
    met = "ok" if one.error < 0.7 else "NOT MET"
    says = "no difference is seen"
    if abs(one.mean) > 2 * one.error:
        side = "ahead" if one.mean > 0 else "behind"
        says = f"dual masking is {side} by more than two standard errors"
    return (
        f"{one.hidden} % of the frames hidden, {one.arm} against encoder-only: {one.mean:+.1f} points, "
        f"standard error {one.error:.2f} (asked for: under 0.7) {met}; {says}"
    )


def run_all(args: argparse.Namespace, scale: Scale) -> int:
    check_least(args, "seeds")
    began, count = time.monotonic(), args.seeds or scale.seeds
    make_world(args.out, scale)
    times = measure_times(args.out / "times.json", 2 if args.scale == "smoke" else 100)
    run_jobs(__file__, jobs_of(args.hidden, count, args.arms), args.out, args.scale)
    files = sorted(args.out.glob("*/scores.json"))  # those of earlier starts too
    runs = [from_json(ArmRun, json.loads(file.read_text())) for file in files]
    found = differences(runs)
    result = DualQuestionResult(
        environment=find_environment(),
        records=found,
        runs=runs,
        step_s=times,
        verdicts=[verdict(one) for one in found],
        minutes=(time.monotonic() - began) / 60,
        **about(scale),
    )
    show(*result.tables())
    print("\n" + "\n".join(result.verdicts))
    result.write(args.out / "dual_question.json")
    print(f"\n{args.out}/dual_question.json")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("dual_question"), help="folder of everything (dual_question)"
    )
    parser.add_argument("--scale", default="full", choices=MANY, help="smoke: of seconds")
    parser.add_argument("--seeds", type=int, help=f"runs of everything ({MANY['full'].seeds})")
    parser.add_argument(
        "--hidden", nargs="+", type=int, choices=HIDDEN, default=HIDDEN, help="percent of the frames (both)"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="what runs (all)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    scale = MANY[args.scale]
    if args.job:
        return exit_code(lambda: run_arm(args.out, scale, args.job))
    return exit_code(lambda: run_all(args, scale))


if __name__ == "__main__":
    sys.exit(main())
