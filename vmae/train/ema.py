"""The moving average of a model's weights (Polyak and Juditsky, 1992), as timm's `ModelEma` keeps it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """`average = decay * average + (1 - decay) * weights`, after every step, from the weights it starts with.

    Args:
        model: its parameters; of sharded ones each rank averages its part.
        decay: at least 0 and below 1; published 0.9999.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of the step just done in: a launch for many tensors, not one for each."""
        weights = dict(self.model.named_parameters())
        torch._foreach_lerp_(
            list(self.average.values()), [weights[name] for name in self.average], 1 - self.decay
        )

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[nn.Module]:
        """The model with the averaged weights, inside; its own come back after."""
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        try:
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.average[name])
            yield self.model
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.copy_(own[name])
