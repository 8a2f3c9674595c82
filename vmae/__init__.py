"""Dual-masked pre-training of video transformers: VideoMAE V2's method, with fused kernels and proof."""

from vmae import train  # a package that is called: vmae.train(config, output=...)
from vmae.config import MaskConfig, ModelConfig, SpeedConfig
from vmae.errors import InputError
from vmae.masking import DualMask
from vmae.model import build_classifier, build_pretrainer, build_reference

__version__ = "0.1.0"

__all__ = [
    "DualMask",
    "InputError",
    "MaskConfig",
    "ModelConfig",
    "SpeedConfig",
    "build_classifier",
    "build_pretrainer",
    "build_reference",
    "train",
]
