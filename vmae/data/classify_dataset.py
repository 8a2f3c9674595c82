"""Labelled clips to train on, and the views of videos to test on; each sample a pure function of (seed,
epoch, index).

Legend: B videos of a batch, S clips of one decode (repeated augmentation), V views of a tested video, T
frames, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vmae.config import RESULTS, _Checked
from vmae.data.augment import CropBox, crop_and_resize, image_hw
from vmae.data.augment_classify import AugmentConfig, erase_box, rand_augment, sample_resized_crop
from vmae.data.batches import TensorBatch
from vmae.data.decode import VideoReader
from vmae.data.entry_table import LabelTable
from vmae.data.labels import LabelledList
from vmae.data.manifest import VideoEntry
from vmae.data.quarantine import Failure
from vmae.data.sampling import (
    dense_view_indices,
    sample_dense_indices,
    sample_sparse_indices,
    sparse_view_indices,
)
from vmae.data.shards.facts import check_all_frames
from vmae.data.video_dataset import Purpose, SampleKey, VideoDataset, numpy_rng
from vmae.data.workers import WorkerPool, hang_limit
from vmae.errors import InputError
from vmae.settings import FRAMES, SIDE, STRIDE, OneOf, Whole, ranged, setting

CLIP_SAMPLINGS = ("dense", "sparse")
FILTERS = {"torch": "torch", "published": "bilinear"}  # `ClipConfig.resize`: `resize` of `crop_and_resize`
VIEWS_HANG_S = 300.0  # for all the views of a video, some fifteen clips


@dataclass(frozen=True, kw_only=True)
class ClipConfig(_Checked):
    """Which frames and pixels make a clip.

    Attributes:
        num_frames: T, as the model has it.
        image_size: side, or (height, width), in pixels, as the model has it.
        short_side: see `spatial_views`; None: that of the clips.

    Raises:
        InputError: see `_Checked`; or a `short_side` that crops of `image_size` do not fit into.
    """

    group = RESULTS

    num_frames: int = ranged(16, FRAMES)
    image_size: int | tuple[int, int] = ranged(224, SIDE)
    sampling: str = setting(
        "dense",
        "frames: dense (Kinetics: a span of frames x stride), or sparse (SSv2: over the whole video)",
        OneOf("sampling", CLIP_SAMPLINGS),
        constants=((("--sparse_sample",), "sparse", None),),
    )
    stride: int = setting(
        4,
        "frames from one to the next, for dense, where the list says nothing else",
        STRIDE,
        aliases=("--sampling_rate",),
    )
    resize: str = setting(
        "torch",
        "torch (antialiased), or published (not antialiased; the published pixels within a grey level)",
        OneOf("resize", tuple(FILTERS)),
    )
    short_side: int | None = setting(
        None,
        "tests, and training with --no-crop, resize a video's short side to this before they cut clips",
        SIDE,
        aliases=("--short_side_size",),
        unset="the clips'",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        least = min(image_hw(self.image_size))
        if self.short_side is not None and self.short_side < least:
            raise InputError(
                f"a short side of {self.short_side} pixels is less than the {least} of the clips, which are "
                f"cut from it: make --short-side at least {least}, or --image-size at most {self.short_side}"
            )

    def describe_pixels(self) -> str:
        """How tests resize, for a report."""
        side = f"short side {self.short_side or min(image_hw(self.image_size))}"
        if self.resize == "published":
            return f"{side}, resized as published"
        return f"{side}, antialiased (published: not; --resize published)"

    def views_of(self, frames: np.ndarray, crops: int) -> np.ndarray:
        """uint8 [crops, T, height, width, 3]: see `spatial_views`."""
        return spatial_views(
            frames, self.image_size, crops, short_side=self.short_side, resize=FILTERS[self.resize]
        )

    def published_views(self, segments: int | None = None, crops: int | None = None) -> ViewConfig:
        """Published number of views: 5 x 3, or 2 x 3 with sparse sampling; `segments` and `crops` override
        it."""
        usual = 2 if self.sampling == "sparse" else 5
        return ViewConfig(segments=segments or usual, crops=crops or 3)

    def train_indices(self, total: int, entry: VideoEntry, rng: np.random.Generator | None) -> np.ndarray:
        """int64 [T] of a random clip of a video of `total` frames; without `rng` of the middle one."""
        if self.sampling == "sparse":
            return sample_sparse_indices(total, self.num_frames, rng)
        return sample_dense_indices(total, self.num_frames, entry.stride or self.stride, rng)

    def view_indices(self, total: int, entry: VideoEntry, segments: int) -> np.ndarray:
        """int64 [segments, T] of the test clips."""
        if self.sampling == "sparse":
            return sparse_view_indices(total, self.num_frames, segments)
        return dense_view_indices(total, self.num_frames, entry.stride or self.stride, segments)


@dataclass(frozen=True, kw_only=True)
class ViewConfig(_Checked):
    """How many views a test takes of a video: published 5 x 3 dense, 2 x 3 sparse."""

    segments: int = setting(
        5,
        "clips of a video in time",
        Whole(1, 10_000),
        aliases=("--test_num_segment",),
        unset="{default}; 2 for sparse sampling",
    )
    crops: int = setting(
        3,
        "of each clip, along the longer side",
        Whole(1, 1000),
        aliases=("--test_num_crop",),
        unset="{default}",
    )


@dataclass
class LabelledBatch(TensorBatch):
    """What one supervised step reads.

    Attributes:
        clips: uint8 [B*S, T, H, W, 3], RGB; the S clips of a video stand together.
        targets: float32 [B*S, K], 1 at each label.
        ids: (epoch, index, path) of each of the B videos; `path` is the one that was decoded.
        replaced: each video that could not be decoded, and that another one stands in for (with its own
            label).
        taught: float32 [B*S, K], a teacher's stored logits; None where there are none.
    """

    clips: Tensor
    targets: Tensor
    ids: list[tuple[int, int, str]]
    replaced: list[Failure] = field(default_factory=list)
    taught: Tensor | None = None


class ClassifyDataset(VideoDataset[VideoEntry, Tensor]):
    """Labelled clips of a list: `dataset[epoch, index]` is a `LabelledBatch` of one video (B = 1, S clips of
    one decode, each augmented on its own). Mixup and cutmix mix a whole batch (`draw_mixing`).

    Args:
        labelled: the list.
        clip: settings that choose frames and pixels.
        augment: settings of the augmentation.
        num_sample: S.
        cycle: epochs after which the same samples come again; None means never.
        read_logits: (epoch, index) keys -> stored logits of these samples, for `LabelledBatch.taught`.
        options: arguments of `VideoDataset`.
    """

    def __init__(
        self,
        labelled: LabelledList,
        clip: ClipConfig,
        augment: AugmentConfig,
        *,
        num_sample: int = 1,
        cycle: int | None = None,
        read_logits: Callable[[Sequence[SampleKey]], Tensor] | None = None,
        **options,
    ):
        super().__init__(labelled.entries, num_sample=num_sample, resize=FILTERS[clip.resize], **options)
        check_all_frames(self.entries, "fine-tuning")
        self.labelled, self.clip, self.augment, self.cycle = labelled, clip, augment, cycle
        self.read_logits = read_logits

    def describe_labels(self, number: int) -> str:
        return ";".join(map(str, sorted(self.labelled.labels[number])))

    def label_lines(self, first: int, last: int) -> str:
        labels = self.labelled.labels
        if not isinstance(labels, LabelTable) or labels.ends is not None:
            return super().label_lines(first, last)
        return "".join(f"{label}\n" for label in labels.values[first:last].tolist())

    def __getitem__(self, key: SampleKey | int) -> LabelledBatch:
        epoch, index = self._checked_key(key)
        if self.cycle is not None:
            epoch %= self.cycle
        clips, video, replaced = self._decode_with_replacement(epoch, index)
        targets = self.labelled.targets([video]).expand(self.num_sample, -1)
        ids = [(epoch, index, self.entries[video].path)]
        taught = self.read_logits([(epoch, index)]) if self.read_logits else None
        return LabelledBatch(clips, targets, ids, replaced, taught)

    def _frames_ahead(self, entry: VideoEntry, epoch: int, index: int) -> np.ndarray:
        epoch = epoch if self.cycle is None else epoch % self.cycle
        rng = numpy_rng(self.seed, epoch, index, 0, Purpose.FRAMES)
        return self.clip.train_indices(entry.total, entry, rng)

    def _decode_crops(self, entry: VideoEntry, epoch: int, index: int, attempt: int) -> Tensor:
        key = (self.seed, epoch, index, attempt)
        with self._open(entry) as reader:
            frames = reader.frames(
                self.clip.train_indices(len(reader), entry, numpy_rng(*key, Purpose.FRAMES))
            )
        rngs = {
            purpose: numpy_rng(*key, purpose)
            for purpose in (Purpose.AUGMENT, Purpose.CROPS, Purpose.FLIPS, Purpose.ERASE)
        }
        return torch.from_numpy(np.stack([self._augmented(frames, rngs) for _ in range(self.num_sample)]))

    def _augmented(self, frames: np.ndarray, rngs: dict[Purpose, np.random.Generator]) -> np.ndarray:
        """uint8 [T, H, W, 3]: one clip, changed in the published order."""
        config, size = self.augment, self.clip.image_size
        if config.operations:
            frames = rand_augment(frames, config, rngs[Purpose.AUGMENT])
        if config.crop:
            box = sample_resized_crop(frames.shape[2], frames.shape[1], rngs[Purpose.CROPS])
            clip = crop_and_resize(frames, box, size, resize=self.resize)
        else:
            clip = self.clip.views_of(frames, 1)[0]
        if config.flip and rngs[Purpose.FLIPS].integers(2):
            clip = np.ascontiguousarray(clip[:, :, ::-1])
        if config.erase:
            mode, count = config.erase_mode, config.erase_count
            clip = erase_box(clip, config.erase, rngs[Purpose.ERASE], mode=mode, count=count)
        return clip


def spatial_views(
    frames: np.ndarray,
    size: int | tuple[int, int],
    crops: int,
    *,
    short_side: int | None = None,
    resize: str = "torch",
) -> np.ndarray:
    """uint8 [crops, T, height, width, 3]: frames resized to cover `size`, cut at `crops` places along the
    longer side.

    As published: the resized longer side is rounded down; places are spread evenly from one end to the other,
    and rounded down. One crop is the middle one; without antialiasing rounded to the even pixel, as in the
    published validation (the published test cannot take one crop).

    Args:
        frames: uint8 [T, H, W, 3].
        short_side: of the resized frames in pixels, where it is to be more than the shorter side of `size`.
            The published test cuts squares of `short_side`, which its models refuse unless that is `size`;
            here they are of `size`, still from end to end.
        resize: see `crop_and_resize`.
    """
    height, width = image_hw(size)
    source_height, source_width = frames.shape[1:3]
    zoom = (short_side or min(height, width)) / min(height, width)
    scale = max(height / source_height, width / source_width) * zoom
    resized = (max(int(source_height * scale + 1e-6), height), max(int(source_width * scale + 1e-6), width))
    whole = crop_and_resize(frames, CropBox(0, 0, source_width, source_height), resized, resize=resize)
    room = resized[0] - height, resized[1] - width
    middle = [round(free / 2) if resize == "bilinear" else free // 2 for free in room]
    if crops == 1:
        corners = [middle]
    else:
        steps = [int(number * (max(room) / (crops - 1))) for number in range(crops)]
        corners = [[step, middle[1]] if room[0] >= room[1] else [middle[0], step] for step in steps]
    return np.stack([whole[:, top : top + height, left : left + width] for top, left in corners])


class ViewDataset(VideoDataset[VideoEntry, Tensor]):
    """The views of each video of a list: `dataset[video]` is uint8 [V, T, H, W, 3], or the `Failure` of a
    broken video, which nothing stands in for. The views of a segment stand together.

    Args:
        entries: videos, of a labelled list or not.
        clip: settings that choose frames and pixels.
        views: number of segments and crops.
        options: arguments of `VideoDataset`.
    """

    def __init__(self, entries: Sequence[VideoEntry], clip: ClipConfig, views: ViewConfig, **options):
        super().__init__(
            entries, num_sample=views.segments * views.crops, resize=FILTERS[clip.resize], **options
        )
        check_all_frames(self.entries, "testing")
        self.clip, self.views = clip, views

    def set_watch(self, watch: Callable[[int], None]) -> None:
        self.watch = watch

    def view_indices(self, total: int, entry: VideoEntry) -> np.ndarray:
        """int64 [segments, T] of the clips of a video of `total` frames."""
        return self.clip.view_indices(total, entry, self.views.segments)

    def __getitem__(self, video: int) -> Tensor | Failure:
        failures: list[Failure] = []
        clips = self._try_twice(video, 0, video, 0, failures)
        return failures[0] if clips is None else clips

    def ahead(self, video: int) -> None:
        """Start to read a video, as far as it lies in an object store; for a worker."""
        self.ask_ahead([(0, video)])

    def _frames_ahead(self, entry: VideoEntry, epoch: int, index: int) -> np.ndarray:
        return self.view_indices(entry.total, entry)

    def _decode_crops(self, entry: VideoEntry, epoch: int, index: int, attempt: int) -> Tensor:
        with self._open(entry) as reader:
            return self.views_of(reader, entry)

    def views_of(self, reader: VideoReader, entry: VideoEntry) -> Tensor:
        """uint8 [V, T, H, W, 3]: the views of an open video."""
        frames = self._frames(reader, self.view_indices(len(reader), entry))
        clips = [self.clip.views_of(clip, self.views.crops) for clip in frames]
        return torch.from_numpy(np.concatenate(clips))

    @staticmethod
    def _frames(reader: VideoReader, indices: np.ndarray) -> np.ndarray:
        """uint8 [segments, T, H, W, 3], each frame decoded once."""
        distinct, places = np.unique(indices, return_inverse=True)
        return reader.frames(distinct)[places.reshape(indices.shape)]

    def read(
        self, videos: Sequence[int], num_workers: int = 0, *, hang_s: float | None = None
    ) -> Iterator[tuple[int, Tensor | Failure]]:
        """(video, its views) in the order of `videos`, decoded ahead by `num_workers` processes.

        Args:
            num_workers: 0 decodes in this process, where a video that hangs or crashes takes it along.
            hang_s: seconds that the views of a video may take; None means `hang_limit(VIEWS_HANG_S)`.
        """
        if not num_workers:
            yield from ((video, self[video]) for video in videos)
            return
        pool = WorkerPool(
            self, iter(videos), count=num_workers, prefetch=2, hang_s=hang_s or hang_limit(VIEWS_HANG_S)
        )
        try:
            yield from zip(videos, pool)
        finally:
            pool.close()


class MiddleClipDataset(ViewDataset):
    """One view of each video, to validate on: `dataset[video]` is uint8 [1, T, H, W, 3], or a `Failure`.

    As published: the frames of a training clip, from the middle of the video (sparse sampling: the middle of
    each part), and the middle crop.
    """

    def __init__(self, entries: Sequence[VideoEntry], clip: ClipConfig, **options):
        super().__init__(entries, clip, ViewConfig(segments=1, crops=1), **options)

    def view_indices(self, total: int, entry: VideoEntry) -> np.ndarray:
        return self.clip.train_indices(total, entry, None)[None]
