"""Layer-wise learning rates for fine-tuning: the nearer to the pixels, the smaller (Clark et al., 2020; as
published).

Layer 0 is the embedding, layer i + 1 is block i, layer `depth + 1` is all the rest (norms, pooling, head). A
layer's rate is `decay ** (depth + 1 - layer)` times the schedule's.
"""

from __future__ import annotations

import torch
from torch import nn

from vmae.train.optim import OptimConfig, is_decayed, optimizer_of


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter, by its published name."""
    if name.startswith(("patch_embed.", "pos_embed", "cls_token", "mask_token")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_scales(depth: int, decay: float) -> list[float]:
    """The factor of each layer, `depth + 2` of them, the last one 1."""
    return [decay ** (depth + 1 - layer) for layer in range(depth + 2)]


def layer_groups(model: nn.Module, weight_decay: float, depth: int, decay: float) -> list[dict]:
    """Parameter groups of an optimizer: one for each layer, with and without weight decay, in the model's
    order.

    Each has `params`, `weight_decay` and `lr_scale`, which `set_learning_rate` multiplies the rate by.
    """
    scales = layer_scales(depth, decay)
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decayed = layer_of(name, depth), is_decayed(name, parameter)
        empty = {"params": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scales[layer]}
        groups.setdefault((layer, decayed), empty)["params"].append(parameter)
    return list(groups.values())


def build_layer_optimizer(
    model: nn.Module, config: OptimConfig, depth: int, decay: float, *, fused: bool = True
) -> torch.optim.Optimizer:
    """The optimizer over the layers' groups; see `vmae.train.optim.optimizer_of`."""
    return optimizer_of(layer_groups(model, config.weight_decay, depth, decay), model, config, fused=fused)
