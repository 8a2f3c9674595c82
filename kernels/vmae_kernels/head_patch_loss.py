"""The head's projection and the pixel loss in one operation.

Idea: predictions are only ever compared with pixels, so nobody needs all of them at once: `2 * B * Nk * D *
P` FLOPs (three times that with both gradients, as in plain PyTorch: no product is repeated), and memory for
one chunk of rows instead of `B
* Nk * P` predictions, targets and gradients.

A chunk's projection ends in its weighted errors, which stay in the working dtype while the two products that
need them are formed: the gradient of `hidden` (cuBLAS: nothing to fuse) and a share of the weight's,
accumulated in float32. So gradients are formed in the forward, but for one factor: `upstream * 2 / (P * sum
of weights)`, a scalar on the device that the backward applies to fresh tensors. That keeps it right under
gradient accumulation, any upstream gradient and `retain_graph`. Forming them in the backward instead would
save as much (`hidden` for its gradient) and repeat the projection, a third more FLOPs. float16 is refused:
the gradients would be rounded before a loss scale is known.

Saved: the gradient of `hidden` (B * Nk * D), float32 P * D and P values, one sum. Scratch: a chunk of errors
in the working dtype (at most 8192 rows, and never all), 6 floats a row for targets, the weight gradient's
partial sums.

Legend: B clips, Nk counted tokens, D decoder width, P values of a tubelet in order (t, h, w, c).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae_kernels import device as dev
from vmae_kernels.backend import choose_backend
from vmae_kernels.device import by_channel, operand, round_to, target_offsets, tubelet_offsets
from vmae_kernels.optional_triton import tl, triton
from vmae_kernels.patch_loss import (
    check_loss_shapes,
    check_tokens,
    load_target_pixels,
    loss_config,
    patch_loss_ref,
    patch_size_of,
    target_affine,
    weighted_mean_of,
)
from vmae_kernels.tubelets import clip_grid


def head_patch_loss_ref(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    clips: Tensor,
    decode: Tensor,
    weight: Tensor,
    normalize: bool = True,
    tubelet_size: int = 2,
) -> Tensor:
    """Plain PyTorch; same arguments and result as `head_patch_loss`."""
    return patch_loss_ref(
        F.linear(hidden, head_weight, head_bias), clips, decode, weight, normalize, tubelet_size
    )


@triton.jit
def target_affine_kernel(
    p_clips, p_tokens, p_affine, n_tokens, columns, per_frame, stride_b, stride_t, stride_h, stride_c,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, UINT8: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One token's three centres and three scales, float32: all that the projection must know of its
    target."""
    P: tl.constexpr = 3 * DEPTH * PATCH * PATCH
    i_row = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    m_p = o_p < P
    o_base = tubelet_offsets(
        p_tokens, i_row, n_tokens, columns, per_frame, stride_b, stride_t, stride_h, PATCH, DEPTH, UINT8
    )
    o_pixel = target_offsets(o_p, stride_t, stride_h, stride_c, PATCH, UINT8)
    b_x = load_target_pixels(p_clips + o_base + o_pixel, m_p, UINT8)
    b_cr, b_cg, b_cb, b_sr, b_sg, b_sb = target_affine(b_x, o_p, m_p, P // 3, UINT8, NORMALIZE)
    tl.store(p_affine + i_row * 6 + 0, b_cr)
    tl.store(p_affine + i_row * 6 + 1, b_cg)
    tl.store(p_affine + i_row * 6 + 2, b_cb)
    tl.store(p_affine + i_row * 6 + 3, b_sr)
    tl.store(p_affine + i_row * 6 + 4, b_sg)
    tl.store(p_affine + i_row * 6 + 5, b_sb)


@triton.jit
def load_affine(p_affine, o_m, o_channel, first: tl.constexpr):
    """Centres (first = 0) or scales (3) of rows x channels."""
    b_r = tl.load(p_affine + o_m * 6 + first)
    b_g = tl.load(p_affine + o_m * 6 + first + 1)
    b_b = tl.load(p_affine + o_m * 6 + first + 2)
    return by_channel(o_channel[None, :], b_r[:, None], b_g[:, None], b_b[:, None])


@triton.jit
def head_error_kernel(
    p_hidden, p_head, p_bias, p_clips, p_tokens, p_weight, p_affine, p_error, p_bias_partial, p_loss_partial,
    first_row, n_rows, n_tokens, width, columns, per_frame, stride_b, stride_t, stride_h, stride_c,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, UINT8: tl.constexpr, HAS_BIAS: tl.constexpr,
    WITH_GRAD: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A BLOCK_M x BLOCK_N tile of a chunk's predictions, never stored: weighted errors, their column sums,
    and the loss."""
    P: tl.constexpr = 3 * DEPTH * PATCH * PATCH
    DTYPE: tl.constexpr = p_hidden.dtype.element_ty
    n_tiles: tl.constexpr = (P + BLOCK_N - 1) // BLOCK_N
    i_m, i_n = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    o_row = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_row < n_rows, o_n < P
    o_m = first_row + tl.minimum(o_row, n_rows - 1)
    p_x = p_hidden + o_m * width
    p_w = p_head + tl.minimum(o_n, P - 1) * width
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for o_k0 in range(0, width, BLOCK_K):
        o_k = o_k0 + tl.arange(0, BLOCK_K)
        if EVEN_K:
            b_x, b_w = tl.load(p_x[:, None] + o_k[None, :]), tl.load(p_w[:, None] + o_k[None, :])
        else:
            m_k = (o_k < width)[None, :]
            b_x = tl.load(p_x[:, None] + o_k[None, :], mask=m_k, other=0.0)
            b_w = tl.load(p_w[:, None] + o_k[None, :], mask=m_k, other=0.0)
        b_acc = tl.dot(operand(b_x, DTYPE), tl.trans(operand(b_w, DTYPE)), b_acc, input_precision=PRECISION)
    if HAS_BIAS:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_base = tubelet_offsets(
        p_tokens, o_m, n_tokens, columns, per_frame, stride_b, stride_t, stride_h, PATCH, DEPTH, UINT8
    )
    o_pixel = target_offsets(o_n, stride_t, stride_h, stride_c, PATCH, UINT8)
    b_pixel = load_target_pixels(p_clips + o_base[:, None] + o_pixel[None, :], m_n[None, :], UINT8)
    b_acc -= (b_pixel - load_affine(p_affine, o_m, o_n % 3, 0)) * load_affine(p_affine, o_m, o_n % 3, 3)
    if P % BLOCK_N != 0:
        b_acc = tl.where(m_n[None, :], b_acc, 0.0)
    # Rows beyond the chunk are copies of its last one, of weight zero.
    b_weight = tl.load(p_weight + o_m, mask=m_m, other=0.0).to(tl.float32)
    i_tile = (first_row // BLOCK_M + i_m).to(tl.int64)
    tl.store(p_loss_partial + i_tile * n_tiles + i_n, tl.sum(tl.sum(b_acc * b_acc, 1) * b_weight))
    if WITH_GRAD:
        b_acc *= b_weight[:, None]
        tl.store(p_bias_partial + i_tile * P + o_n, tl.sum(b_acc, 0), mask=m_n)
        p_out = p_error + o_row[:, None] * P + o_n[None, :]
        tl.store(p_out, round_to(b_acc, DTYPE), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def head_weight_grad_kernel(
    p_error, p_hidden, p_partial, first_row, n_rows, values, width, rows_per_split,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split] [P, D] (+)= errors^T . hidden over the split's rows of one chunk. Chunks run one after
    another."""
    DTYPE: tl.constexpr = p_hidden.dtype.element_ty
    k_tiles = tl.cdiv(width, BLOCK_K)
    i_n, i_k = tl.program_id(0) // k_tiles, tl.program_id(0) % k_tiles
    i_split = tl.program_id(1).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n, m_k = o_n < values, o_k < width
    b_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for o_r0 in range(0, rows_per_split, BLOCK_M):
        o_r = o_r0 + tl.arange(0, BLOCK_M)
        o_row = i_split * rows_per_split + o_r
        m_row = ((o_r < rows_per_split) & (o_row < n_rows))[:, None]
        b_e = tl.load(p_error + o_row[:, None] * values + o_n[None, :], mask=m_row & m_n[None, :], other=0.0)
        p_x = p_hidden + (first_row + o_row)[:, None] * width + o_k[None, :]
        b_x = tl.load(p_x, mask=m_row & m_k[None, :], other=0.0)
        b_acc = tl.dot(tl.trans(operand(b_e, DTYPE)), operand(b_x, DTYPE), b_acc, input_precision=PRECISION)
    p_out = p_partial + (i_split * values + o_n[:, None]) * width + o_k[None, :]
    m_out = m_n[:, None] & m_k[None, :]
    if ADD:
        b_acc += tl.load(p_out, mask=m_out, other=0.0)
    tl.store(p_out, b_acc, mask=m_out)


# Chosen by what `python -m vmae_kernels.build` shows (no spill on any target; 128 x 128 spills 8 to 88 bytes
# in its epilogue), not timed, and never tuned: the tile is part of the order in which sums are formed.
ERROR_CONFIG = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
ERROR_CONFIG_FLOAT32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
WEIGHT_GRAD_CONFIG = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
WEIGHT_GRAD_CONFIG_FLOAT32 = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
CHUNK_ROWS = 8192
# Least rows of one part of the weight gradient's sum.
SPLIT_ROWS = 512


def chunk_rows(rows: int, block: int) -> int:
    """Rows of a chunk, a multiple of the tile: even chunks of at most CHUNK_ROWS, and two at least where
    there is more than a tile, so that never all predictions exist. Errors of 8192 rows of ViT-B are 25 MB in
    bf16: half an H100's L2."""
    chunks = max(2, triton.cdiv(rows, CHUNK_ROWS))
    return triton.cdiv(triton.cdiv(rows, chunks), block) * block


def target_affines(
    clips: Tensor, decode: Tensor, where: tuple[int, ...], patch: int, depth: int, normalize: bool
) -> Tensor:
    """float32 [B * Nk, 6]: three centres and three scales of every counted token."""
    affine = dev.scratch((decode.numel(), 6), torch.float32, clips.device)
    target_affine_kernel[(decode.numel(),)](
        clips, decode, affine, *where,
        PATCH=patch, DEPTH=depth, UINT8=clips.dtype == torch.uint8, NORMALIZE=normalize,
        **loss_config(3 * depth * patch * patch),
    )  # fmt: skip
    return affine


class HeadPass:
    """One pass over the rows of a call, chunk by chunk: holds what the chunks share."""

    def __init__(
        self,
        hidden,
        head_weight,
        head_bias,
        clips,
        decode,
        weight,
        normalize: bool,
        depth: int,
        with_grad: bool,
    ):
        self.rows, self.width = decode.numel(), hidden.shape[-1]
        self.values, self.depth, self.with_grad = head_weight.shape[0], depth, with_grad
        self.patch = patch_size_of(self.values, depth)
        self.hidden, self.head = hidden.view(-1, self.width), head_weight.to(hidden.dtype)
        self.bias, self.decode, self.weight = head_bias, decode, weight
        self.clips, self.where = dev.clip_arguments(
            clips, decode.shape[1], clip_grid(clips, self.patch, depth)
        )
        self.affine = target_affines(self.clips, self.decode, self.where, self.patch, depth, normalize)
        self.precision = dev.dot_precision(hidden.device)
        float32 = hidden.dtype == torch.float32
        self.config = ERROR_CONFIG_FLOAT32 if float32 else ERROR_CONFIG
        self.weight_config = WEIGHT_GRAD_CONFIG_FLOAT32 if float32 else WEIGHT_GRAD_CONFIG
        self.chunk = chunk_rows(self.rows, self.config["BLOCK_M"])
        self.allocate()

    def allocate(self) -> None:
        """Outputs, partial sums, and the errors of one chunk."""
        rows, values, width, like = self.rows, self.values, self.width, self.hidden
        tiles = triton.cdiv(rows, self.config["BLOCK_M"])
        column_tiles = triton.cdiv(values, self.config["BLOCK_N"])
        self.loss_partial = dev.scratch((tiles, column_tiles), torch.float32, like.device)
        self.error = self.hidden_grad = self.bias_partial = self.weight_partial = None
        if not self.with_grad:
            return
        self.error = dev.scratch((min(self.chunk, rows), values), like.dtype, like.device)
        self.hidden_grad = dev.scratch((rows, width), like.dtype, like.device)
        self.bias_partial = dev.scratch((tiles, values), torch.float32, like.device)
        grid = triton.cdiv(values, self.weight_config["BLOCK_N"]) * triton.cdiv(
            width, self.weight_config["BLOCK_K"]
        )
        self.weight_tiles, self.splits = grid, max(1, min(264 // grid, self.chunk // SPLIT_ROWS))
        self.weight_partial = dev.scratch((self.splits, values * width), torch.float32, like.device)

    def errors(self, first: int, count: int) -> None:
        """The chunk's weighted errors, its part of the loss and of the bias' gradient."""
        config = self.config
        tiles = triton.cdiv(count, config["BLOCK_M"]) * self.loss_partial.shape[1]
        head_error_kernel[(tiles,)](
            self.hidden, self.head, self.bias, self.clips, self.decode, self.weight, self.affine,
            self.error, self.bias_partial, self.loss_partial,
            first, count, self.where[0], self.width, *self.where[1:],
            PATCH=self.patch, DEPTH=self.depth, UINT8=self.clips.dtype == torch.uint8,
            HAS_BIAS=self.bias is not None, WITH_GRAD=self.with_grad,
            EVEN_K=self.width % config["BLOCK_K"] == 0, PRECISION=self.precision, **config,
        )  # fmt: skip

    def products(self, first: int, count: int) -> None:
        """The two products that need the chunk's errors."""
        assert self.error is not None and self.hidden_grad is not None
        torch.mm(self.error[:count], self.head, out=self.hidden_grad[first : first + count])
        head_weight_grad_kernel[(self.weight_tiles, self.splits)](
            self.error, self.hidden, self.weight_partial, first, count, self.values, self.width,
            triton.cdiv(count, self.splits), ADD=first > 0, PRECISION=self.precision, **self.weight_config,
        )  # fmt: skip

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Loss, sum of weights, and gradients but for their common factor: hidden's, the weight's and the
        bias' (float32)."""
        for first in range(0, self.rows, self.chunk):
            count = min(self.chunk, self.rows - first)
            self.errors(first, count)
            if self.with_grad:
                self.products(first, count)
        loss, total = weighted_mean_of(self.loss_partial, self.weight, self.values)
        if not self.with_grad:
            return loss, total, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)
        assert self.hidden_grad is not None
        assert self.weight_partial is not None and self.bias_partial is not None
        weight_grad = self.weight_partial
        if self.splits > 1:
            weight_grad = dev.reduce_partials(weight_grad, torch.float32)
        bias_grad = dev.reduce_partials(self.bias_partial, torch.float32)
        return loss, total, self.hidden_grad, weight_grad.view(self.values, self.width), bias_grad


@dev.launcher()
def head_patch_loss_fwd(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None,
    clips: Tensor, decode: Tensor, weight: Tensor,
    normalize: bool, depth: int, dtype: torch.dtype, with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches everything. No counted token: a loss of NaN, as 0 / 0 is, and gradients of zero."""
    check_tokens(decode, clips, head_weight.shape[0], depth)
    if decode.numel() > 0:
        inputs = (hidden.to(dtype), head_weight, head_bias, clips, decode, weight)
        return HeadPass(*inputs, normalize, depth, with_grad).run()
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
) -> Tensor:
    """`patch_loss(hidden @ head_weight.T + head_bias, ...)` (VideoMAE V2, equation 5).

    Args:
        hidden: [B, Nk, D], normalised decoder rows of the counted tokens.
        head_weight: [P, D]; head_bias: [P] or None.
        clips, decode, weight, normalize, tubelet_size: as in `patch_loss`.
        backend: "torch", "triton" or "auto" (Triton on a GPU; PyTorch there too where gradients in float16
            are wanted).

    Returns:
        float32 scalar; gradients reach `hidden`, `head_weight` and `head_bias` in their own dtype (the latter
            two summed in
        float32), once: they cannot be differentiated again. Where float clips or `weight` need one, "auto" is
            PyTorch.

    The product is formed in the dtype of `hidden`, or autocast's. Under FSDP2 call it inside the forward of
    the module that owns the head, where its weight is gathered.

    Cost: 6 * B * Nk * P * D FLOPs with gradients, 2 without; B * Nk * P pixels read twice.

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
    check_loss_shapes(hidden.shape[:-1], head_weight.shape[0], clips, decode, weight, tubelet_size)
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
    check_tokens(decode, clips, head_weight.shape[0], tubelet_size)
    return head_patch_loss_ref(hidden, head_weight, head_bias, clips, decode, weight, normalize, tubelet_size)
