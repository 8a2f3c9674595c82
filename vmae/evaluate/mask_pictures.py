"""`python -m vmae masks`: every type of mask as one picture, with its ratio and its counts; no checkpoint
needed."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from vmae.config import MAX_TOKENS, MaskConfig, ModelConfig
from vmae.errors import InputError
from vmae.evaluate.pictures import GREY, Panel, add_output_arguments, outputs_of, write_pictures
from vmae.masking import DECODER_MASKS, ENCODER_MASKS, DualMask, Grid
from vmae.settings import SEED, limits

CELL = 12  # pixels of a token
DARK = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_output_arguments(parser, "masks.png")
    parser.add_argument("--model", default="vit_b", help="preset whose grid to take (vit_b)")
    parser.add_argument(
        "--grid", metavar="T,Y,X", help="tokens along time, height and width, instead of a preset's"
    )
    parser.add_argument(
        "--encoder-mask",
        default="tube",
        help="mask of the encoder that the decoder's masks are drawn with (tube)",
    )
    parser.add_argument(
        "--encoder-ratio",
        type=limits(MaskConfig, "encoder_ratio"),
        default=0.9,
        help="share hidden from the encoder (0.9)",
    )
    parser.add_argument(
        "--decoder-ratio",
        type=limits(MaskConfig, "decoder_ratio"),
        default=0.5,
        help="share that the decoder leaves out (0.5)",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of every mask (0)")


def run(args: argparse.Namespace) -> None:
    """The command: draw each mask, tell its counts, write."""
    outputs = outputs_of(args, Path("masks.png"))
    grid = parse_grid(args.grid) if args.grid is not None else ModelConfig.preset(args.model).grid
    config = MaskConfig(
        encoder=args.encoder_mask, encoder_ratio=args.encoder_ratio, decoder_ratio=args.decoder_ratio
    )
    panels = draw_masks(grid, config, args.seed)
    of = "" if args.grid else f" ({args.model})"
    title = f"grid of {' x '.join(map(str, grid))} tokens{of}, seed {args.seed}"
    labels = [f"time {time}" for time in range(grid[0])]
    write_pictures(panels, outputs, labels=labels, columns=args.frames, fps=args.fps, title=title)
    for line in (title, *(panel.caption for panel in panels), f"written: {', '.join(map(str, outputs))}"):
        print(line)


def parse_grid(text: str) -> Grid:
    """`8,14,14`

    Raises:
        InputError: not three positive whole numbers.
    """
    try:
        frames, rows, columns = (int(number) for number in text.split(","))
    except ValueError:
        raise InputError(
            f"--grid {text}: give three whole numbers, time,rows,columns, such as 8,14,14"
        ) from None
    if min(frames, rows, columns) < 1 or frames * rows * columns > MAX_TOKENS:
        raise InputError(
            f"--grid {text}: every number must be at least 1, and their product at most {MAX_TOKENS:,}"
        )
    return frames, rows, columns


def draw_masks(grid: Grid, config: MaskConfig, seed: int) -> list[Panel]:
    """A panel for each mask of the encoder, then for each of the decoder with the encoder's of `config`.

    A mask that this grid or ratio does not allow gets a grey panel, whose caption says why.
    """
    panels = []
    for side, kinds, draw in (
        ("encoder", ENCODER_MASKS, _encoder_cells),
        ("decoder", DECODER_MASKS, _decoder_cells),
    ):
        for kind in kinds:
            try:
                counts, frames = draw(grid, config, kind, seed)
            except InputError as error:
                counts, frames = f"not possible here: {error}", np.full_like(_blank(grid), GREY)
            panels.append(Panel(caption=f"{side} {kind}: {counts}", frames=frames))
    return panels


def _blank(grid: Grid) -> np.ndarray:
    nothing = np.zeros(np.prod(grid), bool)
    return cell_frames(nothing, nothing, grid)


def _sample(grid: Grid, config: MaskConfig, seed: int) -> DualMask:
    return DualMask.sample(1, grid, **config.to_dict(), generator=torch.Generator().manual_seed(seed))


def _encoder_cells(grid: Grid, config: MaskConfig, kind: str, seed: int) -> tuple[str, np.ndarray]:
    mask = _sample(grid, config.replace(encoder=kind, decoder="none"), seed)
    seen = ~mask.to_bool()[0][0].numpy()
    total, count = mask.num_tokens, int(seen.sum())
    counts = (
        f"ratio {config.encoder_ratio:g}; {count} of {total} tokens seen (white), "
        f"{total - count} hidden (dark)"
    )
    return counts, cell_frames(seen, np.zeros_like(seen), grid)


def _decoder_cells(grid: Grid, config: MaskConfig, kind: str, seed: int) -> tuple[str, np.ndarray]:
    mask = _sample(grid, config.replace(decoder=kind), seed)
    hidden, left_out = (masked[0].numpy() for masked in mask.to_bool())
    counted, decoded = int(mask.weight.sum()), int((~left_out).sum())
    ratio = f"ratio {config.decoder_ratio:g}"
    if kind == "none":
        ratio = "no ratio (all that the encoder did not see)"
    counts = (
        f"{ratio}; {decoded} of {mask.num_tokens} tokens decoded (white), others left out (dark); with the "
        f"encoder's {config.encoder} mask, whose tokens are dotted, {counted} are counted by the loss"
    )
    return counts, cell_frames(~left_out, ~hidden, grid)


def cell_frames(white: np.ndarray, dotted: np.ndarray, grid: Grid) -> np.ndarray:
    """uint8 [T', rows * CELL + 1, columns * CELL + 1, 3]: a square for each token, dotted in the other shade
    or not.

    Args:
        white, dotted: bool [N].
    """
    shade = np.where(white, 255, DARK).astype(np.uint8).reshape(*grid, 1, 1)
    other = np.where(white, DARK, 255).astype(np.uint8).reshape(*grid, 1, 1)
    cells = np.broadcast_to(shade, (*grid, CELL, CELL)).copy()
    cells[..., 0, :] = cells[..., 0] = GREY
    dot = np.zeros((CELL, CELL), bool)
    dot[CELL // 3 + 1 : -CELL // 3 + 1, CELL // 3 + 1 : -CELL // 3 + 1] = True
    cells = np.where(dotted.reshape(*grid, 1, 1) & dot, other, cells)
    pixels = cells.transpose(0, 1, 3, 2, 4).reshape(grid[0], grid[1] * CELL, grid[2] * CELL, 1)
    return np.pad(pixels, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=GREY).repeat(3, 3)
