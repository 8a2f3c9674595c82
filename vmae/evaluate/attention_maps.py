"""`python -m vmae attention VIDEO`: where the encoder's attention goes, as pictures.

These models have no class token, so the map is the attention that each token receives, the mean over all
tokens that ask; or what one chosen token takes from each (`--query`). Values are times 1 / N, what uniform
attention would give.

Legend: N tokens, H heads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vmae.checkpoint.folder import find_weights
from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.evaluate.encoder import add_encoder_arguments, load_encoder_from_args, middle_clip
from vmae.evaluate.pictures import Panel, add_output_arguments, grey_frames, outputs_of, write_pictures
from vmae.model import Classifier
from vmae.settings import Whole
from vmae.train.checks import resolve_device

BRIGHTEST = (
    0.99  # share of the tokens that a map does not cut off: a few take many times more than all others
)
DIMMED = 0.15  # brightness of the input where there is no attention


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_encoder_arguments(parser)
    add_output_arguments(parser, "attention-VIDEO.png beside the checkpoint")
    parser.add_argument(
        "--block", type=Whole(-1000, 1000), help="block of the encoder, from 1; -1 is the last (the last)"
    )
    parser.add_argument(
        "--heads", choices=("mean", "each"), default="mean", help="their mean, or a map for each (mean)"
    )
    parser.add_argument(
        "--query", metavar="T,Y,X", help="the token that asks, each from 0 (default: the mean of all)"
    )


def run(args: argparse.Namespace) -> None:
    """The command: load, look, draw."""
    device = resolve_device(args.device)
    outputs = outputs_of(
        args, find_weights(args.checkpoint).parent / f"attention-{Path(args.video).stem}.png"
    )
    loaded = load_encoder_from_args(args)
    model, config = loaded.model, loaded.model.config
    block = block_number(args.block, config.depth)
    query = None if args.query is None else parse_query(args.query, config.grid)
    clip, indices = middle_clip(args.video, config, loaded.stride, loaded.sampling)
    maps_HN = attention_maps(model.to(device), clip.to(device), block, query).cpu()
    if args.heads == "mean":
        maps_HN = maps_HN.mean(0, keepdim=True)
    title = f"{loaded.describe()}; block {block + 1}; " + (
        "attention that each token receives, the mean over all that ask (there is no class token)"
        if query is None
        else f"attention of the outlined token ({place_of(query, indices, config)}) to each"
    )
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
    """In words; `frames` are the clip's frame numbers."""
    return f"time {query[0]}, from frame {frames[query[0] * config.tubelet_size]}; row {query[1]}, column {query[2]}"


def block_number(block: int | None, depth: int) -> int:
    """From 0, of `--block`, which counts from 1, or from the end with -1.

    Raises:
        InputError: the encoder does not have it.
    """
    number = depth if block is None else block + depth + 1 if block < 0 else block
    if not 1 <= number <= depth:
        raise InputError(f"--block {block}: the encoder has blocks 1 to {depth} (-1 is the last)")
    return number - 1


def parse_query(text: str, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """`t,y,x` of a token.

    Raises:
        InputError: not three whole numbers, or outside of the grid.
    """
    try:
        t, y, x = (int(word) for word in text.split(","))
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
    """float32 [H, N]: attention to each token, as a multiple of uniform attention; the mean of each row is 1.

    Args:
        model: in eval mode.
        clip: uint8 [1, T, H, W, 3], on the model's device.
        block: from 0.
        query: (time, row, column) of the token that asks; None takes the mean over all.
    """
    found = []

    def listen(layer, given) -> None:
        weights_HNN = layer.weights(*given[:2])[0]
        if query is None:
            found.append(weights_HNN.mean(1))
        else:
            found.append(weights_HNN[:, np.ravel_multi_index(query, model.config.grid)])

    # What the block itself hands to its attention, whatever the model keeps or makes again.
    handle = model.blocks[block].attn.register_forward_pre_hook(listen)
    try:
        model.tokens(clip)
    finally:
        handle.remove()
    return found[0] * model.config.num_tokens


def draw_maps(
    maps_HN: Tensor, frames: np.ndarray, config: ModelConfig, query: tuple[int, int, int] | None = None
) -> list[Panel]:
    """The input, then a map in grey and over the input for the mean of the heads (one row), or a map for each
    head."""
    outlined = None
    if query is not None:
        outlined = np.zeros(config.grid, bool)
        outlined[query] = True
    panels = [Panel(caption="input", frames=frames, outlined=outlined)]
    for head, map_N in enumerate(maps_HN.numpy()):
        white = max(
            float(np.quantile(map_N, BRIGHTEST)), 1.0
        )  # where one token takes all, the others stay dark
        shown = map_N / white
        name = "mean of the heads" if len(maps_HN) == 1 else f"head {head + 1}"
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
