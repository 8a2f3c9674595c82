"""Settings, each written once: a field of a frozen configuration holds its default, help, range and names.

    lr: float = setting(1.5e-4, "peak learning rate", Real(above=0, most=1000))   # flag, YAML key, check
    steps: int = ranged(1, Whole(1, 100))                         # a number that no command line sets
    parser.add_argument("--top", type=Whole(1, 1000), default=5)  # a number that only a flag has

`vmae.flags` makes flags and YAML keys of the fields. Both ends of a range are finite, so NaN and infinity are
outside every one.
"""

from __future__ import annotations

import argparse
import dataclasses
import numbers
import re
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmae.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_KEY = "setting"


class Limits:
    """What a value may be. Called with a word of a command line, it gives the value (argparse's `type=`)."""

    def allows(self, value: Any) -> bool:
        raise NotImplementedError

    def read(self, text: str) -> Any:
        """The value that `text` means; raises ValueError for none."""
        raise NotImplementedError

    def refusal(self, name: str, value: Any) -> str:
        """What is wrong with a value that is not allowed: names the setting, the range and the value."""
        return f"{name} must be {self}, not {shown(value)}"

    def check(self, name: str, value: Any) -> None:
        """Raises InputError unless the value is allowed."""
        if not self.allows(value):
            raise InputError(self.refusal(name, value))

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
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            return False
        return self.least <= int(value) <= self.most

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
        number: Any = value  # int, float or numpy's: all compare with a float
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        if self.least is not None and not number >= self.least:
            return False
        if self.above is not None and not number > self.above:
            return False
        return bool(number <= self.most if self.most is not None else number < self.below)

    def read(self, text: str) -> float:
        return float(text)

    def __str__(self) -> str:
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        said = [f"{words} {_plain(end)}" for words, end in ends.items() if end is not None]
        return f"a number {' and '.join(said)}"


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


@dataclass(frozen=True, eq=False)
class OrUnset(Limits):
    """What `within` takes on a command line, or one of `words`, which mean `usual`."""

    within: Limits
    words: tuple[str, ...]
    usual: Any

    def allows(self, value: Any) -> bool:
        return self.within.allows(value)

    def __call__(self, text: str) -> Any:
        return self.usual if text in self.words else self.within(text)

    def __str__(self) -> str:
        return str(self.within)


@dataclass(frozen=True, eq=False)
class OneOf(Limits):
    """One of some names.

    Attributes:
        noun: what they name, for messages.
        known: the names, looked at when asked.
        published: names of the published code, and ours for them; read on command lines and in files.
    """

    noun: str
    known: Collection[str]
    published: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def allows(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.known

    def read(self, text: str) -> str:
        return self.published.get(text, text)

    def refusal(self, name: str, value: Any) -> str:
        return f"unknown {self.noun} {shown(value)}; known: {self}"

    def __call__(self, text: str) -> str:
        value = self.read(text)
        if not self.allows(value):
            raise argparse.ArgumentTypeError(self.refusal("", text))
        return value

    def __str__(self) -> str:
        return ", ".join(self.known)


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


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a field says of itself, beside its type and default.

    Attributes:
        help: for `--help` and the table of settings; None: no command line sets it.
        within: its range (of each number of a tuple), or the names that it may have.
        name: YAML key, and flag with dashes; None: the field's name.
        aliases: more flags, the published names of it.
        unset: words for the default where that follows from something else; `{default}` in it is the field's.
        metavar: stands for its value in `--help`.
        group: heading in `--help`; None: `group` of the configuration.
        bare: value of the flag alone, without a word; None: it needs one.
        constants: (flags, the value that they stand for, their help or None to hide them).
        unset_words: words that mean the default, as the published code's own defaults are written.
        overrules: keys whose values this one makes void, where they were set on a lower layer.
        hidden: not in `--help`.
    """

    help: str | None = None
    within: Limits | None = None
    name: str | None = None
    aliases: tuple[str, ...] = ()
    unset: str | None = None
    metavar: str | None = None
    group: str | None = None
    bare: Any = None
    constants: tuple[tuple[tuple[str, ...], Any, str | None], ...] = ()
    unset_words: tuple[str, ...] = ()
    overrules: tuple[str, ...] = ()
    hidden: bool = False


def setting(
    default: Any = dataclasses.MISSING, help: str | None = None, within: Limits | None = None, **more: Any
) -> Any:
    """A dataclass field that flags and YAML files set; see `Setting`. None is a value where its type says so.

    Without a default the command line must give it, unless `unset` says what holds then.
    """
    return dataclasses.field(default=default, metadata={_KEY: Setting(help=help, within=within, **more)})


def ranged(default: Any = dataclasses.MISSING, within: Limits | None = None) -> Any:
    """A dataclass field with a range that no command line sets."""
    return setting(default, within=within)


def setting_like(owner: type[DataclassInstance], name: str, default: Any, **changes: Any) -> Any:
    """A field as `owner` has it, with another default and these `changes` of its `Setting`."""
    about = dataclasses.replace(about_field(owner, name), **changes)
    return dataclasses.field(default=default, metadata={_KEY: about})


def about_field(owner: type[DataclassInstance], name: str) -> Setting:
    """What a field of a configuration says of itself."""
    return owner.__dataclass_fields__[name].metadata.get(_KEY, Setting())


def limits(owner: type[DataclassInstance], name: str) -> Limits:
    """The range that a field of a configuration declares; raises TypeError where it declares none."""
    found = about_field(owner, name).within
    if found is None:
        raise TypeError(f"{owner.__name__}.{name} declares no range")
    return found


_TUPLE = re.compile(r"tuple\[([^]]*)\]")


def check_fields(config: Any) -> None:
    """Check all settings of a configuration; lists become tuples, as they were before JSON.

    Raises:
        InputError: a value out of its range, a tuple of another length, or None where that means nothing.
    """
    for field in dataclasses.fields(config):
        kind, value = str(field.type), getattr(config, field.name)
        if isinstance(value, list) and "tuple" in kind:
            value = tuple(value)
            object.__setattr__(config, field.name, value)
        within = about_field(type(config), field.name).within
        if within is None or (value is None and "None" in kind):
            continue
        inside, several = _TUPLE.search(kind), isinstance(value, tuple)
        if inside and (several or kind.startswith("tuple")):
            wanted = None if "..." in inside[1] else len(inside[1].split(","))
            if not several or (wanted is not None and wanted != len(value)):
                raise InputError(f"{field.name} must be {wanted or 'several'} numbers, not {shown(value)}")
        for part in value if several else (value,):
            within.check(field.name, part)
