"""`python -m vmae moving-shapes OUT`: real H.264 videos whose class is a motion, so that a single frame says
nothing.

A textured shape moves on a textured background. Its state is four numbers on circles: place along x and y
(what leaves on one side comes in on the other), angle, and size (after the largest comes the smallest). A
class is a velocity on these circles, or the order of two. Starts are uniform, so every frame of every class
has the same distribution; videos of the same seed even start with the same picture, whatever their class.

Two label sets name the motions that they share differently, and share some videos, as Kinetics-400, 600 and
700 do.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from vmae.config import _Checked
from vmae.data.workers import WorkerPool
from vmae.data.write_video import write_video
from vmae.errors import InputError
from vmae.files.json_files import parse_json
from vmae.files.limits import whole_cores
from vmae.settings import COUNT, PROCESSES, SEED, Whole, limits, ranged

_D = 0.5**0.5
# Circles that a video passes at a speed of 1: (x, y, angle, size).
VELOCITIES: dict[str, tuple[float, float, float, float]] = {
    "left": (-1, 0, 0, 0),
    "right": (1, 0, 0, 0),
    "up": (0, -1, 0, 0),
    "down": (0, 1, 0, 0),
    "up_left": (-_D, -_D, 0, 0),
    "up_right": (_D, -_D, 0, 0),
    "down_left": (-_D, _D, 0, 0),
    "down_right": (_D, _D, 0, 0),
    "clockwise": (0, 0, 1, 0),
    "anticlockwise": (0, 0, -1, 0),
    "grow": (0, 0, 0, 1),
    "shrink": (0, 0, 0, -1),
}
ORDERS = ("slide_then_spin", "spin_then_slide")
MOTIONS = (*VELOCITIES, *ORDERS)

# Class names of two label sets: motion by name. Six motions are in both; four of these are named alike but
# for spelling.
LABEL_SETS: dict[str, dict[str, str]] = {
    "a": {
        "moving left": "left",
        "moving right": "right",
        "moving up": "up",
        "moving down": "down",
        "turning clockwise": "clockwise",
        "turning anticlockwise": "anticlockwise",
        "growing": "grow",
        "shrinking": "shrink",
        "sliding, then spinning": "slide_then_spin",
        "spinning, then sliding": "spin_then_slide",
    },
    "b": {
        "Moving_Left": "left",
        "Moving_Right": "right",
        "Growing": "grow",
        "Shrinking": "shrink",
        "rotation like a clock": "clockwise",
        "rotation against the clock": "anticlockwise",
        "drifting up and left": "up_left",
        "drifting up and right": "up_right",
        "drifting down and left": "down_left",
        "drifting down and right": "down_right",
    },
}
# What a person writes for `merge-labels --same`: names that mean the same and don't look alike.
SAME_NAMES = {
    "rotation like a clock": "turning clockwise",
    "rotation against the clock": "turning anticlockwise",
}
_LOOKS, _START, _SPEED = range(3)
_SPRITE, _RADII, _SPEEDS = (
    64,
    (0.28, 0.42),
    (0.5, 0.9),
)  # sprite's side in pixels; shares of the width; circles a clip
_POLYGONS = (  # asymmetric, so that an angle is seen; corners within the unit circle
    ((-0.6, -0.8), (0.1, -0.8), (0.1, 0.2), (0.7, 0.2), (0.7, 0.8), (-0.6, 0.8)),
    ((0.0, -1.0), (0.8, 0.0), (0.3, 0.0), (0.3, 0.9), (-0.3, 0.9), (-0.3, 0.0), (-0.8, 0.0)),
    ((-0.8, -0.8), (0.7, -0.7), (-0.6, 0.8)),
    (
        (-0.5, -0.9),
        (0.6, -0.9),
        (0.6, -0.4),
        (0, -0.4),
        (0, 0),
        (0.4, 0),
        (0.4, 0.4),
        (0, 0.4),
        (0, 0.9),
        (-0.5, 0.9),
    ),
)


@dataclass(frozen=True, kw_only=True)
class WorldConfig(_Checked):
    """How many videos of which size; the same world for the same settings.

    Attributes:
        size: side of the square videos in pixels, even.
        frames: of a video.
        unlabeled: videos for pre-training, of all motions.
        few: labelled videos of a class of set a, the target: few, as labels are dear.
        many: labelled videos of a class of set b.
        shared: of a class that both sets have: videos of set a's training, and of its validation, that set b
            lists too.
        validation: videos of a class of each set.
        seed: of everything random.
    """

    size: int = ranged(64, Whole(16, 4096))
    frames: int = ranged(24, Whole(2, 100_000))
    unlabeled: int = ranged(600, COUNT)
    few: int = ranged(8, COUNT)
    many: int = ranged(60, COUNT)
    shared: int = ranged(2, Whole(0, COUNT.most))
    validation: int = ranged(20, COUNT)
    seed: int = ranged(0, SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 2:
            raise InputError(f"size must be even, not {self.size}")
        if self.shared > min(self.few, self.validation):
            raise InputError(
                f"cannot share {self.shared} videos of {self.few} for training and {self.validation} to "
                "validate"
            )


@dataclass(frozen=True)
class Video:
    """One video to make: its file's name without ending, its motion, and its seed."""

    name: str
    motion: str
    seed: int


def _rng(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose,)))


def states(motion: str, frames: int, seed: int) -> np.ndarray:
    """float64 [frames, 4] in [0, 1): place along x and y, angle, size, of each frame.

    Raises:
        InputError: an unknown motion.
    """
    if motion not in MOTIONS:
        raise InputError(f"unknown motion {motion!r}; known: {', '.join(MOTIONS)}")
    start = _rng(seed, _START).random(4)
    rng = _rng(seed, _SPEED)
    speed, slide, spin = rng.uniform(*_SPEEDS), int(rng.integers(8)), int(rng.integers(2))
    if motion in VELOCITIES:
        halves = [VELOCITIES[motion]] * 2
    else:
        both = [list(VELOCITIES.values())[slide], list(VELOCITIES.values())[8 + spin]]
        halves = both if motion == ORDERS[0] else both[::-1]
    first = np.arange(frames) < frames // 2
    velocity = np.where(first[:, None], *(np.asarray(half) * speed / (frames - 1) for half in halves))
    travelled = np.concatenate([np.zeros((1, 4)), np.cumsum(velocity[1:], 0)])
    return (start + travelled) % 1.0


def _texture(side: int, rng: np.random.Generator, finest: float) -> np.ndarray:
    """float64 [side, side, 3] in [0, 1]: smooth noise that repeats seamlessly, no detail below `finest` of
    the side."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))) * side * finest
    noise = (
        np.fft.fft2(rng.standard_normal((side, side, 3)), axes=(0, 1)) * np.exp(-(frequency**2))[..., None]
    )
    image = np.fft.ifft2(noise, axes=(0, 1)).real
    low, high = image.min((0, 1)), image.max((0, 1))
    return (image - low) / (high - low)


def _looks(size: int, seed: int) -> tuple[np.ndarray, Image.Image]:
    """The background, uint8 [size, size, 3], and the shape, an RGBA picture."""
    rng = _rng(seed, _LOOKS)
    background = 255 * (0.05 + 0.25 * _texture(size, rng, 0.5))
    pixels = 255 * (0.5 + 0.5 * _texture(_SPRITE, rng, 0.5))
    corners = _POLYGONS[int(rng.integers(len(_POLYGONS)))]
    mask = Image.new("L", (4 * _SPRITE, 4 * _SPRITE))
    ImageDraw.Draw(mask).polygon(
        [tuple((1 + c) / 2 * 4 * _SPRITE for c in corner) for corner in corners], fill=255
    )
    sprite = Image.fromarray(pixels.astype(np.uint8))
    sprite.putalpha(mask.resize((_SPRITE, _SPRITE), Image.Resampling.BOX))
    return background.astype(np.uint8), sprite


def _draw(background: np.ndarray, sprite: Image.Image, state: np.ndarray) -> np.ndarray:
    size = background.shape[0]
    x, y, turn, grown = state
    radius = size * _RADII[0] * (_RADII[1] / _RADII[0]) ** grown
    whole, part = np.divmod(np.array([x, y]) * size, 1.0)
    cos, sin = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
    # From a pixel of the frame, with the shape in its middle, to one of the sprite.
    scale, middle = _SPRITE / 2 / radius, size / 2 + part
    a, b, c, d = cos * scale, sin * scale, -sin * scale, cos * scale
    offset = _SPRITE / 2 - np.array([a * middle[0] + b * middle[1], c * middle[0] + d * middle[1]])
    inverse = (a, b, offset[0], c, d, offset[1])
    drawn = sprite.transform((size, size), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    shift = whole.astype(int) - size // 2
    rgba = np.roll(np.asarray(drawn), (shift[1], shift[0]), (0, 1)).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return np.round(background * (1 - alpha) + rgba[..., :3] * alpha).astype(np.uint8)


def render(motion: str, size: int, frames: int, seed: int) -> np.ndarray:
    """uint8 [frames, size, size, 3]: a video's pictures; the first depends on `size` and `seed` only."""
    return render_states(states(motion, frames, seed), size, seed)


def render_states(drawn: np.ndarray, size: int, seed: int) -> np.ndarray:
    """uint8 [frames, size, size, 3]: pictures of the states [frames, 4]; `seed` gives shape and
    background."""
    background, sprite = _looks(size, seed)
    return np.stack([_draw(background, sprite, state) for state in drawn])


class _Writer:
    """What runs in the workers: makes a video unless it is there."""

    def __init__(self, videos: Sequence[Video], folder: Path, config: WorldConfig) -> None:
        self.videos, self.folder, self.config = videos, folder, config
        self.watch: Callable[[int], None] = lambda video: None

    def set_watch(self, watch: Callable[[int], None]) -> None:
        self.watch = watch

    def block(self, video: int, reason: str) -> None:
        raise RuntimeError(f"{self.videos[video].name} {reason}")

    def __getitem__(self, number: int) -> InputError | None:
        self.watch(number)
        video = self.videos[number]
        path = self.folder / f"{video.name}.mp4"
        try:
            if not path.exists():
                write_video(path, render(video.motion, self.config.size, self.config.frames, video.seed))
        except InputError as error:
            return error
        return None


def _videos(split: str, motions: Sequence[str], count: int, seed: int) -> list[Video]:
    """`count` videos, their motions in turn."""
    first = zlib.crc32(split.encode()) << 32 | seed << 64
    return [Video(f"{split}_{i:05}", motions[i % len(motions)], first + i) for i in range(count)]


def plan_world(config: WorldConfig) -> dict[str, list[Video]]:
    """The videos of each split: `unlabeled`, and `train_a`, `val_a`, `train_b`, `val_b`."""
    plan = {"unlabeled": _videos("unlabeled", MOTIONS, config.unlabeled, config.seed)}
    for name, amount in (("a", config.few), ("b", config.many)):
        motions = list(LABEL_SETS[name].values())
        plan[f"train_{name}"] = _videos(f"train_{name}", motions, amount * len(motions), config.seed)
        plan[f"val_{name}"] = _videos(f"val_{name}", motions, config.validation * len(motions), config.seed)
    for split in ("train_a", "val_a"):
        plan["train_b"] += _shared_with_b(plan[split], config.shared)
    return plan


def _shared_with_b(videos: Sequence[Video], count: int) -> list[Video]:
    both = [motion for motion in LABEL_SETS["a"].values() if motion in LABEL_SETS["b"].values()]
    return [video for motion in both for video in [v for v in videos if v.motion == motion][:count]]


def write_world(folder: str | Path, config: WorldConfig, *, workers: int = 1) -> dict[str, Path]:
    """Make the videos under `folder/videos` and the lists beside; what is there already stays, so a kill
    costs little.

    Returns:
        Where each list is: `unlabeled`, `train_a`, `val_a`, `train_b`, `val_b` (`path label` lines),
            `classes_a`,
        `classes_b` (a name a line), `same` (the names that mean the same, JSON).

    Raises:
        InputError: the folder holds another world, or cannot be written.
    """
    folder = Path(folder)
    _claim(folder, config)
    plan = plan_world(config)
    videos = list({video.name: video for split in plan.values() for video in split}.values())
    writer = _Writer(videos, folder / "videos", config)
    pool = WorkerPool(writer, iter(range(len(videos))), count=workers, prefetch=4, hang_s=300)
    try:
        for answer in tqdm(pool, total=len(videos), unit="video", disable=None):
            if answer is not None:
                raise answer
    finally:
        pool.close()
    return _write_lists(folder, plan)


def _claim(folder: Path, config: WorldConfig) -> None:
    about = folder / "world.json"
    try:
        if about.exists() and parse_json(about.read_text(encoding="utf-8")) != asdict(config):
            raise InputError(f"{folder} holds a world of other settings ({about}); choose another folder")
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        about.write_text(json.dumps(asdict(config)) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {str(folder)!r}: {error.strerror}") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{about} is damaged ({error}); remove it") from None


def _write_lists(folder: Path, plan: dict[str, list[Video]]) -> dict[str, Path]:
    paths = {split: folder / f"{split}.txt" for split in plan}
    for split, videos in plan.items():
        labels = {motion: label for label, motion in enumerate(LABEL_SETS.get(split[-1], {}).values())}
        lines = [
            f"videos/{v.name}.mp4 " + ("0 -1" if split == "unlabeled" else f"{labels[v.motion]}")
            for v in videos
        ]
        paths[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, classes in LABEL_SETS.items():
        paths[f"classes_{name}"] = folder / f"classes_{name}.txt"
        paths[f"classes_{name}"].write_text("\n".join(classes) + "\n", encoding="utf-8")
    paths["same"] = folder / "same.json"
    paths["same"].write_text(json.dumps(SAME_NAMES, indent=1) + "\n", encoding="utf-8")
    return paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", help="folder for the videos and their lists")
    helps = {
        "size": "side of the videos in pixels",
        "frames": "of a video",
        "unlabeled": "videos without labels",
        "few": "labelled videos of a class of set a",
        "many": "labelled videos of a class of set b",
        "shared": "videos of a class that both sets list",
        "validation": "videos of a class to validate",
        "seed": "of everything random",
    }
    for name, text in helps.items():
        default = getattr(WorldConfig, name)
        parser.add_argument(
            f"--{name}", type=limits(WorldConfig, name), default=default, help=f"{text} ({default})"
        )
    parser.add_argument(
        "--workers", type=PROCESSES, default=whole_cores(), help="processes (one for each core)"
    )


def run(args: argparse.Namespace) -> None:
    names = ("size", "frames", "unlabeled", "few", "many", "shared", "validation", "seed")
    paths = write_world(
        args.output, WorldConfig(**{name: getattr(args, name) for name in names}), workers=args.workers
    )
    for name, path in paths.items():
        print(f"{name}: {path} ({len(path.read_text(encoding='utf-8').splitlines())} lines)")
