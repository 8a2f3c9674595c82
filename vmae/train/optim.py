"""The published optimizers, and Muon, over the published parameter groups; the published cosine schedules.

Source: VideoMAE V2, appendix, and the behaviour of its released code (`optim_factory`, `cosine_scheduler`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vmae.config import OptimConfig
from vmae.errors import InputError
from vmae.train.muon import Muon, MuonAdamW, block_matrices

USUAL_OPTIM = OptimConfig()
NO_DECAY_NAMES = ("pos_embed", "cls_token", "mask_token", "bias", "scale")  # scale: of cosine attention


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to 1-d parameters, biases, positions, the mask token and attention's
    scale."""
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in NO_DECAY_NAMES


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, decayed and not, of the parameters that need a gradient, in the model's order."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if is_decayed(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not is_decayed(name, p)], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer over `model`; see `optimizer_of`."""
    return optimizer_of(parameter_groups(model, config.weight_decay), model, config, fused=fused)


def optimizer_of(
    groups: list[dict], model: nn.Module, config: OptimConfig, *, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum, or Muon with AdamW, over groups of the model's parameters.

    As published, "sgd" is torch's SGD with Nesterov's momentum and "momentum" the one without, both with
    weight decay in the gradient (AdamW's is apart from it).

    Args:
        fused: one kernel for all parameters (CPU and GPU), with the same numbers. SGD of sharded parameters
            has none: torch 2.13 does not know how `_fused_sgd_` shards.
    """
    if config.opt == "muon":
        return _muon_of(groups, block_matrices(model), config, fused)
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    nesterov = config.opt == "sgd"
    fused = fused and not any(isinstance(p, DTensor) for group in groups for p in group["params"])
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


def _muon_of(
    groups: list[dict], matrices: dict[nn.Parameter, int], config: OptimConfig, fused: bool
) -> MuonAdamW:
    """Groups cut by who moves them; those of matrices have their own rate, as a factor of the schedule's."""
    factor = 1.0 if config.muon_lr is None else config.muon_lr / config.lr
    moved: list[dict] = []
    rest: list[dict] = []
    for group in groups:
        own = {"lr": config.lr * factor, "lr_scale": group.get("lr_scale", 1.0) * factor}
        for stacked in (1, 3):
            params = [p for p in group["params"] if matrices.get(p) == stacked]
            moved += [{**group, **own, "params": params, "stacked": stacked}] if params else []
        params = [p for p in group["params"] if p not in matrices]
        rest += [{**group, "params": params}] if params else []
    muon = Muon(moved, momentum=config.muon_momentum, adjust_lr_fn=config.muon_adjust)
    adamw = torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    return MuonAdamW(muon, adamw)


def moments(model: nn.Module, config: OptimConfig) -> dict[nn.Parameter, tuple[int, int]]:
    """float32 values that the optimizer keeps of each trained parameter: for each element, and beside them (a
    count of steps)."""
    usual = {"adamw": (2, 1), "muon": (2, 1)}.get(config.opt, (1 if config.momentum else 0, 0))
    matrices = block_matrices(model) if config.opt == "muon" else {}
    return {p: (1, 0) if p in matrices else usual for p in model.parameters() if p.requires_grad}


def optimizer_notes(config: OptimConfig) -> list[str]:
    """Lines for the user on settings that do nothing here, or that the published code reads and forgets."""
    notes = []
    if config.opt == "muon":
        peak = config.lr if config.muon_lr is None else config.muon_lr
        notes.append(
            f"note: --opt muon moves the matrices of blocks (momentum {config.muon_momentum:g}, {peak:g} for "
            f"256 videos, {config.muon_adjust}), AdamW the rest ({config.lr:g})"
        )
    elif config.opt != "adamw":
        kind = f"SGD with {'Nesterov' if config.opt == 'sgd' else 'plain'} momentum {config.momentum:g}"
        notes.append(f"note: --opt {config.opt} is {kind}; --betas and --eps are AdamW's and change nothing")
    if config.warmup_lr:
        notes.append(
            "note: the warm-up starts from --warmup-lr; the published code takes it and starts from 0"
        )
    return notes


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Learning rate at every step: linear from `warmup_lr` to `lr` over `warmup_steps`, then half a cosine
    down to `min_lr`.

    The published schedule exactly, off-by-ones included: step 0 has `warmup_lr` when there is a warm-up, its
    last step has `lr`, and the first step after it has `lr` again. The published code starts from 0: it reads
    `--warmup_lr`, scales it with the batch, and hands it to nothing.
    """

    lr: float
    min_lr: float
    total_steps: int
    warmup_steps: int
    warmup_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise InputError(f"a schedule needs at least one step, not {self.total_steps}")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise InputError(
                f"warm-up of {self.warmup_steps} steps does not fit into {self.total_steps} steps; shorten it"
            )

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / max(self.warmup_steps - 1, 1)
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate `lr` times the group's `lr_scale` (1 where it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def weight_decay_schedule(config: OptimConfig, total_steps: int) -> CosineSchedule | None:
    """Weight decay at every step, as published half a cosine from `weight_decay` to `weight_decay_end`, with
    no warm-up; None where it stays."""
    if config.weight_decay_end is None:
        return None
    first, last = config.weight_decay, config.weight_decay_end
    return CosineSchedule(lr=first, min_lr=last, total_steps=total_steps, warmup_steps=0)


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Give it to every group that decays: those above 0, as published."""
    for group in optimizer.param_groups:
        if group["weight_decay"] > 0:
            group["weight_decay"] = weight_decay


def clip_gradients(model: nn.Module, max_norm: float | None, scale: float = 1.0) -> torch.Tensor:
    """Multiply gradients by `scale`, then shorten them to at most `max_norm`.

    Returns:
        Their norm in between, over all shards, a float32 scalar on the parameters' device; nothing waits for
            it.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm * scale
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0) * scale)
    elif scale != 1:
        torch._foreach_mul_(gradients, scale)
    return norm
