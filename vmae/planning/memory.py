"""Memory of a training step on paper: state from real parameter shapes, activations from steps on fake
tensors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vmae.config import MaskConfig, ModelConfig, OptimConfig
from vmae.masking import DualMask
from vmae.model import Pretrainer, build_pretrainer
from vmae.model.cost import StepCount, count_forward, count_step, on_paper
from vmae.model.target import Target
from vmae.train.activations import prepare_blocks
from vmae.train.loop import DTYPES
from vmae.train.optim import USUAL_OPTIM, moments


@dataclass(frozen=True)
class Activations:
    """Bytes of one GPU's step as straight lines in its number of clips: `fixed + per_clip * clips`.

    Attributes:
        fixed, per_clip: kept between forward and backward.
        working_fixed, working_per_clip: on top of that, at the worst moment; the first may be below 0.
        values_fixed, values_per_clip: instead of these while the target's values are made.
        flops: of a clip's forward and backward, recomputation included, as far as PyTorch runs them.
    """

    fixed: float
    per_clip: float
    working_fixed: float
    working_per_clip: float
    flops: float
    values_fixed: float = 0.0
    values_per_clip: float = 0.0

    def saved(self, clips: float) -> float:
        return self.fixed + self.per_clip * clips

    def working(self, clips: float) -> float:
        """Made and freed: by the backward, or by the target before it, whichever is more."""
        own = self.working_fixed + self.working_per_clip * clips
        return max(0.0, own, self.values_fixed + self.values_per_clip * clips)

    def most_clips(self, room: float) -> float:
        """The clips whose activations fit `room` bytes."""
        lines = [(self.working_fixed, self.working_per_clip), (self.values_fixed, self.values_per_clip)]
        return min((room - self.fixed - fixed) / (self.per_clip + slope) for fixed, slope in lines)


def count_activations(
    config: ModelConfig,
    mask: MaskConfig,
    dtype: str,
    checkpointing: str,
    backend: str = "triton",
    recompute: bool = True,
    target: Target | None = None,
) -> Activations:
    """Counted on fake tensors at two batches and two depths; everything else is a straight line.

    All blocks of the encoder are alike, and the worst moment comes while all of them hold what they keep.

    Args:
        backend: of the fused operations; "triton" is what runs on a GPU. Of clips of other channels or
            statistics than the kernels' all is counted as PyTorch's, a little more than a GPU keeps.
        recompute: norms and GELUs are made again in the backward, see `vmae.train.activations`.
        target: what is predicted, if no pixels.
    """
    on_paper_target = None if target is None else _OnPaper(config, target)

    backend = backend if config.has_imagenet_pixels else "torch"

    def step(depth: int, clips: int) -> StepCount:
        def build(smaller: ModelConfig) -> Pretrainer:
            model = build_pretrainer(
                smaller, backend=backend, attention="sdpa", recompute=recompute, target=on_paper_target
            )
            prepare_blocks((*model.encoder.blocks, *model.decoder.blocks), checkpointing=checkpointing)
            return model

        smaller = config.replace(depth=depth, drop_path_rate=0.0)
        with on_paper(build, smaller, mask, DTYPES[dtype]) as (model, loss_of):
            return count_step(lambda: loss_of(clips), model)

    few, many = 8, 16
    shallow, deep = ({clips: step(depth, clips) for clips in (few, many)} for depth in (1, 2))
    saved, working, flops = {}, {}, {}
    for clips in (few, many):
        one, two = shallow[clips], deep[clips]
        saved[clips] = two.saved + (config.depth - 2) * (two.saved - one.saved)
        working[clips] = two.peak - two.saved
        flops[clips] = two.flops + (config.depth - 2) * (two.flops - one.flops)
    values = {
        clips: 0 if target is None else count_values(target, config, mask, clips) for clips in (few, many)
    }
    values_slope = (values[many] - values[few]) / (many - few)
    slope, working_slope = ((line[many] - line[few]) / (many - few) for line in (saved, working))
    return Activations(
        fixed=saved[few] - few * slope,
        per_clip=slope,
        working_fixed=working[few] - few * working_slope,
        working_per_clip=working_slope,
        flops=flops[few] / few,
        values_fixed=values[few] - few * values_slope,
        values_per_clip=values_slope,
    )


class _OnPaper(Target):
    """A target of the same width and error, whose values cost nothing to make: those that an optimizer step
    keeps are counted, what making them takes is `count_values`."""

    name = "on paper"

    def __init__(self, config: ModelConfig, target: Target) -> None:
        super().__init__(config)
        self.target = target

    @property
    def width(self) -> int:
        return self.target.width

    def values(self, clips: Tensor, mask: DualMask) -> Tensor:
        return clips.new_empty((*mask.target.shape, self.width), dtype=torch.float32)

    def compare(self, predicted: Tensor, values: Tensor) -> Tensor:
        return self.target.compare(predicted, values)


def count_values(target: Target, config: ModelConfig, mask: MaskConfig, clips: int) -> int:
    """Bytes at the worst moment of making the target's values of so many clips, on fake tensors; what it
    holds throughout is not among them."""
    drawn = DualMask.sample(clips, config.grid, **mask.to_dict(), generator=torch.Generator().manual_seed(0))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        one = fake.from_tensor(torch.empty(1, dtype=torch.uint8))
        pixels = one.new_empty((clips, config.num_frames, *config.image_hw, 3))
        return count_forward(lambda: target.values(pixels, drawn))


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU (the one that holds most of what does not divide).

    Attributes:
        parameters: float32 master weights, and buffers.
        gradients: float32; there throughout, as they are from the second accumulated batch on. FSDP keeps
            them whole while it accumulates, and sums them over the GPUs at the step's last batch.
        optimizer: float32 moments (AdamW's two, one of SGD and of Muon's matrices), and AdamW's step counter
            a tensor.
        gathered: FSDP's whole parameters of the root and two blocks, and a block's gradient on its way.
        activations: kept between forward and backward, clips included.
        working: on top of that, at the worst moment of the step.
        target: what the target holds throughout, such as a frozen teacher's parameters; never sharded.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    working: float
    target: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def state_bytes(
    model: Pretrainer,
    sharers: int,
    dtype: str,
    accumulate: int = 1,
    optim: OptimConfig = USUAL_OPTIM,
) -> tuple[int, int, int, int]:
    """Bytes of parameters, gradients, optimizer state and gathered parameters, where `sharers` GPUs hold one
    copy of `model`.

    FSDP2 cuts every parameter along its first dimension; the first GPU has the largest part. While a block
    runs, its whole parameters and the next one's are there in `dtype`; in the backward its gradient too, and
    that in float32 to be reduced.
    """
    parameters = list(model.parameters())
    elements = sum(p.numel() for p in parameters)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    parts = {p: math.ceil(p.shape[0] / sharers) * p[0].numel() for p in parameters}
    kept = moments(model, optim)
    state = 4 * sum(each * parts[p] + beside for p, (each, beside) in kept.items())
    if sharers == 1:
        return 4 * elements + buffers, 4 * elements, state, 0
    part = sum(parts.values())
    blocks = [
        sum(p.numel() for p in block.parameters()) for block in (*model.encoder.blocks, *model.decoder.blocks)
    ]
    size = DTYPES[dtype].itemsize
    gathered = size * (elements - sum(blocks)) + max(blocks) * (2 * size + size + 4)
    gradients = 4 * part + (4 * elements if accumulate > 1 else 0)
    return 4 * part + buffers, gradients, state, gathered
