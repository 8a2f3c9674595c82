"""Clips of a packed video out of its bytes and its packet table: no container is opened, and only the packets
that a clip needs are touched.

Pictures are those that PyAV's reader gives for the same file, bit by bit. Decoders are kept and used again
for videos with the same set-up: a new one allocates its pictures anew, which took 1.2 of a clip's 7.7 ms.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import numpy as np

from vmae.data.containers import av_text
from vmae.data.pyav_frames import FrameClip, FrameConverter
from vmae.data.shards.packets import PacketTable
from vmae.data.video_reader import Crop, DecodeError, VideoReader, first_reason
from vmae.errors import InputError

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext

_PADDING = 64  # bytes after a packet that FFmpeg may read (AV_INPUT_BUFFER_PADDING_SIZE)
_MOST_IDLE = 8  # decoders that a process keeps, some 2 MB each
_idle: OrderedDict[tuple, VideoCodecContext] = OrderedDict()


class PackedReader(VideoReader):
    """A packed video in memory.

    Args:
        path: name for messages.
        table: of its packets.
        video: content of the file that the table was made of.

    Raises:
        DecodeError: the table names bytes that the video does not have.
    """

    codec = "h264"
    backend = "pyav"

    def __init__(self, path: str, table: PacketTable, video: bytes) -> None:
        self.path, self.table = path, table
        self._video: memoryview | None = memoryview(video)
        if len(table.size) and int((table.offset + table.size).max()) > len(video):
            raise DecodeError(f"{path}: cannot be opened: its packet table is of another video")
        if not len(table.size):
            raise DecodeError(f"{path}: has no frames")
        self.fps = float(table.fps) if table.fps else None
        self._order = np.argsort(table.time)  # place in decoding order of each picture
        self._converter = FrameConverter(path)

    def __len__(self) -> int:
        return len(self.table.size)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.table.width, self.table.height

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        return self._decode_part(indices, None)

    def _decode_part(self, indices: np.ndarray, crop: Crop | None) -> np.ndarray:
        if self._video is None:
            raise DecodeError(f"{self.path}: is closed")
        wanted = self._order[indices]
        failure: Exception | None = None
        try:
            clip = self._decode_groups(wanted, crop)
            if not clip.missing:
                return clip.frames()
        except (InputError, MemoryError):
            raise
        except Exception as error:
            failure = error
        try:  # as PyAV's reader does where pictures do not come out
            return self._decode_from_start(wanted, crop).frames()
        except (InputError, MemoryError):
            if failure is None:
                raise
        except Exception as error:
            failure = failure or error
        raise DecodeError(f"{self.path}: cannot be decoded: {first_reason(av_text(failure), [])}") from None

    def _decode_groups(self, wanted: np.ndarray, crop: Crop | None) -> FrameClip:
        """The pictures at the places `wanted`, in their order: each group of them from the last picture
        before it that decoding can start at, without packets that they do not need."""
        clip = FrameClip(self.path, self.table.time[wanted].tolist(), crop, self._converter)
        starts = np.flatnonzero(self.table.start)
        groups = np.searchsorted(self.table.time[starts], self.table.time[wanted], side="right") - 1
        with _decoder(self.table) as context:
            for group in dict.fromkeys(groups.tolist()):
                self._send(context, int(starts[group]), set(wanted[groups == group].tolist()), clip)
        return clip

    def _decode_from_start(self, wanted: np.ndarray, crop: Crop | None) -> FrameClip:
        """The same; every packet before them is decoded."""
        clip = FrameClip(self.path, self.table.time[wanted].tolist(), crop, self._converter)
        with _decoder(self.table) as context:
            self._send(context, 0, set(wanted.tolist()), clip, skip=False)
        return clip

    def _send(
        self, context: VideoCodecContext, first: int, wanted: set[int], clip: FrameClip, *, skip: bool = True
    ) -> None:
        """Decode packets from place `first` to the last of the places `wanted`, and keep these pictures."""
        import av

        table, part = self.table, slice(first, max(wanted) + 1)
        times = set(table.time[list(wanted)].tolist())
        columns = (column[part].tolist() for column in (table.offset, table.size, table.time, table.needed))
        for place, (offset, size, time, needed) in enumerate(zip(*columns, strict=True), first):
            if skip and not needed and place not in wanted:
                continue
            # a view, so that bytes stand after it; PyAV's stub knows bytes only
            packet = av.Packet(cast("bytes", self._packet(offset, size)))
            packet.pts = time
            for frame in context.decode(packet):
                clip.offer(frame.pts, frame, times)
        for frame in context.decode(None):  # those that it holds back to put them in order
            clip.offer(frame.pts, frame, times)
        context.flush_buffers()
        context.reorder_depth = table.reorder

    def _packet(self, offset: int, size: int) -> memoryview:
        assert self._video is not None  # `_decode_part` looked
        if offset + size + _PADDING <= len(self._video):
            return self._video[offset : offset + size]
        return memoryview(bytes(self._video[offset : offset + size]) + bytes(_PADDING))[:size]

    def close(self) -> None:
        self._video = None


@contextlib.contextmanager
def _decoder(table: PacketTable) -> Iterator[VideoCodecContext]:
    """A decoder for the videos of a set-up that nobody else has meanwhile; kept unless it fails."""
    key = (table.extradata, table.width, table.height, table.colours, table.reorder)
    context = _idle.pop(key, None) or _open_decoder(table)
    yield context
    _idle[key] = context
    while len(_idle) > _MOST_IDLE:
        _idle.popitem(last=False)


def _open_decoder(table: PacketTable) -> VideoCodecContext:
    import av

    context = av.CodecContext.create("h264", "r")
    context.extradata = table.extradata
    context.thread_type, context.thread_count = "NONE", 1
    context.width, context.height = table.width, table.height
    context.color_range, context.color_primaries, context.color_trc, context.colorspace = table.colours
    context.reorder_depth = table.reorder
    return context
