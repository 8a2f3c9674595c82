"""Targets of pre-training, one file each: the modules of this package have a `TARGET`, which `TARGETS` lists.

A new target is a new file here: a subclass of `vmae.model.target.Target`, and a `TARGET` with its name, half
a line on it and what builds it. `--target` and its help, `vmae plan`, docs/settings.md and the tests then
know it.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from vmae.config import RESULTS
from vmae.settings import OneOf, setting
from vmae.targets.kind import TargetKind, TargetSettings

# In the order of help texts: the published target first.
_NAMES = sorted((module.name for module in pkgutil.iter_modules(__path__)), key=lambda name: name != "pixels")
_MODULES = [importlib.import_module(f"{__name__}.{name}") for name in _NAMES]
TARGETS: dict[str, TargetKind] = {
    module.TARGET.name: module.TARGET for module in _MODULES if hasattr(module, "TARGET")
}


@dataclass(frozen=True, kw_only=True)
class TargetConfig(TargetSettings):
    """What the decoder's predictions are compared with."""

    name: str = setting(
        "pixels",
        f"what is predicted: {', '.join(f'{kind.name} ({kind.text})' for kind in TARGETS.values())}",
        OneOf("target", TARGETS),
        name="target",
        group=RESULTS,
    )
