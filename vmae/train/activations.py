"""What a block keeps for its backward, and whether it is compiled: choices that change speed and memory only.

Both replace a block's `forward`, inside of what `fully_shard` and DDP hook onto a block's call. So parameters
are gathered outside of the compiled or recomputed part, and their names stay.

What a block of width D keeps for each token, beside attention's row sums:

    none        10 D   x, q, k, v, attention's output, x, the MLP's 4 D (norms and GELU are made again:
    `vmae.model.recompute`)
    selective    6 D   the MLP runs again from x: two products of the block's four, 22 % more FLOPs a step
    (ViT-g, counted)
    full         1 D   x alone; the whole block runs again, 33 % more FLOPs a step
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vmae.config import CHECKPOINTING
from vmae.errors import InputError
from vmae.model.blocks import Block


def prepare_blocks(
    blocks: Iterable[nn.Module],
    *,
    checkpointing: str = "none",
    compiled: bool = False,
    cuda_graphs: bool = False,
) -> None:
    """Set up every block (mostly a `vmae.model.blocks.Block`) for training, before it is sharded.

    With `cuda_graphs` the compiled blocks are replayed as CUDA graphs (torch's "reduce-overhead" mode), where
    their shapes stay and torch finds nothing that forbids it; the loop calls
    `torch.compiler.cudagraph_mark_step_begin` before each forward.

    Raises:
        InputError: an unknown kind of checkpointing, or one that these blocks do not have.
    """
    if checkpointing not in CHECKPOINTING:
        raise InputError(f"unknown checkpointing {checkpointing!r}; known: {', '.join(CHECKPOINTING)}")
    for block in blocks:
        if checkpointing == "selective":
            if not isinstance(block, Block):
                raise InputError(
                    f"--checkpointing selective is for transformer blocks, not {type(block).__name__}"
                )
            _recompute(block.mlp, has_randomness=False)
        elif checkpointing == "full":
            _recompute(block, has_randomness=not isinstance(block, Block) or block.drop_path.rate > 0)
        if compiled:
            block.forward = torch.compile(block.forward, mode="reduce-overhead" if cuda_graphs else None)


def _recompute(module: nn.Module, *, has_randomness: bool) -> None:
    """Make the module keep its input only; random numbers, if any, are drawn again as they were."""
    module.forward = functools.partial(
        checkpoint, module.forward, use_reentrant=False, preserve_rng_state=has_randomness
    )
