"""Muon for the matrices of blocks and AdamW for all else, as one optimizer.

Muon moves a matrix along the orthogonal matrix nearest to its momentum. Sources: Jordan et al., 2024
(kellerjordan.github.io/posts/muon); for the learning rate, Liu et al., 2025 (arXiv 2502.16982). Without
shards and stacked matrices, a step is that of `torch.optim.Muon`, of which this is a subclass: torch's knows
neither, and cannot leave a step out on the device (`found_inf`).
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vmae.errors import InputError

_MATRIX = re.compile(r"(^|\.)blocks\.\d+\.(.+\.)?weight$")


def block_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """Weights of the blocks' linear layers that are trained, each with the number of matrices stacked in it:
    3 in `qkv`, which are as unlike as any other three."""
    return {
        parameter: 3 if name.endswith(".qkv.weight") else 1
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and _MATRIX.search(name)
    }


def check_matrices(model: nn.Module) -> None:
    """Raises InputError where Muon would move nothing."""
    if not block_matrices(model):
        raise InputError(
            "opt muon moves the matrices of blocks, and none is trained here (a probe's encoder is frozen); "
            "take --opt adamw"
        )


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About U V^T of each matrix U S V^T, by the quintic Newton-Schulz iteration: [matrices, rows,
    columns]."""
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` for parameters that may be sharded along their first dimension, or be several
    matrices above each other (`stacked` of their group).

    Every rank has the whole momentum of one matrix at a time, in bfloat16, and makes the whole step of it;
    then it takes its own rows.
    """

    found_inf: Tensor | None = None  # not 0: this step moves nothing

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure: nothing to return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        weight, grad, speed = map(_own, (parameter, gradient, state["momentum_buffer"]))
        moved = torch.lerp(speed, grad, 1 - group["momentum"])
        ahead = torch.lerp(grad, moved, group["momentum"]) if group["nesterov"] else moved
        stacked = _whole(ahead.bfloat16(), parameter).unflatten(0, (group["stacked"], -1))
        made = (group["ns_coefficients"], group["ns_steps"], group["eps"])
        update = _rows(orthogonal(stacked, *made).flatten(0, 1), parameter)
        rate = group["lr"] * rate_factor(group["adjust_lr_fn"], *stacked.shape[1:])
        self._set(speed, moved)
        self._set(weight, (weight * (1 - group["lr"] * group["weight_decay"])).add_(update, alpha=-rate))

    def _set(self, target: Tensor, value: Tensor) -> None:
        target.copy_(value if self.found_inf is None else torch.where(self.found_inf > 0, target, value))


def rate_factor(rule: str | None, rows: int, columns: int) -> float:
    """What a matrix's learning rate is multiplied by, see `OptimConfig.muon_adjust`."""
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def _own(tensor: Tensor) -> Tensor:
    """This rank's part, the tensor's own memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(own: Tensor, parameter: Tensor) -> Tensor:
    """All rows, from each rank's own."""
    if not isinstance(parameter, DTensor):
        return own
    layout = (parameter.device_mesh, parameter.placements)
    sharded = DTensor.from_local(own, *layout, shape=parameter.shape, stride=parameter.stride())
    return sharded.full_tensor()


def _rows(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's rows, as `parameter` is sharded; nothing is sent."""
    if not isinstance(parameter, DTensor):
        return whole
    layout = (parameter.device_mesh, parameter.placements)
    return distribute_tensor(whole.contiguous(), *layout, src_data_rank=None).to_local()


class MuonAdamW(torch.optim.Optimizer):
    """Both as one: groups, state by parameter, and `found_inf` where AdamW is fused."""

    def __init__(self, matrices: Muon, rest: torch.optim.AdamW) -> None:
        super().__init__([*matrices.param_groups, *rest.param_groups], {})
        self.parts: tuple[torch.optim.Optimizer, ...] = (matrices, rest)
        self.defaults = rest.defaults
        for part in self.parts:
            part.state = self.state
        self._step_supports_amp_scaling = bool(rest.defaults["fused"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure: nothing to return
        for part in self.parts:
            if hasattr(self, "found_inf"):
                part.found_inf = self.found_inf  # type: ignore[attr-defined]  # read by fused steps
            part.step()
