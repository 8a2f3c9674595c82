"""Frames and pixels of the clips of each source of a mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmae.data.mix import Mix, Source
from vmae.errors import InputError

Grid = tuple[int, int, int]


class ClipShape(NamedTuple):
    """T, H, W of a clip."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} x {self.height} x {self.width}"


def source_shapes(data: Sequence, usual: ClipShape, grid: Grid) -> list[ClipShape]:
    """The shape of each source's clips; of what is no mix, of all.

    Args:
        usual: where a source says nothing; an image then is one tubelet long.
        grid: tokens of a usual clip along time, height and width.

    Raises:
        InputError: a shape that tubelets do not divide (names the source).
    """
    if not isinstance(data, Mix):
        return [usual]
    return [_shape_of(source, usual, _tubelet(usual, grid)) for source in data.sources]


def grid_of(shape: ClipShape, usual: ClipShape, grid: Grid) -> Grid:
    """Tokens of a clip of another shape along time, height and width; see `source_shapes`."""
    frames, height, width = (side // own for side, own in zip(shape, _tubelet(usual, grid)))
    return frames, height, width


def _tubelet(usual: ClipShape, grid: Grid) -> ClipShape:
    return ClipShape(*(side // tokens for side, tokens in zip(usual, grid)))


def _shape_of(source: Source, usual: ClipShape, tubelet: ClipShape) -> ClipShape:
    frames = source.frames or (tubelet.frames if source.images else usual.frames)
    shape = ClipShape(frames, *(source.size or usual[1:]))
    if source.frames is None and source.size is None:
        return shape
    for side, own, what in zip(shape, tubelet, ("frames", "pixels of height", "pixels of width")):
        if side % own:
            lower = max(side // own, 1) * own
            raise InputError(
                f"source {source.name!r} of the mix: {side} {what} are not divisible by the tubelet's {own}; "
                f"use {lower} or {lower + own}"
            )
    return shape
