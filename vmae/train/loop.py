"""The training loop: named steps, the same for every kind of training.

One step: fetch, forward and backward, clip, check, optimizer step, log, checkpoint. What is trained is decided by
`compute_loss(batch)`; everything random in it is seeded by (seed, step), so a run can stop at any step and go on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vmae.config import _Checked
from vmae.errors import InputError
from vmae.train.checkpoint import CheckpointFolder, write_atomically
from vmae.train.metrics import RunLog, StepMeter, peak_memory_bytes
from vmae.train.optim import clip_gradients, set_learning_rate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NONFINITE_NAME = "nonfinite.json"


class NonFiniteError(InputError):
    """The loss or the gradient is not a finite number; the step was not taken."""


class TrainingBatch(Protocol):
    """What the loop needs of a batch; `vmae.data.Batch` is one."""

    clips: Tensor
    ids: list
    replaced: list

    def to(self, device, non_blocking: bool = False) -> TrainingBatch: ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig(_Checked):
    """How long and how a run goes on.

    Attributes:
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: for the logs.
        clip_grad: largest gradient norm; None does not clip.
        dtype: "float32", or "bfloat16" (autocast; weights, reductions and loss stay float32).
        seed: of everything random in a step.
        log_every, save_every: steps from one log line, or checkpoint, to the next.
    """

    total_steps: int
    steps_per_epoch: int = 1
    clip_grad: float | None = None
    dtype: str = "float32"
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        for name in ("total_steps", "steps_per_epoch", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")


class StopSignals:
    """While open, SIGTERM and Ctrl-C ask for a stop at the next step's end; a second Ctrl-C interrupts at once.

    A data worker that dies (of the same signal, most often) must not interrupt a step half done either: its error is
    raised only while `waiting` for a batch.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.waiting = False
        self._before: dict[int, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_stop)
        return self

    def guard_workers(self) -> None:
        """Take over from the loader's own handler of workers' deaths; call it once the loader is there."""
        raise_error = signal.getsignal(signal.SIGCHLD)
        if self._before and callable(raise_error):
            self._before.setdefault(signal.SIGCHLD, raise_error)
            signal.signal(signal.SIGCHLD, lambda *received: raise_error(*received) if self.waiting else None)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_stop(self, number: int, frame: object) -> None:
        if os.getpid() != self._owner:  # a forked data worker: the run's process decides
            return
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class Trainer:
    """Trains `model` by one batch a step.

    Args:
        model: on `device`.
        optimizer: over its parameters.
        schedule: step (from 0) -> learning rate.
        open_batches: first step -> iterator over the batches from that step on.
        compute_loss: batch on `device` -> float32 scalar.
        config: see `LoopConfig`.
        checkpoints: where checkpoints go.
        about: plain containers that stand as `config` in every checkpoint.
        tensorboard: also write TensorBoard files.
        on_first_batch: called with the first batch of this start.
        count: batch -> numbers whose sums since the last line of the logs stand in the next one.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        open_batches: Callable[[int], Iterator[TrainingBatch]],
        compute_loss: Callable[[TrainingBatch], Tensor],
        config: LoopConfig,
        checkpoints: CheckpointFolder,
        about: dict[str, Any],
        device: torch.device | str = "cpu",
        tensorboard: bool = True,
        on_first_batch: Callable[[TrainingBatch], None] | None = None,
        count: Callable[[TrainingBatch], dict[str, int]] | None = None,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.open_batches, self.compute_loss, self.config = open_batches, compute_loss, config
        self.checkpoints, self.about, self.device = checkpoints, about, torch.device(device)
        self.tensorboard, self.on_first_batch = tensorboard, on_first_batch
        self.step = 0  # optimizer steps done
        self.meter = StepMeter()
        self.count, self.counts = count, Counter()
        self.saved_step: int | None = None

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Go on from `optimizer` and `step` of a training checkpoint; the model's weights are loaded already."""
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step = self.saved_step = checkpoint["step"]

    def run(self) -> int | None:
        """Train up to `total_steps`; the last step always leaves a checkpoint.

        Returns:
            None when the run is complete, else the signal that stopped it, after a checkpoint.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the batch's samples stand in `nonfinite.json`.
            InputError: no video decodes, or a file can't be written.
        """
        self.model.train()
        with contextlib.ExitStack() as stack:
            self.stop = stack.enter_context(StopSignals())
            batches = self.open_batches(self.step)  # before the logs, which start threads: workers are forked
            stack.callback(getattr(batches, "close", lambda: None))
            self.stop.guard_workers()
            self.log_file = RunLog(self.checkpoints.folder, self.step, self.config.total_steps, self.tensorboard)
            stack.callback(self.log_file.close)
            while self.step < self.config.total_steps and self.stop.received is None:
                self.train_step(batches)
            if self.saved_step != self.step:
                self.checkpoint()
            return self.stop.received

    def train_step(self, batches: Iterator[TrainingBatch]) -> None:
        """All of one step; `self.step` counts it once the weights have moved."""
        start = time.perf_counter()
        batch = self.fetch(batches)
        if batch is None:
            return
        data_s = time.perf_counter() - start
        lr = self.schedule(self.step)
        loss_tensor = self.forward_backward(batch)
        norm_tensor = self.clip()
        loss, norm = loss_tensor.item(), norm_tensor.item()
        self.check_finite(batch, loss, norm, lr)
        self.optimizer_step(lr)
        self.step += 1
        self.log(batch, loss=loss, grad_norm=norm, lr=lr, step_s=time.perf_counter() - start, data_s=data_s)
        if self.step % self.config.save_every == 0 or self.step == self.config.total_steps:
            self.checkpoint()

    def fetch(self, batches: Iterator[TrainingBatch]) -> TrainingBatch | None:
        """The next batch on the device; None when a stop was asked for and the workers went down with it."""
        self.stop.waiting = True
        try:
            batch = next(batches).to(self.device, non_blocking=True)
        except RuntimeError:
            time.sleep(0.2)  # a signal to the whole process group may reach a worker first
            if self.stop.received is None:
                raise
            return None
        finally:
            self.stop.waiting = False
        if self.on_first_batch is not None:
            self.on_first_batch(batch)
            self.on_first_batch = None
        return batch

    def forward_backward(self, batch: TrainingBatch) -> Tensor:
        """Gradients of the batch's loss, which is returned, detached."""
        torch.manual_seed(int(np.random.SeedSequence((self.config.seed, self.step)).generate_state(1, np.uint64)[0] >> 1))
        self.optimizer.zero_grad(set_to_none=True)
        low_precision = self.config.dtype != "float32"
        with torch.autocast(self.device.type, dtype=DTYPES[self.config.dtype], enabled=low_precision):
            loss = self.compute_loss(batch)
        loss.backward()
        return loss.detach()

    def clip(self) -> Tensor:
        """Scale the gradients down to `clip_grad`; returns their norm before."""
        return clip_gradients(self.model, self.config.clip_grad)

    def check_finite(self, batch: TrainingBatch, loss: float, norm: float, lr: float) -> None:
        """Stop before a loss or gradient that is not finite reaches the weights, and write down where it came from."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        path = Path(self.checkpoints.folder) / NONFINITE_NAME
        report = {"step": self.step, "loss": str(loss), "grad_norm": str(norm), "lr": lr, "ids": batch.ids}
        write_atomically(path, lambda file: file.write(json.dumps(report, indent=2) + "\n"), binary=False)
        latest = self.checkpoints.latest()
        raise NonFiniteError(
            f"step {self.step}: the loss is {loss} and the gradient's norm {norm}, so the step was not taken. The samples of "
            f"the batch are in {path}. A lower --lr or --clip-grad often helps; "
            + (f"the run can go on from {latest}" if latest else "there is no checkpoint yet")
        )

    def optimizer_step(self, lr: float) -> None:
        """Move the weights."""
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()

    def log(self, batch: TrainingBatch, *, loss: float, grad_norm: float, lr: float, step_s: float, data_s: float) -> None:
        """Count the step; every `log_every` steps, and after the last, a line goes to the logs."""
        clips = batch.clips.shape[0]
        self.meter.add(loss=loss, clips=clips, step_s=step_s, data_s=data_s, replaced=len(batch.replaced))
        self.counts.update(self.count(batch) if self.count else {})
        self.log_file.step(self.step, loss=loss, clips=clips, step_s=step_s, data_s=data_s)
        if self.step % self.config.log_every and self.step < self.config.total_steps:
            return
        self.log_file.record(
            {
                "step": self.step,
                "epoch": self.step / self.config.steps_per_epoch,
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": lr,
                **self.meter.means(),
                **self.counts,
                "memory": peak_memory_bytes(self.device),
            }
        )
        self.meter, self.counts = StepMeter(), Counter()

    def checkpoint(self) -> Path:
        """Write a checkpoint of the steps done."""
        content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "config": self.about}
        path = self.checkpoints.save(self.step, content)
        self.saved_step = self.step
        return path
