"""Linear layers behind a LayerNorm or a GELU that keep the layer's input only, and make the rest again in the
backward.

Autograd keeps the normalised (or activated) tensor as the linear layer's input, next to the tensor it came
from. Both functions here keep one of the two: of a block's 16 widths per token, 10 remain (x, q, k, v,
attention's output, x, the MLP's 4). What is made again is elementwise; no matrix product is repeated.

Bytes that a LayerNorm moves per element of a bf16 stream, both directions, two of them in a block: 12 with
the Triton kernels (x read, result written; x and gradient read, gradient and result written), which keep mean
and deviation, 8 bytes a row. PyTorch's own LayerNorm makes both beside the result in one pass, so there
nothing more is kept: on a CPU, whose kernel takes bf16 rows beside float32 weights, 46, elsewhere 72 through
float32 copies. Under torch.compile the plain way is traced whatever the backend: the compiler fuses the casts
and the residual's addition into it (8 bytes forward and 12 to 16 back with both additions, where an operator
that it cannot look into leaves 10 and 14).

A weight is cast once a forward, and the backward takes that copy, as autocast's own linear layers do (2 bytes
a parameter until then; none where FSDP has gathered bf16 already). The copy does not outlive the backward:
AdamW's fused step leaves a parameter's version as it was, so a cache could not see that it is stale.

Rows that are no multiple of 16 bytes (2234 bf16 values in ViT-g's decoder) have no wide loads and no copy
engine. `norm_linear(..., pad=True)` widens its result with zeros, by zero rows of the weight's copy, and
`gelu_linear` takes what is wider than its weight, by zero columns: GELU(0) is 0 and every gradient of the
padding is exactly 0. Parameters keep their shapes.

Legend: D width in, E width out; a leading `...` stands for clips and tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae_kernels.backend import choose_backend
from vmae_kernels.device import working_dtype
from vmae_kernels.layer_norm import layer_norm_backward_op, layer_norm_op


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that names the backend of `norm_linear`: "torch", "triton" or "auto" (Triton on a GPU)."""

    def __init__(self, dim: int, eps: float, backend: str = "auto"):
        super().__init__(dim, eps=eps)
        self.backend = backend


def padded_width(width: int, dtype: torch.dtype) -> int:
    """The next width whose rows are a multiple of 16 bytes."""
    step = max(1, 16 // dtype.itemsize)
    return -(-width // step) * step


def padded(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`parameter` in `dtype`, itself where it is that already, or with zeros behind it up to `shape`, made in
    the same pass."""
    if parameter.shape == shape:
        return parameter.to(dtype)
    wide = parameter.new_zeros(shape, dtype=dtype)
    wide[tuple(slice(side) for side in parameter.shape)].copy_(parameter)
    return wide


def _gradient(wide: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Gradient of a parameter from that of its padded copy."""
    return wide[tuple(slice(side) for side in shape)].to(dtype)


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm in `dtype`, float32 mean and one over the deviation."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        x = x.float()  # CUDA's kernel wants parameters in the dtype of x; a compiler fuses the copy
    normed, mean, rstd = torch.native_layer_norm(x, weight.shape, weight.float(), bias.float(), eps)
    return normed.to(dtype), mean, rstd


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias, dtype, width, backend):
        with torch.autocast(x.device.type, enabled=False):
            if backend == "triton":
                normed, *statistics = layer_norm_op(x, norm_weight, norm_bias, eps, dtype)
            else:
                normed, statistics = _normalise(x, norm_weight, norm_bias, eps, dtype)[0], []
            wide = padded(weight, (width, weight.shape[1]), dtype)
            ctx.save_for_backward(x, norm_weight, norm_bias, wide, *statistics)
            ctx.eps, ctx.weight = eps, (weight.shape, weight.dtype)
            ctx.bias = None if bias is None else (bias.shape, bias.dtype)
            return F.linear(normed, wide, None if bias is None else padded(bias, (width,), dtype))

    @staticmethod
    def backward(ctx, grad):
        x, norm_weight, norm_bias, wide, *statistics = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_bias = None if ctx.bias is None else _gradient(rows.sum(0), *ctx.bias)
        if statistics:
            grad_x, normed, norm_sums = layer_norm_backward_op(
                grad @ wide, x, norm_weight, norm_bias, *statistics
            )
            grad_weight = rows.T @ normed.flatten(0, -2)
        else:
            normed, mean, rstd = _normalise(x, norm_weight, norm_bias, ctx.eps, wide.dtype)
            grad_weight = rows.T @ normed.flatten(0, -2)
            del normed
            grad_x, *norm_sums = torch.ops.aten.native_layer_norm_backward(
                (grad @ wide).float(), x.float(), norm_weight.shape, mean, rstd,
                norm_weight.float(), norm_bias.float(), [True, True, True],
            )  # fmt: skip
        grad_norm = (norm_sums[0].to(norm_weight.dtype), norm_sums[1].to(norm_bias.dtype))
        grad_weight = _gradient(grad_weight, *ctx.weight)
        return grad_x.to(x.dtype), *grad_norm, None, grad_weight, grad_bias, None, None, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        with torch.autocast(x.device.type, enabled=False):
            wide = padded(weight, (weight.shape[0], x.shape[-1]), dtype)
            ctx.save_for_backward(x, wide)
            ctx.weight, ctx.bias_dtype = (weight.shape, weight.dtype), bias.dtype
            return F.linear(F.gelu(x).to(dtype), wide, bias.to(dtype))

    @staticmethod
    def backward(ctx, grad):
        x, wide = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = _gradient(rows.T @ F.gelu(x).to(grad.dtype).flatten(0, -2), *ctx.weight)
        grad_x = torch.ops.aten.gelu_backward((grad @ wide).to(x.dtype), x)
        return grad_x, grad_weight, rows.sum(0).to(ctx.bias_dtype), None


def norm_linear(
    x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None, *, pad: bool = False
) -> Tensor:
    """`F.linear(norm(x), weight, bias)`, keeping x and at most 8 bytes a row for the backward.

    Args:
        x: [..., D], at least two dimensions; the statistics are float32 whatever its dtype.
        norm: LayerNorm over D with weight and bias; float32, or what FSDP gathers them in. A `LayerNorm`
            names its backend; any other one is "auto".
        weight: [E, D]; bias: [E] or None.
        pad: widen E with zeros to rows of a multiple of 16 bytes.

    Returns:
        [..., E] in autocast's dtype, or that of `x`.

    Raises:
        ValueError: an unknown backend, "triton" where it cannot run.
    """
    dtype = working_dtype(x.device.type, x.dtype)
    backend = getattr(norm, "backend", "auto")
    if torch.compiler.is_compiling():
        backend = "torch"
    backend = choose_backend("layer_norm", backend, dtype, dict(x=x, weight=norm.weight, bias=norm.bias))
    width = padded_width(weight.shape[0], dtype) if pad else weight.shape[0]
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, weight, bias, dtype, width, backend)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear(F.gelu(x), weight, bias)`, keeping x alone for the backward.

    Args:
        x: [..., D], at least two dimensions; wider than the weight where `norm_linear` padded it, with zeros.
        weight: [E, D]; bias: [E].

    Returns:
        [..., E] in autocast's dtype, or that of `x`.
    """
    return _GeluLinear.apply(x, weight, bias, working_dtype(x.device.type, x.dtype))
