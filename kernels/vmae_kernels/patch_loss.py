"""Squared error between predicted pixels and the (normalised) tubelets of a clip.

Idea: the published code un-normalises the whole float clip, reorders it, normalises every tubelet and then
gathers half. Here the tubelets of counted tokens alone are read, once: `B * Nk * P` bytes of a uint8 clip and
the predictions, some 12 FLOPs a value. The gradient is formed in the backward, when the upstream gradient
(and a loss scale in it) is known: predictions and clip are read once more and the gradient written, `8 * B *
Nk * P` bytes in both passes with bf16 predictions. Forming it in the forward would save what the predictions
weigh, and cost a pass to scale it: 9. Saved: predictions, clip, indices, weights, one sum.

A target is affine in the stored pixel, `(x - centre) * scale` with one centre and scale per tubelet and
channel: normalised or not, uint8 or float. Sums over uint8 pixels are exact integers, so mean and variance
take one pass over registers.

Legend: B clips, Nk counted tokens, P = 3 * t * p * p values of a tubelet in order (t, h, w, c).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vmae_kernels import device as dev
from vmae_kernels.backend import choose_backend
from vmae_kernels.device import (
    MEAN_B,
    MEAN_G,
    MEAN_R,
    STD_B,
    STD_G,
    STD_R,
    by_channel,
    round_to,
    target_offsets,
    tubelet_offsets,
)
from vmae_kernels.optional_triton import tl, triton
from vmae_kernels.tubelets import clip_grid, gather_tubelets, unit_pixels


def patch_size_of(values: int, tubelet_size: int) -> int:
    """Side of a tubelet of `values` = 3 * tubelet_size * side**2 values."""
    side = math.isqrt(values // (3 * tubelet_size))
    if 3 * tubelet_size * side * side != values:
        raise ValueError(f"{values} values are no square tubelet of {tubelet_size} frames and 3 channels")
    return side


def patch_targets_ref(
    clips: Tensor, tokens: Tensor, patch_size: int, tubelet_size: int = 2, normalize: bool = True
) -> Tensor:
    """float32 [B, n, P]: pixels in [0, 1]; with `normalize`, per tubelet and channel minus the mean, over
    `sqrt(unbiased variance) + 1e-6` (MAE's normalised target, per channel as in VideoMAE's released code)."""
    pixels = unit_pixels(gather_tubelets(clips, tokens, patch_size, tubelet_size)).flatten(2, 4)
    if normalize:
        variance, mean = torch.var_mean(pixels, dim=2, unbiased=True, keepdim=True)
        # The clamp moves no target; it makes the gradient of a tubelet of equal pixels finite.
        pixels = (pixels - mean) / (variance.clamp_min(torch.finfo(torch.float32).tiny).sqrt() + 1e-6)
    return pixels.flatten(2)


def weighted_mean(per_token: Tensor, weight: Tensor) -> Tensor:
    """`sum(w * x) / sum(w)`."""
    return (per_token * weight).sum() / weight.sum()


def patch_loss_ref(
    pixels: Tensor,
    clips: Tensor,
    decode: Tensor,
    weight: Tensor,
    normalize: bool = True,
    tubelet_size: int = 2,
) -> Tensor:
    """Plain PyTorch; same arguments and result as `patch_loss`."""
    target = patch_targets_ref(
        clips, decode, patch_size_of(pixels.shape[-1], tubelet_size), tubelet_size, normalize
    )
    return weighted_mean((pixels.float() - target).square().mean(-1), weight.float())


def check_loss_shapes(
    rows, values: int, clips: Tensor, decode: Tensor, weight: Tensor, tubelet_size: int
) -> None:
    """Raises ValueError unless predictions `rows` x `values`, tokens, weights and clips fit together."""
    clip_grid(clips, patch_size_of(values, tubelet_size), tubelet_size)
    fit = tuple(rows) == tuple(decode.shape) == tuple(weight.shape)
    if not fit or decode.ndim != 2 or decode.shape[0] != clips.shape[0]:
        raise ValueError(
            f"predictions {list(rows)}, tokens {list(decode.shape)} and weights {list(weight.shape)} must "
            "all be "
            f"[B={clips.shape[0]}, Nk]"
        )


def check_tokens(decode: Tensor, clips: Tensor, values: int, tubelet_size: int) -> None:
    """In a checked mode (VMAE_CHECK_INDICES=1): raises ValueError where a token is none of the clip's."""
    if dev.checking_indices():
        frames, rows, columns = clip_grid(clips, patch_size_of(values, tubelet_size), tubelet_size)
        dev.check_indices(decode, frames * rows * columns, "decode")


@triton.jit
def channel_affine(
    b_x, o_p, m_p, STD: tl.constexpr, channel: tl.constexpr, COUNT: tl.constexpr, UINT8: tl.constexpr
):
    """Centre and scale of one channel's normalised target: unbiased deviation of its COUNT stored values."""
    m_c = m_p & (o_p % 3 == channel)
    if UINT8:
        b_sum = tl.sum(tl.where(m_c, b_x, 0))
        b_square = tl.sum(tl.where(m_c, b_x * b_x, 0)).to(tl.int64)
        b_variance = (COUNT * b_square - b_sum.to(tl.int64) * b_sum).to(tl.float32) / (COUNT * (COUNT - 1.0))
        return b_sum.to(tl.float32) / COUNT, 1 / (tl.sqrt_rn(b_variance) + 255e-6)
    else:
        b_mean = tl.sum(tl.where(m_c, b_x, 0.0)) / COUNT
        b_off = tl.where(m_c, b_x - b_mean, 0.0)
        return b_mean, 1 / (tl.sqrt_rn(tl.sum(b_off * b_off) / (COUNT - 1.0)) + 1e-6 / STD)


@triton.jit
def target_affine(b_x, o_p, m_p, COUNT: tl.constexpr, UINT8: tl.constexpr, NORMALIZE: tl.constexpr):
    """Centres and scales of the three channels: target = (x - centre) * scale."""
    if NORMALIZE:
        b_cr, b_sr = channel_affine(b_x, o_p, m_p, STD_R, 0, COUNT, UINT8)
        b_cg, b_sg = channel_affine(b_x, o_p, m_p, STD_G, 1, COUNT, UINT8)
        b_cb, b_sb = channel_affine(b_x, o_p, m_p, STD_B, 2, COUNT, UINT8)
        return b_cr, b_cg, b_cb, b_sr, b_sg, b_sb
    elif UINT8:
        return 0.0, 0.0, 0.0, 1 / 255, 1 / 255, 1 / 255
    else:
        return -MEAN_R / STD_R, -MEAN_G / STD_G, -MEAN_B / STD_B, STD_R * 1.0, STD_G * 1.0, STD_B * 1.0


@triton.jit
def load_target_pixels(p_x, m_x, UINT8: tl.constexpr):
    """Stored pixels: int32 from uint8, float32 from float."""
    if UINT8:
        return tl.load(p_x, mask=m_x, other=0).to(tl.int32)
    else:
        return tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def load_difference(
    p_pred, p_clips, p_tokens, i_row, n_tokens, columns, per_frame, stride_b, stride_t, stride_h, stride_c,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, UINT8: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Prediction minus target of token `i_row`, [BLOCK_P], zero beyond the tubelet's P values."""
    P: tl.constexpr = 3 * DEPTH * PATCH * PATCH
    o_p = tl.arange(0, BLOCK_P)
    m_p = o_p < P
    o_base = tubelet_offsets(
        p_tokens, i_row, n_tokens, columns, per_frame, stride_b, stride_t, stride_h, PATCH, DEPTH, UINT8
    )
    o_pixel = target_offsets(o_p, stride_t, stride_h, stride_c, PATCH, UINT8)
    b_x = load_target_pixels(p_clips + o_base + o_pixel, m_p, UINT8)
    b_pred = tl.load(p_pred + i_row * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_cr, b_cg, b_cb, b_sr, b_sg, b_sb = target_affine(b_x, o_p, m_p, P // 3, UINT8, NORMALIZE)
    b_target = (b_x - by_channel(o_p % 3, b_cr, b_cg, b_cb)) * by_channel(o_p % 3, b_sr, b_sg, b_sb)
    return tl.where(m_p, b_pred - b_target, 0.0)


@triton.jit
def patch_loss_fwd_kernel(
    p_pred, p_clips, p_tokens, p_weight, p_partial,
    n_rows, n_tokens, columns, per_frame, stride_b, stride_t, stride_h, stride_c,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, UINT8: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """First stage: the weighted errors of ROWS tokens."""
    b_loss = 0.0
    for o_row in range(0, ROWS):
        i_row = tl.program_id(0).to(tl.int64) * ROWS + o_row
        b_weight = tl.load(p_weight + i_row, mask=i_row < n_rows, other=0.0).to(tl.float32)
        b_diff = load_difference(
            p_pred, p_clips, p_tokens, tl.minimum(i_row, n_rows - 1), n_tokens, columns, per_frame,
            stride_b, stride_t, stride_h, stride_c, PATCH, DEPTH, UINT8, NORMALIZE, BLOCK_P,
        )  # fmt: skip
        b_loss += tl.where(i_row < n_rows, tl.sum(b_diff * b_diff) * b_weight, 0.0)
    tl.store(p_partial + tl.program_id(0), b_loss)


@triton.jit
def weighted_mean_kernel(
    p_partial, p_weight, p_loss, p_total, n_partial, n_weight, values, BLOCK: tl.constexpr
):
    """Second stage, one program: sum of the partial losses over `values` * sum of the weights."""
    b_loss = tl.zeros([BLOCK], tl.float32)
    for o_part in range(0, n_partial, BLOCK):
        o_x = o_part + tl.arange(0, BLOCK)
        b_loss += tl.load(p_partial + o_x, mask=o_x < n_partial, other=0.0)
    b_weight = tl.zeros([BLOCK], tl.float32)
    for o_part in range(0, n_weight, BLOCK):
        o_x = o_part + tl.arange(0, BLOCK)
        b_weight += tl.load(p_weight + o_x, mask=o_x < n_weight, other=0.0).to(tl.float32)
    b_total = tl.sum(b_weight)
    tl.store(p_total, b_total)
    tl.store(p_loss, tl.sum(b_loss) / (b_total * values))


@triton.jit
def patch_loss_bwd_kernel(
    p_upstream, p_total, p_pred, p_clips, p_tokens, p_weight, p_grad,
    n_tokens, columns, per_frame, stride_b, stride_t, stride_h, stride_c,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, UINT8: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of one token's predictions."""
    P: tl.constexpr = 3 * DEPTH * PATCH * PATCH
    i_row = tl.program_id(0).to(tl.int64)
    b_scale = tl.load(p_upstream) * tl.load(p_weight + i_row).to(tl.float32) * (2.0 / P) / tl.load(p_total)
    b_diff = load_difference(
        p_pred, p_clips, p_tokens, i_row, n_tokens, columns, per_frame,
        stride_b, stride_t, stride_h, stride_c, PATCH, DEPTH, UINT8, NORMALIZE, BLOCK_P,
    )  # fmt: skip
    o_p = tl.arange(0, BLOCK_P)
    tl.store(p_grad + i_row * P + o_p, round_to(b_diff * b_scale, p_grad.dtype.element_ty), mask=o_p < P)


ROWS_PER_PROGRAM = 4


def loss_config(values: int) -> dict:
    """A tubelet in registers: 16 values a thread."""
    block = triton.next_power_of_2(values)
    return {"BLOCK_P": block, "num_warps": max(1, min(8, block // 512))}


def weighted_mean_of(partial: Tensor, weight: Tensor, values: int) -> tuple[Tensor, Tensor]:
    """float32 scalars: the loss, and the sum of the weights."""
    loss = dev.scratch((), torch.float32, weight.device)
    total = dev.scratch((), torch.float32, weight.device)
    weighted_mean_kernel[(1,)](
        partial, weight, loss, total, partial.numel(), weight.numel(), values, BLOCK=4096, num_warps=8
    )
    return loss, total


@dev.launcher()
def patch_loss_fwd(
    pixels: Tensor, clips: Tensor, decode: Tensor, weight: Tensor, normalize: bool, depth: int
) -> tuple[Tensor, Tensor]:
    """Launches both stages."""
    rows, values = decode.numel(), pixels.shape[-1]
    patch = patch_size_of(values, depth)
    grid = clip_grid(clips, patch, depth)
    check_tokens(decode, clips, values, depth)
    if rows == 0:
        return weight.new_full((), float("nan"), dtype=torch.float32), weight.new_zeros(
            (), dtype=torch.float32
        )
    uint8 = clips.dtype == torch.uint8
    clips, where = dev.clip_arguments(clips, decode.shape[1], grid)
    partial = dev.scratch((triton.cdiv(rows, ROWS_PER_PROGRAM),), torch.float32, pixels.device)
    patch_loss_fwd_kernel[(partial.numel(),)](
        pixels, clips, decode, weight, partial, rows, *where,
        PATCH=patch, DEPTH=depth, UINT8=uint8, NORMALIZE=normalize, ROWS=ROWS_PER_PROGRAM,
        **loss_config(values),
    )  # fmt: skip
    return weighted_mean_of(partial, weight, values)


@dev.launcher()
def patch_loss_bwd(
    upstream: Tensor,
    total: Tensor,
    pixels: Tensor,
    clips: Tensor,
    decode: Tensor,
    weight: Tensor,
    normalize: bool,
    depth: int,
) -> Tensor:
    """Launches the backward."""
    values = pixels.shape[-1]
    patch = patch_size_of(values, depth)
    grad = dev.scratch(pixels.shape, pixels.dtype, pixels.device)
    if grad.numel() == 0:
        return grad
    uint8 = clips.dtype == torch.uint8
    clips, where = dev.clip_arguments(clips, decode.shape[1], clip_grid(clips, patch, depth))
    patch_loss_bwd_kernel[(decode.numel(),)](
        upstream, total, pixels, clips, decode, weight, grad, *where,
        PATCH=patch, DEPTH=depth, UINT8=uint8, NORMALIZE=normalize, **loss_config(values),
    )  # fmt: skip
    return grad


@torch.library.custom_op("vmae::patch_loss", mutates_args=())
def patch_loss_op(
    pixels: Tensor, clips: Tensor, decode: Tensor, weight: Tensor, normalize: bool, depth: int
) -> tuple[Tensor, Tensor]:
    return patch_loss_fwd(pixels, clips, decode, weight, normalize, depth)


@patch_loss_op.register_fake
def _(pixels, clips, decode, weight, normalize, depth):
    return weight.new_empty((), dtype=torch.float32), weight.new_empty((), dtype=torch.float32)


@torch.library.custom_op("vmae::patch_loss_backward", mutates_args=())
def patch_loss_backward_op(
    upstream: Tensor,
    total: Tensor,
    pixels: Tensor,
    clips: Tensor,
    decode: Tensor,
    weight: Tensor,
    normalize: bool,
    depth: int,
) -> Tensor:
    return patch_loss_bwd(upstream, total, pixels, clips, decode, weight, normalize, depth)


@patch_loss_backward_op.register_fake
def _(upstream, total, pixels, clips, decode, weight, normalize, depth):
    return pixels.new_empty(pixels.shape)


def _setup_context(ctx, inputs, output):
    pixels, clips, decode, weight, normalize, depth = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], pixels, clips, decode, weight)
    ctx.normalize, ctx.depth = normalize, depth


def _backward(ctx, upstream, _):
    grad = patch_loss_backward_op(upstream, *ctx.saved_tensors, ctx.normalize, ctx.depth)
    return grad, None, None, None, None, None


patch_loss_op.register_autograd(_backward, setup_context=_setup_context)


def patch_loss(
    pixels: Tensor,
    clips: Tensor,
    decode: Tensor,
    weight: Tensor,
    normalize: bool = True,
    *,
    tubelet_size: int = 2,
    backend: str = "auto",
) -> Tensor:
    """Weighted mean over tokens of the mean squared error over a tubelet (VideoMAE V2, equation 5).

    Args:
        pixels: [B, Nk, P], predictions in order (t, h, w, c).
        clips: uint8 [B, T, H, W, 3], or normalised float [B, 3, T, H, W].
        decode: int32 [B, Nk], the tokens predicted.
        weight: float32 [B, Nk], not all zero.
        normalize: predict normalised tubelets (the published default) rather than pixels in [0, 1].
        backend: "torch", "triton" or "auto" (Triton on a GPU).

    Returns:
        float32 scalar, whatever the dtype of `pixels`. The kernels form the gradient of `pixels`; where float
            clips or `weight`
        need one, "auto" is PyTorch. float16 is safe: the gradient is formed when the upstream one is known.

    Cost: B * Nk * P pixels and predictions read; the backward again, and a gradient written.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend, indices out of range when
            VMAE_CHECK_INDICES=1, "triton" where it cannot run, or where clips or `weight` need a gradient.
    """
    check_loss_shapes(pixels.shape[:-1], pixels.shape[-1], clips, decode, weight, tubelet_size)
    tensors = dict(pixels=pixels, clips=clips, decode=decode, weight=weight)
    if choose_backend("patch_loss", backend, pixels.dtype, tensors) == "triton":
        return patch_loss_op(pixels, clips, decode.to(torch.int32), weight, normalize, tubelet_size)[0]
    check_tokens(decode, clips, pixels.shape[-1], tubelet_size)
    return patch_loss_ref(pixels, clips, decode, weight, normalize, tubelet_size)
