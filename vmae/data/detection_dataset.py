"""Clips around key frames, with boxes that follow every change of the picture; each sample a function of
(seed, epoch, index).

Legend: B clips, M boxes of a clip (the most of a batch; others are padded), T frames, H x W pixels, K
actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vmae.config import RESULTS, _Checked
from vmae.data import detection_published as published
from vmae.data.augment import CropBox, crop_and_resize
from vmae.data.augment_classify import sample_resized_crop
from vmae.data.ava import AvaBox, Box, Key
from vmae.data.batches import TensorBatch
from vmae.data.decode import DecodeError, open_video
from vmae.data.files import path_kind
from vmae.data.guarded import guarded_each
from vmae.data.manifest import DEFAULT_PATTERN, VideoEntry
from vmae.data.quarantine import Failure
from vmae.data.shards.index import is_index
from vmae.data.video_dataset import Purpose, SampleKey, VideoDataset, numpy_rng
from vmae.data.video_files import is_video
from vmae.data.workers import WorkerPool, hang_limit
from vmae.errors import InputError
from vmae.settings import FRAMES, SHARE_ABOVE_0, SIDE, STRIDE, OneOf, Real, ranged, setting, shown

PREPROCESS = ("resize", "published")
_MIN_VISIBLE = 0.25  # share of a box's area that a crop must leave of it


@dataclass(frozen=True, kw_only=True)
class KeyClipConfig(_Checked):
    """What is seen of a key frame.

    Attributes:
        num_frames: T, as the model has it.
        image_size: side, or (height, width), in pixels, as the model has it. Whole frames are resized to it,
            unless `preprocess` is "published": a square then, see `vmae.data.detection_published`.
        extend: how much wider and taller boxes are made to be looked at in a test, shares (0.1 and 0.05, as
            VideoMAE-Action-Detection has them).

    Raises:
        InputError: a value out of its range; published clips that are not square.
    """

    group = RESULTS

    num_frames: int = ranged(16, FRAMES)
    image_size: int | tuple[int, int] = ranged(224, SIDE)
    stride: int = setting(
        4,
        "frames from one to the next; frame T // 2 of the clip is the key frame, unless --preprocess says "
        "otherwise",
        STRIDE,
        aliases=("--sampling_rate",),
    )
    origin: float = setting(
        0.0, "second of the movie that files begin at; 900 for cut AVA", Real(least=0, most=10**9)
    )
    extend: tuple[float, float] = ranged((0.1, 0.05), Real(least=0, most=1000))
    preprocess: str = setting(
        "resize",
        "resize: whole frames, resized to --image-size; published, as VideoMAE-Action-Detection: shorter "
        "side 256, crops of 224 in training, whole frames of their own shape in tests, frames -31 to "
        "+29, its mean and deviation",
        OneOf("preprocessing", PREPROCESS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.published and not isinstance(self.image_size, int):
            raise InputError(
                f"--preprocess published trains on square clips; --image-size is {shown(self.image_size)}"
            )

    @property
    def published(self) -> bool:
        return self.preprocess == "published"

    def indices(self, key: int, total: int) -> np.ndarray:
        """int64 [T]: the clip around frame `key`; where the video begins or ends, its first or last frame
        repeats."""
        if self.published:
            return np.clip(key + published.clip_offsets(self.num_frames, self.stride), 0, total - 1)
        steps = np.arange(self.num_frames, dtype=np.int64) - self.num_frames // 2
        return np.clip(key + steps * self.stride, 0, total - 1)


@dataclass(frozen=True, kw_only=True)
class KeyAugmentConfig(_Checked):
    """How key frames to train on are changed. VideoMAE-Action-Detection flips, jitters boxes and shifts
    colours, and crops as `preprocess` says."""

    group = RESULTS

    flip: bool = setting(True, "mirror half of the clips; not where left and right mean something")
    jitter: bool = setting(True, "move each box's edges a little, as person detectors do")
    min_crop: float = setting(
        1.0, "least area of a random crop, a share of the frame's; 1: whole frames", SHARE_ABOVE_0
    )
    colours: bool | None = setting(
        None,
        "shift hue, saturation and brightness of each clip at random",
        unset="with --preprocess published",
    )


@dataclass(frozen=True)
class KeyFrame(VideoEntry):
    """A key frame, in its video.

    Attributes:
        video, timestamp: video and second of the annotation.
        frame: number of the key frame in the file.
        boxes: at least one.
        labels: classes (from 0) of each box; empty for boxes whose actions are not known.
        scores: score of each box.
    """

    video: str = ""
    timestamp: float = 0
    frame: int = 0
    boxes: tuple[Box, ...] = ()
    labels: tuple[tuple[int, ...], ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def key(self) -> Key:
        return self.video, self.timestamp


# --- From rows to key frames ---


def find_videos(
    folder: str | Path, names: Sequence[str], *, pattern: str = DEFAULT_PATTERN
) -> dict[str, VideoEntry]:
    """The entry of each video id that `folder` has: a file `ID.mp4` (or another ending), or a folder `ID` of
    images.

    Args:
        pattern: names of a folder's images, numbered from 1; `{video}` in it stands for the id.

    Raises:
        InputError: `folder` is no folder, or has two videos of one id.
    """
    if is_index(folder):
        raise InputError(
            f"key frames are read out of files, not shards: give the folder of videos, not {folder}"
        )
    folder = Path(folder)
    if path_kind(folder) != "a folder":
        raise InputError(f"folder of videos {str(folder)!r} does not exist")
    files: dict[str, Path] = {}
    wanted = set(names)
    for path in sorted(path for path in folder.iterdir() if is_video(path)):
        if path.stem in files and path.stem in wanted:
            raise InputError(
                f"{files[path.stem]} and {path} are both video {path.stem!r}; leave one of them there"
            )
        files[path.stem] = path
    found = {}
    for name in dict.fromkeys(names):
        if name in files:
            found[name] = VideoEntry(str(files[name]))
        elif (folder / name).is_dir():
            total = sum(path.is_file() for path in (folder / name).iterdir())
            found[name] = VideoEntry(
                str(folder / name), "frames", 1, total, pattern=pattern.replace("{video}", name)
            )
    return found


def key_frames(
    rows: Sequence[AvaBox],
    source: str | Path,
    entries: dict[str, VideoEntry],
    clip: KeyClipConfig,
    *,
    actions: Sequence[int] = (),
    fps: float | None = None,
    videos: str | Path = "the folder",
) -> list[KeyFrame]:
    """The key frames of annotations (with `actions`) or person boxes (without), in order. Opens every video
    once.

    Args:
        source: file of the rows, for messages.
        entries: result of `find_videos`.
        actions: ids of the classes, in order; rows of others make a box without that label.
        fps: frames a second, where a video (or folder of images) does not tell.
        videos: folder of the videos, for messages.

    Raises:
        InputError: a video that is missing or cannot be decoded, that tells no rate, or that ends before a
            key frame; with the line that wants it.
    """
    frames = _boxes_by_key_frame(rows, actions)
    wanted = [entries[video] for video in dict.fromkeys(video for video, _ in frames) if video in entries]
    opened = guarded_each(_frames_and_rate, wanted)  # in the order in which the loop asks for them
    lengths: dict[str, tuple[int, float]] = {}
    made = []
    for (video, timestamp), boxes in frames.items():
        where = f"{source}, line {boxes[0].row.line}"
        if video not in entries:
            raise InputError(f"{where}: video {video!r} is not in {videos}: no file of that name, no folder")
        if video not in lengths:
            lengths[video] = _length(entries[video], next(opened), where, fps)
        total, rate = lengths[video]
        frame = round((timestamp - clip.origin) * rate)
        if not 0 <= frame < total:
            raise InputError(
                f"{where}: key frame at {timestamp:.10g} s is outside of {entries[video].path}, which has "
                f"{clip.origin:g} to {clip.origin + total / rate:.2f} s ({total} frames, {rate:g} a second); "
                "is --origin right?"
            )
        labels = tuple(tuple(box.labels) for box in boxes)
        made.append(
            KeyFrame(
                **vars(entries[video]),
                video=video,
                timestamp=timestamp,
                frame=frame,
                boxes=tuple(box.row.box for box in boxes),
                labels=labels if actions else (),
                scores=tuple(box.row.score for box in boxes),
            )
        )
    return made


class _LabelledBox(NamedTuple):
    """A box of a key frame: the first row that names it, and its classes by all rows."""

    row: AvaBox
    labels: list[int]


def _boxes_by_key_frame(rows: Sequence[AvaBox], actions: Sequence[int]) -> dict[Key, list[_LabelledBox]]:
    """The boxes of each key frame, in the order of the rows."""
    classes = {action: number for number, action in enumerate(actions)}
    frames: dict[Key, dict[tuple, _LabelledBox]] = {}
    for row in rows:
        box = frames.setdefault(row.key, {}).setdefault((row.box, row.person), _LabelledBox(row, []))
        if row.action in classes:
            box.labels.append(classes[row.action])
    return {key: list(boxes.values()) for key, boxes in frames.items()}


def _frames_and_rate(entry: VideoEntry) -> tuple[int, float | None]:
    with open_video(entry) as reader:
        return len(reader), reader.fps


def _length(
    entry: VideoEntry, found: tuple[int, float | None] | DecodeError, where: str, fps: float | None
) -> tuple[int, float]:
    """(frames, frames a second) of a video, of what opening it gave."""
    if isinstance(found, DecodeError):
        raise InputError(f"{where}: {found}")
    total, own_rate = found
    rate = fps or own_rate
    if not rate:
        raise InputError(f"{where}: {entry.path} does not tell its frames a second; name them with --fps")
    return total, float(rate)


# --- Boxes; float64 [M, 4], shares of the frame ---


def crop_boxes_of(boxes: np.ndarray, crop: CropBox, width: int, height: int) -> np.ndarray:
    """Boxes of a frame of `width` x `height` pixels as shares of a crop of it, cut at its edges (some may be
    empty)."""
    origin = np.array([crop.left, crop.top] * 2) / np.array([width, height] * 2)
    size = np.array([crop.width, crop.height] * 2) / np.array([width, height] * 2)
    return ((boxes - origin) / size).clip(0, 1)


def flip_boxes(boxes: np.ndarray) -> np.ndarray:
    """Boxes of the mirrored frame."""
    return np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)


def extend_boxes(boxes: np.ndarray, share: tuple[float, float]) -> np.ndarray:
    """Boxes wider and taller by these shares about their middles, cut at the frame's edges."""
    pad = (boxes[:, 2:] - boxes[:, :2]) * np.array(share) / 2
    return np.concatenate([boxes[:, :2] - pad, boxes[:, 2:] + pad], 1).clip(0, 1)


def jitter_boxes(boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Boxes whose edges moved as published: each by a share of the box's side, more outwards than inwards."""
    size = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    outwards, inwards = (np.array([pair[i] for pair in published.JITTER] * 2) for i in (0, 1))
    sign = np.array([-1, -1, 1, 1])
    return (boxes + sign * size * rng.uniform(-inwards, outwards, boxes.shape)).clip(0, 1)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)


# --- Training ---


@dataclass
class DetectionBatch(TensorBatch):
    """What one step of training a detector reads.

    Attributes:
        clips: uint8 [B, T, H, W, 3], RGB.
        boxes: float32 [B, M, 4], x1, y1, x2, y2 in [0, 1]; padding is 0.
        targets: float32 [B, M, K], 1 at each action.
        valid: float32 [B, M], 0 where a row pads.
        ids: (epoch, index, path) of each clip; `path` is the video that was decoded.
        replaced: each key frame that could not be decoded, and that another one stands in for.
    """

    clips: Tensor
    boxes: Tensor
    targets: Tensor
    valid: Tensor
    ids: list[tuple[int, int, str]]
    replaced: list[Failure] = field(default_factory=list)

    @property
    def count(self) -> float:
        """Boxes in the batch."""
        return float(self.valid.sum())


class BoxedClip(NamedTuple):
    """A clip and the boxes of its key frame.

    Attributes:
        clip: uint8 [T, H, W, 3], RGB.
        boxes: float32 [M, 4], x1, y1, x2, y2 in [0, 1].
        numbers: place of each of these boxes among the key frame's.
    """

    clip: Tensor
    boxes: Tensor
    numbers: list[int]


class DetectionDataset(VideoDataset[KeyFrame, BoxedClip]):
    """Key frames to train on: `dataset[epoch, index]` is a `DetectionBatch` of one clip.

    A key frame whose video cannot be decoded is replaced by another one, with that one's boxes.

    Args:
        frames: result of `key_frames`, with labels.
        num_classes: K.
        clip: settings that choose frames and pixels.
        augment: settings of the augmentation.
        options: arguments of `VideoDataset`.
    """

    def __init__(
        self,
        frames: Sequence[KeyFrame],
        num_classes: int,
        clip: KeyClipConfig,
        augment: KeyAugmentConfig,
        **options: Any,
    ) -> None:
        super().__init__(frames, **options)
        self.num_classes, self.clip, self.augment = num_classes, clip, augment

    def describe_labels(self, number: int) -> str:
        frame = self.entries[number]
        return f"{frame.video} {frame.timestamp} {frame.frame} {frame.boxes} {frame.labels}"

    def __getitem__(self, key: SampleKey | int) -> DetectionBatch:
        epoch, index = self._checked_key(key)
        seen, video, replaced = self._decode_with_replacement(epoch, index)
        entry, count = self.entries[video], len(seen.boxes)
        targets = torch.zeros(1, count, self.num_classes)
        for row, number in enumerate(seen.numbers):
            targets[0, row, list(entry.labels[number])] = 1
        return DetectionBatch(
            clips=seen.clip[None],
            boxes=seen.boxes[None],
            targets=targets,
            valid=torch.ones(1, count),
            ids=[(epoch, index, entry.path)],
            replaced=replaced,
        )

    def _decode_crops(self, entry: KeyFrame, epoch: int, index: int, attempt: int) -> BoxedClip:
        """The clip, and the boxes that are left in it."""
        rngs = {
            use: numpy_rng(self.seed, epoch, index, attempt, use)
            for use in (Purpose.CROPS, Purpose.FLIPS, Purpose.AUGMENT)
        }
        with self._open(entry) as reader:
            frames = reader.frames(self.clip.indices(entry.frame, len(reader)))
        boxes = np.array(entry.boxes)
        make = self._published_clip if self.clip.published else self._resized_clip
        clip, cut, kept = make(frames, boxes, rngs)
        return BoxedClip(torch.from_numpy(clip), torch.from_numpy(cut).float(), kept)

    def _resized_clip(
        self, frames: np.ndarray, boxes: np.ndarray, rngs: dict[Purpose, np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """A clip of the whole frame or of a crop, the boxes in it as shares, and which these are."""
        height, width = frames.shape[1:3]
        crop, cut, kept = self._crop(boxes, width, height, rngs[Purpose.CROPS])
        clip = crop_and_resize(frames, crop, self.clip.image_size, resize=self.resize)
        if self.augment.colours:
            clip = published.shift_colours(clip, rngs[Purpose.AUGMENT])
        if self.augment.jitter:
            cut = jitter_boxes(cut, rngs[Purpose.AUGMENT])
        if self.augment.flip and rngs[Purpose.FLIPS].integers(2):
            clip, cut = np.ascontiguousarray(clip[:, :, ::-1]), flip_boxes(cut)
        return clip, cut, kept

    def _published_clip(
        self, frames: np.ndarray, boxes: np.ndarray, rngs: dict[Purpose, np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """A square crop of the resized frame, and all boxes as shares of it."""
        side, (height, width) = self.clip.image_size, frames.shape[1:3]
        assert isinstance(side, int)  # `KeyClipConfig` checks it
        size = published.resized_hw(height, width, side)
        frames = crop_and_resize(frames, CropBox(0, 0, width, height), size, resize="bilinear")
        place = rngs[Purpose.CROPS].random(2)
        left, top = int(place[0] * (size[1] - side)), int(place[1] * (size[0] - side))
        clip = np.ascontiguousarray(frames[:, top : top + side, left : left + side])
        pixels = published.to_pixels(boxes, height, width, size)
        pixels = published.crop_pixels(pixels, left, top, side)
        if self.augment.colours is not False:
            clip = published.shift_colours(clip, rngs[Purpose.AUGMENT])
        if self.augment.flip and rngs[Purpose.FLIPS].integers(2):
            clip, pixels = np.ascontiguousarray(clip[:, :, ::-1]), published.flip_pixels(pixels, side)
        if self.augment.jitter:
            pixels = published.jitter_pixels(pixels, rngs[Purpose.AUGMENT], side, side)
        return clip, published.to_shares(pixels, side, side), list(range(len(boxes)))

    def _crop(
        self, boxes: np.ndarray, width: int, height: int, rng: np.random.Generator
    ) -> tuple[CropBox, np.ndarray, list[int]]:
        """A crop, the boxes in it, and which these are; the whole frame where a crop would leave none."""
        whole = CropBox(0, 0, width, height)
        if self.augment.min_crop < 1:
            crop = sample_resized_crop(width, height, rng, area=(self.augment.min_crop, 1.0))
            cut = crop_boxes_of(boxes, crop, width, height)
            visible = _areas(cut) * (crop.width * crop.height / (width * height)) / _areas(boxes)
            kept = np.flatnonzero(visible >= _MIN_VISIBLE).tolist()
            if kept:
                return crop, cut[kept], kept
        return whole, boxes, list(range(len(boxes)))


# --- Testing ---


class KeyFrameReader(VideoDataset[KeyFrame, tuple[Tensor, Tensor]]):
    """Key frames to test on: `reader[number]` is (uint8 [T, H, W, 3], float32 [M, 4] of the boxes, extended),
    or the `Failure` of a broken video. Published clips have the shape of their video."""

    def __init__(self, frames: Sequence[KeyFrame], clip: KeyClipConfig, **options: Any) -> None:
        super().__init__(frames, **options)
        self.clip = clip

    def set_watch(self, watch: Callable[[int], None]) -> None:
        self.watch = watch

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | Failure:
        failures: list[Failure] = []
        seen = self._try_twice(number, 0, number, 0, failures)
        return failures[0] if seen is None else seen

    def _decode_crops(self, entry: KeyFrame, epoch: int, index: int, attempt: int) -> tuple[Tensor, Tensor]:
        with self._open(entry) as reader:
            frames = reader.frames(self.clip.indices(entry.frame, len(reader)))
        height, width = frames.shape[1:3]
        whole, boxes = CropBox(0, 0, width, height), np.array(entry.boxes)
        if not isinstance(self.clip.image_size, int) or not self.clip.published:
            clip = crop_and_resize(frames, whole, self.clip.image_size, resize=self.resize)
            seen = extend_boxes(boxes, self.clip.extend)
        else:
            size = published.resized_hw(height, width, self.clip.image_size)
            clip = crop_and_resize(frames, whole, size, resize="bilinear")
            pixels = published.to_pixels(boxes, height, width, size)
            seen = published.to_shares(published.extend_pixels(pixels, self.clip.extend, *size), *size)
        return torch.from_numpy(clip), torch.from_numpy(seen).float()

    def read(
        self, numbers: Sequence[int], num_workers: int = 0, *, hang_s: float | None = None
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor] | Failure]]:
        """(number, what it holds) in the order of `numbers`, decoded ahead by `num_workers` processes."""
        if not num_workers:
            yield from ((number, self[number]) for number in numbers)
            return
        pool = WorkerPool(self, iter(numbers), count=num_workers, prefetch=4, hang_s=hang_s or hang_limit())
        try:
            yield from zip(numbers, pool)
        finally:
            pool.close()
