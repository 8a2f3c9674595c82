"""`python -m vmae moving-segments OUT`: videos of several motions one after another, for temporal detection.

The shapes are those of `vmae.synthetic.moving_shapes`. A video is rest, motion, rest, motion, ..., rest.
Which motion, how long and how fast is drawn for each part, and each part starts where the one before ended.
So neither a single frame nor the time since the start tells what happens. Beside the videos: the dataset file
that ActionFormer reads, and short clips of a single motion (or of rest) with their list, to fine-tune a
classifier for features.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import methodcaller
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vmae.config import _Checked
from vmae.data.write_video import write_video
from vmae.errors import InputError
from vmae.evaluate.temporal import Segment, write_actionformer
from vmae.files.atomic import write_atomically
from vmae.settings import COUNT, SEED, Whole, limits, ranged
from vmae.synthetic.moving_shapes import VELOCITIES, render_states

FPS = 12
REST = "rest"
SPLITS = ("training", "test")
# What a model of a million parameters learns from nothing in a minute on a CPU: no turning.
MOTIONS = ("left", "right", "up", "down", "grow", "shrink")
_SPEEDS = (0.035, 0.07)  # circles a frame: after 14 to 29 frames a shape is back where it was
_REST_S, _MOTION_S = (0.5, 2.0), (1.0, 4.0)
_START, _PARTS, _CLIP = 100, 101, 102  # purposes of random numbers; those of moving shapes are smaller


@dataclass(frozen=True, kw_only=True)
class SegmentsConfig(_Checked):
    """How many videos of which size; the same videos for the same settings.

    Attributes:
        size: side of the square videos in pixels, even.
        seconds: of a video of several motions.
        training, test: videos of several motions.
        clips: short ones of each motion, and of rest.
        clip_frames: of a short one.
        motions: that occur, each a class.
        seed: of everything random.
    """

    size: int = ranged(32, Whole(16, 4096))
    seconds: int = ranged(20, Whole(1, 100_000))
    training: int = ranged(60, COUNT)
    test: int = ranged(20, COUNT)
    clips: int = ranged(200, COUNT)
    clip_frames: int = ranged(12, Whole(2, 100_000))
    motions: tuple[str, ...] = MOTIONS
    seed: int = ranged(0, SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 2:
            raise InputError(f"size must be even, not {self.size}")
        least = 2 * _REST_S[1] + _MOTION_S[1]
        if self.seconds < least:
            raise InputError(
                f"videos of {self.seconds} s are too short for a motion between rests: at least {least:.0f} s"
            )
        if unknown := [motion for motion in self.motions if motion not in VELOCITIES]:
            raise InputError(f"unknown motions: {', '.join(unknown)}; known: {', '.join(VELOCITIES)}")
        if len(set(self.motions)) != len(self.motions) or not self.motions:
            raise InputError("needs at least one motion, and none of them twice")


@dataclass(frozen=True)
class Part:
    """Frames `first` to `end` (not included) of a video: from each of them to the next the state moves by
    `speed` circles."""

    motion: str
    first: int
    end: int
    speed: float = 0.0

    def segment(self, video: str) -> Segment:
        """Of the dataset file, in seconds."""
        return Segment(video, self.first / FPS, self.end / FPS, self.motion)


def _rng(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose,)))


def timeline(config: SegmentsConfig, seed: int) -> list[Part]:
    """The parts of a video, in order, rest first and last; they cover every frame once."""
    rng = _rng(seed, _PARTS)
    parts: list[Part] = []
    at = 0  # frame that the next part begins with
    last = config.seconds * FPS - round(FPS * _REST_S[0])  # frame by which the last motion has ended
    while True:
        rest, moving = (round(FPS * rng.uniform(*span)) for span in (_REST_S, _MOTION_S))
        motion, speed = config.motions[int(rng.integers(len(config.motions)))], rng.uniform(*_SPEEDS)
        if at + rest + moving > last:
            return [*parts, Part(REST, at, config.seconds * FPS)]
        parts += [Part(REST, at, at + rest), Part(motion, at + rest, at + rest + moving, speed)]
        at += rest + moving


def clip_part(config: SegmentsConfig, motion: str, seed: int) -> Part:
    """The one part of a short clip."""
    speed = 0.0
    if motion != REST:
        speed = _rng(seed, _CLIP).uniform(*_SPEEDS)
    return Part(motion, 0, config.clip_frames, speed)


def states_of(parts: Sequence[Part], seed: int) -> np.ndarray:
    """float64 [frames, 4] in [0, 1): place along x and y, angle, size; the first depends on `seed` only."""
    moved = np.zeros((parts[-1].end, 4))  # from each frame to the next
    for part in parts:
        moved[part.first : part.end] = part.speed * np.asarray(VELOCITIES.get(part.motion, (0, 0, 0, 0)))
    travelled = np.concatenate([np.zeros((1, 4)), np.cumsum(moved[:-1], 0)])
    return (_rng(seed, _START).random(4) + travelled) % 1.0


def plan(config: SegmentsConfig) -> tuple[dict[str, list[Part]], dict[str, int], dict[str, int]]:
    """Videos of several motions: name -> parts. Clips: name -> label (number in `motions`, then rest). All:
    name -> seed."""
    seeds = {
        f"{split}_{i:04}": zlib.crc32(split.encode()) << 32 | config.seed << 64 | i
        for split, count in (
            *((s, getattr(config, s)) for s in SPLITS),
            ("clip", config.clips * (len(config.motions) + 1)),
        )
        for i in range(count)
    }
    several = {name: timeline(config, seed) for name, seed in seeds.items() if not name.startswith("clip_")}
    clips = {name: int(name[5:]) % (len(config.motions) + 1) for name in seeds if name.startswith("clip_")}
    return several, clips, seeds


def write_segments_world(folder: str | Path, config: SegmentsConfig) -> dict[str, Path]:
    """Make `folder/videos/NAME.mp4` and `folder/clips/NAME.mp4` and the lists; what is there already stays.

    Returns:
        Where each is: `videos` (a folder), `dataset` (ActionFormer's JSON, its subsets "training" and
            "test"), `clips` (list
        of `path label` lines), `classes` (a name a line, rest last).

    Raises:
        InputError: the folder holds other videos, or cannot be written.
    """
    folder = Path(folder)
    _claim(folder, config)
    several, clips, seeds = plan(config)
    names = [*config.motions, REST]
    shown = {f"videos/{name}": parts for name, parts in several.items()}
    shown |= {
        f"clips/{name}": [clip_part(config, names[label], seeds[name])] for name, label in clips.items()
    }
    for name, parts in tqdm(shown.items(), unit="video", disable=None):
        path, seed = folder / f"{name}.mp4", seeds[Path(name).name]
        if not path.exists():
            write_video(path, render_states(states_of(parts, seed), config.size, seed), fps=FPS)
    truth = [part.segment(name) for name, parts in several.items() for part in parts if part.motion != REST]
    about = {name: (float(config.seconds), float(FPS)) for name in several}
    write_actionformer(folder / "dataset.json", truth, about, {name: name.split("_")[0] for name in several})
    texts = {"clips": [f"clips/{name}.mp4 {label}" for name, label in clips.items()], "classes": names}
    for name, lines in texts.items():
        text = "\n".join(lines) + "\n"
        write_atomically(folder / f"{name}.txt", methodcaller("write", text), binary=False)
    return {
        "videos": folder / "videos",
        "dataset": folder / "dataset.json",
        **{n: folder / f"{n}.txt" for n in texts},
    }


def _claim(folder: Path, config: SegmentsConfig) -> None:
    about, text = folder / "segments.json", json.dumps(asdict(config)) + "\n"
    try:
        if about.exists() and about.read_text(encoding="utf-8") != text:
            raise InputError(f"{folder} holds videos of other settings ({about}); choose another folder")
        for name in ("videos", "clips"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        about.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {str(folder)!r}: {error.strerror}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("output", metavar="OUT", help="folder for the videos and their lists")
    helps = {
        "size": "side of the videos in pixels",
        "seconds": "of a video of several motions",
        "training": "videos of several motions to train a detector",
        "test": "videos of several motions to test it",
        "clips": "short clips of each motion, for a classifier",
        "clip_frames": "frames of a short clip",
        "seed": "of everything random",
    }
    for name, text in helps.items():
        default = getattr(SegmentsConfig, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=limits(SegmentsConfig, name),
            default=default,
            help=f"{text} ({default})",
        )
    known = ", ".join(VELOCITIES)
    text = f"of {known} (default: {' '.join(MOTIONS)})"
    parser.add_argument("--motions", nargs="+", default=list(MOTIONS), metavar="MOTION", help=text)


def run(args: argparse.Namespace) -> None:
    """The command."""
    names = ("size", "seconds", "training", "test", "clips", "clip_frames", "seed")
    config = SegmentsConfig(motions=tuple(args.motions), **{name: getattr(args, name) for name in names})
    for name, path in write_segments_world(args.output, config).items():
        print(f"{name}: {path}")
