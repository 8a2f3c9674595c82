"""Some rows of a sequence: those that the decoder's last block computes.

Beside its attention, no layer of a block mixes rows. So the last block needs keys and values of all rows, and
the rest (queries, attention rows, projection, MLP) of those alone that something reads afterwards: those that
the loss counts. For the backward it keeps x, k and v of all rows, and of these q, attention's output, the
sum after it and the MLP's 4: 3 M + 7 Nk widths where another block keeps 10 M.

Legend: B clips, M rows, Nk rows to compute, D width in, E width out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae_kernels import layer_norm, resolve_backend
from vmae_kernels.device import working_dtype

if TYPE_CHECKING:
    from vmae.model.attention.packed import Lengths


class Rows(NamedTuple):
    """Rows of [B, M, D] that a block computes.

    Attributes:
        keep: int32 [B, Nk], rows of each clip, in any order.
        uses: int32 [B, M], its inverse (see `vmae_kernels.select_decoded`); None where a row may occur twice.
        backend: of `select_decoded`.
        lengths: of packed clips (B is 1): rows kept of each.
    """

    keep: Tensor
    uses: Tensor | None = None
    backend: str = "auto"
    lengths: Lengths | None = None


def _rows_of(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the rows `keep`: clips [B, 1] and rows [B, Nk]."""
    return torch.arange(x.shape[0], device=x.device)[:, None], keep.long()


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm, mean and one over the deviation, all in float32."""
    return torch.native_layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)


class _SelectLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keep, uses, norm_weight, norm_bias, eps, weight, bias, dtype, triton):
        with torch.autocast(x.device.type, enabled=False):
            if triton:
                rows, normed = torch.ops.vmae.select_decoded(
                    x, norm_weight, norm_bias, keep, uses, eps, dtype
                )
            else:
                rows = x[_rows_of(x, keep)]
                normed = _normalise(rows, norm_weight, norm_bias, eps)[0].to(dtype)
            cast = weight.to(dtype)
            ctx.save_for_backward(x, keep, uses, norm_weight, norm_bias, cast)
            ctx.eps, ctx.triton, ctx.dtype = eps, triton, weight.dtype
            ctx.bias_dtype = None if bias is None else bias.dtype
            return rows, F.linear(normed, cast, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, grad_rows, grad):
        x, keep, uses, norm_weight, norm_bias, weight = ctx.saved_tensors
        grad_bias = None if ctx.bias_dtype is None else grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        grad_normed = grad @ weight
        if ctx.triton:
            normed = torch.ops.vmae.select_decoded_normed(
                x, norm_weight, norm_bias, keep, ctx.eps, weight.dtype
            )
            grad_x, (grad_norm_weight, grad_norm_bias) = torch.ops.vmae.select_decoded_backward(
                grad_rows, grad_normed, x, norm_weight, keep, uses, ctx.eps
            )
        else:
            rows = x[_rows_of(x, keep)].float()
            normed, mean, rstd = _normalise(rows, norm_weight, norm_bias, ctx.eps)
            norm, normed = (norm_weight.float(), norm_bias.float()), normed.to(weight.dtype)
            grad_x, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
                grad_normed.float(), rows, norm_weight.shape, mean, rstd, *norm, [True, True, True]
            )
            grad_x = torch.zeros_like(x).index_put_(
                _rows_of(x, keep), (grad_x + grad_rows).to(x.dtype), accumulate=uses is None
            )
        grad_weight = (grad.flatten(0, -2).T @ normed.flatten(0, -2)).to(ctx.dtype)
        grad_norm = grad_norm_weight.to(norm_weight.dtype), grad_norm_bias.to(norm_bias.dtype)
        return grad_x, None, None, *grad_norm, None, grad_weight, grad_bias, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        with torch.autocast(x.device.type, enabled=False):
            return _normalise(x, weight, bias, eps)[0].to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        _, mean, rstd = _normalise(x, weight, bias, ctx.eps)
        norm = (weight.shape, mean, rstd, weight.float(), bias.float())
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad.float(), x.float(), *norm, [True, True, True]
        )
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


def norm_rows(x: Tensor, norm: nn.LayerNorm, backend: str = "auto") -> Tensor:
    """`norm(x)` in the dtype of `x`, keeping x (with Triton mean and deviation too) for the backward.

    PyTorch's own sums the gradients of weight and bias in bfloat16 on a CPU, where rows beyond some hundreds
    are lost: here it computes in float32.
    """
    if resolve_backend(backend, "layer_norm", x, x.dtype) == "triton":
        return layer_norm(x, norm.weight, norm.bias, norm.eps, backend=backend)
    return _Norm.apply(x, norm.weight, norm.bias, norm.eps)


def select_linear(
    x: Tensor, rows: Rows, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rows, and `F.linear(norm(rows), weight, bias)`, keeping x alone for the backward.

    Args:
        x: [B, M, D].
        norm: LayerNorm over D with weight and bias.
        weight: [E, D]; bias: [E] or None.

    Returns:
        [B, Nk, D] in the dtype of `x`; [B, Nk, E] in autocast's dtype, or that of `x`.
    """
    dtype = working_dtype(x.device.type, x.dtype)
    triton = resolve_backend(rows.backend, "select_decoded", x, dtype) == "triton"
    return _SelectLinear.apply(
        x, rows.keep, rows.uses, norm.weight, norm.bias, norm.eps, weight, bias, dtype, triton
    )
