"""The paper's ablation of decoder masks (VideoMAE V2, table 1) in miniature, on moving shapes: one command,
one table.

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
from harness.common import print_table, write_json
from harness.tabulate import mask_tables, read_result
from harness.telling import telling
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
from vmae.model.cost import masked_macs

MASKS = [
    ("none", 0.0),
    *((mask, ratio) for mask in ("frame", "random", "running_cell") for ratio in (0.25, 0.5, 0.75)),
]
ENCODER, ENCODER_RATIO = "random", 0.75
MODEL = ModelConfig.preset("vit_tiny", patch_size=8, img_size=32, num_frames=8)


def run_mask(out: Path, scale: Scale, job: str) -> None:
    """Loss, top-1 and seconds of one mask and seed ("frame-25-0"), to `out / JOB / scores.json`."""
    mask, percent, seed = job.split("-")
    stages, paths = Stages(out / job), world_paths(out)
    flags = ["--encoder-mask", ENCODER, "--encoder-ratio", ENCODER_RATIO]
    flags += ["--decoder-mask", mask, "--decoder-ratio", int(percent) / 100 or 0.5]
    trained = pretrain(stages, "pre-training", paths["unlabeled"], scale, int(seed), *flags)
    steps = scale.supervised_steps
    tuned = finetune(stages, "fine-tuning", paths["train_a"], paths["classes_a"], steps, int(seed), trained)
    accuracy = test(stages, "test", tuned, paths["val_a"])
    loss = final_loss(trained, scale.pretrain_steps)
    text = json.dumps(
        {"seed": int(seed), "loss": loss, "top1": accuracy, "seconds": stages.seconds["pre-training"]}
    )
    (stages.folder / "scores.json").write_text(text + "\n")


def macs_of(mask: str, ratio: float) -> float:
    """Millions of multiply-accumulates of a clip's forward pass, counted as the paper does."""
    config = MaskConfig(
        encoder=ENCODER, encoder_ratio=ENCODER_RATIO, decoder=mask, decoder_ratio=ratio or 0.5
    )
    return masked_macs(MODEL, config, fused=False) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mask_ablation"), help="folder of videos, runs and results"
    )
    parser.add_argument("--scale", default="half", choices=SCALES, help=f"{SCALE_HELP}; default: half")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each mask (1)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    scale = SCALES[args.scale]
    if args.job:
        run_mask(args.out, scale, args.job)
        return 0
    with telling():
        return run_all(args, scale)


def run_all(args: argparse.Namespace, scale: Scale) -> int:
    make_world(args.out, scale)
    names = {key: [f"{key[0]}-{key[1] * 100:.0f}-{seed}" for seed in range(args.seeds)] for key in MASKS}
    run_jobs(__file__, {name: 3 for own in names.values() for name in own}, args.out, args.scale)
    rows = []
    for (mask, ratio), own in names.items():
        runs = [json.loads((args.out / name / "scores.json").read_text()) for name in own]
        means = {key: statistics.mean(run[key] for run in runs) for key in ("loss", "top1", "seconds")}
        rows.append({"mask": mask, "ratio": ratio, **means, "macs": macs_of(mask, ratio), "runs": runs})
    path = args.out / "mask_ablation.json"
    write_json(path, rows, "cpu", encoder={"mask": ENCODER, "ratio": ENCODER_RATIO}, **about(scale))
    table = mask_tables(read_result(path))[0]
    print()
    print_table(table.head, table.rows)
    print(f"\n{table.note}\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
