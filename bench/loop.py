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
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness.clips import load_clips
from harness.command import add_json, check_least, exit_code, write_result
from harness.environment import find_environment
from harness.json_records import Runs, Spread
from harness.progress import at
from harness.results.loop import CLOCKS, LoopRatio, LoopRecord, LoopResult
from harness.stand_ins import NOTES
from harness.stepping import StepJob, Stepper
from harness.table import show

from vmae import DualMask, InputError, ModelConfig
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.saver import Saver
from vmae.config import PRESETS
from vmae.train.checks import resolve_device
from vmae.train.loop import LoopConfig, Trainer
from vmae.train.optim import OptimConfig, build_optimizer
from vmae.train.parallel import Parallel

NAMES = ("bare step", "loop")
Times = dict[str, list[float]]  # milliseconds, by clock


@dataclass
class SameBatch:
    """One batch for every step, on the device."""

    clips: torch.Tensor
    mask: DualMask
    ids: list = field(default_factory=list)
    replaced: list = field(default_factory=list)

    def __iter__(self) -> Iterator[SameBatch]:
        return self

    def __next__(self) -> SameBatch:
        return self

    def to(self, device, non_blocking: bool = False) -> SameBatch:
        return self


def make_trainer(bare: Stepper, dtype: str, folder: str) -> Trainer:
    """The loop, on a model of its own with the same weights."""
    model = copy.deepcopy(bare.model)
    return Trainer(
        model=model,
        optimizer=build_optimizer(model, OptimConfig()),
        schedule=lambda step: OptimConfig().lr,
        open_batches=lambda start_step: iter(SameBatch(bare.clips, bare.mask)),
        compute_loss=lambda batch: model(batch.clips, bare.mask),
        config=LoopConfig(total_steps=10**6, save_every=10**6, log_every=10, dtype=dtype),
        saver=Saver(CheckpointFolder(folder)),
        about={},
        parallel=Parallel(device=bare.device),
    )


def measure(bare: Stepper, trainer: Trainer, steps: int, warmup: int) -> list[Times]:
    """Times of bare and of the loop's steps; the order changes from pair to pair."""
    times: list[Times] = [{clock: [] for clock in CLOCKS} for _ in NAMES]

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
                for clock, first, last in zip(CLOCKS, began, wait()):
                    if turn >= warmup:
                        times[which][clock].append((last - first) * 1e3)
        trainer.settle()
    if trainer.stopped_by is not None:
        raise InputError("stopped by a signal: nothing was measured")
    return times


def make_result(args: argparse.Namespace, times: list[Times], device: str) -> LoopResult:
    records = []
    for name, found in zip(NAMES, times):
        record = LoopRecord(
            model=args.model,
            batch=args.batch,
            dtype=args.dtype,
            variant=name,
            step_ms=Runs.of(found["step"]),
            cpu_ms=Runs.of(found["cpu"]),
        )
        records.append(record)
    bare, loop = times
    ratio = LoopRatio(
        variant=NAMES[1],
        baseline=NAMES[0],
        step=Spread.of_ratios(loop["step"], bare["step"]),
        cpu=Spread.of_ratios(loop["cpu"], bare["cpu"]),
    )
    return LoopResult(environment=find_environment(device), records=records, ratios=[ratio])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=list(PRESETS), default="vit_s")
    add("--batch", type=int, default=4, help="clips a step (4)")
    add("--steps", type=int, default=12, help="timed pairs (12)")
    add("--warmup", type=int, default=2, help="pairs before them (2)")
    add("--device", default="auto", help="auto, cpu, cuda (auto)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_json(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    check_least(args, "batch", "steps")
    check_least(args, "warmup", least=0)
    device, config = str(resolve_device(args.device)), ModelConfig.preset(args.model)
    with tempfile.TemporaryDirectory() as folder:
        clips = str(Path(folder) / "clips.pt")
        torch.save(load_clips("synthetic", args.batch, config), clips)
        job = StepJob(
            model=args.model,
            config=config,
            variant="torch",
            masking="dual",
            device=device,
            dtype=args.dtype,
            batch=args.batch,
            threads=torch.get_num_threads(),
            clips=clips,
        )
        bare = Stepper(job)
        times = measure(bare, make_trainer(bare, args.dtype, folder), args.steps, args.warmup)
    result = make_result(args, times, device)
    show(*result.tables())
    for note in NOTES:
        print(note)
    write_result(result, args.json)
    return 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
