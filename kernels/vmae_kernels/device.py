"""What the kernels share: device helpers, launch configurations, scratch memory, index checks, autocast.

Names in all kernels: `i_` program or token id, `o_` offset, `m_` mask, `p_` pointer, `b_` block held in
registers.

The interpreter (`TRITON_INTERPRET=1`) computes bf16 wrongly and truncates float32 to bf16. So kernels upcast
what they load to `DOT`-able float32 there, and `round_to` rounds by hand: interpreted results obey the same
error bound as a device's.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vmae_kernels import autotune
from vmae_kernels.optional_triton import tl, triton
from vmae_kernels.tubelets import MEAN, STD, clip_strides

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

# A uint8 pixel minus CENTRE is an integer of at most 8 bits: exact in bf16, fp16 and tf32, and still so when
# divided by PIXEL_UNIT, a power of two.
CENTRE = tl.constexpr(114)
PIXEL_UNIT = tl.constexpr(64.0)
MEAN_R, MEAN_G, MEAN_B = (tl.constexpr(value) for value in MEAN)
STD_R, STD_G, STD_B = (tl.constexpr(value) for value in STD)

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def round_to(b_x, DTYPE: tl.constexpr):
    """float32 block to DTYPE, to nearest even. The interpreter's own cast truncates."""
    if INTERPRET and DTYPE == tl.bfloat16:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        b_x = b_bits.to(tl.float32, bitcast=True)
    return b_x.to(DTYPE)


@triton.jit
def operand(b_x, DTYPE: tl.constexpr):
    """A block as `tl.dot` takes it: DTYPE on a device; the same values in float32 when interpreting."""
    if INTERPRET:
        return round_to(b_x.to(tl.float32), DTYPE).to(tl.float32)
    else:
        return b_x.to(DTYPE)


@triton.jit
def by_channel(o_channel, b_r, b_g, b_b):
    return tl.where(o_channel == 0, b_r, tl.where(o_channel == 1, b_g, b_b))


@triton.jit
def tubelet_offsets(
    p_tokens, i_row, n_tokens, columns, per_frame, stride_b, stride_t, stride_h,
    PATCH: tl.constexpr, DEPTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """int64 element offset of the first pixel of each row's tubelet. `i_row` int64 counts over clips and
    their tokens."""
    i_token = tl.load(p_tokens + i_row)
    i_place = i_token % per_frame
    o_x = i_place % columns * (PATCH * 3 if CHANNELS_LAST else PATCH)
    o_clip = (i_token // per_frame * DEPTH) * stride_t + (i_place // columns * PATCH) * stride_h + o_x
    return (i_row // n_tokens) * tl.cast(stride_b, tl.int64) + o_clip


@triton.jit
def pixel_offsets(
    o_k, stride_t, stride_h, stride_c, PATCH: tl.constexpr, DEPTH: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """int32 element offset inside a tubelet of value `o_k`: order (t, h, w, c) for uint8 clips, (c, t, h, w)
    for float ones."""
    if CHANNELS_LAST:
        o_line = o_k // (3 * PATCH)
        return o_line // PATCH * stride_t + o_line % PATCH * stride_h + o_k % (3 * PATCH)
    else:
        o_line = o_k // PATCH
        o_frame = o_line // PATCH
        return (
            o_frame // DEPTH * stride_c + o_frame % DEPTH * stride_t + o_line % PATCH * stride_h + o_k % PATCH
        )


@triton.jit
def target_offsets(o_p, stride_t, stride_h, stride_c, PATCH: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """int32 element offset inside a tubelet of value `o_p` in the order of predictions, (t, h, w, c)."""
    o_line = o_p // (3 * PATCH)
    o_pixel = o_line // PATCH * stride_t + o_line % PATCH * stride_h
    if CHANNELS_LAST:
        return o_pixel + o_p % (3 * PATCH)
    else:
        return o_pixel + o_p // 3 % PATCH + o_p % 3 * stride_c


# Four bytes to four operands, `(x - CENTRE) / PIXEL_UNIT`, in as many instructions: no conversion from
# integers, of which a processor does 16 a cycle. A byte under 0x64 is the fp16 number 1024 + x; a byte under
# 0 the (subnormal) bf16 number x * 2**-133. `tests/kernels/test_embed_visible.py` evaluates both for every
# byte.
FP16_PIXELS = tl.constexpr("""{
    .reg .b32 high, unit, shift, low_pair, high_pair;
    mov.b32 high, 0x64646464; mov.b32 unit, 0x24002400; mov.b32 shift, 0xcc72cc72;
    prmt.b32 low_pair, $2, high, 0x4140; prmt.b32 high_pair, $2, high, 0x4342;
    fma.rn.f16x2 $0, low_pair, unit, shift; fma.rn.f16x2 $1, high_pair, unit, shift;
}""")
BF16_PIXELS = tl.constexpr("""{
    .reg .b32 high, unit, shift, low_pair, high_pair;
    mov.b32 high, 0x00000000; mov.b32 unit, 0x7f007f00; mov.b32 shift, 0xbfe4bfe4;
    prmt.b32 low_pair, $2, high, 0x4140; prmt.b32 high_pair, $2, high, 0x4342;
    fma.rn.bf16x2 $0, low_pair, unit, shift; fma.rn.bf16x2 $1, high_pair, unit, shift;
}""")


@triton.jit
def pixel_operand(b_x, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """uint8 pixels as a matrix operand: `(x - CENTRE) / PIXEL_UNIT`, exact in DTYPE. `PTX`: the device is
    NVIDIA's."""
    if PTX and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            FP16_PIXELS, "=r,=r,r", [b_x], dtype=tl.float16, is_pure=True, pack=4
        )
    elif PTX and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            BF16_PIXELS, "=r,=r,r", [b_x], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        # The byte as the last of a float32 number: 2**23 + x.
        b_x = (b_x.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
        return operand((b_x - (8388608.0 + CENTRE)) * (1 / PIXEL_UNIT), DTYPE)


@triton.jit
def column_sum_kernel(
    p_x, p_partial, n_rows, n_per_clip, first, stride_b, stride_row, n_columns, rows_per_program,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """First stage of a deterministic sum: partial[i] = sum of rows i * rows_per_program ... of x[:,
    first:]."""
    i_part = tl.program_id(1)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < n_columns
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for o_row in range(0, rows_per_program, BLOCK_R):
        o_r = o_row + tl.arange(0, BLOCK_R)
        i_row = i_part * rows_per_program + o_r  # 32 bits: a division of 64 costs some 100 instructions
        m_r = (o_r < rows_per_program) & (i_row < n_rows)
        o_clip = (i_row // n_per_clip) * tl.cast(stride_b, tl.int64)
        o_x = o_clip + (first + i_row % n_per_clip) * tl.cast(stride_row, tl.int64)
        b_sum += tl.load(p_x + o_x[:, None] + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0).to(
            tl.float32
        )
    tl.store(p_partial + i_part.to(tl.int64) * n_columns + o_d, tl.sum(b_sum, 0), mask=m_d)


@triton.jit
def reduce_partials_kernel(
    p_partial, p_out, n_parts, n_columns, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Second stage: out = sum of the partial rows, always in the same order."""
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < n_columns
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for o_row in range(0, n_parts, BLOCK_R):
        i_row = (o_row + tl.arange(0, BLOCK_R)).to(tl.int64)
        m_x = (i_row < n_parts)[:, None] & m_d[None, :]
        b_sum += tl.load(p_partial + i_row[:, None] * n_columns + o_d[None, :], mask=m_x, other=0.0)
    b_out = round_to(tl.sum(b_sum, 0), p_out.dtype.element_ty)
    tl.store(p_out + o_d, b_out, mask=m_d)


COLUMN_SUM = {"BLOCK_R": 16, "BLOCK_D": 128, "num_warps": 4, "num_stages": 2}
# A tile of REDUCE_TILE values, as high as there are parts (at most 32): few parts of many columns are not
# cut into tens of thousands of programs.
REDUCE_TILE = 2048
# More parts than this are summed in groups first, side by side.
MANY_PARTS = 256


def column_sum_partials(x_BND: Tensor, first: int = 0) -> Tensor:
    """float32 [parts, D]: sums of groups of rows of `x[:, first:]`, whose last dimension is contiguous."""
    batch, tokens, width = x_BND.shape
    rows = batch * (tokens - first)
    parts = max(1, min(128, triton.cdiv(rows, 32)))
    partial = scratch((parts, width), torch.float32, x_BND.device)
    grid = (triton.cdiv(width, COLUMN_SUM["BLOCK_D"]), parts)
    column_sum_kernel[grid](
        x_BND, partial, rows, max(tokens - first, 1), first, x_BND.stride(0), x_BND.stride(1), width,
        triton.cdiv(rows, parts), **COLUMN_SUM,
    )  # fmt: skip
    return partial


def reduce_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of float32 [parts, D] over its rows, in a fixed order."""
    if partial.shape[0] > MANY_PARTS:
        partial = column_sum_partials(partial[None])
    parts, width = partial.shape
    out = scratch((width,), dtype, partial.device)
    block_r = min(32, triton.next_power_of_2(parts))
    block_d = REDUCE_TILE // block_r
    reduce_partials_kernel[(triton.cdiv(width, block_d),)](
        partial, out, parts, width, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4, num_stages=2
    )
    return out


def _adjacent_values(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def launcher(*by_rows: str) -> Callable[[Callable], Callable]:
    """Guards a launcher. All of them have it, so every tensor passes here on its way to a kernel, upstream
    gradients too.

    Kernels read a tensor as if it were contiguous: one that is passes as it is, another is copied. Two kinds
    keep strides: clips (`clip_arguments`), and the parameters `by_rows`, of which the values of a row must be
    adjacent. The first tensor's GPU becomes the current one: Triton launches there, wherever its arguments
    are. `choose_backend` found all on one device.
    """

    def guard(launch: Callable) -> Callable:
        parameters = inspect.signature(launch).parameters.values()
        tensors = [
            (i, x.name) for i, x in enumerate(parameters) if "Tensor" in x.annotation and x.name != "clips"
        ]
        rules = [(i, _adjacent_values if name in by_rows else Tensor.contiguous) for i, name in tensors]

        @functools.wraps(launch)
        def guarded(*args):
            for i, rule in rules:
                if args[i] is not None and not args[i].is_contiguous():
                    args = (*args[:i], rule(args[i]), *args[i + 1 :])
            if not args[0].is_cuda:
                return launch(*args)
            with torch.cuda.device(args[0].device):
                return launch(*args)

        return guarded

    return guard


def scratch(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that kernels will write: uninitialised, or NaN (the largest integer) with VMAE_NAN_SCRATCH=1, so
    that a gap is seen."""
    if os.environ.get("VMAE_NAN_SCRATCH") == "1":
        gap = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        return torch.full(tuple(shape), gap, dtype=dtype, device=device)
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def checking_indices() -> bool:
    """VMAE_CHECK_INDICES=1: every operation checks its indices first (and waits for the device)."""
    return os.environ.get("VMAE_CHECK_INDICES") == "1"


def check_indices(tokens: Tensor, count: int, name: str) -> None:
    """Raises ValueError unless all of `tokens` lie in [0, count). Waits for the device; out of range is
    otherwise undefined."""
    if tokens.numel() == 0:
        return
    low, high = tokens.min().item(), tokens.max().item()
    if low < 0 or high >= count:
        raise ValueError(
            f"{name} holds indices {low} to {high}; there are {count}, so 0 to {count - 1} are valid"
        )


def working_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype F.linear would compute in: autocast's where it is on (float64 and meta tensors excepted),
    else `dtype`."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


# Set by vmae_kernels.build, which launches nothing: the target to choose for, and which candidate
# configuration.
BUILD_TARGET: str | None = None
BUILD_CANDIDATE = 0


# Built for sm_75 (ViT-B, bf16 and fp16): no tensor-core instruction, 2,800 to 7,500 stack bytes in each of
# the projections.
OLDEST_CAPABILITY = (8, 0)

_capability = functools.cache(lambda device: torch.cuda.get_device_capability(device))


@torch.compiler.assume_constant_result
def why_too_old(device: torch.device) -> str | None:
    """Why the kernels do not run on a GPU; None where they do, and on all of AMD's that PyTorch knows."""
    if torch.version.hip is not None or _capability(device) >= OLDEST_CAPABILITY:
        return None
    found, needed = (
        ".".join(map(str, capability)) for capability in (_capability(device), OLDEST_CAPABILITY)
    )
    return (
        f"{device} has compute capability {found}; before {needed} the kernels use no tensor cores and spill "
        "registers"
    )


def target_of(device: torch.device) -> str:
    """ "sm_80", "sm_90", ..., "hip" or "cpu" (interpreting)."""
    if BUILD_TARGET is not None:
        return BUILD_TARGET
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return "hip"
    major, minor = _capability(device)
    return f"sm_{major}{minor}"


def is_nvidia(target: str) -> bool:
    return target.startswith("sm_")


# Streaming multiprocessors (compute units) of the models that a target's binaries run on: A100, H100 SXM,
# B200, MI300X. For builds; interpreting takes the H100's.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "cpu": 132}

_processors = functools.cache(lambda device: torch.cuda.get_device_properties(device).multi_processor_count)


def processors_of(device: torch.device) -> int:
    """Processors of the device, for which grids are sized. Sums in two stages depend on it: the same bits
    come from one GPU model every time, other last bits from another model."""
    if BUILD_TARGET is not None or device.type != "cuda":
        return PROCESSORS[target_of(device)]
    return _processors(device)


def takes_ptx(device: torch.device) -> bool:
    """Whether kernels may hold PTX: they are built for NVIDIA, and not interpreted."""
    return is_nvidia(target_of(device))


def dot_precision(device: torch.device) -> str:
    """How float32 is multiplied: three tf32 products on NVIDIA (error near float32's own), exactly
    elsewhere."""
    return "tf32x3" if is_nvidia(target_of(device)) else "ieee"


def has_copy_engine(device: torch.device) -> bool:
    """Whether tensor descriptors are worth it: compute capability 9.0 and up. Elsewhere Triton emulates them
    with 2-byte loads. The interpreter takes them too, so that both ways are tested (VMAE_NO_DESCRIPTOR=1: the
    other one)."""
    target = target_of(device)
    if os.environ.get("VMAE_NO_DESCRIPTOR") == "1":
        return False
    return target == "cpu" or (is_nvidia(target) and int(target[3:]) >= 90)


def clip_arguments(clips: Tensor, tokens: int, grid: tuple[int, int, int]) -> tuple[Tensor, tuple[int, ...]]:
    """The clip, and what kernels need to find a tubelet: tokens a clip, columns, tokens a frame, strides."""
    clips, (stride_b, stride_t, stride_h, stride_c) = clip_strides(clips)
    return clips, (tokens, grid[2], grid[1] * grid[2], stride_b, stride_t, stride_h, stride_c)


def padded_width(width: int) -> int:
    """Row length that keeps rows of bytes aligned to 16, which the copy engine demands."""
    return -(-width // 16) * 16  # without Triton too: shapes are told for steps that are only counted


def choose_config(
    kernel: str, candidates: list[dict], key: tuple, device: torch.device, launch: Callable[[dict], object]
) -> dict:
    """The launch configuration of a projection kernel: the first candidate, or with VMAE_AUTOTUNE=1 the
    fastest (`autotune`).

    Off by default: timing waits for the device, and another tile order moves the last bits of a sum. Nothing
    is timed while a CUDA graph is captured: what was chosen before goes into it, else the first.
    """
    if BUILD_TARGET is not None:
        return candidates[min(BUILD_CANDIDATE, len(candidates) - 1)]
    if INTERPRET or os.environ.get("VMAE_AUTOTUNE") != "1" or len(candidates) == 1:
        return candidates[0]
    timer = None if torch.cuda.is_current_stream_capturing() else autotune.device_milliseconds
    return autotune.choose(torch.cuda.get_device_name(device), kernel, candidates, key, launch, timer)
