"""Rows of the decoder's sequence that its last block computes, and their LayerNorm, read in place.

Idea: the loss counts some rows only, and after keys and values a block works on each row for itself: queries,
attention rows, projection and MLP of the rest would be computed for nobody. So the last block begins with
this: in one pass `B * Nk * D` elements are read and twice as many written, the rows themselves (for the
residual sum) and their LayerNorm (for the queries), some 8 FLOPs each. The backward is one pass too: `3 * B *
Nk * D` elements read, `B * M * D` written, zero rows included; the mean and deviation are formed again.

Each program of the backward owns rows of `hidden` and finds their uses by an inverse index, `uses`, made with
the mask: every row is written once whether `keep` is sorted or not. Without `uses` a row may occur twice: the
first place of each row and the next place of each use are found by sorting `keep`, and a row gets the sum of
its gradients in a fixed order. LayerNorm's gradient is linear in the upstream one, so the uses of a row are
added up first.

Legend: B clips, M rows of the decoder's sequence, Nk rows to compute, D width.
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
    hidden: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, uses: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch; same arguments and results as `select_decoded`."""
    clip = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
    rows = hidden[clip, keep.long()]
    return rows, F.layer_norm(rows, weight.shape, weight, bias, eps)


@triton.jit
def row_sum(b_x):
    """[P, R, D] to [R]: parts of a row first, which one thread holds, then across threads."""
    return tl.sum(tl.sum(b_x, 0), 1)


@triton.jit
def normalise_rows(b_x, m_r, m_d, scale, eps):
    """LayerNorm's rows before weight and bias, [P, R, D] float32, and one over the deviation, [R]; 0 and 1
    where masked. `scale` is one over the width."""
    b_x = tl.where(m_d, b_x - (row_sum(b_x) * scale)[None, :, None], 0.0)
    b_rstd = 1 / tl.sqrt_rn(tl.where(m_r, row_sum(b_x * b_x) * scale + eps, 1.0))
    return b_x * b_rstd[None, :, None], b_rstd


@triton.jit
def row_offsets(width, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets in a row and which are inside it, [P, 1, D]: P parts of BLOCK_D values."""
    o_d = (tl.arange(0, BLOCK_P) * BLOCK_D)[:, None, None] + tl.arange(0, BLOCK_D)[None, None, :]
    return o_d, o_d < width


@triton.jit
def select_decoded_fwd_kernel(
    p_hidden, p_weight, p_bias, p_keep, p_rows, p_normed, n_rows, n_keep, width, stride_b, stride_row, eps,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows; with no `p_rows`, their LayerNorm alone."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d, m_d = row_offsets(width, BLOCK_P, BLOCK_D)
    m_r = o_r < n_rows
    m_x = m_r[None, :, None] & m_d
    i_row = tl.load(p_keep + o_r, mask=m_r, other=0).to(tl.int64)
    o_x = (o_r // n_keep) * tl.cast(stride_b, tl.int64) + i_row * stride_row
    o_out = (o_r * width)[None, :, None] + o_d
    b_x = tl.load(p_hidden + o_x[None, :, None] + o_d, mask=m_x, other=0.0)
    if p_rows is not None:
        tl.store(p_rows + o_out, b_x, mask=m_x)
    b_x, _ = normalise_rows(b_x.to(tl.float32), m_r, m_d, 1.0 / width, eps)
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_normed + o_out, round_to(b_x * b_weight + b_bias, p_normed.dtype.element_ty), mask=m_x)


@triton.jit
def load_gradients(p_grad_rows, p_grad_normed, o_use, width, o_d, m_x):
    """Both upstream gradients of places `o_use`, float32 [P, R, D]; 0 where masked."""
    o_grad = (o_use * width)[None, :, None] + o_d
    b_rows = tl.load(p_grad_rows + o_grad, mask=m_x, other=0.0).to(tl.float32)
    return b_rows, tl.load(p_grad_normed + o_grad, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def select_decoded_bwd_kernel(
    p_grad_rows, p_grad_normed, p_hidden, p_weight, p_uses, p_next, p_hidden_grad, p_partial,
    n_hidden, n_keep, width, stride_b, stride_row, eps, rows_per_program,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All rows of a stretch of one clip's `hidden`: their gradient, and the partial sums of weight and bias,
    [parts, 2, D]. With no `p_next`, no row is used twice."""
    i_clip = tl.program_id(1).to(tl.int64)
    o_d, m_d = row_offsets(width, BLOCK_P, BLOCK_D)
    scale = 1.0 / width
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight_sum = tl.zeros([BLOCK_P, BLOCK_R, BLOCK_D], tl.float32)
    b_bias_sum = tl.zeros([BLOCK_P, BLOCK_R, BLOCK_D], tl.float32)
    for o_row in range(0, rows_per_program, BLOCK_R):
        i_row = tl.program_id(0) * rows_per_program + o_row + tl.arange(0, BLOCK_R)
        m_r = (i_row < n_hidden) & (o_row + tl.arange(0, BLOCK_R) < rows_per_program)
        b_use = tl.load(p_uses + i_clip * n_hidden + i_row, mask=m_r, other=n_keep)
        m_kept = b_use < n_keep
        m_x = m_kept[None, :, None] & m_d
        o_x = i_clip * tl.cast(stride_b, tl.int64) + i_row.to(tl.int64) * stride_row
        b_x = tl.load(p_hidden + o_x[None, :, None] + o_d, mask=m_x, other=0.0).to(tl.float32)
        o_use = i_clip * n_keep + b_use
        b_rows, b_grad = load_gradients(p_grad_rows, p_grad_normed, o_use, width, o_d, m_x)
        if p_next is not None:
            b_use = tl.load(p_next + o_use, mask=m_kept, other=n_keep)
            while tl.min(b_use, 0) < n_keep:
                m_more, o_use = b_use < n_keep, i_clip * n_keep + b_use
                m_x = m_more[None, :, None] & m_d
                b_more, b_more_grad = load_gradients(p_grad_rows, p_grad_normed, o_use, width, o_d, m_x)
                b_rows += b_more
                b_grad += b_more_grad
                b_use = tl.load(p_next + o_use, mask=m_more, other=n_keep)
        b_x, b_rstd = normalise_rows(b_x, m_kept, m_d, scale, eps)
        b_weight_sum += b_grad * b_x
        b_bias_sum += b_grad
        b_grad *= b_weight
        b_dot, b_mean = row_sum(b_grad * b_x) * scale, row_sum(b_grad) * scale
        b_grad = b_grad - b_mean[None, :, None] - b_x * b_dot[None, :, None]
        b_grad = round_to(b_grad * b_rstd[None, :, None] + b_rows, p_hidden_grad.dtype.element_ty)
        o_out = ((i_clip * n_hidden + i_row) * width)[None, :, None] + o_d
        tl.store(p_hidden_grad + o_out, b_grad, mask=m_r[None, :, None] & m_d)
    p_out = p_partial + (i_clip * tl.num_programs(0) + tl.program_id(0)) * 2 * width + o_d
    tl.store(p_out, tl.sum(b_weight_sum, 1, keep_dims=True), mask=m_d)
    tl.store(p_out + width, tl.sum(b_bias_sum, 1, keep_dims=True), mask=m_d)


def row_config(width: int, itemsize: int) -> dict:
    """A warp holds whole rows, 16 bytes of each part a thread: sums over a row need no shared memory."""
    block = triton.next_power_of_2(width)
    part = min(block, 512 // itemsize)
    return {"BLOCK_P": block // part, "BLOCK_R": max(1, 4096 // block), "BLOCK_D": part, "num_warps": 8}


# Of the backward: one wave of two on each of an H100's 132 processors. More would be more partial sums.
PROGRAMS = 264


@dev.launcher("hidden")
def select_decoded_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor,
    eps: float,
    dtype: torch.dtype,
    with_rows: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Launches the forward: the rows, unless they are at hand, and their LayerNorm in `dtype`."""
    (batch, count), width = keep.shape, hidden.shape[2]
    shape = (batch, count, width)
    rows = dev.scratch(shape, hidden.dtype, hidden.device) if with_rows else None
    normed = dev.scratch(shape, dtype, hidden.device)
    if normed.numel() == 0:
        return rows, normed
    config = row_config(width, hidden.element_size())
    select_decoded_fwd_kernel[(triton.cdiv(batch * count, config["BLOCK_R"]),)](
        hidden, weight, bias, keep, rows, normed, batch * count, count, width,
        hidden.stride(0), hidden.stride(1), eps, **config,
    )  # fmt: skip
    return rows, normed


def places_of(keep: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Of each of a clip's `rows` its first place in `keep`, int32 [B, M], and of each place the next one with
    the same row, int32 [B, Nk]; Nk where there is none."""
    row, place = keep.long().sort(dim=1, stable=True)
    again, count = row[:, 1:] == row[:, :-1], keep.shape[1]
    following = torch.full_like(row, count)
    following.scatter_(1, place[:, :-1], torch.where(again, place[:, 1:], count))
    first = row.new_full((keep.shape[0], rows), count).scatter_reduce_(1, row, place, "amin")
    return first.int(), following.int()


def check_places(keep: Tensor, uses: Tensor | None, rows: int) -> None:
    """Raises ValueError unless all of `keep` lie in [0, rows) and `uses`, if given, is its inverse. Waits for
    the device."""
    dev.check_indices(keep, rows, "keep")
    if uses is not None:
        first, following = places_of(keep, rows)
        if bool((following < keep.shape[1]).any()) or not torch.equal(first, uses.int()):
            raise ValueError(
                f"uses must be the inverse of keep: the place of each row, {keep.shape[1]} of those not kept"
            )


@dev.launcher("hidden")
def select_decoded_bwd(
    grad_rows: Tensor,
    grad_normed: Tensor,
    hidden: Tensor,
    weight: Tensor,
    keep: Tensor,
    uses: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launches the backward and the second stage: gradient of `hidden`, and float32 [2, D] of weight and
    bias."""
    (batch, rows, width), count = hidden.shape, keep.shape[1]
    hidden_grad = dev.scratch(hidden.shape, hidden.dtype, hidden.device)
    if grad_normed.numel() == 0:
        return hidden_grad.zero_(), grad_normed.new_zeros((2, width), dtype=torch.float32)
    uses, following = (uses, None) if uses is not None else places_of(keep, rows)
    config = row_config(width, hidden.element_size())
    fewest = triton.cdiv(rows, max(1, PROGRAMS // batch))
    each = triton.cdiv(max(fewest, 32), config["BLOCK_R"]) * config["BLOCK_R"]
    stretches = triton.cdiv(rows, each)
    partial = dev.scratch((batch * stretches, 2 * width), torch.float32, hidden.device)
    select_decoded_bwd_kernel[(stretches, batch)](
        grad_rows, grad_normed, hidden, weight, uses, following, hidden_grad, partial, rows, count, width,
        hidden.stride(0), hidden.stride(1), eps, each, **config,
    )  # fmt: skip
    return hidden_grad, dev.reduce_partials(partial, torch.float32).view(2, width)


@torch.library.custom_op("vmae::select_decoded", mutates_args=())
def select_decoded_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor,
    uses: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if dev.checking_indices():
        check_places(keep, uses, hidden.shape[1])
    rows, normed = select_decoded_fwd(hidden, weight, bias, keep, eps, dtype)
    assert rows is not None  # asked for
    return rows, normed


@select_decoded_op.register_fake
def _(hidden, weight, bias, keep, uses, eps, dtype):
    shape = (*keep.shape, hidden.shape[2])
    return hidden.new_empty(shape), hidden.new_empty(shape, dtype=dtype)


@torch.library.custom_op("vmae::select_decoded_normed", mutates_args=())
def select_decoded_normed_op(
    hidden: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """The second result alone: what a backward makes again."""
    return select_decoded_fwd(hidden, weight, bias, keep, eps, dtype, False)[1]


@select_decoded_normed_op.register_fake
def _(hidden, weight, bias, keep, eps, dtype):
    return hidden.new_empty((*keep.shape, hidden.shape[2]), dtype=dtype)


@torch.library.custom_op("vmae::select_decoded_backward", mutates_args=())
def select_decoded_backward_op(
    grad_rows: Tensor,
    grad_normed: Tensor,
    hidden: Tensor,
    weight: Tensor,
    keep: Tensor,
    uses: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return select_decoded_bwd(grad_rows, grad_normed, hidden, weight, keep, uses, eps)


@select_decoded_backward_op.register_fake
def _(grad_rows, grad_normed, hidden, weight, keep, uses, eps):
    return hidden.new_empty(hidden.shape), hidden.new_empty((2, hidden.shape[2]), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, keep, uses, eps, _ = inputs
    ctx.save_for_backward(hidden, weight, keep, uses)
    ctx.eps, ctx.bias_dtype = eps, bias.dtype


def _backward(ctx, grad_rows, grad_normed):
    hidden, weight, keep, uses = ctx.saved_tensors
    hidden_grad, sums = select_decoded_backward_op(
        grad_rows, grad_normed, hidden, weight, keep, uses, ctx.eps
    )
    return hidden_grad, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None, None, None, None


select_decoded_op.register_autograd(_backward, setup_context=_setup_context)


def select_decoded(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor,
    uses: Tensor | None = None,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`hidden[b, keep[b, i]]`, and the LayerNorm of these rows.

    Args:
        hidden: [B, M, D], the decoder's sequence before its last block, visible tokens first.
        weight, bias: [D], of that block's first LayerNorm.
        keep: int32 [B, Nk], rows of `hidden`, in any order; a row may occur twice.
        uses: int32 [B, M], the place in `keep` of each row of `hidden`, Nk where it is not kept: saves the
            backward a sort of `keep`. With it no row may occur twice.
        eps: 0 is legal; a kept row of equal values is NaN then, as in `torch.nn.functional.layer_norm`.
        backend: "torch", "triton" or "auto" (Triton on a GPU).

    Returns:
        Two [B, Nk, D]: the rows, in the dtype of `hidden`; their LayerNorm in the same, or with the Triton
            kernels autocast's, computed in float32. The gradient of rows that are not kept is zero; gradients
            of weight and bias are summed in float32 in a fixed order.

    Cost: 3 * B * Nk * D elements moved; the backward B * (3 Nk + M) * D.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend, indices out of range or `uses` that
            is not the inverse of `keep` when VMAE_CHECK_INDICES=1, "triton" where it cannot run.
    """
    if hidden.ndim != 3 or weight.shape != hidden.shape[2:] or bias.shape != weight.shape:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and bias {list(bias.shape)} do not fit"
        )
    if keep.ndim != 2 or keep.shape[0] != hidden.shape[0]:
        raise ValueError(f"keep must be [B={hidden.shape[0]}, Nk], not {list(keep.shape)}")
    if uses is not None and uses.shape != hidden.shape[:2]:
        raise ValueError(f"uses must be {list(hidden.shape[:2])}, not {list(uses.shape)}")
    dtype = dev.working_dtype(hidden.device.type, hidden.dtype)
    tensors = dict(hidden=hidden, weight=weight, bias=bias, keep=keep, uses=uses)
    if choose_backend("select_decoded", backend, dtype, tensors) == "triton":
        uses = None if uses is None else uses.to(torch.int32)
        return select_decoded_op(hidden, weight, bias, keep.to(torch.int32), uses, eps, dtype)
    if dev.checking_indices():
        check_places(keep, uses, hidden.shape[1])
    if hidden.device.type == "cpu" and hidden.dtype in (torch.bfloat16, torch.float16):
        # torch's LayerNorm sums the gradients of weight and bias in the dtype of the rows there: in bfloat16,
        # over 1,400 rows, 40 % off.
        parameters = weight.float(), bias.float()
        rows, normed = select_decoded_ref(hidden.float(), *parameters, keep, uses, eps)
        return rows.to(hidden.dtype), normed.to(hidden.dtype)
    return select_decoded_ref(hidden, weight, bias, keep, uses, eps)
