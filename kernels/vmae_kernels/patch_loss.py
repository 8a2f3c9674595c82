"""Squared error between predicted pixels and the (normalised) tubelets of a clip.

Idea: the published code un-normalises the whole float clip, reorders it, normalises every tubelet and then
gathers half. Here the tubelets of counted tokens alone are read, once: `B * Nk * P` bytes of a uint8 clip and
the predictions, some 12 FLOPs a value. The gradient is formed in the backward, when the upstream gradient
(and a loss scale in it) is known: predictions and clip are read once more and the gradient written, `8 * B *
Nk * P` bytes in both passes with bf16 predictions. Forming it in the forward would save what the predictions
weigh, and cost a pass to scale it: 9. Saved: predictions, clip, indices, weights, one sum.

A target is affine in the stored pixel, `(x - centre) * scale` with one centre and scale per tubelet and
channel. Sums over uint8 pixels are exact integers, so mean and variance take one pass over registers.

Tubelets lie in blocks [S, R, Q, N]: R tokens, each cut in S slices of Q threads' N neighbours. R is spread
over warps, Q over a warp's threads; S and N are registers of one thread. So sums over a tubelet stay in its
warp, and loads and stores are 16 bytes of predictions a thread and adjacent among threads.

Legend: B clips, Nk counted tokens, P = 3 * t * p * p values of a tubelet in order (t, h, w, c).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vmae_kernels import device as dev
from vmae_kernels.backend import backend_for, choose_backend
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
from vmae_kernels.optional_triton import tl, triton, triton_version
from vmae_kernels.tubelets import Statistics, clip_grid, gather_tubelets, stored_units, unit_pixels


def patch_size_of(values: int, tubelet_size: int, statistics: Statistics | None = None) -> int:
    """Side of a tubelet of `values` = 3 * tubelet_size * side**2 values; with `statistics`, of their
    channels."""
    channels = 3 if statistics is None else len(statistics.mean)
    side = math.isqrt(values // (channels * tubelet_size))
    if channels * tubelet_size * side * side != values:
        raise ValueError(
            f"{values} values are no square tubelet of {tubelet_size} frames and {channels} channels"
        )
    return side


def patch_targets_ref(
    clips: Tensor,
    tokens: Tensor,
    patch_size: int,
    tubelet_size: int = 2,
    normalize: bool = True,
    statistics: Statistics | None = None,
) -> Tensor:
    """float32 [B, n, P]: pixels in [0, 1]; with `normalize`, per tubelet and channel minus the mean, over
    `sqrt(unbiased variance) + 1e-6` (MAE's normalised target, per channel as in VideoMAE's released code).

    Stored clips have `statistics`; of floats the pixels are the values as they are.
    """
    pixels = gather_tubelets(clips, tokens, patch_size, tubelet_size, statistics)
    pixels = (unit_pixels(pixels) if statistics is None else stored_units(pixels)).flatten(2, 4)
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
    statistics: Statistics | None = None,
) -> Tensor:
    """Plain PyTorch; same arguments and result as `patch_loss`."""
    patch = patch_size_of(pixels.shape[-1], tubelet_size, statistics)
    target = patch_targets_ref(clips, decode, patch, tubelet_size, normalize, statistics)
    return weighted_mean((pixels.float() - target).square().mean(-1), weight.float())


def check_loss_shapes(
    rows,
    values: int,
    clips: Tensor,
    decode: Tensor,
    weight: Tensor,
    tubelet_size: int,
    statistics: Statistics | None = None,
) -> None:
    """Raises ValueError unless predictions `rows` x `values`, tokens, weights and clips fit together."""
    clip_grid(clips, patch_size_of(values, tubelet_size, statistics), tubelet_size, statistics)
    fit = tuple(rows) == tuple(decode.shape) == tuple(weight.shape)
    if not fit or decode.ndim != 2 or decode.shape[0] != clips.shape[0]:
        raise ValueError(
            f"predictions {list(rows)}, tokens {list(decode.shape)} and weights {list(weight.shape)} must "
            "all be "
            f"[B={clips.shape[0]}, Nk]"
        )


def check_tokens(
    decode: Tensor, clips: Tensor, values: int, tubelet_size: int, statistics: Statistics | None = None
) -> None:
    """In a checked mode (VMAE_CHECK_INDICES=1): raises ValueError where a token is none of the clip's."""
    if dev.checking_indices():
        patch = patch_size_of(values, tubelet_size, statistics)
        frames, rows, columns = clip_grid(clips, patch, tubelet_size, statistics)
        dev.check_indices(decode, frames * rows * columns, "decode")


@triton.jit
def tubelet_places(P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """Number of the value at each place of a block [S, 1, Q, N], and which places hold one."""
    o_slice = tl.arange(0, BLOCK_S)[:, None, None, None] * (BLOCK_Q * BLOCK_N)
    o_piece = tl.arange(0, BLOCK_Q)[None, None, :, None] * BLOCK_N
    o_p = o_slice + o_piece + tl.arange(0, BLOCK_N)[None, None, None, :]
    return o_p, (o_slice < P) & (o_p < P)


@triton.jit
def sum_of_kind(b_x, o_kind, kind: tl.constexpr):
    """[R, Q] sums over a thread's values of one kind (see `normalized_target`)."""
    return tl.sum(tl.sum(tl.where(o_kind == kind, b_x, 0), 3), 0)


@triton.jit
def channel_sums(b_x, o_kind, o_turn):
    """[R] sums of each channel; `b_x` is zero where there is no value."""
    b_0, b_1, b_2 = sum_of_kind(b_x, o_kind, 0), sum_of_kind(b_x, o_kind, 1), sum_of_kind(b_x, o_kind, 2)
    b_r = tl.sum(by_channel(o_turn, b_0, b_2, b_1), 1)
    b_g = tl.sum(by_channel(o_turn, b_1, b_0, b_2), 1)
    b_b = tl.sum(by_channel(o_turn, b_2, b_1, b_0), 1)
    return b_r, b_g, b_b


@triton.jit
def at_places(o_kind, o_turn, b_r, b_g, b_b):
    """[R] numbers of each channel, at its places."""
    b_r, b_g, b_b = b_r[:, None], b_g[:, None], b_b[:, None]
    b_0 = by_channel(o_turn, b_r, b_g, b_b)[None, :, :, None]
    b_1 = by_channel(o_turn, b_g, b_b, b_r)[None, :, :, None]
    b_2 = by_channel(o_turn, b_b, b_r, b_g)[None, :, :, None]
    return by_channel(o_kind, b_0, b_1, b_2)


@triton.jit
def uint8_scale(b_sum, b_square, COUNT: tl.constexpr):
    """1 / (unbiased deviation of COUNT stored values + 1e-6), from their exact sums."""
    b_spread = COUNT * b_square.to(tl.int64) - b_sum.to(tl.int64) * b_sum
    return 1 / (tl.sqrt_rn(b_spread.to(tl.float32) / (COUNT * (COUNT - 1.0))) + 255e-6)


@triton.jit
def float_scale(b_square, STD: tl.constexpr, COUNT: tl.constexpr):
    """The same of normalised values, from the sum of their squared distances to the mean."""
    return 1 / (tl.sqrt_rn(b_square / (COUNT - 1.0)) + 1e-6 / STD)


@triton.jit
def normalized_target(
    b_x, m_p, P: tl.constexpr, UINT8: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(x - centre) * scale, with a centre and a scale of each tubelet and channel.

    Channel of a place: (o_kind + o_turn) % 3. `o_kind` follows from the slice and the neighbour, which a
    thread runs through: it is known when the kernel is compiled, and choosing by it costs nothing. `o_turn`
    follows from the thread.
    """
    COUNT: tl.constexpr = P // 3
    o_slice = tl.arange(0, BLOCK_S)[:, None, None, None] * (BLOCK_Q * BLOCK_N)
    o_kind = (o_slice + tl.arange(0, BLOCK_N)[None, None, None, :]) % 3
    o_turn = (tl.arange(0, BLOCK_Q) * BLOCK_N % 3)[None, :]
    b_r, b_g, b_b = channel_sums(b_x, o_kind, o_turn)
    b_centre = at_places(o_kind, o_turn, b_r / COUNT, b_g / COUNT, b_b / COUNT)
    if UINT8:
        b_rr, b_gg, b_bb = channel_sums(b_x * b_x, o_kind, o_turn)
        b_sr, b_sg = uint8_scale(b_r, b_rr, COUNT), uint8_scale(b_g, b_gg, COUNT)
        b_sb = uint8_scale(b_b, b_bb, COUNT)
        b_off = b_x.to(tl.float32) - b_centre
    else:
        b_off = tl.where(m_p, b_x - b_centre, 0.0)
        b_rr, b_gg, b_bb = channel_sums(b_off * b_off, o_kind, o_turn)
        b_sr, b_sg = float_scale(b_rr, STD_R, COUNT), float_scale(b_gg, STD_G, COUNT)
        b_sb = float_scale(b_bb, STD_B, COUNT)
    return b_off * at_places(o_kind, o_turn, b_sr, b_sg, b_sb)


@triton.jit
def load_error(
    p_pred, p_clips, p_tokens, i_row, n_tokens, columns, per_frame, stride_b, stride_t, stride_h, stride_c,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, UINT8: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Predictions at `p_pred` ([R] pointers) minus the targets of tokens `i_row`: [S, R, Q, N], zero
    where there is no value."""
    P: tl.constexpr = 3 * DEPTH * PATCH * PATCH
    o_p, m_p = tubelet_places(P, BLOCK_S, BLOCK_Q, BLOCK_N)
    b_pred = tl.load(p_pred[None, :, None, None] + o_p, mask=m_p, other=0.0)
    o_base = tubelet_offsets(
        p_tokens, i_row, n_tokens, columns, per_frame, stride_b, stride_t, stride_h, PATCH, DEPTH, UINT8
    )
    o_x = o_base[None, :, None, None] + target_offsets(o_p, stride_t, stride_h, stride_c, PATCH, UINT8)
    if UINT8:
        b_x = tl.load(p_clips + o_x, mask=m_p, other=0).to(tl.int32)
    else:
        b_x = tl.load(p_clips + o_x, mask=m_p, other=0.0).to(tl.float32)
    if NORMALIZE:
        b_target = normalized_target(b_x, m_p, P, UINT8, BLOCK_S, BLOCK_Q, BLOCK_N)
    elif UINT8:
        b_target = b_x.to(tl.float32) * (1 / 255)
    else:
        b_std, b_mean = by_channel(o_p % 3, STD_R, STD_G, STD_B), by_channel(o_p % 3, MEAN_R, MEAN_G, MEAN_B)
        b_target = b_x * b_std + b_mean
    return tl.where(m_p, b_pred.to(tl.float32) - b_target, 0.0)


@triton.jit
def patch_loss_fwd_kernel(
    p_pred, p_clips, p_tokens, p_weight, p_partial, n_rows,
    n_tokens, columns, per_frame, stride_b, stride_t, stride_h, stride_c,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, UINT8: tl.constexpr, NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """First stage: the weighted errors and the weights of ROWS tokens, summed."""
    P: tl.constexpr = 3 * DEPTH * PATCH * PATCH
    b_loss = tl.zeros([BLOCK_R, BLOCK_Q], tl.float32)
    b_total = tl.zeros([BLOCK_R], tl.float32)
    for o_row in range(0, ROWS, BLOCK_R):
        i_row = tl.program_id(0) * ROWS + o_row + tl.arange(0, BLOCK_R)
        m_row, i_row = i_row < n_rows, tl.minimum(i_row, n_rows - 1)
        b_weight = tl.load(p_weight + i_row, mask=m_row, other=0.0).to(tl.float32)
        b_error = load_error(
            p_pred + i_row.to(tl.int64) * P, p_clips, p_tokens, i_row, n_tokens, columns, per_frame,
            stride_b, stride_t, stride_h, stride_c, PATCH, DEPTH, UINT8, NORMALIZE, BLOCK_S, BLOCK_Q, BLOCK_N,
        )  # fmt: skip
        b_loss += tl.sum(tl.sum(b_error * b_error, 3), 0) * b_weight[:, None]
        b_total += b_weight
    tl.store(p_partial + 2 * tl.program_id(0), tl.sum(tl.sum(b_loss, 1)))
    tl.store(p_partial + 2 * tl.program_id(0) + 1, tl.sum(b_total))


@triton.jit
def weighted_mean_kernel(p_partial, p_loss, p_total, n_partial, values, BLOCK: tl.constexpr):
    """Second stage, one program: sum of the partial losses over `values` * sum of the weights."""
    o_pair = tl.arange(0, 2)[None, :]
    b_sums = tl.zeros([BLOCK, 2], tl.float32)
    for o_part in range(0, n_partial, BLOCK):
        o_x = (o_part + tl.arange(0, BLOCK))[:, None]
        b_sums += tl.load(p_partial + 2 * o_x + o_pair, mask=o_x < n_partial, other=0.0)
    b_sums = tl.sum(b_sums, 0)
    b_loss = tl.sum(tl.where(tl.arange(0, 2) == 0, b_sums, 0.0))
    b_total = tl.sum(tl.where(tl.arange(0, 2) == 1, b_sums, 0.0))
    tl.store(p_total, b_total)
    tl.store(p_loss, b_loss / (b_total * values))


@triton.jit
def patch_loss_bwd_kernel(
    p_upstream, p_total, p_pred, p_clips, p_tokens, p_weight, p_grad, n_rows,
    n_tokens, columns, per_frame, stride_b, stride_t, stride_h, stride_c,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, UINT8: tl.constexpr, NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of ROWS tokens' predictions."""
    P: tl.constexpr = 3 * DEPTH * PATCH * PATCH
    b_factor = tl.load(p_upstream) * (2.0 / P) / tl.load(p_total)
    o_p, m_p = tubelet_places(P, BLOCK_S, BLOCK_Q, BLOCK_N)
    for o_row in range(0, ROWS, BLOCK_R):
        i_row = tl.program_id(0) * ROWS + o_row + tl.arange(0, BLOCK_R)
        m_row, i_row = i_row < n_rows, tl.minimum(i_row, n_rows - 1)
        o_pred = i_row.to(tl.int64) * P
        b_weight = tl.load(p_weight + i_row, mask=m_row, other=0.0).to(tl.float32)
        b_error = load_error(
            p_pred + o_pred, p_clips, p_tokens, i_row, n_tokens, columns, per_frame,
            stride_b, stride_t, stride_h, stride_c, PATCH, DEPTH, UINT8, NORMALIZE, BLOCK_S, BLOCK_Q, BLOCK_N,
        )  # fmt: skip
        b_grad = round_to(b_error * (b_weight * b_factor)[None, :, None, None], p_grad.dtype.element_ty)
        tl.store(p_grad + o_pred[None, :, None, None] + o_p, b_grad, mask=m_p & m_row[None, :, None, None])


# Tokens of a program.
ROWS = 16


# Bytes of predictions that a warp holds. Built by Triton 3.6, the kernels need more registers for as many,
# and spill.
WARP_BYTES = 4096 if triton_version() >= (3, 7) else 2048


def loss_config(values: int, itemsize: int, uint8: bool) -> dict:
    """A thread takes 16 bytes of predictions at a time, `N` neighbours, and 64 bf16 or 32 float32 values of a
    tubelet in all (half of that before Triton 3.7). So a warp takes a whole tubelet of up to 2048 bf16
    values, and no sum leaves it. Float clips count as float32: their pixels have an address each."""
    neighbours = 16 // itemsize
    warps = triton.next_power_of_2(triton.cdiv(values * (itemsize if uint8 else 4), WARP_BYTES))
    slices = triton.next_power_of_2(triton.cdiv(values, 32 * warps * neighbours))
    tokens = max(1, 4 // warps)
    blocks = {"BLOCK_S": slices, "BLOCK_R": tokens, "BLOCK_Q": 32 * warps, "BLOCK_N": neighbours}
    return blocks | {"num_warps": min(8, warps * tokens)}


def weighted_mean_of(partial: Tensor, values: int) -> tuple[Tensor, Tensor]:
    """float32 scalars: the loss, and the sum of the weights, from [programs, 2]."""
    loss = dev.scratch((), torch.float32, partial.device)
    total = dev.scratch((), torch.float32, partial.device)
    weighted_mean_kernel[(1,)](partial, loss, total, partial.shape[0], values, BLOCK=2048, num_warps=8)
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
    partial = dev.scratch((triton.cdiv(rows, ROWS), 2), torch.float32, pixels.device)
    patch_loss_fwd_kernel[(partial.shape[0],)](
        pixels, clips, decode, weight, partial, rows, *where,
        PATCH=patch, DEPTH=depth, UINT8=uint8, NORMALIZE=normalize, ROWS=ROWS,
        **loss_config(values, pixels.element_size(), uint8),
    )  # fmt: skip
    return weighted_mean_of(partial, values)


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
    rows, values = decode.numel(), pixels.shape[-1]
    patch = patch_size_of(values, depth)
    grad = dev.scratch(pixels.shape, pixels.dtype, pixels.device)
    if grad.numel() == 0:
        return grad
    uint8 = clips.dtype == torch.uint8
    clips, where = dev.clip_arguments(clips, decode.shape[1], clip_grid(clips, patch, depth))
    patch_loss_bwd_kernel[(triton.cdiv(rows, ROWS),)](
        upstream, total, pixels, clips, decode, weight, grad, rows, *where,
        PATCH=patch, DEPTH=depth, UINT8=uint8, NORMALIZE=normalize, ROWS=ROWS,
        **loss_config(values, pixels.element_size(), uint8),
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
    statistics: Statistics | None = None,
) -> Tensor:
    """Weighted mean over tokens of the mean squared error over a tubelet (VideoMAE V2, equation 5).

    Args:
        pixels: [B, Nk, P], predictions in order (t, h, w, c).
        clips: uint8 [B, T, H, W, 3], or normalised float [B, 3, T, H, W].
        decode: int32 [B, Nk], the tokens predicted.
        weight: float32 [B, Nk], not all zero.
        normalize: predict normalised tubelets (the published default) rather than pixels in [0, 1].
        backend: "torch", "triton" or "auto" (Triton on a GPU).
        statistics: of stored clips, as in `embed_visible`.

    Returns:
        float32 scalar, whatever the dtype of `pixels`. The kernels form the gradient of `pixels`; where float
            clips or `weight`
        need one, "auto" is PyTorch. float16 is safe: the gradient is formed when the upstream one is known.

    Cost: B * Nk * P pixels and predictions read; the backward again, and a gradient written.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend, indices out of range when
            VMAE_CHECK_INDICES=1, "triton" where it cannot run, or where clips or `weight` need a gradient.
    """
    check_loss_shapes(pixels.shape[:-1], pixels.shape[-1], clips, decode, weight, tubelet_size, statistics)
    backend = backend_for("patch_loss", backend, statistics)
    tensors = dict(pixels=pixels, clips=clips, decode=decode, weight=weight)
    if choose_backend("patch_loss", backend, pixels.dtype, tensors) == "triton":
        return patch_loss_op(pixels, clips, decode.to(torch.int32), weight, normalize, tubelet_size)[0]
    check_tokens(decode, clips, pixels.shape[-1], tubelet_size, statistics)
    return patch_loss_ref(pixels, clips, decode, weight, normalize, tubelet_size, statistics)
