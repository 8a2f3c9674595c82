"""Dual masking in index form (VideoMAE V2, section 3.2).

Legend: B clips, N tokens of a clip in (frame, row, column) order, Nv visible, Nd decoded, Nk counted by the
loss. Masks are made from the two small grids (a frame, a 2 x 2 cell), never from booleans over all tokens,
and moved as int32.

The registries are `ENCODER_MASKS` and `DECODER_MASKS`: settings, help texts, pictures, the server and the
tests take the names from there. A new mask is one function under `encoder_mask` or `decoder_mask`, at the end
of this file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmae.errors import InputError

Grid = tuple[int, int, int]

RUNNING_CELL_RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Draw:
    """What a mask function is asked for: masks of `batch` clips.

    Attributes:
        batch: B.
        grid: tokens along time, height and width.
        ratio: share of the tokens to leave out, in [0, 1).
        generator: source of the random numbers; None means torch's own.
        visible: int32 [B, Nv], tokens that the encoder sees; [B, 0] while the encoder's mask is drawn.
    """

    batch: int
    grid: Grid
    ratio: float
    generator: torch.Generator | None
    visible: Tensor

    @property
    def frames(self) -> int:
        return self.grid[0]

    @property
    def per_frame(self) -> int:
        """Tokens of a frame."""
        return self.grid[1] * self.grid[2]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.frames * self.per_frame

    def subset(self, total: int, what: str) -> Tensor:
        """Random subsets of range(total), sorted, with `int(ratio * total)` left out: int32 [B, kept].

        Raises:
            InputError: nothing would be kept of the `total` things, which `what` names.
        """
        kept = total - self.left_out(total, what)
        order = torch.rand(self.batch, total, generator=self.generator).argsort(1)
        return order[:, :kept].sort(1).values.int()

    def left_out(self, total: int, what: str) -> int:
        """`int(ratio * total)`.

        Raises:
            InputError: nothing would be kept of the `total` things, which `what` names.
        """
        count = int(self.ratio * total)
        if count >= total:
            raise InputError(f"ratio {self.ratio} leaves none of {total} {what}")
        return count

    def in_all_frames(self, spots: Tensor) -> Tensor:
        """Tokens at the spots int32 [B, kept] of each frame: int32 [B, frames * kept]."""
        offsets = torch.arange(self.frames, dtype=torch.int32)[:, None] * self.per_frame
        return (spots[:, None, :] + offsets).flatten(1)


@dataclass(frozen=True)
class MaskKind:
    """A way to choose tokens.

    Attributes:
        name: name in settings: that of its function.
        text: tokens that it leaves out, in half a line.
        draw: gives the sorted tokens that are kept, int32 [B, kept]; equally many in each clip.
        published: its name in the published code where that differs.
        even_frames: length of a run of frames in which every spot (row, column) is kept equally often; 1
            where all frames keep the same spots; None where neither holds. It decides which pairs of masks
            count equally many tokens in every clip.
        of_hidden: of a decoder's mask: whether it keeps nothing that the encoder sees. Then it counts all
            that it keeps.
    """

    name: str
    text: str
    draw: Callable[[Draw], Tensor]
    published: str | None = None
    even_frames: int | None = None
    of_hidden: bool = False


ENCODER_MASKS: dict[str, MaskKind] = {}  # by name, filled below
DECODER_MASKS: dict[str, MaskKind] = {}
PUBLISHED_MASKS: dict[str, str] = {}  # name in the published code -> name here
_DrawFunction = Callable[[Draw], Tensor]


def encoder_mask(text: str, **facts: Any) -> Callable[[_DrawFunction], _DrawFunction]:
    """Register the function below as a mask of the encoder; `facts` are fields of `MaskKind`."""
    return _register(ENCODER_MASKS, text, facts)


def decoder_mask(text: str, **facts: Any) -> Callable[[_DrawFunction], _DrawFunction]:
    """Register the function below as a mask of the decoder; `facts` are fields of `MaskKind`."""
    return _register(DECODER_MASKS, text, facts)


def _register(
    kinds: dict[str, MaskKind], text: str, facts: dict[str, Any]
) -> Callable[[_DrawFunction], _DrawFunction]:
    def register(draw: _DrawFunction) -> _DrawFunction:
        kind = MaskKind(draw.__name__, text, draw, **facts)
        kinds[kind.name] = kind
        if kind.published is not None:
            PUBLISHED_MASKS[kind.published] = kind.name
        return draw

    return register


def find_mask(side: str, name: str) -> MaskKind:
    """The mask `name` of a side, "encoder" or "decoder"; raises InputError with the known names."""
    kinds = ENCODER_MASKS if side == "encoder" else DECODER_MASKS
    if name not in kinds:
        raise InputError(f"unknown {side} mask {name!r}; known: {', '.join(kinds)}")
    return kinds[name]


def mask_help(side: str) -> str:
    """The names of a side's masks and what each leaves out, for help texts."""
    kinds = ENCODER_MASKS if side == "encoder" else DECODER_MASKS
    return ", ".join(f"{kind.name} ({kind.text})" for kind in kinds.values())


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
        lean: bool = False,
        generator: torch.Generator | None = None,
    ) -> DualMask:
        """Draw masks for `batch` clips of `grid` = (frames, rows, columns) tokens, on the CPU.

        Args:
            encoder: a name in `ENCODER_MASKS`.
            encoder_ratio: share hidden, rounded down to whole tokens (of a frame for tube, frames for frame).
            decoder: a name in `DECODER_MASKS`. A `decoder_ratio` of 0 means "none", as in the published code.
            decoder_ratio: share of all tokens that the decoder leaves out (`random_hidden`: of the hidden
                ones).
            lean: the decoder leaves out what the encoder sees, too: such tokens are not counted. As
                published, it gets a mask token for them (80 of ViT-B's 784).

        Raises:
            InputError: an unknown kind, a ratio that leaves no token to one side, or a grid that the kind
                can't tile; `lean` with masks that do not count equally many tokens in every clip.
        """
        if batch < 0 or min(grid) < 1:
            raise InputError(f"cannot mask {batch} clips of {grid} tokens: every number must be positive")
        for name, ratio in (("encoder_ratio", encoder_ratio), ("decoder_ratio", decoder_ratio)):
            if not 0 <= ratio < 1:
                raise InputError(f"{name} must be in [0, 1), not {ratio}")
        hiding, leaving = find_mask("encoder", encoder), find_mask("decoder", decoder)
        if decoder_ratio == 0:
            leaving = DECODER_MASKS["none"]
        nothing = torch.empty(batch, 0, dtype=torch.int32)
        draw = Draw(batch, grid, encoder_ratio, generator, nothing)
        visible = hiding.draw(draw)
        decode = leaving.draw(dataclasses.replace(draw, ratio=decoder_ratio, visible=visible))
        equal = _counts_equally(hiding, leaving, grid[0])
        if lean and not equal:
            raise InputError(
                f"a lean decoder needs masks that count equally many tokens in every clip; {hiding.name} "
                f"with {leaving.name} on {grid[0]} frames of tokens does not, any with random_hidden does"
            )
        mask = cls._from_indices(visible, decode, draw.num_tokens, equal=equal)
        return mask.without_seen() if lean else mask

    @classmethod
    def from_bool(cls, encoder_mask: Tensor, decoder_mask: Tensor | None = None) -> DualMask:
        """From the published form: bool (or 0/1) [B, N] or [B, frames, rows * columns], True = masked.

        Without `decoder_mask` the decoder rebuilds what the encoder did not see.

        Raises:
            InputError: shapes that differ, clips with different counts, or a side with no token.
        """
        encoder_mask = encoder_mask.detach().cpu().bool().flatten(1)
        if decoder_mask is None:
            decoder_mask = ~encoder_mask
        decoder_mask = decoder_mask.detach().cpu().bool().flatten(1)
        if encoder_mask.shape != decoder_mask.shape:
            raise InputError(
                f"encoder mask {tuple(encoder_mask.shape)} and decoder mask {tuple(decoder_mask.shape)} "
                "differ in shape"
            )
        visible = _indices_of(~encoder_mask, "visible")
        decode = _indices_of(~decoder_mask, "decoded")
        return cls._from_indices(visible, decode, encoder_mask.shape[1], equal=None)

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
        cls, visible: Tensor, decode: Tensor, num_tokens: int, *, equal: bool | None
    ) -> DualMask:
        """`equal`: whether every draw of this kind counts equally many tokens; None looks at this batch."""
        if visible.shape[1] == 0 or decode.shape[1] == 0:
            side = "the encoder" if visible.shape[1] == 0 else "the decoder"
            raise InputError(f"the mask leaves no token to {side} out of {num_tokens}; lower the mask ratio")
        seen = torch.zeros(visible.shape[0], num_tokens, dtype=torch.bool)
        seen.scatter_(1, visible.long(), True)
        counted = ~seen.gather(1, decode.long())
        if equal is None:
            counts = counted.sum(1)
            equal = bool((counts == counts[:1]).all())
        if decode.shape[0] and equal:
            keep = counted.nonzero()[:, 1].view(decode.shape[0], -1).int()
        else:
            keep = _all_rows(decode)
        if decode.shape[0] and (keep.shape[1] == 0 or not counted.any()):
            raise InputError("the loss would count no token: the encoder sees all that the decoder rebuilds")
        return cls(visible, decode, counted.float(), keep.contiguous(), num_tokens)

    def without_seen(self) -> DualMask:
        """The mask whose decoder gets the tokens that reach the head only."""
        keep = _all_rows(self.keep)
        return dataclasses.replace(self, decode=self.target, weight=self.target_weight, keep=keep)

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
    def hidden_uses(self) -> Tensor:
        """int32 [B, Nv + Nd]: the inverse of `hidden_rows`: each row's only place there, Nk where it has
        none."""
        rows, count = self.hidden_rows.long(), self.keep.shape[1]
        places = torch.arange(count, dtype=torch.int32, device=rows.device).expand_as(rows)
        every = places.new_full((self.batch, self.visible.shape[1] + self.decode.shape[1]), count)
        return every.scatter_(1, rows, places)

    @property
    def decoded_rows(self) -> Tensor:
        """int32 [B, Nd]: the rows of all decoded tokens in the decoder's sequence."""
        return _all_rows(self.decode) + self.visible.shape[1]

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

    def _map(self, function: Callable[[Tensor], Tensor]) -> DualMask:
        return DualMask(
            visible=function(self.visible),
            decode=function(self.decode),
            weight=function(self.weight),
            keep=function(self.keep),
            num_tokens=self.num_tokens,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DualMask:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> DualMask:
        return self._map(Tensor.pin_memory)


def _counts_equally(hiding: MaskKind, leaving: MaskKind, frames: int) -> bool:
    """Whether every draw of this pair counts equally many tokens.

    The decoder rebuilds every spot equally often (in whole runs of `even_frames`), and the encoder hides the
    same spots of all frames; or the decoder rebuilds nothing that the encoder sees.
    """
    if leaving.of_hidden:
        return True
    even = leaving.even_frames
    return hiding.even_frames == 1 and even is not None and frames % even == 0


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
    rows = torch.arange(decode.shape[1], dtype=torch.int32, device=decode.device)
    return rows.expand(decode.shape[0], -1).contiguous()


def _tokens_of_frames(frames: Tensor, per_frame: int) -> Tensor:
    """All tokens of the given frames [B, F] -> int32 [B, F * per_frame]."""
    return (frames[:, :, None] * per_frame + torch.arange(per_frame, dtype=torch.int32)).flatten(1)


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
            "whose sides are an even number of patches, or the random decoder mask"
        )
    queue = torch.arange(4) < round(4 * ratio)
    start = torch.arange(4)[:, None] + torch.arange(frames)[None, :] + 1
    cell = queue[(start[..., None] + torch.arange(4)) % 4].view(4, frames, 2, 2)
    return cell.repeat(1, 1, rows // 2, columns // 2).view(4, -1)


@functools.lru_cache(maxsize=16)
def _running_cell_indices(grid: Grid, ratio: float) -> Tensor:
    """int32 [4, Nd]: the tokens that each phase decodes."""
    states = running_cell_states(grid, ratio)
    counts = (~states).sum(1)
    assert (counts == counts[0]).all()  # every frame of every phase decodes the same share of each cell
    return (~states).nonzero()[:, 1].view(4, -1).int()


# --- The masks, in the order of help texts ------------------------------------------------------------------


@encoder_mask("the same spots of all frames", even_frames=1)
def tube(draw: Draw) -> Tensor:
    return draw.in_all_frames(draw.subset(draw.per_frame, "tokens of a frame"))


@decoder_mask(
    "of each 2 x 2 cell, a pattern that steps on by one a frame", published="run_cell", even_frames=4
)
def running_cell(draw: Draw) -> Tensor:
    phase = torch.randint(0, 4, (draw.batch,), generator=draw.generator)
    return _running_cell_indices(tuple(draw.grid), draw.ratio)[phase]


@encoder_mask("single tokens")
@decoder_mask("single tokens")
def random(draw: Draw) -> Tensor:
    return draw.subset(draw.num_tokens, "tokens")


@encoder_mask("whole frames")
@decoder_mask("whole frames")
def frame(draw: Draw) -> Tensor:
    return _tokens_of_frames(draw.subset(draw.frames, "frames"), draw.per_frame)


@decoder_mask("what the encoder sees, whatever the ratio: encoder-only masking, VideoMAE V1", of_hidden=True)
def none(draw: Draw) -> Tensor:
    return _complement(draw.visible, draw.num_tokens)


@decoder_mask(
    "what the encoder sees and single tokens, the ratio being their share of the others", of_hidden=True
)
def random_hidden(draw: Draw) -> Tensor:
    """As `random`, of hidden tokens only: a lean decoder with any encoder mask (not of the paper)."""
    hidden = _complement(draw.visible, draw.num_tokens)
    return hidden.gather(1, draw.subset(hidden.shape[1], "hidden tokens").long())


@encoder_mask("a union of blocks, the same in all frames: as V-JEPA, with an exact ratio", even_frames=1)
def multi_block(draw: Draw) -> Tensor:
    """V-JEPA's multi-block mask (Bardes et al., 2024, arXiv 2404.08471; V-JEPA 2, arXiv 2506.09985), with the
    exact ratio that equal counts need.

    As there: blocks lie in all frames, anywhere within them, with an aspect ratio of 0.75 to 1.5, and cover
    15 % of a frame (short range) or 70 % (long range).

    Otherwise than there:

    - V-JEPA hides the union of 8 short-range or 2 long-range blocks, whatever its area. Here blocks are added
      in the order of their drawing until `ratio` is reached; the last one is hidden line by line, from its
      top or its bottom, up to the exact count. Where even `MOST_BLOCKS` blocks leave too much, lines of the
      rest follow.
    - V-JEPA makes two masks of each clip, one of each range, and cuts each batch's to the smallest count.
      Here a clip has one mask, and its range is drawn, each with probability 1/2.
    - Each block has an aspect ratio of its own, not one a batch: a sample depends on no other.

    Of 20,000 draws on 14 x 14 spots: 8 short blocks cover 0.63 of a frame, 2 long ones 0.84 (means). Ratio
    0.75 takes 14 short blocks or 2 long ones, 0.9 takes 31 or 4. Blocks meet in the middle: at 0.9 a spot of
    the inner 6 x 6 is visible in 0.03 % of draws, a corner in 71 %.
    """
    order = _blocks_first(draw)
    hidden = draw.left_out(draw.per_frame, "tokens of a frame")
    return draw.in_all_frames(order[:, hidden:].sort(1).values.int())


BLOCK_SHARES = (0.15, 0.7)  # of a frame, short and long range
BLOCK_ASPECTS = (0.75, 1.5)  # height over width
MOST_BLOCKS = 64


def block_places(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks of `multi_block`: first row, rows, first column, columns, each int64 [B, MOST_BLOCKS]."""
    rows, columns = draw.grid[1:]
    long_range, *numbers = torch.rand(draw.batch, 1 + 3 * MOST_BLOCKS, generator=draw.generator).split(
        (1, *3 * [MOST_BLOCKS]), 1
    )
    area = torch.where(long_range < 0.5, *(float(int(share * draw.per_frame)) for share in BLOCK_SHARES))
    least, most = BLOCK_ASPECTS
    aspect = least + (most - least) * numbers[0]
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    top = (numbers[1] * (rows - height + 1)).floor()
    left = (numbers[2] * (columns - width + 1)).floor()
    return top.long(), height.long(), left.long(), width.long()


def _blocks_first(draw: Draw) -> Tensor:
    """int64 [B, spots]: the spots of a frame in the order in which `multi_block` hides them."""
    top, height, left, width = (part[..., None] for part in block_places(draw))
    row, column = (torch.arange(side) for side in draw.grid[1:])
    in_rows, in_columns = ((row >= top) & (row < top + height)), ((column >= left) & (column < left + width))
    covered = (in_rows[..., None] & in_columns[..., None, :]).flatten(2)
    number = torch.arange(MOST_BLOCKS)[:, None]
    block = torch.where(covered, number, MOST_BLOCKS).amin(1)
    spot = torch.arange(draw.per_frame).expand(draw.batch, -1)
    upwards = torch.rand(draw.batch, 1, generator=draw.generator) < 0.5
    return (block * draw.per_frame + torch.where(upwards, draw.per_frame - 1 - spot, spot)).argsort(1)
