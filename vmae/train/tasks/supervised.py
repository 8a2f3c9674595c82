"""What the supervised tasks share: an encoder that starts from a checkpoint, and learning rates by layer."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vmae.checkpoint.classifier import Start
from vmae.checkpoint.folder import find_weights
from vmae.checkpoint.published import read_settings_and_weights
from vmae.checkpoint.source import source_config
from vmae.config import ModelConfig
from vmae.model.cost import classifier_macs
from vmae.train.layer_decay import build_layer_adamw
from vmae.train.optim import OptimConfig
from vmae.train.task import BatchT, ModelTask, ModelTaskConfig


class SupervisedConfig(ModelTaskConfig, Protocol):
    """Settings of a task that puts a head on an encoder."""

    @property
    def num_classes(self) -> int: ...
    @property
    def layer_decay(self) -> float: ...


SupervisedConfigT = TypeVar("SupervisedConfigT", bound=SupervisedConfig)


@dataclass
class Source:
    """The checkpoint that a run starts from, read once.

    Attributes:
        path: of the checkpoint.
        settings: what the file says of itself.
        state: its tensors.
        model: what it is of.
        note: what was assumed of a file that does not say it, in a line.
    """

    path: Path
    settings: dict[str, Any]
    state: dict[str, Tensor]
    model: ModelConfig
    note: str = ""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Of its positions."""
        return self.model.pos_grid or self.model.grid

    def describe(self, report: Start) -> str:
        """What became of the tensors, and `note`."""
        return "\n".join(filter(None, (report.describe(self.path), self.note)))

    def fit(self, model: ModelConfig) -> ModelConfig:
        """`model` with positions of the checkpoint's kind; fixed ones are made for its grid, then
        interpolated."""
        model = model.replace(learned_pos=self.model.learned_pos)
        if model.learned_pos or self.grid == model.grid:
            return model
        return model.replace(pos_grid=self.grid)


def read_source(
    checkpoint: str, preset: str = "vit_b", frames: int | None = None, size: int | None = None
) -> Source:
    """The checkpoint that `--init` names.

    Args:
        preset, frames, size: of its model and clips, for a file that does not say; see `source_config`.

    Raises:
        InputError: it can't be read, or contradicts what is given.
    """
    path = find_weights(checkpoint)
    settings, state = read_settings_and_weights(path)
    return Source(path, settings, state, *source_config(settings, state, path, preset, frames, size))


def source_from_args(args: argparse.Namespace) -> Source | None:
    """`read_source` of a command line; None without `--init`."""
    if args.init is None:
        return None
    return read_source(args.init, args.model or "vit_b", args.init_frames, args.init_size)


class SupervisedTask(ModelTask[SupervisedConfigT, BatchT]):
    """A head on an encoder, both trained; the encoder starts from a checkpoint, if the settings name one.

    Args:
        source: what `config.init` names, where the caller has read it.
    """

    def __init__(self, config: SupervisedConfigT, source: Source | None = None) -> None:
        super().__init__(config)
        self.source = source

    def check(self) -> list[str]:
        if self.source is None and self.config.init is not None:
            self.source = read_source(self.config.init)
        if self.source is not None:
            self.config = self.adapt(self.source)
        return super().check()

    def adapt(self, source: Source) -> SupervisedConfigT:
        """The settings, with what follows from the checkpoint."""
        return dataclasses.replace(self.config, model=source.fit(self.config.model))

    def start(self) -> str:
        source, self.source = self.source, None  # its tensors are not needed any more
        assert source is not None  # `check` came before
        return source.describe(self.load(source))

    def load(self, source: Source) -> Start:
        """Load the checkpoint into `model`; raises InputError where it does not fit."""
        raise NotImplementedError(f"{type(self).__name__} has no `load` for config.init")

    def blocks(self) -> Sequence[nn.Module]:
        blocks = self.model.blocks
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks)

    def build_optimizer(self, optim: OptimConfig) -> torch.optim.Optimizer:
        return build_layer_adamw(self.model, optim, self.config.model.depth, self.config.layer_decay)

    def flops_per_clip(self) -> float:
        return 6.0 * classifier_macs(self.config.model, self.config.num_classes)

    def describe_rates(self, optim: OptimConfig) -> str:
        return f"{super().describe_rates(optim)}, layer decay {self.config.layer_decay:g}"
