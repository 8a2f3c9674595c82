"""What sampling needs to know of a video, found by opening it and decoding its first frame."""

from __future__ import annotations

from typing import NamedTuple

from vmae.data.decode import find_backends, open_video
from vmae.data.manifest import VideoEntry


class Facts(NamedTuple):
    """Frames, frames a second (0 where they are not known), and pixels as displayed."""

    frames: int
    fps: float
    width: int
    height: int


def prepare() -> None:
    """Import what `look_at` needs, so that workers that are forked afterwards have it.

    Raises:
        InputError: PyAV is not installed.
    """
    find_backends("video", "pyav")


def look_at(entry: VideoEntry) -> Facts:
    """The facts of a video or a folder of frames.

    Raises:
        DecodeError: it cannot be opened, or its first frame cannot be decoded.
    """
    with open_video(entry, "pyav") as reader:
        height, width = reader.frames([0]).shape[1:3]
        return Facts(len(reader), float(reader.fps or 0), width, height)
