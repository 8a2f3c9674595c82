"""Frozen, self-checking settings: what changes results (`ModelConfig`, `MaskConfig`) apart from what changes speed only
(`SpeedConfig`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vmae.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Encoder and decoder sizes of the published models (VideoMAE V2, section 4 and its released code). ViT-g's MLP is 48/11
# wide in the decoder too, because the published constructor hands one ratio to both.
PRESETS: dict[str, dict[str, Any]] = {
    "vit_s": dict(embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=192, decoder_num_heads=3),
    "vit_b": dict(embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=384, decoder_num_heads=6),
    "vit_l": dict(embed_dim=1024, depth=24, num_heads=16, decoder_embed_dim=512, decoder_num_heads=8),
    "vit_h": dict(embed_dim=1280, depth=32, num_heads=16, decoder_embed_dim=512, decoder_num_heads=8),
    "vit_g": dict(
        embed_dim=1408, depth=40, num_heads=16, decoder_embed_dim=512, decoder_num_heads=8, patch_size=14, mlp_ratio=48 / 11
    ),
    # Not published: small enough to learn something on two CPU cores in a minute or two (`make demo`).
    "vit_tiny": dict(embed_dim=128, depth=4, num_heads=4, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2),
}


class _Checked:
    """Shared by the configurations: construction from a dict that refuses unknown keys, and `replace`."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"{cls.__name__}: unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
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
        pos_grid: token grid (time, height, width) that the fixed positions are made for, then interpolated to this model's;
            None means its own. For encoders trained on other frame counts or sizes.
        cos_attn: cosine attention with a learned temperature per head.
        layer_norm_eps: of every LayerNorm.

    Raises:
        InputError: a size that does not divide another, or is not positive.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    tubelet_size: int = 2
    num_frames: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 384
    decoder_depth: int = 4
    decoder_num_heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop_path_rate: float = 0.0
    init_values: float = 0.0
    learned_pos: bool = False
    pos_grid: tuple[int, int, int] | None = None
    cos_attn: bool = False
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if isinstance(self.img_size, list):
            object.__setattr__(self, "img_size", tuple(self.img_size))
        if self.pos_grid is not None:
            object.__setattr__(self, "pos_grid", tuple(self.pos_grid))
            if len(self.pos_grid) != 3 or min(self.pos_grid) < 1 or self.learned_pos:
                raise InputError(f"pos_grid {self.pos_grid} must be three positive numbers, and needs fixed positions")
        for name in ("patch_size", "tubelet_size", "num_frames", "embed_dim", "depth", "num_heads", "decoder_embed_dim",
                     "decoder_depth", "decoder_num_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive whole number, not {value!r}")
        for side, name in zip(self.image_hw, ("height", "width")):
            if side < 1 or side % self.patch_size:
                lower = max(side // self.patch_size, 1) * self.patch_size
                raise InputError(
                    f"image {name} {side} is not divisible by the patch size {self.patch_size}; "
                    f"use {lower} or {lower + self.patch_size}"
                )
        if self.num_frames % self.tubelet_size:
            raise InputError(f"{self.num_frames} frames are not divisible by the tubelet size {self.tubelet_size}")
        for width, heads in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise InputError(f"{width} {getattr(self, width)} is not divisible by {heads} {getattr(self, heads)}")
        if not 0 <= self.drop_path_rate < 1:
            raise InputError(f"drop_path_rate must be in [0, 1), not {self.drop_path_rate}")
        if self.cos_attn and self.qk_scale is not None:
            raise InputError("cosine attention learns its scale: qk_scale must be None with cos_attn")
        if self.init_values < 0 or self.mlp_ratio <= 0:
            raise InputError("init_values must be at least 0 and mlp_ratio above 0")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The published model `name` (vit_s, vit_b, vit_l, vit_h, vit_g; vit_tiny is ours), with `overrides` on top."""
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
    encoder_ratio: float = 0.9
    decoder: str = "running_cell"
    decoder_ratio: float = 0.5

    def __post_init__(self) -> None:
        for name, value, known in (
            ("encoder", self.encoder, ("tube", "random", "frame")),
            ("decoder", self.decoder, ("running_cell", "random", "frame", "none")),
        ):
            if value not in known:
                raise InputError(f"unknown {name} mask {value!r}; known: {', '.join(known)}")
        for name in ("encoder_ratio", "decoder_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), not {getattr(self, name)}")


CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(_Checked):
    """What changes speed and memory, never the result beyond the error of the dtype.

    Attributes:
        backend: the fused operations: "torch", "triton", or "auto" (triton on a GPU).
        attention: "auto", or a name that `python -m vmae doctor` lists.
        compile: compile the blocks with `torch.compile`.
        cuda_graphs: replay the compiled blocks as CUDA graphs; a GPU only.
        checkpointing: what is made again in the backward instead of being kept: "none", "selective" (the MLPs' hidden
            layers) or "full" (all but each block's input); see `vmae.train.activations`.
        parallel: "none", "ddp", "fsdp", "hybrid", or "auto" (ddp with several processes); see `vmae.train.parallel`.
        shard_size: ranks that share one copy of the model, for "hybrid"; None means those of a node.
        num_workers: processes that decode video.
    """

    backend: str = "auto"
    attention: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    checkpointing: str = "none"
    parallel: str = "auto"
    shard_size: int | None = None
    num_workers: int = 1

    def __post_init__(self) -> None:
        if self.checkpointing not in CHECKPOINTING:
            raise InputError(f"unknown checkpointing {self.checkpointing!r}; known: {', '.join(CHECKPOINTING)}")
        if self.backend not in ("auto", "torch", "triton"):
            raise InputError(f"unknown backend {self.backend!r}; known: auto, torch, triton")
        if self.num_workers < 0:
            raise InputError(f"num_workers must be at least 0, not {self.num_workers}")
        if self.cuda_graphs and not self.compile:
            raise InputError("CUDA graphs are of compiled blocks: cuda_graphs needs compile")
