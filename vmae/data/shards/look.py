"""What sampling needs to know of a video, found by opening it and decoding its first frame."""

from __future__ import annotations

import os
from typing import NamedTuple

from vmae.data.decode import find_backends, open_video
from vmae.data.manifest import VideoEntry
from vmae.data.shards.memory_file import memory_file
from vmae.data.video_reader import DecodeError


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


def look_into(content: bytes, name: str) -> Facts:
    """The facts of a video in memory.

    Args:
        name: for messages.

    Raises:
        DecodeError: see `look_at`.
    """
    handle, path = memory_file(content)
    try:
        return look_at(VideoEntry(path))
    except DecodeError as error:
        told = DecodeError(str(error).replace(path, name))
        told.library = error.library
        raise told from None
    finally:
        os.close(handle)
