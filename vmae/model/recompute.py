"""Linear layers behind a LayerNorm or a GELU that keep the layer's input only, and make the rest again in the
backward.

Autograd keeps the normalised (or activated) tensor as the linear layer's input, next to the tensor it came
from. Both functions here keep one of the two: of a block's 16 widths per token, 10 remain (x, q, k, v,
attention's output, x, the MLP's 4). What is made again is elementwise; no matrix product is repeated.

Legend: D width in, E width out; a leading `...` stands for clips and tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of `x`: what F.linear would compute in."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _linear_gradients(
    grad: Tensor, inner: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of F.linear(inner, weight, bias) for inner (in the compute dtype), weight and bias (in
    theirs)."""
    rows = grad.flatten(0, -2)
    grad_weight = (rows.T @ inner.flatten(0, -2)).to(weight.dtype)
    grad_bias = None if bias is None else rows.sum(0).to(bias.dtype)
    return grad @ weight.to(grad.dtype), grad_weight, grad_bias


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias, dtype):
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias)
        ctx.eps, ctx.dtype = eps, dtype
        with torch.autocast(x.device.type, enabled=False):
            normed = F.layer_norm(
                x.float(), norm_weight.shape, norm_weight.float(), norm_bias.float(), eps
            ).to(dtype)
            return F.linear(normed, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, grad):
        x, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
        shape, x_float = norm_weight.shape, x.float()
        norm = (norm_weight.float(), norm_bias.float())
        normed, mean, rstd = torch.native_layer_norm(x_float, shape, *norm, ctx.eps)
        grad_normed, grad_weight, grad_bias = _linear_gradients(grad, normed.to(ctx.dtype), weight, bias)
        grad_x, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad_normed.float(), x_float, shape, mean, rstd, *norm, [True, True, True]
        )
        grad_norm = (grad_norm_weight.to(norm_weight.dtype), grad_norm_bias.to(norm_bias.dtype))
        return grad_x.to(x.dtype), *grad_norm, None, grad_weight, grad_bias, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        ctx.save_for_backward(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.gelu(x).to(dtype), weight.to(dtype), bias.to(dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        grad_inner, grad_weight, grad_bias = _linear_gradients(grad, F.gelu(x).to(grad.dtype), weight, bias)
        return torch.ops.aten.gelu_backward(grad_inner.to(x.dtype), x), grad_weight, grad_bias, None


def norm_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(norm(x), weight, bias)`, keeping x alone for the backward.

    Args:
        x: [..., D], at least two dimensions; the statistics are float32 whatever its dtype.
        norm: LayerNorm over D with weight and bias; float32, or what FSDP gathers them in.
        weight: [E, D]; bias: [E] or None.

    Returns:
        [..., E] in autocast's dtype, or that of `x`.
    """
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, weight, bias, _compute_dtype(x))


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear(F.gelu(x), weight, bias)`, keeping x alone for the backward.

    Args:
        x: [..., D], at least two dimensions.
        weight: [E, D]; bias: [E].

    Returns:
        [..., E] in autocast's dtype, or that of `x`.
    """
    return _GeluLinear.apply(x, weight, bias, _compute_dtype(x))
