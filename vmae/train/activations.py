"""What a block keeps for its backward, and whether it is compiled: choices that change speed and memory only.

Both replace a block's `forward`, inside of what `fully_shard` and DDP hook onto a block's call. So parameters
are gathered outside of the compiled or recomputed part, and their names stay.

What a block of width D keeps for each token, beside attention's row sums, in widths of the working dtype
(under autocast, x counts twice: it stays float32):

    none        16 D   x, its norm, q, k, v, attention's output, x, its norm, the MLP's 4 D before and after
                       GELU (--recompute off)
                10 D   without the norms' and GELU's results, which are made again (on:
                       `vmae.model.recompute`; budget: torch's partitioner, in compiled blocks)
    selective    6 D   the MLP runs again from x: two products of the block's four, 22 % more FLOPs a step
                       (ViT-g, counted)
    full         1 D   x alone; the whole block runs again, 33 % more FLOPs a step
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import nn
from torch.utils.checkpoint import checkpoint

from vmae.config import CHECKPOINTING
from vmae.errors import InputError
from vmae.model.blocks import Block
from vmae.train.compiled import compile_forward, set_compiler


def prepare_blocks(
    blocks: Iterable[nn.Module],
    *,
    checkpointing: str = "none",
    compiled: bool = False,
    cuda_graphs: bool = False,
    recompute: str | None = None,
    shapes: int = 1,
) -> None:
    """Set up every block (mostly a `vmae.model.blocks.Block`) for training, before it is sharded.

    With `cuda_graphs` the compiled blocks are replayed as CUDA graphs (torch's "reduce-overhead" mode), where
    their shapes stay and torch finds nothing that forbids it; the loop calls
    `torch.compiler.cudagraph_mark_step_begin` before each forward.

    Args:
        recompute: LayerNorm's and GELU's results are made again in the backward ("on"), kept ("off"), or, of
            compiled blocks, as torch's partitioner decides within a budget ("budget"); None leaves blocks as
            they were built.
        shapes: of clips that they will see.

    Raises:
        InputError: an unknown kind of checkpointing, or one that these blocks do not have.
    """
    if checkpointing not in CHECKPOINTING:
        raise InputError(f"unknown checkpointing {checkpointing!r}; known: {', '.join(CHECKPOINTING)}")
    blocks = list(blocks)
    if compiled:
        # Seen with torch 2.13 on a CPU: with a partitioner that has a budget, a block that runs again whole
        # draws other random numbers in the backward than in the forward, so its gradients are wrong.
        no_budget = recompute == "budget" and checkpointing == "full"
        drops = any(isinstance(block, Block) and block.drops for block in blocks)
        set_compiler("off" if no_budget else recompute or "on", eager_random=drops, shapes=shapes)
    for block in blocks:
        if isinstance(block, Block) and recompute is not None:
            block.recompute = recompute == "on"
        if checkpointing == "selective":
            if not isinstance(block, Block):
                raise InputError(
                    f"--checkpointing selective is for transformer blocks, not {type(block).__name__}"
                )
            block.mlp.again = True
        elif checkpointing == "full":
            _recompute(block, has_randomness=not isinstance(block, Block) or block.draws)
        if compiled:
            block.forward = compile_forward(block.forward, cuda_graphs=cuda_graphs)


def _recompute(module: nn.Module, *, has_randomness: bool) -> None:
    """Make the module keep its input only; random numbers, if any, are drawn again as they were."""
    module.forward = functools.partial(
        checkpoint, module.forward, use_reentrant=False, preserve_rng_state=has_randomness
    )
