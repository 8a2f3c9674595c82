"""From settings to a target."""

from __future__ import annotations

import importlib

from vmae.model.target import Target
from vmae.targets.settings import Wanted


def build_target(wanted: Wanted) -> Target:
    """The target `wanted.settings.name`, on the CPU.

    Raises:
        InputError: what a person can mend, such as a teacher that is not there.
    """
    return importlib.import_module(f"vmae.targets.{wanted.settings.name}").build(wanted)
