"""The check of what is timed: a variant's loss and every gradient's norm, in the timed dtype and on the timed
batch, against the reference's.

As in tests/kernels, errors are relative to a run of higher precision (float32 for bfloat16, float64 for
float32), and a variant's is at most twice the reference's own in the same dtype. The reference's error of a
gradient is the 2-norm of its difference, which bounds that of its norm and is not small by luck; a gradient
that it meets by chance counts as rounded once. A loss is the mean of some million squares, so that roundings
cancel: it counts as having an error of 2^-11 in bfloat16, and of 2^-20 in float32, where they are summed up.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from harness.progress import at
from harness.results.steps import Check
from harness.stepping import SEED, Gradients, StepJob, draw_mask, norm_of, repeated, use_device
from harness.variants import named_gradients, resolve_variant
from harness.worker import Worker, WorkerError
from vmae import DualMask
from vmae.config import IMAGENET_MEAN, IMAGENET_STD

FACTOR = 2.0
LOSS_FLOOR = {"float32": 2.0**-20, "bfloat16": 2.0**-11}
GRADIENT_FLOOR = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
PRECISE = {"float32": torch.float64, "bfloat16": torch.float32}
ALL = "all gradients"  # name of the norm over all parameters
AT_ONCE = (4, 1)  # clips of a backward of the reference: gradients add up, and memory stays small


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The precise loss and norms, and the reference's relative errors of them in the timed dtype."""

    dtype: str
    precise: Gradients
    loss_error: float
    errors: dict[str, float]

    def check(self, found: Gradients, allowance: float = 0.0) -> Check:
        """Errors of a variant beside their bounds; of all gradients' norms the one that is furthest out.

        Args:
            allowance: added to every bound, `Variant.allowance`.
        """
        norms, note = found.norms, ""
        if norms.keys() != self.precise.norms.keys() - {ALL}:
            norms, note = {}, "its parameters have other names: only the norm over all gradients is compared"
        norms = {**norms, ALL: math.hypot(*found.norms.values())}
        bounds = {
            name: FACTOR * max(self.errors[name], GRADIENT_FLOOR[self.dtype]) + allowance for name in norms
        }
        errors = {name: _relative(norm, self.precise.norms[name]) for name, norm in norms.items()}
        parts = {name: error / bounds[name] for name, error in errors.items()}
        worst = max(parts, key=lambda name: math.inf if math.isnan(parts[name]) else parts[name])
        return Check(
            loss_error=_relative(found.loss, self.precise.loss),
            loss_bound=FACTOR * max(self.loss_error, LOSS_FLOOR[self.dtype]) + allowance,
            parameter=worst,
            gradient_error=errors[worst],
            gradient_bound=bounds[worst],
            widest_bound=max(bounds.values()),
            compared=len(norms),
            note=note,
        )


def _relative(value: float, truth: float) -> float:
    return abs(value - truth) / max(abs(truth), 1e-300)


class Reference:
    """The published algorithm in the timed dtype and in a higher precision, some clips at a time."""

    def __init__(self, job: StepJob, at_once: int):
        torch.set_num_threads(job.threads)
        self.job, self.at_once, self.device = job, at_once, use_device(job.device)
        self.clips = repeated(torch.load(job.clips, weights_only=True), job.batch)
        torch.manual_seed(SEED)
        self.model = resolve_variant("reference").build(job.config).to(self.device)

    def expected(self, masking: str) -> Expected:
        """What variants are held against, with that masking."""
        mask = draw_mask(replace(self.job, masking=masking), self.job.batch)
        loss, rounded = self._run(mask, getattr(torch, self.job.dtype), torch.float32)
        precise = PRECISE[self.job.dtype]
        self.model.to(precise)
        with _without_tf32():
            true_loss, true = self._run(mask, torch.float32, precise)
        self.model.to(torch.float32)  # exact: weights are as they began
        norms = {name: norm_of(value) for name, value in true.items()}
        apart = {name: norm_of(rounded[name].to(value.dtype) - value) for name, value in true.items()}
        norms[ALL], apart[ALL] = math.hypot(*norms.values()), math.hypot(*apart.values())
        return Expected(
            dtype=self.job.dtype,
            precise=Gradients(loss=true_loss, norms=norms),
            loss_error=_relative(loss, true_loss),
            errors={name: apart[name] / max(norm, 1e-300) for name, norm in norms.items()},
        )

    def _run(
        self, mask: DualMask, autocast: torch.dtype, dtype: torch.dtype
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients (on the host) of the batch, summed over its parts; weights are `dtype`."""
        self.model.zero_grad(set_to_none=True)
        total, loss_of_all = _counted(mask), 0.0
        for first in range(0, self.job.batch, self.at_once):
            part = mask[first : first + self.at_once]
            clips = self.clips[first : first + self.at_once].to(self.device)
            if dtype == torch.float64:
                clips = _normalised(clips)
            share = _counted(part) / total
            with torch.autocast(self.device.type, dtype=autocast, enabled=autocast != torch.float32):
                loss = self.model(clips, part.to(self.device)) * share
            loss.backward()
            loss_of_all += float(loss.detach())
        gradients = {name: value.cpu() for name, value in named_gradients(self.model).items()}
        self.model.zero_grad(set_to_none=True)
        return loss_of_all, gradients


def _counted(mask: DualMask) -> int:
    """Tokens over which the loss is the mean."""
    encoder_mask, decoder_mask = mask.to_bool()
    return int((encoder_mask & ~decoder_mask).sum())


def _normalised(clips: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float64 [B, 3, T, H, W], by the float32 constants that the models use."""
    mean, std = (
        torch.tensor(values, device=clips.device).double() for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return ((clips.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Float32 products in float32, also on a GPU."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def expect(job: StepJob, maskings: Sequence[str]) -> dict[str, Expected]:
    """`Reference.expected` of each masking, in a process of its own, which is gone afterwards.

    Raises:
        WorkerError: not even a clip at a time fits, or it failed.
    """
    for at_once in AT_ONCE:
        worker = Worker(partial(Reference, at_once=at_once), job, "reference")
        with contextlib.closing(worker):
            try:
                worker.wait_ready()
                found = {}
                for masking in maskings:
                    at(f"what the reference gives, {masking}")
                    found[masking] = worker.ask("expected", masking)
                return found
            except WorkerError as error:
                if not error.out_of_memory or at_once == AT_ONCE[-1]:
                    raise
    raise AssertionError("AT_ONCE is empty")
