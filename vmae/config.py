"""Frozen, self-checking settings: what changes results (`ModelConfig`, `MaskConfig`) apart from what changes
speed only (`SpeedConfig`)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from vmae.errors import InputError
from vmae.settings import FRAMES, SHARE_BELOW_1, SIDE, WORKERS, Real, Whole, check_fields, ranged

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Encoder and decoder sizes of the published models (VideoMAE V2, section 4 and its released code). ViT-g's
# MLP is 48/11 wide in the decoder too, because the published constructor hands one ratio to both.
PRESETS: dict[str, dict[str, Any]] = {
    "vit_s": dict(embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=192, decoder_num_heads=3),
    "vit_b": dict(embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=384, decoder_num_heads=6),
    "vit_l": dict(embed_dim=1024, depth=24, num_heads=16, decoder_embed_dim=512, decoder_num_heads=8),
    "vit_h": dict(embed_dim=1280, depth=32, num_heads=16, decoder_embed_dim=512, decoder_num_heads=8),
    "vit_g": dict(
        embed_dim=1408,
        depth=40,
        num_heads=16,
        decoder_embed_dim=512,
        decoder_num_heads=8,
        patch_size=14,
        mlp_ratio=48 / 11,
    ),
    # Not published: small enough for tests, and to learn something on two CPU cores in a minute or two.
    "vit_tiny": dict(
        embed_dim=128, depth=4, num_heads=4, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2
    ),
    # Not published, for `make demo`: fewer blocks and a wider decoder than vit_tiny. Cosine attention is sharp
    # from the first step: loss 0.0327, not 0.0340, after 700 steps on the demo's clips (one run each, on a CPU).
    "vit_demo": dict(
        embed_dim=128,
        depth=2,
        num_heads=4,
        decoder_embed_dim=128,
        decoder_depth=1,
        decoder_num_heads=4,
        cos_attn=True,
    ),
}


MAX_TOKENS = 2**20  # of a clip: its fixed positions alone take 3 GiB for ViT-B
_WIDTH, _BLOCKS, _HEADS = Whole(1, 2**16), Whole(1, 256), Whole(1, 1024)


class _Checked:
    """Shared by the configurations: numbers checked, construction from a dict that refuses unknown keys, and
    `replace`."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(
                f"{cls.__name__}: unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any):
        return type(self).from_dict({**self.to_dict(), **changes})


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """Everything that decides the parameters' shapes and the function they compute.

    Attributes:
        img_size: height and width of a clip in pixels; an int means a square.
        patch_size: side of a tubelet in pixels.
        tubelet_size: depth of a tubelet in frames.
        num_frames: frames of a clip.
        embed_dim, depth, num_heads: the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder (pre-training only).
        mlp_ratio: hidden over outer width of every MLP.
        qkv_bias: learned bias on q and v; k never has one.
        qk_scale: factor on q; None means `head_dim ** -0.5`.
        drop_path_rate: stochastic depth of the last block of encoder and decoder, rising linearly from 0.
        init_values: initial layer scale; 0 means none.
        learned_pos: learned instead of fixed sine-cosine positions in the encoder.
        pos_grid: token grid (time, height, width) that the fixed positions are made for, then interpolated to
            this model's; None means its own. For encoders trained on other frame counts or sizes.
        cos_attn: cosine attention with a learned temperature per head.
        layer_norm_eps: of every LayerNorm.

    Raises:
        InputError: a number out of its range, or a size that does not divide another.
    """

    img_size: int | tuple[int, int] = ranged(224, SIDE)
    patch_size: int = ranged(16, SIDE)
    tubelet_size: int = ranged(2, FRAMES)
    num_frames: int = ranged(16, FRAMES)
    embed_dim: int = ranged(768, _WIDTH)
    depth: int = ranged(12, _BLOCKS)
    num_heads: int = ranged(12, _HEADS)
    decoder_embed_dim: int = ranged(384, _WIDTH)
    decoder_depth: int = ranged(4, _BLOCKS)
    decoder_num_heads: int = ranged(6, _HEADS)
    mlp_ratio: float = ranged(4.0, Real(above=0, most=64))
    qkv_bias: bool = True
    qk_scale: float | None = ranged(None, Real(above=0, most=1e6))
    drop_path_rate: float = ranged(0.0, SHARE_BELOW_1)
    init_values: float = ranged(0.0, Real(least=0, most=1000))
    learned_pos: bool = False
    pos_grid: tuple[int, int, int] | None = ranged(None, Whole(1, 2**14))
    cos_attn: bool = False
    layer_norm_eps: float = ranged(1e-6, Real(above=0, most=1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pos_grid is not None and (self.learned_pos or math.prod(self.pos_grid) > MAX_TOKENS):
            raise InputError(
                f"pos_grid {self.pos_grid} needs fixed positions, and at most {MAX_TOKENS:,} of them"
            )
        for side, name in zip(self.image_hw, ("height", "width")):
            if side % self.patch_size:
                lower = max(side // self.patch_size, 1) * self.patch_size
                raise InputError(
                    f"image {name} {side} is not divisible by the patch size {self.patch_size}; "
                    f"use {lower} or {lower + self.patch_size}"
                )
        if self.num_frames % self.tubelet_size:
            raise InputError(
                f"{self.num_frames} frames are not divisible by the tubelet size {self.tubelet_size}"
            )
        for width, heads in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise InputError(
                    f"{width} {getattr(self, width)} is not divisible by {heads} {getattr(self, heads)}"
                )
        if self.num_tokens > MAX_TOKENS:
            raise InputError(
                f"{self.num_frames} frames of {' x '.join(map(str, self.image_hw))} pixels make "
                f"{self.num_tokens:,} tokens; "
                f"a clip may have {MAX_TOKENS:,}: take a smaller --image-size or fewer --num-frames"
            )
        if self.cos_attn and self.qk_scale is not None:
            raise InputError("cosine attention learns its scale: qk_scale must be None with cos_attn")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The published model `name` (vit_s, vit_b, vit_l, vit_h, vit_g; vit_tiny is ours), with `overrides`
        on top."""
        if name not in PRESETS:
            raise InputError(f"unknown model preset {name!r}; known: {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @property
    def image_hw(self) -> tuple[int, int]:
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        height, width = self.image_hw
        return self.num_frames // self.tubelet_size, height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width

    @property
    def tubelet_pixels(self) -> int:
        """Values that describe one tubelet: what the head predicts."""
        return 3 * self.tubelet_size * self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class MaskConfig(_Checked):
    """Which tokens the encoder sees and which the decoder rebuilds (VideoMAE V2, section 3.2).

    Attributes:
        encoder: "tube", "random" or "frame".
        encoder_ratio: share of tokens hidden from the encoder.
        decoder: "running_cell", "random", "frame", or "none" (encoder-only masking, VideoMAE V1).
        decoder_ratio: share of tokens dropped from the decoder's targets; 0 is the same as "none".
    """

    encoder: str = "tube"
    encoder_ratio: float = ranged(0.9, SHARE_BELOW_1)
    decoder: str = "running_cell"
    decoder_ratio: float = ranged(0.5, SHARE_BELOW_1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("encoder", self.encoder, ("tube", "random", "frame")),
            ("decoder", self.decoder, ("running_cell", "random", "frame", "none")),
        ):
            if value not in known:
                raise InputError(f"unknown {name} mask {value!r}; known: {', '.join(known)}")


CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(_Checked):
    """What changes speed and memory, never the result beyond the error of the dtype.

    Attributes:
        backend: the fused operations: "torch", "triton", or "auto" (triton on a GPU).
        attention: "auto", or a name that `python -m vmae doctor` lists.
        compile: compile the blocks with `torch.compile`.
        cuda_graphs: replay the compiled blocks as CUDA graphs; a GPU only.
        checkpointing: what is made again in the backward instead of being kept: "none", "selective" (the
            MLPs' hidden layers) or "full" (all but each block's input); see `vmae.train.activations`.
        parallel: "none", "ddp", "fsdp", "hybrid", or "auto" (ddp with several processes); see
            `vmae.train.parallel`.
        shard_size: ranks that share one copy of the model, for "hybrid"; None means those of a node.
        num_workers: processes that decode video.
    """

    backend: str = "auto"
    attention: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    checkpointing: str = "none"
    parallel: str = "auto"
    shard_size: int | None = ranged(None, Whole(1, 10**6))
    num_workers: int = ranged(1, WORKERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpointing not in CHECKPOINTING:
            raise InputError(
                f"unknown checkpointing {self.checkpointing!r}; known: {', '.join(CHECKPOINTING)}"
            )
        if self.backend not in ("auto", "torch", "triton"):
            raise InputError(f"unknown backend {self.backend!r}; known: auto, torch, triton")
        if self.cuda_graphs and not self.compile:
            raise InputError("CUDA graphs are of compiled blocks: cuda_graphs needs compile")
