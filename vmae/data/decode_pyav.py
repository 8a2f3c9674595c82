"""The decoder of choice: PyAV, which is right about every container met so far and decodes least."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vmae.data.containers import FORMATS, av_text, is_picture, open_container, pick_stream, read_packets
from vmae.data.manifest import VideoEntry
from vmae.data.video_reader import DecodeError, VideoReader, first_reason

_SEEKABLE = {FORMATS["MP4"], FORMATS["Matroska"]}
_INTRA = 1  # FFmpeg's number of I pictures


class PyavReader(VideoReader):
    """PyAV: frames by their packets' timestamps, or counted from the start where those cannot be relied on.

    The packets are read once, undecoded. In MP4 and Matroska the presentation times of those that are shown,
    sorted, are the frames; decoding starts at the last key frame that is not shown after the wanted one, so
    leading pictures of an open GOP come out of the group before. Other containers (AVI keeps no presentation
    times; a transport stream cannot be sought exactly) are decoded from their start; so is a file in which
    the way from a key frame does not lead to the frames.

    Frames are as a player shows them: turned and mirrored by their display matrix, converted by FFmpeg's own
    scaler. Pixels are as stored where they are not square.

    Of H.264, pictures that are not wanted and that no other picture refers to (`nal_ref_idc` 0) are not
    decoded: half of the pictures with x264's defaults, at the same pixels. HEVC's word for that holds within
    a temporal layer only, so there every picture is decoded.
    """

    def __init__(self, entry: VideoEntry) -> None:
        self.path = entry.path
        self._container = None
        self._orientation: Orientation | None = None  # since the last key frame
        try:
            self._container = open_container(entry.path)
            self._stream = pick_stream(self._container, entry.path)
            self.fps = float(self._stream.average_rate) if self._stream.average_rate else None
            self.codec = self._stream.codec_context.name
            self.table = read_packets(self._container, self._stream)
            self._length = len(self.table.shown)
            seekable = self._container.format.name in _SEEKABLE
            if not self._length:
                raise DecodeError(f"{self.path}: has no frames")
            if self.table.refreshed and (self.table.spliced or not self.table.complete):
                raise DecodeError(
                    f"{self.path}: cannot be decoded: intra refresh, cut where no picture is whole"
                )
            self._times = self.table.times if seekable else None
            self._to_rgb = _ToRgb()
            if not (self.table.complete and (self.table.times is not None or not seekable)):
                self._drop_lost_frames()
        except DecodeError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise DecodeError(f"{self.path}: cannot be opened: {first_reason(av_text(error), [])}") from None
        if not self._length:
            self.close()
            raise DecodeError(f"{self.path}: has no frames")

    def _drop_lost_frames(self) -> None:
        """A stream cut out of another may begin with pictures whose references are gone: what comes out of
        them is no frame."""
        with open_container(self.path) as container:
            frames = self._whole_frames(container)
            if self._times is None:
                self._length = sum(1 for _ in frames)
            else:
                first = next(frames, None)
                self._times = self._times[self._times >= first.pts] if first is not None else self._times[:0]
                self._length = len(self._times)

    def _whole_frames(self, container) -> Iterator:
        """All frames, from the first whole picture on."""
        self._orientation = None
        frames = container.decode(pick_stream(container, self.path))
        return (
            frames
            if self.table.complete
            else itertools.dropwhile(lambda frame: frame.pict_type != _INTRA, frames)
        )

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def first_frame(self):
        """The first frame as decoded, `av.VideoFrame`: it has the display matrix, the pixel format and the
        size."""
        try:
            with open_container(self.path) as container:
                return next(self._whole_frames(container))
        except DecodeError:
            raise
        except Exception as error:  # StopIteration too
            raise DecodeError(f"{self.path}: cannot be decoded: {first_reason(av_text(error), [])}") from None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as displayed. Decodes a frame when it is first asked for."""
        frame = self.first_frame
        turned = read_orientation(frame, self.path).transpose
        return (frame.height, frame.width) if turned else (frame.width, frame.height)

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        if self._container is None:
            raise DecodeError(f"{self.path}: is closed")
        try:
            if self._times is None:
                pictures = self._decode_from_start(indices.tolist(), by_time=False)
            else:
                pictures = self._decode_timed(self._times[indices])
        except DecodeError:
            raise
        except Exception as error:
            raise DecodeError(f"{self.path}: cannot be decoded: {first_reason(av_text(error), [])}") from None
        if len(pictures) < len(indices):
            raise DecodeError(
                f"{self.path}: cannot be decoded: {len(indices) - len(pictures)} frames do not come out"
            )
        if len({picture.shape for picture in pictures}) > 1:
            raise DecodeError(f"{self.path}: cannot be decoded: the size of its pictures changes")
        return np.stack(pictures)

    @property
    def stream(self):
        """PyAV's stream that the frames come from."""
        return self._stream

    def decoded(self) -> Iterator:
        """Every frame once, in order, as PyAV's `VideoFrame`: stored pixels, not turned.

        Raises:
            av.FFmpegError: a frame cannot be decoded.
        """
        shown = None if self._times is None else set(self._times.tolist())
        with open_container(self.path) as container:
            for frame in self._whole_frames(container):
                if shown is None or frame.pts in shown:
                    yield frame

    def iterate(self) -> Iterator[np.ndarray]:
        try:
            yield from map(self._pixels, self.decoded())
        except DecodeError as error:
            error.library = self.backend
            raise
        except Exception as error:
            failed = DecodeError(f"{self.path}: cannot be decoded: {first_reason(av_text(error), [])}")
            failed.library = self.backend
            raise failed from None

    def _decode_from_start(self, wanted: list[int], *, by_time: bool) -> list[np.ndarray]:
        """Frames by number, or by presentation time, ascending; each frame before them is decoded."""
        missing, pictures = set(wanted), []
        with open_container(self.path) as container:  # afresh: not every container can be rewound
            for number, frame in enumerate(self._whole_frames(container)):
                if frame.key_frame:
                    self._orientation = None
                name = frame.pts if by_time else number
                if name in missing:
                    missing.remove(name)
                    pictures.append(self._pixels(frame))
                    if not missing:
                        break
        return pictures

    def _decode_timed(self, times: np.ndarray) -> list[np.ndarray]:
        keys = np.searchsorted(self.table.keys, times, side="right") - 1
        runs = np.split(np.arange(len(times)), np.flatnonzero(np.diff(keys)) + 1)
        pictures, failure = [], None
        try:
            for run in runs:
                pictures += self._decode_run(int(keys[run[0]]), times[run].tolist())
        except DecodeError:
            raise
        except Exception as error:
            failure = error
        if len(pictures) == len(times):
            return pictures
        try:
            return self._decode_from_start(times.tolist(), by_time=True)
        except Exception as error:
            raise failure or error from None

    def _decode_run(self, key: int, times: list[int]) -> list[np.ndarray]:
        """Pictures at `times`, decoded from key frame number `key` on, without those that they do not
        need."""
        context, wanted, unfed = self._stream.codec_context, set(times), set(times)
        pictures: dict[int, np.ndarray] = {}

        def keep(frames: Sequence) -> None:
            for frame in frames:
                if frame.key_frame:
                    self._orientation = None
                if frame.pts in wanted:
                    pictures[frame.pts] = self._pixels(frame)

        self._orientation = None
        for packet in self._packets_from(key, times[0]):
            if self.codec == "h264":
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            if not packet.is_discard:  # one that an edit list hides may have the time of a shown one
                unfed.discard(packet.pts)
            keep(packet.decode())
            if not unfed:
                if len(pictures) < len(times):
                    keep(context.decode(None))  # those that it holds back to put them in order
                break
        return [pictures[time] for time in times if time in pictures]

    def _packets_from(self, key: int, wanted: int) -> Iterator:
        """Packets from key frame number `key` on, or from an earlier one if the container seeks past it; none
        if it does so with all of them."""
        for number in sorted({max(key - back, 0) for back in (0, 1, 2, 4)}, reverse=True) if key >= 0 else ():
            self._container.seek(int(self.table.keys[number]), stream=self._stream, backward=True)
            packets = self._container.demux(self._stream)
            first = next(packets, None)
            if first is not None and first.pts is not None and first.pts <= wanted:
                yield first
                yield from packets
                return

    def _pixels(self, frame) -> np.ndarray:
        if frame.is_corrupt:
            raise DecodeError(f"{self.path}: cannot be decoded: a frame is corrupt")
        if (
            frame.key_frame or self._orientation is None
        ):  # it changes at key frames only, and takes a tenth of a conversion
            self._orientation = read_orientation(frame, self.path)
        return self._orientation.apply(self._to_rgb(frame))

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._stream = None


class _ToRgb:
    """uint8 [H, W, 3] of frames, by a filter graph: pixels as the ffmpeg command and torchcodec give them.

    `VideoFrame.reformat` differs by up to 100 grey levels at edges where 10-bit colour is subsampled, by 31
    at odd sizes; it takes all cores for one small picture, and half as much CPU time again (90 us for 640 x
    272 against 62).
    """

    def __init__(self) -> None:
        self._layout = self._graph = self._source = self._sink = None

    def __call__(self, frame) -> np.ndarray:
        layout = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if layout != self._layout:
            self._build(frame)
            self._layout = layout
        self._source.push(frame)
        return self._sink.pull().to_ndarray()

    def _build(self, frame) -> None:
        import av

        self._graph = graph = av.filter.Graph()  # its filters do not live without it
        if hasattr(type(graph), "threads"):
            graph.threads = 1
        self._source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or 1
        )
        rgb, self._sink = graph.add("format", "rgb24"), graph.add("buffersink")
        self._source.link_to(rgb)
        rgb.link_to(self._sink)
        graph.configure()


@dataclass(frozen=True)
class Orientation:
    """How a stored picture is displayed: first transposed, then mirrored."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @property
    def mirrored(self) -> bool:
        """Whether no rotation does the same."""
        return (self.transpose + self.mirror_x + self.mirror_y) % 2 == 1

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """[H, W, 3] or [W, H, 3] of a stored [H, W, 3]."""
        if self == UPRIGHT:
            return picture
        picture = picture.swapaxes(0, 1) if self.transpose else picture
        return np.ascontiguousarray(picture[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1])


UPRIGHT = Orientation()


def read_orientation(frame, path: str) -> Orientation:
    """By a frame's display matrix (ISO/IEC 14496-12, 8.3.2): x' = a x + c y, y' = b x + d y. Sizes are not
    scaled by it.

    Raises:
        DecodeError: it turns by an angle that is no multiple of 90 degrees (by more than one degree).
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, turned) > 0.0175 * max(straight, turned):
        raise DecodeError(
            f"{path}: cannot be decoded: it is displayed at an angle that is no multiple of 90 degrees"
        )
    return Orientation(turned > straight, *((c < 0, b < 0) if turned > straight else (a < 0, d < 0)))


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
        orientation: of the first frame.
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
    with PyavReader(VideoEntry(name)) as reader:
        table, container, frame = reader.table, reader._container, reader.first_frame
        return Inspection(
            kind=container.format.name,
            codec=reader.codec,
            frames=len(reader),
            fps=reader.fps,
            hazard=_find_hazard(table),
            open_gop=table.open_gop,
            gop=table.gop,
            streams=sum(not is_picture(stream) for stream in container.streams.video),
            stream=reader.stream.index,
            orientation=read_orientation(frame, name),
            aspect=reader.stream.sample_aspect_ratio
            if reader.stream.sample_aspect_ratio not in (None, 0, 1)
            else None,
            pixels=frame.format.name,
            full_range=frame.color_range == 2,
            size=reader.size,
        )


def _find_hazard(table) -> str | None:
    if table.edited:
        return "an edit list that hides frames"
    if table.refreshed:
        return "intra refresh, where no picture but the first is whole"
    if not table.complete:
        return "a stream that begins in the middle of a group of pictures"
    if table.crowded:
        return "key frames closer together than its frames are reordered"
    return "frames without times of their own" if table.times is None else None


def pyav_missing() -> str | None:
    try:
        import av  # noqa: F401
    except Exception as error:
        return f"PyAV, which reads every container, is not installed ({error}): `pip install av`"
    return None
