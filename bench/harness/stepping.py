"""Training steps of several variants, each in a process of its own, taken in turn.

A process of its own gives each its own memory; turns (A B C A B C ...) make what disturbs the machine disturb
all. Losses are compared first, in float32 on the same clips, masks and weights; a variant whose loss is off
takes no timed step.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.telling import at
from harness.variants import MASKINGS, optimizer_bytes, parameter_bytes, resolve_variant
from vmae import DualMask
from vmae.train.optim import OptimConfig, build_adamw

LOSS_TOLERANCE = 1e-4
SEED = 0


def resident_bytes(peak: bool) -> int:
    """Resident memory of this process now, or at its highest so far."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


class Stepper:
    """A model, its optimizer, and one training step at a time.

    Args:
        job: `variant`, `masking`, `config` (ModelConfig), `device`, `dtype`, `threads`, and `clips`, a file
            of uint8 clips.
    """

    def __init__(self, job: dict[str, Any]):
        torch.set_num_threads(job["threads"])
        self.job = job
        self.device = torch.device(job["device"])
        self.autocast_dtype = getattr(torch, job["dtype"])
        self.all_clips = torch.load(job["clips"], weights_only=True)
        self.base = resident_bytes(peak=False)
        torch.manual_seed(SEED)
        self.model = resolve_variant(job["variant"]).build(job["config"]).to(self.device)
        self.optimizer = build_adamw(self.model, OptimConfig(), fused=job["variant"] != "reference")
        self.resize(self.all_clips.shape[0])

    def resize(self, batch: int) -> None:
        """Steps of `batch` clips from now on: the given ones, over and over."""
        places = torch.arange(batch) % self.all_clips.shape[0]
        mask = MASKINGS[self.job["masking"]].to_dict()
        generator = torch.Generator().manual_seed(SEED)
        drawn = DualMask.sample(batch, self.job["config"].grid, **mask, generator=generator)
        self.clips, self.mask = self.all_clips[places].to(self.device), drawn.to(self.device)

    def loss(self) -> float:
        """In float32, of the first two clips, with the fresh weights: what variants must agree on."""
        with torch.no_grad():
            return float(self.model(self.clips[:2], self.mask[:2]))

    def step(self) -> dict[str, float]:
        """Milliseconds of one training step's parts."""
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

    def memory(self) -> dict[str, int]:
        """Bytes: the peak, and its parts; `activations` is what is left, the largest transient included."""
        parameters = parameter_bytes(self.model)
        parts = {
            "parameters": parameters,
            "gradients": parameters,
            "optimizer": optimizer_bytes(self.optimizer),
        }
        peak = resident_bytes(peak=True) - self.base
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        return {"peak": peak, **parts, "activations": max(peak - sum(parts.values()), 0)}

    def try_batch(self, batch: int, steps: int) -> dict[str, Any] | None:
        """Step times and peak at `batch` clips; None where they don't fit the GPU."""
        try:
            self.optimizer.zero_grad(set_to_none=True)
            self.resize(batch)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            return {"step_ms": [self.step()["step"] for _ in range(steps)], "memory": self.memory()}
        except torch.OutOfMemoryError:
            self.clips = self.mask = None
            return None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def serve(make: Callable[[dict[str, Any]], Any], job: dict[str, Any], pipe) -> None:
    """In a worker: does what the pipe asks of `make(job)`, answers (True, result) or (False, message)."""
    try:
        served = make(job)
        pipe.send((True, None))
        while (request := pipe.recv()) is not None:
            name, arguments = request
            pipe.send((True, getattr(served, name)(*arguments)))
    except EOFError:
        pass
    except BaseException as error:  # the parent reports it and stops the others
        with contextlib.suppress(OSError):
            pipe.send((False, f"{type(error).__name__}: {error}"))


class Worker:
    """A process of its own, in which the methods of `make(job)` are asked for; by default one (variant,
    masking)."""

    def __init__(
        self, job: dict[str, Any], make: Callable[[dict[str, Any]], Any] = Stepper, name: str | None = None
    ):
        self.job = job
        self.name = name or f"{job['variant']} {job['masking']}"
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(make, job, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def wait_ready(self) -> None:
        self._receive()

    def ask(self, request: str, *arguments: Any) -> Any:
        self.pipe.send((request, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            good, result = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"{self.name}: its process died with code {self.process.exitcode} (out of memory?)"
            ) from None
        if not good:
            raise RuntimeError(f"{self.name}: {result}")
        return result

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


def disagreeing(losses: dict[str, dict[str, float]], tolerance: float = LOSS_TOLERANCE) -> dict[str, str]:
    """Variants whose loss differs from the first one's, with the reason; `losses` is by masking and
    variant."""
    reasons: dict[str, str] = {}
    for masking, by_variant in losses.items():
        first, expected = next(iter(by_variant.items()))
        for variant, loss in by_variant.items():
            error = abs(loss - expected) / abs(expected)
            if not error <= tolerance:
                text = f"loss {loss:.6f} with {masking} masking differs from {first}'s {expected:.6f} by {error:.1e} relative"
                reasons.setdefault(variant, text)
    return reasons


def measure(jobs: list[dict[str, Any]], steps: int, warmup: int) -> tuple[list[dict], dict[str, str]]:
    """Runs of every job in turn, and the variants that failed the check (which were not timed)."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(contextlib.closing(Worker(job))) for job in jobs]
        wrong = check_losses(workers)
        timed = [worker for worker in workers if worker.job["variant"] not in wrong]
        runs: dict[str, list[dict[str, float]]] = {worker.name: [] for worker in workers}
        for turn in range(warmup + steps):
            for worker in timed:
                at(f"round {turn + 1} of {warmup + steps}, {worker.name}")
                parts = worker.ask("step")
                if turn >= warmup:
                    runs[worker.name].append(parts)
        return [
            {
                "worker": w.name,
                "loss": w.loss,
                "runs": runs[w.name],
                "memory": w.ask("memory") if w in timed else None,
            }
            for w in workers
        ], wrong


def check_losses(workers: list[Worker]) -> dict[str, str]:
    """Asks every worker for its loss (left in `worker.loss`); the variants that disagree, with the reason."""
    for worker in workers:
        at(f"building {worker.name}")
        worker.wait_ready()
    losses: dict[str, dict[str, float]] = {}
    for worker in workers:
        at(f"loss of {worker.name}")
        worker.loss = worker.ask("loss")
        losses.setdefault(worker.job["masking"], {})[worker.job["variant"]] = worker.loss
    return disagreeing(losses)


def sweep_batches(job: dict[str, Any], steps: int, largest: int) -> list[dict[str, Any]]:
    """Step times at 1, 2, 4, ... clips up to `largest` or to what fits, then at one batch between the last
    two."""
    found: list[dict[str, Any]] = []
    with contextlib.closing(Worker(job)) as worker:
        worker.wait_ready()
        batch = 1
        while batch <= largest:
            at(f"{worker.name}, batches of {batch}")
            result = worker.ask("try_batch", batch, steps)
            if result is None:
                break
            found.append({"batch": batch, **result})
            batch *= 2
        between = 3 * batch // 4
        if found and batch <= largest and between > found[-1]["batch"]:
            result = worker.ask("try_batch", between, steps)
            found += [{"batch": between, **result}] if result else []
    return found
