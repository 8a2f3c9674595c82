"""What a video file's container shows without a decoder: its kind, and in MP4 whether groups of pictures are open.

Decoders seek by what the container says, and not all are right about all of it. Measured on videos whose frames show
their own number (tests/data/test_indices.py): decord 0.6 returned wrong frames, in silence, for 30 % of reads of open
GOPs and for most of AVI and MPEG-TS; torchcodec 0.13 (exact) was wrong on H.264 in AVI and failed on MPEG-TS.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

_REORDERING = {b"avc1", b"avc2", b"avc3", b"avc4", b"hvc1", b"hev1", b"dvh1", b"dvhe"}  # H.264 and HEVC in MP4
_MP4_STARTS = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"}
_STREAM_STARTS = {
    b"FLV\x01": "FLV",
    b"\x30\x26\xb2\x75": "ASF",
    b"\x00\x00\x01\xba": "MPEG-PS",
    b"\x00\x00\x00\x01": "a raw stream",
    b"\x00\x00\x01\xb3": "a raw stream",
}


def container_kind(path: str) -> str:
    """ "MP4", "Matroska", "AVI", "MPEG-TS", "MPEG-PS", "FLV", "ASF", "a raw stream", or "unknown"; by its first bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(400)
    if head[4:8] in _MP4_STARTS:
        return "MP4"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "Matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "AVI"
    for offset, size in ((0, 188), (4, 192)):  # packets of 188 bytes; of 192 on discs
        if head[offset : offset + 1] == b"\x47" and head[offset + size : offset + size + 1] == b"\x47":
            return "MPEG-TS"
    return _STREAM_STARTS.get(head[:4], "unknown")


def seek_hazard(path: str) -> str | None:
    """Why seeking to a frame by timestamps of this file's index is not safe; None where it is, or for a file of no
    known kind (which no decoder opens, most likely).

    Raises:
        OSError: the file cannot be read.
    """
    kind = container_kind(path)
    return None if kind in ("MP4", "Matroska", "unknown") else kind


def open_gop_hazard(path: str) -> str | None:
    """Why leading pictures of an open group of pictures may be met here; None where the container rules them out.

    Raises:
        OSError: the file cannot be read.
    """
    kind = container_kind(path)
    if kind == "Matroska":
        with open(path, "rb") as file:
            head = file.read(1 << 16)
        if b"V_MPEG4/ISO/AVC" in head or b"V_MPEGH/ISO/HEVC" in head:
            return "H.264 or HEVC in Matroska, which does not show whether GOPs are open"
    if kind == "MP4":
        track = read_mp4_track(path)
        if track is not None and track.codec in _REORDERING:
            if track.open_gop is None:
                return "a fragmented MP4, which does not show whether GOPs are open"
            return "open GOP" if track.open_gop else None
    return None


@dataclass(frozen=True)
class Mp4Track:
    """The video track of an MP4 file, by its sample tables.

    Attributes:
        codec: four letters, for example b"avc1".
        open_gop: whether a picture stands after a key frame in the file and before it in time; None if there are no tables.
    """

    codec: bytes
    open_gop: bool | None


def read_mp4_track(path: str) -> Mp4Track | None:
    """The first video track; None where there is none, or the file is damaged.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        moov = _find_top_level(file, b"moov")
    if moov is None:
        return None
    try:
        for kind, track in _boxes(moov):
            media = dict(_boxes(track)).get(b"mdia") if kind == b"trak" else None
            parts = dict(_boxes(media)) if media is not None else {}
            if parts.get(b"hdlr", b"")[8:12] == b"vide":
                return _read_track(dict(_boxes(dict(_boxes(parts[b"minf"]))[b"stbl"])))
    except (KeyError, ValueError, struct.error):
        return None
    return None


def _find_top_level(file: BinaryIO, wanted: bytes, limit: int = 1 << 28) -> bytes | None:
    """Content of a box of the file, which is walked by the sizes of its boxes."""
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        start = 8
        if size == 1:
            size, start = int.from_bytes(file.read(8), "big"), 16
        if kind == wanted:
            return file.read(size - start if 0 < size <= limit else limit)
        if size < start:  # 0: up to the end of the file
            return None
        file.seek(size - start, 1)
    return None


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 0
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        if size < 8:
            raise ValueError(f"box {kind!r} of {size} bytes")
        yield kind, data[place + 8 : place + size]
        place += size


def _table(data: bytes, columns: int, dtype: str = ">u4") -> np.ndarray:
    """int64 [entries, columns] of a table box: version and flags, the count, the entries."""
    count = int.from_bytes(data[4:8], "big")
    return np.frombuffer(data, dtype, count * columns, 8).reshape(count, columns).astype(np.int64)


def _read_track(tables: dict[bytes, bytes]) -> Mp4Track:
    codec = tables[b"stsd"][12:16]
    times = _table(tables[b"stts"], 2)
    steps = np.repeat(times[:, 1], times[:, 0])
    if not len(steps):
        return Mp4Track(codec, None)
    if b"stss" not in tables or b"ctts" not in tables:  # only key frames, or no picture out of order
        return Mp4Track(codec, False)
    decoded = np.concatenate([[0], np.cumsum(steps)[:-1]])
    offsets = _table(tables[b"ctts"], 2, ">i4")
    shown = decoded + np.repeat(offsets[:, 1], offsets[:, 0])[: len(decoded)]
    keys = _table(tables[b"stss"], 1)[:, 0] - 1
    group = np.searchsorted(keys, np.arange(len(shown)), side="right") - 1
    inside = group >= 0
    return Mp4Track(codec, bool((shown[inside] < shown[keys[group[inside]]]).any()))
