"""What a kind of training is made of: the data, the model, its start, the loss, and the words of its report.

Everything else is the same for all kinds, and stands once: checks, schedule, resuming, the output folder
(`vmae.train.prepare`), ranks, the loop, checkpoints, signals and export (`vmae.train.run`).
"""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vmae.checkpoint.folder import WEIGHTS_NAME
from vmae.config import ModelConfig
from vmae.data.shared_memory import check_shared_memory
from vmae.data.video_dataset import VideoDataset
from vmae.train.checks import check_backend, check_channels, check_speed
from vmae.train.optim import OptimConfig, build_optimizer
from vmae.train.parallel import Parallel
from vmae.train.pretrain_settings import RunConfig, local_ranks
from vmae.train.state import Companion
from vmae.train.step import TrainingBatch
from vmae.train.validation import Validation


class TaskConfig(Protocol):
    """What the settings of every task have: a frozen dataclass of what decides the weights that come out."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def optim(self) -> OptimConfig: ...
    @property
    def effective_batch(self) -> int | None: ...
    @property
    def num_sample(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def warmup_steps(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def init(self) -> str | None: ...
    def to_dict(self) -> dict[str, Any]: ...


class ModelTaskConfig(TaskConfig, Protocol):
    """Settings of a task that trains one of `vmae.model`."""

    @property
    def model(self) -> ModelConfig: ...


ConfigT = TypeVar("ConfigT", bound=TaskConfig)
ModelConfigT = TypeVar("ModelConfigT", bound=ModelTaskConfig)
BatchT = TypeVar("BatchT", bound=TrainingBatch)


class Task(abc.ABC, Generic[ConfigT, BatchT]):
    """One run's kind of training. A subclass says what is its own; what is abstract here must be given.

    The methods are called in the order in which they stand, on every rank; up to `start`, nothing may be
    written. All random numbers of `build_model` and `compute_loss` come from torch, which is seeded.

    Attributes:
        config: what decides the result; `prepare` fills in its batch and its lengths.
        run: where and how; set before `check`.
        parallel: this process among those of the run; set before `check`.
        dataset: of `read_data`; set before `build_model`.
        model: of `build_model`, without the wrapper of several ranks; set before `start`.
    """

    unit = "videos"  # what `config.effective_batch` counts
    weights_name = WEIGHTS_NAME  # of the file that a complete run leaves
    scales_rates = True  # whether `config.optim` has the learning rates of 256 samples a step
    loader = "cpu"  # who makes the batches, see `vmae.data.build_loader`
    validates = False  # whether `build_validation` gives something

    run: RunConfig
    parallel: Parallel
    dataset: VideoDataset
    model: nn.Module

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    # --- Before anything is written; each raises InputError for what a person can mend ---

    def check(self) -> list[str]:
        """Check what needs no data; returns lines for the user. May complete `config`."""
        return []

    @abc.abstractmethod
    def read_data(self) -> tuple[VideoDataset, list[str]]:
        """The samples, and lines for the user on what is wrong with the data. May complete `config`."""

    @property
    @abc.abstractmethod
    def list_file(self) -> str:
        """What the samples were read from, for messages."""

    @property
    def list_root(self) -> str:
        """Folder that relative paths of the list start from; it may move between two starts of a run."""
        if os.path.isdir(self.list_file):
            return self.list_file
        return os.path.dirname(self.list_file)

    def scaled_optim(self, batch: int) -> OptimConfig:
        """The optimizer's settings at an effective batch."""
        if self.scales_rates:
            return self.config.optim.scaled_to(batch)
        return self.config.optim

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """The model, on the CPU, with fresh weights."""

    def start(self) -> str:
        """Load what `config.init` names into `model`; a line on what was loaded. Not called on a resume."""
        raise NotImplementedError(f"{type(self).__name__} has no start for config.init")

    # --- Training ---

    def blocks(self) -> Sequence[nn.Module]:
        """Parts of `model` to compile, checkpoint and shard one at a time, in the order in which they run."""
        return ()

    def block_tokens(self) -> Sequence[int]:
        """Tokens of a clip in each of `blocks`; none where that is not known."""
        return ()

    def bytes_beside(self) -> int:
        """Of what each rank holds on its device throughout, beside model, gradients and optimizer."""
        return 0

    def build_optimizer(self, optim: OptimConfig) -> torch.optim.Optimizer:
        """The optimizer of `model`, which is sharded already."""
        return build_optimizer(self.model, optim)

    def companions(self) -> dict[str, Companion]:
        """What checkpoints hold beside model and optimizer, by name."""
        return {}

    def flops_per_clip(self) -> float | None:
        """Of forward and backward, for the utilisation in the logs."""
        return None

    def weigh(self, batch: BatchT) -> float:
        """Weight of a micro-batch's loss beside the others of its step, about 1: the number of elements that
        the loss is a mean over, divided by the usual number."""
        return 1.0

    def on_first_batch(self, batch: BatchT) -> None:
        """Called with the first micro-batch of this start, on the device."""

    @abc.abstractmethod
    def compute_loss(self, model: nn.Module, batch: BatchT) -> Tensor:
        """float32 scalar, a mean over what the micro-batch counts.

        Args:
            model: `self.model`, in the wrapper of several ranks: call this one.
            batch: on the device.
        """

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, with the number of steps done."""

    def build_validation(self, model: nn.Module, steps_per_epoch: int) -> Validation | None:
        """What tests the model while it trains; None where nothing does.

        Args:
            model: `self.model`, in the wrapper of several ranks.
        """
        return None

    @property
    def averaged(self) -> bool:
        """Whether the companion "ema" holds an average of the weights, to export too."""
        return False

    @property
    def shape_count(self) -> int:
        """How many shapes the clips of its steps have."""
        return 1

    # --- Words ---

    def describe_model(self) -> str:
        """What follows the number of parameters at the start of a run."""
        return ""

    def describe_data(self) -> list[str]:
        """The data in a few words, then lines on its parts."""
        return [f"{len(self.dataset.entries)} {self.unit}"]

    def describe_rates(self, optim: OptimConfig) -> str:
        """The learning rates, in words. `optim`: of `scaled_optim`."""
        product = f"{self.config.optim.lr:g} x {self.config.effective_batch} / 256 = "
        peak = f"{product if self.scales_rates else ''}{optim.lr:.3g}"
        decay, last = optim.weight_decay, optim.weight_decay_end
        moves = "" if last is None else f", weight decay {decay:g} at the start, {last:g} at the end"
        return f"learning rate {peak} at its peak, {optim.min_lr:.3g} at the end{moves}"

    def describe_loss(self) -> str:
        """What to compare the final loss with; follows it in its line."""
        return ""

    def describe_more(self) -> dict[str, Any]:
        """What `--dry-run` and `run.json` tell beside the settings, in plain containers."""
        return {}

    def closing(self) -> list[str]:
        """Last lines of a complete run: what to do next."""
        return []


class ModelTask(Task[ModelConfigT, BatchT]):
    """A task that trains one of `vmae.model`: its settings have a `ModelConfig`, as `config.model`."""

    def check(self) -> list[str]:
        check_channels(self.config.model, self.run.speed.backend)
        check_backend(self.run.speed.backend, self.parallel.device)
        use = (self.config.model, self.config.dtype, self.parallel.device)
        check_speed(self.run.speed, *use, dropout=self.drops_attention)
        if self.loader == "cpu":
            check_shared_memory(self.batch_bytes(), self.run.speed.num_workers, local_ranks())
        return super().check()

    @property
    def drops_attention(self) -> bool:
        """Whether attention has dropout."""
        return False

    def batch_bytes(self) -> int:
        """The most that a micro-batch's clips take."""
        return self.run.batch_size * self.config.num_sample * self.config.model.most_clip_bytes

    def describe_model(self) -> str:
        model = self.config.model
        height, width = model.image_hw
        return f", clips {model.num_frames} x {height} x {width}, {model.num_tokens} tokens"
