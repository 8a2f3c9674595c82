"""The decoder of choice: PyAV, which is right about every container met so far and decodes least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vmae.data.containers import seek_hazard
from vmae.data.manifest import VideoEntry
from vmae.data.video_reader import DecodeError, VideoReader, first_reason


class PyavReader(VideoReader):
    """PyAV: frames by their packets' timestamps, or counted from the start where those cannot be relied on.

    The packets are read once, undecoded. In MP4 and Matroska their presentation times, sorted, are the frames; decoding
    starts at the last key frame that is not shown after the wanted one, so leading pictures of an open GOP come out
    of the group before. Other containers (AVI keeps no presentation times; a transport stream cannot be sought
    exactly) are decoded from their start.

    Of H.264, pictures that are not wanted and that no other picture refers to (`nal_ref_idc` 0) are not decoded: half of
    the pictures with x264's defaults, at the same pixels. HEVC's word for that holds within a temporal layer only, so
    there every picture is decoded.
    """

    def __init__(self, entry: VideoEntry) -> None:
        import av

        self.path = entry.path
        self._container = None
        try:
            self._container = av.open(entry.path)
            self._stream = self._first_video(self._container)
            self.fps = float(self._stream.average_rate) if self._stream.average_rate else None
            packets = [(p.pts, p.is_keyframe) for p in self._container.demux(self._stream) if p.size and not p.is_discard]
            counted = seek_hazard(entry.path) is not None
        except DecodeError:
            self.close()
            raise
        except Exception as error:  # av.FFmpegError and OSError, UnicodeDecodeError of damaged metadata
            self.close()
            raise DecodeError(f"{self.path}: cannot be opened: {first_reason(_av_text(error), [])}") from None
        if not packets:
            self.close()
            raise DecodeError(f"{self.path}: has no frames")
        self._length = len(packets)
        self._to_rgb = av.video.reformatter.VideoReformatter()
        times = [time for time, _ in packets]
        self._counted = counted or None in times or len(set(times)) < len(times)
        if not self._counted:
            self._times = np.sort(np.array(times, np.int64))
            self._keys = np.sort(np.array([time for time, key in packets if key], np.int64))
        context = self._stream.codec_context
        self.size, self.codec = (context.width, context.height), context.name

    def _first_video(self, container):
        if not container.streams.video:
            raise DecodeError(f"{self.path}: cannot be opened: no video stream")
        stream = container.streams.best("video")
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        return stream

    def __len__(self) -> int:
        return self._length

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        if self._container is None:
            raise DecodeError(f"{self.path}: is closed")
        try:
            pictures = self._decode_counted(indices) if self._counted else self._decode_timed(self._times[indices])
        except DecodeError:
            raise
        except Exception as error:
            raise DecodeError(f"{self.path}: cannot be decoded: {first_reason(_av_text(error), [])}") from None
        if len(pictures) < len(indices):
            raise DecodeError(f"{self.path}: cannot be decoded: {len(indices) - len(pictures)} frames do not come out")
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
        import av

        shown = None if self._counted else set(self._times.tolist())
        with av.open(self.path) as container:
            for frame in container.decode(self._first_video(container)):
                if shown is None or frame.pts in shown:
                    yield frame

    def iterate(self) -> Iterator[np.ndarray]:
        import av

        try:
            yield from map(self._pixels, self.decoded())
        except DecodeError as error:
            error.library = self.backend
            raise
        except av.FFmpegError as error:
            failed = DecodeError(f"{self.path}: cannot be decoded: {first_reason(_av_text(error), [])}")
            failed.library = self.backend
            raise failed from None

    def _decode_counted(self, indices: np.ndarray) -> list[np.ndarray]:
        import av

        wanted, pictures = set(indices.tolist()), []
        with av.open(self.path) as container:  # afresh: not every container can be rewound
            for number, frame in enumerate(container.decode(self._first_video(container))):
                if number in wanted:
                    pictures.append(self._pixels(frame))
                if number >= indices[-1]:
                    break
        return pictures

    def _decode_timed(self, times: np.ndarray) -> list[np.ndarray]:
        keys = np.maximum(np.searchsorted(self._keys, times, side="right") - 1, 0)
        runs = np.split(np.arange(len(times)), np.flatnonzero(np.diff(keys)) + 1)
        return [picture for run in runs for picture in self._decode_run(int(keys[run[0]]), times[run].tolist())]

    def _decode_run(self, key: int, times: list[int]) -> list[np.ndarray]:
        """Pictures at `times`, decoded from key frame number `key` on, without those that they do not need."""
        context, wanted, unfed = self._stream.codec_context, set(times), set(times)
        pictures: dict[int, np.ndarray] = {}

        def keep(frames: Sequence) -> None:
            pictures.update((frame.pts, self._pixels(frame)) for frame in frames if frame.pts in wanted)

        for packet in self._packets_from(key, times[0]):
            if self.codec == "h264":
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            unfed.discard(packet.pts)
            keep(packet.decode())
            if not unfed:
                if len(pictures) < len(times):
                    keep(context.decode(None))  # those that it holds back to put them in order
                break
        return [pictures[time] for time in times if time in pictures]

    def _packets_from(self, key: int, wanted: int) -> Iterator:
        """Packets from key frame number `key` on, or from an earlier one if the container seeks past it."""
        for back in (0, 1, 2, 4, key):
            target = int(self._keys[max(key - back, 0)]) if len(self._keys) else int(self._times[0])
            self._container.seek(target, stream=self._stream, backward=True)
            packets = self._container.demux(self._stream)
            first = next(packets, None)
            if first is not None and first.pts is not None and first.pts <= wanted:
                yield first
                yield from packets
                return
        raise DecodeError(f"{self.path}: cannot be decoded: no key frame before the frame at {wanted} can be found")

    def _pixels(self, frame) -> np.ndarray:
        if frame.is_corrupt:
            raise DecodeError(f"{self.path}: cannot be decoded: a frame is corrupt")
        return self._to_rgb.reformat(frame, format="rgb24").to_ndarray()

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._stream = None


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
    """By a frame's display matrix (ISO/IEC 14496-12, 8.3.2): x' = a x + c y, y' = b x + d y. Sizes are not scaled by it.

    Raises:
        DecodeError: it turns by an angle that is no multiple of 90 degrees (by more than one degree).
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, turned) > 0.0175 * max(straight, turned):
        raise DecodeError(f"{path}: cannot be decoded: it is displayed at an angle that is no multiple of 90 degrees")
    return Orientation(turned > straight, *((c < 0, b < 0) if turned > straight else (a < 0, d < 0)))


def _av_text(error: Exception) -> str:
    """PyAV's message without its number and the file's name."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def pyav_missing() -> str | None:
    try:
        import av  # noqa: F401
    except Exception as error:
        return f"PyAV, which reads every container, is not installed ({error}): `pip install av`"
    return None
