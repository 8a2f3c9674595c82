"""LayerNorm of the rows that the loss counts, read in place from the decoder's output.

Idea: the published code slices the tail off the decoder's output (a copy), normalises all of it and
multiplies it with the head, counted or not. Here `B * Nk * D` elements are read and as many written, in one
pass, some 8 FLOPs each. The backward is one pass too: `2 * B * Nk * D` elements read, `B * M * D` written,
zero rows included; the mean and deviation are formed again.

Each program of the backward owns rows of `hidden` and looks for their uses in `keep` (a few KiB, cached):
every row is written once whether `keep` is sorted or not, and a row that occurs twice gets the sum of its
gradients in a fixed order. LayerNorm's gradient is linear in the upstream one, so the uses of a row are added
up first.

Legend: B clips, M rows of the decoder's sequence, Nk rows that the loss counts, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae_kernels import device as dev
from vmae_kernels.backend import choose_backend
from vmae_kernels.device import round_to
from vmae_kernels.optional_triton import tl, triton


def select_decoded_ref(
    hidden: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, eps: float = 1e-6
) -> Tensor:
    """Plain PyTorch; same arguments and result as `select_decoded`."""
    clip = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
    return F.layer_norm(hidden[clip, keep.long()], weight.shape, weight, bias, eps)


@triton.jit
def normalise_rows(p_x, m_r, m_d, width, eps):
    """LayerNorm's rows before weight and bias, [R, D] float32, and one over the deviation, [R]; 0 and 1 where
    masked."""
    b_x = tl.load(p_x, mask=m_r[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_mean = tl.sum(b_x, 1) / width
    b_x = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = 1 / tl.sqrt_rn(tl.where(m_r, tl.sum(b_x * b_x, 1) / width + eps, 1.0))
    return b_x * b_rstd[:, None], b_rstd


@triton.jit
def select_decoded_fwd_kernel(
    p_hidden, p_weight, p_bias, p_keep, p_out, n_rows, n_keep, width, stride_b, stride_row, eps,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R counted rows."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r, m_d = o_r < n_rows, o_d < width
    m_x = m_r[:, None] & m_d[None, :]
    i_row = tl.load(p_keep + o_r, mask=m_r, other=0).to(tl.int64)
    o_x = (o_r // n_keep) * tl.cast(stride_b, tl.int64) + i_row * stride_row
    b_x, _ = normalise_rows(p_hidden + o_x[:, None] + o_d[None, :], m_r, m_d, width, eps)
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_x = b_x * b_weight[None, :] + b_bias[None, :]
    tl.store(p_out + o_r[:, None] * width + o_d[None, :], round_to(b_x, p_out.dtype.element_ty), mask=m_x)


@triton.jit
def next_use(p_keep, i_row, b_after, n_keep, BLOCK_U: tl.constexpr):
    """For each row the first place after `b_after` where `keep` names it; `n_keep` where none does."""
    b_next = tl.zeros_like(b_after) + n_keep
    for o_use in range(0, n_keep, BLOCK_U):
        o_u = o_use + tl.arange(0, BLOCK_U)
        b_keep = tl.load(p_keep + o_u, mask=o_u < n_keep, other=-1)
        m_hit = (b_keep[None, :] == i_row[:, None]) & (o_u[None, :] > b_after[:, None])
        b_next = tl.minimum(b_next, tl.min(tl.where(m_hit, o_u[None, :], n_keep), 1))
    return b_next


@triton.jit
def select_decoded_bwd_kernel(
    p_grad, p_hidden, p_weight, p_keep, p_hidden_grad, p_partial,
    n_hidden, n_keep, width, stride_b, stride_row, eps, rows_per_program,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """All rows of a stretch of one clip's `hidden`: their gradient, and the partial sums of weight and bias,
    [parts, 2, D]."""
    i_clip = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < width
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight_sum = tl.zeros([BLOCK_D], tl.float32)
    b_bias_sum = tl.zeros([BLOCK_D], tl.float32)
    for o_row in range(0, rows_per_program, BLOCK_R):
        i_row = tl.program_id(0) * rows_per_program + o_row + tl.arange(0, BLOCK_R)
        m_r = (i_row < n_hidden) & (o_row + tl.arange(0, BLOCK_R) < rows_per_program)
        b_use = next_use(p_keep + i_clip * n_keep, i_row, tl.zeros([BLOCK_R], tl.int32) - 1, n_keep, BLOCK_U)
        o_x = i_clip * tl.cast(stride_b, tl.int64) + i_row.to(tl.int64) * stride_row
        p_x = p_hidden + o_x[:, None] + o_d[None, :]
        b_x, b_rstd = normalise_rows(p_x, m_r & (b_use < n_keep), m_d, width, eps)
        b_grad = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        while tl.min(b_use) < n_keep:
            m_use = (m_r & (b_use < n_keep))[:, None] & m_d[None, :]
            o_grad = (i_clip * n_keep + b_use)[:, None] * width + o_d[None, :]
            b_grad += tl.load(p_grad + o_grad, mask=m_use, other=0.0).to(tl.float32)
            b_use = next_use(p_keep + i_clip * n_keep, i_row, b_use, n_keep, BLOCK_U)
        b_weight_sum += tl.sum(b_grad * b_x, 0)
        b_bias_sum += tl.sum(b_grad, 0)
        b_grad *= b_weight[None, :]
        b_dot = tl.sum(b_grad * b_x, 1) / width
        b_grad = (b_grad - tl.sum(b_grad, 1)[:, None] / width - b_x * b_dot[:, None]) * b_rstd[:, None]
        o_out = (i_clip * n_hidden + i_row)[:, None] * width + o_d[None, :]
        b_grad = round_to(b_grad, p_hidden_grad.dtype.element_ty)
        tl.store(p_hidden_grad + o_out, b_grad, mask=m_r[:, None] & m_d[None, :])
    p_out = p_partial + (i_clip * tl.num_programs(0) + tl.program_id(0)) * 2 * width + o_d
    tl.store(p_out, b_weight_sum, mask=m_d)
    tl.store(p_out + width, b_bias_sum, mask=m_d)


def fwd_config(width: int) -> dict:
    block = triton.next_power_of_2(width)
    return {"BLOCK_R": max(1, 4096 // block), "BLOCK_D": block, "num_warps": 4}


def bwd_config(width: int) -> dict:
    """Fewer rows than forward: a row's uses are compared with BLOCK_U indices at a time."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_R": max(2, 4096 // block), "BLOCK_D": block, "BLOCK_U": 256, "num_warps": 8}


ROWS_PER_PROGRAM = 64


@dev.launcher("hidden")
def select_decoded_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Launches the forward."""
    (batch, count), width = keep.shape, hidden.shape[2]
    if dev.checking_indices():
        dev.check_indices(keep, hidden.shape[1], "keep")
    out = dev.scratch((batch, count, width), dtype, hidden.device)
    if out.numel() == 0:
        return out
    config = fwd_config(width)
    select_decoded_fwd_kernel[(triton.cdiv(batch * count, config["BLOCK_R"]),)](
        hidden, weight, bias, keep, out, batch * count, count, width,
        hidden.stride(0), hidden.stride(1), eps, **config,
    )  # fmt: skip
    return out


@dev.launcher("hidden")
def select_decoded_bwd(
    grad: Tensor, hidden: Tensor, weight: Tensor, keep: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Launches the backward and the second stage: gradient of `hidden`, and float32 [2, D] of weight and
    bias."""
    batch, rows, width = hidden.shape
    hidden_grad = dev.scratch(hidden.shape, hidden.dtype, hidden.device)
    if grad.numel() == 0:
        return hidden_grad.zero_(), grad.new_zeros((2, width), dtype=torch.float32)
    stretches = triton.cdiv(rows, ROWS_PER_PROGRAM)
    partial = dev.scratch((batch * stretches, 2 * width), torch.float32, hidden.device)
    select_decoded_bwd_kernel[(stretches, batch)](
        grad, hidden, weight, keep, hidden_grad, partial, rows, keep.shape[1], width,
        hidden.stride(0), hidden.stride(1), eps, ROWS_PER_PROGRAM, **bwd_config(width),
    )  # fmt: skip
    return hidden_grad, dev.reduce_partials(partial, torch.float32).view(2, width)


@torch.library.custom_op("vmae::select_decoded", mutates_args=())
def select_decoded_op(
    hidden: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return select_decoded_fwd(hidden, weight, bias, keep, eps, dtype)


@select_decoded_op.register_fake
def _(hidden, weight, bias, keep, eps, dtype):
    return hidden.new_empty((*keep.shape, hidden.shape[2]), dtype=dtype)


@torch.library.custom_op("vmae::select_decoded_backward", mutates_args=())
def select_decoded_backward_op(
    grad: Tensor, hidden: Tensor, weight: Tensor, keep: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return select_decoded_bwd(grad, hidden, weight, keep, eps)


@select_decoded_backward_op.register_fake
def _(grad, hidden, weight, keep, eps):
    return hidden.new_empty(hidden.shape), grad.new_empty((2, hidden.shape[2]), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, keep, eps, _ = inputs
    ctx.save_for_backward(hidden, weight, keep)
    ctx.eps, ctx.bias_dtype = eps, bias.dtype


def _backward(ctx, grad):
    hidden, weight, keep = ctx.saved_tensors
    hidden_grad, sums = select_decoded_backward_op(grad, hidden, weight, keep, ctx.eps)
    return hidden_grad, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None, None, None


select_decoded_op.register_autograd(_backward, setup_context=_setup_context)


def select_decoded(
    hidden: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm of `hidden[b, keep[b, i]]`.

    Args:
        hidden: [B, M, D], the decoder's output, visible tokens first.
        weight, bias: [D], of the decoder's final LayerNorm.
        keep: int32 [B, Nk], rows of `hidden`, in any order; a row may occur twice.
        eps: 0 is legal; a kept row of equal values is NaN then, as in `torch.nn.functional.layer_norm`.
        backend: "torch", "triton" or "auto" (Triton on a GPU).

    Returns:
        [B, Nk, D] in the dtype of `hidden`, or with the Triton kernels autocast's, computed in float32. The
            gradient of
        rows that are not kept is zero; gradients of weight and bias are summed in float32 in a fixed order.

    Cost: 2 * B * Nk * D elements moved; the backward B * (2 Nk + M) * D.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend, indices out of range when
            VMAE_CHECK_INDICES=1, "triton" where it cannot run.
    """
    if hidden.ndim != 3 or weight.shape != hidden.shape[2:] or bias.shape != weight.shape:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and bias {list(bias.shape)} do not fit"
        )
    if keep.ndim != 2 or keep.shape[0] != hidden.shape[0]:
        raise ValueError(f"keep must be [B={hidden.shape[0]}, Nk], not {list(keep.shape)}")
    dtype = dev.working_dtype(hidden.device.type, hidden.dtype)
    tensors = dict(hidden=hidden, weight=weight, bias=bias, keep=keep)
    if choose_backend("select_decoded", backend, dtype, tensors) == "triton":
        return select_decoded_op(hidden, weight, bias, keep.to(torch.int32), eps, dtype)
    if dev.checking_indices():
        dev.check_indices(keep, hidden.shape[1], "keep")
    if hidden.device.type == "cpu" and hidden.dtype != torch.float32:
        # torch's LayerNorm sums the gradients of weight and bias in the rows' dtype there: in bfloat16, over
        # 1,400 rows, 40 % off.
        weight, bias = weight.float(), bias.float()
        return select_decoded_ref(hidden.float(), weight, bias, keep, eps).to(hidden.dtype)
    return select_decoded_ref(hidden, weight, bias, keep, eps)
