"""The head's projection and the pixel loss in one operation.

Idea: predictions are only ever compared with pixels, so nobody needs all of them at once. Rows are taken in
chunks, and each chunk passes through four steps: cuBLAS forms its predictions; one kernel turns them, in
place, into weighted errors; cuBLAS multiplies the errors with the head (the gradient of `hidden`) and with
the rows (a share of the weight's gradient, float32). Together `6 * B * Nk * P * D` FLOPs, a third of them
without gradients, as in plain PyTorch. A chunk stays in the L2, so what moves from memory are the pixels
(`B * Nk * P` bytes), `hidden` and its gradient.

So gradients are formed in the forward, but for one factor: `upstream * 2 / (P * sum of weights)`, a scalar on
the device that the backward applies to fresh tensors. That keeps it right under gradient accumulation, any
upstream gradient and `retain_graph`. Forming them in the backward instead would save as much (`hidden` for
its gradient) and repeat the projection, a third more FLOPs. float16 is refused: the gradients would be
rounded before a loss scale is known.

Saved: the gradient of `hidden` (B * Nk * D), float32 P * D and P values, one sum. Scratch: a chunk of
predictions in the working dtype (18 MiB at most, and never all of them), float32 P * D values a chunk and P
values every 16 tokens.

Fusing projection and errors in one Triton kernel is predicted to take longer (kernels/README.md).

Legend: B clips, Nk counted tokens, D decoder width, P values of a tubelet in order (t, h, w, c).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae_kernels import device as dev
from vmae_kernels.backend import backend_for, choose_backend
from vmae_kernels.device import round_to
from vmae_kernels.optional_triton import tl, triton
from vmae_kernels.patch_loss import (
    ROWS,
    check_loss_shapes,
    check_tokens,
    load_error,
    loss_config,
    patch_loss_ref,
    patch_size_of,
    tubelet_places,
    weighted_mean_of,
)
from vmae_kernels.tubelets import Statistics, clip_grid


def head_patch_loss_ref(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    clips: Tensor,
    decode: Tensor,
    weight: Tensor,
    normalize: bool = True,
    tubelet_size: int = 2,
    statistics: Statistics | None = None,
) -> Tensor:
    """Plain PyTorch; same arguments and result as `head_patch_loss`."""
    pixels = F.linear(hidden, head_weight, head_bias)
    return patch_loss_ref(pixels, clips, decode, weight, normalize, tubelet_size, statistics)


@triton.jit
def head_error_kernel(
    p_pred, p_clips, p_tokens, p_weight, p_partial, p_bias_partial, first_row, n_rows,
    n_tokens, columns, per_frame, stride_b, stride_t, stride_h, stride_c,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, UINT8: tl.constexpr, NORMALIZE: tl.constexpr,
    WITH_GRAD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A chunk's predictions become weighted errors, in place. Of each program's tokens: the errors' column
    sums, the loss and the sum of the weights."""
    P: tl.constexpr = 3 * DEPTH * PATCH * PATCH
    o_p, m_p = tubelet_places(P, BLOCK_S, BLOCK_Q, BLOCK_N)
    m_slice = tl.arange(0, BLOCK_S)[:, None, None, None] * (BLOCK_Q * BLOCK_N) < P
    b_columns = tl.zeros([BLOCK_S, BLOCK_R, BLOCK_Q, BLOCK_N], tl.float32)
    b_loss = tl.zeros([BLOCK_R, BLOCK_Q], tl.float32)
    b_total = tl.zeros([BLOCK_R], tl.float32)
    for o_row in range(0, ROWS, BLOCK_R):
        # Rows beyond the chunk are copies of its last one, of weight zero: predictions, or errors already.
        i_row = tl.program_id(0) * ROWS + o_row + tl.arange(0, BLOCK_R)
        m_row, i_row = i_row < n_rows, tl.minimum(i_row, n_rows - 1)
        p_row = p_pred + i_row.to(tl.int64) * P
        b_weight = tl.load(p_weight + first_row + i_row, mask=m_row, other=0.0).to(tl.float32)
        b_error = load_error(
            p_row, p_clips, p_tokens, first_row + i_row, n_tokens, columns, per_frame,
            stride_b, stride_t, stride_h, stride_c, PATCH, DEPTH, UINT8, NORMALIZE, BLOCK_S, BLOCK_Q, BLOCK_N,
        )  # fmt: skip
        b_loss += tl.sum(tl.sum(b_error * b_error, 3), 0) * b_weight[:, None]
        b_total += b_weight
        if WITH_GRAD:
            b_error *= b_weight[None, :, None, None]
            b_columns = tl.where(m_slice, b_columns + b_error, 0.0)
            m_out = m_p & m_row[None, :, None, None]
            tl.store(p_row[None, :, None, None] + o_p, round_to(b_error, p_pred.dtype.element_ty), mask=m_out)
    i_part = (first_row // ROWS + tl.program_id(0)).to(tl.int64)
    tl.store(p_partial + 2 * i_part, tl.sum(tl.sum(b_loss, 1)))
    tl.store(p_partial + 2 * i_part + 1, tl.sum(b_total))
    if WITH_GRAD:
        b_columns = tl.sum(b_columns, 1)[:, None, :, :]
        tl.store(p_bias_partial + i_part * P + o_p, b_columns, mask=m_p)


# A chunk of predictions, then errors: a third of an H100's L2, where every step on it should find it.
CHUNK_BYTES = 18 << 20


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows of a chunk, a multiple of 64: even chunks of CHUNK_BYTES at most (but for that multiple), and two
    at least where there are more than 64 rows, so that never all predictions exist."""
    chunks = max(2, triton.cdiv(rows * row_bytes, CHUNK_BYTES))
    return triton.cdiv(triton.cdiv(rows, chunks), 4 * ROWS) * 4 * ROWS


def predict(rows: Tensor, head: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`rows` . `head`^T + `bias` into `out`."""
    if bias is None:
        torch.mm(rows, head.t(), out=out)
    else:
        torch.addmm(bias, rows, head.t(), out=out)


def weight_product(errors: Tensor, rows: Tensor, out: Tensor) -> None:
    """`errors`^T . `rows` into float32 `out`. Only cuBLAS leaves a product of 16-bit numbers in float32;
    elsewhere it is rounded once, as PyTorch's own gradient is."""
    if errors.dtype == torch.float32:
        torch.mm(errors.t(), rows, out=out)
    elif errors.is_cuda and torch.version.hip is None:
        torch.mm(errors.t(), rows, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(errors.t(), rows))


def head_pass(
    hidden: Tensor, head: Tensor, bias: Tensor | None, clips: Tensor, decode: Tensor, weight: Tensor,
    normalize: bool, depth: int, with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, sum of weights, and gradients but for their common factor: of `hidden` [rows, D], of the head
    [P, D] and of its bias [P], the latter two float32."""
    rows, (values, width) = hidden.shape[0], head.shape
    patch, uint8 = patch_size_of(values, depth), clips.dtype == torch.uint8
    clips, where = dev.clip_arguments(clips, decode.shape[1], clip_grid(clips, patch, depth))
    chunk, programs = chunk_rows(rows, values * hidden.element_size()), triton.cdiv(rows, ROWS)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return dev.scratch(shape, dtype, hidden.device)

    errors, partial = scratch(min(chunk, rows), values, dtype=hidden.dtype), scratch(programs, 2)
    hidden_grad = scratch(rows if with_grad else 0, width, dtype=hidden.dtype)
    bias_partial = scratch(programs if with_grad else 0, values)
    weight_partial = scratch(triton.cdiv(rows, chunk) if with_grad else 0, values, width)
    for i, first in enumerate(range(0, rows, chunk)):
        some, count = slice(first, first + chunk), min(chunk, rows - first)
        predict(hidden[some], head, bias, errors[:count])
        head_error_kernel[(triton.cdiv(count, ROWS),)](
            errors, clips, decode, weight, partial, bias_partial, first, count, *where,
            PATCH=patch, DEPTH=depth, UINT8=uint8, NORMALIZE=normalize, WITH_GRAD=with_grad, ROWS=ROWS,
            **loss_config(values, errors.element_size(), uint8),
        )  # fmt: skip
        if with_grad:
            torch.mm(errors[:count], head, out=hidden_grad[some])
            weight_product(errors[:count], hidden[some], weight_partial[i])
    loss, total = weighted_mean_of(partial, values)
    if not with_grad:
        return loss, total, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    weight_grad = dev.reduce_partials(weight_partial.flatten(1), torch.float32).view(values, width)
    return loss, total, hidden_grad, weight_grad, dev.reduce_partials(bias_partial, torch.float32)


@dev.launcher()
def head_patch_loss_fwd(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None,
    clips: Tensor, decode: Tensor, weight: Tensor,
    normalize: bool, depth: int, dtype: torch.dtype, with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches everything. No counted token: a loss of NaN, as 0 / 0 is, and gradients of zero."""
    check_tokens(decode, clips, head_weight.shape[0], depth)
    if decode.numel() > 0:
        bias = None if head_bias is None else head_bias.to(dtype)
        rows = hidden.to(dtype).view(-1, hidden.shape[-1])
        return head_pass(
            rows, head_weight.to(dtype), bias, clips, decode, weight, normalize, depth, with_grad
        )
    zero = weight.new_zeros((), dtype=torch.float32)
    if not with_grad:
        return zero / zero, zero, zero.new_zeros(0), zero.new_zeros(0), zero.new_zeros(0)
    hidden_grad = hidden.new_zeros((0, hidden.shape[-1]), dtype=dtype)
    return (
        zero / zero,
        zero,
        hidden_grad,
        zero.new_zeros(head_weight.shape),
        zero.new_zeros(head_weight.shape[:1]),
    )


@torch.library.custom_op("vmae::head_patch_loss", mutates_args=())
def head_patch_loss_op(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None,
    clips: Tensor, decode: Tensor, weight: Tensor,
    normalize: bool, depth: int, dtype: torch.dtype, with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return head_patch_loss_fwd(
        hidden, head_weight, head_bias, clips, decode, weight, normalize, depth, dtype, with_grad
    )


@head_patch_loss_op.register_fake
def _(hidden, head_weight, head_bias, clips, decode, weight, normalize, depth, dtype, with_grad):
    def like(shape, kind=torch.float32):
        return hidden.new_empty(shape, dtype=kind)

    if not with_grad:
        return like(()), like(()), like(0), like(0), like(0)
    rows = hidden.shape[0] * hidden.shape[1]
    return (
        like(()),
        like(()),
        like((rows, hidden.shape[2]), dtype),
        like(head_weight.shape),
        like(head_weight.shape[:1]),
    )


def _setup_context(ctx, inputs, output):
    hidden, head_weight, head_bias = inputs[:3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.with_grad, ctx.hidden_shape, ctx.values = inputs[-1], hidden.shape, head_weight.shape[0]
    ctx.dtypes = hidden.dtype, head_weight.dtype, None if head_bias is None else head_bias.dtype


def _backward(ctx, upstream, *_):
    if upstream is None or not ctx.with_grad:
        return (None,) * 10
    if torch.is_grad_enabled():
        raise RuntimeError("head_patch_loss cannot be differentiated twice: backend='torch' can")
    total, hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
    factor = upstream * (2.0 / ctx.values) / total
    if hidden_grad.numel() == 0:  # no counted token: an empty sum, where the loss is 0 / 0
        factor = torch.zeros_like(factor)
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
    return (
        (hidden_grad * factor).to(hidden_dtype).view(ctx.hidden_shape) if needs_hidden else None,
        (weight_grad * factor).to(weight_dtype) if needs_weight else None,
        (bias_grad * factor).to(bias_dtype) if needs_bias else None,
        *(None,) * 7,
    )


head_patch_loss_op.register_autograd(_backward, setup_context=_setup_context)


def head_patch_loss(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    clips: Tensor,
    decode: Tensor,
    weight: Tensor,
    normalize: bool = True,
    *,
    tubelet_size: int = 2,
    backend: str = "auto",
    statistics: Statistics | None = None,
) -> Tensor:
    """`patch_loss(hidden @ head_weight.T + head_bias, ...)` (VideoMAE V2, equation 5).

    Args:
        hidden: [B, Nk, D], normalised decoder rows of the counted tokens.
        head_weight: [P, D]; head_bias: [P] or None.
        clips, decode, weight, normalize, tubelet_size, statistics: as in `patch_loss`.
        backend: "torch", "triton" or "auto" (Triton on a GPU; PyTorch there too where gradients in float16
            are wanted).

    Returns:
        float32 scalar; gradients reach `hidden`, `head_weight` and `head_bias` in their own dtype (the latter
            two summed in
        float32), once: they cannot be differentiated again. Where float clips or `weight` need one, "auto" is
            PyTorch.

    The product is formed in the dtype of `hidden`, or autocast's. Under FSDP2 call it inside the forward of
    the module that owns the head, where its weight is gathered.

    Cost: 6 * B * Nk * P * D FLOPs with gradients, 2 without; B * Nk * P pixels read once.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend, indices out of range when
            VMAE_CHECK_INDICES=1, "triton" where it cannot run or where clips or `weight` need a gradient, and
            gradients in float16 with "triton": they are formed before a loss scale is known.
    """
    if head_weight.ndim != 2 or head_weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"head weight {list(head_weight.shape)} does not fit hidden {list(hidden.shape)}")
    if head_bias is not None and head_bias.shape != head_weight.shape[:1]:
        raise ValueError(
            f"head bias {list(head_bias.shape)} does not fit head weight {list(head_weight.shape)}"
        )
    values = head_weight.shape[0]
    check_loss_shapes(hidden.shape[:-1], values, clips, decode, weight, tubelet_size, statistics)
    backend = backend_for("head_patch_loss", backend, statistics)
    dtype = dev.working_dtype(hidden.device.type, hidden.dtype)
    learned = (hidden, head_weight) if head_bias is None else (hidden, head_weight, head_bias)
    with_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned)
    if dtype == torch.float16 and with_grad:
        if backend == "triton":
            raise ValueError(
                "head_patch_loss forms its gradients before a loss scale is known, and float16 would round "
                "them to zero: "
                "use bfloat16, or backend='torch'"
            )
        backend = "torch" if backend == "auto" else backend
    tensors = dict(
        hidden=hidden, head_weight=head_weight, head_bias=head_bias, clips=clips, decode=decode, weight=weight
    )
    if choose_backend("head_patch_loss", backend, dtype, tensors) == "triton":
        tokens = decode.to(torch.int32)
        return head_patch_loss_op(
            hidden, head_weight, head_bias, clips, tokens, weight, normalize, tubelet_size, dtype, with_grad
        )[0]
    check_tokens(decode, clips, values, tubelet_size, statistics)
    return head_patch_loss_ref(
        hidden, head_weight, head_bias, clips, decode, weight, normalize, tubelet_size, statistics
    )
