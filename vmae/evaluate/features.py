"""`python -m vmae features`: features of each window of a video from an encoder, for temporal detection.

As published for THUMOS14 and FineAction (VideoMAE V2, section 4.4, and its released script): windows of 16
consecutive frames, frames stretched to a square, values in [0, 1] and not normalised, the pooled features
before the head (of a pre-trained encoder: the mean of its normed tokens). `DIR/VIDEO.npy` is float32
[windows, D]; ActionFormer reads it unchanged. Each frame is decoded and resized once, each tubelet is
embedded once where windows share tubelets, and windows go through the model in batches. A batch is of one
video: its features depend on no other one, so ranks and parts (`--part i/n`, then `--merge`) give the same.

    NAME.npy            features of a video
    features.json       model and windows
    videos.json         the video behind each file
    undecodable.jsonl   a line for each video that cannot be decoded
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vmae.checkpoint.arguments import add_model_arguments, load_from_args
from vmae.checkpoint.identity import frames_identity, list_hash, model_identity
from vmae.config import DTYPE, IMAGENET_MEAN, IMAGENET_STD, SpeedConfig, _Checked
from vmae.data.batches import sent
from vmae.data.decode import DecodeError, open_video
from vmae.data.files import path_kind
from vmae.data.guarded import guarded_streams
from vmae.data.manifest import VideoEntry, read_list
from vmae.data.part_folder import PartFolder
from vmae.data.parts import add_part_arguments
from vmae.data.ranks import PATIENCE
from vmae.data.shards.facts import check_all_frames
from vmae.data.shards.source import index_at
from vmae.data.video_files import is_video
from vmae.errors import InputError
from vmae.evaluate.views import NO_NUMBERS
from vmae.files.atomic import write_atomically
from vmae.files.json_files import read_json, read_json_lines
from vmae.flags import add_settings
from vmae.model import Classifier
from vmae.settings import BATCH, FRAMES, SIDE, STRIDE, limits, ranged
from vmae.train.checks import check_backend, check_output, take_cpu
from vmae.train.guard import LateNumbers
from vmae.train.parallel import open_parallel
from vmae.train.pretrain_settings import RunConfig, TrainingConfig
from vmae_kernels.tubelets import STORED_RANGES

Frame = np.ndarray | Tensor  # uint8 [H, W, 3] (of other channels their dtype); or resized, float32 [C, H, W]
SETTINGS, SOURCES, UNDECODABLE = "features.json", "videos.json", "undecodable.jsonl"
PUBLISHED_STEPS = {"thumos14": 4, "fineaction": 16}
# Bytes of frames that the worker sends at once: shared memory may be as small as 64 MiB in all.
_STREAM_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class WindowConfig(_Checked):
    """Settings of the windows and of their frames; all of them change results.

    Attributes:
        frames: consecutive frames of a window: those of the model.
        step: frames from the start of one window to the start of the next.
        size: (height, width) in pixels that frames are stretched to: that of the model.
        normalize: subtract ImageNet's mean and divide by its standard deviation; the published features do
            not.
        dtype: "float32" or "bfloat16" (autocast).
    """

    frames: int = ranged(within=FRAMES)
    step: int = ranged(within=STRIDE)
    size: tuple[int, int] = ranged(within=SIDE)
    normalize: bool = False
    dtype: str = ranged("float32", DTYPE)

    def starts(self, total: int) -> range:
        """First frames of all windows that fit into a video of `total` frames, as published."""
        return range(0, total - self.frames + 1, self.step)


def resized(frames: Sequence[Frame], config: WindowConfig) -> Tensor:
    """Resized frames, float32 [T, C, H, W], over what counts as 1, or normalised; bilinear without
    antialiasing, as published.

    Frames are resized one by one and divided by 255 afterwards: 4 frames of 1280 x 720 to 224 x 224 take 3 ms
    of a core instead of 38.

    Args:
        frames: arrays [H, W, C]; or tensors [3, H, W], which are frames that were resized before.
    """
    if isinstance(frames[0], Tensor):
        return torch.stack([torch.as_tensor(frame) for frame in frames])
    small = []
    for frame in frames:
        whole = torch.as_tensor(frame).permute(2, 0, 1)[None].float()
        small.append(F.interpolate(whole, size=config.size, mode="bilinear", align_corners=False))
    pixels = torch.cat(small) / STORED_RANGES[torch.as_tensor(frames[0]).dtype]
    if config.normalize:
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = (pixels - mean) / std
    return pixels


def windows(
    frames: Iterable[Frame],
    config: WindowConfig,
    prepare: Callable[[list[Frame]], Iterable[Tensor]] | None = None,
    unit: int = 1,
) -> Iterator[list[Tensor]]:
    """Windows of a video, in order. Each frame is prepared once, and at most the frames of one window are
    kept.

    Args:
        prepare: function of some consecutive frames that gives a tensor for each `unit` of them; None means
            `resized`, a tensor [3, H, W] for each frame.
        unit: frames of a tensor; divides the frames of a window and the step.

    Yields:
        Tensors of a window.
    """
    prepare = prepare or (lambda some: resized(some, config))
    held: list[Tensor] = []
    waiting: list[Frame] = []
    first = 0  # index of the first frame in `held`
    for number, frame in enumerate(frames):
        if number >= first:  # a step longer than a window skips frames
            waiting.append(frame)
        if waiting and unit * len(held) + len(waiting) == config.frames:
            held += prepare(waiting)
            waiting = []
            yield held
            held = held[config.step // unit :]
            first += config.step


@dataclass(frozen=True, eq=False)
class VideoFeatures:
    """Features of the windows of a video. `features, times = result` unpacks it, and numpy takes it as an
    array of its features.

    Attributes:
        features: float32 [windows, D].
        frames: int64 [windows, 2], the first frame of each window and the one after its last.
        fps: frames a second; None where they are not known.
    """

    features: np.ndarray
    frames: np.ndarray
    fps: float | None = None

    @property
    def times(self) -> np.ndarray | None:
        """Start and end of each window in seconds, float64 [windows, 2]; None without `fps`."""
        return None if self.fps is None else self.frames / self.fps

    @property
    def shape(self) -> tuple[int, ...]:
        return self.features.shape

    def __iter__(self) -> Iterator[np.ndarray | None]:
        yield from (self.features, self.times)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        wanted = self.features.dtype if dtype is None else np.dtype(dtype)
        if copy or wanted != self.features.dtype:
            return self.features.astype(wanted)
        return self.features


Video = VideoEntry | np.ndarray  # an array is uint8 [T, H, W, 3], see `check_frames`


def window_config(model: Classifier, *, step: int, normalize: bool = False, dtype: str) -> WindowConfig:
    """Windows of the model's own frames and size. A model of other channels or statistics than ImageNet's
    normalises by itself, always."""
    own = model.config
    normalize = normalize and own.has_imagenet_pixels
    return WindowConfig(frames=own.num_frames, step=step, size=own.image_hw, normalize=normalize, dtype=dtype)


def extract(
    model: Classifier, entry: VideoEntry, config: WindowConfig, *, batch_size: int, device: torch.device
) -> np.ndarray:
    """Features of a video, float32 [windows, D].

    Raises:
        DecodeError: the video cannot be decoded, or is shorter than a window.
    """
    (found,) = extract_videos(model, [entry], config, batch_size=batch_size, device=device)
    if isinstance(found, DecodeError):
        raise found
    return found


def extract_videos(
    model: Classifier,
    entries: Sequence[VideoEntry],
    config: WindowConfig,
    *,
    batch_size: int,
    device: torch.device,
) -> Iterator[np.ndarray | DecodeError]:
    """Features of each video, float32 [windows, D], in order; or its error. A worker process decodes ahead,
    and a batch holds windows of one video; see `features_of`."""
    for found in embed_videos(model, entries, config, batch_size=batch_size, device=device):
        yield found if isinstance(found, DecodeError) else found.features


def embed_videos(
    model: Classifier,
    videos: Sequence[Video],
    config: WindowConfig,
    *,
    batch_size: int,
    device: torch.device,
) -> Iterator[VideoFeatures | DecodeError]:
    """Features of the windows of each video, in order; or its error. A worker process decodes files ahead;
    see `features_of`. Where there are files, a batch holds windows of one video only."""
    chunk = max(_STREAM_BYTES // (12 * math.prod(config.size)), 1)
    entries = [video for video in videos if isinstance(video, VideoEntry)]
    check_all_frames(entries, "extraction of features")
    rates: dict[int, float | None] = {}
    read = functools.partial(_read_frames, config=config, channels=model.config.in_channels)
    files = guarded_streams(read, entries, chunk=chunk)
    streams = (
        _noted(number, next(files), rates)
        if isinstance(video, VideoEntry)
        else _array_frames(video, number, config)
        for number, video in enumerate(videos)
    )
    results = features_of(model, streams, config, batch_size=batch_size, device=device, apart=bool(entries))
    for number, found in enumerate(results):
        if isinstance(found, DecodeError):
            yield found
            continue
        starts = np.arange(len(found), dtype=np.int64) * config.step
        spans = np.stack([starts, starts + config.frames], axis=1)
        yield VideoFeatures(found.numpy(), spans, rates.pop(number, None))


@dataclass(frozen=True)
class _Rate:
    """Frames a second of a video, before its frames."""

    fps: float | None


def _read_frames(entry: VideoEntry, config: WindowConfig, channels: int) -> Iterator[_Rate | Tensor]:
    """The rate of a video, then its resized frames, float32 [C, H, W] each; see `resized`."""
    with open_video(entry) as reader:
        reader.channels = channels
        _check_length(len(reader), entry.path, config)
        yield _Rate(reader.fps)
        for frame in reader.iterate():
            yield resized([frame], config)[0]


def _noted(number: int, items: Iterable[_Rate | Tensor], rates: dict[int, float | None]) -> Iterator[Tensor]:
    """Frames of the video `number`; its rate goes into `rates`."""
    for item in items:
        if isinstance(item, _Rate):
            rates[number] = item.fps
        else:
            yield item


def _array_frames(frames: np.ndarray, number: int, config: WindowConfig) -> Iterator[np.ndarray]:
    _check_length(len(frames), f"frames of video {number}", config)
    yield from frames


def _check_length(frames: int, name: str, config: WindowConfig) -> None:
    if not config.starts(frames):
        raise DecodeError(f"{name}: has {frames} frames, fewer than a window of {config.frames}")


def features_of(
    model: Classifier,
    videos: Iterable[Iterable[Frame]],
    config: WindowConfig,
    *,
    batch_size: int,
    device: torch.device,
    apart: bool = False,
) -> Iterator[Tensor | DecodeError]:
    """Features of each video, float32 [windows, D] on the CPU, in order; or the error met while reading its
    frames.

    While a GPU works on a batch, the windows of the next one are read: results are fetched one batch late.
    A batch holds `batch_size` windows: the last windows of a video and the first of the next one share a
    batch. Where the step lets windows share tubelets, each tubelet is embedded once: the patch embedding does
    not depend on the tubelet's position in the window. The blocks do, so their work is not shared.

    Args:
        videos: frames of each video, see `resized`.
        apart: a batch holds windows of one video only. The last bits of features depend on what else is in
            their batch; so they depend on no other video.
    """
    shares = config.step < config.frames and config.step % model.config.tubelet_size == 0
    windows_of = _embedded if shares else _clips
    waiting: list[tuple[int, Tensor]] = []
    running: list[tuple[list[int], LateNumbers]] = []  # videos and features of the batch launched last
    done: dict[int, list[Tensor]] = {}  # features of each window, by video; videos in order
    errors: dict[int, DecodeError] = {}

    def flush() -> None:
        clips = torch.stack([clip for _, clip in waiting])
        launched = ([video for video, _ in waiting], _features(model, clips, config, shares))
        waiting.clear()
        collect()
        running.append(launched)

    def collect() -> None:
        for videos_of_batch, late in running:
            found = late.wait()
            if found.isnan().any():
                raise InputError(f"features are not numbers (NaN); {NO_NUMBERS}")
            for video, features in zip(videos_of_batch, found):
                done[video].append(features)
        running.clear()

    def complete(before: int) -> Iterator[Tensor | DecodeError]:
        """Results of the videos before this one that have no window left in `running`; none of them has one
        in `waiting`."""
        before = min([before, *(video for videos_of_batch, _ in running for video in videos_of_batch)])
        while done and (video := next(iter(done))) < before:
            features = done.pop(video)
            if video in errors:
                yield errors.pop(video)
            elif features:
                yield torch.stack(features)
            else:
                yield torch.empty(0, model.config.embed_dim)

    number = -1
    for number, frames in enumerate(videos):
        done[number] = []
        try:
            for clip in windows_of(model, frames, config, device):
                waiting.append((number, clip))
                if len(waiting) == batch_size:
                    flush()
                    yield from complete(number)
        except DecodeError as error:
            errors[number] = error
            waiting = [(video, clip) for video, clip in waiting if video != number]
        if waiting and apart:
            flush()
        if not waiting:
            yield from complete(number + 1)
    if waiting:
        flush()
    collect()
    yield from complete(number + 1)


def _clips(
    model: Classifier, frames: Iterable[Frame], config: WindowConfig, device: torch.device
) -> Iterator[Tensor]:
    """Clip of each window, float32, as the model takes it."""
    for window in windows(frames, config):
        yield sent(_laid_out(torch.stack(window, dim=1), model), device)


def _laid_out(clip: Tensor, model: Classifier) -> Tensor:
    """[C, T, H, W], or of a model that normalises by itself [T, H, W, C]."""
    return clip if model.config.has_imagenet_pixels else clip.permute(1, 2, 3, 0)


def _embedded(
    model: Classifier, frames: Iterable[Frame], config: WindowConfig, device: torch.device
) -> Iterator[Tensor]:
    """Embedded tubelets of each window, [N, D], before positions are added."""

    @torch.inference_mode()
    def embed(some: list[Frame]) -> Iterable[Tensor]:
        clip = _laid_out(sent(resized(some, config), device).transpose(0, 1), model)[None]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            return model.embed(clip)[0].chunk(len(some) // model.config.tubelet_size)

    for window in windows(frames, config, embed, model.config.tubelet_size):
        yield torch.cat(window)


@torch.inference_mode()
def _features(model: Classifier, clips: Tensor, config: WindowConfig, embedded: bool) -> LateNumbers:
    """Features of a batch of windows, float32 [B, D], on their way to the CPU."""
    features_of_batch = model.features_of_embedded if embedded else model.features
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return LateNumbers(features_of_batch(clips).float())


# --- the command --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument(
        "data",
        metavar="LIST|DIR|VIDEO",
        help="a list of videos, an index of shards, a folder of videos, or one",
    )
    parser.add_argument("--data-root", metavar="DIR", help="folder at which the list's relative paths start")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the features, NAME.npy for each video"
    )
    add_model_arguments(parser, views=False)
    result = parser.add_argument_group("settings that change results")
    result.add_argument(
        "--like", choices=list(PUBLISHED_STEPS), default="thumos14", help="published step: 4, or 16 frames"
    )
    result.add_argument(
        "--step",
        type=limits(WindowConfig, "step"),
        help="frames from one window to the next, instead of --like",
    )
    result.add_argument(
        "--normalize",
        action="store_true",
        help="normalise with ImageNet's mean and standard deviation (published: not)",
    )
    add_settings(result, TrainingConfig, "dtype")
    add_part_arguments(parser)
    speed = parser.add_argument_group("settings that change speed only")
    speed.add_argument("--batch-size", type=BATCH, default=8, help="windows at once (8)")
    add_settings(speed, RunConfig, "device")
    add_settings(speed, SpeedConfig, "backend attention")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code is 1 where a video could not be decoded."""
    if args.merge:
        take_cpu(args)
    with open_parallel("auto", args.device, timeout=PATIENCE) as parallel:
        check_backend(args.backend, parallel.device)
        folder = Path(args.output)
        check_output(folder)
        entries = find_videos(args.data, args.data_root)
        targets = name_targets(entries, folder)
        loaded = load_from_args(args, head=False, backend=args.backend, attention=args.attention)
        model = loaded.model.to(parallel.device)
        step = args.step
        if step is None:
            step = PUBLISHED_STEPS[args.like]
        config = window_config(model, step=step, normalize=args.normalize, dtype=args.dtype)
        place = PartFolder(
            folder, args.part, "features being made", "features of other weights or windows", SETTINGS
        )
        own = place.share(len(entries))
        with place.hold(parallel, merge=args.merge):
            of_parts = {"videos": len(entries), "list": list_hash(entries)}
            about = features_identity(config, model)
            parallel.on_main(lambda: place.settle(about, of_parts, checkpoint=str(loaded.path)))
            sources = {targets[number]: entries[number] for number in own}
            parallel.on_main(lambda: settle_sources(place, sources))
            if parallel.is_main:
                print(loaded.note, flush=True)
            failed: dict[str, str] = {}
            if not args.merge:
                mine = [(entries[number], targets[number]) for number in own]
                failed = extract_all(
                    model,
                    mine[parallel.rank :: parallel.world_size],
                    config,
                    batch_size=args.batch_size,
                    device=parallel.device,
                    show=parallel.is_main,
                )
                failed = dict(pair for some in parallel.gather(failed) for pair in some.items())
            return parallel.on_main(lambda: _finish(place, targets, own, failed, merge=args.merge))


def _finish(
    place: PartFolder, targets: Sequence[Path], own: Sequence[int], failed: dict[str, str], *, merge: bool
) -> int:
    """Write down and print what could not be decoded; the command's exit code.

    Args:
        targets: file of each video's features.
        own: numbers of this part's videos.
        failed: why a video cannot be decoded, by the name of its file of features.
        merge: take that from the parts, and see that no other video is missing.
    """
    if merge:
        for folder in (place.folder, *place.folders()):
            failed |= _read_undecodable(folder)
        made = {number for number, path in enumerate(targets) if path.name in failed or path.exists()}
        place.check_complete(len(targets), made, "videos")
    names = {targets[number].name for number in own}
    bad = {path.name: failed[path.name] for path in (targets[number] for number in own) if not path.exists()}
    others = {name: error for name, error in _read_undecodable(place.own).items() if name not in names}
    lines = [json.dumps({"file": name, "error": error}) + "\n" for name, error in {**others, **bad}.items()]
    if lines:
        write_atomically(place.own / UNDECODABLE, lambda file: file.writelines(lines), binary=False)
    else:
        (place.own / UNDECODABLE).unlink(missing_ok=True)
    if merge:
        place.remove_parts()
    for error in bad.values():
        print(f"cannot be decoded: {error}")
    part = "" if place.part.whole else f"part {place.part}: "
    print(
        f"{part}{len(own) - len(bad)} videos in {place.folder}"
        + (f", {len(bad)} cannot be decoded" if bad else "")
    )
    return 1 if bad else 0


def _read_undecodable(folder: Path) -> dict[str, str]:
    records = read_json_lines(folder / UNDECODABLE, file=str, error=str).records
    return {record["file"]: record["error"] for record in records}


def extract_all(
    model: Classifier,
    pairs: Sequence[tuple[VideoEntry, Path]],
    config: WindowConfig,
    *,
    batch_size: int,
    device: torch.device,
    show: bool = True,
) -> dict[str, str]:
    """Write the features of each video that has none yet, each file at once and whole.

    Args:
        pairs: each video, and the file of its features.

    Returns:
        Errors of the videos that cannot be decoded, by the name of the file.
    """
    left = [(entry, path) for entry, path in pairs if not path.exists()]
    videos = extract_videos(model, [entry for entry, _ in left], config, batch_size=batch_size, device=device)
    failed = {}
    with tqdm(zip(left, videos), total=len(left), desc="features", unit="video", disable=not show) as bar:
        for (_, path), found in bar:
            if isinstance(found, DecodeError):
                failed[path.name] = str(found)
                continue
            write_atomically(path, functools.partial(np.save, arr=found))
            bar.set_postfix(windows=len(found))
    return failed


def find_videos(data: str, data_root: str | None) -> Sequence[VideoEntry]:
    """Entries of a list, of an index of shards, of a folder of videos (by suffix, see
    `vmae.data.video_files`), or of one video.

    Raises:
        InputError: there is no video; see also `read_list` and `index_at`.
    """
    index = index_at(data, data_root)
    if index is not None:
        check_all_frames(index, "extraction of features")
        return index
    path = Path(data)
    kind = path_kind(path)
    if is_video(path) and kind != "a folder":
        if kind is None:
            raise InputError(f"video {data} does not exist")
        return [VideoEntry(data)]
    return read_list(data, data_root)


def name_targets(entries: Sequence[VideoEntry], folder: Path) -> list[Path]:
    """`folder/NAME.npy` for each video. NAME is the file name up to its last dot, as published; for a frame
    folder, the folder's whole name.

    Raises:
        InputError: two videos have the same name.
    """
    names: dict[str, str] = {}
    for entry in entries:
        path = Path(entry.path)
        name = path.stem if entry.kind == "video" else path.name
        if name in names:
            raise InputError(
                f"{names[name]} and {entry.path} would both become {name}.npy; give them names of their own"
            )
        names[name] = entry.path
    return [folder / f"{name}.npy" for name in names]


def features_identity(config: WindowConfig, model: Classifier) -> dict[str, Any]:
    """What decides the features of a video; they do not depend on the head."""
    return {
        "windows": {**config.__dict__, "size": list(config.size)},
        **model_identity(model, without=("head.",)),
    }


def settle_sources(place: PartFolder, videos: dict[Path, VideoEntry]) -> None:
    """Write the videos of this part's features, or check that existing features are of the same.

    Args:
        videos: video by the file of its features; new ones are added to those of earlier starts.

    Raises:
        InputError: a file holds the features of another video of the same name.
    """
    known = {name: own for folder in place.folders() for name, own in _read_sources(folder).items()}
    known |= _read_sources(place.folder)
    sources = {path.name: frames_identity(entry) for path, entry in videos.items()}
    for path in videos:
        if path.exists() and known.get(path.name) != sources[path.name]:
            of = f"a video that {SOURCES} does not name"
            if path.name in known:
                of, *_ = known[path.name]
            own, *_ = sources[path.name]
            raise InputError(f"{path} is of {of}, not of {own}; choose another --output, or remove the file")
    text = json.dumps({**_read_sources(place.own), **sources}) + "\n"
    write_atomically(place.own / SOURCES, lambda file: file.write(text), binary=False)


def _read_sources(folder: Path) -> dict[str, list]:
    """Identity of the frames behind each file of features (`frames_identity`), by file name."""
    path = folder / SOURCES
    found = read_json(path, "table of videos") if path.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(own, list) and own for own in found.values()):
        raise InputError(f"cannot use {folder}: {SOURCES} is no table of videos")
    return found


def read_features(path: str | Path) -> np.ndarray:
    """Features of a file, float32 [windows, D].

    Raises:
        InputError: the file can't be read, or holds something else.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"features {path} cannot be read: {error}") from None
    if found.ndim != 2:
        raise InputError(f"features {path}: expected [windows, D], found {list(found.shape)}")
    return found
