"""The ways to do one and the same training step that the benchmarks compare: the registry of variants and
maskings."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vmae import DualMask, InputError, MaskConfig, ModelConfig, build_pretrainer, build_reference
from vmae.config import IMAGENET_MEAN, IMAGENET_STD, PUBLISHED_MODELS
from vmae.model.attention import Attention
from vmae.model.blocks import Block
from vmae.train.compiled import set_compiler

PUBLISHED_PRESETS = tuple(PUBLISHED_MODELS.values())
MASKINGS = {
    "encoder_only": MaskConfig(decoder="none"),
    "dual_25": MaskConfig(decoder_ratio=0.25),
    "dual": MaskConfig(),
    "dual_75": MaskConfig(decoder_ratio=0.75),
}


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; zero where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@dataclass(frozen=True)
class Variant:
    """One way.

    Attributes:
        build: makes the model, from its configuration.
        text: description, for help texts.
        ours: whether it embeds visible and predicts counted tokens only, as this code does; else it is a
            competitor.
        needs_gpu: it does not run on a CPU in sensible time.
        countable: what it keeps can be counted on fake tensors; not where torch.compile decides it.
        maskings: those that it can do.
        gradients: of a model after a backward, by the parameter names of `Pretrainer`.
        allowance: relative difference of its results that has a known reason, on top of rounding.
        check: raises ImportError or InputError where it can't run.
    """

    build: Callable[[ModelConfig], nn.Module]
    text: str
    ours: bool = True
    needs_gpu: bool = False
    countable: bool = True
    maskings: tuple[str, ...] = tuple(MASKINGS)
    gradients: Callable[[nn.Module], dict[str, Tensor]] = named_gradients
    allowance: float = 0.0
    check: Callable[[], object] = lambda: None

    def why_not(self, device: str) -> str | None:
        """The reason why it does not run on `device`; None if it does."""
        if self.needs_gpu and not device.startswith("cuda"):
            return "needs a GPU; here Triton could only be interpreted"
        try:
            self.check()
        except (ImportError, InputError) as error:
            return str(error)
        return None


def build_reference_sdpa(config: ModelConfig) -> nn.Module:
    """The published algorithm with the one change that most people make first: fused attention."""
    model = build_reference(config)
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = "sdpa"
    return model


def compile_blocks(model: nn.Module, backend: str | Callable = "inductor") -> nn.Module:
    """Compile each block of encoder and decoder by itself, for the very shapes that come: a training step has
    one."""
    for part in ("encoder", "decoder"):
        for block in model.get_submodule(f"{part}.blocks").children():
            block.compile(dynamic=False, backend=backend)
    return model


def compile_choosing(model: nn.Module, recompute: str) -> nn.Module:
    """`compile_blocks` with LayerNorm's and GELU's results made again by hand ("on"), or as torch's
    partitioner chooses within its memory budget ("budget"); sets that for this process."""
    set_compiler(recompute)
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = recompute == "on"
    return compile_blocks(model)


class HuggingFace(nn.Module):
    """transformers' VideoMAEForPreTraining with the weights that `build_pretrainer` would begin with."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        from transformers import VideoMAEForPreTraining
        from transformers.utils import logging

        from vmae.checkpoint.huggingface import save_pretrained

        logging.disable_progress_bar()  # of loading weights, between our lines
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(build_pretrainer(config), folder)
            self.model = VideoMAEForPreTraining.from_pretrained(folder, attn_implementation="sdpa").train()

    def forward(self, clips: Tensor, mask: DualMask) -> Tensor:
        """The loss of uint8 [B, T, H, W, 3] clips."""
        mean, std = (torch.tensor(values, device=clips.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = ((clips.float() / 255 - mean) / std).permute(0, 1, 4, 2, 3)
        return self.model(pixels, mask.to_bool()[0]).loss


def huggingface_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a `HuggingFace` under our names."""
    from vmae.checkpoint.huggingface import PRETRAINING, from_huggingface

    theirs = {name.removeprefix("model."): grad for name, grad in named_gradients(model).items()}
    return from_huggingface(theirs, PRETRAINING)


def check_transformers() -> None:
    import transformers  # noqa: F401


def build_torch(config: ModelConfig) -> nn.Module:
    return build_pretrainer(config, backend="torch")


def build_triton(config: ModelConfig) -> nn.Module:
    return build_pretrainer(config, backend="triton")


VARIANTS: dict[str, Variant] = {
    "reference": Variant(build_reference, "the published algorithm, written plainly", ours=False),
    "reference+sdpa": Variant(build_reference_sdpa, "the same with torch's fused attention", ours=False),
    "reference+compile": Variant(
        lambda config: compile_blocks(build_reference_sdpa(config)),
        "the same, blocks compiled too",
        ours=False,
        countable=False,
    ),
    "huggingface": Variant(
        HuggingFace,
        "transformers' VideoMAEForPreTraining",
        ours=False,
        countable=False,
        maskings=("encoder_only",),
        gradients=huggingface_gradients,
        allowance=1e-4,  # its last norms have an epsilon of 1e-5, whatever the settings say
        check=check_transformers,
    ),
    "torch": Variant(build_torch, "this code, PyTorch operations"),
    "triton": Variant(build_triton, "this code, Triton kernels", needs_gpu=True),
    "triton+compile": Variant(
        lambda config: compile_choosing(build_triton(config), "on"),
        "the same, blocks compiled, norms and GELU made again by hand",
        needs_gpu=True,
        countable=False,
    ),
    "triton+compile+budget": Variant(
        lambda config: compile_choosing(build_triton(config), "budget"),
        "the same, but what is made again is torch's choice within a memory budget",
        needs_gpu=True,
        countable=False,
    ),
}


def resolve_variant(name: str) -> Variant:
    """A variant by name, or one's own as NAME=MODULE:FUNCTION, where FUNCTION(config) returns the model.

    Raises:
        InputError: no such variant, module or function.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    module, _, function = name.partition("=")[2].partition(":")
    if not function:
        raise InputError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}, or NAME=MODULE:FUNCTION")
    try:
        return Variant(getattr(importlib.import_module(module), function), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"variant {name!r}: {error}") from error


def default_variants(device: str) -> list[str]:
    """All variants that run on `device`. On a CPU, where minutes count: the published algorithm with fused
    and with plain attention (in float32 the first is the fastest other way, in bfloat16 the second),
    transformers' model where it is installed, and this code."""
    names = list(VARIANTS)
    if not device.startswith("cuda"):
        names = ["reference+sdpa", "reference", "huggingface", "torch"]
    return [name for name in names if VARIANTS[name].why_not(device) is None]


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor))
