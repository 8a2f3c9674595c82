"""Training steps of several variants, each in a process of its own, in turn.

A process of its own gives each its own memory; turns (A B C A B C ...) make what disturbs the machine disturb
all. Losses are compared first, in float32 on the same clips, masks and weights; a variant whose loss is off
takes no timed step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.progress import at
from harness.results.steps import Memory, SweptBatch
from harness.variants import MASKINGS, optimizer_bytes, parameter_bytes, resolve_variant
from harness.worker import Worker
from vmae import DualMask, ModelConfig
from vmae.train.optim import OptimConfig, build_adamw

LOSS_TOLERANCE = 1e-4
SEED = 0
Losses = dict[str, dict[str, float]]  # by masking and variant


@dataclass(frozen=True, kw_only=True)
class StepJob:
    """What to step.

    Attributes:
        masking: a key of `MASKINGS`.
        dtype: of autocast; "float32" means none.
        threads: of the process.
        clips: file of uint8 [B, T, H, W, 3].
    """

    model: str
    config: ModelConfig
    variant: str
    masking: str
    device: str
    dtype: str
    batch: int
    threads: int
    clips: str = ""

    @property
    def name(self) -> str:
        return f"{self.variant} {self.masking}"


def resident_bytes(peak: bool) -> int:
    """Resident memory of this process now, or at its highest so far."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


class Stepper:
    """A model, its optimizer, and one training step at a time."""

    def __init__(self, job: StepJob):
        torch.set_num_threads(job.threads)
        self.job = job
        self.device = torch.device(job.device)
        self.autocast_dtype = getattr(torch, job.dtype)
        self.all_clips = torch.load(job.clips, weights_only=True)
        self.base = resident_bytes(peak=False)
        torch.manual_seed(SEED)
        self.model = resolve_variant(job.variant).build(job.config).to(self.device)
        self.optimizer = build_adamw(self.model, OptimConfig(), fused=job.variant != "reference")
        self.resize(self.all_clips.shape[0])

    def resize(self, batch: int) -> None:
        """Steps of `batch` clips from now on: the given ones, over and over."""
        places = torch.arange(batch) % self.all_clips.shape[0]
        mask = MASKINGS[self.job.masking].to_dict()
        generator = torch.Generator().manual_seed(SEED)
        drawn = DualMask.sample(batch, self.job.config.grid, **mask, generator=generator)
        self.clips, self.mask = self.all_clips[places].to(self.device), drawn.to(self.device)

    def loss(self) -> float:
        """Loss in float32 of the first two clips, with the fresh weights: what variants must agree on."""
        with torch.no_grad():
            return float(self.model(self.clips[:2], self.mask[:2]))

    def step(self) -> dict[str, float]:
        """Milliseconds of one training step and of its parts."""
        marks = [self._now()]
        self.optimizer.zero_grad(set_to_none=True)
        enabled = self.autocast_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled):
            loss = self.model(self.clips, self.mask)
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimizer.step()
        marks.append(self._now())
        names = ("forward", "backward", "optimizer")
        parts = {name: (b - a) * 1e3 for name, a, b in zip(names, marks, marks[1:])}
        return {"step": sum(parts.values()), **parts}

    def memory(self) -> Memory:
        """The peak so far, and its parts."""
        parameters, moments = parameter_bytes(self.model), optimizer_bytes(self.optimizer)
        peak = resident_bytes(peak=True) - self.base
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        return Memory(
            peak=peak,
            parameters=parameters,
            gradients=parameters,
            optimizer=moments,
            activations=max(peak - 2 * parameters - moments, 0),
        )

    def try_batch(self, batch: int, steps: int) -> SweptBatch | None:
        """Steps of `batch` clips; None where they don't fit the GPU."""
        try:
            self.optimizer.zero_grad(set_to_none=True)
            self.resize(batch)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            times = [self.step()["step"] for _ in range(steps)]
        except torch.OutOfMemoryError:
            del self.clips, self.mask
            return None
        rate = batch / sorted(times)[len(times) // 2] * 1e3
        return SweptBatch(batch=batch, step_ms=times, memory=self.memory(), clips_per_s=rate)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class StepWorker(Worker[StepJob]):
    """A `Stepper` in a process of its own."""

    def __init__(self, job: StepJob):
        super().__init__(Stepper, job, job.name)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one job gave; no runs and no memory where its loss was wrong."""

    loss: float
    runs: list[dict[str, float]]
    memory: Memory | None


def disagreeing(losses: Losses, tolerance: float = LOSS_TOLERANCE) -> dict[str, str]:
    """Variants whose loss differs from the first one's, with the reason."""
    reasons: dict[str, str] = {}
    for masking, by_variant in losses.items():
        first, expected = next(iter(by_variant.items()))
        for variant, loss in by_variant.items():
            error = abs(loss - expected) / abs(expected)
            if not error <= tolerance:
                text = f"loss {loss:.6f} with {masking} masking differs from {first}'s {expected:.6f}"
                reasons.setdefault(variant, f"{text} by {error:.1e} relative")
    return reasons


def measure(jobs: Sequence[StepJob], steps: int, warmup: int) -> tuple[list[Measured], dict[str, str]]:
    """Runs of every job in turn, and the variants that failed the check (which were not timed)."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(contextlib.closing(StepWorker(job))) for job in jobs]
        losses = find_losses(workers)
        wrong = disagreeing(losses)
        timed = [worker for worker in workers if worker.job.variant not in wrong]
        runs: dict[str, list[dict[str, float]]] = {worker.name: [] for worker in workers}
        for turn in range(warmup + steps):
            for worker in timed:
                at(f"round {turn + 1} of {warmup + steps}, {worker.name}")
                parts = worker.ask("step")
                if turn >= warmup:
                    runs[worker.name].append(parts)
        memory = {worker.name: worker.ask("memory") for worker in timed}
    measured = []
    for job in jobs:
        loss = losses[job.masking][job.variant]
        measured.append(Measured(loss=loss, runs=runs[job.name], memory=memory.get(job.name)))
    return measured, wrong


def find_losses(workers: Sequence[StepWorker]) -> Losses:
    """Loss of every worker."""
    for worker in workers:
        at(f"building {worker.name}")
        worker.wait_ready()
    losses: Losses = {}
    for worker in workers:
        at(f"loss of {worker.name}")
        losses.setdefault(worker.job.masking, {})[worker.job.variant] = worker.ask("loss")
    return losses


def sweep_batches(job: StepJob, steps: int, largest: int) -> list[SweptBatch]:
    """Steps at 1, 2, 4, ... clips up to `largest` or to what fits, then at one batch between the last two;
    the smallest first."""
    found: list[SweptBatch] = []
    with contextlib.closing(StepWorker(job)) as worker:
        worker.wait_ready()
        batch = 1
        while batch <= largest:
            at(f"{worker.name}, batches of {batch}")
            result = worker.ask("try_batch", batch, steps)
            if result is None:
                break
            found.append(result)
            batch *= 2
        between = 3 * batch // 4
        if found and batch <= largest and between > found[-1].batch:
            result = worker.ask("try_batch", between, steps)
            found += [result] if result else []
    return sorted(found, key=lambda run: run.batch)
