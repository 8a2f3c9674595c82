"""A model with its optimizer, and training steps of it, in a process of its own."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.results.steps import PARTS, Memory, SweptBatch
from harness.variants import MASKINGS, named_gradients, optimizer_bytes, parameter_bytes, resolve_variant
from harness.worker import Worker, is_out_of_memory
from vmae import DualMask, InputError, ModelConfig
from vmae.train.optim import OptimConfig, build_optimizer

LOSS_TOLERANCE = 1e-4
SEED = 0


@dataclass(frozen=True, kw_only=True)
class StepJob:
    """What to step.

    Attributes:
        masking: a key of `MASKINGS`.
        dtype: of autocast; "float32" means none.
        threads: of the process.
        clips: file of uint8 [B, T, H, W, 3].
        parked: leave the device between turns (`Stepper.park`).
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
    parked: bool = False

    @property
    def name(self) -> str:
        return f"{self.variant} {self.masking}"


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """A loss, and the 2-norm of each gradient by parameter name."""

    loss: float
    norms: dict[str, float]


def resident_bytes(peak: bool) -> int:
    """Resident memory of this process now, or at its highest so far."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def repeated(clips: Tensor, batch: int) -> Tensor:
    """`batch` clips: the given ones, over and over."""
    return clips[torch.arange(batch) % clips.shape[0]]


def draw_mask(job: StepJob, batch: int) -> DualMask:
    """The job's masks of `batch` clips, the same every time."""
    mask = MASKINGS[job.masking].to_dict()
    return DualMask.sample(batch, job.config.grid, **mask, generator=torch.Generator().manual_seed(SEED))


def norm_of(gradient: Tensor) -> float:
    """2-norm, summed in float64."""
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def use_device(name: str) -> torch.device:
    """The device, which is this process's own from now on where it has a number ("cuda:1")."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


class Stepper:
    """A model, its optimizer, and training steps: one at a time, or a turn of some."""

    def __init__(self, job: StepJob):
        torch.set_num_threads(job.threads)
        self.job = job
        self.device = use_device(job.device)
        self.autocast_dtype = getattr(torch, job.dtype)
        self.all_clips = torch.load(job.clips, weights_only=True)
        self.base = resident_bytes(peak=False)
        torch.manual_seed(SEED)
        self.variant = resolve_variant(job.variant)
        self.model = self.variant.build(job.config)
        self.optimizer = build_optimizer(self.model, OptimConfig(), fused=job.variant != "reference")
        self.batch = self.all_clips.shape[0]
        self.seen: Memory | None = None
        if job.parked:
            self.fresh = [(tensor, tensor.data) for tensor in self._tensors()]
        else:
            self.model.to(self.device)
            self.resize(self.batch)

    def resize(self, batch: int) -> None:
        """Steps of `batch` clips from now on: the given ones, over and over. What was compiled for another
        shape is forgotten, so that nothing is compiled for a range of shapes."""
        if batch != self.batch:
            torch._dynamo.reset()
        self.batch = batch
        self.clips = repeated(self.all_clips, batch).to(self.device)
        self.mask = draw_mask(self.job, batch).to(self.device)

    # --- on the device and off it ---

    def _tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def resume(self) -> None:
        """Come back to the device, with the fresh weights."""
        for tensor, fresh in self.fresh:
            tensor.data = fresh.to(self.device, copy=True)
        self.resize(self.batch)

    def park(self) -> None:
        """Leave the device but for what its driver keeps: weights, gradients, moments, clips and the
        allocator's memory go; what was compiled stays."""
        self.seen = self.memory()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        for tensor, fresh in self.fresh:
            tensor.data = fresh
        del self.clips, self.mask
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _on_device(self):
        if not self.job.parked:
            yield
            return
        self.resume()
        yield
        self.park()

    # --- what a worker is asked ---

    def loss(self) -> float:
        """Loss in float32 of the first two clips, with the fresh weights."""
        with torch.no_grad():
            return float(self.model(self.clips[:2], self.mask[:2]))

    def gradients(self) -> Gradients:
        """Loss and gradients of the timed batch in the timed dtype, with the fresh weights: what variants
        must agree on. Under the names of `Pretrainer`, where the variant knows them."""
        with self._on_device():
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._forward()
            loss.backward()
            try:
                found = self.variant.gradients(self.model)
            except InputError:
                found = named_gradients(self.model)
            result = Gradients(
                loss=float(loss.detach()), norms={name: norm_of(value) for name, value in found.items()}
            )
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return result

    def step(self) -> dict[str, float]:
        """Milliseconds of one training step and of its parts."""
        return self._times(1)[0]

    def turn(self, steps: int) -> list[dict[str, float]]:
        """Milliseconds of some training steps, one after the other; a parked model takes one more before
        them, which brings back its moments and the allocator's memory."""
        with self._on_device():
            if self.job.parked:
                self._times(1)
            return self._times(steps)

    def memory(self) -> Memory:
        """The peak so far, and its parts."""
        if self.job.parked and not self.optimizer.state and self.seen:
            return self.seen
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
        """Steps of `batch` clips; None where they don't fit."""
        try:
            self.optimizer.zero_grad(set_to_none=True)
            self.resize(batch)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            self._times(1)
            times = [parts["step"] for parts in self._times(steps)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            del self.clips, self.mask
            return None
        rate = batch / sorted(times)[len(times) // 2] * 1e3
        return SweptBatch(batch=batch, step_ms=times, memory=self.memory(), clips_per_s=rate)

    # --- a step ---

    def _forward(self) -> Tensor:
        enabled = self.autocast_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled):
            return self.model(self.clips, self.mask)

    def _times(self, steps: int) -> list[dict[str, float]]:
        """Milliseconds of each step and of its parts. On a GPU between events on its stream: the host waits
        after the last step only, as in training."""
        marks = []
        for _ in range(steps):
            marks.append(self._mark())
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._forward()
            marks.append(self._mark())
            loss.backward()
            marks.append(self._mark())
            self.optimizer.step()
            marks.append(self._mark())
            del loss
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = []
        for first in range(0, len(marks), len(PARTS)):
            ends = marks[first : first + len(PARTS)]
            parts = [self._between(*pair) for pair in zip(ends, ends[1:])]
            found.append(dict(zip(PARTS, [sum(parts), *parts])))
        return found

    def _mark(self):
        """This moment: of the device's stream, or of this process's clock."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start, end) -> float:
        """Milliseconds from one mark to another."""
        return (end - start) * 1e3 if self.device.type != "cuda" else start.elapsed_time(end)


class StepWorker(Worker[StepJob]):
    """A `Stepper` in a process of its own."""

    def __init__(self, job: StepJob):
        super().__init__(Stepper, job, job.name)
