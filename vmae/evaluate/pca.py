"""`python -m vmae pca VIDEO`: the first three principal components of the encoder's tokens, as colours beside
the video.

One analysis covers all tokens of the clip, so a colour means the same in every frame. A moving object keeps
its colour where the encoder separates it from the rest.

Legend: N tokens, D width.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vmae.checkpoint.folder import folder_beside
from vmae.config import ModelConfig
from vmae.errors import InputError
from vmae.evaluate.encoder import add_encoder_arguments, load_encoder_from_args, middle_clip
from vmae.evaluate.pictures import Panel, add_output_arguments, grey_frames, outputs_of, write_pictures
from vmae.train.checks import resolve_device

COMPONENTS = 3
TAILS = 0.01  # share of the tokens at each end of the range that is clipped: to black, and to full brightness


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_encoder_arguments(parser)
    add_output_arguments(parser, "pca-VIDEO.png beside the checkpoint")


def run(args: argparse.Namespace) -> None:
    """Run the command: load the encoder, analyse its tokens, draw the components."""
    device = resolve_device(args.device)
    outputs = outputs_of(args, folder_beside(args.checkpoint) / f"pca-{Path(args.video).stem}.png")
    loaded = load_encoder_from_args(args)
    model, config = loaded.model, loaded.model.config
    config.check_rgb("a picture of features")
    clip, indices = middle_clip(args.video, config, loaded.stride, loaded.sampling)
    with torch.no_grad():
        tokens_ND = model.to(device).tokens(clip.to(device))[0]
    scores, shares = principal_components(tokens_ND.cpu())
    title = (
        f"{loaded.describe()}; principal components of its tokens after the last block, over the whole clip"
    )
    write_pictures(
        draw_components(scores, shares, clip[0].numpy(), config),
        outputs,
        labels=[f"frame {number}" for number in indices],
        columns=args.frames,
        step=config.tubelet_size,
        fps=args.fps,
        title=title,
    )
    print(title)
    print("of the variance: " + ", ".join(f"{100 * share:.1f} %" for share in shares))
    print(f"written: {', '.join(map(str, outputs))}")


def principal_components(tokens_ND: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """First three principal components of the centred tokens.

    The sign of a component is arbitrary. It is chosen such that the largest weight is positive, so that
    results are reproducible.

    Returns:
        float64 [N, 3], and the share of the variance that each component explains, float64 [3].

    Raises:
        InputError: fewer than three tokens or values, or a value that is not finite.
    """
    if min(tokens_ND.shape) < COMPONENTS:
        raise InputError(
            f"tokens {list(tokens_ND.shape)}: three components need three tokens of three values at least"
        )
    if not torch.isfinite(tokens_ND).all():
        raise InputError("the encoder's tokens are not finite: the checkpoint, or the clip, is damaged")
    centred = tokens_ND.double() - tokens_ND.double().mean(0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    v = v[:COMPONENTS]
    signs = v.gather(1, v.abs().argmax(1, keepdim=True))[:, 0].sign()
    scores = u[:, :COMPONENTS] * s[:COMPONENTS] * signs
    shares = s[:COMPONENTS].square() / s.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return scores.numpy(), shares.numpy()


def draw_components(
    scores: np.ndarray, shares: np.ndarray, frames: np.ndarray, config: ModelConfig
) -> list[Panel]:
    """Panels: the input, the three components as red, green and blue, and the first component in grey.

    Args:
        scores: float64 [N, 3].
        shares: float64 [3], of the variance.
        frames: uint8 [T, H, W, 3], the clip.
    """
    low, high = np.quantile(scores, (TAILS, 1 - TAILS), axis=0)
    unit = (scores - low) / np.maximum(high - low, 1e-12)
    first, second, third = (f"{100 * share:.0f} %" for share in shares)
    colours = f"red: component 1 ({first} of the variance), green: 2 ({second}), blue: 3 ({third})"
    return [
        Panel(caption="input", frames=frames),
        Panel(caption=colours, frames=grey_frames(unit, config)),
        Panel(
            caption=f"component 1 alone ({first} of the variance; black lowest, white highest)",
            frames=grey_frames(unit[:, 0], config),
        ),
    ]
