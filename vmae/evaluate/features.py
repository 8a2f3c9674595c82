"""`python -m vmae features`: what a fine-tuned encoder sees in each window of a video, for temporal
detection.

As published for THUMOS14 and FineAction (VideoMAE V2, section 4.4, and its released script): windows of 16
frames that follow each other, frames stretched to a square, values in [0, 1] and not normalised, the pooled
features before the head. `DIR/VIDEO.npy` is float32 [windows, D]; ActionFormer reads it as it is. Each frame
is decoded and resized once, each tubelet embedded once where windows share tubelets, and windows go through
the model in batches.
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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vmae.checkpoint.identity import frames_identity, model_identity, settle
from vmae.checkpoint.load import NO_NUMBERS, add_model_arguments, load_from_args
from vmae.config import DTYPE, IMAGENET_MEAN, IMAGENET_STD, SpeedConfig, _Checked
from vmae.data.decode import DecodeError, open_video
from vmae.data.files import path_kind
from vmae.data.guarded import guarded_streams
from vmae.data.manifest import VideoEntry, read_list
from vmae.data.video_files import is_video
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import read_json
from vmae.flags import add_settings
from vmae.model import Classifier
from vmae.settings import BATCH, FRAMES, SIDE, STRIDE, limits, ranged
from vmae.train.checks import check_backend, check_output
from vmae.train.parallel import open_parallel
from vmae.train.pretrain_settings import RunConfig, TrainingConfig

SETTINGS, SOURCES = "features.json", "videos.json"
PUBLISHED_STEPS = {"thumos14": 4, "fineaction": 16}
_STREAM_BYTES = 8 << 20  # of frames that travel at once from the worker: shared memory may be 64 MiB in all


@dataclass(frozen=True, kw_only=True)
class WindowConfig(_Checked):
    """Which windows, and how they are seen; all of it changes results.

    Attributes:
        frames: of a window, one after the other: the model's.
        step: frames from one window's start to the next.
        size: (height, width) that frames are stretched to: the model's.
        normalize: subtract ImageNet's mean and divide by its deviation; the published features do not.
        dtype: "float32" or "bfloat16" (autocast).
    """

    frames: int = ranged(within=FRAMES)
    step: int = ranged(within=STRIDE)
    size: tuple[int, int] = ranged(within=SIDE)
    normalize: bool = False
    dtype: str = ranged("float32", DTYPE)

    def starts(self, total: int) -> range:
        """First frames of the windows of a video of `total` frames: all that fit, as published."""
        return range(0, total - self.frames + 1, self.step)


def resized(frames: Sequence[np.ndarray | Tensor], config: WindowConfig) -> Tensor:
    """float32 [T, 3, H, W] in [0, 1] (or normalised), from uint8 frames: bilinear without antialiasing, as
    published. Tensors [3, H, W] are frames that were resized before.

    Frame by frame, and divided when small: 4 frames of 1280 x 720 to 224 x 224 take 3 ms of a core instead of
    38.
    """
    if isinstance(frames[0], Tensor):
        return torch.stack(frames)
    whole = (torch.from_numpy(frame).permute(2, 0, 1)[None].float() for frame in frames)
    pixels = (
        torch.cat(
            [F.interpolate(one, size=config.size, mode="bilinear", align_corners=False) for one in whole]
        )
        / 255
    )
    if config.normalize:
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = (pixels - mean) / std
    return pixels


def windows(
    frames: Iterable[np.ndarray],
    config: WindowConfig,
    prepare: Callable[[list[np.ndarray]], Iterable[Tensor]] | None = None,
    unit: int = 1,
) -> Iterator[list[Tensor]]:
    """The windows of a video, in order; every frame is prepared once, and no more than a window's frames are
    kept.

    Args:
        prepare: gets some frames that follow each other and gives a tensor for every `unit` of them, which
            divides window and step; `resized`, if None: [3, H, W] of each frame.

    Yields:
        The tensors of a window.
    """
    prepare = prepare or (lambda some: resized(some, config))
    held: list[Tensor] = []
    waiting: list[np.ndarray] = []
    first = 0  # number of the first frame in `held`
    for number, frame in enumerate(frames):
        if number >= first:  # steps over a window's length leave frames out
            waiting.append(frame)
        if waiting and unit * len(held) + len(waiting) == config.frames:
            held += prepare(waiting)
            waiting = []
            yield held
            held = held[config.step // unit :]
            first += config.step


def extract(
    model: Classifier, entry: VideoEntry, config: WindowConfig, *, batch_size: int, device: torch.device
) -> np.ndarray:
    """float32 [windows, D] of a video.

    Raises:
        DecodeError: it cannot be decoded, or is shorter than a window.
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
    """float32 [windows, D] of each video in order, or what is wrong with it; see `features_of`. A worker
    decodes ahead."""
    chunk = max(_STREAM_BYTES // (12 * math.prod(config.size)), 1)
    videos = guarded_streams(functools.partial(_read_frames, config=config), entries, chunk=chunk)
    for found in features_of(model, videos, config, batch_size=batch_size, device=device):
        yield found if isinstance(found, DecodeError) else found.numpy()


def _read_frames(entry: VideoEntry, config: WindowConfig) -> Iterator[Tensor]:
    """float32 [3, H, W] of every frame; see `resized`."""
    with open_video(entry) as reader:
        if not config.starts(len(reader)):
            raise DecodeError(
                f"{entry.path}: has {len(reader)} frames, fewer than a window of {config.frames}"
            )
        for frame in reader.iterate():
            yield resized([frame], config)[0]


def features_of(
    model: Classifier,
    videos: Iterable[Iterable[np.ndarray | Tensor]],
    config: WindowConfig,
    *,
    batch_size: int,
    device: torch.device,
) -> Iterator[Tensor | DecodeError]:
    """float32 [windows, D], on the CPU, of each video's frames (see `resized`); or the error met while
    reading them.

    Windows go through the model `batch_size` at once, those of a video's end with those of the next one's
    start. A tubelet is embedded once for all windows that it is in, where the step lets windows share
    tubelets: patch embedding is the same everywhere, positions come later. What follows sees positions, and
    can't be shared.
    """
    shares = config.step < config.frames and config.step % model.config.tubelet_size == 0
    waiting: list[tuple[int, Tensor]] = []
    found: dict[int, list[Tensor] | DecodeError] = {}  # of videos that were begun, in order

    def flush() -> None:
        clips = torch.stack([clip for _, clip in waiting])
        for (number, _), features in zip(waiting, _features(model, clips, config, shares)):
            found[number].append(features)
        waiting.clear()

    def ready(before: int) -> Iterator[Tensor | DecodeError]:
        """What is complete of the videos before this one."""
        while found and (number := next(iter(found))) < before:
            own = found.pop(number)
            yield (
                own
                if isinstance(own, DecodeError)
                else torch.stack(own)
                if own
                else torch.empty(0, model.config.embed_dim)
            )

    number = -1
    for number, frames in enumerate(videos):
        found[number] = []
        try:
            for clip in (_embedded if shares else _clips)(model, frames, config, device):
                waiting.append((number, clip))
                if len(waiting) == batch_size:
                    flush()
                    yield from ready(number)
        except DecodeError as error:
            found[number] = error
            waiting = [(video, clip) for video, clip in waiting if video != number]
        if not waiting:
            yield from ready(number + 1)
    if waiting:
        flush()
    yield from ready(number + 1)


def _clips(
    model: Classifier, frames: Iterable[np.ndarray], config: WindowConfig, device: torch.device
) -> Iterator[Tensor]:
    """[3, T, H, W] of each window."""
    for window in windows(frames, config):
        yield torch.stack(window, dim=1).to(device)


def _embedded(
    model: Classifier, frames: Iterable[np.ndarray], config: WindowConfig, device: torch.device
) -> Iterator[Tensor]:
    """[N, D] of each window, before positions."""

    @torch.inference_mode()
    def embed(some: list[np.ndarray]) -> Iterable[Tensor]:
        clip = resized(some, config).to(device).transpose(0, 1)[None]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            return model.embed(clip)[0].chunk(len(some) // model.config.tubelet_size)

    for window in windows(frames, config, embed, model.config.tubelet_size):
        yield torch.cat(window)


@torch.inference_mode()
def _features(model: Classifier, clips: Tensor, config: WindowConfig, embedded: bool) -> Tensor:
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        found = (model.features_of_embedded(clips) if embedded else model.features(clips)).float().cpu()
    if found.isnan().any():
        raise InputError(f"features are no numbers (NaN); {NO_NUMBERS}")
    return found


# --- the command --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("data", metavar="LIST|DIR|VIDEO", help="a list of videos, a folder of them, or one")
    parser.add_argument("--data-root", metavar="DIR", help="where the list's relative paths start")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the features, NAME.npy for each video"
    )
    add_model_arguments(parser)
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
        "--normalize", action="store_true", help="ImageNet's mean and deviation; published: none"
    )
    add_settings(result, TrainingConfig, "dtype")
    speed = parser.add_argument_group("settings that change speed only")
    speed.add_argument("--batch-size", type=BATCH, default=8, help="windows at once (8)")
    add_settings(speed, RunConfig, "device")
    add_settings(speed, SpeedConfig, "backend attention")


def run(args: argparse.Namespace) -> int:
    """The command; 1 where a video could not be decoded."""
    with open_parallel("auto", args.device) as parallel:
        check_backend(args.backend, parallel.device)
        folder = Path(args.output)
        check_output(folder)
        entries = find_videos(args.data, args.data_root)
        targets = name_targets(entries, folder)
        loaded = load_from_args(args, backend=args.backend, attention=args.attention)
        model = loaded.model.to(parallel.device)
        step = PUBLISHED_STEPS[args.like] if args.step is None else args.step
        size = model.config.image_hw
        config = WindowConfig(
            frames=model.config.num_frames, step=step, size=size, normalize=args.normalize, dtype=args.dtype
        )
        with parallel.hold(folder, "features being made"):
            parallel.on_main(
                lambda: settle_folder(folder, config, model, dict(zip(targets, entries)), str(loaded.path))
            )
            if parallel.is_main:
                print(loaded.note, flush=True)
            mine = list(zip(entries, targets))[parallel.rank :: parallel.world_size]
            failed = extract_all(
                model, mine, config, batch_size=args.batch_size, device=parallel.device, show=parallel.is_main
            )
            bad = int(parallel.exchange([len(failed)]).sum())
    for line in failed:
        print(f"cannot be decoded: {line}")
    print(f"{len(entries) - bad} videos in {folder}" + (f", {bad} cannot be decoded" if bad else ""))
    return 1 if bad else 0


def extract_all(
    model: Classifier,
    pairs: Sequence[tuple[VideoEntry, Path]],
    config: WindowConfig,
    *,
    batch_size: int,
    device: torch.device,
    show: bool = True,
) -> list[str]:
    """Write the features of every video that has none yet, whole files only; the errors of those that cannot
    be decoded."""
    left = [(entry, path) for entry, path in pairs if not path.exists()]
    videos = extract_videos(model, [entry for entry, _ in left], config, batch_size=batch_size, device=device)
    failed = []
    with tqdm(zip(left, videos), total=len(left), desc="features", unit="video", disable=not show) as bar:
        for (_, path), found in bar:
            if isinstance(found, DecodeError):
                failed.append(str(found))
                continue
            write_atomically(path, lambda file, found=found: np.save(file, found))
            bar.set_postfix(windows=len(found))
    return failed


def find_videos(data: str, data_root: str | None) -> list[VideoEntry]:
    """Of a folder (by suffix, see `vmae.data.video_files`), one video, or a list.

    Raises:
        InputError: none there, or see `read_list`.
    """
    path = Path(data)
    kind = path_kind(path)
    if is_video(path) and kind != "a folder":
        if kind is None:
            raise InputError(f"video {data} does not exist")
        return [VideoEntry(data)]
    return read_list(data, data_root)


def name_targets(entries: Sequence[VideoEntry], folder: Path) -> list[Path]:
    """`folder/NAME.npy` of each, NAME as published: the file's, up to its last dot (a frame folder's own).

    Raises:
        InputError: two videos of the same name.
    """
    names: dict[str, str] = {}
    for entry in entries:
        name = Path(entry.path).stem if entry.kind == "video" else Path(entry.path).name
        if name in names:
            raise InputError(
                f"{names[name]} and {entry.path} would both become {name}.npy; give them names of their own"
            )
        names[name] = entry.path
    return [folder / f"{name}.npy" for name in names]


def settle_folder(
    folder: Path, config: WindowConfig, model: Classifier, videos: dict[Path, VideoEntry], checkpoint: str
) -> None:
    """Write what the features are of, or see that those that are there already are of the same.

    Args:
        videos: by the file of their features; others than those of an earlier start are added.

    Raises:
        InputError: the folder holds features of another model or of other windows, or of another video under
            a name.
    """
    # The head is behind the features.
    about = {
        "windows": {**config.__dict__, "size": list(config.size)},
        **model_identity(model, without=("head.",)),
    }
    settle(folder / SETTINGS, about, "features of other weights or windows", checkpoint=checkpoint)
    before, sources = (
        _read_sources(folder),
        {path.name: frames_identity(entry) for path, entry in videos.items()},
    )
    for path in videos:
        if path.exists() and before.get(path.name) != sources[path.name]:
            known = (
                f"is of {before[path.name][0]}"
                if path.name in before
                else f"is of a video that {SOURCES} does not name"
            )
            raise InputError(
                f"{path} {known}, not of {sources[path.name][0]}; choose another --output, or remove it"
            )
    text = json.dumps({**before, **sources}) + "\n"
    write_atomically(folder / SOURCES, lambda file: file.write(text), binary=False)


def _read_sources(folder: Path) -> dict[str, list]:
    """Which frames each file of features is of."""
    path = folder / SOURCES
    found = read_json(path, "table of videos") if path.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(own, list) and own for own in found.values()):
        raise InputError(f"cannot use {folder}: {SOURCES} is no table of videos")
    return found


def read_features(path: str | Path) -> np.ndarray:
    """float32 [windows, D] of a file.

    Raises:
        InputError: it can't be read, or holds something else.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"features {path} cannot be read: {error}") from None
    if found.ndim != 2:
        raise InputError(f"features {path}: expected [windows, D], found {list(found.shape)}")
    return found
