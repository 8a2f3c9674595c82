"""The published target; see `vmae.model.target.Pixels`."""

from __future__ import annotations

from vmae.model.target import Pixels
from vmae.targets.kind import TargetKind, Wanted


def build(wanted: Wanted) -> Pixels:
    return Pixels(wanted.model, wanted.normalize)


TARGET = TargetKind("pixels", "a tubelet's pixels, as published", build)
