"""Cost of a step, counted rather than timed: multiply-accumulates, bytes that autograd keeps, bytes at the
peak.

Legend: N tokens of a clip, Nv visible to the encoder, Nd decoded, P values of a tubelet.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from vmae.config import MaskConfig, ModelConfig
from vmae.masking import DualMask
from vmae.model.attention import Attention
from vmae.model.reference import ReferencePretrainer

# Dense peak FLOP/s by a part of the device's name, from the vendors' datasheets (no sparsity): bfloat16,
# float32 without TF32. The first part that fits counts, so longer names come first.
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
    """Tokens of one clip: all, visible, decoded, counted by the loss (docs/glossary.md)."""

    total: int
    visible: int
    decoded: int
    counted: int


def token_counts(config: ModelConfig, mask: MaskConfig) -> TokenCounts:
    """Counts of one drawn mask; `counted` is the rows that reach the head (see `DualMask.keep`)."""
    drawn = DualMask.sample(1, config.grid, **mask.to_dict(), generator=torch.Generator().manual_seed(0))
    return TokenCounts(config.num_tokens, drawn.visible.shape[1], drawn.decode.shape[1], drawn.keep.shape[1])


def _block_macs(tokens: int, dim: int, mlp_ratio: float, rows: int | None = None) -> int:
    """Of a block on that many tokens, or on `rows` of them after keys and values of all."""
    rows = tokens if rows is None else rows
    projections = 2 * tokens * dim * dim + rows * dim * (2 * dim + 2 * int(dim * mlp_ratio))
    return projections + 2 * rows * tokens * dim


def forward_macs(
    config: ModelConfig, encoder_ratio: float = 0.9, decoder_ratio: float = 0.5, *, fused: bool = False
) -> int:
    """Multiply-accumulates of the forward pass of one clip: matrix products and attention, nothing else.

    Args:
        encoder_ratio: of the tube mask.
        decoder_ratio: of the running-cell mask; 0 is encoder-only masking.
        fused: count what this code's model does (visible tokens embedded, counted tokens through the rest of
            the last block, after its keys and values, and the head) instead of the published algorithm (every
            token embedded and through each block, every decoded token predicted; the paper's table 1 counts
            that one).
    """
    decoder = "running_cell" if decoder_ratio else "none"
    mask = MaskConfig(
        encoder="tube", encoder_ratio=encoder_ratio, decoder=decoder, decoder_ratio=decoder_ratio
    )
    return masked_macs(config, mask, fused=fused)


def masked_macs(
    config: ModelConfig, mask: MaskConfig, *, fused: bool = True, width: int | None = None
) -> int:
    """`forward_macs` for any mask.

    Args:
        width: values that the head predicts of a token; None are those of a tubelet's pixels.
    """
    counts = token_counts(config, mask)
    tokens = counts.visible + counts.decoded
    embedded, predicted, last = counts.total, counts.decoded, tokens
    if fused:
        embedded, predicted, last = counts.visible, counts.counted, counts.counted
    dim, decoder_dim = config.embed_dim, config.decoder_embed_dim
    macs = embedded * config.tubelet_pixels * dim
    macs += config.depth * _block_macs(counts.visible, dim, config.mlp_ratio)
    macs += counts.visible * dim * decoder_dim
    macs += (config.decoder_depth - 1) * _block_macs(tokens, decoder_dim, config.mlp_ratio)
    macs += _block_macs(tokens, decoder_dim, config.mlp_ratio, last)
    return macs + predicted * decoder_dim * (config.tubelet_pixels if width is None else width)


def classifier_macs(config: ModelConfig, num_classes: int) -> int:
    """Multiply-accumulates of the classifier's forward pass of one clip: matrix products and attention,
    nothing else."""
    macs = config.num_tokens * config.tubelet_pixels * config.embed_dim
    macs += config.depth * _block_macs(config.num_tokens, config.embed_dim, config.mlp_ratio)
    return macs + config.embed_dim * num_classes


def count_saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward of `forward()`, each storage once, parameters and buffers
    left out."""
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
    """Keeps masks real under fake tensors, so that the size of a boolean gather is known."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if tensors and not any(isinstance(t, FakeTensor) for t in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            source, chosen = args[0], args[1][0]
            with unset_fake_temporarily():
                count = int(chosen.sum())
            return source.new_empty((count, *source.shape[chosen.ndim :]))
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_paper(
    build: Callable[[ModelConfig], nn.Module],
    config: ModelConfig,
    mask: MaskConfig,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[nn.Module, Callable[[int], Tensor]]]:
    """A model on fake CPU tensors, of any size, and a function: number of clips -> their loss, with a graph
    to go back through.

    Args:
        build: makes the model; its forward takes uint8 clips and a `DualMask`. Attention that is "auto" in it
            becomes "sdpa", which keeps what fused kernels on a GPU do; on a CPU, in bfloat16, auto takes one
            that keeps more.
        dtype: float32, or bfloat16 for autocast.
    """
    with torch.device("meta"):  # initialisation reads values, which meta tensors allow and fake ones do not
        model = build(config)
    for module in model.modules():
        if isinstance(module, Attention) and module.backend == "auto":
            module.backend = "sdpa"
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model.to_empty(device="cpu")

        def loss_of(batch: int) -> Tensor:
            with unset_fake_temporarily():
                drawn = DualMask.sample(
                    batch, config.grid, **mask.to_dict(), generator=torch.Generator().manual_seed(0)
                )
                given = drawn.to_bool() if isinstance(model, ReferencePretrainer) else drawn
                clips = torch.empty(1, dtype=torch.uint8)
            clips = fake.from_tensor(clips).new_empty(
                (batch, config.num_frames, *config.image_hw, config.in_channels)
            )
            with _RealMasks(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                return model(clips, given)

        yield model, loss_of


def saved_activation_bytes_per_clip(
    build: Callable[[ModelConfig], nn.Module],
    config: ModelConfig,
    mask: MaskConfig,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that one more clip makes autograd keep: batch 2 minus batch 1. Arguments as in `on_paper`."""
    with on_paper(build, config, mask, dtype) as (model, loss_of):
        return count_saved_bytes(lambda: loss_of(2), model) - count_saved_bytes(lambda: loss_of(1), model)


def _cpu_attention_flops(query, key, value, *rest, out_val=None, **more) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward_flops(grad, query, key, value, *rest, out_val=None, **more) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch counts the attention of GPUs only (2.11 to 2.13).
_FLOPS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
}


class _StepCounter(TorchDispatchMode):
    """FLOPs of the operations that run, and bytes of the storages they make: those that live, `now`, and
    their `peak`.

    Sees what every way of keeping a tensor keeps: autograd, activation checkpointing's caches, a variable.
    Not seen: scratch that a single operation makes and frees.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._seen: dict[int, weakref.ref] = {
            id(s): weakref.ref(s) for s in (t.untyped_storage() for t in known)
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        count = _FLOPS.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        seen = self._seen.get(key)
        if seen is None or seen() is not storage:  # an id may be given again once its storage is gone
            self._seen[key] = weakref.ref(storage, partial(self._remove, key, size))
            self.now += size

    def _remove(self, key: int, size: int, reference: weakref.ref) -> None:
        self.now -= size
        if self._seen.get(key) is reference:
            del self._seen[key]


@dataclass(frozen=True)
class StepCount:
    """One forward and backward, counted: bytes kept in between (the clips among them), bytes at the peak,
    FLOPs.

    Parameters, buffers and their gradients are not in the bytes. FLOPs are those of matrix products and
    attention that PyTorch runs; what a Triton kernel computes is not in them.
    """

    saved: int
    peak: int
    flops: int


def count_macs(forward: Callable[[], object]) -> int:
    """Multiply-accumulates of a forward pass: matrix products, convolutions and attention that PyTorch
    runs."""
    with _StepCounter([]) as counter:
        forward()
    return counter.flops // 2


def count_step(forward: Callable[[], Tensor], model: nn.Module) -> StepCount:
    """Count a step of `forward() -> loss` and its backward, on real or fake tensors; gradients are added to
    the model's."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with _StepCounter([*model.parameters(), *model.buffers(), *gradients]) as counter:
        loss = forward()
        saved = counter.now
        loss.backward()
    return StepCount(saved, counter.peak, counter.flops)


def count_forward(forward: Callable[[], object]) -> int:
    """Bytes of what `forward()` makes, at its worst moment, on real or fake tensors."""
    with _StepCounter([]) as counter:
        forward()
    return counter.peak
