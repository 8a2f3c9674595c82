"""What the training loop adds to a bare training step: the time of both, step by step in turn, on the same
clips and masks.

The bare step is that of bench/dual_vs_encoder.py: zero_grad, forward, backward, optimizer. The loop does all
that a run does: gradient norm, finite check, late reading of the loss, logs (JSONL and TensorBoard); its data
is at hand already.

    python bench/loop.py                  # ViT-S on a CPU: some two minutes
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness.common import paired_ratio, print_table, spread, write_json
from harness.records import load_clips
from harness.stepping import Stepper
from harness.telling import at, telling

from vmae import DualMask, InputError, ModelConfig
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.saver import Saver
from vmae.config import PRESETS
from vmae.train.checks import resolve_device
from vmae.train.loop import LoopConfig, Trainer
from vmae.train.optim import OptimConfig, build_adamw
from vmae.train.parallel import Parallel

NAMES = ("bare step", "loop")


@dataclass
class SameBatch:
    """One batch for every step, on the device."""

    clips: torch.Tensor
    mask: DualMask
    ids: list = field(default_factory=list)
    replaced: list = field(default_factory=list)

    def __next__(self) -> SameBatch:
        return self

    def to(self, device, non_blocking: bool = False) -> SameBatch:
        return self


def make_trainer(bare: Stepper, dtype: str, folder: str) -> Trainer:
    """The loop, on a model of its own with the same weights."""
    model = copy.deepcopy(bare.model)
    return Trainer(
        model=model,
        optimizer=build_adamw(model, OptimConfig()),
        schedule=lambda step: OptimConfig().lr,
        open_batches=lambda start_step: SameBatch(bare.clips, bare.mask),
        compute_loss=lambda batch: model(batch.clips, batch.mask),
        config=LoopConfig(total_steps=10**6, save_every=10**6, log_every=10, dtype=dtype),
        saver=Saver(CheckpointFolder(folder)),
        about={},
        parallel=Parallel(device=bare.device),
    )


def measure(bare: Stepper, trainer: Trainer, steps: int, warmup: int) -> list[dict[str, list[float]]]:
    """Milliseconds of bare and of the loop's steps, by the clock and of this process; the order changes from
    pair to pair."""
    times: list[dict[str, list[float]]] = [{"step": [], "cpu": []} for _ in NAMES]

    def wait() -> tuple[float, float]:
        if bare.device.type == "cuda":
            torch.cuda.synchronize(bare.device)
        return time.perf_counter(), time.process_time()

    with trainer.opened() as batches:
        works = (bare.step, lambda: trainer.train_step(batches))
        for turn in range(warmup + steps):
            at(f"pair {turn + 1} of {warmup + steps}")
            for which in (0, 1) if turn % 2 else (1, 0):
                began = wait()
                works[which]()
                for kind, first, last in zip(("step", "cpu"), began, wait()):
                    if turn >= warmup:
                        times[which][kind].append((last - first) * 1e3)
        trainer.settle()
    if trainer.stopped_by is not None:
        raise InputError("stopped by a signal: nothing was measured")
    return times


def report(args: argparse.Namespace, times: list[dict[str, list[float]]], device: torch.device) -> None:
    """Table, ratios, and the JSON file if asked for."""
    rows = [
        [f"{name}, {text}", *(f"{spread(found[kind])[key]:.1f}" for key in ("median", "min", "max"))]
        for kind, text in (("step", "by the clock"), ("cpu", "processor time"))
        for name, found in zip(NAMES, times)
    ]
    print_table(["ms a step", "median", "min", "max"], rows)
    ratios = {kind: paired_ratio(times[1][kind], times[0][kind]) for kind in ("step", "cpu")}
    for kind, text in (("step", "by the clock"), ("cpu", "processor time")):
        found = ratios[kind]
        print(
            f"loop / bare step, {text}: {found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f}), "
            f"{args.steps} pairs"
        )
    if args.json:
        about = dict(model=args.model, batch=args.batch, dtype=args.dtype)
        records = [
            {
                **about,
                "variant": name,
                **{f"{kind}_ms": {**spread(runs), "runs": runs} for kind, runs in found.items()},
            }
            for name, found in zip(NAMES, times)
        ]
        write_json(args.json, records, device, ratios=[{"variant": NAMES[1], "baseline": NAMES[0], **ratios}])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(PRESETS), default="vit_s")
    parser.add_argument("--batch", type=int, default=4, help="clips a step (4)")
    parser.add_argument("--steps", type=int, default=12, help="timed pairs (12)")
    parser.add_argument("--warmup", type=int, default=2, help="pairs before them (2)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    try:
        device = resolve_device(args.device)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = ModelConfig.preset(args.model)
    with telling(), tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clips.pt"
        torch.save(load_clips("synthetic", args.batch, config), clips)
        job = dict(
            config=config,
            masking="dual",
            variant="torch",
            device=str(device),
            dtype=args.dtype,
            clips=str(clips),
        )
        bare = Stepper({**job, "threads": torch.get_num_threads()})
        times = measure(bare, make_trainer(bare, args.dtype, folder), args.steps, args.warmup)
    report(args, times, device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
