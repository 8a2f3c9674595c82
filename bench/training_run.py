"""A run of the real training loop for some seconds: workers, copies, steps, log; what a whole run would see.

    python bench/training_run.py --seconds 90                      # synthetic clips, made by the workers
    python bench/training_run.py --input packed                    # the sample videos, packed by `vmae pack`
    torchrun --nproc-per-node 2 bench/training_run.py --folder DIR # several ranks

The time is counted from the first step on. Steps that compile and fill queues are left out; then some steps
are profiled, for the gaps in which the device has nothing to do; the rest is what the log says. Memory stands
beside what `vmae plan` expects.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.command import (
    add_device,
    add_json,
    check_least,
    exit_code,
    find_device,
    set_defaults,
    write_result,
)
from harness.environment import find_environment, rehearsing
from harness.json_records import Spread
from harness.profiling import summarise
from harness.progress import at
from harness.results.training_run import TrainingRecord, TrainingResult
from harness.stand_ins import NOTES
from harness.table import show

from vmae import InputError, MaskConfig, ModelConfig
from vmae.config import PRESETS
from vmae.data import PretrainDataset, VideoEntry
from vmae.data.video_dataset import Purpose, numpy_rng
from vmae.planning.budget import Cluster, Workload, make_plan
from vmae.train.metrics import LOG_NAME, read_log
from vmae.train.optim import OptimConfig
from vmae.train.run import train as run_training
from vmae.train.tasks.pretrain import PretrainConfig, PretrainTask

GPU = dict(model="vit_b", batch=32, warmup=20, profiled=5)
CPU = dict(model="vit_tiny", batch=2, workers=1, warmup=2, profiled=1)
MOST_WORKERS = 12
INPUTS = ("synthetic", "packed")
NOISE_CLIPS = 4096
LOG_EVERY = 5


class NoiseDataset(PretrainDataset):
    """Clips of noise in place of a video's: everything but decoding is as in a run."""

    def _decode_crops(self, entry: VideoEntry, epoch: int, index: int, attempt: int) -> torch.Tensor:
        """uint8 [S, T, H, W, 3]"""
        rng = numpy_rng(self.seed, epoch, index, attempt, Purpose.FRAMES)
        shape = (self.num_sample, self.num_frames, *self.image_size, 3)
        return torch.from_numpy(np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape).copy())


class TimedTask(PretrainTask):
    """Pre-training that stops itself after `seconds`, and profiles some steps on its way."""

    def __init__(self, config: PretrainConfig, args: argparse.Namespace) -> None:
        super().__init__(config)
        self.args, self.first = args, 0.0
        self.profiler: Any = None
        self.gap_share: float | None = None
        self.counted_from = args.warmup + args.profiled

    def read_data(self) -> tuple[PretrainDataset, list[str]]:
        if self.args.input != "synthetic":
            return super().read_data()
        config = self.config
        entries = [VideoEntry(path=f"noise {number}") for number in range(NOISE_CLIPS)]
        dataset = NoiseDataset(
            entries,
            num_frames=config.model.num_frames,
            stride=config.stride,
            image_size=config.model.img_size,
            grid=config.model.grid,
            mask=config.mask,
            seed=config.seed,
        )
        return dataset, []

    def describe_data(self) -> list[str]:
        """Noise has no length to look for."""
        if self.args.input == "synthetic":
            return ["noise, made by the workers"]
        return super().describe_data()

    def after_step(self, step: int) -> None:
        super().after_step(step)
        now = time.monotonic()
        self.first = self.first or now
        on_gpu = self.parallel.device.type == "cuda"
        if step == self.args.warmup and on_gpu:
            self._start_profile()
        elif step == self.counted_from and self.profiler is not None:
            self._end_profile()
        at(f"step {step}, {now - self.first:.0f} of {self.args.seconds:.0f} s")
        enough = self.counted_from + 2 * LOG_EVERY  # one line of the log at least
        if now - self.first >= self.args.seconds and step >= enough:
            os.kill(os.getpid(), signal.SIGTERM)  # the loop ends as it does when a job's time is over

    def _start_profile(self) -> None:
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()
        self.began = time.perf_counter()

    def _end_profile(self) -> None:
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - self.began) * 1e3
        self.profiler.stop()
        _, busy_ms = summarise(self.profiler.events(), on_gpu=True)
        self.gap_share = max(0.0, 1 - busy_ms / wall_ms)
        self.profiler = None


# --- one run ------------------------------------------------------------------------------------------------


def usual_workers(model: str, batch: int, cores: int, shared_bytes: int | None) -> int:
    """Workers of a rank on a GPU: one a core, two cores left, and no more than shared memory has room for
    (three batches each: one that is made, two that wait)."""
    config = ModelConfig.preset(model)
    of_batch = batch * config.num_frames * config.image_hw[0] * config.image_hw[1] * 3
    fitting = MOST_WORKERS if shared_bytes is None else int(0.8 * shared_bytes) // (3 * of_batch)
    return max(0, min(MOST_WORKERS, cores - 2, fitting))


def shared_memory() -> int | None:
    """Free bytes of /dev/shm, through which workers hand over batches; None where there is none."""
    try:
        found = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return None
    return found.f_bavail * found.f_frsize


def packed_list(folder: Path) -> Path:
    """A list of the sample videos, packed.

    Raises:
        InputError: no sample videos, or no decoder.
    """
    from vmae.data.decode import find_backends
    from vmae.data.pack import PackConfig, pack_video
    from vmae.synthetic.samples import sample_videos

    find_backends("video", "auto")
    lines = []
    for source in sample_videos()[2:] if rehearsing() else sample_videos():
        at(f"packing {source.name}")
        target = folder / f"{source.stem}.mp4"
        pack_video(source, target, PackConfig())
        lines.append(f"{target} 0 -1\n")
    path = folder / "packed.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def planned_bytes(args: argparse.Namespace, ranks: int) -> float:
    """Memory of a rank, as `vmae plan` counts it."""
    clips = args.batch * ranks
    workload = Workload(
        batch_size=args.batch, num_sample=1, effective_batch=clips, videos=clips, steps=1, dtype=args.dtype
    )
    cluster = Cluster(gpus=ranks, gpus_per_node=ranks)
    parallel = "none" if ranks == 1 else "ddp"
    model = ModelConfig.preset(args.model)
    plan = make_plan(model, MaskConfig(), cluster, workload, checkpointing="none", parallel=parallel)
    return plan.rows[0].memory.total


def train(args: argparse.Namespace, folder: Path) -> TimedTask:
    """The run; its log is in `folder / "run"`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = str(packed_list(folder)) if args.input == "packed" else str(folder / "noise.txt")
    if args.input == "synthetic":
        Path(data).write_text("noise\n", encoding="utf-8")
    config = PretrainConfig(
        model=ModelConfig.preset(args.model),
        mask=MaskConfig(),
        optim=OptimConfig(warmup_epochs=0),
        data=data,
        steps=10**6,
        repeat=1000 if args.input == "packed" else 1,
        dtype=args.dtype,
    )
    task = TimedTask(config, args)
    run_training(
        task,
        output=folder / "run",
        batch_size=args.batch,
        num_workers=args.workers,
        device=args.device,
        compile=args.compile,
        save_every=10**6,
        log_every=LOG_EVERY,
        tensorboard=False,
    )
    return task


def record_of(args: argparse.Namespace, ranks: int) -> TrainingRecord:
    """What is known before the run."""
    return TrainingRecord(
        input=args.input,
        model=args.model,
        batch=args.batch,
        ranks=ranks,
        dtype=args.dtype,
        device=args.device,
        workers=args.workers,
        compiled=args.compile,
        planned_memory_bytes=planned_bytes(args, ranks),
    )


def with_log(
    record: TrainingRecord, lines: list[dict[str, Any]], counted_from: int, seconds: float
) -> TrainingRecord:
    """The record with what the log says of the steps after `counted_from`; a line speaks for `LOG_EVERY`
    steps."""
    counted = [line for line in lines if line["step"] - LOG_EVERY >= counted_from]
    if not counted:
        return replace(record, reason=f"only {lines[-1]['step'] if lines else 0} steps in {seconds:.0f} s")

    def mean(key: str) -> float | None:
        values = [line[key] for line in counted if line.get(key) is not None]
        return sum(values) / len(values) if values else None

    compiled: dict[str, int] = next((line["compiled"] for line in reversed(lines) if "compiled" in line), {})
    return replace(
        record,
        seconds=seconds,
        warmup_steps=counted_from,
        steps=LOG_EVERY * len(counted),
        step_ms=Spread.of([1e3 * line["step_s"] for line in counted]),
        clips_per_s=mean("clips_per_s"),
        data_share=mean("data_share"),
        mfu=mean("mfu"),
        graphs=compiled.get("graphs"),
        recompilations=compiled.get("recompilations"),
        graph_breaks=compiled.get("breaks"),
        peak_memory_bytes=counted[-1]["memory"],
        last_loss=counted[-1]["loss"],
    )


# --- command line -------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--input", choices=INPUTS, default="synthetic", help="of the clips (synthetic)")
    add("--seconds", type=float, default=90.0, help="from the first step on (90)")
    add("--model", choices=list(PRESETS), help="default: vit_tiny on a CPU, vit_b on a GPU")
    add("--batch", type=int, help="clips of a rank (default: 2 on a CPU, 32 on a GPU)")
    add(
        "--workers",
        type=int,
        help="processes that make clips, a rank (default: 1 on a CPU; on a GPU up to 12)",
    )
    add("--warmup", type=int, help="steps before the profiled ones (default: 2 on a CPU, 20 on a GPU)")
    add("--profiled", type=int, help="profiled steps (default: 1 on a CPU, 5 on a GPU)")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile blocks (default: on a GPU)")
    add("--folder", type=Path, help="of the run, for all of several ranks (default: a temporary one)")
    add_device(parser)
    add_json(parser)
    args = parser.parse_args(argv)
    args.device = find_device(args.device)
    on_gpu = args.device.startswith("cuda")
    set_defaults(args, GPU if on_gpu else CPU)
    if args.workers is None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores, shared = (os.cpu_count() or 1) // ranks, shared_memory()
        args.workers = usual_workers(
            args.model, args.batch, cores, None if shared is None else shared // ranks
        )
    args.compile = on_gpu if args.compile is None else args.compile
    args.dtype = "bfloat16" if on_gpu else "float32"
    check_least(args, "batch", "warmup", "profiled")
    check_least(args, "workers", least=0)
    if not args.seconds > 0:
        raise InputError("--seconds must be above 0")
    return args


def run(args: argparse.Namespace) -> int:
    ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if ranks > 1 and args.folder is None:
        raise InputError("several ranks need one --folder for all")
    at("planning")
    known, record = find_environment(args.device), record_of(args, ranks)
    with tempfile.TemporaryDirectory() as folder:
        shared = args.folder or Path(folder)
        began = time.monotonic()
        try:
            task = train(args, shared)
        except InputError as error:
            record = replace(record, reason=str(error))
        else:
            lines = read_log(shared / "run" / LOG_NAME)
            record = with_log(record, lines, task.counted_from, time.monotonic() - began)
            record = replace(record, host_gap_share=task.gap_share)
    if rank:
        return 0
    result = TrainingResult(environment=known, records=[record], notes=NOTES)
    show(*result.tables())
    write_result(result, args.json)
    return 1 if record.reason else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
