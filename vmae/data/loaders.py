"""Micro-batches of a data set: made by worker processes, or by DALI."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vmae.data.dali import DaliLoader, dali_missing
from vmae.data.dataset import Batch, EpochSampler, PretrainDataset
from vmae.data.entry_table import as_entries
from vmae.data.manifest import VideoEntry
from vmae.data.quarantine import Quarantine
from vmae.data.shape_sampler import ShapeSampler
from vmae.data.shards.entries import ShardError
from vmae.data.shards.facts import indexes_in
from vmae.data.shared_memory import PREFETCH
from vmae.data.video_dataset import SampleKey, VideoDataset
from vmae.data.workers import WorkerPool, hang_limit
from vmae.errors import InputError

LOADERS = ("cpu", "dali")


class _BatchSource:
    """Makes whole batches in a worker, and hands an `InputError` over as a value: a raised one would reach
    the main process as a traceback of the worker, and the user would not find the message."""

    def __init__(self, dataset: VideoDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, keys: list[SampleKey]) -> Batch | InputError:
        try:
            samples = [self.dataset[key] for key in keys]
            return type(samples[0]).cat(samples)
        except ShardError as error:
            return ShardError(str(error))
        except InputError as error:
            return InputError(str(error))

    def ahead(self, keys: list[SampleKey]) -> None:
        self.dataset.ask_ahead(keys)

    def block(self, video: int, reason: str) -> None:
        self.dataset.block(video, reason)

    def set_watch(self, watch: Callable[[int], None]) -> None:
        self.dataset.watch = watch


class PretrainLoader:
    """Iterator over `Batch`, one for each step from `start_step` on. Made by `build_loader`.

    Attributes:
        sampler: gives the samples of each step.
        quarantine: videos that failed so far.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        sampler: EpochSampler,
        quarantine: Quarantine,
        *,
        num_workers: int,
        pin_memory: bool,
        prefetch: int,
        hang_s: float,
    ) -> None:
        self.dataset, self.sampler, self.quarantine = dataset, sampler, quarantine
        self._pin = pin_memory and torch.cuda.is_available()
        source = _BatchSource(dataset)
        self._iterator: WorkerPool | Generator[Batch | InputError, None, None] | None
        if num_workers:  # they live as long as the run: the iterator spans all epochs
            self._iterator = WorkerPool(
                source, iter(sampler), count=num_workers, prefetch=prefetch, hang_s=hang_s
            )
        else:
            self._iterator = (source[keys] for keys in sampler)

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def __iter__(self) -> PretrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        batch = next(self._iterator)
        try:
            if isinstance(batch, InputError):
                raise batch
            self.quarantine.add(len(batch.ids), batch.replaced)
        except InputError:
            self.close()
            raise
        return batch.pin_memory() if self._pin else batch

    @property
    def store_s(self) -> float:
        """Seconds that the workers have waited for object stores so far, together."""
        return self._iterator.waited_s if isinstance(self._iterator, WorkerPool) else 0.0

    def interrupt(self) -> None:
        """End iteration soon, also where another thread waits for a batch."""
        if isinstance(self._iterator, WorkerPool):
            self._iterator.interrupt()

    def close(self) -> None:
        """End the workers; iteration is over."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def __enter__(self) -> PretrainLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def open_batches(
    dataset: VideoDataset, keys: Sequence[list[SampleKey]], *, num_workers: int, prefetch: int = PREFETCH
) -> Generator[Iterator[Any], None, None]:
    """Batches of given samples, in order; each raises InputError where no video can be read.

    Args:
        keys: (epoch, index) of the samples of each batch.
        num_workers: processes that decode; 0 decodes in this one.
    """
    source = _BatchSource(dataset)
    pool = None
    if num_workers:
        pool = WorkerPool(source, iter(keys), count=num_workers, prefetch=prefetch, hang_s=hang_limit())
    try:
        yield map(_raised, pool or (source[part] for part in keys))
    finally:
        if pool is not None:
            pool.close()


def _raised(batch: Any) -> Any:
    if isinstance(batch, InputError):
        raise batch
    return batch


def check_loader(name: str, entries: Sequence[VideoEntry] = ()) -> None:
    """See that a loader can be had, for these videos.

    Raises:
        InputError: an unknown name, or DALI is not installed, or would have to read shards.
    """
    if name not in LOADERS:
        raise InputError(f"unknown loader {name!r}; known: {', '.join(LOADERS)}")
    if name == "dali":
        if lack := dali_missing():
            raise InputError(lack)
        if indexes_in(entries):
            raise InputError("DALI reads files, not shards: take --loader cpu with an index")


def check_shapes(loader: str, dataset: PretrainDataset) -> None:
    """Raises InputError where a loader cannot make the clips of a mix's sources."""
    if loader == "dali" and dataset.shapes != [dataset.usual_shape]:
        raise InputError(
            f"DALI makes clips of {dataset.usual_shape}, and the mix has clips of "
            f"{', '.join(map(str, dataset.shapes))}: take --loader cpu"
        )


def _warn_of_repeats(dataset: VideoDataset, sampler: EpochSampler) -> None:
    if sampler.fills_up:
        times = -(-sampler.global_batch_size * dataset.repeat // sampler.fewest)
        of_one = " of one shape" if isinstance(sampler, ShapeSampler) else ""
        warnings.warn(
            f"{sampler.fewest} samples{of_one} an epoch are fewer than a batch of "
            f"{sampler.global_batch_size}: a video comes up to {times} times in a batch, with other frames "
            "and crops",
            stacklevel=3,
        )


def build_loader(
    dataset: VideoDataset,
    *,
    batch_size: int,
    num_workers: int = 0,
    start_step: int = 0,
    total_steps: int | None = None,
    epochs: int | None = None,
    pin_memory: bool = False,
    prefetch: int = PREFETCH,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    quarantine: str | Path | None = None,
    max_bad_share: float = 0.05,
    hang_s: float | None = None,
    loader: str = "cpu",
    device: torch.device | str = "cpu",
) -> PretrainLoader | DaliLoader:
    """Micro-batches from step `start_step` up to `total_steps` (or `epochs`; without both, for ever).

    Step k's batch is the same whatever the number of workers and wherever iteration started. A list of fewer
    samples than a batch is repeated with other frames and crops, with one warning.

    Args:
        batch_size: B, videos of a micro-batch on this rank; it has B * num_sample clips.
        num_workers: processes that decode; 0 decodes in this one, where a video that hangs or crashes takes
            it along.
        pin_memory: page-locked batches, for copies to a GPU beside its work; ignored where there is none.
        prefetch: batches that each worker makes ahead.
        rank, world_size, accumulate: see `EpochSampler`.
        quarantine: file for the bad videos, one JSON line each; with many ranks, rank 3 writes NAME-3.jsonl.
        max_bad_share: share of the list's videos that may be bad, see `Quarantine`; each rank judges what it
            read itself.
        hang_s: seconds that a video may take in a worker, before the worker is replaced and the video counts
            as bad; None means `vmae.data.workers.hang_limit()`.
        loader: "cpu", or "dali" (see `vmae.data.dali`; `num_workers` are its threads).
        device: device on which DALI decodes; the CPU's loader ignores it.

    Raises:
        InputError: a number out of range, both `total_steps` and `epochs`, a loader that is unknown or not
            installed. While iterating: no video decodes, or too many do not.
    """
    if num_workers < 0 or prefetch < 1:
        raise InputError(
            f"num_workers ({num_workers}) must be at least 0 and prefetch ({prefetch}) at least 1"
        )
    check_loader(loader)
    hang_s = hang_limit() if hang_s is None else hang_s
    if hang_s <= 0:
        raise InputError(f"hang_s must be above 0, not {hang_s}")
    if quarantine is not None and rank:
        quarantine = Path(quarantine).with_stem(f"{Path(quarantine).stem}-{rank}")
    if total_steps is not None and epochs is not None:
        raise InputError("give total_steps or epochs, not both")
    of_size: Callable[..., EpochSampler] = EpochSampler
    if isinstance(dataset, PretrainDataset) and len(dataset.shapes) > 1:
        of_size = functools.partial(ShapeSampler, dataset.groups)
    sampler = of_size(
        len(dataset),
        batch_size,
        seed=dataset.seed,
        rank=rank,
        world_size=world_size,
        accumulate=accumulate,
        start_step=start_step,
        total_steps=total_steps,
    )
    if epochs is not None:
        sampler.total_steps = epochs * sampler.steps_per_epoch
    _warn_of_repeats(dataset, sampler)
    bad = Quarantine(quarantine, max_bad_share, as_entries(dataset.entries).count_paths())
    if loader == "dali":
        if not isinstance(dataset, PretrainDataset):
            raise TypeError("DALI decodes for a PretrainDataset only")
        check_loader(loader, dataset.entries)
        check_shapes(loader, dataset)
        return DaliLoader(dataset, sampler, bad, device=device, num_threads=max(num_workers, 1))
    return PretrainLoader(
        dataset,
        sampler,
        bad,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch=prefetch,
        hang_s=hang_s,
    )
