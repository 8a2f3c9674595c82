"""What a video file shows without decoding it: its kind, and in its packets, which frames it has and where
decoding may start.

Files are opened for reading here and nowhere else. FFmpeg knows formats that are no videos but name them:
DASH, HLS and other playlists, SDP, concat scripts; it follows what they name, to other files and to servers.
So it gets an absolute path (a relative `http:/host/x.mp4` is a URL to it) and a list of the formats that it
may take a file for.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from vmae.data.video_reader import DecodeError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Kind: FFmpeg's names of the formats. All of them hold pictures themselves.
FORMATS = {
    "MP4": "mov,mp4,m4a,3gp,3g2,mj2",
    "Matroska": "matroska,webm",
    "AVI": "avi",
    "MPEG-TS": "mpegts",
    "MPEG-PS": "mpeg",
    "FLV": "flv,live_flv,kux",
    "ASF": "asf,asf_o",
    "Ogg": "ogg",
    "GIF": "gif",
    "a raw stream": "h264,hevc,vvc,h263,h261,m4v,mpegvideo,cavsvideo,vc1,obu,dirac,dv,yuv4mpegpipe",
    "IVF": "ivf",
    "MXF": "mxf",
    "RealMedia": "rm",
    "NUT": "nut",
    "another container": "amv,gxf,ivr,lxf,nsv,nuv,wtv",
}
_KINDS = {name: kind for kind, names in FORMATS.items() for name in (names, *names.split(","))}
_OPTIONS = {"format_whitelist": ",".join(FORMATS.values()), "protocol_whitelist": "file"}

_MP4_STARTS = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"}
_PICTURE_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"mif1", b"mif2", b"avif", b"avio", b"jxl "}
_STARTS = {
    b"FLV\x01": "FLV",
    b"\x30\x26\xb2\x75": "ASF",
    b"\x00\x00\x01\xba": "MPEG-PS",
    b"\x00\x00\x00\x01": "a raw stream",
    b"\x00\x00\x01\xb3": "a raw stream",
    b"OggS": "Ogg",
    b"GIF8": "GIF",
    b"DKIF": "IVF",
    b".RMF": "RealMedia",
}


def container_kind(path: str) -> str:
    """A key of `FORMATS`, or "unknown"; by the file's first bytes, and in MP4 by the sizes of its boxes.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(400)
    if head[4:8] in _MP4_STARTS:
        first_box = int.from_bytes(head[:4], "big")
        branded = head[4:8] == b"ftyp" and 8 < first_box <= os.path.getsize(path)
        # Where the file is cut off, the index may have stood behind its end.
        video_brand = branded and head[8:12] not in _PICTURE_BRANDS
        return "MP4" if video_brand or _has_index(path) else "unknown"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "Matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "AVI"
    for offset, size in ((0, 188), (4, 192)):  # packets of 188 bytes; of 192 on discs
        if head[offset : offset + 1] == b"\x47" and head[offset + size : offset + size + 1] == b"\x47":
            return "MPEG-TS"
    return _STARTS.get(head[:4], "unknown")


def _has_index(path: str) -> bool:
    """Whether an MP4 file is a chain of boxes, each within it, and one of them lists the samples of tracks.

    Pictures (HEIC, AVIF) have none. A playlist may begin `<!--skip-->`, which is a box of a gigabyte called
    "skip".
    """
    with open(path, "rb") as file:
        return any(kind in (b"moov", b"moof") for kind, _ in _top_boxes(file))


def _find_lie(path: str) -> str | None:
    """A count of samples in an MP4 file's index that the file's size belies.

    PyAV asked for 5 GB and 14 s for a file of 10 kB, decord for so much that its process was ended.
    """
    with open(path, "rb") as file:
        if file.read(8)[4:] not in _MP4_STARTS:
            return None
        length = os.fstat(file.fileno()).st_size
        index = next((file.read(size) for kind, size in _top_boxes(file) if kind == b"moov"), b"")
    for match in re.finditer(b"stsz|stts|ctts", index):
        first, second = struct.unpack_from(">II", index[match.end() : match.end() + 12].ljust(12, b"\0"), 4)
        if match[0] == b"stsz":  # bytes of a sample, number of samples
            count = second * max(first, 1)
        else:  # number of entries; each begins with a number of samples
            entries = index[match.end() + 8 : match.end() + 8 + 8 * first]
            count = first << 32  # where not all of them are there
            if len(entries) == 8 * first:
                count = int(np.frombuffer(entries, ">u4")[::2].sum(dtype=np.int64))
        # Sound may count its samples one by one: a byte of MP3 holds 22 of them at 16 kbit/s.
        if count > 64 * length:
            return f"its index counts more samples than its {length} bytes can hold"
    return None


def names_other_files(path: str) -> bool:
    """Whether FFmpeg may take a video for a manifest: it looks for their text up to the first zero byte.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read(1 << 20).split(b"\0", 1)[0].lower()
    return any(mark in text for mark in (b"<mpd", b"<compositionplaylist", b"<smoothstreamingmedia"))


def _top_boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(kind, bytes of its content) of an MP4 file's top boxes, up to the first that is not whole; `file` is
    at the content."""
    length, place = os.fstat(file.fileno()).st_size, 0
    while place + 8 <= length:
        file.seek(place)
        size, kind = struct.unpack(">I4s", file.read(8))
        start = 8
        if size == 1:
            size, start = int.from_bytes(file.read(8), "big"), 16
        size = size or length - place  # 0: up to the end of the file
        if not start <= size <= length - place:
            return
        yield kind, size - start
        place += size


def open_container(path: str | os.PathLike) -> InputContainer:
    """PyAV's container of a video file, open; a context manager. Never of a file or server that it names.

    Raises:
        DecodeError: the file cannot be opened, or is no video: a picture, sound, a playlist, a manifest.
    """
    import av

    name = os.fspath(path)
    try:
        if lie := _find_lie(name):
            raise DecodeError(f"{name}: cannot be opened: {lie}")
        container = av.open(os.path.abspath(name), container_options=_OPTIONS)
    except DecodeError:
        raise
    except Exception as error:  # av.FFmpegError and OSError, UnicodeDecodeError of damaged metadata
        reason = av_text(error)
        if reason == "Invalid argument":  # what FFmpeg says of a format that is not in the list
            reason = "not a video file (pictures, sound, playlists and manifests are none)"
        raise DecodeError(f"{name}: cannot be opened: {reason}") from None
    if container.metadata.get("major_brand", "").encode() in _PICTURE_BRANDS and not _has_index(name):
        container.close()
        raise DecodeError(f"{name}: cannot be opened: a picture, not a video")
    return container


def pick_stream(container: InputContainer, path: str | os.PathLike | None = None) -> VideoStream:
    """FFmpeg's best video stream, with one thread to decode it; never a cover picture.

    Args:
        container: result of `open_container`.
        path: name of the file in messages.

    Raises:
        DecodeError: there is none, or no decoder for it.
    """
    videos = [stream for stream in container.streams.video if not is_picture(stream)]
    best = container.streams.best("video")
    stream = next((video for video in videos if video == best), videos[0] if videos else None)
    if stream is None or stream.codec_context is None:
        raise DecodeError(f"{path or container.name}: cannot be opened: no video stream that can be decoded")
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


def is_picture(stream: VideoStream) -> bool:
    """Whether a video stream is a cover or a still."""
    kinds = type(stream.disposition)
    return bool(stream.disposition & (kinds.attached_pic | kinds.still_image | kinds.timed_thumbnails))


def av_text(error: Exception) -> str:
    """PyAV's message without its number and the file's name."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class PacketRow(NamedTuple):
    """A packet of a video stream.

    Attributes:
        time: presentation time in the stream's units; None where the file has none.
        key: whether decoding can start here.
        hidden: whether an edit list hides it.
    """

    time: int | None
    key: bool
    hidden: bool


@dataclass(frozen=True)
class PacketTable:
    """What the packets of a video stream show, undecoded.

    Attributes:
        rows: one for each packet, as they come in the file.
        crowded: whether a key frame's time is not before the decoding of the next one, so that a seek to the
            first may find the second.
        refreshed: whether packets that are marked as key frames are none (H.264 with intra refresh).
    """

    rows: list[PacketRow]
    crowded: bool
    refreshed: bool

    @cached_property
    def shown(self) -> list[int | None]:
        """Times of the packets that are shown, as they come in the file."""
        return [row.time for row in self.rows if not row.hidden]

    @cached_property
    def times(self) -> np.ndarray | None:
        """int64 [shown], in order; None where packets lack times or share them."""
        if None in self.shown or len(set(self.shown)) < len(self.shown):
            return None
        return np.sort(np.array(self.shown, np.int64))

    @cached_property
    def keys(self) -> np.ndarray:
        """int64 [K], presentation times of the packets that decoding can start at, in order; hidden ones
        too."""
        times = [row.time for row in self.rows if row.key and row.time is not None]
        return np.sort(np.array(times, np.int64))

    @property
    def complete(self) -> bool:
        """Whether decoding can start at the first packet, and none is shown before it."""
        first = self.rows[0]
        if not first.key:
            return False
        if self.times is None or first.time is None or not len(self.times):
            return True
        return bool(self.times[0] >= first.time)

    @property
    def edited(self) -> bool:
        """Whether an edit list hides packets."""
        return len(self.shown) < len(self.rows)

    @property
    def spliced(self) -> bool:
        """Whether it hides some between shown ones."""
        runs = [hidden for hidden, _ in itertools.groupby(row.hidden for row in self.rows)]
        return runs.count(False) > 1

    @property
    def open_gop(self) -> bool:
        """Whether a packet stands after a key frame in the file and before it in time; False where times are
        not known."""
        if self.times is None:
            return False
        newest = None  # time of the last key frame
        for row in self.rows:
            if row.key:
                newest = row.time
            elif row.time is not None and newest is not None and row.time < newest:
                return True
        return False

    @property
    def gop(self) -> float | None:
        """Median of the packets from one key frame to the next; None where there is none."""
        places = [*(place for place, row in enumerate(self.rows) if row.key), len(self.rows)]
        return float(np.median(np.diff(places))) if len(places) > 1 else None


def read_packets(container: InputContainer, stream: VideoStream) -> PacketTable:
    """Read all packets of `stream`."""
    context = stream.codec_context
    h264 = context.name == "h264"
    prefix = length_bytes(context.extradata) if h264 else 0
    rows: list[PacketRow] = []
    crowded, refreshed = False, False
    newest: int | None = None  # time of the last key frame
    for packet in container.demux(stream):
        if packet.size:
            key = packet.is_keyframe
            if key:
                if h264 and not is_intra(memoryview(packet), prefix):
                    key, refreshed = False, True
                elif packet.dts is not None:
                    crowded |= newest is not None and packet.dts <= newest
                    newest = packet.pts
            rows.append(PacketRow(packet.pts, key, packet.is_discard))
    return PacketTable(rows, crowded, refreshed)


def length_bytes(extradata: bytes | None) -> int:
    """Bytes of the length before each unit of H.264 in MP4 and Matroska; 0 where start codes separate
    them."""
    if extradata and len(extradata) > 6 and extradata[0] == 1:
        return (extradata[4] & 3) + 1
    return 0


def is_intra(data: bytes | memoryview, prefix: int) -> bool:
    """Whether all slices of an H.264 picture (of its first field, if it has two) are I slices: decoding can
    start there.

    Encoders mark the pictures where a wave of intra refresh begins as key frames, and their slices are P
    slices.

    Args:
        data: a packet.
        prefix: bytes of the length before each unit; 0 for start codes.
    """
    starts = 0
    for unit in units(data, prefix):
        if len(unit) > 1 and unit[0] & 31 in (1, 2, 5):
            if unit[0] & 31 == 5:  # IDR, as are all slices of this picture
                return True
            first, kind = _slice_header(unit)
            starts += first == 0
            if starts == 2:
                break
            if kind not in (2, 4):
                return False
    return True


def units(data: bytes | memoryview, prefix: int) -> Iterator[bytes]:
    """The first bytes of each unit of an H.264 packet; `prefix`: see `length_bytes`."""
    if prefix:
        place = prefix
        while place < len(data):
            yield bytes(data[place : place + 16])
            place += int.from_bytes(data[place - prefix : place], "big") + prefix
    else:
        whole, place = bytes(data), 0
        while (place := whole.find(b"\0\0\1", place) + 3) > 2:
            yield whole[place : place + 16]


def _slice_header(unit: bytes) -> tuple[int, int]:
    """first_mb_in_slice and slice_type (0 P, 1 B, 2 I, 3 SP, 4 SI): Exp-Golomb codes (ISO/IEC 14496-10,
    7.3.3)."""
    bits = "".join(f"{byte:08b}" for byte in unit[1:])
    place, values = 0, []
    for _ in range(2):
        zeros = bits.find("1", place) - place
        if zeros < 0:
            return -1, -1
        values.append(int(bits[place + zeros : place + 2 * zeros + 1], 2) - 1)
        place += 2 * zeros + 1
    return values[0], values[1] % 5
