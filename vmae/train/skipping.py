"""Steps that are left out where the run goes on: losses or gradients that are not finite (`--on-nonfinite
skip:K`), and spikes (`--skip-spikes`).

Both are decided on the device, step by step, by the same flag that keeps a bad step from the weights
(`vmae.train.guard`); the host reads a step late what was done. A spike is a loss or a gradient norm far above
those of the last steps taken, as OLMo leaves them out (its optimizers with skipped steps: 6 standard
deviations, the last 128 steps).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae.config import OptimConfig
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import read_json
from vmae.train.guard import FiniteGuard

KINDS = ("nonfinite", "spike")


@dataclass(frozen=True, kw_only=True)
class Skipping:
    """Which steps are left out; by default none, and the first that is not finite stops the run.

    Attributes:
        nonfinite: steps of a run that may be left out because something is not finite.
        deviations: above the mean from which on a loss or norm is a spike; None leaves none out.
        window: steps taken whose losses and norms are compared with; from half of it on, spikes are found.
        spikes: steps of a run that may be left out because of one.
    """

    nonfinite: int = 0
    deviations: float | None = None
    window: int = 128
    spikes: int = 0

    @classmethod
    def of(cls, optim: OptimConfig) -> Skipping:
        found = optim.skip_spikes is not None
        return cls(
            nonfinite=optim.nonfinite_allowed,
            deviations=optim.skip_spikes,
            window=optim.spike_window,
            spikes=optim.spike_limit if found else 0,
        )

    def __bool__(self) -> bool:
        return bool(self.nonfinite) or self.deviations is not None


@dataclass(frozen=True)
class Outcome:
    """What the host reads of a step.

    Attributes:
        failed: it was not taken, and nothing after it.
        left_out: why it was not taken (one of `KINDS`), failed or not; None where it was taken.
        counts: steps left out so far, this one included, by `KINDS`; empty where none may be.
        bounds: largest loss and norm that were no spike; infinite where any was none.
    """

    loss: float
    norm: float
    failed: bool
    left_out: str | None = None
    counts: tuple[int, ...] = ()
    bounds: tuple[float, float] = (float("inf"), float("inf"))

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Outcome:
        """From what a guard's `numbers` gave."""
        loss, norm, failed, *rest = numbers
        if not rest:
            return cls(loss, norm, bool(failed), KINDS[0] if failed else None)
        left_out = next((kind for kind, flag in zip(KINDS, rest) if flag), None)
        counts = (int(rest[2]), int(rest[3]))
        return cls(loss, norm, bool(failed), left_out, counts, (rest[4], rest[5]))


class SkippingGuard(FiniteGuard):
    """Leaves out steps as `rules` say; once more are to be left out than they allow, nothing moves any more.

    A companion of checkpoints: its tensors are `counts` (float32 [2], of `KINDS`) and, where spikes are left
    out, `recent` (float32 [2, window]: losses and norms of the steps taken, the newest last, NaN before the
    first).

    Args:
        sum_ranks: adds up a tensor over the ranks, in place.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        rules: Skipping,
        sum_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(optimizer, device)
        self.rules, self.sum_ranks = rules, sum_ranks
        self.counts = torch.zeros(2, device=device)
        self.most = torch.tensor([rules.nonfinite, rules.spikes], dtype=torch.float32, device=device)
        self.bounds = torch.full((2,), float("inf"), device=device)
        self.left_out = torch.zeros(2, device=device)
        self.recent: Tensor | None = None
        if rules.deviations is not None:
            self.recent = torch.full((2, rules.window), float("nan"), device=device)

    def step(self, loss: Tensor, norm: Tensor) -> None:
        """One optimizer step, unless it is left out, or an earlier one was one too many."""
        values = torch.stack([loss, norm.float()])
        bad = ~torch.isfinite(values).all()
        spike = torch.zeros_like(bad)
        if self.recent is not None:
            self.bounds = self._bounds(self.recent)
            spike = (values > self.bounds).any() & ~bad
        self.left_out = torch.stack([bad, spike]).float()
        if self.recent is not None:  # a last bit may differ between ranks, what they do must not
            self.left_out = self.sum_ranks(self.left_out).clamp(max=1)
        self.counts += self.left_out
        too_many = (self.left_out * (self.counts > self.most)).amax()
        self.failed = torch.maximum(self.failed, too_many)
        flag = torch.maximum(self.failed, self.left_out.amax())
        if self.recent is not None:
            newer = torch.cat([self.recent[:, 1:], values[:, None]], 1)
            self.recent.copy_(torch.where(flag > 0, self.recent, newer))
        self.take(flag)

    def _bounds(self, recent: Tensor) -> Tensor:
        """Largest loss and norm [2] that are no spike."""
        assert self.rules.deviations is not None  # the caller has looked
        held = ~recent.isnan()
        count = held.sum(1)
        values = recent.nan_to_num()
        mean = values.sum(1) / count.clamp(min=1)
        squares = ((values - mean[:, None]) * held).square().sum(1)
        deviation = (squares / (count - 1).clamp(min=1)).sqrt()
        bound = mean + self.rules.deviations * deviation
        return torch.where(2 * count >= self.rules.window, bound, float("inf"))

    def numbers(self, loss: Tensor, norm: Tensor) -> Tensor:
        return torch.cat([super().numbers(loss, norm), self.left_out, self.counts, self.bounds])

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts, **({} if self.recent is None else {"recent": self.recent})}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write what is known of a step that was not finite, with those of earlier steps of the run as
    `earlier`."""
    earlier: list[Any] = []
    if path.is_file():
        try:
            before = read_json(path)
            known = [*before.pop("earlier", []), before]
            # A run that went on from before some steps makes them again.
            earlier = [one for one in known if one["step"] < report["step"]]
        except (InputError, TypeError, KeyError, AttributeError):
            earlier = []  # damaged, or not ours
    content = {**report, **({"earlier": earlier} if earlier else {})}
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=2) + "\n"), binary=False)
