"""Pre-training, fine-tuning and testing of video transformers with VideoMAE V2's dual masking, with fused
kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmae import train
    from vmae.config import MaskConfig, ModelConfig, SpeedConfig
    from vmae.errors import InputError
    from vmae.evaluate.model import load
    from vmae.masking import DualMask
    from vmae.model import build_classifier, build_pretrainer, build_reference

__version__ = "0.1.0"  # the only place; setup.py reads it here

__all__ = [
    "DualMask",
    "InputError",
    "MaskConfig",
    "ModelConfig",
    "SpeedConfig",
    "build_classifier",
    "build_pretrainer",
    "build_reference",
    "load",
    "train",
]

# Public names and their modules. A module is imported when one of its names is first used: `import vmae` and
# `vmae --help` do not load torch.
_MODULES = {
    "DualMask": "vmae.masking",
    "InputError": "vmae.errors",
    "MaskConfig": "vmae.config",
    "ModelConfig": "vmae.config",
    "SpeedConfig": "vmae.config",
    "build_classifier": "vmae.model",
    "build_pretrainer": "vmae.model",
    "build_reference": "vmae.model",
    "load": "vmae.evaluate.model",
    "train": "vmae.train",  # a package that is called: vmae.train(config, output=...)
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = importlib.import_module(_MODULES[name])
    if value.__name__ != f"{__name__}.{name}":
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
