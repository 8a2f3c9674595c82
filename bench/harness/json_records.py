"""Typed records and their JSON: a benchmark and its tables share one dataclass.

Old files are read too: a key that a record no longer has is left out, one that it did not have yet is the
field's default.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SCHEMA = "vmae-bench/1"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, smallest and largest of some measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return Spread(median=statistics.median(values), min=min(values), max=max(values))

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """Spread of the ratios of runs that followed each other."""
        return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Runs(Spread):
    """The measurements too, in their order."""

    runs: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Runs:
        values = list(values)
        return Runs(median=statistics.median(values), min=min(values), max=max(values), runs=values)


def to_json(record: Any) -> dict[str, Any]:
    """A dataclass as plain containers."""
    return dataclasses.asdict(record)


def from_json(kind: type[T], value: Any) -> T:
    """A `kind` (dataclass, list, dict, union, or what JSON has) from plain containers.

    Of several dataclasses in a union, the one whose `kind` field has the value's `kind` as its default.

    Raises:
        ValueError: a field without a default is missing, or no dataclass of the union fits.
    """
    return _from_json(kind, value)


def _from_json(kind: Any, value: Any) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of(parts, value)
    if origin is list and isinstance(value, list):
        return [_from_json(parts[0], one) for one in value]
    if origin is dict and isinstance(value, dict):
        return {key: _from_json(parts[1], one) for key, one in value.items()}
    if not (dataclasses.is_dataclass(kind) and isinstance(kind, type)):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    try:
        return kind(**{name: _from_json(hints[name], value[name]) for name in names if name in value})
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from None


def _one_of(kinds: Sequence[Any], value: Any) -> Any:
    """The value as the type of the union that fits."""
    others = [kind for kind in kinds if kind is not type(None)]
    if value is None:
        return None
    if len(others) == 1:
        return _from_json(others[0], value)
    if not isinstance(value, dict):
        return value
    for kind in others:
        if value.get("kind") == _default_kind(kind):
            return _from_json(kind, value)
    raise ValueError(f"unknown kind of record {value.get('kind')!r}")


def _default_kind(kind: Any) -> object:
    return next((field.default for field in dataclasses.fields(kind) if field.name == "kind"), None)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Complete or absent: written beside `path`, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
