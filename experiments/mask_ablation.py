"""The paper's ablation of decoder masks (VideoMAE V2, table 1) in miniature, on moving shapes.

None, frame, random and running-cell masking at 25, 50 and 75 %: the same pre-training steps, then the same
fine-tuning on a few labelled clips. Losses are of different tokens for each mask, so only accuracy compares
across rows. The encoder sees a random quarter of the tokens here, a tube's tenth in the paper: "none"
rebuilds the other three quarters, so leaving out a quarter of all saves nothing. (Not half of the frames, as
in progressive.py: a decoder's frames may be just those.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import bench_path  # noqa: F401
from harness.command import check_least, exit_code
from harness.environment import find_environment
from harness.json_records import from_json, to_json, write_json
from harness.results.mask_ablation import MaskRecord, MaskResult, MaskRun
from harness.table import show
from tiny_world import (
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

from vmae.config import MaskConfig, ModelConfig
from vmae.masking import RUNNING_CELL_RATIOS
from vmae.model.cost import masked_macs

KINDS = ("frame", "random", "running_cell")  # of the paper's table 1, beside "none"
MASKS = [("none", 0.0), *((mask, ratio) for mask in KINDS for ratio in RUNNING_CELL_RATIOS)]
ENCODER, ENCODER_RATIO = "random", 0.75
MODEL = ModelConfig.preset("vit_tiny", patch_size=8, img_size=32, num_frames=8)


def run_mask(out: Path, scale: Scale, job: str) -> int:
    """Loss, top-1 and seconds of one mask and seed ("frame-25-0"), to `out / JOB / scores.json`."""
    mask, percent, seed = job.split("-")
    stages, paths = Stages(out / job), world_paths(out)
    flags = ["--encoder-mask", ENCODER, "--encoder-ratio", ENCODER_RATIO]
    flags += ["--decoder-mask", mask, "--decoder-ratio", int(percent) / 100 or 0.5]
    trained = pretrain(stages, "pre-training", paths["unlabeled"], scale, int(seed), *flags)
    steps = scale.supervised_steps
    tuned = finetune(stages, "fine-tuning", paths["train_a"], paths["classes_a"], steps, int(seed), trained)
    accuracy = test(stages, "test", tuned, paths["val_a"])
    scores = MaskRun(
        seed=int(seed),
        loss=final_loss(trained, scale.pretrain_steps),
        top1=accuracy,
        seconds=stages.seconds["pre-training"],
    )
    write_json(stages.folder / "scores.json", to_json(scores))
    return 0


def macs_of(mask: str, ratio: float) -> float:
    """Millions of multiply-accumulates of a clip's forward pass, counted as the paper does."""
    config = MaskConfig(
        encoder=ENCODER, encoder_ratio=ENCODER_RATIO, decoder=mask, decoder_ratio=ratio or 0.5
    )
    return masked_macs(MODEL, config, fused=False) / 1e6


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mask_ablation"), help="folder of videos, runs and results"
    )
    parser.add_argument("--scale", default="half", choices=SCALES, help=f"{SCALE_HELP}; default: half")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each mask (1)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    scale = SCALES[args.scale]
    if args.job:
        return exit_code(lambda: run_mask(args.out, scale, args.job))
    return exit_code(lambda: run_all(args, scale))


def run_all(args: argparse.Namespace, scale: Scale) -> int:
    check_least(args, "seeds")
    make_world(args.out, scale)
    names = {key: [f"{key[0]}-{key[1] * 100:.0f}-{seed}" for seed in range(args.seeds)] for key in MASKS}
    run_jobs(__file__, {name: 3 for own in names.values() for name in own}, args.out, args.scale)
    records = [make_record(args.out, mask, ratio, own) for (mask, ratio), own in names.items()]
    result = MaskResult(
        environment=find_environment(),
        records=records,
        encoder={"mask": ENCODER, "ratio": ENCODER_RATIO},
        **about(scale),
    )
    path = args.out / "mask_ablation.json"
    result.write(path)
    show(*result.tables())
    print(path)
    return 0


def make_record(out: Path, mask: str, ratio: float, jobs: list[str]) -> MaskRecord:
    """Means over the mask's jobs."""
    runs = [from_json(MaskRun, json.loads((out / job / "scores.json").read_text())) for job in jobs]
    losses = [run.loss for run in runs if run.loss is not None]
    return MaskRecord(
        mask=mask,
        ratio=ratio,
        loss=statistics.mean(losses) if losses else None,
        top1=statistics.mean(run.top1 for run in runs),
        seconds=statistics.mean(run.seconds for run in runs),
        macs=macs_of(mask, ratio),
        runs=runs,
    )


if __name__ == "__main__":
    sys.exit(main())
