"""The training loop: named steps, the same for every kind of training, on one process or many.

One step: fetch, forward and backward (of each micro-batch), clip, optimizer step, then log of the step
before, and checkpoint. What is trained is decided by `compute_loss(batch)`; everything random in it is seeded
by (seed, step), so a run can stop at any step and go on.

Nothing waits for a GPU: the loss and the gradient's norm of a step are read while the next one runs. Should
one not be finite, a flag on the device has kept that step and the next from the weights (`vmae.train.guard`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmae.checkpoint.saver import Saver
from vmae.config import CLIP_GRAD, _Checked
from vmae.data.quarantine import QUARANTINE_NAME, Failure, list_failures
from vmae.data.shards.entries import ShardError
from vmae.errors import InputError
from vmae.settings import BATCH, SEED, STEPS, Whole, ranged
from vmae.train.guard import FiniteGuard, LateNumbers, device_is_idle
from vmae.train.metrics import NoLog, RunLog, StepMeter, flops_utilisation, peak_memory_bytes
from vmae.train.optim import clip_gradients, set_learning_rate, set_weight_decay
from vmae.train.parallel import Parallel, bare
from vmae.train.passes import Stopped
from vmae.train.signals import STOP_SIGNALS, StopSignals
from vmae.train.sinks import Service
from vmae.train.skipping import KINDS, Outcome, Skipping, SkippingGuard, write_report
from vmae.train.state import Companion, TrainingState
from vmae.train.step import Exchange, Read, StepRecord, TrainingBatch, seed_random
from vmae.train.validation import Validation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NONFINITE_NAME = "nonfinite.json"
_STEPS = Whole(1, 2**63 - 1)
STOPS = Skipping()  # leaves no step out


class StoreStop(InputError):
    """A shard, or the store that it lies in, cannot be read; the run can go on when that is mended."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: a launcher may start the same command again


class NonFiniteError(InputError):
    """The loss or the gradient is not a finite number; the step was not taken."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig(_Checked):
    """How long and how a run goes on.

    Attributes:
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: for the logs.
        accumulate: micro-batches of a step on each rank.
        clip_grad: largest gradient norm; None does not clip.
        dtype: "float32", or "bfloat16" (autocast; weights, reductions and loss stay float32).
        cuda_graphs: tell torch where a forward begins, for blocks that are replayed as CUDA graphs.
        seed: of everything random in a step.
        log_every, save_every: steps from one log line, or checkpoint, to the next.
    """

    total_steps: int = ranged(within=STEPS)
    steps_per_epoch: int = ranged(1, _STEPS)
    accumulate: int = ranged(1, BATCH)
    clip_grad: float | None = ranged(None, CLIP_GRAD)
    dtype: str = "float32"
    cuda_graphs: bool = False
    seed: int = ranged(0, SEED)
    log_every: int = ranged(10, _STEPS)
    save_every: int = ranged(1000, _STEPS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")


class Trainer:
    """Trains `model`, one optimizer step at a time.

    Args:
        model: `parallel.wrap` of the module that is trained.
        optimizer: over its parameters; fused ones keep the host from waiting.
        schedule: step (from 0) -> learning rate; a group's `lr_scale` multiplies it.
        open_batches: first step -> iterator over this rank's micro-batches from that step on,
            `config.accumulate` a step.
        compute_loss: micro-batch on the device -> float32 scalar, a mean over what the micro-batch counts.
            Calls `model`.
        config: see `LoopConfig`.
        saver: where checkpoints go.
        about: plain containers that stand as `config` in every checkpoint.
        listing: the same, as `list`: what the samples are drawn from.
        parallel: this process among the others.
        weight_decay: step (from 0) -> weight decay of the groups that decay; None leaves them as they are.
        weigh: micro-batch on the host -> how much its loss counts beside the others of the step, about 1
            (what it counts, over what such a micro-batch mostly counts). Then the gradient is that of one
            large batch.
        companions: what else checkpoints hold (an average of the weights, say), by name.
        after_step: called after every optimizer step with the number of steps done, with nothing waited for.
        sources, count_sources: names of the data's sources, and micro-batch -> clips of each, for the logs.
        flops_per_clip: of forward and backward, for the utilisation in the logs.
        tensorboard: also write TensorBoard files.
        board: folder of these; None means one in the run's folder.
        service: a tracking service that gets the numbers of the log.
        on_first_batch: called with the first micro-batch of this start, on the device.
        validation: tests the model between two steps, see `Validation`; its time is in no step.
        skipping: steps that are left out where the run goes on.
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
        saver: Saver,
        about: dict[str, Any],
        listing: dict[str, Any] | None = None,
        parallel: Parallel | None = None,
        weight_decay: Callable[[int], float] | None = None,
        weigh: Callable[[TrainingBatch], float] | None = None,
        companions: dict[str, Companion] | None = None,
        after_step: Callable[[int], None] | None = None,
        sources: Sequence[str] = (),
        count_sources: Callable[[TrainingBatch], Sequence[int]] | None = None,
        flops_per_clip: float | None = None,
        tensorboard: bool = True,
        board: Path | None = None,
        service: Service | None = None,
        on_first_batch: Callable[[TrainingBatch], None] | None = None,
        validation: Validation | None = None,
        skipping: Skipping = STOPS,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.weight_decay = weight_decay
        self.open_batches, self.compute_loss, self.config = open_batches, compute_loss, config
        self.saver, self.parallel = saver, parallel or Parallel()
        self.about = {"config": about, **({} if listing is None else {"list": listing})}
        self.device = self.parallel.device
        self.weigh, self.after_step, self.flops_per_clip = weigh, after_step, flops_per_clip
        self.sources, self.count_sources = tuple(sources), count_sources
        self.tensorboard, self.board, self.on_first_batch = tensorboard, board, on_first_batch
        self.validation, self.service = validation, service
        self.skipping, companions = skipping, dict(companions or {})
        self.guard = FiniteGuard(optimizer, self.device)
        if skipping:
            self.guard = SkippingGuard(optimizer, self.device, skipping, self.parallel.sum)
            companions["guard"] = self.guard
        optional = ("guard",) if skipping else ()
        self.state = TrainingState(bare(model), optimizer, companions, optional)
        self.step = 0  # optimizer steps done
        self.samples = dict.fromkeys(self.sources, 0)
        self.pending: StepRecord | None = None
        self.meter = StepMeter()
        self.saved_step: int | None = None
        self.stopped_by: int | None = None
        self.bad_videos: set[str] = set()  # that this rank met since it started
        self.failed_reads = 0  # of all ranks
        self._data_error: InputError | None = None
        self.store_s: Callable[[], float] = lambda: 0.0

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint: weights, optimizer state, companions, step and counts.

        Raises:
            InputError: it does not fit what is trained here, or can't be read.
        """
        manifest = self.state.load(path, self.parallel.save_group)
        self.step = self.saved_step = manifest["step"]
        self.samples.update(
            {name: count for name, count in manifest["samples"].items() if name in self.samples}
        )

    def run(self) -> int | None:
        """Train up to `total_steps`, or to where validations end the run; the last step always leaves a
        checkpoint.

        Returns:
            None when the run is complete, else the signal that stopped it, after a checkpoint.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the step's samples stand in `nonfinite.json`.
            StoreStop: a shard can't be read; after a checkpoint.
            InputError: no video decodes, or a file can't be written.
        """
        with self.opened() as batches:
            total = self.config.total_steps
            fault: ShardError | None = None
            try:
                self.validate()  # what a kill or a stop has cut short
                while self.step < total and self.stopped_by is None and not self.ended_early:
                    self.train_step(batches)
                    self.validate()
            except ShardError as error:  # on every rank, between two steps
                self.optimizer.zero_grad(set_to_none=True)
                fault = error
            self.settle()
            if self.saved_step != self.step and (self.step or fault is None):
                self.checkpoint()
        if fault is not None:
            raise StoreStop(
                f"{fault}. The run has stopped after step {self.step}; the same command goes on from there"
            )
        return self.stopped_by

    @property
    def ended_early(self) -> bool:
        """Whether the validations have ended the run."""
        return self.validation is not None and self.validation.ends_run

    @contextlib.contextmanager
    def opened(self) -> Iterator[Iterator[TrainingBatch]]:
        """Batches, logs and signals, ready for `train_step`."""
        self.model.train()
        with contextlib.ExitStack() as stack:
            self.stop = stack.enter_context(StopSignals())
            if self.validation is not None:
                stack.enter_context(self.validation.opened())
            batches = self.open_batches(self.step)  # before the logs, which start threads: workers are forked
            stack.callback(getattr(batches, "close", lambda: None))
            self.stop.guard_workers()
            self.stop.interrupt = getattr(batches, "interrupt", self.stop.interrupt)
            self.store_s = lambda: getattr(batches, "store_s", 0.0)
            self.log_file = self._open_log()
            stack.push(self.log_file.close)
            stack.push(self.saver.close)
            if self.validation is not None:
                self.validation.read(self.saver.folder, self.step)
            yield batches

    def _open_log(self) -> RunLog | NoLog:
        if not self.parallel.is_main:
            return NoLog()
        folder = self.saver.folder
        return RunLog(
            folder.folder,
            self.step,
            self.config.total_steps,
            self.tensorboard,
            check=folder.check,
            board=self.board,
            service=self.service,
        )

    def train_step(self, batches: Iterator[TrainingBatch]) -> None:
        """All of one step; `self.step` counts it, unless a stop was asked for."""
        start = time.perf_counter()
        record = StepRecord(self.step, self.schedule(self.step), samples=[0] * len(self.sources))
        self.optimizer.zero_grad(set_to_none=True)
        parts, batch = self.config.accumulate, None
        read = Read(samples=[0] * len(self.sources))
        for part in range(parts):
            batch, weight = self.fetch(batches, record, read, instead=batch)
            if part == 0 and not self.agree(record, read, stop=True):
                return
            assert batch is not None  # all ranks have one
            self.forward_backward(batch, weight, record, part)
        if parts > 1 and not self.agree(record, read, stop=False):
            self.optimizer.zero_grad(set_to_none=True)
            return
        norm = self.clip(record)
        self.optimizer_step(record, norm)
        self.step += 1
        if self.after_step is not None:
            self.after_step(self.step)
        self.settle()
        record.step_s = time.perf_counter() - start
        self.pending = record
        if self.step % self.config.save_every == 0 or self.step == self.config.total_steps:
            self.settle()
            self.checkpoint()

    def fetch(
        self,
        batches: Iterator[TrainingBatch],
        record: StepRecord,
        read: Read,
        instead: TrainingBatch | None,
    ) -> tuple[TrainingBatch | None, float]:
        """The next micro-batch on the device, and its weight; `instead`, of weight 0, where there is none:
        the others gather weights and gradients with this rank until all know (`agree`), and drop the step."""
        start = time.perf_counter()
        batch = self._next_batch(batches) if read.present else None
        waited_s = time.perf_counter() - start
        if batch is None:
            read.present = False
            return instead, 0.0
        if device_is_idle(self.device):  # else it had work all the while
            read.waited_s += waited_s
        weight = 1.0 if self.weigh is None else self.weigh(batch)
        read.weight += weight
        read.clips += batch.clips.shape[0]
        read.replaced += batch.replaced
        if self.count_sources is not None:
            read.samples = [before + more for before, more in zip(read.samples, self.count_sources(batch))]
        record.ids += batch.ids
        return self._to_device(batch), weight

    def agree(self, record: StepRecord, read: Read, *, stop: bool) -> bool:
        """Let all ranks know what each has read, and add it to the step's record; False where the run stops
        instead. Twice a step at most, however many micro-batches it has.

        Args:
            stop: whether a step begins, so that a stop is taken now; else it is where a rank's workers went
                down with it.

        Raises:
            InputError: on every rank, where one has no batch because of its data.
        """
        own_stops = [self.stop.received == number for number in STOP_SIGNALS]
        ranks = Exchange.of(self.parallel.exchange(read.row(own_stops)), len(STOP_SIGNALS))
        asked = next((number for number, received in zip(STOP_SIGNALS, ranks.stops) if received), None)
        if asked is not None and (stop or not ranks.all_present):
            self.stopped_by = asked
            return False
        if not ranks.all_present:
            raise next(error for error in self.parallel.gather(self._data_error) if error)
        self._note_failures(read.replaced, ranks.replaced)
        record.data_s += ranks.waited_s
        record.weight += ranks.weight
        record.clips += ranks.clips
        record.replaced += ranks.replaced
        record.samples = [before + more for before, more in zip(record.samples, ranks.samples)]
        read.clear()
        return True

    def _next_batch(self, batches: Iterator[TrainingBatch]) -> TrainingBatch | None:
        self.stop.waiting = True
        try:
            return next(batches)
        except InputError as error:  # raised once all ranks know
            text = f"rank {self.parallel.rank}: {error}" if self.parallel.world_size > 1 else str(error)
            self._data_error = (ShardError if isinstance(error, ShardError) else InputError)(text)
            return None
        except StopIteration:  # interrupted by a signal
            if self.stop.received is None:
                raise
            return None
        except RuntimeError:
            time.sleep(0.2)  # a signal to the whole process group may reach a worker first
            if self.stop.received is None:
                raise
            return None
        finally:
            self.stop.waiting = False

    def _note_failures(self, replaced: Sequence[Failure], count: int) -> None:
        """Count the videos that others stand in for, `count` on all ranks, and say it the first time."""
        self.bad_videos.update(path for path, *_ in replaced)
        if count and not self.failed_reads:
            first = next(own[0] for own in self.parallel.gather(list(replaced[:1])) if own)
            self.log_file.say(
                f"note: another video stands in for one that cannot be decoded: {list_failures([first])}; "
                "this and all further "
                f"ones are written to {self.saver.folder.folder / QUARANTINE_NAME}"
            )
        self.failed_reads += count

    def _to_device(self, batch: TrainingBatch) -> TrainingBatch:
        batch = batch.to(self.device, non_blocking=True)
        if self.on_first_batch is not None:
            self.on_first_batch(batch)
            self.on_first_batch = None
        return batch

    def forward_backward(self, batch: TrainingBatch, weight: float, record: StepRecord, part: int) -> None:
        """Add the gradients of the micro-batch's weighted loss, and the loss itself, to the step's."""
        parts = self.config.accumulate
        seed_random(self.config.seed, self.step, self.parallel.rank * parts + part)
        if self.config.cuda_graphs:  # what earlier forwards returned may be written over from here on
            torch.compiler.cudagraph_mark_step_begin()
        low_precision = self.config.dtype != "float32"
        with self.parallel.gradients(self.model, last=part == parts - 1):
            with torch.autocast(self.device.type, dtype=DTYPES[self.config.dtype], enabled=low_precision):
                loss = self.compute_loss(batch)
            (loss if weight == parts else loss * (weight / parts)).backward()
        loss = loss.detach() * weight
        record.loss_sum = loss if record.loss_sum is None else record.loss_sum + loss

    def clip(self, record: StepRecord) -> Tensor:
        """Make the gradients those of the weighted mean, at most `clip_grad` long; returns their norm before
        clipping."""
        # Each micro-batch counted weight / parts, and the ranks' gradients were averaged.
        scale = self.config.accumulate * self.parallel.world_size / record.weight
        return clip_gradients(self.model, self.config.clip_grad, scale=scale)

    def optimizer_step(self, record: StepRecord, norm: Tensor) -> None:
        """Move the weights, if all is finite, and send the step's numbers to the host."""
        assert record.loss_sum is not None  # `forward_backward` came before
        loss = self.parallel.sum(record.loss_sum.float()) / record.weight
        set_learning_rate(self.optimizer, record.lr)
        if self.weight_decay is not None:
            set_weight_decay(self.optimizer, self.weight_decay(record.step))
        self.guard.step(loss, norm)
        record.numbers = LateNumbers(self.guard.numbers(loss, norm))

    def settle(self) -> None:
        """Read the numbers of the step before, and log it.

        Raises:
            NonFiniteError: it was not taken, and nothing after it.
        """
        record, self.pending = self.pending, None
        if record is None:
            return
        start = time.perf_counter()
        assert record.numbers is not None  # `optimizer_step` came before
        outcome = Outcome.of(record.numbers.read())
        if outcome.failed or outcome.left_out:
            self._leave_out(record, outcome)
        if (
            self.step == record.step + 1
        ):  # the device was waited for; else this falls into the next step's time
            record.step_s += time.perf_counter() - start
        self.log(record, outcome)

    def _leave_out(self, record: StepRecord, outcome: Outcome) -> None:
        """Tell of a step that was not taken; of one that is not finite, the samples are written down.

        Raises:
            NonFiniteError: the run stops here.
        """
        if outcome.failed:
            self.step = record.step
        numbers = f"the loss is {outcome.loss} and the gradient's norm {outcome.norm}"
        text = f"step {record.step}: {numbers}"
        if outcome.left_out == "spike":
            text += f", above what is no spike ({outcome.bounds[0]:g} and {outcome.bounds[1]:g})"
        text += ", so the step was not taken. "
        ids = [key for rank in self.parallel.gather(record.ids) for key in rank]
        about = {"loss": str(outcome.loss), "grad_norm": str(outcome.norm), "lr": record.lr, "ids": ids}
        if outcome.left_out == "nonfinite":
            text += f"{self._write_down({'step': record.step, **about})}. "
        if outcome.failed:
            raise NonFiniteError(text + self._why_stopped(outcome))
        counts = dict(zip(KINDS, outcome.counts))
        self.log_file.say(f"note: {text}{counts[outcome.left_out or '']} left out so far")
        self.log_file.record({"step": record.step + 1, "left_out": {"why": outcome.left_out, **about}})

    def _write_down(self, report: dict[str, Any]) -> str:
        """Write down which samples a step came from; says where."""
        path = self.saver.folder.folder / NONFINITE_NAME
        if self.parallel.is_main:
            try:
                self.saver.folder.check()
                write_report(path, report)
            except InputError as error:
                return f"The samples of the batch are not written down: {error}"
        return f"The samples of the batch are in {path}"

    def _why_stopped(self, outcome: Outcome) -> str:
        """What a person can do about a run that a step has stopped."""
        advice = "A lower --lr or --clip-grad often helps"
        if outcome.left_out == "spike":
            advice = (
                f"Spikes left out before it: {self.skipping.spikes}, as many as --spike-limit allows: the "
                f"loss may have risen for good. {advice}"
            )
        elif self.skipping.nonfinite:
            advice = (
                f"Such steps left out before it: {self.skipping.nonfinite}, as many as --on-nonfinite "
                f"allows. {advice}"
            )
        latest = self.saver.folder.latest()
        return f"{advice}; " + (
            f"the run can go on from {latest}" if latest else "there is no checkpoint yet"
        )

    def log(self, record: StepRecord, outcome: Outcome) -> None:
        """Count a step; every `log_every` steps, and after the last, a line goes to the logs."""
        done, loss, norm = record.step + 1, outcome.loss, outcome.norm
        for name, count in zip(self.sources, record.samples):
            self.samples[name] += count
        clips, step_s, data_s = record.clips, record.step_s, record.data_s
        self.meter.add(loss=loss, clips=clips, step_s=step_s, data_s=data_s, replaced=record.replaced)
        self.log_file.step(done, loss=loss, clips=clips, step_s=step_s, data_s=data_s)
        if done % self.config.log_every and done < self.config.total_steps:
            return
        means = self.meter.means()
        flops = self.flops_per_clip and self.flops_per_clip * means["clips_per_s"] / self.parallel.world_size
        self.log_file.record(
            {
                "step": done,
                "epoch": done / self.config.steps_per_epoch,
                "loss": loss if math.isfinite(loss) else None,
                "grad_norm": norm if math.isfinite(norm) else None,
                "lr": record.lr,
                **({} if self.weight_decay is None else {"weight_decay": self.weight_decay(record.step)}),
                **means,
                "mfu": flops_utilisation(flops, self.device, self.config.dtype),
                "memory": peak_memory_bytes(self.device),
                **({"samples": dict(self.samples)} if self.sources else {}),
                **({"skipped": sum(outcome.counts)} if self.skipping else {}),
                # seconds that this rank's workers have waited for object stores so far, together
                **({"store_s": store_s} if (store_s := self.store_s()) else {}),
            }
        )
        self.meter = StepMeter()

    def validate(self) -> None:
        """Validate the steps done, where that is due. The best ones have a checkpoint before the log tells of
        them: after a kill, a validation that the log does not have is made again, and gives the same."""
        validation = self.validation
        if validation is None or self.stopped_by is not None or not validation.due(self.step):
            return
        self.settle()
        try:
            record = validation.test(self.step, self.stop)
        except Stopped as stopped:
            self.stopped_by = stopped.args[0]
            return
        if validation.improves(record):
            if self.saved_step != self.step:
                self.checkpoint()
            self.saver.finish()
        self.log_file.record(record, durable=True)
        validation.keep(record)
        for line in validation.describe(record):
            self.log_file.say(line)

    def checkpoint(self) -> None:
        """Save the steps done; every rank takes part. With a background save, it may be complete a little
        later."""
        self.saver.save(self.step, self.state.tensors(), {**self.about, "samples": self.samples})
        self.saved_step = self.step
