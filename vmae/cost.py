"""What a step costs, counted rather than timed: multiply-accumulates on paper, and bytes that autograd keeps.

Legend: N tokens of a clip, Nv visible to the encoder, Nd picked for the decoder, P values of a tubelet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from vmae.config import MaskConfig, ModelConfig
from vmae.masking import DualMask
from vmae.model.reference import ReferencePretrainer

# Dense peak FLOP/s by a part of the device's name, from the vendors' datasheets (no sparsity): bfloat16, float32 without TF32.
# The first part that fits counts, so longer names come first.
_PEAK_FLOPS = {
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "B200": (2250e12, 80e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "MI300X": (1307e12, 163.4e12),
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of a device at "bfloat16" or "float32"; None where it is not known (any CPU)."""
    found = next((peaks for part, peaks in _PEAK_FLOPS.items() if part.lower() in device_name.lower()), None)
    return None if found is None else found[("bfloat16", "float32").index(dtype)]


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one clip: all, visible to the encoder, picked for the decoder, counted by the loss."""

    total: int
    visible: int
    decoded: int
    counted: int


def token_counts(config: ModelConfig, mask: MaskConfig) -> TokenCounts:
    """Counts of one drawn mask; `counted` is the rows that reach the head (see `DualMask.keep`)."""
    drawn = DualMask.sample(1, config.grid, **mask.to_dict(), generator=torch.Generator().manual_seed(0))
    return TokenCounts(config.num_tokens, drawn.visible.shape[1], drawn.decode.shape[1], drawn.keep.shape[1])


def _block_macs(tokens: int, dim: int, mlp_ratio: float) -> int:
    projections = tokens * dim * (4 * dim + 2 * int(dim * mlp_ratio))
    return projections + 2 * tokens * tokens * dim


def forward_macs(
    config: ModelConfig, encoder_ratio: float = 0.9, decoder_ratio: float = 0.5, *, fused: bool = False
) -> int:
    """Multiply-accumulates of the forward pass of one clip: matrix products and attention, nothing else.

    Args:
        encoder_ratio: of the tube mask.
        decoder_ratio: of the running-cell mask; 0 is encoder-only masking.
        fused: count what this code's model does (visible tokens embedded, counted tokens reach the head) instead of the
            published algorithm (every token embedded, every picked token predicted; the paper's table 1 counts that one).
    """
    decoder = "running_cell" if decoder_ratio else "none"
    mask = MaskConfig(encoder="tube", encoder_ratio=encoder_ratio, decoder=decoder, decoder_ratio=decoder_ratio)
    counts = token_counts(config, mask)
    embedded, predicted = (counts.visible, counts.counted) if fused else (counts.total, counts.decoded)
    dim, decoder_dim = config.embed_dim, config.decoder_embed_dim
    macs = embedded * config.tubelet_pixels * dim
    macs += config.depth * _block_macs(counts.visible, dim, config.mlp_ratio)
    macs += counts.visible * dim * decoder_dim
    macs += config.decoder_depth * _block_macs(counts.visible + counts.decoded, decoder_dim, config.mlp_ratio)
    return macs + predicted * decoder_dim * config.tubelet_pixels


def classifier_macs(config: ModelConfig, num_classes: int) -> int:
    """Multiply-accumulates of the classifier's forward pass of one clip: matrix products and attention, nothing else."""
    macs = config.num_tokens * config.tubelet_pixels * config.embed_dim
    macs += config.depth * _block_macs(config.num_tokens, config.embed_dim, config.mlp_ratio)
    return macs + config.embed_dim * num_classes


def count_saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward of `forward()`, each storage once, parameters and buffers left out."""
    own = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage  # holding it keeps its id from being given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


class _RealMasks(TorchDispatchMode):
    """Under fake tensors: masks stay real, so that a boolean gather's size is known, which fake tensors can't tell."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if tensors and not any(isinstance(t, FakeTensor) for t in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            source, chosen = args[0], args[1][0]
            with unset_fake_temporarily():
                count = int(chosen.sum())
            return source.new_empty((count, *source.shape[chosen.ndim :]))
        return func(*args, **kwargs)


def saved_activation_bytes_per_clip(
    build: Callable[[ModelConfig], nn.Module],
    config: ModelConfig,
    mask: MaskConfig,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that one more clip makes autograd keep: batch 2 minus batch 1, on fake CPU tensors, so of any model size.

    Args:
        build: makes the model; its forward takes uint8 clips and a `DualMask`.
        dtype: float32, or bfloat16 for autocast.
    """
    with torch.device("meta"):  # initialisation reads values, which meta tensors allow and fake ones do not
        model = build(config)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model.to_empty(device="cpu")

        def saved(batch: int) -> int:
            with unset_fake_temporarily():
                drawn = DualMask.sample(batch, config.grid, **mask.to_dict(), generator=torch.Generator().manual_seed(0))
                given = drawn.to_bool() if isinstance(model, ReferencePretrainer) else drawn
            clips = fake.from_tensor(torch.empty(batch, config.num_frames, *config.image_hw, 3, dtype=torch.uint8))
            with _RealMasks(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                return count_saved_bytes(lambda: model(clips, given), model)

        return saved(2) - saved(1)
