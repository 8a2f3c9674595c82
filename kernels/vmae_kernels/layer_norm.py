"""LayerNorm that keeps its statistics, and a backward that gives its result again beside the gradient.

Idea: a linear layer behind a LayerNorm needs the normalised rows twice, as its input and to form its weight's
gradient. Keeping them costs a width a token; forming them again in PyTorch costs passes over float32 copies.
Here the forward is one pass: `R * D` elements read and as many written, some 8 FLOPs each, and 8 bytes a row
kept (mean, one over the deviation). The backward is one pass too: `2 * R * D` elements read, `R * D` written,
or `2 * R * D` with the normalised rows, some 16 FLOPs each. In bf16: 4 bytes an element forward, 8 backward.

Weight and bias get their gradients in two stages, without atomics: each program owns a stretch of rows and
leaves one sum of each column; `reduce_partials` adds them in a fixed order.

Legend: R rows, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae_kernels import device as dev
from vmae_kernels.backend import choose_backend
from vmae_kernels.device import round_to
from vmae_kernels.optional_triton import tl, triton


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain PyTorch; same arguments and result as `layer_norm`."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@triton.jit
def layer_norm_fwd_kernel(
    p_x, p_weight, p_bias, p_out, p_mean, p_rstd, n_rows, width, stride_row, eps, rows_per_program,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A stretch of rows, BLOCK_R at a time."""
    i_first = tl.program_id(0).to(tl.int64) * rows_per_program
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < width
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    for o_row in range(0, rows_per_program, BLOCK_R):
        i_row = i_first + o_row + tl.arange(0, BLOCK_R)
        m_r = i_row < n_rows
        m_x = m_r[:, None] & m_d[None, :]
        p_row = p_x + (i_row * stride_row)[:, None] + o_d[None, :]
        b_x = tl.load(p_row, mask=m_x, other=0.0).to(tl.float32)
        b_mean = tl.sum(b_x, 1) / width
        b_x = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)
        b_rstd = 1 / tl.sqrt_rn(tl.where(m_r, tl.sum(b_x * b_x, 1) / width + eps, 1.0))
        b_out = b_x * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
        p_row = p_out + (i_row * width)[:, None] + o_d[None, :]
        tl.store(p_row, round_to(b_out, p_out.dtype.element_ty), mask=m_x)
        tl.store(p_mean + i_row, b_mean, mask=m_r)
        tl.store(p_rstd + i_row, b_rstd, mask=m_r)


@triton.jit
def layer_norm_bwd_kernel(
    p_grad, p_x, p_weight, p_bias, p_mean, p_rstd, p_grad_x, p_out, p_partial,
    n_rows, width, stride_row, rows_per_program,
    AGAIN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A stretch of rows, BLOCK_R at a time: their gradient, with AGAIN their forward result, and the sums of
    weight's and bias's gradient, [parts, 2, D]."""
    i_first = tl.program_id(0).to(tl.int64) * rows_per_program
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < width
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    if AGAIN:
        b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_bias_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for o_row in range(0, rows_per_program, BLOCK_R):
        i_row = i_first + o_row + tl.arange(0, BLOCK_R)
        m_r = i_row < n_rows
        m_x = m_r[:, None] & m_d[None, :]
        o_x = (i_row * width)[:, None] + o_d[None, :]
        p_row = p_x + (i_row * stride_row)[:, None] + o_d[None, :]
        b_x = tl.load(p_row, mask=m_x, other=0.0).to(tl.float32)
        b_grad = tl.load(p_grad + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_mean = tl.load(p_mean + i_row, mask=m_r, other=0.0)
        b_rstd = tl.load(p_rstd + i_row, mask=m_r, other=0.0)
        b_x = tl.where(m_d[None, :], (b_x - b_mean[:, None]) * b_rstd[:, None], 0.0)
        if AGAIN:
            b_out = b_x * b_weight[None, :] + b_bias[None, :]
            tl.store(p_out + o_x, round_to(b_out, p_out.dtype.element_ty), mask=m_x)
        b_weight_sum += b_grad * b_x
        b_bias_sum += b_grad
        b_grad *= b_weight[None, :]
        b_dot = tl.sum(b_grad * b_x, 1) / width
        b_grad = (b_grad - tl.sum(b_grad, 1)[:, None] / width - b_x * b_dot[:, None]) * b_rstd[:, None]
        tl.store(p_grad_x + o_x, round_to(b_grad, p_grad_x.dtype.element_ty), mask=m_x)
    p_sum = p_partial + tl.program_id(0).to(tl.int64) * 2 * width + o_d
    tl.store(p_sum, tl.sum(b_weight_sum, 0), mask=m_d)
    tl.store(p_sum + width, tl.sum(b_bias_sum, 0), mask=m_d)


# Rows of a forward program, and of a backward one at least: the first load weight and bias once, the second
# leave 8 bytes a column, with 16 rows half a byte an element. Backward programs at most: 4 on each of 132
# processors, as many as the registers hold. Chosen from these counts, not measured.
LEAST_ROWS = 16
MOST_PROGRAMS = 528


def config_of(width: int) -> dict:
    """Rows of a tile by width: 16 values a thread."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_R": max(1, 2048 // block), "BLOCK_D": block, "num_warps": 4}


def bwd_rows(rows: int, block: int) -> int:
    """Rows of a backward program, a multiple of `block`, the rows of a tile."""
    return triton.cdiv(max(LEAST_ROWS, triton.cdiv(rows, MOST_PROGRAMS)), block) * block


@dev.launcher("x")
def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward: result in `dtype`; mean and one over the deviation, float32 [R]."""
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    out = dev.scratch(x.shape, dtype, x.device)
    mean, rstd = (dev.scratch((rows,), torch.float32, x.device) for _ in range(2))
    if out.numel() == 0:
        return out, mean, rstd
    flat, config = x.flatten(0, -2), config_of(width)
    stretch = max(LEAST_ROWS, config["BLOCK_R"])
    layer_norm_fwd_kernel[(triton.cdiv(rows, stretch),)](
        flat, weight, bias, out, mean, rstd, rows, width, flat.stride(0), eps, stretch, **config
    )
    return out, mean, rstd


@dev.launcher("x")
def layer_norm_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward and the second stage: gradient of `x`; with `bias` the forward's result again in
    the dtype of `grad`, else nothing [0]; float32 [2, D] of weight and bias."""
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    grad_x = dev.scratch(x.shape, x.dtype, x.device)
    out = dev.scratch((0,) if bias is None else x.shape, grad.dtype, x.device)
    if grad_x.numel() == 0:
        return grad_x, out, grad.new_zeros((2, width), dtype=torch.float32)
    flat, config = x.flatten(0, -2), config_of(width)
    stretch = bwd_rows(rows, config["BLOCK_R"])
    partial = dev.scratch((triton.cdiv(rows, stretch), 2 * width), torch.float32, x.device)
    layer_norm_bwd_kernel[(partial.shape[0],)](
        grad, flat, weight, bias, mean, rstd, grad_x, out, partial, rows, width, flat.stride(0), stretch,
        AGAIN=bias is not None, **config,
    )  # fmt: skip
    return grad_x, out, dev.reduce_partials(partial, torch.float32).view(2, width)


@torch.library.custom_op("vmae::layer_norm", mutates_args=())
def layer_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return layer_norm_fwd(x, weight, bias, eps, dtype)


@layer_norm_op.register_fake
def _(x, weight, bias, eps, dtype):
    rows = math.prod(x.shape[:-1])
    mean, rstd = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), mean, rstd


@torch.library.custom_op("vmae::layer_norm_backward", mutates_args=())
def layer_norm_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return layer_norm_bwd(grad, x, weight, bias, mean, rstd)


@layer_norm_backward_op.register_fake
def _(grad, x, weight, bias, mean, rstd):
    out = grad.new_empty((0,) if bias is None else x.shape)
    return x.new_empty(x.shape), out, x.new_empty((2, x.shape[-1]), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = bias.dtype


def _backward(ctx, grad, _, __):
    x, weight, mean, rstd = ctx.saved_tensors
    grad_x, _, sums = layer_norm_backward_op(grad, x, weight, None, mean, rstd)
    return grad_x, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None, None


layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm over the last dimension.

    `vmae.model.recompute.norm_linear` calls the two operators below it, for a backward that gives the result
    again.

    Args:
        x: [..., D], at least two dimensions.
        weight, bias: [D].
        eps: 0 is legal; a row of equal values is NaN then, as in `torch.nn.functional.layer_norm`.
        backend: "torch", "triton" or "auto" (Triton on a GPU).

    Returns:
        [..., D] in the dtype of `x`, or with the Triton kernels autocast's, computed in float32. Gradients of
            weight and bias are summed in float32 in a fixed order.

    Cost: 2 * R * D elements moved, 8 bytes a row kept; the backward 3 * R * D elements.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend, "triton" where it cannot run.
    """
    if x.ndim < 2 or weight.shape != x.shape[-1:] or bias.shape != weight.shape:
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)} and bias {list(bias.shape)} do not fit"
        )
    dtype = dev.working_dtype(x.device.type, x.dtype)
    if choose_backend("layer_norm", backend, dtype, dict(x=x, weight=weight, bias=bias)) == "triton":
        return layer_norm_op(x, weight, bias, eps, dtype)[0]
    return layer_norm_ref(x, weight, bias, eps)
