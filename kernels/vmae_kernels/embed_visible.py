"""Tokens of the visible tubelets, straight from the clip.

Idea: the published code embeds all N tubelets of a clip and keeps the few that the encoder sees. Here only
those few are read: a first kernel copies their pixels into rows of K bytes, aligned to 16, and a second one
multiplies the rows with the weight. Bytes: `2 * Nv * K` for the rows (K = 1536 at patch 16, 1176 at patch
14), the weight once, `Nv * D` tokens written; `2 * Nv * K * D` FLOPs instead of `2 * N * K * D`. The rows are
kept for the backward, which multiplies them with the gradient (as many FLOPs again); the clip is not.

Why rows: a tubelet of patch 14 has lines of 42 bytes, which start at any even byte. Read inside the product,
they come in pieces of 2 bytes, once for each column of tiles, and their offsets cost integer divisions in
each step. Rows come by the copy engine.

Normalisation is folded into the weight, around a pixel value of 114: `W . (x/255 - mean)/std = W' . (x -
114)/64 + shift`, `W' = 64 W / (255 std)`, `shift` float32. `(x - 114)/64` is exact in fp16 and bf16, so only
the weight is rounded. With a half-precision weight the product of uint8 clips is one of fp16: `W'` is divided
by a power of two for each of its rows (`scale`), so that any weight fits. Measured on a CPU against float64,
K = 1536, as a share of the error of autocast's way, which rounds normalised pixels and weight to bf16
(`pytest -s tests/kernels/test_embed_visible.py -k folding`): folded around 114 in fp16, 0.09; in bf16,
0.70; in bf16 around 0, 1.33; a weight that is bf16 already, with normalised pixels rounded in registers,
0.71.

From bytes to operands takes one instruction a pixel (`device.pixel_operand`) and no conversion from integers,
of which a processor does 16 a cycle: half the speed of the tensor cores in this product.

Legend: B clips, T frames, H x W pixels, Nv visible tokens, N all tokens, D width, t x p x p tubelet, K = 3 t
p p.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae_kernels import device as dev
from vmae_kernels.backend import backend_for, choose_backend
from vmae_kernels.device import (
    CENTRE,
    MEAN_B,
    MEAN_G,
    MEAN_R,
    PIXEL_UNIT,
    STD_B,
    STD_G,
    STD_R,
    by_channel,
    operand,
    pixel_offsets,
    pixel_operand,
    round_to,
    tubelet_offsets,
)
from vmae_kernels.optional_triton import TensorDescriptor, tl, triton
from vmae_kernels.tubelets import Statistics, clip_grid, gather_tubelets, normalise


def embed_visible_ref(
    clips: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    statistics: Statistics | None = None,
) -> Tensor:
    """Plain PyTorch; same arguments and result as `embed_visible`."""
    tubelet_size, patch_size = weight.shape[2], weight.shape[3]
    pixels = gather_tubelets(clips, visible, patch_size, tubelet_size, statistics)
    if statistics is not None:
        pixels = normalise(pixels, *statistics)
    elif clips.dtype == torch.uint8:
        pixels = normalise(pixels)
    # Channel-first like the weight: the permuted copy is made of few pixels, not of the whole weight.
    flat = pixels.permute(0, 1, 5, 2, 3, 4).flatten(2).to(weight.dtype)
    tokens = F.linear(flat, weight.flatten(1), bias)
    return tokens + pos.flatten(0, -2)[visible.long()].to(tokens.dtype)


@triton.jit
def embed_visible_rows_kernel(
    p_clips, p_visible, p_rows,
    n_rows, n_visible, columns, per_frame, stride_b, stride_t, stride_h, stride_c,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pixels of the visible tubelets, [rows, ROW]: uint8 in the order (t, h, w, c), float in (c, t, h, w) and
    the rows' dtype. A row's last values, from K on, are 0. One 64-bit base per row; offsets inside a tubelet
    are 32-bit."""
    K: tl.constexpr = 3 * DEPTH * PATCH * PATCH
    CHANNELS_LAST: tl.constexpr = p_clips.dtype.element_ty == tl.uint8
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
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
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_pixel = pixel_offsets(o_k, stride_t, stride_h, stride_c, PATCH, DEPTH, CHANNELS_LAST)
    m_pixels = m_m[:, None] & (o_k < K)[None, :]
    b_x = tl.load(p_clips + o_base[:, None] + o_pixel[None, :], mask=m_pixels, other=0)
    if not CHANNELS_LAST:
        b_x = round_to(b_x.to(tl.float32), p_rows.dtype.element_ty)
    tl.store(p_rows + o_m[:, None] * ROW + o_k[None, :], b_x, mask=m_m[:, None] & (o_k < ROW)[None, :])


@triton.jit
def embed_visible_fold_kernel(
    p_weight, p_bias, p_folded, p_scale, p_shift,
    HAS_BIAS: tl.constexpr, UINT8: tl.constexpr, K: tl.constexpr, ROW: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of the weight in the order and operand dtype of the pixels' rows, folded for uint8 clips; its
    scale, a power of two, and its shift, both float32. A plane: the K / 3 weights of one channel."""
    PLANE: tl.constexpr = K // 3
    i_d = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < PLANE
    p_plane = p_weight + i_d * K + o_k
    b_r = tl.load(p_plane, mask=m_k, other=0.0).to(tl.float32)
    b_g = tl.load(p_plane + PLANE, mask=m_k, other=0.0).to(tl.float32)
    b_b = tl.load(p_plane + 2 * PLANE, mask=m_k, other=0.0).to(tl.float32)
    b_shift = tl.load(p_bias + i_d).to(tl.float32) if HAS_BIAS else 0.0
    b_scale = 1.0
    if UINT8:
        b_shift += tl.sum(
            b_r * ((CENTRE / 255 - MEAN_R) / STD_R)
            + b_g * ((CENTRE / 255 - MEAN_G) / STD_G)
            + b_b * ((CENTRE / 255 - MEAN_B) / STD_B)
        )
        b_r *= PIXEL_UNIT / (255 * STD_R)
        b_g *= PIXEL_UNIT / (255 * STD_G)
        b_b *= PIXEL_UNIT / (255 * STD_B)
        if p_folded.dtype.element_ty == tl.float16:
            # The largest weight's exponent, kept where its reciprocal is a float32 number too.
            b_largest = tl.max(tl.maximum(tl.abs(b_r), tl.maximum(tl.abs(b_g), tl.abs(b_b))))
            b_bits = b_largest.to(tl.int32, bitcast=True) & 0x7F800000
            b_bits = tl.minimum(tl.maximum(b_bits, 1 << 23), 253 << 23)
            b_scale = b_bits.to(tl.float32, bitcast=True)
            b_reciprocal = ((254 << 23) - b_bits).to(tl.float32, bitcast=True)
            b_r, b_g, b_b = b_r * b_reciprocal, b_g * b_reciprocal, b_b * b_reciprocal
    STEP: tl.constexpr = 3 if UINT8 else 1
    NEXT: tl.constexpr = 1 if UINT8 else PLANE
    p_row = p_folded + i_d * ROW
    tl.store(p_row + o_k * STEP, round_to(b_r, p_folded.dtype.element_ty), mask=m_k)
    tl.store(p_row + o_k * STEP + NEXT, round_to(b_g, p_folded.dtype.element_ty), mask=m_k)
    tl.store(p_row + o_k * STEP + 2 * NEXT, round_to(b_b, p_folded.dtype.element_ty), mask=m_k)
    if ROW > K:
        o_gap = tl.arange(0, 16)
        b_zero = tl.zeros([16], p_folded.dtype.element_ty)
        tl.store(p_row + K + o_gap, b_zero, mask=o_gap < ROW - K)
    tl.store(p_scale + i_d, b_scale)
    tl.store(p_shift + i_d, b_shift)


@triton.jit
def embed_visible_fwd_kernel(
    p_rows, p_weight, p_scale, p_shift, p_visible, p_pos, p_out, n_rows, width,
    DESCRIPTOR: tl.constexpr, UINT8: tl.constexpr, PTX: tl.constexpr, K: tl.constexpr, ROW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A BLOCK_M x BLOCK_N tile of tokens. Rows and weight come through descriptors (`p_rows`, `p_weight` are
    some) where the device has a copy engine, else through pointers. The tile is summed transposed: pixels,
    which pass through registers, are then the factor that the tensor cores read from shared memory, and a
    thread's bytes are adjacent."""
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    OPERAND: tl.constexpr = tl.float16 if UINT8 and DTYPE != tl.float32 else DTYPE
    n_tiles = tl.cdiv(width, BLOCK_N)
    i_m, i_n = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < n_rows, o_n < width
    o_m = tl.minimum(o_m, n_rows - 1)
    if not DESCRIPTOR:
        p_tile = p_rows + o_m * ROW
        p_tile_w = p_weight + tl.minimum(o_n, width - 1) * ROW
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for o_k0 in range(0, K, BLOCK_K):
        if DESCRIPTOR:
            b_x = p_rows.load([i_m * BLOCK_M, o_k0])
            b_w = p_weight.load([i_n * BLOCK_N, o_k0])
        else:
            o_k = o_k0 + tl.arange(0, BLOCK_K)
            b_x = tl.load(p_tile[:, None] + o_k[None, :], mask=(o_k < ROW)[None, :], other=0)
            b_w = tl.load(p_tile_w[:, None] + o_k[None, :], mask=(o_k < ROW)[None, :], other=0.0)
        b_x = pixel_operand(b_x, OPERAND, PTX) if UINT8 else operand(b_x, OPERAND)
        b_acc = tl.dot(operand(b_w, OPERAND), tl.trans(b_x), b_acc, input_precision=PRECISION)
    b_scale = tl.load(p_scale + o_n, mask=m_n, other=0.0)
    b_shift = tl.load(p_shift + o_n, mask=m_n, other=0.0)
    b_out = tl.trans(b_acc * b_scale[:, None] + b_shift[:, None])
    m_out = m_m[:, None] & m_n[None, :]
    b_token = tl.load(p_visible + o_m).to(tl.int64)
    b_out += tl.load(p_pos + b_token[:, None] * width + o_n[None, :], mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out + o_m[:, None] * width + o_n[None, :], round_to(b_out, DTYPE), mask=m_out)


@triton.jit
def embed_visible_bwd_weight_kernel(
    p_grad, p_rows, p_partial, n_rows, width, rows_per_split,
    DESCRIPTOR: tl.constexpr, GRAD_DESCRIPTOR: tl.constexpr, UINT8: tl.constexpr, PTX: tl.constexpr,
    K: tl.constexpr, ROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split] [D, K] = grad^T . pixels over the split's rows, whole blocks of them."""
    DTYPE: tl.constexpr = p_grad.dtype if GRAD_DESCRIPTOR else p_grad.dtype.element_ty
    k_tiles = tl.cdiv(K, BLOCK_K)
    i_n, i_k = tl.program_id(0) // k_tiles, tl.program_id(0) % k_tiles
    i_split = tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n, m_k = o_n < width, o_k < K
    b_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for o_row in range(i_split * rows_per_split, tl.minimum((i_split + 1) * rows_per_split, n_rows), BLOCK_M):
        o_m = (o_row + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_m = (o_m < n_rows)[:, None]
        if DESCRIPTOR:
            b_x = p_rows.load([o_row, i_k * BLOCK_K])
        else:
            b_x = tl.load(
                p_rows + o_m[:, None] * ROW + o_k[None, :], mask=m_m & (o_k < ROW)[None, :], other=0
            )
        if GRAD_DESCRIPTOR:
            b_grad = p_grad.load([o_row, i_n * BLOCK_N])
        else:
            b_grad = tl.load(p_grad + o_m[:, None] * width + o_n[None, :], mask=m_m & m_n[None, :], other=0.0)
        b_x = pixel_operand(b_x, DTYPE, PTX) if UINT8 else operand(b_x, DTYPE)
        b_acc = tl.dot(tl.trans(operand(b_grad, DTYPE)), b_x, b_acc, input_precision=PRECISION)
    # Offsets inside a tile are constants of the thread.
    p_tile = p_partial + (i_split.to(tl.int64) * width + i_n * BLOCK_N) * K + i_k * BLOCK_K
    p_out = p_tile + (tl.arange(0, BLOCK_N)[:, None] * K + tl.arange(0, BLOCK_K)[None, :])
    tl.store(p_out, b_acc, mask=m_n[:, None] & m_k[None, :])


@triton.jit
def embed_visible_bwd_finish_kernel(
    p_partial, p_sums, p_weight_grad, p_bias_grad, n_parts, width,
    SPLITS: tl.constexpr, UINT8: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Second stage for one row of the weight: sum of the partials, normalisation undone, back in (c, t, h, w)
    order."""
    i_d = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    b_sum = tl.sum(tl.load(p_sums + o_r * width + i_d, mask=o_r < n_parts, other=0.0))
    tl.store(p_bias_grad + i_d, b_sum)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_grad = tl.zeros([BLOCK_K], tl.float32)
    for i_split in tl.static_range(SPLITS):
        b_grad += tl.load(p_partial + (i_split * width + i_d) * K + o_k, mask=m_k, other=0.0)
    if UINT8:
        o_c = o_k % 3
        b_grad *= by_channel(
            o_c, PIXEL_UNIT / (255 * STD_R), PIXEL_UNIT / (255 * STD_G), PIXEL_UNIT / (255 * STD_B)
        )
        b_grad += b_sum * by_channel(
            o_c,
            (CENTRE / 255 - MEAN_R) / STD_R,
            (CENTRE / 255 - MEAN_G) / STD_G,
            (CENTRE / 255 - MEAN_B) / STD_B,
        )
        o_k = o_c * (K // 3) + o_k // 3
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
# shows: on sm_90 two programs fit on a processor, so that one converts while the other multiplies. Not timed.
# Larger tiles read less from the L2, and spill: 24 to 192 bytes, once a tile. Three products a float32 value
# ask for smaller ones.
ROWS_CONFIG = {"BLOCK_M": 8, "BLOCK_K": 512, "num_warps": 4, "num_stages": 2}
FWD_CONFIGS = [
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
]
FWD_CONFIGS_POINTER = [
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
]
FWD_CONFIGS_FLOAT32 = [{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}]
BWD_CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 256, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
]
BWD_CONFIGS_POINTER = [
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
]
BWD_CONFIGS_FLOAT32 = [{"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}]


def fwd_configs(dtype: torch.dtype, descriptor: bool) -> list[dict]:
    if dtype == torch.float32:
        return FWD_CONFIGS_FLOAT32
    return FWD_CONFIGS if descriptor else FWD_CONFIGS_POINTER


def bwd_configs(dtype: torch.dtype, descriptor: bool) -> list[dict]:
    if dtype == torch.float32:
        return BWD_CONFIGS_FLOAT32
    return BWD_CONFIGS if descriptor else BWD_CONFIGS_POINTER


def gather_rows(clips: Tensor, visible: Tensor, patch: int, depth: int, dtype: torch.dtype) -> Tensor:
    """Pixels of the visible tubelets, [B * Nv, K padded]: uint8, or `dtype` of float clips."""
    row = dev.padded_width(3 * depth * patch * patch)
    uint8 = clips.dtype == torch.uint8
    rows = dev.scratch((visible.numel(), row), torch.uint8 if uint8 else dtype, clips.device)
    if rows.numel() == 0:
        return rows
    clips, where = dev.clip_arguments(clips, visible.shape[1], clip_grid(clips, patch, depth))
    grid = (triton.cdiv(rows.shape[0], ROWS_CONFIG["BLOCK_M"]), triton.cdiv(row, ROWS_CONFIG["BLOCK_K"]))
    embed_visible_rows_kernel[grid](
        clips, visible, rows, rows.shape[0], *where, PATCH=patch, DEPTH=depth, ROW=row, **ROWS_CONFIG
    )
    return rows


def fold_weight(
    weight: Tensor, bias: Tensor | None, uint8: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight as the forward kernel reads it, [D, K padded], and its float32 scale and shift, [D]."""
    width, values = weight.shape[0], weight[0].numel()
    kind = torch.float16 if uint8 and dtype != torch.float32 else dtype
    folded = dev.scratch((width, dev.padded_width(values)), kind, weight.device)
    scale, shift = (dev.scratch((width,), torch.float32, weight.device) for _ in range(2))
    embed_visible_fold_kernel[(width,)](
        weight, bias, folded, scale, shift, HAS_BIAS=bias is not None, UINT8=uint8,
        K=values, ROW=folded.shape[1], BLOCK_K=triton.next_power_of_2(values // 3), num_warps=4,
    )  # fmt: skip
    return folded, scale, shift


def tile_source(table: Tensor, rows: int, columns: int, descriptor: bool) -> Tensor | TensorDescriptor:
    """A matrix as kernels take it in tiles: its descriptor, or itself."""
    return TensorDescriptor.from_tensor(table, [rows, columns]) if descriptor else table


@dev.launcher()
def embed_visible_fwd(
    clips: Tensor, visible: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Launches the copy of the pixels, the fold and the projection: tokens, and the pixels' rows."""
    width, _, depth, patch, _ = weight.shape
    batch, tokens = visible.shape
    uint8, values = clips.dtype == torch.uint8, weight[0].numel()
    if dev.checking_indices():
        dev.check_indices(visible, pos.numel() // width, "visible")
    out = dev.scratch((batch, tokens, width), dtype, clips.device)
    rows = gather_rows(clips, visible, patch, depth, dtype)
    if out.numel() == 0:
        return out, rows
    folded, scale, shift = fold_weight(weight, bias, uint8, dtype)
    descriptor = dev.has_copy_engine(clips.device)

    def launch(config: dict) -> None:
        block_m, block_n, block_k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        tiles = triton.cdiv(rows.shape[0], block_m) * triton.cdiv(width, block_n)
        embed_visible_fwd_kernel[(tiles,)](
            tile_source(rows, block_m, block_k, descriptor), tile_source(folded, block_n, block_k,
            descriptor), scale, shift, visible, pos, out, rows.shape[0], width, DESCRIPTOR=descriptor,
            UINT8=uint8, PTX=dev.takes_ptx(clips.device), K=values, ROW=rows.shape[1],
            PRECISION=dev.dot_precision(clips.device), **config,
        )  # fmt: skip

    key = (rows.shape[0], width, values, clips.dtype, dtype)
    launch(dev.choose_config("embed_visible_fwd", fwd_configs(dtype, descriptor), key, clips.device, launch))
    return out, rows


# Of one H100 processor, a microsecond: FLOPs; of the memory: bytes. Other models have nearly the same ratio.
FLOPS_PER_US, BYTES_PER_US = 7.2e6, 2.7e6
# A program alone on its processor waits for its own conversions: guessed, for nothing here has been timed.
ALONE = 1.5


def weight_grad_splits(rows: int, width: int, values: int, config: dict, processors: int) -> int:
    """Into how many parts the rows of a weight gradient are cut, none under 256 rows: the number with the
    least time of the busiest processor, and of writing and reading the partial sums. A function of the shape
    and the GPU model alone, so that the sum's order is."""
    block_m, block_n, block_k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(width, block_n) * triton.cdiv(values, block_k)
    step = 2 * block_m * block_n * block_k / FLOPS_PER_US

    def microseconds(splits: int) -> float:
        programs = triton.cdiv(tiles * splits, processors)
        busiest = (programs if programs > 1 else ALONE) * triton.cdiv(rows, splits * block_m) * step
        return busiest + splits * width * values * 8 / BYTES_PER_US

    return min(range(1, max(1, min(16, rows // 256)) + 1), key=microseconds)


def weight_and_bias_grads(
    grad: Tensor, rows: Tensor, patch: int, depth: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Launches the sums of the bias, the weight's partial sums and their second stage: [D, K] in `dtype`, [D]
    float32."""
    width, values, uint8 = grad.shape[2], 3 * depth * patch * patch, rows.dtype == torch.uint8
    found = dev.scratch((width, values), dtype, grad.device)
    bias_grad = dev.scratch((width,), torch.float32, grad.device)
    if grad.numel() == 0:
        return found.zero_(), bias_grad.zero_()
    sums = dev.column_sum_partials(grad)
    descriptor = dev.has_copy_engine(grad.device)
    grad_descriptor = descriptor and width * grad.element_size() % 16 == 0 and grad.data_ptr() % 16 == 0

    def launch(config: dict) -> Tensor:
        block_m, block_n, block_k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        tiles = triton.cdiv(width, block_n) * triton.cdiv(values, block_k)
        splits = weight_grad_splits(rows.shape[0], width, values, config, dev.processors_of(grad.device))
        partial = dev.scratch((splits, width, values), torch.float32, grad.device)
        embed_visible_bwd_weight_kernel[(tiles, splits)](
            tile_source(grad.view(-1, width), block_m, block_n, grad_descriptor),
            tile_source(rows, block_m, block_k, descriptor),
            partial, rows.shape[0], width, triton.cdiv(rows.shape[0], splits * block_m) * block_m,
            DESCRIPTOR=descriptor, GRAD_DESCRIPTOR=grad_descriptor, UINT8=uint8,
            PTX=dev.takes_ptx(grad.device), K=values, ROW=rows.shape[1],
            PRECISION=dev.dot_precision(grad.device), **config,
        )  # fmt: skip
        return partial

    key = (rows.shape[0], width, values, rows.dtype, grad.dtype)
    configs = bwd_configs(grad.dtype, descriptor)
    partial = launch(dev.choose_config("embed_visible_bwd", configs, key, grad.device, launch))
    embed_visible_bwd_finish_kernel[(width,)](
        partial, sums, found, bias_grad, sums.shape[0], width, SPLITS=partial.shape[0], UINT8=uint8, K=values,
        BLOCK_K=triton.next_power_of_2(values), BLOCK_R=triton.next_power_of_2(sums.shape[0]), num_warps=4,
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
    grad: Tensor, rows: Tensor, visible: Tensor, patch: int, depth: int, count: int,
    weight_dtype: torch.dtype, pos_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward: gradients of weight [D, K], bias (float32) and `count` positions (empty without
    `pos_dtype`)."""
    grads = weight_and_bias_grads(grad, rows, patch, depth, weight_dtype)
    return *grads, grad.new_empty(0) if pos_dtype is None else positions_grad(grad, visible, count, pos_dtype)


@torch.library.custom_op("vmae::embed_visible", mutates_args=())
def embed_visible_op(
    clips: Tensor, visible: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return embed_visible_fwd(clips, visible, weight, bias, pos, dtype)


@embed_visible_op.register_fake
def _(clips, visible, weight, bias, pos, dtype):
    kind = torch.uint8 if clips.dtype == torch.uint8 else dtype
    rows = clips.new_empty((visible.numel(), dev.padded_width(weight[0].numel())), dtype=kind)
    return clips.new_empty((*visible.shape, weight.shape[0]), dtype=dtype), rows


@torch.library.custom_op("vmae::embed_visible_backward", mutates_args=())
def embed_visible_backward_op(
    grad: Tensor, rows: Tensor, visible: Tensor, patch: int, depth: int, count: int,
    weight_dtype: torch.dtype, pos_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return embed_visible_bwd(grad, rows, visible, patch, depth, count, weight_dtype, pos_dtype)


@embed_visible_backward_op.register_fake
def _(grad, rows, visible, patch, depth, count, weight_dtype, pos_dtype):
    width = grad.shape[-1]
    pos_grad = grad.new_empty(0) if pos_dtype is None else grad.new_empty((count, width), dtype=pos_dtype)
    weight_grad = grad.new_empty((width, 3 * depth * patch * patch), dtype=weight_dtype)
    return weight_grad, grad.new_empty((width,), dtype=torch.float32), pos_grad


def _setup_context(ctx, inputs, output):
    _, visible, weight, bias, pos, _ = inputs
    rows = output[1]
    ctx.mark_non_differentiable(rows)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rows, visible)
    ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.pos_shape, ctx.pos_dtype = pos.shape, pos.dtype


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    rows, visible = ctx.saved_tensors
    width, _, depth, patch, _ = ctx.weight_shape
    _, _, needs_weight, needs_bias, needs_pos, _ = ctx.needs_input_grad
    count, pos_dtype = ctx.pos_shape.numel() // width, ctx.pos_dtype if needs_pos else None
    weight_grad, bias_grad, pos_grad = embed_visible_backward_op(
        grad, rows, visible, patch, depth, count, ctx.weight_dtype, pos_dtype
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
    clips: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    *,
    backend: str = "auto",
    statistics: Statistics | None = None,
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
        statistics: of stored clips, uint8, uint16 or float32 [B, T, H, W, C], with weight [D, C, t, p, p];
            the kernels take none, so "auto" is PyTorch.

    Returns:
        [B, Nv, D] in the weight's dtype, or autocast's. Gradients reach weight, bias and pos, in their own
            dtype and summed in
        float32. The kernels form none of pixels; where float clips need one, "auto" is PyTorch.

    Cost: B * Nv * K bytes of a uint8 clip read (K = 3 t p p), written as rows and kept for the backward, B *
    Nv * D tokens written, 2 * B * Nv * K * D FLOPs; the backward reads the rows, as many FLOPs, and 4 * D * K
    bytes of scratch for each split of the rows.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend, indices out of range when they are
            checked, "triton" where it cannot run or where clips need a gradient.
    """
    channels = 3 if statistics is None else len(statistics.mean)
    if weight.ndim != 5 or weight.shape[1] != channels or weight.shape[3] != weight.shape[4]:
        raise ValueError(f"weight must be [D, {channels}, t, p, p], not {list(weight.shape)}")
    frames, rows, columns = clip_grid(clips, weight.shape[3], weight.shape[2], statistics)
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
    backend = backend_for("embed_visible", backend, statistics)
    tensors = dict(clips=clips, visible=visible, weight=weight, bias=bias, pos=pos)
    if choose_backend("embed_visible", backend, dtype, tensors) == "triton":
        return embed_visible_op(clips, visible.to(torch.int32), weight, bias, pos, dtype)[0]
    if dev.checking_indices():
        dev.check_indices(visible, frames * rows * columns, "visible")
    return embed_visible_ref(clips, visible, weight, bias, pos, statistics)
