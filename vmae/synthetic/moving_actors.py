"""`python -m vmae moving-actors OUT`: videos of two actors that each do something of their own, annotated as
AVA is.

A video is a row of scenes of two seconds. In each, two textured shapes (those of `moving_shapes`) move on a
textured background, each in its own half of the picture: one slides left, right, up or down, or turns, or
does both, so a box has one or two actions. The key frame is the middle of the scene. There, every action has
the same distribution of place, size and angle: neither the box nor the single picture tells what its actor
does. No shape reaches the other one or the edge.

    videos/train_0000.mp4 ...                     H.264
    train.csv, val.csv                            annotations
    train_persons.csv, val_persons.csv            person boxes: the true ones, moved a little, with scores
    below 1
    val_excluded.csv                              key frames that are not counted
    actions.pbtxt                                 the action list
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vmae.config import _Checked
from vmae.data.ava import AvaBox, Box, write_actions, write_annotations, write_detections, write_excluded
from vmae.data.workers import WorkerPool
from vmae.data.write_video import write_video
from vmae.errors import InputError
from vmae.files.json_files import parse_json
from vmae.files.limits import whole_cores
from vmae.settings import COUNT, PROCESSES, SEED, Whole, limits, ranged

# Private to the package, not to the module: the same shapes on the same ground.
from vmae.synthetic.moving_shapes import _SPRITE, _looks, _rng

SLIDES = {"slide left": (-1, 0), "slide right": (1, 0), "slide up": (0, -1), "slide down": (0, 1)}
TURNS = {"turn clockwise": 1, "turn anticlockwise": -1}
ACTIONS = {number: name for number, name in enumerate((*SLIDES, *TURNS), 1)}
SCENE_SECONDS, FPS = 2, 12
_FRAMES = SCENE_SECONDS * FPS
_MOTION, _JITTER = 10, 11  # purposes of random numbers; `moving_shapes` has 0 to 2
# Shares of the picture's side: the smallest and largest radius, and the largest way of a slide to either side
# of the middle.
_RADII, _WAY = (0.1, 0.13), 0.08
_REACH, _BLUR = 1.14, 1  # the farthest corner of a shape, of its radius; pixels that its edge is soft
_ANGLE = (0.25, 0.4)  # turns that a scene makes


@dataclass(frozen=True, kw_only=True)
class ActorsConfig(_Checked):
    """How many videos of which size; the same for the same settings.

    Attributes:
        size: side of the square videos in pixels, even.
        train, validation: videos.
        scenes: of a video, each with a key frame.
        seed: of everything random.
    """

    size: int = ranged(64, Whole(64, 4096))
    train: int = ranged(120, COUNT)
    validation: int = ranged(30, COUNT)
    scenes: int = ranged(4, Whole(1, 10_000))
    seed: int = ranged(0, SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 2:
            raise InputError(f"size must be even, not {self.size}")


@dataclass(frozen=True)
class Actor:
    """What a shape does in a scene.

    Attributes:
        actions: names, one or two.
        places: float64 [frames, 2], of its middle, shares of the picture.
        angles: float64 [frames], turns.
        radius: share of the picture.
    """

    actions: tuple[str, ...]
    places: np.ndarray
    angles: np.ndarray
    radius: float


def cast(seed: int, size: int) -> tuple[Actor, Actor]:
    """The two actors of a scene in a picture of `size` pixels."""
    rng = _rng(seed, _MOTION)
    upright = bool(rng.integers(2))  # one above the other, else side by side
    actors = []
    for half in (0.25, 0.75):
        slide, turn = _choose(rng)
        radius = rng.uniform(*_RADII)
        # In the half's short side; the same along both axes, whatever the motion.
        room = 0.25 - _REACH * radius - _BLUR / size - _WAY
        middle = np.array([0.5, half] if upright else [half, 0.5]) + rng.uniform(-room, room, 2)
        if upright:
            middle[0] += rng.uniform(-0.25, 0.25)
        else:
            middle[1] += rng.uniform(-0.25, 0.25)
        steps = np.linspace(-1, 1, _FRAMES + 1)[:-1]  # 0 at the key frame, number _FRAMES / 2
        way = rng.uniform(0.7, 1) * _WAY * np.array(SLIDES.get(slide, (0, 0)))
        turned = rng.uniform(*_ANGLE) / 2 * TURNS.get(turn, 0)
        names = tuple(name for name in (slide, turn) if name)
        actors.append(Actor(names, middle + steps[:, None] * way, rng.random() + steps * turned, radius))
    return actors[0], actors[1]


def _choose(rng: np.random.Generator) -> tuple[str, str]:
    """Names of a slide and of a turn; "" means none, and at least one of the two is something."""
    slides, turns = [*SLIDES, "", ""], [*TURNS, ""]
    while True:
        slide, turn = slides[int(rng.integers(len(slides)))], turns[int(rng.integers(len(turns)))]
        if slide or turn:
            return slide, turn


def draw_actor(picture: np.ndarray, sprite: Image.Image, actor: Actor, frame: int) -> tuple[np.ndarray, Box]:
    """The picture with the actor on it, and the box of the pixels that it covers in any degree.

    Args:
        picture: uint8 [size, size, 3].

    Raises:
        RuntimeError: the actor covers nothing, or reaches the edge.
    """
    size = picture.shape[0]
    middle, angle = actor.places[frame] * size, 2 * np.pi * actor.angles[frame]
    # From a pixel of the picture to one of the sprite.
    scale = _SPRITE / 2 / (actor.radius * size)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    offset = _SPRITE / 2 - np.array([cos * middle[0] + sin * middle[1], -sin * middle[0] + cos * middle[1]])
    inverse = (cos, sin, offset[0], -sin, cos, offset[1])
    drawn = sprite.transform((size, size), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    rgba = np.asarray(drawn).astype(np.float64)
    rows, columns = (np.flatnonzero((rgba[..., 3] > 0).any(axis)) for axis in (1, 0))
    if not len(rows) or min(rows[0], columns[0]) == 0 or max(rows[-1], columns[-1]) == size - 1:
        raise RuntimeError(f"an actor at {middle} of a picture of {size} pixels is not inside it")
    alpha = rgba[..., 3:] / 255
    box = tuple(float(edge) / size for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return np.round(picture * (1 - alpha) + rgba[..., :3] * alpha).astype(np.uint8), box


def render_scene(size: int, seed: int) -> tuple[np.ndarray, list[list[Box]], tuple[Actor, Actor]]:
    """(uint8 [frames, size, size, 3], the boxes of both actors in each frame, the actors)."""
    actors = cast(seed, size)
    background, _ = _looks(size, seed)
    sprites = [_looks(16, seed + 1 + number)[1] for number in range(2)]
    pictures, boxes = [], []
    for frame in range(_FRAMES):
        picture, own = background, []
        for actor, sprite in zip(actors, sprites):
            picture, box = draw_actor(picture, sprite, actor, frame)
            own.append(box)
        pictures.append(picture)
        boxes.append(own)
    return np.stack(pictures), boxes, actors


def scene_seed(config: ActorsConfig, split: str, video: int, scene: int) -> int:
    """Of a scene; sprites use the two after it."""
    return config.seed << 64 | zlib.crc32(split.encode()) << 32 | video << 16 | scene << 4


def timestamp(scene: int) -> int:
    """Of a scene's key frame, seconds."""
    return SCENE_SECONDS * scene + SCENE_SECONDS // 2


def render_video(config: ActorsConfig, split: str, video: int) -> tuple[np.ndarray, list[AvaBox]]:
    """(uint8 [T, size, size, 3], the annotations) of a video."""
    parts, rows = [], []
    numbers = {name: number for number, name in ACTIONS.items()}
    for scene in range(config.scenes):
        pictures, boxes, actors = render_scene(config.size, scene_seed(config, split, video, scene))
        parts.append(pictures)
        for person, (actor, box) in enumerate(zip(actors, boxes[_FRAMES // 2])):
            rows += [
                AvaBox(f"{split}_{video:04}", timestamp(scene), box, numbers[name], person=2 * scene + person)
                for name in actor.actions
            ]
    return np.concatenate(parts), rows


class _Writer:
    """What runs in the workers: makes a video unless it is there, and tells its annotations."""

    def __init__(self, videos: Sequence[tuple[str, int]], folder: Path, config: ActorsConfig) -> None:
        self.videos, self.folder, self.config = videos, folder, config
        self.watch: Callable[[int], None] = lambda video: None

    def set_watch(self, watch: Callable[[int], None]) -> None:
        self.watch = watch

    def block(self, video: int, reason: str) -> None:
        raise RuntimeError(f"{self.videos[video]} {reason}")

    def __getitem__(self, number: int) -> list[AvaBox] | InputError:
        self.watch(number)
        split, video = self.videos[number]
        try:
            pictures, rows = render_video(self.config, split, video)
            path = self.folder / f"{split}_{video:04}.mp4"
            if not path.exists():
                write_video(path, pictures, FPS)
            return rows
        except InputError as error:
            return error


def write_actors(folder: str | Path, config: ActorsConfig, *, workers: int = 1) -> dict[str, Path]:
    """Make the videos and files (see the module); videos that are there already stay.

    Returns:
        Where each file is: `videos` (the folder), `train`, `val`, `train_persons`, `val_persons`,
            `val_excluded`, `actions`.

    Raises:
        InputError: the folder holds other videos, or cannot be written.
    """
    folder = Path(folder)
    _claim(folder, config)
    videos = [
        (split, i)
        for split, count in (("train", config.train), ("val", config.validation))
        for i in range(count)
    ]
    pool = WorkerPool(
        _Writer(videos, folder / "videos", config),
        iter(range(len(videos))),
        count=workers,
        prefetch=4,
        hang_s=300,
    )
    rows: dict[str, list[AvaBox]] = {"train": [], "val": []}
    try:
        for (split, _), answer in zip(videos, tqdm(pool, total=len(videos), unit="video", disable=None)):
            if isinstance(answer, InputError):
                raise answer
            rows[split] += answer
    finally:
        pool.close()
    paths = {
        "videos": folder / "videos",
        "actions": folder / "actions.pbtxt",
        "val_excluded": folder / "val_excluded.csv",
    }
    write_actions(paths["actions"], ACTIONS)
    several = len({row.key for row in rows["val"]}) > 1
    write_excluded(paths["val_excluded"], {rows["val"][-1].key} if several else set())
    for split, own in rows.items():
        paths[split], paths[f"{split}_persons"] = folder / f"{split}.csv", folder / f"{split}_persons.csv"
        write_annotations(paths[split], own)
        write_detections(paths[f"{split}_persons"], person_boxes(own, config.seed))
    return paths


def person_boxes(rows: Sequence[AvaBox], seed: int) -> list[AvaBox]:
    """What a good person detector might say: each box once, its edges moved by up to 5 % of its sides, scores
    0.85 to 1."""
    rng = _rng(seed, _JITTER)
    found = []
    for video, time, box in dict.fromkeys((row.video, row.timestamp, row.box) for row in rows):
        x1, y1, x2, y2 = box
        moved = np.array(box) + np.array([x2 - x1, y2 - y1] * 2) * rng.uniform(-0.05, 0.05, 4)
        found.append(AvaBox(video, time, tuple(moved.clip(0, 1).tolist()), None, float(rng.uniform(0.85, 1))))
    return found


def _claim(folder: Path, config: ActorsConfig) -> None:
    about = folder / "actors.json"
    try:
        if about.exists() and parse_json(about.read_text(encoding="utf-8")) != asdict(config):
            raise InputError(f"{folder} holds videos of other settings ({about}); choose another folder")
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        about.write_text(json.dumps(asdict(config)) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {str(folder)!r}: {error.strerror}") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{about} is damaged ({error}); remove it") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", help="folder for the videos and their files")
    helps = {
        "size": "side of the videos in pixels",
        "train": "videos to train",
        "validation": "videos to validate",
        "scenes": "of a video, each with a key frame",
        "seed": "of everything random",
    }
    for name, text in helps.items():
        default = getattr(ActorsConfig, name)
        parser.add_argument(
            f"--{name}", type=limits(ActorsConfig, name), default=default, help=f"{text} ({default})"
        )
    parser.add_argument(
        "--workers", type=PROCESSES, default=whole_cores(), help="processes (one for each core)"
    )


def run(args: argparse.Namespace) -> None:
    config = ActorsConfig(
        **{name: getattr(args, name) for name in ("size", "train", "validation", "scenes", "seed")}
    )
    for name, path in write_actors(args.output, config, workers=args.workers).items():
        print(f"{name}: {path}")
