"""Where each picture stands in a packed video: what a reader would learn by opening the file and reading all
of its packets.

A packed video (H.264 in MP4, one stream, every picture shown as it is stored) gets a table when it is packed;
it stands before the video in the shard. With it a clip's packets are cut out of the video's bytes and given
to the decoder: no container is opened and no packet that a clip does not need is read. Other videos get no
table, and are opened as files are.

Bytes, little-endian (some 3.3 for a picture, and some 110):

    header      `_HEADER`: sizes, times, colours, counts
    set-up      of the decoder (`avcC`)
    columns     for each packet in decoding order: bytes; bytes between it and the one before; time, as steps
                from the one before. A column is its width in bytes, then its values
    flags       two rows of bits: decoding can start here; other pictures need it
    CRC-32      of all before it
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from vmae.data.containers import FORMATS, length_bytes, open_container, pick_stream, units
from vmae.data.manifest import VideoEntry
from vmae.data.orientation import UPRIGHT, read_orientation
from vmae.data.readers.pyav import PyavReader
from vmae.data.shards.memory_file import memory_file
from vmae.data.video_reader import DecodeError

if TYPE_CHECKING:
    import av

_MAGIC, _VERSION = b"vmpt", 1
# magic, version, reorder depth, length of the set-up; range, primaries, transfer, matrix; width, height; time
# base; frames a second; packets; first offset; first time, step of times
_HEADER = struct.Struct("<4sBBH4BIIIIIIIQqQ")
_CRC = struct.Struct("<I")
# kinds of H.264 units: slices of pictures, and set-ups
_SLICES, _SETUP = range(1, 6), {7, 8, 13, 15}


@dataclass(frozen=True)
class PacketTable:
    """The packets of a video, and what its decoder must be told.

    Attributes:
        extradata: the decoder's set-up (`avcC`).
        width, height: pixels, stored and displayed.
        colours: FFmpeg's numbers of range, primaries, transfer and matrix, as the file tells them.
        reorder: pictures that the decoder holds back to put them in order.
        time_base: seconds of a step of time.
        fps: frames a second; None where it is not known.
        offset, size: int64 [N], bytes of each packet in the video, in decoding order.
        time: int64 [N], presentation times.
        start: bool [N], whether decoding can start here.
        needed: bool [N], whether other pictures refer to it.
    """

    extradata: bytes
    width: int
    height: int
    colours: tuple[int, int, int, int]
    reorder: int
    time_base: Fraction
    fps: Fraction | None
    offset: np.ndarray
    size: np.ndarray
    time: np.ndarray
    start: np.ndarray
    needed: np.ndarray

    @classmethod
    def read(cls, data: bytes) -> PacketTable | None:
        """The table that `write` gave; None where a later version wrote it.

        Raises:
            ValueError: it is damaged, or no table.
        """
        if len(data) < 5 or data[:4] != _MAGIC:
            raise ValueError("no packet table")
        if data[4] != _VERSION:
            return None
        if len(data) < _HEADER.size + _CRC.size or _CRC.unpack(data[-_CRC.size :])[0] != zlib.crc32(
            memoryview(data)[: -_CRC.size]
        ):
            raise ValueError("packet table is damaged (CRC-32)")
        _, _, reorder, setup, *rest = _HEADER.unpack_from(data)
        width, height, *rates, count, offset, time, step = rest[4:]
        place = _HEADER.size + setup
        columns = []
        for _ in range(3):
            column, place = _read_column(data, place, count)
            columns.append(column)
        size, gap, steps = columns[0], _unfold(columns[1]), _unfold(columns[2])
        before = np.concatenate([[0], size[:-1]])
        row = -(-count // 8)
        bits = np.frombuffer(data, np.uint8, 2 * row, place).reshape(2, row)
        start, needed = np.unpackbits(bits, axis=1, count=count).astype(bool)
        return cls(
            data[_HEADER.size : _HEADER.size + setup],
            width,
            height,
            tuple(rest[:4]),
            reorder,
            Fraction(rates[0], rates[1]),
            Fraction(rates[2], rates[3]) if rates[3] else None,
            offset + np.cumsum(before + gap),
            size,
            time + np.cumsum(steps) * step,
            start,
            needed,
        )

    def write(self) -> bytes | None:
        """The table's bytes; None where a number has no room."""
        fps = self.fps or Fraction(0)
        rates = (*self.time_base.as_integer_ratio(), fps.numerator, fps.denominator if self.fps else 0)
        fits = (
            max(self.reorder, *self.colours) <= 255
            and len(self.extradata) <= 65_535
            and max(self.width, self.height, len(self.size), *rates) < 2**32
        )
        if not fits:
            return None
        delta = np.diff(self.time, prepend=self.time[0])
        step = int(np.gcd.reduce(delta)) or 1
        ends = self.offset + self.size
        gap = np.diff(self.offset, prepend=self.offset[0])
        gap[1:] = self.offset[1:] - ends[:-1]
        header = _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.reorder,
            len(self.extradata),
            *self.colours,
            self.width,
            self.height,
            *rates,
            len(self.size),
            int(self.offset[0]),
            int(self.time[0]),
            step,
        )
        columns = [_write_column(column) for column in (self.size, _fold(gap), _fold(delta // step))]
        flags = np.packbits(np.stack([self.start, self.needed]), axis=1).tobytes()
        data = b"".join([header, self.extradata, *columns, flags])
        return data + _CRC.pack(zlib.crc32(data))


def _fold(values: np.ndarray) -> np.ndarray:
    """int64, at least 0, small where `values` are near 0."""
    return (values << 1) ^ (values >> 63)


def _unfold(values: np.ndarray) -> np.ndarray:
    return (values >> 1) ^ -(values & 1)


def _write_column(values: np.ndarray) -> bytes:
    """As many bytes for each value (int64, at least 0) as the largest needs."""
    width = (int(values.max()).bit_length() + 7) // 8
    wide = values.astype("<i8").view(np.uint8).reshape(-1, 8)
    return bytes([width]) + wide[:, :width].tobytes()


def _read_column(data: bytes, place: int, count: int) -> tuple[np.ndarray, int]:
    """(int64 [count], where the next column begins)."""
    width = data[place]
    wide = np.zeros((count, 8), np.uint8)
    wide[:, :width] = np.frombuffer(data, np.uint8, count * width, place + 1).reshape(count, width)
    return wide.view("<i8").reshape(-1), place + 1 + count * width


def make_table(video: bytes) -> bytes:
    """The packet table of a video; empty where it does not suit, so that it is opened as a file is.

    It suits where it is H.264 (4:2:0) in MP4, alone in its file, upright, whole from its first picture on,
    with one set-up for all of its pictures and a time of its own for each, none hidden by an edit list.

    Args:
        video: content of the file.
    """
    handle, path = memory_file(video)
    try:
        with PyavReader(VideoEntry(path)) as reader:
            table = _table_of(reader, video) if _suits(reader) else None
    except DecodeError:  # whoever opens it learns why
        return b""
    finally:
        os.close(handle)
    return (table and table.write()) or b""


def _suits(reader: PyavReader) -> bool:
    """Whether a table can stand for what the file tells of the stream."""
    container, packets = reader.container, reader.table
    return bool(
        reader.codec == "h264"
        and container.format.name == FORMATS["MP4"]
        and len(container.streams) == 1
        and not (packets.edited or packets.refreshed)
        and packets.complete
        and packets.times is not None
        and "420" in reader.first_frame.format.name
        and read_orientation(reader.first_frame, reader.path) == UPRIGHT
    )


def _table_of(reader: PyavReader, video: bytes) -> PacketTable | None:
    """None where its packets do not stand in `video` one by one, or change the decoder's set-up."""
    context, stream, packets = reader.stream.codec_context, reader.stream, reader.table
    prefix = length_bytes(context.extradata)
    with open_container(reader.path) as container:
        found = [
            _find(packet, video, prefix) for packet in container.demux(pick_stream(container)) if packet.size
        ]
    start, time = (np.array([getattr(row, name) for row in packets.rows]) for name in ("key", "time"))
    rows = [row for row in found if row is not None]
    if not prefix or len(rows) < len(found) or len(found) != len(time) or (np.diff(time[start]) <= 0).any():
        return None
    offset, size, needed = np.array(rows, np.int64).T
    return PacketTable(
        bytes(context.extradata or b""),
        reader.first_frame.width,
        reader.first_frame.height,
        (context.color_range, context.color_primaries, context.color_trc, context.colorspace),
        context.reorder_depth,
        Fraction(stream.time_base or 1),
        stream.average_rate,
        offset,
        size,
        time.astype(np.int64),
        start,
        needed > 0,
    )


def _find(packet: av.Packet, video: bytes, prefix: int) -> tuple[int, int, bool] | None:
    """(offset, bytes, whether others need it) of a packet; None where it is not in `video` as it is, or
    brings another set-up."""
    place, data = packet.pos, bytes(packet)
    if place is None or video[place : place + len(data)] != data or packet.has_sidedata("new_extradata"):
        return None
    heads = [unit[0] for unit in units(data, prefix) if unit]
    kinds = {head & 31 for head in heads}
    if kinds & _SETUP:
        return None
    needed = any(head >> 5 & 3 for head in heads if head & 31 in _SLICES)
    return place, len(data), needed
