"""Clips of different lengths, grids or visible counts in one batch: their tokens one after the other, none
padded.

The encoder's and the decoder's layers work on [1, T, D]; only attention has to know where a clip ends.
`Lengths` tells it: flash-attn, torch's `varlen_attn` and xformers take it as it is, SDPA and the plain one
through padding and a key mask, with the same numbers. Embedding, targets and loss run once per group of clips
with equal counts.

Legend: B clips, T tokens of all clips together, Nv visible, Nd decoded, H heads, d head width, D width, P
values of a tubelet.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.masking import DualMask
from vmae.model.attention.packed import Lengths
from vmae.model.embed import clip_sides, sine_cosine_positions, statistics_of
from vmae.model.rows import Rows
from vmae.model.target import Target
from vmae_kernels import assemble_decoder_tokens, embed_visible


class Parts(Protocol):
    """The parts of a `vmae.model.Pretrainer` that packed batches use."""

    config: ModelConfig
    encoder: Any  # Encoder and Decoder of vmae.model.pretrainer, which imports this module
    decoder: Any
    pos_embed: Tensor
    backend: str
    target: Target

    @property
    def mask_token(self) -> Tensor: ...

    def narrow(self, encoded: Tensor, /) -> Tensor: ...

    def final_norm(self, rows: Tensor, /) -> Tensor: ...


# --- the pre-trainer on groups of clips ---------------------------------------------------------------------


def check_groups(model: Parts, clips: Sequence[Tensor] | Tensor, masks: Sequence[DualMask]) -> list[Tensor]:
    """Clips of each mask, or InputError."""
    if not masks:
        raise InputError("a packed batch needs at least one mask")
    if isinstance(clips, Tensor):
        counts = [mask.batch for mask in masks]
        if sum(counts) != clips.shape[0]:
            raise InputError(f"masks of {sum(counts)} clips in total do not fit {clips.shape[0]} clips")
        clips = clips.split(counts)
    if len(clips) != len(masks):
        raise InputError(f"{len(clips)} groups of clips do not fit {len(masks)} masks")
    for group, mask in zip(clips, masks):
        frames, height, width = clip_sides(group, model.config)
        size = (model.config.tubelet_size, model.config.patch_size, model.config.patch_size)
        tokens = (frames // size[0]) * (height // size[1]) * (width // size[2])
        if (
            group.shape[0] != mask.batch
            or tokens != mask.num_tokens
            or frames % size[0]
            or height % size[1]
            or width % size[2]
        ):
            raise InputError(
                f"clips of shape {list(group.shape)}, {tokens} tokens each, do not fit a mask of "
                f"{mask.batch} clips of "
                f"{mask.num_tokens} tokens (tubelets of {size[0]} x {size[1]} x {size[2]})"
            )
    return list(clips)


def positions_of(table: Tensor, tokens: int) -> Tensor:
    """[1, N, D]: the positions that a model built for clips of N tokens has.

    The fixed table is a function of the token's index alone, so one of any size is at hand.
    """
    if tokens == table.shape[1]:
        return table
    if isinstance(table, nn.Parameter):
        raise InputError(
            f"learned positions are for clips of {table.shape[1]} tokens, not of {tokens}; clips of other "
            "sizes need fixed ones"
        )
    if tokens < table.shape[1]:
        return table[:, :tokens]
    return _longer_table(tokens, table.shape[2], table.device)


@functools.lru_cache(maxsize=16)
def _longer_table(tokens: int, dim: int, device: torch.device) -> Tensor:
    return sine_cosine_positions(tokens, dim).to(device)


def _pack(groups: list[Tensor]) -> tuple[Tensor, Lengths]:
    """[B, N, D] groups of unequal N -> [1, T, D], and the lengths of the sequences."""
    counts = tuple(group.shape[1] for group in groups for _ in range(group.shape[0]))
    return torch.cat([group.flatten(0, 1) for group in groups])[None], Lengths(counts, groups[0].device)


def _unpack(x: Tensor, groups: list[Tensor]) -> list[Tensor]:
    """[1, T, D] -> views [B, N, D] with the B and N of `groups`."""
    parts = x[0].split([group.shape[0] * group.shape[1] for group in groups])
    return [part.unflatten(0, group.shape[:2]) for part, group in zip(parts, groups)]


def _pack_rows(groups: list[Rows], sequences: list[Tensor]) -> Rows:
    """Rows of groups of sequences [B, N, D] as rows of the packed ones, [1, T, D]."""
    device, total = sequences[0].device, sum(rows.keep.numel() for rows in groups)
    keep, uses, first, place = [], [], 0, 0
    for rows, sequence in zip(groups, sequences):
        (batch, tokens), count = sequence.shape[:2], rows.keep.shape[1]
        clip = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
        keep.append((rows.keep + clip * tokens + first).flatten())
        if rows.uses is not None:
            uses.append(torch.where(rows.uses < count, rows.uses + clip * count + place, total).flatten())
        first, place = first + batch * tokens, place + batch * count
    lengths = Lengths(tuple(rows.keep.shape[1] for rows in groups for _ in range(rows.keep.shape[0])), device)
    inverse = torch.cat(uses)[None] if uses else None
    return Rows(torch.cat(keep)[None], inverse, groups[0].backend, lengths)


def _decoded(
    model: Parts, clips: list[Tensor], masks: Sequence[DualMask], groups_of_rows: list[Rows]
) -> list[Tensor]:
    """Those rows of the decoder's output [B, Nv + Nd, Dd] of each group, before its final norm."""
    encoder, proj, backend = model.encoder, model.encoder.patch_embed.proj, model.backend
    groups = []
    for group, mask in zip(clips, masks):
        positions = positions_of(encoder.pos_embed, mask.num_tokens)
        statistics = statistics_of(group, model.config)
        groups.append(
            embed_visible(
                group,
                mask.visible,
                proj.weight,
                proj.bias,
                positions,
                backend=backend,
                statistics=statistics,
            )
        )
    x, lengths = _pack(groups)
    for block in encoder.blocks:
        x = block(x, lengths)
    x = model.narrow(x)
    sequences = []
    for part, mask in zip(_unpack(x, groups), masks):
        positions = positions_of(model.pos_embed, mask.num_tokens)
        sequences.append(
            assemble_decoder_tokens(
                part, model.mask_token, positions, mask.visible, mask.decode, backend=backend
            )
        )
    x, lengths = _pack(sequences)
    *blocks, last = model.decoder.blocks
    for block in blocks:
        x = block(x, lengths)
    x = last(x, lengths, _pack_rows(groups_of_rows, sequences))
    return _unpack(x, [rows.keep for rows in groups_of_rows])


def packed_loss(
    model: Parts,
    clips: Sequence[Tensor] | Tensor,
    masks: Sequence[DualMask],
    values: Sequence[Tensor] | Tensor | None = None,
) -> Tensor:
    """The loss of clips with unequal counts: the weighted mean over the counted tokens of all of them, a
    float32 scalar.

    Args:
        clips: one tensor per mask, uint8 [B, T, H, W, 3] or normalised float [B, 3, T, H, W]; sizes may
            differ from group to group. Or one tensor, whose clips are dealt out to the masks in order.
        masks: of the clips of each group.
        values: the target's [B, Nk, C] of each group, where they are known already.

    Raises:
        InputError: clips, masks and values that do not fit each other, or another size where positions are
            learned.
    """
    clips = check_groups(model, clips, masks)
    known = [None] * len(masks) if values is None else list(values)
    if isinstance(values, Tensor) or len(known) != len(masks):
        raise InputError(f"{len(masks)} masks need as many groups of values, in a list")
    head = model.decoder.head
    counted = [Rows(mask.hidden_rows, mask.hidden_uses, model.backend) for mask in masks]
    losses, weights = [], []
    for rows, group, mask, own in zip(_decoded(model, clips, masks, counted), clips, masks, known):
        loss = model.target.loss(model.final_norm(rows), head, group, mask, values=own, backend=model.backend)
        weight = mask.target_weight.sum()
        losses.append(loss * weight)
        weights.append(weight)
    return sum(losses[1:], losses[0]) / sum(weights[1:], weights[0])


def packed_predict(model: Parts, clips: Sequence[Tensor] | Tensor, masks: Sequence[DualMask]) -> list[Tensor]:
    """Predicted tubelets [B, Nd, P] of each group; see `packed_loss`."""
    clips = check_groups(model, clips, masks)
    decoded = [Rows(mask.decoded_rows, None, model.backend) for mask in masks]
    return [model.decoder.head(model.final_norm(x)) for x in _decoded(model, clips, masks, decoded)]
