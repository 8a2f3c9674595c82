"""torchcodec, on FFmpeg's shared libraries: for files that PyAV finds harmless.

Clips of 16 frames, stride 4, short side 256, on one core (bench/data.py): behind PyAV on H.264, level with it
on HEVC, VP9 and MPEG-4.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import numpy as np

from vmae.data.inspection import PLAIN_PIXELS, check_length, find_hazard, inspect_video, inspector_missing
from vmae.data.manifest import VideoEntry
from vmae.data.readers import Backend, Library
from vmae.data.video_reader import DecodeError, VideoReader, call_library

if TYPE_CHECKING:
    from torchcodec.decoders import VideoDecoder


class TorchcodecReader(VideoReader):
    """torchcodec in exact mode: the file is scanned once, so that a frame's number is its place in time."""

    def __init__(self, entry: VideoEntry) -> None:
        self.path = entry.path
        self._decoder: VideoDecoder | None = call_library(entry.path, "opened", self._open)
        if self._length < 1:
            raise DecodeError(f"{self.path}: has no frames")
        check_length(self)

    def _open(self) -> VideoDecoder:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(
            os.path.abspath(self.path),
            stream_index=inspect_video(self.path).stream,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode="exact",
        )
        self._length = len(decoder)
        self.fps = decoder.metadata.average_fps
        return decoder

    def __len__(self) -> int:
        return self._length

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        decoder = self._decoder
        if decoder is None:
            raise DecodeError(f"{self.path}: is closed")
        wanted = indices.tolist()
        return call_library(self.path, "decoded", lambda: decoder.get_frames_at(wanted).data.numpy())

    def close(self) -> None:
        self._decoder = None


@functools.cache  # a failing import looks for FFmpeg in many versions, which takes longer than a clip
def _missing() -> str | None:
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except ImportError:
        return "torchcodec is not installed: `pip install 'torchcodec>=0.13,<0.14'` and FFmpeg's libraries"
    except Exception as error:  # RuntimeError or OSError of its shared libraries
        reason = (str(error).strip().splitlines() or ["unknown reason"])[0]
        return (
            f"torchcodec does not load ({reason}): it needs FFmpeg's shared libraries (`apt-get install "
            "ffmpeg`) and a version that fits torch (0.13 loads with torch 2.13 on a CPU; 0.14 to 0.17 link "
            "CUDA libraries)"
        )
    return inspector_missing("torchcodec")


def _refuses(entry: VideoEntry) -> str | None:
    hazard, found = find_hazard(entry)
    if hazard is None and found.full_range and found.pixels not in PLAIN_PIXELS:
        return "full-range colour of more than 8 bits"
    return hazard


BACKEND = Backend(
    "torchcodec",
    ("video",),
    TorchcodecReader,
    _missing,
    _refuses,
    order=20,
    library=Library(
        name="torchcodec",
        module="torchcodec",
        packages=("torchcodec",),
        install="pip install 'torchcodec>=0.13,<0.14', and FFmpeg's libraries (apt-get install ffmpeg); "
        "0.13 loads with torch 2.13 on a CPU, 0.14 to 0.17 link CUDA libraries",
        without="nothing: PyAV reads the same files, H.264 faster",
    ),
)
