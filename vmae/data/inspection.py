"""What PyAV finds in a file that another library is to decode, and whether that library is safe for it."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from fractions import Fraction

from vmae.data.containers import FORMATS, PacketTable, container_kind, is_picture, names_other_files
from vmae.data.manifest import VideoEntry
from vmae.data.orientation import Orientation, read_orientation
from vmae.data.readers import pyav
from vmae.data.video_reader import DecodeError, VideoReader

# FFmpeg's names of pixel formats: colour of half the size; and all of 8 bits, which libraries convert alike.
EVEN_PIXELS = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p"}
PLAIN_PIXELS = EVEN_PIXELS | {"yuv444p", "yuvj444p", "gbrp", "gray"}


@dataclass(frozen=True)
class Inspection:
    """What PyAV finds in a file that another library is to decode.

    Attributes:
        kind: FFmpeg's name of its format.
        codec: FFmpeg's name.
        frames, fps: see `VideoReader`.
        hazard: why other libraries may take one frame for another; None where times tell the frames apart,
            none is hidden by an edit list or lost at the start, and every packet that is marked as a key
            frame is one.
        open_gop, gop: see `PacketTable`.
        streams: videos in the file.
        stream: index of the best one among all streams.
        orientation: display of the first frame.
        aspect: width of a pixel over its height, where they differ; else None.
        pixels: FFmpeg's name of the pixel format.
        full_range: whether black is 0, not 16.
        size: width and height as displayed.
    """

    kind: str
    codec: str
    frames: int
    fps: float | None
    hazard: str | None
    open_gop: bool
    gop: float | None
    streams: int
    stream: int
    orientation: Orientation
    aspect: Fraction | None
    pixels: str
    full_range: bool
    size: tuple[int, int]


def inspect_video(path: str | os.PathLike) -> Inspection:
    """What `path` is, by its packets and its first frame. Kept for files that have not changed since.

    Raises:
        DecodeError: it cannot be opened, or its first frame cannot be decoded.
    """
    try:
        about = os.stat(path)
    except OSError as error:
        raise DecodeError(f"{path}: cannot be read: {error.strerror}") from None
    return _inspect(os.path.abspath(path), about.st_size, about.st_mtime_ns, os.fspath(path))


@functools.lru_cache(1 << 14)
def _inspect(place: str, size: int, changed: int, name: str) -> Inspection:
    with pyav.PyavReader(VideoEntry(name)) as reader:
        table, container, frame = reader.table, reader.container, reader.first_frame
        aspect = reader.stream.sample_aspect_ratio
        return Inspection(
            kind=container.format.name,
            codec=reader.stream.codec_context.name,
            frames=len(reader),
            fps=reader.fps,
            hazard=_find_hazard(table),
            open_gop=table.open_gop,
            gop=table.gop,
            streams=sum(not is_picture(stream) for stream in container.streams.video),
            stream=reader.stream.index,
            orientation=read_orientation(frame, name),
            aspect=None if aspect in (None, 0, 1) else aspect,
            pixels=frame.format.name,
            full_range=frame.color_range == 2,
            size=reader.size,
        )


def _find_hazard(table: PacketTable) -> str | None:
    if table.edited:
        return "an edit list that hides frames"
    if table.refreshed:
        return "intra refresh, where no picture but the first is whole"
    if not table.complete:
        return "a stream that begins in the middle of a group of pictures"
    if table.crowded:
        return "key frames closer together than its frames are reordered"
    if table.times is None:
        return "frames without times of their own"
    return None


def find_hazard(entry: VideoEntry) -> tuple[str | None, Inspection]:
    """(why FFmpeg in another library than PyAV would give other frames of a file than PyAV does, what PyAV
    found).

    Measured with the FFmpeg of decord 0.6 and torchcodec 0.13 (on FFmpeg 5.1): docs/decoders.md.

    Raises:
        DecodeError: PyAV cannot read it.
    """
    found = inspect_video(entry.path)
    kind = container_kind(entry.path)
    if kind not in ("MP4", "Matroska") or found.kind != FORMATS[kind]:
        return (kind if kind != "unknown" else f"{found.kind} files"), found
    if names_other_files(entry.path):
        return "a video that may be taken for a manifest", found
    if found.orientation.mirrored:
        return "a mirrored video", found
    return found.hazard, found


def check_length(reader: VideoReader) -> None:
    """Raises DecodeError where a library counts other frames than PyAV: what is left of a damaged file,
    mostly."""
    expected = inspect_video(reader.path).frames
    if len(reader) != expected:
        raise DecodeError(
            f"{reader.path}: refused, it would give wrong frames: {len(reader)} of {expected} frames are "
            "found"
        )


def inspector_missing(name: str) -> str | None:
    """Why the backend `name`, which reads what PyAV finds harmless, cannot be used; None where PyAV is."""
    lack = pyav.BACKEND.missing()
    return lack and f"{name} is used for files that PyAV finds harmless: {lack}"
