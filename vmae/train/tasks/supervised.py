"""What the supervised tasks share: an encoder that starts from a checkpoint, and learning rates by layer."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import nn

from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.hub import cached
from vmae.checkpoint.hub_names import is_hub_name
from vmae.checkpoint.shapes import ARCHITECTURE
from vmae.checkpoint.source import Source, read_checkpoint
from vmae.checkpoint.start import Start
from vmae.config import USUAL_MODEL, ModelConfig
from vmae.flags import chosen
from vmae.model.cost import classifier_macs
from vmae.train.layer_decay import build_layer_optimizer
from vmae.train.optim import OptimConfig
from vmae.train.pretrain_settings import RunConfig, model_from_args
from vmae.train.task import BatchT, ModelTask, ModelTaskConfig


class SupervisedConfig(ModelTaskConfig, Protocol):
    """Settings of a task that puts a head on an encoder."""

    @property
    def num_classes(self) -> int: ...
    @property
    def layer_decay(self) -> float: ...
    @property
    def drop_rate(self) -> float: ...
    @property
    def attn_drop_rate(self) -> float: ...


SupervisedConfigT = TypeVar("SupervisedConfigT", bound=SupervisedConfig)


def source_from_args(args: argparse.Namespace) -> Source | None:
    """The checkpoint that a command line names; None without `--init`."""
    args.settings.complete(args)
    if args.init is None:
        return None
    given = {name: value for name, value in chosen(ModelConfig, args).items() if name in ARCHITECTURE}
    checkpoint = settled(args.init, args)
    source = read_checkpoint(
        checkpoint, preset=args.model, frames=args.init_frames, size=args.init_size, **given
    )
    if source.known is None and not source.unknown and args.model is None and given:
        # Shapes of no preset, said by flags: on top of the usual one.
        frames, size = args.init_frames, args.init_size
        return read_checkpoint(checkpoint, preset=USUAL_MODEL, frames=frames, size=size, **given)
    return source


def model_for(args: argparse.Namespace, source: Source | None) -> ModelConfig:
    """The architecture of a command line and the checkpoint that it names; see `model_from_args`."""
    if source is None:
        return model_from_args(args)
    return model_from_args(args, source.settings.get("model"), shown=source.shown)


def settled(checkpoint: str, run: argparse.Namespace | RunConfig) -> str:
    """For a run that goes on: the cached copy of what a name of the hub meant when it began, where there is
    one. The hub is not asked, and what came to the repository since does not count."""
    goes_on = run.resume is not None and CheckpointFolder(run.output).latest() is not None
    if not (goes_on and is_hub_name(checkpoint)):
        return checkpoint
    return str(cached(checkpoint) or checkpoint)


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
            own = {name: getattr(self.config.model, name) for name in ARCHITECTURE}
            self.source = read_checkpoint(self.config.init, preset=USUAL_MODEL, **own)
        if self.source is not None:
            self.config = self.adapt(self.source)
        return super().check()

    @property
    def drops_attention(self) -> bool:
        return self.config.attn_drop_rate > 0

    def adapt(self, source: Source) -> SupervisedConfigT:
        """The settings, with what follows from the checkpoint."""
        return dataclasses.replace(self.config, model=source.fit(self.config.model))

    def start(self) -> str:
        source, self.source = self.source, None  # its tensors are not needed any more
        assert source is not None  # `check` came before
        return source.describe(self.load(source).describe(source.path))

    def load(self, source: Source) -> Start:
        """Load the checkpoint into `model`; raises InputError where it does not fit."""
        raise NotImplementedError(f"{type(self).__name__} has no `load` for config.init")

    def blocks(self) -> Sequence[nn.Module]:
        blocks = self.model.blocks
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks)

    def block_tokens(self) -> Sequence[int]:
        return [self.config.model.num_tokens] * self.config.model.depth

    def build_optimizer(self, optim: OptimConfig) -> torch.optim.Optimizer:
        return build_layer_optimizer(self.model, optim, self.config.model.depth, self.config.layer_decay)

    def flops_per_clip(self) -> float:
        return 6.0 * classifier_macs(self.config.model, self.config.num_classes)

    def describe_rates(self, optim: OptimConfig) -> str:
        return f"{super().describe_rates(optim)}, layer decay {self.config.layer_decay:g}"
