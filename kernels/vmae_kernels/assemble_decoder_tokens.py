"""The decoder's input: encoded visible tokens and mask tokens, each with its position.

Idea: the published code expands the position table over the batch, gathers it twice with booleans, adds and
concatenates. Here each row of the result is written once: `B * (Nv + Nd) * Dd` elements, read `B * Nv * Dd`
encoded ones and the table; one addition an element. The backward writes nothing for `encoded` (its gradient
is a view) and reads the gradient of the `B * Nd` mask tokens once, in a two-stage sum.

Legend: B clips, Nv visible tokens, Nd decoded tokens, N all tokens, Dd decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmae_kernels import device as dev
from vmae_kernels.backend import choose_backend
from vmae_kernels.device import round_to
from vmae_kernels.optional_triton import tl, triton


def assemble_decoder_tokens_ref(
    encoded: Tensor, mask_token: Tensor, pos: Tensor, visible: Tensor, decode: Tensor
) -> Tensor:
    """Plain PyTorch; same arguments and result as `assemble_decoder_tokens`."""
    table = pos.flatten(0, -2).to(encoded.dtype)
    shown = encoded + table[visible.long()]
    hidden = mask_token.flatten().to(encoded.dtype) + table[decode.long()]
    return torch.cat([shown, hidden], dim=1)


@triton.jit
def assemble_decoder_tokens_fwd_kernel(
    p_encoded, p_mask_token, p_pos, p_visible, p_decode, p_out,
    n_rows, n_visible, n_decode, width, stride_b, stride_row, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of the decoder's input, each an encoded or the mask token plus its position."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r, m_d = o_r < n_rows, o_d < width
    i_clip, i_row = o_r // (n_visible + n_decode), o_r % (n_visible + n_decode)
    m_shown = i_row < n_visible
    b_token = tl.load(p_visible + i_clip * n_visible + i_row, mask=m_r & m_shown, other=0)
    b_token += tl.load(
        p_decode + i_clip * n_decode + i_row - n_visible, mask=m_r & (i_row >= n_visible), other=0
    )
    m_x = m_r[:, None] & m_d[None, :]
    b_x = tl.load(p_pos + b_token.to(tl.int64)[:, None] * width + o_d[None, :], mask=m_x, other=0.0).to(
        tl.float32
    )
    o_encoded = i_clip * tl.cast(stride_b, tl.int64) + i_row * stride_row
    m_encoded = m_x & m_shown[:, None]
    b_x += tl.load(p_encoded + o_encoded[:, None] + o_d[None, :], mask=m_encoded, other=0.0).to(tl.float32)
    b_mask = tl.load(p_mask_token + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_x += tl.where(m_shown[:, None], 0.0, b_mask[None, :])
    tl.store(p_out + o_r[:, None] * width + o_d[None, :], round_to(b_x, p_out.dtype.element_ty), mask=m_x)


def fwd_config(width: int) -> dict:
    """Rows of one program: about 4096 elements, 32 a thread, so that several loads are in flight."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_R": max(1, 4096 // block), "BLOCK_D": block, "num_warps": 4}


@dev.launcher("encoded")
def assemble_decoder_tokens_fwd(
    encoded: Tensor, mask_token: Tensor, pos: Tensor, visible: Tensor, decode: Tensor
) -> Tensor:
    """Launches the forward."""
    batch, shown, width = encoded.shape
    hidden = decode.shape[1]
    if dev.checking_indices():
        dev.check_indices(visible, pos.numel() // width, "visible")
        dev.check_indices(decode, pos.numel() // width, "decode")
    out = dev.scratch((batch, shown + hidden, width), encoded.dtype, encoded.device)
    if out.numel() == 0:
        return out
    config = fwd_config(width)
    rows = batch * (shown + hidden)
    assemble_decoder_tokens_fwd_kernel[(triton.cdiv(rows, config["BLOCK_R"]),)](
        encoded, mask_token, pos, visible, decode, out,
        rows, shown, hidden, width, encoded.stride(0), encoded.stride(1), **config,
    )  # fmt: skip
    return out


@torch.library.custom_op("vmae::assemble_decoder_tokens", mutates_args=())
def assemble_decoder_tokens_op(
    encoded: Tensor, mask_token: Tensor, pos: Tensor, visible: Tensor, decode: Tensor
) -> Tensor:
    return assemble_decoder_tokens_fwd(encoded, mask_token, pos, visible, decode)


@assemble_decoder_tokens_op.register_fake
def _(encoded, mask_token, pos, visible, decode):
    return encoded.new_empty((encoded.shape[0], visible.shape[1] + decode.shape[1], encoded.shape[2]))


@dev.launcher("grad")
def mask_token_grad(grad: Tensor, shown: int, dtype: torch.dtype) -> Tensor:
    """Launches both stages of the sum over the decoded rows."""
    if grad.shape[0] * (grad.shape[1] - shown) == 0:
        return grad.new_zeros(grad.shape[2], dtype=dtype)
    return dev.reduce_partials(dev.column_sum_partials(grad, shown), dtype)


@torch.library.custom_op("vmae::assemble_decoder_tokens_mask_grad", mutates_args=())
def mask_token_grad_op(grad: Tensor, shown: int, dtype: torch.dtype) -> Tensor:
    return mask_token_grad(grad, shown, dtype)


@mask_token_grad_op.register_fake
def _(grad, shown, dtype):
    return grad.new_empty((grad.shape[2],), dtype=dtype)


def _setup_context(ctx, inputs, output):
    encoded, mask_token, *_ = inputs
    ctx.shown, ctx.mask_shape, ctx.mask_dtype = encoded.shape[1], mask_token.shape, mask_token.dtype


def _backward(ctx, grad):
    needs_encoded, needs_mask, *_ = ctx.needs_input_grad
    mask_grad = (
        mask_token_grad_op(grad, ctx.shown, ctx.mask_dtype).view(ctx.mask_shape) if needs_mask else None
    )
    return grad[:, : ctx.shown] if needs_encoded else None, mask_grad, None, None, None


assemble_decoder_tokens_op.register_autograd(_backward, setup_context=_setup_context)


def assemble_decoder_tokens(
    encoded: Tensor,
    mask_token: Tensor,
    pos: Tensor,
    visible: Tensor,
    decode: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """`encoded[b, i] + pos[visible[b, i]]`, then `mask_token + pos[decode[b, j]]` (VideoMAE V2, section 3.2).

    Args:
        encoded: [B, Nv, Dd], the encoder's output at the decoder's width.
        mask_token: [1, 1, Dd] or [Dd].
        pos: [N, Dd] or [1, N, Dd], fixed positions. Where they need a gradient, "auto" is PyTorch.
        visible: int32 [B, Nv].
        decode: int32 [B, Nd]; duplicates are legal in both.
        backend: "torch", "triton" or "auto" (Triton on a GPU).

    Returns:
        [B, Nv + Nd, Dd] in the dtype of `encoded`, under autocast too (an addition casts nothing). The mask
            token's gradient is
        summed in float32 in a fixed order.

    Cost: B * (2 Nv + Nd) * Dd elements and the position table moved; the backward B * Nd * Dd.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend, indices out of range when
            VMAE_CHECK_INDICES=1, "triton" where it cannot run or where `pos` needs a gradient.
    """
    if encoded.ndim != 3 or encoded.shape[:2] != visible.shape:
        raise ValueError(
            f"encoded {list(encoded.shape)} does not fit visible {list(visible.shape)}: [B, Nv, D] and [B, "
            "Nv]"
        )
    if mask_token.numel() != encoded.shape[2] or pos.shape[-1] != encoded.shape[2]:
        raise ValueError(
            f"mask token {list(mask_token.shape)} and positions {list(pos.shape)} must have width "
            f"{encoded.shape[2]}"
        )
    if decode.ndim != 2 or decode.shape[0] != encoded.shape[0]:
        raise ValueError(f"decode must be [B={encoded.shape[0]}, Nd], not {list(decode.shape)}")
    tensors = dict(encoded=encoded, mask_token=mask_token, pos=pos, visible=visible, decode=decode)
    if choose_backend("assemble_decoder_tokens", backend, encoded.dtype, tensors) == "triton":
        return assemble_decoder_tokens_op(
            encoded, mask_token, pos, visible.to(torch.int32), decode.to(torch.int32)
        )
    if dev.checking_indices():
        dev.check_indices(visible, pos.numel() // pos.shape[-1], "visible")
        dev.check_indices(decode, pos.numel() // pos.shape[-1], "decode")
    return assemble_decoder_tokens_ref(encoded, mask_token, pos, visible, decode)
