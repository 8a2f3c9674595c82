"""Clips of a packed video out of its bytes and its packet table: no container is opened, and only the packets
that a clip needs are touched.

Pictures are those that PyAV's reader gives for the same file, bit by bit. Decoders are kept and used again
for videos with the same set-up: a new one allocates its pictures anew, which took 1.2 of a clip's 7.7 ms.
"""

from __future__ import annotations

from collections import OrderedDict
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
            clip = self._decode_packets(self._needed(wanted), wanted, crop)
            if not clip.missing:
                return clip.frames()
        except (InputError, MemoryError):
            raise
        except Exception as error:
            failure = error
        try:  # as PyAV's reader does where pictures do not come out
            return self._decode_packets(np.arange(int(wanted.max()) + 1), wanted, crop).frames()
        except (InputError, MemoryError):
            if failure is None:
                raise
        except Exception as error:
            failure = failure or error
        raise DecodeError(f"{self.path}: cannot be decoded: {first_reason(av_text(failure), [])}") from None

    def _needed(self, wanted: np.ndarray) -> np.ndarray:
        """int64, ascending: places of the packets of the pictures at the places `wanted`, and of what they
        need."""
        starts = np.flatnonzero(self.table.start)
        groups = np.searchsorted(self.table.time[starts], self.table.time[wanted], side="right") - 1
        send = np.zeros(len(self.table.size), bool)
        for group in np.unique(groups).tolist():
            part = slice(int(starts[group]), int(wanted[groups == group].max()) + 1)
            send[part] = self.table.needed[part]
        send[wanted] = True
        return np.flatnonzero(send)

    def _decode_packets(self, places: np.ndarray, wanted: np.ndarray, crop: Crop | None) -> FrameClip:
        """The pictures at the places `wanted`, in their order, out of the packets at `places`."""
        import av

        table, names = self.table, self.table.time[wanted].tolist()
        clip = FrameClip(self.path, names, crop, self._converter)
        key = (table.extradata, table.width, table.height, table.colours, table.reorder)
        context = _idle.pop(key, None) or _open_decoder(table)
        jumps = self._jumps(places)
        columns = (table.offset[places], table.size[places], table.time[places], jumps)
        for offset, size, time, jump in zip(*(column.tolist() for column in columns), strict=True):
            if jump:  # what it holds back comes out, and nothing before is known any more
                for frame in context.decode(None):
                    clip.offer(frame.pts, frame, clip.missing)
                context.flush_buffers()
                context.reorder_depth = table.reorder
            # a view, so that bytes stand after it; PyAV's stub knows bytes only
            packet = av.Packet(cast("bytes", self._packet(offset, size)))
            packet.pts = time
            for frame in context.decode(packet):
                clip.offer(frame.pts, frame, clip.missing)
        if clip.missing:
            for frame in context.decode(None):
                clip.offer(frame.pts, frame, clip.missing)
        context.flush_buffers()
        context.reorder_depth = table.reorder
        _idle[key] = context
        while len(_idle) > _MOST_IDLE:
            _idle.popitem(last=False)
        return clip

    def _jumps(self, places: np.ndarray) -> np.ndarray:
        """bool: before which packets others are left out that their decoding could lean on."""
        table = self.table
        before = np.concatenate([[0], np.cumsum(table.needed)])  # needed packets before each place
        left_out = np.diff(before[places], prepend=0) > np.concatenate([[0], table.needed[places[:-1]]])
        return left_out & ~table.fresh[places] & (np.arange(len(places)) > 0)

    def _packet(self, offset: int, size: int) -> memoryview:
        assert self._video is not None  # `_decode_part` looked
        if offset + size + _PADDING <= len(self._video):
            return self._video[offset : offset + size]
        return memoryview(bytes(self._video[offset : offset + size]) + bytes(_PADDING))[:size]

    def close(self) -> None:
        self._video = None


def _open_decoder(table: PacketTable) -> VideoCodecContext:
    import av

    context = av.CodecContext.create("h264", "r")
    context.extradata = table.extradata
    context.thread_type, context.thread_count = "NONE", 1
    context.width, context.height = table.width, table.height
    context.color_range, context.color_primaries, context.color_trc, context.colorspace = table.colours
    context.reorder_depth = table.reorder
    return context
