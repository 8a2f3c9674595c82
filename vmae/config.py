"""Frozen, self-checking settings: what changes results (`ModelConfig`, `MaskConfig`, `OptimConfig`) apart
from what changes speed only (`SpeedConfig`)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from vmae.errors import InputError
from vmae.masking import DECODER_MASKS, ENCODER_MASKS, PUBLISHED_MASKS, mask_help
from vmae.settings import (
    FRAMES,
    SHARE_BELOW_1,
    SIDE,
    WORKERS,
    Limits,
    OneOf,
    Real,
    Whole,
    check_fields,
    setting,
)

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
    # Not published, for `make demo`: fewer blocks and a wider decoder than vit_tiny. Cosine attention is
    # sharp from the first step: loss 0.0327, not 0.0340, after 700 steps on random crops of the demo's clips
    # (one run each, on a CPU).
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

# Names of the same models in the published code: of pre-training, and of classifiers.
PUBLISHED_MODELS = {
    "pretrain_videomae_small_patch16_224": "vit_s",
    "pretrain_videomae_base_patch16_224": "vit_b",
    "pretrain_videomae_large_patch16_224": "vit_l",
    "pretrain_videomae_huge_patch16_224": "vit_h",
    "pretrain_videomae_giant_patch14_224": "vit_g",
}
PUBLISHED_CLASSIFIERS = {
    "vit_small_patch16_224": "vit_s",
    "vit_base_patch16_224": "vit_b",
    "vit_large_patch16_224": "vit_l",
    "vit_huge_patch16_224": "vit_h",
    "vit_giant_patch14_224": "vit_g",
}

# Registries of names: help texts, checks and `--config` read these.
USUAL_MODEL = "vit_b"
MODEL = OneOf("model preset", PRESETS, PUBLISHED_MODELS | PUBLISHED_CLASSIFIERS)
CHECKPOINTING = ("none", "selective", "full")
RECOMPUTE = ("auto", "on", "off", "budget")
POOLINGS = ("mean", "first", "attentive")
NORMED = "normed"  # of a pre-trained encoder, which ends with a norm over each token; no flag offers it
PARALLEL = ("auto", "none", "ddp", "fsdp", "hybrid")
DTYPE = OneOf("dtype", ("float32", "bfloat16"))
# Headings of settings.
DATA, START = "data and output", "what to start from"
RESULTS, SPEED = "settings that change results", "settings that change speed and housekeeping only"
TEACHER = "teacher (changes results)"
VALIDATION = "validation and test"

MAX_CHANNELS = 256
MAX_TOKENS = 2**20  # of a clip: its fixed positions alone take 3 GiB for ViT-B
_Config = TypeVar("_Config", bound="_Checked")
_WIDTH, _BLOCKS, _HEADS = Whole(1, 2**16), Whole(1, 256), Whole(1, 1024)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Shared by the configurations: settings checked, construction from a dict (of `to_dict`, also after a
    way through JSON) that refuses unknown keys, and `replace`."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(
                f"{cls.__name__}: unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        nested = get_type_hints(cls) if any(isinstance(value, dict) for value in values.values()) else {}
        made = dict(values)
        for name, value in values.items():
            if isinstance(value, dict) and dataclasses.is_dataclass(nested[name]):
                made[name] = nested[name].from_dict(value)
        return cls(**made)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self: _Config, **changes: Any) -> _Config:
        return type(self).from_dict({**self.to_dict(), **changes})


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """Everything that decides the parameters' shapes and the function they compute.

    Raises:
        InputError: a number out of its range, or a size that does not divide another.
    """

    group = "architecture (default: the preset's, or that of the checkpoint to start from)"

    img_size: int | tuple[int, int] = setting(
        224,
        "side of a clip in pixels, or HEIGHTxWIDTH",
        SIDE,
        name="image_size",
        aliases=("--input_size",),
        unset="{default}, or the checkpoint's",
        group=RESULTS,
    )
    patch_size: int = setting(16, "side of a tubelet in pixels", SIDE, unset="the preset's")
    tubelet_size: int = setting(
        2, "depth of a tubelet in frames", FRAMES, aliases=("--tubelet_size",), unset="{default}"
    )
    num_frames: int = setting(
        16,
        "frames of a clip",
        FRAMES,
        aliases=("--num_frames",),
        unset="{default}, or the checkpoint's",
        group=RESULTS,
    )
    embed_dim: int = setting(768, "width of the encoder", _WIDTH, unset="the preset's")
    depth: int = setting(12, "blocks of the encoder", _BLOCKS, unset="the preset's")
    num_heads: int = setting(12, "heads of the encoder's attention", _HEADS, unset="the preset's")
    decoder_embed_dim: int = setting(384, "width of the decoder", _WIDTH, unset="the preset's")
    decoder_depth: int = setting(
        4, "blocks of the decoder", _BLOCKS, aliases=("--decoder_depth",), unset="the preset's"
    )
    decoder_num_heads: int = setting(6, "heads of the decoder's attention", _HEADS, unset="the preset's")
    mlp_ratio: float = setting(
        4.0, "hidden over outer width of every MLP", Real(above=0, most=64), unset="the preset's"
    )
    qkv_bias: bool = setting(True, "learned bias on q and v; k never has one", unset="{default}")
    qk_scale: float | None = setting(None, "factor on q", Real(above=0, most=1e6), unset="1 / sqrt(head dim)")
    drop_path_rate: float = setting(
        0.0,
        "stochastic depth of the last block of encoder and decoder, rising linearly from 0",
        SHARE_BELOW_1,
        name="drop_path",
        aliases=("--drop_path",),
        group=RESULTS,
    )
    init_values: float = setting(
        0.0, "initial layer scale", Real(least=0, most=1000), name="layer_scale", unset="none"
    )
    learned_pos: bool = setting(
        False, "learned instead of sine-cosine positions in the encoder", unset="{default}"
    )
    pos_grid: tuple[int, int, int] | None = setting(
        None,
        "token grid (time, height, width) that the fixed positions of encoder and decoder are made for, then "
        "interpolated: that of --init",
        Whole(1, 2**14),
        unset="the model's own",
    )
    cos_attn: bool = setting(False, "cosine attention with a learned temperature per head", unset="{default}")
    layer_norm_eps: float = setting(1e-6, "of every LayerNorm", Real(above=0, most=1), unset="{default}")
    in_channels: int = setting(
        3,
        "channels of a clip: 1 is grey, 4 may be RGB and depth, 12 bands of a satellite; not 3: frames are "
        "numpy stacks or images of so many channels, and PyTorch operations take them",
        Whole(1, MAX_CHANNELS),
        unset="{default}, or the checkpoint's",
        group=RESULTS,
    )
    channel_mean: tuple[float, ...] | None = setting(
        None,
        "mean of each channel; of uint8 over 255, of uint16 over 65535, of float32 as it is "
        "(`vmae check-data --statistics` tells it)",
        Real(least=-1e6, most=1e6),
        metavar="MEAN",
        unset="ImageNet's, or the checkpoint's",
        group=RESULTS,
    )
    channel_std: tuple[float, ...] | None = setting(
        None,
        "standard deviation of each channel, in the same units",
        Real(above=0, most=1e6),
        metavar="STD",
        unset="ImageNet's, or the checkpoint's",
        group=RESULTS,
    )

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
        self._check_channels()
        if self.cos_attn and self.qk_scale is not None:
            raise InputError("cosine attention learns its scale: qk_scale must be None with cos_attn")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The model `name` of `PRESETS`, with `overrides` on top; raises InputError where there is none."""
        if name not in PRESETS:
            raise InputError(f"unknown model preset {name!r}; known: {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    def _check_channels(self) -> None:
        """Raises InputError unless mean and deviation are there together, one number for each channel."""
        for name in ("channel_mean", "channel_std"):
            given = getattr(self, name)
            if given is not None and len(given) != self.in_channels:
                raise InputError(
                    f"{name} has {len(given)} numbers, but clips have {self.in_channels} channels"
                )
        if (self.channel_mean is None) != (self.channel_std is None):
            raise InputError("channel_mean and channel_std belong together: give both, or none")

    def check_rgb(self, what: str) -> None:
        """Raises InputError where clips have other channels than three, which `what` cannot take."""
        if self.in_channels != 3:
            raise InputError(f"{what} is for clips of 3 channels, and the model takes {self.in_channels}")

    @property
    def has_imagenet_pixels(self) -> bool:
        """Whether clips have three channels, normalised with ImageNet's mean and deviation: what the Triton
        kernels read."""
        own = (self.channel_mean or IMAGENET_MEAN, self.channel_std or IMAGENET_STD)
        return self.in_channels == 3 and own == (IMAGENET_MEAN, IMAGENET_STD)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel. Other channels than three without any are taken as they are."""
        if self.channel_mean is not None and self.channel_std is not None:
            return self.channel_mean, self.channel_std
        if self.in_channels == 3:
            return IMAGENET_MEAN, IMAGENET_STD
        return (0.0,) * self.in_channels, (1.0,) * self.in_channels

    @property
    def clip_bytes(self) -> int:
        """Of a clip in uint8."""
        height, width = self.image_hw
        return self.in_channels * self.num_frames * height * width

    @property
    def most_clip_bytes(self) -> int:
        """Of a clip as a loader gives it: uint8, or the most that values of other channels take, float32."""
        return self.clip_bytes * (1 if self.has_imagenet_pixels else 4)

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
        return self.in_channels * self.tubelet_size * self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class MaskConfig(_Checked):
    """Which tokens the encoder sees and which the decoder rebuilds (VideoMAE V2, section 3.2)."""

    group = RESULTS

    encoder: str = setting(
        "tube",
        f"what hides tokens from the encoder: {mask_help('encoder')}",
        OneOf("encoder mask", ENCODER_MASKS, PUBLISHED_MASKS),
        name="encoder_mask",
        aliases=("--mask_type",),
    )
    encoder_ratio: float = setting(
        0.9, "share of tokens hidden from the encoder", SHARE_BELOW_1, aliases=("--mask_ratio",)
    )
    decoder: str = setting(
        "running_cell",
        f"what leaves tokens out of the decoder's targets: {mask_help('decoder')}",
        OneOf("decoder mask", DECODER_MASKS, PUBLISHED_MASKS),
        name="decoder_mask",
        aliases=("--decoder_mask_type",),
    )
    decoder_ratio: float = setting(
        0.5,
        "share of tokens left out by the decoder; 0: none",
        SHARE_BELOW_1,
        aliases=("--decoder_mask_ratio",),
    )
    lean: bool = setting(
        False,
        "the decoder gets no mask token for what the encoder sees, which is not counted; not as published",
        name="lean_decoder",
    )


CLIP_GRAD = Real(above=0, most=1e30)
# Nesterov's momentum goes by two names in the published code, whose names are read in any case.
OPTIMIZERS = OneOf(
    "optimizer",
    ("adamw", "sgd", "momentum", "muon"),
    {"nesterov": "sgd", "Nesterov": "sgd", "AdamW": "adamw", "SGD": "sgd", "Momentum": "momentum"},
)


class NonfiniteRule(Limits):
    """`stop`, or `skip:K`."""

    count = Whole(1, 10**9)

    @classmethod
    def allowance(cls, rule: str) -> int:
        """K, 0 for `stop`; raises ValueError for anything else."""
        if rule == "stop":
            return 0
        word, _, number = rule.partition(":")
        if word != "skip" or not number.isdecimal() or not cls.count.allows(int(number)):
            raise ValueError(rule)
        return int(number)

    def allows(self, value: Any) -> bool:
        try:
            return isinstance(value, str) and self.allowance(value) >= 0
        except ValueError:
            return False

    def read(self, text: str) -> str:
        return text

    def __str__(self) -> str:
        return f"stop, or skip:K with K {self.count}"


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Checked):
    """Settings of the optimizer; all of them change results. The learning rates are for a total batch of 256
    clips, and scale with the batch (`scaled_to`)."""

    group = "optimizer (changes results)"

    opt: str = setting(
        "adamw",
        "adamw; sgd (Nesterov's momentum); momentum (SGD with plain one); muon (Muon for the matrices of "
        "blocks, AdamW for the rest)",
        OPTIMIZERS,
    )
    lr: float = setting(1.5e-4, "peak learning rate for 256 videos a step", Real(above=0, most=10_000))
    min_lr: float = setting(
        1e-5, "final learning rate for 256 videos", Real(least=0, most=10_000), aliases=("--min_lr",)
    )
    warmup_epochs: float = setting(
        40.0,
        "linear warm-up from 0",
        Real(least=0, most=10**9),
        aliases=("--warmup_epochs",),
        unset="{default} in pre-training, 5 in other training; less in short runs",
        overrules=("warmup_steps",),
    )
    warmup_lr: float = setting(
        0.0,
        "the warm-up starts from this learning rate for 256 videos",
        Real(least=0, most=10_000),
        aliases=("--warmup_lr",),
    )
    momentum: float = setting(0.9, "of sgd and momentum", SHARE_BELOW_1)
    betas: tuple[float, float] = setting(
        (0.9, 0.95), "of AdamW", SHARE_BELOW_1, aliases=("--opt_betas",), unset_words=("None",)
    )
    eps: float = setting(
        1e-8, "of AdamW", Real(above=0, most=1), aliases=("--opt_eps",), unset_words=("None",)
    )
    # Muon's defaults: torch.optim.Muon's momentum (Jordan et al., 2024), and the rule with which AdamW's rate
    # and weight decay carry over (Liu et al., 2025, arXiv 2502.16982).
    muon_lr: float | None = setting(
        None,
        "with --opt muon, peak learning rate of the matrices for 256 videos; it follows the schedule of --lr",
        Real(above=0, most=10_000),
        unset="that of --lr",
    )
    muon_momentum: float = setting(0.95, "of Muon (Nesterov's)", SHARE_BELOW_1)
    muon_adjust: str = setting(
        "match_rms_adamw",
        "what multiplies Muon's learning rate: match_rms_adamw, 0.2 sqrt(max(rows, columns)), so that steps "
        "are as long as AdamW's; original, sqrt(max(1, rows / columns))",
        OneOf("rule", ("match_rms_adamw", "original")),
    )
    weight_decay: float = setting(
        0.05,
        "pulls weights to 0; not 1-d parameters, biases, positions and the mask token",
        Real(least=0, most=1000),
        aliases=("--weight_decay",),
    )
    weight_decay_end: float | None = setting(
        None,
        "weight decay moves to this over the run, along a cosine",
        Real(least=0, most=1000),
        aliases=("--weight_decay_end",),
        unset="it stays",
    )
    clip_grad: float | None = setting(
        None, "largest gradient norm", CLIP_GRAD, aliases=("--clip_grad",), unset="no clipping"
    )

    on_nonfinite: str = setting(
        "stop",
        "what a loss or gradient that is not finite does: stop the run before the step; skip:K leaves the "
        "step out, K steps of a run at most, then stops",
        NonfiniteRule(),
        metavar="stop|skip:K",
    )
    skip_spikes: float | None = setting(
        None,
        "leave steps out whose loss or gradient norm is so many standard deviations above the mean of the "
        "last steps taken (OLMo: 6)",
        Real(least=1, most=1000),
        unset="all finite steps are taken",
    )
    spike_window: int = setting(
        128, "of --skip-spikes: steps that a loss is compared with", Whole(4, 100_000)
    )
    spike_limit: int = setting(
        100, "of --skip-spikes: a run that would leave more steps out stops", Whole(1, 10**9)
    )

    @property
    def nonfinite_allowed(self) -> int:
        """Steps of a run that may be left out because something is not finite."""
        return NonfiniteRule.allowance(self.on_nonfinite)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opt == "sgd" and not self.momentum:
            raise InputError(
                "opt sgd has Nesterov's momentum, which must be above 0: --opt momentum --momentum 0 is SGD "
                "without any"
            )
        if self.muon_lr is not None and self.opt != "muon":
            raise InputError(f"muon_lr {self.muon_lr:g} is for opt muon, not {self.opt}")
        if self.warmup_lr > self.lr:
            raise InputError(f"warmup_lr {self.warmup_lr:g} is above lr {self.lr:g}, where the warm-up ends")
        if self.weight_decay_end and not self.weight_decay:
            raise InputError(
                f"weight_decay_end {self.weight_decay_end:g} changes nothing with weight_decay 0: as "
                "published, only weights that decay follow the schedule"
            )

    def scaled_to(self, total_batch: int) -> OptimConfig:
        """The learning rates of a total batch: `lr * total_batch / 256`."""
        rates = {name: getattr(self, name) for name in ("lr", "min_lr", "warmup_lr", "muon_lr")}
        scaled = {name: rate * total_batch / 256 for name, rate in rates.items() if rate is not None}
        return self.replace(**scaled)


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(_Checked):
    """What changes speed and memory, never the result beyond the error of the dtype."""

    group = SPEED

    backend: str = setting(
        "auto",
        "fused operations: auto (triton on a GPU), torch, triton",
        OneOf("backend", ("auto", "torch", "triton")),
    )
    attention: str = setting("auto", "attention: auto, or a name that `vmae doctor` lists")
    compile: bool | None = setting(
        None, "compile the blocks with torch.compile", unset="on a GPU with Triton and a C compiler"
    )
    cuda_graphs: bool = setting(False, "replay compiled blocks as CUDA graphs; a GPU only (not run yet)")
    checkpointing: str = setting(
        "none",
        "made again in the backward: none, selective (MLPs' hidden layers), full (all but blocks' inputs)",
        OneOf("checkpointing", CHECKPOINTING),
    )
    recompute: str = setting(
        "auto",
        "LayerNorm's and GELU's results: on (made again in the backward), off (kept), budget (of compiled "
        "blocks torch's partitioner keeps about as much as on does); auto: on a GPU off where the batch "
        "fits, else budget or on; on a CPU on",
        OneOf("recompute", RECOMPUTE),
    )
    parallel: str = setting(
        "auto",
        "none, ddp, fsdp (weights split over all ranks), hybrid (over a group of ranks); auto: ddp with "
        "several processes",
        OneOf("--parallel", PARALLEL),
    )
    shard_size: int | None = setting(
        None,
        "ranks that share one copy of the model, for hybrid",
        Whole(1, 10**6),
        unset="those of a node",
    )
    num_workers: int = setting(
        1, "processes that decode video; 0: this one", WORKERS, name="workers", aliases=("--num_workers",)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cuda_graphs and self.compile is False:
            raise InputError("CUDA graphs are of compiled blocks: cuda_graphs needs compile")
        if self.recompute == "budget" and self.compile is False:
            raise InputError("--recompute budget is of compiled blocks: leave --no-compile out, or take on")


# --- What configurations are made from: settings of commands, not kept themselves ---


@dataclass(frozen=True, kw_only=True)
class ModelSettings(_Checked):
    """The architecture by name."""

    group = RESULTS

    model: str | None = setting(
        None,
        f"preset: {MODEL}",
        MODEL,
        unset=f"the checkpoint's, else {USUAL_MODEL}",
        overrules=tuple(dict.fromkeys(name for preset in PRESETS.values() for name in preset)),
    )


@dataclass(frozen=True, kw_only=True)
class StartSettings(ModelSettings):
    """What a checkpoint may not say of itself."""

    init_frames: int | None = setting(
        None,
        "frames of the clips that the checkpoint is of, if it does not say",
        FRAMES,
        unset="as the file shows, else 16",
        group=START,
    )
    init_size: int | None = setting(
        None,
        "side of the clips that the checkpoint is of, if it does not say",
        SIDE,
        unset="as the file shows, else 224",
        group=START,
    )
