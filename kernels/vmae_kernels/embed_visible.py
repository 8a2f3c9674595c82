"""Tokens of the visible tubelets, straight from the clip.

Idea: the published code embeds all N tubelets of a clip and keeps the few that the encoder sees. Here only
those few are read: `Nv * P` bytes of a uint8 clip (P = 1536 at patch 16, 1176 at patch 14), the weight once,
`Nv * D` tokens written; `2 * Nv * P * D` FLOPs instead of `2 * N * P * D`. The backward reads the pixels
again (`Nv * P` bytes, as many FLOPs as the forward); what is saved are the indices and the clip itself.

Normalisation is folded into the weight, around a pixel value of 114: `W . (x/255 - mean)/std = W' . (x - 114)
+ shift`, `W' = W / (255 std)`, `shift` float32. `x - 114` is an integer of 8 bits, exact in bf16, so only the
weight is rounded. Measured on a CPU against float64, K = 1536, as a share of the error of autocast's way,
which rounds normalised pixels and weight to bf16 (`pytest -s tests/kernels/test_embed_visible.py -k
folding`): folded around 114, 0.70; folded around 0, 1.33; a weight that is bf16 already, with normalised
pixels rounded in registers, 0.71. So folding around 114 is kept: it wins or draws, for one integer
subtraction a pixel instead of two float operations, and makes the weight's gradient exact but for the
upstream gradient's own rounding. `W'` is scaled by 64 (exactly), which keeps it in fp16's normal range.

Legend: B clips, T frames, H x W pixels, Nv visible tokens, N all tokens, D width, t x p x p tubelet, K = 3 t
p p.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae_kernels import device as dev
from vmae_kernels.backend import choose_backend
from vmae_kernels.device import (
    CENTRE,
    MEAN_B,
    MEAN_G,
    MEAN_R,
    STD_B,
    STD_G,
    STD_R,
    by_channel,
    load_pixels,
    operand,
    pixel_offsets,
    round_to,
    tubelet_offsets,
)
from vmae_kernels.optional_triton import TensorDescriptor, tl, triton
from vmae_kernels.tubelets import clip_grid, gather_tubelets, normalise

FOLD = tl.constexpr(64.0)


def embed_visible_ref(
    clips: Tensor, visible: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor
) -> Tensor:
    """Plain PyTorch; same arguments and result as `embed_visible`."""
    tubelet_size, patch_size = weight.shape[2], weight.shape[3]
    pixels = gather_tubelets(clips, visible, patch_size, tubelet_size)
    if clips.dtype == torch.uint8:
        pixels = normalise(pixels)
    # Channel-first like the weight: the permuted copy is made of few pixels, not of the whole weight.
    flat = pixels.permute(0, 1, 5, 2, 3, 4).flatten(2).to(weight.dtype)
    tokens = F.linear(flat, weight.flatten(1), bias)
    return tokens + pos.flatten(0, -2)[visible.long()].to(tokens.dtype)


@triton.jit
def embed_visible_fold_kernel(
    p_weight, p_bias, p_folded, p_shift, K, stride_folded,
    HAS_BIAS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of the weight in the clip's pixel order and working dtype, folded for uint8 clips, and its
    float32 shift."""
    i_d = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_shift = tl.load(p_bias + i_d).to(tl.float32) if HAS_BIAS else 0.0
    if CHANNELS_LAST:
        o_c = o_k % 3
        b_w = tl.load(p_weight + i_d * K + o_c * (K // 3) + o_k // 3, mask=m_k, other=0.0).to(tl.float32)
        b_w = b_w * by_channel(o_c, 1 / (255 * STD_R), 1 / (255 * STD_G), 1 / (255 * STD_B))
        b_shift += tl.sum(
            b_w * by_channel(o_c, CENTRE - 255 * MEAN_R, CENTRE - 255 * MEAN_G, CENTRE - 255 * MEAN_B)
        )
        b_w *= FOLD
    else:
        b_w = tl.load(p_weight + i_d * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_w = round_to(b_w, p_folded.dtype.element_ty)
    tl.store(p_folded + i_d * stride_folded + o_k, b_w, mask=o_k < stride_folded)
    tl.store(p_shift + i_d, b_shift)


@triton.jit
def embed_visible_fwd_kernel(
    p_clips, p_visible, p_weight, p_shift, p_pos, p_out,
    n_rows, n_visible, width, columns, per_frame, stride_b, stride_t, stride_h, stride_c, stride_w,
    DESCRIPTOR: tl.constexpr, PATCH: tl.constexpr, DEPTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A BLOCK_M x BLOCK_N tile of tokens. One 64-bit base per row; offsets inside a tubelet are 32-bit. The
    weight comes through a descriptor (`p_weight` is one) where the device has a copy engine, else through a
    pointer."""
    K: tl.constexpr = 3 * DEPTH * PATCH * PATCH
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    n_tiles = tl.cdiv(width, BLOCK_N)
    i_m, i_n = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < n_rows
    o_m = tl.minimum(o_m, n_rows - 1)
    o_base = tubelet_offsets(
        p_visible,
        o_m,
        n_visible,
        columns,
        per_frame,
        stride_b,
        stride_t,
        stride_h,
        PATCH,
        DEPTH,
        CHANNELS_LAST,
    )
    p_rows = p_clips + o_base
    if not DESCRIPTOR:
        p_rows_w = p_weight + tl.minimum(i_n * BLOCK_N + tl.arange(0, BLOCK_N), width - 1) * stride_w
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for o_k0 in range(0, K, BLOCK_K):
        o_k = o_k0 + tl.arange(0, BLOCK_K)
        o_pixel = pixel_offsets(o_k, stride_t, stride_h, stride_c, PATCH, DEPTH, CHANNELS_LAST)
        p_pixels = p_rows[:, None] + o_pixel[None, :]
        b_x = load_pixels(p_pixels, (o_k < K)[None, :], CHANNELS_LAST, K % BLOCK_K != 0, DTYPE)
        if DESCRIPTOR:
            b_w = p_weight.load([i_n * BLOCK_N, o_k0])
        else:
            b_w = tl.load(p_rows_w[:, None] + o_k[None, :], mask=(o_k < stride_w)[None, :], other=0.0)
        b_acc = tl.dot(b_x, tl.trans(operand(b_w, DTYPE)), b_acc, input_precision=PRECISION)
    if CHANNELS_LAST:
        b_acc *= 1 / FOLD
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < width
    m_out = m_m[:, None] & m_n[None, :]
    b_token = tl.load(p_visible + o_m).to(tl.int64)
    b_acc += tl.load(p_shift + o_n, mask=m_n, other=0.0)[None, :]
    b_acc += tl.load(p_pos + b_token[:, None] * width + o_n[None, :], mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out + o_m[:, None] * width + o_n[None, :], round_to(b_acc, DTYPE), mask=m_out)


@triton.jit
def embed_visible_bwd_weight_kernel(
    p_grad, p_clips, p_visible, p_partial,
    n_rows, n_visible, width, columns, per_frame, stride_b, stride_t, stride_h, stride_c, rows_per_split,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split] [D, K] = grad^T . pixels over the split's rows; pixels are gathered again."""
    K: tl.constexpr = 3 * DEPTH * PATCH * PATCH
    DTYPE: tl.constexpr = p_grad.dtype.element_ty
    k_tiles = tl.cdiv(K, BLOCK_K)
    i_n, i_k = tl.program_id(0) // k_tiles, tl.program_id(0) % k_tiles
    i_split = tl.program_id(1).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n, m_k = o_n < width, o_k < K
    o_pixel = pixel_offsets(o_k, stride_t, stride_h, stride_c, PATCH, DEPTH, CHANNELS_LAST)
    b_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for o_row in range(0, rows_per_split, BLOCK_M):
        o_r = o_row + tl.arange(0, BLOCK_M)
        o_m = i_split * rows_per_split + o_r
        m_m = (o_r < rows_per_split) & (o_m < n_rows)
        o_m = tl.minimum(o_m, n_rows - 1)
        o_base = tubelet_offsets(
            p_visible,
            o_m,
            n_visible,
            columns,
            per_frame,
            stride_b,
            stride_t,
            stride_h,
            PATCH,
            DEPTH,
            CHANNELS_LAST,
        )
        p_pixels = p_clips + o_base[:, None] + o_pixel[None, :]
        b_x = load_pixels(p_pixels, m_k[None, :], CHANNELS_LAST, K % BLOCK_K != 0, DTYPE)
        m_grad = m_m[:, None] & m_n[None, :]
        b_grad = tl.load(p_grad + o_m[:, None] * width + o_n[None, :], mask=m_grad, other=0.0)
        b_acc = tl.dot(tl.trans(operand(b_grad, DTYPE)), b_x, b_acc, input_precision=PRECISION)
    p_out = p_partial + (i_split * width + o_n[:, None]) * K + o_k[None, :]
    tl.store(p_out, b_acc, mask=m_n[:, None] & m_k[None, :])


@triton.jit
def embed_visible_bwd_finish_kernel(
    p_partial, p_sums, p_weight_grad, p_bias_grad, n_splits, n_parts, width, K,
    CHANNELS_LAST: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Second stage for one row of the weight: sum of the partials, normalisation undone, back in (c, t, h, w)
    order."""
    i_d = tl.program_id(0).to(tl.int64)
    b_sum = 0.0
    for o_part in range(0, n_parts, BLOCK_R):
        o_r = o_part + tl.arange(0, BLOCK_R)
        b_sum += tl.sum(tl.load(p_sums + o_r * width + i_d, mask=o_r < n_parts, other=0.0))
    tl.store(p_bias_grad + i_d, b_sum)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    o_c = o_k // (K // 3)
    o_source = o_k % (K // 3) * 3 + o_c if CHANNELS_LAST else o_k
    b_grad = tl.zeros([BLOCK_K], tl.float32)
    for i_split in range(0, n_splits):
        b_grad += tl.load(p_partial + (i_split * width + i_d) * K + o_source, mask=m_k, other=0.0)
    if CHANNELS_LAST:
        b_grad *= by_channel(o_c, 1 / (255 * STD_R), 1 / (255 * STD_G), 1 / (255 * STD_B))
        b_grad += b_sum * by_channel(
            o_c,
            (CENTRE / 255 - MEAN_R) / STD_R,
            (CENTRE / 255 - MEAN_G) / STD_G,
            (CENTRE / 255 - MEAN_B) / STD_B,
        )
    tl.store(p_weight_grad + i_d * K + o_k, round_to(b_grad, p_weight_grad.dtype.element_ty), mask=m_k)


@triton.jit
def embed_visible_bwd_pos_kernel(p_grad, p_order, p_bounds, p_pos_grad, width, BLOCK_D: tl.constexpr):
    """Gradient of one position: the rows that used it, in a fixed order."""
    i_token = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    first = tl.load(p_bounds + i_token)
    last = tl.load(p_bounds + i_token + 1)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for i_use in range(first, last):
        i_row = tl.load(p_order + i_use)
        b_sum += tl.load(p_grad + i_row * width + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_pos_grad + i_token * width + o_d, round_to(b_sum, p_pos_grad.dtype.element_ty), mask=m_d)


# First: the default; the others may win with VMAE_AUTOTUNE=1. Chosen by what `python -m vmae_kernels.build`
# shows: the largest tiles that build without a spill (128 x 256 spills 240 to 4,000 bytes on NVIDIA). Not
# timed. Where there is no copy engine, the weight's pointers take registers, so the tile is shallower. Three
# products a float32 value ask for smaller ones.
FWD_CONFIGS = [
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4},
]
FWD_CONFIGS_POINTER = [
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
]
FWD_CONFIGS_FLOAT32 = [{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}]
BWD_CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
]
BWD_CONFIGS_FLOAT32 = [{"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}]


def fwd_configs(dtype: torch.dtype, descriptor: bool) -> list[dict]:
    if dtype == torch.float32:
        return FWD_CONFIGS_FLOAT32
    return FWD_CONFIGS if descriptor else FWD_CONFIGS_POINTER


def bwd_configs(dtype: torch.dtype) -> list[dict]:
    return BWD_CONFIGS_FLOAT32 if dtype == torch.float32 else BWD_CONFIGS


def fold_weight(
    weight: Tensor, bias: Tensor | None, channels_last: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weight as the forward kernel reads it, [D, K padded], and the float32 shift [D]."""
    width, values = weight.shape[0], weight[0].numel()
    folded = dev.scratch((width, dev.padded_width(values)), dtype, weight.device)
    shift = dev.scratch((width,), torch.float32, weight.device)
    embed_visible_fold_kernel[(width,)](
        weight, bias, folded, shift, values, folded.shape[1], HAS_BIAS=bias is not None,
        CHANNELS_LAST=channels_last, BLOCK_K=triton.next_power_of_2(folded.shape[1]), num_warps=4,
    )  # fmt: skip
    return folded, shift


@dev.launcher()
def embed_visible_fwd(
    clips: Tensor, visible: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor, dtype: torch.dtype
) -> Tensor:
    """Launches the fold and the projection."""
    width, _, depth, patch, _ = weight.shape
    batch, tokens = visible.shape
    channels_last = clips.dtype == torch.uint8
    if dev.checking_indices():
        dev.check_indices(visible, pos.numel() // width, "visible")
    out = dev.scratch((batch, tokens, width), dtype, clips.device)
    if out.numel() == 0:
        return out
    clips, where = dev.clip_arguments(clips, tokens, clip_grid(clips, patch, depth))
    folded, shift = fold_weight(weight, bias, channels_last, dtype)
    descriptor = dev.has_copy_engine(clips.device)
    configs = fwd_configs(dtype, descriptor)

    def launch(config: dict) -> None:
        table_w = (
            TensorDescriptor.from_tensor(folded, [config["BLOCK_N"], config["BLOCK_K"]])
            if descriptor
            else folded
        )
        tiles = triton.cdiv(batch * tokens, config["BLOCK_M"]) * triton.cdiv(width, config["BLOCK_N"])
        embed_visible_fwd_kernel[(tiles,)](
            clips, visible, table_w, shift, pos, out,
            batch * tokens, where[0], width, *where[1:], folded.shape[1],
            DESCRIPTOR=descriptor, PATCH=patch, DEPTH=depth, CHANNELS_LAST=channels_last,
            PRECISION=dev.dot_precision(clips.device), **config,
        )  # fmt: skip

    launch(dev.choose_config("embed_visible_fwd", configs, (batch * tokens, width, patch, dtype), launch))
    return out


def weight_grad_splits(rows: int, tiles: int) -> int:
    """Into how many parts the rows of a weight gradient are cut: enough for two programs on each of 132
    processors, no part under 256 rows. A function of the shape alone, so that the sum's order is."""
    return max(1, min(264 // tiles, rows // 256))


def weight_and_bias_grads(
    grad: Tensor, clips: Tensor, visible: Tensor, patch: int, depth: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Launches the sums of the bias, the weight's partial sums and their second stage: [D, K] in `dtype`, [D]
    float32."""
    batch, tokens, width = grad.shape
    values, channels_last = 3 * depth * patch * patch, clips.dtype == torch.uint8
    found = dev.scratch((width, values), dtype, grad.device)
    bias_grad = dev.scratch((width,), torch.float32, grad.device)
    if grad.numel() == 0:
        return found.zero_(), bias_grad.zero_()
    clips, where = dev.clip_arguments(clips, tokens, clip_grid(clips, patch, depth))
    rows, sums = batch * tokens, dev.column_sum_partials(grad)

    def launch(config: dict) -> Tensor:
        tiles = triton.cdiv(width, config["BLOCK_N"]) * triton.cdiv(values, config["BLOCK_K"])
        splits = weight_grad_splits(rows, tiles)
        partial = dev.scratch((splits, width, values), torch.float32, grad.device)
        embed_visible_bwd_weight_kernel[(tiles, splits)](
            grad, clips, visible, partial, rows, where[0], width, *where[1:], triton.cdiv(rows, splits),
            PATCH=patch, DEPTH=depth, CHANNELS_LAST=channels_last,
            PRECISION=dev.dot_precision(clips.device), **config,
        )  # fmt: skip
        return partial

    config = dev.choose_config(
        "embed_visible_bwd", bwd_configs(grad.dtype), (rows, width, patch, grad.dtype), launch
    )
    partial = launch(config)
    embed_visible_bwd_finish_kernel[(width,)](
        partial, sums, found, bias_grad, partial.shape[0], sums.shape[0], width, values,
        CHANNELS_LAST=channels_last, BLOCK_K=triton.next_power_of_2(values), BLOCK_R=32, num_warps=8,
    )  # fmt: skip
    return found, bias_grad


def positions_grad(grad: Tensor, visible: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Gradient of learned positions, [count, D]: a stable sort of the indices makes each position's uses
    adjacent."""
    width = grad.shape[-1]
    ordered, order = torch.sort(visible.flatten(), stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(count + 1, dtype=ordered.dtype, device=ordered.device))
    found = dev.scratch((count, width), dtype, grad.device)
    block = min(256, triton.next_power_of_2(width))
    embed_visible_bwd_pos_kernel[(count, triton.cdiv(width, block))](
        grad, order, bounds, found, width, BLOCK_D=block, num_warps=1
    )
    return found


@dev.launcher()
def embed_visible_bwd(
    grad: Tensor, clips: Tensor, visible: Tensor, patch: int, depth: int, count: int,
    weight_dtype: torch.dtype, pos_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward: gradients of weight [D, K], bias (float32) and `count` positions (empty without
    `pos_dtype`)."""
    grads = weight_and_bias_grads(grad, clips, visible, patch, depth, weight_dtype)
    return *grads, grad.new_empty(0) if pos_dtype is None else positions_grad(grad, visible, count, pos_dtype)


@torch.library.custom_op("vmae::embed_visible", mutates_args=())
def embed_visible_op(
    clips: Tensor, visible: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor, dtype: torch.dtype
) -> Tensor:
    return embed_visible_fwd(clips, visible, weight, bias, pos, dtype)


@embed_visible_op.register_fake
def _(clips, visible, weight, bias, pos, dtype):
    return clips.new_empty((*visible.shape, weight.shape[0]), dtype=dtype)


@torch.library.custom_op("vmae::embed_visible_backward", mutates_args=())
def embed_visible_backward_op(
    grad: Tensor, clips: Tensor, visible: Tensor, patch: int, depth: int, count: int,
    weight_dtype: torch.dtype, pos_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return embed_visible_bwd(grad, clips, visible, patch, depth, count, weight_dtype, pos_dtype)


@embed_visible_backward_op.register_fake
def _(grad, clips, visible, patch, depth, count, weight_dtype, pos_dtype):
    width = grad.shape[-1]
    pos_grad = grad.new_empty(0) if pos_dtype is None else grad.new_empty((count, width), dtype=pos_dtype)
    weight_grad = grad.new_empty((width, 3 * depth * patch * patch), dtype=weight_dtype)
    return weight_grad, grad.new_empty((width,), dtype=torch.float32), pos_grad


def _setup_context(ctx, inputs, output):
    clips, visible, weight, bias, pos, _ = inputs
    ctx.save_for_backward(clips, visible)
    ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.pos_shape, ctx.pos_dtype = pos.shape, pos.dtype


def _backward(ctx, grad):
    clips, visible = ctx.saved_tensors
    width, _, depth, patch, _ = ctx.weight_shape
    _, _, needs_weight, needs_bias, needs_pos, _ = ctx.needs_input_grad
    count, pos_dtype = ctx.pos_shape.numel() // width, ctx.pos_dtype if needs_pos else None
    weight_grad, bias_grad, pos_grad = embed_visible_backward_op(
        grad, clips, visible, patch, depth, count, ctx.weight_dtype, pos_dtype
    )
    return (
        None,
        None,
        weight_grad.view(ctx.weight_shape) if needs_weight else None,
        bias_grad.to(ctx.bias_dtype) if needs_bias else None,
        pos_grad.view(ctx.pos_shape) if needs_pos else None,
        None,
    )


embed_visible_op.register_autograd(_backward, setup_context=_setup_context)


def embed_visible(
    clips: Tensor, visible: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor, *, backend: str = "auto"
) -> Tensor:
    """`W . normalise(tubelet(clip, v)) + bias + pos[v]` for every visible token v (VideoMAE V2, section 3.1).

    Args:
        clips: uint8 [B, T, H, W, 3], normalised with the ImageNet mean and deviation on the way; or float [B,
            3, T, H, W], normalised already.
        visible: int32 [B, Nv], token indices; duplicates are legal, others than 0 ... N - 1 are not.
        weight: [D, 3, t, p, p], the Conv3d weight: float32, bfloat16 or float16.
        bias: [D] or None.
        pos: [N, D] or [1, N, D], positions; they get a gradient when they need one.
        backend: "torch", "triton" or "auto" (Triton on a GPU).

    Returns:
        [B, Nv, D] in the weight's dtype, or autocast's. Gradients reach weight, bias and pos, in their own
            dtype and summed in
        float32. The kernels form none of pixels; where float clips need one, "auto" is PyTorch.

    Cost: B * Nv * K bytes of a uint8 clip read (K = 3 t p p), B * Nv * D tokens written, 2 * B * Nv * K * D
    FLOPs; the backward again as much, and 4 * D * K bytes of scratch for each split of the rows.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend, indices out of range when they are
            checked, "triton" where it cannot run or where clips need a gradient.
    """
    if weight.ndim != 5 or weight.shape[1] != 3 or weight.shape[3] != weight.shape[4]:
        raise ValueError(f"weight must be [D, 3, t, p, p], not {list(weight.shape)}")
    frames, rows, columns = clip_grid(clips, weight.shape[3], weight.shape[2])
    if pos.shape[-1] != weight.shape[0] or pos.numel() != frames * rows * columns * weight.shape[0]:
        raise ValueError(
            f"positions {list(pos.shape)} do not fit {frames * rows * columns} tokens of width "
            f"{weight.shape[0]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {list(bias.shape)} does not fit weight {list(weight.shape)}")
    if visible.ndim != 2 or visible.shape[0] != clips.shape[0]:
        raise ValueError(f"visible must be [B={clips.shape[0]}, Nv], not {list(visible.shape)}")
    dtype = dev.working_dtype(clips.device.type, weight.dtype)
    tensors = dict(clips=clips, visible=visible, weight=weight, bias=bias, pos=pos)
    if choose_backend("embed_visible", backend, dtype, tensors) == "triton":
        return embed_visible_op(clips, visible.to(torch.int32), weight, bias, pos, dtype)
    if dev.checking_indices():
        dev.check_indices(visible, frames * rows * columns, "visible")
    return embed_visible_ref(clips, visible, weight, bias, pos)
