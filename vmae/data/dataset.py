"""Clips and masks for pre-training, the same on every machine: a sample is a pure function of (seed, epoch,
index).

Legend: B videos of a batch, S crops of one decode (`num_sample`), T frames, H x W pixels.

Every random number comes from a generator of its own, keyed by (seed, epoch, index, attempt, purpose). So a
run can stop at any step and go on, with another number of workers or ranks, and sees the same samples (with
the same versions of numpy and torch, whose generators may change between versions).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vmae.config import MaskConfig
from vmae.data.augment import (
    CROPS,
    CropBox,
    bounding_box,
    center_crop,
    crop_and_resize,
    image_hw,
    sample_crop,
)
from vmae.data.batches import pinned
from vmae.data.channels import RGB, join_clips
from vmae.data.decode import open_video
from vmae.data.guarded import guarded_each
from vmae.data.manifest import VideoEntry
from vmae.data.mix import Mix
from vmae.data.quarantine import Failure, list_failures
from vmae.data.sampling import (
    SAMPLINGS,
    clip_starts,
    permutation,
    sample_exact_indices,
    sample_frame_indices,
)
from vmae.data.shapes import ClipShape, grid_of, source_shapes
from vmae.data.shards.facts import check_all_frames, check_strides
from vmae.data.video_dataset import Purpose, SampleKey, VideoDataset, numpy_rng, seed_sequence
from vmae.data.workers import hang_limit
from vmae.errors import InputError
from vmae.masking import DualMask


@dataclass
class Batch:
    """What one training step reads.

    Attributes:
        clips: uint8 [B*S, T, H, W, 3], RGB; the S crops of a video stand together. Of other channels uint8,
            uint16 or float32 [B*S, T, H, W, C].
        mask: DualMask of B*S clips.
        ids: (epoch, index, path) of each of the B videos; `path` is the one that was decoded.
        replaced: (path, error, library) of each video that could not be decoded, and that another one stands
            in for.
        counted: sum of the mask's weights: tokens that the loss counts, known without asking a GPU.
        values: [B*S, Nk, C], what the tokens `mask.target` are compared with, where that is stored.
    """

    clips: Tensor
    mask: DualMask
    ids: list[tuple[int, int, str]]
    replaced: list[Failure] = field(default_factory=list)
    counted: float | None = None
    values: Tensor | None = None

    def __post_init__(self) -> None:
        if self.counted is None:
            self.counted = float(self.mask.weight.sum())

    @classmethod
    def cat(cls, batches: list[Batch]) -> Batch:
        """Join samples (batches of B = 1) or batches, in order."""
        values = [batch.values for batch in batches if batch.values is not None]
        return cls(
            join_clips([batch.clips for batch in batches]),
            DualMask.cat([batch.mask for batch in batches]),
            [key for batch in batches for key in batch.ids],
            [failure for batch in batches for failure in batch.replaced],
            values=torch.cat(values) if values else None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        mask = self.mask.to(device, non_blocking=non_blocking)
        values = None if self.values is None else self.values.to(device, non_blocking=non_blocking)
        clips = self.clips.to(device, non_blocking=non_blocking)
        return dataclasses.replace(self, clips=clips, mask=mask, values=values)

    def pin_memory(self) -> Batch:
        values = None if self.values is None else pinned(self.values)
        return dataclasses.replace(self, clips=pinned(self.clips), mask=self.mask.pin_memory(), values=values)


class PretrainDataset(VideoDataset[VideoEntry, Tensor]):
    """Samples of a list of videos: `dataset[epoch, index]` is a `Batch` of one video (B = 1, S clips).

    One decode gives `num_sample` clips of the same frames, each with its own crop and its own mask, as
    published (repeated augmentation, VideoMAE V2, section 4). Each video is visited `repeat` times an epoch,
    with different frames: `index % len(entries)` is the video, and `dataset[epoch, index]` takes any index
    from 0 on, also beyond `len(dataset)`. `dataset[index]` is epoch 0.

    A video that cannot be decoded is tried once more, then replaced by another one, drawn from (seed, epoch,
    index).

    Args:
        entries: result of `read_list` or `read_data`, at least one.
        num_frames: T, where a source of a mix says nothing else.
        stride: frames from one sampled frame to the next, for entries that have none of their own.
        image_size: side, or (height, width), of the clips in pixels, where a source says nothing else.
        grid: tokens of such a clip along time, height and width (`ModelConfig.grid`).
        mask: settings of the masks.
        num_sample: S.
        seed: not negative.
        repeat: visits of a video in an epoch.
        backend: see `open_video`.
        resize: see `crop_and_resize`.
        sampling: "published", "exact" (the stride is kept exactly, and a clip may reach the last frame) or
            "fps" (frames `fps` to a second; where a video, or a folder, tells no rate, its stride).
        fps: frames a second of the clips, for "fps".
        crop: "published" (random, multi-scale: see `sample_crop`) or "center" (see `center_crop`).
        flip: mirror half of the clips; off as published, and never right where left and right mean something
            (SSv2).
        min_frames: a video of fewer counts as bad.
        channels: of the frames; a video of others counts as bad.

    Attributes:
        cycle: epochs after which the same samples come again; None means never.
        read_values: (epoch, index) keys -> stored values of these samples, for `Batch.values`.
        source_shapes: of the clips of each source of a mix.
        shapes: each of these once; a sample's is `shape_at`.

    Raises:
        InputError: no entries, a number below 1, a source's shape that tubelets do not divide, or a mask that
            does not fit the grid. On access: no video of the list (or none of `MAX_ATTEMPTS`) can be decoded,
            or no backend is installed.
    """

    def __init__(
        self,
        entries: Sequence[VideoEntry],
        *,
        num_frames: int,
        stride: int,
        image_size: int | tuple[int, int],
        grid: tuple[int, int, int],
        mask: MaskConfig,
        num_sample: int = 1,
        seed: int = 0,
        repeat: int = 1,
        backend: str = "auto",
        resize: str = "torch",
        sampling: str = "published",
        fps: float | None = None,
        crop: str = "published",
        flip: bool = False,
        min_frames: int = 1,
        channels: int = RGB,
    ) -> None:
        super().__init__(
            entries,
            num_sample=num_sample,
            seed=seed,
            repeat=repeat,
            backend=backend,
            resize=resize,
            min_frames=min_frames,
            channels=channels,
        )
        if sampling not in SAMPLINGS:
            raise InputError(f"unknown sampling {sampling!r}; known: {', '.join(SAMPLINGS)}")
        if crop not in CROPS:
            raise InputError(f"unknown crop {crop!r}; known: {', '.join(CROPS)}")
        if (sampling == "fps") != (fps is not None) or (fps is not None and not 0 < fps < float("inf")):
            raise InputError(
                f"sampling by fps needs `fps` above 0, and only that does; not {sampling!r} with fps {fps}"
            )
        clip_starts(1, num_frames, stride)
        if sampling == "fps":
            check_all_frames(self.entries, "sampling by fps")
        check_strides(self.entries, stride)
        self.sampling, self.fps, self.crop, self.flip = sampling, fps, crop, flip
        self.num_frames, self.stride, self.image_size = num_frames, stride, image_hw(image_size)
        self.grid, self.mask = grid, mask
        self.cycle: int | None = None
        self.read_values: Callable[[Sequence[SampleKey]], Tensor] | None = None
        self.source_shapes = source_shapes(self.data, self.usual_shape, grid)
        self.shapes = list(dict.fromkeys(self.source_shapes))
        for number, shape in enumerate(self.source_shapes):
            self._check_mask(number, shape)

    def __getitem__(self, key: SampleKey | int) -> Batch:
        epoch, index = self._seen(self._checked_key(key))
        clips, video, replaced = self._decode_with_replacement(epoch, index)
        values = None if self.read_values is None else self.read_values([(epoch, index)])
        ids = [(epoch, index, self.entries[video].path)]
        return Batch(clips, self.sample_mask(epoch, index), ids, replaced, values=values)

    def _seen(self, key: SampleKey) -> SampleKey:
        """The sample that comes at (epoch, index)."""
        return key if self.cycle is None else (key[0] % self.cycle, key[1])

    def ask_ahead(self, keys: Sequence[SampleKey]) -> None:
        super().ask_ahead([self._seen(key) for key in keys])

    def _check_mask(self, number: int, shape: ClipShape) -> None:
        """Raises InputError where the masks do not fit the clips of a source."""
        try:
            self._draw_mask(shape, torch.Generator())
        except InputError as error:
            if shape == self.usual_shape or not isinstance(self.data, Mix):
                raise
            name = self.data.sources[number].name
            raise InputError(f"source {name!r} of the mix, clips of {shape}: {error}") from None

    @property
    def usual_shape(self) -> ClipShape:
        """Of the clips where a source says nothing else."""
        return ClipShape(self.num_frames, *self.image_size)

    @property
    def groups(self) -> list[list[range]]:
        """For each of the `shapes`, the samples of an epoch that have it."""
        assert isinstance(self.data, Mix)
        groups: dict[ClipShape, list[range]] = {shape: [] for shape in self.shapes}
        for number, shape in enumerate(self.source_shapes):
            groups[shape] += self.data.ranges(number, len(self))
        return list(groups.values())

    def shape_at(self, epoch: int, index: int) -> ClipShape:
        """The shape of a sample's clips."""
        if not isinstance(self.data, Mix):
            return self.usual_shape
        if len(self.shapes) == 1:
            return self.shapes[0]
        return self.source_shapes[self.data.source_at(index, len(self))]

    def pick_video(self, epoch: int, index: int) -> tuple[int, range]:
        video, others = super().pick_video(epoch, index)
        if len(self.shapes) > 1 and isinstance(self.data, Mix):  # none of another shape stands in
            source = self.data.sources[self.data.source_of(video)]
            others = range(source.first, source.first + source.count)
        return video, others

    def sample_mask(self, epoch: int, index: int) -> DualMask:
        """The masks of a sample's S clips."""
        state = seed_sequence(self.seed, epoch, index, 0, Purpose.MASKS).generate_state(2, np.uint32)
        generator = torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))
        return self._draw_mask(self.shape_at(epoch, index), generator)

    def _draw_mask(self, shape: ClipShape, generator: torch.Generator) -> DualMask:
        grid = self.grid if shape == self.usual_shape else grid_of(shape, self.usual_shape, self.grid)
        return DualMask.sample(self.num_sample, grid, **self.mask.to_dict(), generator=generator)

    def pick_frames(
        self, entry: VideoEntry, total: int, fps: float | None, epoch: int, index: int, attempt: int = 0
    ):
        """int64 [T]: which of `total` frames a sample's clips are made of."""
        rng, stride = numpy_rng(self.seed, epoch, index, attempt, Purpose.FRAMES), entry.stride or self.stride
        num_frames = self.shape_at(epoch, index).frames
        if self.sampling == "published":
            return sample_frame_indices(total, num_frames, stride, rng)
        if self.sampling == "fps" and fps and self.fps:
            return sample_exact_indices(total, num_frames, fps / self.fps, rng)
        return sample_exact_indices(total, num_frames, stride, rng)

    def _frames_ahead(self, entry: VideoEntry, epoch: int, index: int) -> np.ndarray:
        return self.pick_frames(entry, entry.total, None, epoch, index)

    def pick_crops(
        self, width: int, height: int, epoch: int, index: int, attempt: int = 0
    ) -> list[tuple[CropBox, bool]]:
        """Box of each of a sample's S clips in frames of `width` x `height`, and whether it is mirrored."""
        size = self.shape_at(epoch, index)[1:]
        if self.crop == "center":
            boxes = [center_crop(width, height, size)] * self.num_sample
        else:
            rng = numpy_rng(self.seed, epoch, index, attempt, Purpose.CROPS)
            boxes = [sample_crop(width, height, size, rng) for _ in range(self.num_sample)]
        flips = numpy_rng(self.seed, epoch, index, attempt, Purpose.FLIPS).integers(2, size=self.num_sample)
        return [(box, bool(flip) and self.flip) for box, flip in zip(boxes, flips, strict=True)]

    def _decode_crops(self, entry: VideoEntry, epoch: int, index: int, attempt: int) -> Tensor:
        """uint8 [S, T, H, W, 3]; of other channels as `Batch.clips`."""
        picked: list[tuple[CropBox, bool]] = []

        def whole_of_all(width: int, height: int) -> CropBox:
            picked[:] = self.pick_crops(width, height, epoch, index, attempt)
            return bounding_box([box for box, _ in picked])

        with self._open(entry) as reader:
            indices = self.pick_frames(entry, len(reader), reader.fps, epoch, index, attempt)
            frames = reader.frames(indices, whole_of_all)
        from_left, from_top, _, _ = bounding_box([box for box, _ in picked])
        crops, size = [], self.shape_at(epoch, index)[1:]
        for (left, top, width, height), flip in picked:
            box = CropBox(left - from_left, top - from_top, width, height)
            crop = crop_and_resize(frames, box, size, resize=self.resize)
            crops.append(crop[:, :, ::-1] if flip else crop)
        return torch.from_numpy(np.stack(crops) if len(crops) > 1 else np.ascontiguousarray(crops[0])[None])


def _decode_first_frame(entry: VideoEntry, backend: str, channels: int) -> None:
    with open_video(entry, backend) as reader:
        reader.channels = channels
        reader.frames([0])


def check_decodable(
    entries: Sequence[VideoEntry], *, backend: str = "auto", limit: int = 20, channels: int = RGB
) -> list[tuple[str, str]]:
    """See, before a run writes anything, that some video can be decoded.

    Tries one frame of up to `limit` videos, spread over the list, until one works; in a worker, see
    `guarded_each`.

    Returns:
        (path, error) of the videos that failed before it.

    Raises:
        InputError: none works (names the first three and their errors), no entries, or no backend is
            installed. Also where none worked within three times `hang_limit()`.
    """
    if not entries:
        raise InputError("no videos to decode: the list has no entries")
    count = min(len(entries), max(limit, 1))
    tried = [entries[place * len(entries) // count] for place in range(count)]
    failures: list[tuple[str, str]] = []
    began = time.monotonic()
    for entry, error in zip(
        tried,
        guarded_each(functools.partial(_decode_first_frame, backend=backend, channels=channels), tried),
    ):
        if error is None:
            return failures
        failures.append((entry.path, str(error)))
        if time.monotonic() - began > 3 * hang_limit():
            break
    count = len(failures)
    which = f"all {count} videos"
    if count < len(entries):
        which = f"all of the {count} videos tried, of {len(entries)},"
    raise InputError(f"{which} are undecodable; the first: {list_failures(failures)}")


class EpochSampler:
    """Which samples each step reads: `sampler[step]` is a list of (epoch, index), a pure function of its
    arguments.

    An epoch is a permutation of `size` samples, cut into whole batches; the rest is dropped, as published. If
    there are fewer samples than a batch needs, an epoch is one batch, filled up with further permutations
    under new indices (`index + size`, ...), so that the same video comes back with other frames and crops.

    Args:
        size: samples of an epoch.
        batch_size: videos of a micro-batch on this rank.
        accumulate: micro-batches of a step on each rank.
        rank, world_size: the ranks of a step take consecutive parts of one batch of `batch_size * accumulate
            * world_size`, so any split of the same batch sees the same samples.
        start_step: first step of the iteration; nothing before it is replayed.
        total_steps: step at which iteration ends; None means never.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        start_step: int = 0,
        total_steps: int | None = None,
    ) -> None:
        if size < 1 or batch_size < 1 or accumulate < 1:
            raise InputError(
                f"{size} samples in {accumulate} batches of {batch_size}: all must be at least 1"
            )
        if not 0 <= rank < world_size or start_step < 0 or seed < 0:
            raise InputError(
                f"rank {rank} of {world_size}, start step {start_step}, seed {seed}: out of range"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.start_step, self.total_steps = start_step, total_steps
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.accumulate * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return max(self.size // self.global_batch_size, 1)

    @property
    def fewest(self) -> int:
        """Samples of an epoch that a batch can be made of."""
        return self.size

    @property
    def fills_up(self) -> bool:
        """Whether a batch holds the same video more than once, because there are too few samples."""
        return self.fewest < self.global_batch_size

    def __getitem__(self, step: int) -> list[SampleKey]:
        epoch, place = divmod(step, self.steps_per_epoch)
        own = self.batch_size * self.accumulate
        first = place * self.global_batch_size + self.rank * own
        return [(epoch, int(index)) for index in self._epoch_order(epoch)[first : first + own]]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Micro-batches, `accumulate` of each step."""
        step = self.start_step
        while self.total_steps is None or step < self.total_steps:
            samples = self[step]
            for first in range(0, len(samples), self.batch_size):
                yield samples[first : first + self.batch_size]
            step += 1

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """int32 (int64 where that is too small) [at least steps_per_epoch * global_batch_size]"""
        if self._order[0] != epoch:
            rng = numpy_rng(self.seed, epoch, Purpose.ORDER)
            rounds = -(-self.global_batch_size // self.size) if self.fills_up else 1
            self._order = (-1, self._order[1][:0])  # not two of them at once
            order = [permutation(self.size, rng) for _ in range(rounds)]
            for turn in range(1, rounds):  # of small lists only
                order[turn] = order[turn] + np.int64(turn * self.size)
            self._order = (epoch, order[0] if rounds == 1 else np.concatenate(order))
        return self._order[1]
