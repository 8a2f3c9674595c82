"""Pre-training, fine-tuning and testing of video transformers with VideoMAE V2's dual masking, with fused
kernels."""

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
]
