"""What every result has: its environment, and the tables that show it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from harness.environment import Environment, with_gpu_after
from harness.json_records import SCHEMA, to_json, write_json
from harness.table import Table


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result file; each kind adds `records` and more.

    Attributes:
        title: of its part of the report.
    """

    title: ClassVar[str]

    environment: Environment
    records: list[Any]
    schema: str = SCHEMA

    def tables(self) -> list[Table]:
        """Tables of terminal, README (the first) and report."""
        raise NotImplementedError

    @property
    def conditions(self) -> str:
        return self.environment.conditions

    def write(self, path: str | Path) -> None:
        """Complete or absent; with the state of the GPU, where one was measured on."""
        write_json(path, to_json(replace(self, environment=with_gpu_after(self.environment))))


_OverSeeds = TypeVar("_OverSeeds", bound="OverSeeds")


@dataclass(frozen=True, kw_only=True)
class OverSeeds:
    """Over the seeds: their values, mean, standard deviation, and the standard error of the mean."""

    mean: float
    std: float
    error: float
    values: list[float]

    @classmethod
    def of(cls: type[_OverSeeds], values: list[float], **more: Any) -> _OverSeeds:
        """Of these values; `more`: the other fields of a subclass."""
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        error = std / len(values) ** 0.5
        return cls(mean=statistics.mean(values), std=std, error=error, values=values, **more)


@dataclass(frozen=True, kw_only=True)
class MiniatureResult(Result):
    """Of whole trainings on moving shapes: settings of the runs, of `about` in experiments/tiny_world.py."""

    scale: dict[str, Any]
    pretrain: list[str]
    finetune: list[str]
    lr: list[float]
