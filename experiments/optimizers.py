"""AdamW against Muon in miniature: pre-training on moving shapes, the same steps, several learning rates.

Both get the same samples and masks. Muon has its default rule (`match_rms_adamw`) and one rate for both its
parts. Compared are losses of pre-training alone, and of a small model: what that says of larger ones, or of
accuracy, is not known.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import bench_path  # noqa: F401
from harness.command import check_least, exit_code
from harness.environment import find_environment
from harness.json_records import from_json, to_json, write_json
from harness.results.optimizers import OptimizerRecord, OptimizerResult, OptimizerRun
from harness.table import show
from tiny_world import (
    PRETRAIN,
    SCALES,
    Scale,
    Stages,
    final_loss,
    make_world,
    pretrain,
    run_jobs,
    world_paths,
)

from vmae.train.metrics import read_log

OPTIMIZERS, RATES = ("adamw", "muon"), (0.016, 0.064, 0.256)  # for 256 videos; 8 are taken a step
STEPS = {"half": 600, "short": 120, "smoke": 4}


def shortened(name: str) -> Scale:
    return replace(SCALES.get(name, SCALES["half"]), pretrain_steps=STEPS[name])


def run_one(out: Path, scale: Scale, job: str) -> int:
    """Losses and seconds of one optimizer, rate and seed ("muon_0.064_1"), to `out / JOB / scores.json`."""
    opt, rate, seed = job.split("_")
    stages, steps = Stages(out / job), scale.pretrain_steps
    flags = ("--opt", opt, "--lr", rate)
    trained = pretrain(stages, "pre-training", world_paths(out)["unlabeled"], scale, int(seed), *flags)
    records = read_log(trained / "log.jsonl", loss_mean=float)
    scores = OptimizerRun(
        seed=int(seed),
        loss=final_loss(trained, steps),
        halfway=final_loss_of(records, steps // 2),
        seconds=stages.seconds["pre-training"],
    )
    write_json(stages.folder / "scores.json", to_json(scores))
    return 0


def final_loss_of(records: list[dict], steps: int) -> float | None:
    """Mean loss of the tenth of the run that ends at this step."""
    losses = [one["loss_mean"] for one in records if 0.9 * steps < one["step"] <= steps]
    return statistics.mean(losses) if losses else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("optimizers"), help="folder of videos and runs")
    parser.add_argument("--scale", default="half", choices=STEPS, help=f"steps: {STEPS}")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each optimizer and rate (2)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="for 256 videos (three)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    scale = shortened(args.scale)
    if args.job:
        return exit_code(lambda: run_one(args.out, scale, args.job))
    return exit_code(lambda: run_all(args, scale))


def run_all(args: argparse.Namespace, scale: Scale) -> int:
    check_least(args, "seeds")
    make_world(args.out, scale)
    kinds = [(opt, rate) for opt in OPTIMIZERS for rate in args.rates]
    names = {kind: [f"{kind[0]}_{kind[1]}_{seed}" for seed in range(args.seeds)] for kind in kinds}
    run_jobs(__file__, {name: 1 for own in names.values() for name in own}, args.out, args.scale)
    records = []
    for (opt, rate), own in names.items():
        runs = [
            from_json(OptimizerRun, json.loads((args.out / job / "scores.json").read_text())) for job in own
        ]
        records.append(OptimizerRecord(opt=opt, lr=rate, runs=runs))
    result = OptimizerResult(
        environment=find_environment(), records=records, steps=scale.pretrain_steps, pretrain=PRETRAIN
    )
    path = args.out / "optimizers.json"
    result.write(path)
    show(*result.tables())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
