"""Dual masking in index form (VideoMAE V2, section 3.2).

Legend: B clips, N tokens of a clip in (frame, row, column) order, Nv visible, Nd decoded, Nk counted by the
loss. Masks are made from the two small grids (a frame, a 2 x 2 cell), never from booleans over all tokens,
and moved as int32.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from vmae.config import DECODER_MASKS, ENCODER_MASKS
from vmae.errors import InputError

Grid = tuple[int, int, int]

RUNNING_CELL_RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class DualMask:
    """Sorted token indices of a batch of clips.

    Attributes:
        visible: int32 [B, Nv], tokens that the encoder sees.
        decode: int32 [B, Nd], tokens that the decoder gets a mask token for.
        weight: float32 [B, Nd], 1 where the encoder did not see the token, else 0.
        keep: int32 [B, Nk], positions in `decode` that reach the head: the tokens of weight 1 where every
            clip has equally many, else all of them. So shapes stay static and no count is ever read back from
            a GPU.
        num_tokens: N.
    """

    visible: Tensor
    decode: Tensor
    weight: Tensor
    keep: Tensor
    num_tokens: int

    @classmethod
    def sample(
        cls,
        batch: int,
        grid: Grid,
        *,
        encoder: str = "tube",
        encoder_ratio: float = 0.9,
        decoder: str = "running_cell",
        decoder_ratio: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> DualMask:
        """Draw masks for `batch` clips of `grid` = (frames, rows, columns) tokens, on the CPU.

        Args:
            encoder: "tube" (one spatial mask for all frames), "random", or "frame" (whole frames hidden).
            encoder_ratio: share hidden, rounded down to whole tokens (of a frame for tube, frames for frame).
            decoder: "running_cell" (ratio 0.25, 0.5 or 0.75), "random", "frame", or "none" (all that the
                encoder did not see: VideoMAE V1). A `decoder_ratio` of 0 is "none" too, as in the published
                code.
            decoder_ratio: share of all tokens that the decoder leaves out.

        Raises:
            InputError: an unknown kind, a ratio that leaves no token to one side, or a grid that the kind
                can't tile.
        """
        if batch < 0 or min(grid) < 1:
            raise InputError(f"cannot mask {batch} clips of {grid} tokens: every number must be positive")
        for name, ratio in (("encoder_ratio", encoder_ratio), ("decoder_ratio", decoder_ratio)):
            if not 0 <= ratio < 1:
                raise InputError(f"{name} must be in [0, 1), not {ratio}")
        visible = _sample_encoder(batch, grid, encoder, encoder_ratio, generator)
        num_tokens = grid[0] * grid[1] * grid[2]
        if decoder == "none" or decoder_ratio == 0:
            if decoder not in DECODER_MASKS:
                raise InputError(f"unknown decoder mask {decoder!r}; known: {', '.join(DECODER_MASKS)}")
            decode = _complement(visible, num_tokens)
        else:
            decode = _sample_decoder(batch, grid, decoder, decoder_ratio, generator)
        steady = (
            decoder == "none"
            or decoder_ratio == 0
            or (encoder == "tube" and decoder == "running_cell" and grid[0] % 4 == 0)
        )
        return cls._from_indices(visible, decode, num_tokens, steady=steady)

    @classmethod
    def from_bool(cls, encoder_mask: Tensor, decoder_mask: Tensor | None = None) -> DualMask:
        """From the published form: bool (or 0/1) [B, N] or [B, frames, rows * columns], True = masked.

        Without `decoder_mask` the decoder rebuilds what the encoder did not see.

        Raises:
            InputError: shapes that differ, clips with different counts, or a side with no token.
        """
        encoder_mask = encoder_mask.detach().cpu().bool().flatten(1)
        decoder_mask = (
            ~encoder_mask if decoder_mask is None else decoder_mask.detach().cpu().bool().flatten(1)
        )
        if encoder_mask.shape != decoder_mask.shape:
            raise InputError(
                f"encoder mask {tuple(encoder_mask.shape)} and decoder mask {tuple(decoder_mask.shape)} "
                "differ in shape"
            )
        visible = _indices_of(~encoder_mask, "visible")
        decode = _indices_of(~decoder_mask, "decoded")
        return cls._from_indices(visible, decode, encoder_mask.shape[1], steady=None)

    @classmethod
    def cat(cls, masks: list[DualMask]) -> DualMask:
        """One batch from several masks of the same counts (a collate function).

        Raises:
            InputError: no mask, or counts that differ.
        """
        if not masks:
            raise InputError("cannot join an empty list of masks")
        shapes = {(m.num_tokens, m.visible.shape[1], m.decode.shape[1]) for m in masks}
        if len(shapes) > 1:
            counts = ", ".join(f"{n} tokens with {v} visible and {d} decoded" for n, v, d in sorted(shapes))
            raise InputError(
                f"masks with different counts cannot form one batch: {counts} (a model takes the list of "
                "masks itself)"
            )
        visible, decode, weight = (
            torch.cat([getattr(m, key) for m in masks]) for key in ("visible", "decode", "weight")
        )
        if len({m.keep.shape[1] for m in masks}) == 1:
            keep = torch.cat([m.keep for m in masks])
        else:
            keep = _all_rows(decode)
        return cls(visible, decode, weight, keep, masks[0].num_tokens)

    @classmethod
    def _from_indices(
        cls, visible: Tensor, decode: Tensor, num_tokens: int, *, steady: bool | None
    ) -> DualMask:
        """`steady`: whether every draw of this kind counts equally many tokens; None looks at this batch."""
        if visible.shape[1] == 0 or decode.shape[1] == 0:
            side = "the encoder" if visible.shape[1] == 0 else "the decoder"
            raise InputError(f"the mask leaves no token to {side} out of {num_tokens}; lower the mask ratio")
        seen = torch.zeros(visible.shape[0], num_tokens, dtype=torch.bool)
        seen.scatter_(1, visible.long(), True)
        counted = ~seen.gather(1, decode.long())
        if steady is None:
            counts = counted.sum(1)
            steady = bool((counts == counts[:1]).all())
        if decode.shape[0] and steady:
            keep = counted.nonzero()[:, 1].view(decode.shape[0], -1).int()
        else:
            keep = _all_rows(decode)
        if decode.shape[0] and (keep.shape[1] == 0 or not counted.any()):
            raise InputError("the loss would count no token: the encoder sees all that the decoder rebuilds")
        return cls(visible, decode, counted.float(), keep.contiguous(), num_tokens)

    @property
    def target(self) -> Tensor:
        """int32 [B, Nk]: the tokens that reach the head."""
        return self.decode.gather(1, self.keep.long())

    @property
    def target_weight(self) -> Tensor:
        """float32 [B, Nk]: their weights in the loss."""
        return self.weight.gather(1, self.keep.long())

    @property
    def hidden_rows(self) -> Tensor:
        """int32 [B, Nk]: their rows in the decoder's sequence (visible tokens first)."""
        return self.keep + self.visible.shape[1]

    @property
    def batch(self) -> int:
        return self.visible.shape[0]

    def __len__(self) -> int:
        return self.batch

    def __getitem__(self, clips: slice) -> DualMask:
        """The masks of some clips of the batch."""
        return self._map(lambda x: x[clips])

    def to_bool(self) -> tuple[Tensor, Tensor]:
        """(encoder mask, decoder mask), each bool [B, N], True = masked: the published form."""

        def masked(indices: Tensor) -> Tensor:
            mask = torch.ones(self.batch, self.num_tokens, dtype=torch.bool, device=indices.device)
            return mask.scatter_(1, indices.long(), False)

        return masked(self.visible), masked(self.decode)

    def _map(self, function) -> DualMask:
        tensors = {key: function(getattr(self, key)) for key in ("visible", "decode", "weight", "keep")}
        return dataclasses.replace(self, **tensors)

    def to(self, device, non_blocking: bool = False) -> DualMask:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> DualMask:
        return self._map(Tensor.pin_memory)


def running_cell_states(grid: Grid, ratio: float) -> Tensor:
    """bool [4, N]: the four phases of the running-cell mask, True = left out.

    A queue of four starts with `4 * ratio` ones. At frame `t` of phase `p` the cell is the queue read from
    position `p + t + 1`, laid out row-major as 2 x 2 and tiled over the frame (VideoMAE V2, section 3.2 and
    figure 2).

    Raises:
        InputError: a ratio other than 0.25, 0.5, 0.75, or a grid whose rows or columns are odd.
    """
    frames, rows, columns = grid
    if ratio not in RUNNING_CELL_RATIOS:
        raise InputError(
            f"a running cell masks 1, 2 or 3 of 4 tokens: decoder_ratio 0.25, 0.5 or 0.75, not {ratio}"
        )
    if rows % 2 or columns % 2:
        raise InputError(
            f"a running cell of 2 x 2 cannot tile a frame of {rows} x {columns} tokens; choose an image size "
            "whose sides are "
            "an even number of patches, or the random decoder mask"
        )
    queue = torch.arange(4) < round(4 * ratio)
    start = torch.arange(4)[:, None] + torch.arange(frames)[None, :] + 1
    cell = queue[(start[..., None] + torch.arange(4)) % 4].view(4, frames, 2, 2)
    return cell.repeat(1, 1, rows // 2, columns // 2).view(4, -1)


@functools.lru_cache(maxsize=16)
def _running_cell_indices(grid: Grid, ratio: float) -> Tensor:
    """int32 [4, Nd]: the tokens that each phase picks."""
    states = running_cell_states(grid, ratio)
    counts = (~states).sum(1)
    assert (counts == counts[0]).all()  # every frame of every phase picks the same share of each cell
    return (~states).nonzero()[:, 1].view(4, -1).int()


def _hidden_count(total: int, ratio: float, what: str) -> int:
    hidden = int(ratio * total)
    if hidden >= total:
        raise InputError(f"ratio {ratio} leaves none of {total} {what}")
    return hidden


def _random_subset(batch: int, total: int, count: int, generator: torch.Generator | None) -> Tensor:
    """int32 [batch, count]: sorted random subsets of range(total)."""
    order = torch.rand(batch, total, generator=generator).argsort(1)
    return order[:, :count].sort(1).values.int()


def _tokens_of_frames(frames: Tensor, per_frame: int) -> Tensor:
    """All tokens of the given frames [B, F] -> int32 [B, F * per_frame]."""
    return (frames[:, :, None] * per_frame + torch.arange(per_frame, dtype=torch.int32)).flatten(1)


def _sample_encoder(
    batch: int, grid: Grid, kind: str, ratio: float, generator: torch.Generator | None
) -> Tensor:
    frames, per_frame = grid[0], grid[1] * grid[2]
    if kind == "tube":
        count = per_frame - _hidden_count(per_frame, ratio, "tokens of a frame")
        spots = _random_subset(batch, per_frame, count, generator)
        offsets = torch.arange(frames, dtype=torch.int32)[:, None] * per_frame
        return (spots[:, None, :] + offsets).flatten(1)
    if kind == "random":
        total = frames * per_frame
        return _random_subset(batch, total, total - _hidden_count(total, ratio, "tokens"), generator)
    if kind == "frame":
        shown = _random_subset(batch, frames, frames - _hidden_count(frames, ratio, "frames"), generator)
        return _tokens_of_frames(shown, per_frame)
    raise InputError(f"unknown encoder mask {kind!r}; known: {', '.join(ENCODER_MASKS)}")


def _sample_decoder(
    batch: int, grid: Grid, kind: str, ratio: float, generator: torch.Generator | None
) -> Tensor:
    frames, per_frame = grid[0], grid[1] * grid[2]
    if kind == "running_cell":
        phase = torch.randint(0, 4, (batch,), generator=generator)
        return _running_cell_indices(tuple(grid), ratio)[phase]
    if kind == "random":
        total = frames * per_frame
        return _random_subset(batch, total, total - _hidden_count(total, ratio, "tokens"), generator)
    if kind == "frame":
        picked = _random_subset(batch, frames, frames - _hidden_count(frames, ratio, "frames"), generator)
        return _tokens_of_frames(picked, per_frame)
    raise InputError(f"unknown decoder mask {kind!r}; known: {', '.join(DECODER_MASKS)}")


def _indices_of(chosen: Tensor, what: str) -> Tensor:
    counts = chosen.sum(1)
    if chosen.shape[0] and not bool((counts == counts[0]).all()):
        low, high = int(counts.min()), int(counts.max())
        raise InputError(
            f"the clips of a batch must have equally many {what} tokens; these have {low} to {high}"
        )
    return chosen.nonzero()[:, 1].view(chosen.shape[0], -1).int()


def _complement(indices: Tensor, num_tokens: int) -> Tensor:
    rest = torch.ones(indices.shape[0], num_tokens, dtype=torch.bool).scatter_(1, indices.long(), False)
    return rest.nonzero()[:, 1].view(indices.shape[0], -1).int()


def _all_rows(decode: Tensor) -> Tensor:
    return torch.arange(decode.shape[1], dtype=torch.int32).expand(decode.shape[0], -1).contiguous()
