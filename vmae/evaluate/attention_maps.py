"""`python -m vmae attention VIDEO`: maps of the encoder's attention, as pictures.

These models have no class token. So a map shows the attention that each token receives, averaged over all
query tokens; or, with `--query`, the attention that one query token pays to each token. Values are multiples
of 1 / N, the value of uniform attention.

Legend: N tokens, H heads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmae.checkpoint.folder import folder_beside
from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.evaluate.encoder import add_encoder_arguments, load_encoder_from_args, middle_clip
from vmae.evaluate.pictures import Panel, add_output_arguments, grey_frames, outputs_of, write_pictures
from vmae.model import Classifier
from vmae.model.attention import Attention
from vmae.settings import Whole
from vmae.train.checks import resolve_device

# Quantile of the map that is drawn white: a few tokens receive many times more attention than all others.
BRIGHTEST = 0.99
DIMMED = 0.15  # brightness of the input where there is no attention


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_encoder_arguments(parser)
    add_output_arguments(parser, "attention-VIDEO.png beside the checkpoint")
    parser.add_argument(
        "--block", type=Whole(-1000, 1000), help="block of the encoder, from 1; -1 is the last (the last)"
    )
    parser.add_argument(
        "--heads",
        choices=("mean", "each"),
        default="mean",
        help="mean of all heads, or a map for each head (mean)",
    )
    parser.add_argument(
        "--query",
        metavar="T,Y,X",
        help="place of the query token, from 0,0,0 (default: mean over all query tokens)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the command: load the encoder, compute its attention, draw it."""
    device = resolve_device(args.device)
    default = folder_beside(args.checkpoint) / f"attention-{Path(args.video).stem}.png"
    outputs = outputs_of(args, default)
    loaded = load_encoder_from_args(args)
    model, config = loaded.model, loaded.model.config
    block = block_number(args.block, config.depth)
    query = None
    if args.query is not None:
        query = parse_query(args.query, config.grid)
    config.check_rgb("a picture of attention")
    clip, indices = middle_clip(args.video, config, loaded.stride, loaded.sampling)
    maps_HN = attention_maps(model.to(device), clip.to(device), block, query).cpu()
    if args.heads == "mean":
        maps_HN = maps_HN.mean(0, keepdim=True)
    shown = "attention that each token receives, mean over all query tokens (there is no class token)"
    if query is not None:
        shown = f"attention of the outlined query token ({place_of(query, indices, config)}) to each token"
    title = f"{loaded.describe()}; block {block + 1}; {shown}"
    write_pictures(
        draw_maps(maps_HN, clip[0].numpy(), config, query),
        outputs,
        labels=[f"frame {number}" for number in indices],
        columns=args.frames,
        step=config.tubelet_size,
        fps=args.fps,
        title=title,
    )
    print(title)
    print(f"largest share of one token: {maps_HN.max():.1f} x uniform")
    print(f"written: {', '.join(map(str, outputs))}")


def place_of(query: tuple[int, int, int], frames: list[int], config: ModelConfig) -> str:
    """Description of a token's place.

    Args:
        query: (time, row, column).
        frames: frame numbers of the clip.
    """
    time, row, column = query
    return f"time {time}, from frame {frames[time * config.tubelet_size]}; row {row}, column {column}"


def block_number(block: int | None, depth: int) -> int:
    """Index of a block, from 0.

    Args:
        block: `--block`: from 1, or from the end with -1; None is the last block.
        depth: blocks of the encoder.

    Raises:
        InputError: the encoder has no such block.
    """
    number = depth if block is None else block
    if number < 0:
        number += depth + 1
    if not 1 <= number <= depth:
        raise InputError(f"--block {block}: the encoder has blocks 1 to {depth} (-1 is the last)")
    return number - 1


def parse_query(text: str, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """(time, row, column) of a token, from `--query T,Y,X`.

    Raises:
        InputError: not three whole numbers, or outside of the grid.
    """
    try:
        t, y, x = (int(number) for number in text.split(","))
    except ValueError:
        raise InputError(
            f"--query {text}: give three whole numbers, time,row,column, such as 0,3,4"
        ) from None
    if not all(0 <= place < size for place, size in zip((t, y, x), grid)):
        limits = " x ".join(str(size) for size in grid)
        largest = ",".join(str(size - 1) for size in grid)
        raise InputError(f"--query {text} is outside of the grid of {limits} tokens: from 0,0,0 to {largest}")
    return t, y, x


@torch.no_grad()
def attention_maps(
    model: Classifier, clip: Tensor, block: int, query: tuple[int, int, int] | None = None
) -> Tensor:
    """Attention to each token, float32 [H, N], as a multiple of uniform attention; the mean of each row is 1.

    Args:
        model: in eval mode.
        clip: uint8 [1, T, H, W, 3], on the model's device.
        block: index, from 0.
        query: (time, row, column) of the query token; None averages over all query tokens.
    """
    attention = model.blocks[block].attn
    assert isinstance(attention, Attention)
    maps_HN: list[Tensor] = []

    def capture(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        x_BND, norm, *_ = inputs
        weights_HNN = attention.weights(x_BND, norm)[0]
        if query is None:
            maps_HN.append(weights_HNN.mean(1))
        else:
            maps_HN.append(weights_HNN[:, int(np.ravel_multi_index(query, model.config.grid))])

    # A hook captures the attention layer's own inputs, also where the model recomputes activations.
    handle = attention.register_forward_pre_hook(capture)
    try:
        model.tokens(clip)
    finally:
        handle.remove()
    return maps_HN[0] * model.config.num_tokens


def draw_maps(
    maps_HN: Tensor, frames: np.ndarray, config: ModelConfig, query: tuple[int, int, int] | None = None
) -> list[Panel]:
    """Panels: the input, then each head's map in grey; a single map is also drawn over the input.

    Args:
        maps_HN: one row for the mean of the heads, or a row for each head.
        frames: uint8 [T, H, W, 3], the clip.
        query: (time, row, column) of the token to outline, or None.
    """
    outlined = None
    if query is not None:
        outlined = np.zeros(config.grid, bool)
        outlined[query] = True
    panels = [Panel(caption="input", frames=frames, outlined=outlined)]
    for head, map_N in enumerate(maps_HN.numpy()):
        # At least 1 x uniform, so that the others stay dark where one token receives all attention.
        white = max(float(np.quantile(map_N, BRIGHTEST)), 1.0)
        shown = map_N / white
        name = f"head {head + 1}" if len(maps_HN) > 1 else "mean of the heads"
        scale = f"black: none, white: {white:.2f} x uniform or more"
        panels.append(
            Panel(caption=f"{name} ({scale})", frames=grey_frames(shown, config), outlined=outlined)
        )
        if len(maps_HN) == 1:
            light = DIMMED + (1 - DIMMED) * (grey_frames(shown, config) / 255)
            dimmed = (frames * light).round().astype(np.uint8)
            panels.append(
                Panel(caption="input, dark where there is little attention", frames=dimmed, outlined=outlined)
            )
    return panels
