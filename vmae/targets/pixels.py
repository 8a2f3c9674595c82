"""The published target; see `vmae.model.target.Pixels`."""

from __future__ import annotations

from vmae.model.target import Pixels
from vmae.targets.settings import Wanted

ABOUT = "a tubelet's pixels, as published"


def build(wanted: Wanted) -> Pixels:
    return Pixels(wanted.model, wanted.normalize)
