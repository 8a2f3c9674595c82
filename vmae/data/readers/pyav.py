"""PyAV, the default: it is right about every container met so far and decodes least."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from vmae.data.containers import FORMATS, av_text, open_container, pick_stream, read_packets
from vmae.data.manifest import VideoEntry
from vmae.data.orientation import read_orientation
from vmae.data.pyav_frames import FrameClip, FrameConverter
from vmae.data.readers import Backend, Library
from vmae.data.video_reader import Crop, DecodeError, VideoReader, first_reason
from vmae.errors import InputError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

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
        self._container: InputContainer | None = None
        self._stream: VideoStream | None = None
        self._converter = FrameConverter(entry.path)
        try:
            self._container = container = open_container(entry.path)
            self._stream = stream = pick_stream(container, entry.path)
            self.fps = float(stream.average_rate) if stream.average_rate else None
            self.codec = stream.codec_context.name
            self.table = read_packets(container, stream)
            self._length = len(self.table.shown)
            seekable = container.format.name in _SEEKABLE
            if not self._length:
                raise DecodeError(f"{self.path}: has no frames")
            if self.table.refreshed and (self.table.spliced or not self.table.complete):
                raise DecodeError(
                    f"{self.path}: cannot be decoded: intra refresh, cut where no picture is whole"
                )
            self._times = self.table.times if seekable else None
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
                found = slice(0) if first is None else self._times >= first.pts
                self._times = self._times[found]
                self._length = len(self._times)

    def _whole_frames(self, container: InputContainer) -> Iterator[av.VideoFrame]:
        """All frames, from the first whole picture on."""
        self._converter.restart()
        frames = container.decode(pick_stream(container, self.path))
        if self.table.complete:
            return frames
        return itertools.dropwhile(lambda frame: frame.pict_type != _INTRA, frames)

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def first_frame(self) -> av.VideoFrame:
        """The first frame as decoded: it has the display matrix, the pixel format and the size."""
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
        return self._decode_part(indices, None)

    def _decode_part(self, indices: np.ndarray, crop: Crop | None) -> np.ndarray:
        if self._container is None:
            raise DecodeError(f"{self.path}: is closed")
        try:
            if self._times is None:
                clip = self._decode_from_start(indices.tolist(), crop, by_time=False)
            else:
                clip = self._decode_timed(self._times[indices].tolist(), crop)
        except (InputError, MemoryError):
            raise
        except Exception as error:
            raise DecodeError(f"{self.path}: cannot be decoded: {first_reason(av_text(error), [])}") from None
        return clip.frames()

    @property
    def container(self) -> InputContainer:
        """PyAV's container; raises DecodeError once the reader is closed."""
        if self._container is None:
            raise DecodeError(f"{self.path}: is closed")
        return self._container

    @property
    def stream(self) -> VideoStream:
        """PyAV's stream that the frames come from; raises DecodeError once the reader is closed."""
        if self._stream is None:
            raise DecodeError(f"{self.path}: is closed")
        return self._stream

    def decoded(self) -> Iterator[av.VideoFrame]:
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
            yield from map(self._converter.picture, self.decoded())
        except DecodeError as error:
            error.library = self.backend
            raise
        except Exception as error:
            failed = DecodeError(f"{self.path}: cannot be decoded: {first_reason(av_text(error), [])}")
            failed.library = self.backend
            raise failed from None

    def _decode_from_start(self, wanted: list[int], crop: Crop | None, *, by_time: bool) -> FrameClip:
        """Frames by number, or by presentation time, ascending; each frame before them is decoded."""
        clip = FrameClip(self.path, wanted, crop, self._converter)
        with open_container(self.path) as container:  # afresh: not every container can be rewound
            for number, frame in enumerate(self._whole_frames(container)):
                clip.offer(frame.pts if by_time else number, frame, clip.missing)
                if not clip.missing:
                    break
        return clip

    def _decode_timed(self, times: list[int], crop: Crop | None) -> FrameClip:
        keys = np.searchsorted(self.table.keys, times, side="right") - 1
        runs = np.split(np.arange(len(times)), np.flatnonzero(np.diff(keys)) + 1)
        clip = FrameClip(self.path, times, crop, self._converter)
        failure: Exception | None = None
        try:
            for run in runs:
                self._decode_run(int(keys[run[0]]), times[run[0] : run[-1] + 1], clip)
        except InputError:
            raise
        except Exception as error:
            failure = error
        if not clip.missing:
            return clip
        try:
            return self._decode_from_start(times, crop, by_time=True)
        except Exception as error:
            raise failure or error from None

    def _decode_run(self, key: int, times: list[int], clip: FrameClip) -> None:
        """Add the pictures at `times`, decoded from key frame number `key` on, without those that they do not
        need."""
        context, wanted, unfed = self.stream.codec_context, set(times), set(times)
        self._converter.restart()
        for packet in self._packets_from(key, times[0]):
            if self.codec == "h264":
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            if not packet.is_discard:  # one that an edit list hides may have the time of a shown one
                unfed.discard(packet.pts)
            for frame in packet.decode():
                clip.offer(frame.pts, frame, wanted)
            if not unfed:
                if not wanted.isdisjoint(clip.missing):
                    for frame in context.decode(None):  # those that it holds back to put them in order
                        clip.offer(frame.pts, frame, wanted)
                break

    def _packets_from(self, key: int, wanted: int) -> Iterator[av.Packet]:
        """Packets from key frame number `key` on, or from an earlier one if the container seeks past it; none
        if it does so with all of them, or where `key` is -1."""
        if key < 0:
            return
        for number in sorted({max(key - back, 0) for back in (0, 1, 2, 4)}, reverse=True):
            self.container.seek(int(self.table.keys[number]), stream=self.stream, backward=True)
            packets = self.container.demux(self.stream)
            first = next(packets, None)
            if first is not None and first.pts is not None and first.pts <= wanted:
                yield first
                yield from packets
                return

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._stream = None


def _missing() -> str | None:
    try:
        import av  # noqa: F401
    except Exception as error:
        return f"PyAV, which reads every container, is not installed ({error}): `pip install av`"
    return None


# The first of `auto`: it leaves out pictures that H.264 does not need, so it beats torchcodec there (clips of
# 16 frames, stride 4, short side 256, one core: bench/data.py), and it refuses least.
BACKEND = Backend(
    "pyav",
    ("video",),
    PyavReader,
    _missing,
    order=10,
    library=Library(
        name="PyAV",
        module="av",
        packages=("av",),
        install="pip install av",
        without="AVI, MPEG-TS and many open GOPs are refused, H.264 is slower, `vmae pack` and DALI's loader "
        "do not run",
    ),
)
