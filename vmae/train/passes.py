"""A pass over videos between two steps of a run: one clip of each, through the model as it stands.

All ranks share the videos and compute together. A pass draws no random number, and leaves weights and modes
as they were. What is made of the model's results is said by a subclass of `VideoPass`; when there is a pass,
and which one was the best, by `vmae.train.validation`.

Legend: B clips, T frames, H x W pixels.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vmae.data.channels import RGB, join_clips
from vmae.data.classify_dataset import ClipConfig, MiddleClipDataset
from vmae.data.manifest import VideoEntry
from vmae.data.quarantine import Failure
from vmae.data.shards.entries import ShardError
from vmae.data.workers import WorkerPool, hang_limit
from vmae.errors import InputError
from vmae.train.parallel import Parallel
from vmae.train.signals import STOP_SIGNALS, StopSignals

Record = dict[str, Any]
PREFETCH = 2  # clips that each worker makes ahead


class Stopped(Exception):
    """A signal asked for a stop in the middle of a pass: `args[0]`."""


class Share(Protocol):
    """What a rank found of its share of the videos.

    Attributes:
        failed: (number, failure) of those that could not be decoded.
    """

    failed: list[tuple[int, Failure]]


class Measurement(Protocol):
    """What a run measures between two steps.

    Attributes:
        name: in messages; "s" makes it several.
        prefix: of its keys in the log.
        flags: with what its flags start: "--probe-" for --probe-patience, which ends a run.
        tells_share: whether the log has its share of the time.
        parallel: this rank.
    """

    name: str
    prefix: str
    flags: str
    tells_share: bool
    parallel: Parallel

    @property
    def measure(self) -> str:
        """Key, without the prefix, of what is to grow; percent."""

    @property
    def identity(self) -> str:
        """Of its videos, for the log."""

    def opened(self) -> contextlib.AbstractContextManager[None]:
        """Worker processes for all passes of a run."""

    def score(self, model: nn.Module, stop: StopSignals | None = None) -> tuple[Record, list[Failure]]:
        """What a pass finds, and the videos that could not be decoded; the same on every rank."""

    def describe(self, record: Record, prefix: str) -> str:
        """What a pass found in words; `prefix` of the record's keys."""


class VideoPass:
    """One clip of each video, from its middle, through a model; a subclass says what is computed of them and
    what is noted.

    Args:
        entries: the videos.
        clip: how they are seen.
        parallel: this rank.
        dtype: "float32" or "bfloat16", as in training.
        batch_size: clips of a forward pass on a rank.
        channels: of the clips.
    """

    def __init__(
        self,
        entries: Sequence[VideoEntry],
        clip: ClipConfig,
        *,
        parallel: Parallel,
        dtype: str,
        batch_size: int,
        channels: int = RGB,
    ) -> None:
        self.clip, self.parallel, self.dtype, self.batch_size = clip, parallel, dtype, batch_size
        self.dataset = MiddleClipDataset(entries, clip, channels=channels)
        self._clips: Iterator[Tensor | Failure] | None = None
        self._pool: WorkerPool | None = None

    @abstractmethod
    def compute(self, model: nn.Module, clips: Tensor) -> Tensor:
        """What the model makes of clips [B, ...] on the device; [B, ...]."""

    @abstractmethod
    def note(self, share: Any, videos: list[int], found: Tensor) -> None:
        """Add results of `compute`, float32 [videos, ...] on the device, to what this rank knows."""

    def deal(self, videos: range) -> range:
        """Those of a range of videos that are this rank's."""
        return videos[self.parallel.rank :: self.parallel.world_size]

    def rounds(self, videos: range) -> int:
        """Forward passes over a range of videos, the same on all ranks: sharded models compute together."""
        return -(-len(self.longest(videos)) // self.batch_size)

    def longest(self, videos: range) -> range:
        """The largest share of a range of videos."""
        return videos[:: self.parallel.world_size]

    @contextlib.contextmanager
    def working(self, own: Sequence[int], count: int, *, again: bool = True) -> Iterator[None]:
        """Processes that decode the clips of all passes, in the order of `own`; they are forked once, before
        the run has threads.

        Args:
            count: of processes; 0 decodes in this one.
            again: for each pass; else for the first one only.
        """
        count = min(count, len(own))
        if not count:
            yield
            return
        tasks = itertools.cycle(own) if again else iter(own)
        pool = WorkerPool(self.dataset, tasks, count=count, prefetch=PREFETCH, hang_s=hang_limit())
        self._clips, self._pool = iter(pool), pool
        try:
            yield
        finally:
            self.rest()

    def rest(self) -> None:
        """End the processes, which are not needed any more."""
        if self._pool is not None:
            self._pool.close()
        self._clips = self._pool = None

    def clips_of(self, own: Sequence[int]) -> Iterator[Tensor | Failure]:
        """The clips of the next pass, uint8 [1, T, H, W, 3]."""
        return self._clips if self._clips is not None else (self.dataset[video] for video in own)

    @contextlib.contextmanager
    def testing(self, model: nn.Module) -> Iterator[None]:
        """The bare model in eval mode, in here."""
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            yield
        finally:
            self._release(model)
            for module, training in modes:
                module.training = training

    def look(
        self,
        model: nn.Module,
        share: Share,
        videos: range,
        clips: Iterator[Tensor | Failure],
        stop: StopSignals | None,
    ) -> None:
        """Note what the model makes of a range of videos; all ranks together.

        Args:
            clips: of `clips_of`, as far as the videos before have used it up.

        Raises:
            Stopped: a rank received a signal.
            InputError: a rank's workers keep dying.
        """
        own, step = self.deal(videos), self.batch_size
        for start in range(0, self.rounds(videos) * step, step):
            self._round(model, share, own[start : start + step], clips, stop)

    def _round(
        self,
        model: nn.Module,
        share: Share,
        videos: Sequence[int],
        clips: Iterator[Tensor | Failure],
        stop: StopSignals | None,
    ) -> None:
        """A forward pass of all ranks over their next videos."""
        found, error = self._read(videos, clips, stop)
        received = None if stop is None else stop.received
        flags = [error is not None, *(received == number for number in STOP_SIGNALS)]
        wrong, *asked = self.parallel.exchange(flags).sum(0).tolist()
        signal = next((number for number, count in zip(STOP_SIGNALS, asked) if count), None)
        if signal is not None:
            raise Stopped(signal)
        if wrong:
            raise next(one for one in self.parallel.gather(error) if one)
        failed = [(v, clip) for v, clip in zip(videos, found) if isinstance(clip, Failure)]
        share.failed += failed
        good = {v: clip for v, clip in zip(videos, found) if isinstance(clip, Tensor)}
        if good or self.parallel.sharded:
            self.note(share, list(good), self._forward(model, list(good.values())))

    def _read(
        self, videos: Sequence[int], clips: Iterator[Tensor | Failure], stop: StopSignals | None
    ) -> tuple[list[Tensor | Failure], InputError | None]:
        """The next clips, one for each of `videos`; or what is wrong with this rank's workers."""
        if stop is not None:
            stop.waiting = True
        try:
            return [next(clips) for _ in videos], None
        except InputError as error:
            return [], (ShardError if isinstance(error, ShardError) else InputError)(str(error))
        except RuntimeError as error:
            time.sleep(0.2)  # a signal to the whole process group may reach a worker first
            return [], InputError(str(error))
        finally:
            if stop is not None:
                stop.waiting = False

    @torch.no_grad()
    def _forward(self, model: nn.Module, clips: list[Tensor]) -> Tensor:
        """float32 results of some clips, on the device. All passes have the same shape: the rest of a batch
        is black."""
        shape = (self.clip.num_frames, *self._size, self.dataset.channels)
        joined = join_clips(clips or [torch.zeros(0, *shape, dtype=torch.uint8)])
        batch = joined.new_zeros(self.batch_size, *shape)
        batch[: len(joined)] = joined
        device = self.parallel.device
        if device.type == "cuda":  # for blocks that are replayed as CUDA graphs
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            found = self.compute(model, batch.to(device))
        return found[: len(clips)].float()

    @property
    def _size(self) -> tuple[int, int]:
        size = self.clip.image_size
        return (size, size) if isinstance(size, int) else size

    def _release(self, model: nn.Module) -> None:
        """Let go of weights that a sharded model gathered: the next step, or an average, changes them."""
        if self.parallel.sharded:
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
