"""Batches by NVIDIA DALI: on a GPU, NVDEC decodes, crops and resizes run on the device, and no pixel crosses
the bus.

The samples are those of the CPU's loader: frames, boxes, flips and masks come from the same functions of
(seed, epoch, index); pixels differ by some levels, since another decoder and another resizer make them. What
DALI cannot be trusted with is decoded by the CPU path, so a batch is complete whatever the list holds: frame
folders, codecs that the device has no decoder for, files whose container hides where frames are, and every
batch in which DALI fails.

DALI's CPU operators decode VP8, VP9 and MJPEG only. They are here for tests; PyAV is the decoder of choice on
a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from vmae.data.augment import CropBox
from vmae.data.channels import reading_kind
from vmae.data.dataset import Batch, EpochSampler, PretrainDataset, SampleKey
from vmae.data.inspection import find_hazard
from vmae.data.manifest import VideoEntry
from vmae.data.orientation import UPRIGHT
from vmae.data.quarantine import Quarantine
from vmae.data.video_reader import DecodeError
from vmae.errors import InputError

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.data_node import DataNode

CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
GPU_CODECS = CPU_CODECS | {"h264", "hevc", "av1", "mpeg4"}
MAX_FILE_BYTES = 256 << 20  # files are read whole
MAX_FAILURES = 3  # batches in a row, before any came out


def dali_missing() -> str | None:
    """None where DALI can be used, else why not and what to do."""
    try:
        import nvidia.dali as dali
    except ImportError as error:
        return (
            f"DALI is not installed ({error}): `pip install nvidia-dali-cuda130` (200 MB; "
            "nvidia-dali-cuda120 for CUDA 12)"
        )
    except Exception as error:  # OSError of a shared library
        return f"DALI does not load: {(str(error).splitlines() or ['unknown reason'])[0]}"
    if not hasattr(dali.fn.decoders, "video"):
        return (
            f"DALI {dali.__version__} cannot decode frames of choice: "
            "`pip install 'nvidia-dali-cuda130>=2.4'`"
        )
    return None


@dataclass(frozen=True)
class _Plan:
    """What DALI is to make of one sample.

    Attributes:
        data: uint8 [bytes], the file.
        frames: int32 [T].
        crops: S of them.
    """

    path: str
    data: np.ndarray
    frames: np.ndarray
    crops: list[tuple[CropBox, bool]]


@dataclass
class _Step:
    """One batch on its way: its samples, and the plans of those that DALI is at work on."""

    keys: list[SampleKey]
    plans: list[_Plan | None]


class DaliLoader:
    """Iterator over `Batch`, as `PretrainLoader` is; clips are on `device`, masks on the CPU. Made by
    `build_loader`.

    Args:
        dataset: defines the samples, and decodes what DALI does not.
        sampler: gives the samples of each step.
        quarantine: counts what failed.
        device: "cuda", or "cpu" for DALI's CPU operators.
        num_threads: threads that inspect the videos, and as many for DALI.

    Raises:
        InputError: DALI fails from the first batch on; else as `PretrainLoader`.
    """

    def __init__(
        self,
        dataset: PretrainDataset,
        sampler: EpochSampler,
        quarantine: Quarantine,
        *,
        device: torch.device | str,
        num_threads: int = 1,
    ) -> None:
        self.dataset, self.sampler, self.quarantine = dataset, sampler, quarantine
        self.device, self._threads = torch.device(device), num_threads
        self._codecs = GPU_CODECS if self.device.type == "cuda" else CPU_CODECS
        self._steps = iter(sampler)
        self._pool = ThreadPoolExecutor(num_threads, "dali")
        self._look = functools.lru_cache(1 << 20)(self._look_into)
        self._pipeline: Pipeline | None = None
        self._avoided: set[str] = set()
        self._failures: int | None = 0  # None once a batch came out
        self._next = self._begin()

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def __iter__(self) -> DaliLoader:
        return self

    def __next__(self) -> Batch:
        if self._next is None:
            raise StopIteration
        step, clips = self._next, self._take(self._next)
        self._next = self._begin()  # DALI is at work on it while this batch is computed on
        try:
            batch = self._assemble(step, clips)
            self.quarantine.add(len(batch.ids), batch.replaced)
        except InputError:
            self.close()
            raise
        return batch.pin_memory() if self.device.type == "cuda" else batch  # the masks; clips are there

    # --- what DALI is asked for ---

    def _begin(self) -> _Step | None:
        """Read the files of the next step and set DALI to work; None at the end."""
        keys = next(self._steps, None)
        if keys is None:
            return None
        step = _Step(keys, list(self._pool.map(self._plan, keys)))
        plans = [plan for plan in step.plans if plan is not None]
        if plans:
            if self._pipeline is None:
                self._pipeline = self._build_pipeline()
            self._feed(self._pipeline, plans)
            self._pipeline.schedule_run()
        return step

    def _plan(self, key: SampleKey) -> _Plan | None:
        """None for what the CPU path has to decode."""
        entry = self.dataset.entries[self.dataset.pick_video(*key)[0]]
        if reading_kind(entry) != "video" or entry.path in self._avoided:
            return None
        found = self._look(entry.path)
        if found is None or found[0] < self.dataset.min_frames:
            return None
        total, fps, (width, height) = found
        try:
            data = np.fromfile(entry.path, np.uint8)
        except OSError:
            return None
        frames = self.dataset.pick_frames(entry, total, fps, *key).astype(np.int32)
        return _Plan(entry.path, data, frames, self.dataset.pick_crops(width, height, *key))

    def _look_into(self, path: str) -> tuple[int, float | None, tuple[int, int]] | None:
        """Frames, frames a second, and size of a video; None where DALI cannot be trusted with it."""
        try:
            if os.path.getsize(path) > MAX_FILE_BYTES:
                return None
            hazard, found = find_hazard(VideoEntry(path))
            plain = (
                found.pixels == "yuv420p"
                and found.orientation == UPRIGHT
                and found.streams == 1
                and not found.open_gop
            )
            known = found.codec in self._codecs and hazard is None and plain
            return (found.frames, found.fps, found.size) if known else None
        except (DecodeError, OSError):
            return None  # the CPU path finds the reason, and another video

    @staticmethod
    def _feed(pipeline: Pipeline, plans: Sequence[_Plan]) -> None:
        feed = pipeline.feed_input
        feed("encoded", [plan.data for plan in plans])
        feed("frames", [plan.frames for plan in plans])
        for number, crops in enumerate(zip(*(plan.crops for plan in plans), strict=True)):
            feed(f"start{number}", [np.array([box.top, box.left], np.int32) for box, _ in crops])
            feed(f"shape{number}", [np.array([box.height, box.width], np.int32) for box, _ in crops])
            feed(f"flip{number}", [np.array(flip, np.int32) for _, flip in crops])

    def _build_pipeline(self) -> Pipeline:
        """Encoded videos, frames and boxes in; uint8 [S, T, height, width, 3] for each video out."""
        from nvidia.dali import Pipeline, fn, types

        gpu = self.device.type == "cuda"
        index = self.device.index if gpu else None
        if gpu and index is None:
            index = torch.cuda.current_device()
        height, width = self.dataset.image_size
        pipeline = Pipeline(
            batch_size=self.sampler.batch_size,
            num_threads=self._threads,
            device_id=index,
            prefetch_queue_depth=1,
            exec_dynamic=True,  # what it gives lives as long as its reader needs it
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.DALIDataType.INT32, ndim=1)
            # Without `pad_mode`, frames that it does not find would be black, without an error.
            video = fn.decoders.video(
                encoded, device="mixed" if gpu else "cpu", frames=frames, pad_mode="none"
            )
            clips = []
            for number in range(self.dataset.num_sample):
                start, shape = (
                    fn.external_source(name=f"{part}{number}", dtype=types.DALIDataType.INT32, ndim=1)
                    for part in ("start", "shape")
                )
                flip = fn.external_source(name=f"flip{number}", dtype=types.DALIDataType.INT32, ndim=0)
                cut = fn.slice(video, start=start, shape=shape, axis_names="HW")
                linear = types.DALIInterpType.INTERP_LINEAR
                clip = fn.resize(cut, resize_x=width, resize_y=height, interp_type=linear, antialias=True)
                clips.append(fn.flip(cast("DataNode", clip), horizontal=flip))
            pipeline.set_outputs(fn.stack(*clips))
        pipeline.build()
        return pipeline

    # --- what it gives ---

    def _take(self, step: _Step) -> Tensor | None:
        """uint8 [n, S, T, H, W, 3] of the n samples that DALI had, without a copy; None where it had none, or
        failed."""
        if self._pipeline is None or not any(step.plans):
            return None
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
        try:
            clips = torch.from_dlpack(self._pipeline.share_outputs(cuda_stream=stream)[0].as_tensor())
            self._pipeline.release_outputs()
        except Exception as error:  # RuntimeError and more; the pipeline is of no further use
            self._give_up(step, error)
            return None
        self._failures = None
        return clips

    def _give_up(self, step: _Step, error: Exception) -> None:
        reason = " ".join(str(error).split())[:300]
        if self._failures is not None:
            self._failures += 1
            if self._failures == MAX_FAILURES:
                self.close()
                raise InputError(
                    f"DALI decodes nothing on {self.device}: {reason}; take the CPU's loader instead"
                )
        paths = [plan.path for plan in step.plans if plan is not None]
        self._avoided.update(paths)
        self._pipeline = None
        names = ", ".join(sorted({Path(path).name for path in paths})[:3])
        warnings.warn(
            f"DALI failed in a batch of {len(paths)} videos ({names}, ...), which the CPU decodes from now "
            f"on: {reason}",
            stacklevel=4,
        )

    def _assemble(self, step: _Step, clips: Tensor | None) -> Batch:
        """The whole batch in its order, with what the CPU has to add."""
        made = iter(clips if clips is not None else ())
        samples = []
        for key, plan in zip(step.keys, step.plans, strict=True):
            if plan is None or clips is None:
                sample = self.dataset[key]
                samples.append(dataclasses.replace(sample, clips=sample.clips.to(self.device)))
            else:
                samples.append(Batch(next(made), self.dataset.sample_mask(*key), [(*key, plan.path)]))
        if clips is not None and len(clips) == len(samples):
            whole = Batch.cat([Batch(sample.clips[:0], sample.mask, sample.ids) for sample in samples])
            return Batch(clips.flatten(0, 1), whole.mask, whole.ids)
        return Batch.cat(samples)

    def close(self) -> None:
        """Let go of the device; iteration is over."""
        self._next = self._pipeline = None
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> DaliLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
