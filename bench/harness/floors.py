"""Floors of the fused operations: bytes that must move and FLOPs that must be done, at a device's rates."""

from __future__ import annotations

from dataclasses import dataclass

from harness.results.operations import Rates
from vmae import MaskConfig, ModelConfig
from vmae.model.cost import token_counts
from vmae_kernels.backend import OPERATIONS

DIRECTIONS = ("forward", "both")
GPUS = {
    "H100": Rates(bytes_per_s=3.35e12, matrix_flops=989e12, vector_flops=67e12, source="H100 SXM datasheet"),
    "A100": Rates(
        bytes_per_s=2.04e12, matrix_flops=312e12, vector_flops=19.5e12, source="A100 SXM 80 GB datasheet"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens and widths of a batch: `frames` frames of `side` x `side` pixels; tokens visible to the encoder,
    decoded, and counted by the loss, of each clip."""

    name: str
    batch: int
    patch: int
    width: int
    decoder: int
    visible: int
    decoded: int
    counted: int
    side: int = 224
    frames: int = 16

    @property
    def tokens(self) -> int:
        return self.frames // 2 * (self.side // self.patch) ** 2

    @property
    def values(self) -> int:
        """Values of a tubelet."""
        return 6 * self.patch**2


def preset_shape(preset: str, batch: int) -> Shape:
    """Shape of a preset with the default masks: 90 % hidden, 50 % decoded."""
    config = ModelConfig.preset(preset)
    counts = token_counts(config, MaskConfig())
    return Shape(
        name=preset,
        batch=batch,
        patch=config.patch_size,
        width=config.embed_dim,
        decoder=config.decoder_embed_dim,
        visible=counts.visible,
        decoded=counts.decoded,
        counted=counts.counted,
        side=config.image_hw[0],
        frames=config.num_frames,
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """Bytes, FLOPs of matrix units, FLOPs of the others."""

    bytes: float
    matrix: float = 0
    vector: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            bytes=self.bytes + other.bytes,
            matrix=self.matrix + other.matrix,
            vector=self.vector + other.vector,
        )

    def floor_us(self, rates: Rates) -> float:
        """Microseconds: the longer of moving and computing."""
        seconds = self.matrix / rates.matrix_flops + self.vector / rates.vector_flops
        return 1e6 * max(self.bytes / rates.bytes_per_s, seconds)


def work_of(operation: str, s: Shape) -> tuple[Work, Work]:
    """Forward and backward: bf16 (2 bytes), uint8 pixels (1), float32 positions (4). Scratch and second reads
    are not in a floor."""
    return _WORK[operation](s)


def floor_of(operation: str, shape: Shape, direction: str, rates: Rates) -> tuple[float, Work]:
    """Microseconds and work of "forward", or of "both"."""
    forward, backward = work_of(operation, shape)
    if direction == "forward":
        return forward.floor_us(rates), forward
    return forward.floor_us(rates) + backward.floor_us(rates), forward + backward


def _embed_visible(s: Shape) -> tuple[Work, Work]:
    rows = s.batch * s.visible
    positions = min(s.tokens, rows) * s.width * 4
    moved = rows * s.values + rows * s.width * 2 + s.width * s.values * 2
    matrix = 2 * rows * s.values * s.width
    return Work(bytes=moved + positions, matrix=matrix), Work(bytes=moved, matrix=matrix)


def _assemble_decoder_tokens(s: Shape) -> tuple[Work, Work]:
    both, decoded = s.batch * (s.visible + s.decoded), s.batch * s.decoded * s.decoder
    moved = (both + s.batch * s.visible) * s.decoder * 2 + min(s.tokens, both) * s.decoder * 4
    return Work(bytes=moved, vector=both * s.decoder), Work(bytes=2 * decoded, vector=decoded)


def _layer_norm(s: Shape) -> tuple[Work, Work]:
    """Of an encoder block."""
    moved = s.batch * s.visible * s.width
    return Work(bytes=2 * 2 * moved, vector=8 * moved), Work(bytes=2 * 3 * moved, vector=16 * moved)


def _select_decoded(s: Shape) -> tuple[Work, Work]:
    rows = s.batch * s.counted * s.decoder
    moved = 2 * (3 * rows + s.batch * (s.visible + s.decoded) * s.decoder)
    return Work(bytes=2 * 3 * rows, vector=8 * rows), Work(bytes=moved, vector=17 * rows)


def _patch_loss(s: Shape) -> tuple[Work, Work]:
    pixels = s.batch * s.counted * s.values
    return Work(bytes=3 * pixels, vector=12 * pixels), Work(bytes=5 * pixels, vector=12 * pixels)


def _head_patch_loss(s: Shape) -> tuple[Work, Work]:
    rows, head = s.batch * s.counted, s.values * s.decoder * 2
    hidden, matrix = 2 * rows * s.decoder, 2 * rows * s.values * s.decoder
    forward = Work(bytes=rows * s.values + hidden + head, matrix=matrix)
    return forward, Work(bytes=hidden + 2 * head, matrix=2 * matrix)


_WORK = {
    "embed_visible": _embed_visible,
    "assemble_decoder_tokens": _assemble_decoder_tokens,
    "layer_norm": _layer_norm,
    "select_decoded": _select_decoded,
    "patch_loss": _patch_loss,
    "head_patch_loss": _head_patch_loss,
}
if lacking := OPERATIONS.keys() - _WORK.keys():
    raise RuntimeError(f"no floor for {', '.join(sorted(lacking))}")
