"""Whether norms and GELUs are made again in the backward (`--recompute`), or kept because the batch fits.

Bytes are counted on fake tensors, a block of each kind; `vmae plan` counts whole steps, and decides alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vmae.config import ModelConfig, OptimConfig
from vmae.model.blocks import Block
from vmae.model.cost import count_saved_bytes
from vmae.train.optim import USUAL_OPTIM, moments

RESERVE = 0.08  # of the memory: CUDA, NCCL, the allocator; of `plan` too


@dataclass(frozen=True)
class Need:
    """Bytes of one rank's step, where nothing is made again.

    Attributes:
        state: weights, gradients, the optimizer's moments, an average of the weights; what FSDP gathers.
        kept: by blocks, between forward and backward; a bit less where they are compiled.
        working: about what the backward of one block takes beside.
    """

    state: float
    kept: float
    working: float

    @property
    def total(self) -> float:
        return self.state + self.kept + self.working


def kept_bytes(config: ModelConfig, dim: int, heads: int, tokens: int, dtype: str, recompute: bool) -> int:
    """Bytes that one more clip of so many tokens makes a block of width `dim` keep."""
    with torch.device("meta"):
        block = Block(config, dim, heads, 0.0, attention="sdpa", recompute=recompute)
    with FakeTensorMode(allow_non_fake_inputs=True):
        block.to_empty(device="cpu")

        def kept(clips: int) -> int:
            x = torch.empty(clips, tokens, dim, requires_grad=True)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                return count_saved_bytes(lambda: block(x), block)

        return kept(2) - kept(1)


def need_without(
    model: nn.Module,
    config: ModelConfig,
    blocks: Sequence[nn.Module],
    tokens: Sequence[int],
    *,
    clips: int,
    dtype: str,
    sharers: int = 1,
    accumulate: int = 1,
    averaged: bool = False,
    optim: OptimConfig = USUAL_OPTIM,
    beside: int = 0,
) -> Need:
    """What a rank's step needs with every result kept.

    Args:
        blocks, tokens: of `model`, and the tokens of a clip in each.
        clips: of a micro-batch.
        sharers: ranks that share one copy of the state.
        accumulate: micro-batches of a step; FSDP keeps whole gradients between them.
        averaged: an average of the weights is kept too.
        optim: whose state is counted.
        beside: bytes that each rank holds throughout and trains nothing of, such as a frozen teacher's.
    """
    elements = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept_of = moments(model, optim).items()
    held = 4 * sum(each * p.numel() for p, (each, _) in kept_of)
    state = (4 * elements + (8 if averaged else 4) * trained + held) / sharers
    if sharers > 1:
        largest = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
        state += 12 * largest + (4 * trained if accumulate > 1 else 0)
    kinds = Counter(
        (block.norm1.weight.shape[0], block.attn.num_heads, count)
        for block, count in zip(blocks, tokens)
        if isinstance(block, Block) and any(p.requires_grad for p in block.parameters())
    )
    sizes = {kind: clips * kept_bytes(config, *kind, dtype, False) for kind in kinds}
    kept = sum(number * sizes[kind] for kind, number in kinds.items())
    if dtype == "bfloat16":  # copies of the weights, which the backward reads
        kept += 2 * sum(p.numel() for block in blocks for p in block.parameters() if p.requires_grad)
    return Need(state + beside, kept, 2 * max(sizes.values(), default=0))


def recompute_ways(asked: str, device: str, *, compiled: bool) -> tuple[str, ...]:
    """What `--recompute` stands for on a type of device, in order: the first that fits is taken, else the
    last.

    On a CPU nothing is won by keeping: a step of ViT-S at batch 4 took 0.95 to 1.03 x the time when norms and
    GELUs were made again (bfloat16 and float32, one shared core of an AMD EPYC, medians of 9 and 7 turns). On
    a GPU expected, not measured: what is kept is read, what is made again is read, computed and written.
    """
    if asked != "auto":
        return (asked,)
    if device == "cpu":
        return ("on",)
    return ("off", "budget" if compiled else "on")


def choose_recompute(asked: str, device: torch.device, *, compiled: bool, need: Need | None) -> str:
    """The one of `recompute_ways` that a run takes.

    Args:
        need: of `need_without`; None where that is not known, or checkpointing says that memory is short:
            taken as too much.
    """
    ways = recompute_ways(asked, device.type, compiled=compiled)
    fits = need is not None and need.total <= memory_of(device) * (1 - RESERVE)
    return ways[0] if fits else ways[-1]


def memory_of(device: torch.device) -> float:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory
