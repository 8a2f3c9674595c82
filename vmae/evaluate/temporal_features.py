"""Features of `python -m vmae features`, read for the temporal detector: what they are of, and where in time.

Legend: T positions (windows) of a video, C feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae.errors import InputError
from vmae.evaluate.features import SETTINGS, read_features
from vmae.evaluate.temporal import VideoInfo
from vmae.files.json_files import parse_json


@dataclass(frozen=True)
class Geometry:
    """Where features lie in time: position i stands for the middle of the window of `frames` frames from `i *
    step` on."""

    frames: int
    step: int

    def seconds(self, position: float | Tensor, fps: float) -> Any:
        """Of positions, which need not be whole."""
        return (position * self.step + self.frames / 2) / fps

    def position(self, seconds: float, fps: float) -> float:
        """The inverse of `seconds`."""
        return (seconds * fps - self.frames / 2) / self.step

    def count(self, video: VideoInfo) -> int:
        """Windows that fit into a video."""
        return max((round(video.duration * video.fps) - self.frames) // self.step + 1, 0)


def read_about(folder: Path) -> dict[str, Any]:
    """What a folder's features are of: `windows` and `weights`, and `model` where it is known.

    Raises:
        InputError: the folder is none of `python -m vmae features`.
    """
    try:
        about = parse_json((folder / SETTINGS).read_text(encoding="utf-8"))
        geometry_of(about)
        return {key: about[key] for key in ("windows", "weights", *({"model"} & about.keys()))}
    except OSError as error:
        raise InputError(
            f"{folder / SETTINGS} cannot be read ({error.strerror}); `python -m vmae features` writes it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / SETTINGS} does not tell the features' windows: {error!r}") from None


def geometry_of(about: dict[str, Any]) -> Geometry:
    return Geometry(int(about["windows"]["frames"]), int(about["windows"]["step"]))


@dataclass(frozen=True)
class Item:
    """A video's features, float32 [T, C], and what the dataset file says of it."""

    name: str
    info: VideoInfo
    features: Tensor


def read_items(folder: Path, videos: dict[str, VideoInfo], geometry: Geometry) -> list[Item]:
    """The features of `videos`.

    Raises:
        InputError: a file is missing, of another width than the others, or of another length than its video.
    """
    if missing := [name for name in videos if not (folder / f"{name}.npy").is_file()]:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        some = ", ".join(missing[:4]) + more
        raise InputError(
            f"{folder} has no features of {some}: make them (`python -m vmae features`), or leave them out "
            "of the dataset"
        )
    items: list[Item] = []
    for name, info in videos.items():
        features, due = torch.from_numpy(read_features(folder / f"{name}.npy")).float(), geometry.count(info)
        if items and features.shape[1] != items[0].features.shape[1]:
            width = items[0].features.shape[1]
            raise InputError(
                f"{folder}/{name}.npy: {features.shape[1]} values a window, {items[0].name}.npy has {width}"
            )
        rounding = max(4, due // 10)  # durations and frame rates of dataset files are rounded
        if abs(len(features) - due) > rounding:
            given = f"{info.duration:g} s at {info.fps:g} frames a second"
            raise InputError(
                f"{folder}/{name}.npy has {len(features)} windows, but {given} have {due} of "
                f"{geometry.frames} frames, step "
                f"{geometry.step}: another video, other windows, or a wrong fps in the dataset file"
            )
        items.append(Item(name, info, features))
    return items


def subset_of(
    videos: dict[str, VideoInfo], name: str | None, but: str | None, path: str
) -> dict[str, VideoInfo]:
    """The videos of subset `name`; without a name, of all subsets but `but`.

    Raises:
        InputError: there are none; names the file `path` and its subsets.
    """
    if name is not None:
        found = {video: info for video, info in videos.items() if info.subset.lower() == name.lower()}
    else:
        found = {video: info for video, info in videos.items() if info.subset.lower() != (but or "").lower()}
    if not found:
        known = ", ".join(sorted({info.subset for info in videos.values()})) or "none"
        wanted = f"of subset {name!r}" if name else f"beside subset {but!r}"
        raise InputError(f"{path} has no videos {wanted}; it has: {known}")
    return found
