"""Ranges of the numbers that people set: stated once, where a setting is declared, and checked here.

    lr: float = ranged(1.5e-4, Real(above=0, most=1000))            # a field of a frozen configuration
    parser.add_argument("--lr", type=limits(OptimConfig, "lr"))     # its flag: the same range
    parser.add_argument("--top", type=Whole(1, 1000), default=5)    # a number that only a flag has

Both ends of a range are finite, so NaN and infinity are outside every one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import numbers
import re
import reprlib
from dataclasses import dataclass
from typing import Any

from vmae.errors import InputError

_KEY = "limits"


class Limits:
    """What a number may be. Called with a word of a command line, it gives the number (argparse's
    `type=`)."""

    def allows(self, value: Any) -> bool:
        raise NotImplementedError

    def read(self, text: str) -> Any:
        """The number that `text` means; raises ValueError for no number."""
        raise NotImplementedError

    def check(self, name: str, value: Any) -> None:
        """Raises InputError, which names the setting, the value and the range, unless the value is
        allowed."""
        if not self.allows(value):
            raise InputError(f"{name} must be {self}, not {shown(value)}")

    def __call__(self, text: str) -> Any:
        try:
            value = self.read(text)
        except ValueError:
            value = None
        if value is None or not self.allows(value):
            raise argparse.ArgumentTypeError(
                f"must be {self}, not {text if len(text) <= 40 else text[:37] + '...'}"
            )
        return value


@dataclass(frozen=True)
class Whole(Limits):
    """Whole numbers from `least` to `most`."""

    least: int
    most: int

    def allows(self, value: Any) -> bool:
        return (
            isinstance(value, numbers.Integral)
            and not isinstance(value, bool)
            and self.least <= value <= self.most
        )

    def read(self, text: str) -> int:
        return int(text)

    def __str__(self) -> str:
        return f"a whole number from {self.least:,} to {self.most:,}"


@dataclass(frozen=True, kw_only=True)
class Real(Limits):
    """Numbers `above` or from `least` on, up to `most` or `below`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if (self.least is None) == (self.above is None) or (self.most is None) == (self.below is None):
            raise ValueError("a range has one lower and one upper end")

    def allows(self, value: Any) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        enough = value > self.above if self.least is None else value >= self.least
        return bool(enough and (value < self.below if self.most is None else value <= self.most))

    def read(self, text: str) -> float:
        return float(text)

    def __str__(self) -> str:
        low = f"above {_plain(self.above)}" if self.least is None else f"at least {_plain(self.least)}"
        return f"a number {low} and " + (
            f"below {_plain(self.below)}" if self.most is None else f"at most {_plain(self.most)}"
        )


@dataclass(frozen=True)
class Sides(Limits):
    """Sizes of pictures on a command line: `224`, or `224x320` (height, width); each side as `side` says."""

    side: Whole

    def allows(self, value: Any) -> bool:
        return all(map(self.side.allows, value if isinstance(value, tuple) else (value,)))

    def read(self, text: str) -> int | tuple[int, int]:
        sides = [int(side) for side in text.lower().split("x")]
        if len(sides) > 2:
            raise ValueError(text)
        return sides[0] if len(sides) == 1 else (sides[0], sides[1])

    def __str__(self) -> str:
        return f"a side in pixels, or HEIGHTxWIDTH, each {self.side}"


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def shown(value: Any) -> str:
    """`repr`, short enough for a line."""
    try:
        text = reprlib.repr(value)  # bounded, also for YAML's aliases of aliases
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        return f"this {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."


# --- Ranges that many settings have -------------------------------------------------------------------------

# The upper ends refuse what can only be a mistake, and what would end in a trace of torch or numpy instead of
# a line.
SEED = Whole(0, 2**63 - 1)  # torch's generators take no more
COUNT = Whole(1, 10**9)
STEPS = Whole(1, 10**10)
BATCH = Whole(1, 2**20)
CLASSES = Whole(1, 1_000_000)
SIDE = Whole(1, 8192)  # pixels
FRAMES = Whole(1, 16384)
STRIDE = Whole(1, 10**6)
WORKERS = Whole(0, 1024)
PROCESSES = Whole(1, 1024)
FPS = Real(above=0, most=100_000)
SHARE = Real(least=0, most=1)
SHARE_BELOW_1 = Real(least=0, below=1)
SHARE_ABOVE_0 = Real(above=0, most=1)


# --- Fields -------------------------------------------------------------------------------------------------


def ranged(default: Any = dataclasses.MISSING, within: Limits | None = None) -> Any:
    """A dataclass field whose numbers (each of a tuple's) are `within` these limits; None too, where its type
    says so."""
    return dataclasses.field(default=default, metadata={_KEY: within})


@functools.cache
def limits(owner: type, name: str) -> Limits:
    """The range that a field of a configuration declares; raises TypeError where it declares none."""
    found = owner.__dataclass_fields__[name].metadata.get(_KEY)
    if found is None:
        raise TypeError(f"{owner.__name__}.{name} declares no range")
    return found


_TUPLE = re.compile(r"tuple\[([^]]*)\]")


def check_fields(config: Any) -> None:
    """Check all numbers of a configuration; lists become tuples, as they were before JSON.

    Raises:
        InputError: a number out of its range, a tuple of another length, or None where that means nothing.
    """
    for field in dataclasses.fields(config):
        kind, value = str(field.type), getattr(config, field.name)
        if isinstance(value, list) and "tuple" in kind:
            value = tuple(value)
            object.__setattr__(config, field.name, value)
        within = field.metadata.get(_KEY)
        if within is None or (value is None and "None" in kind):
            continue
        inside, several = _TUPLE.search(kind), isinstance(value, tuple)
        if inside and (several or kind.startswith("tuple")):
            wanted = None if "..." in inside[1] else len(inside[1].split(","))
            if not several or (wanted is not None and wanted != len(value)):
                raise InputError(f"{field.name} must be {wanted or 'several'} numbers, not {shown(value)}")
        for part in value if several else (value,):
            within.check(field.name, part)
