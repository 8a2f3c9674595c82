"""Tar files: written so that the same members give the same bytes, and read by their headers alone.

What is read: ustar, GNU's long names and large sizes, PAX headers. Refused, each in a line: compressed files
(a range of them means nothing), sparse members, what is cut off or damaged.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, NamedTuple

from vmae.data.shards.entries import Place
from vmae.errors import InputError

_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
_AHEAD = 64 << 10  # bytes that one request for a header brings: small members come with it
_MOST_NAME = 1 << 20  # bytes of a long name or a PAX header
_STARTS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)

Read = Callable[[int, int], bytes]  # (offset, length) -> bytes, fewer at the end of the file


class TarWriter:
    """Members one after the other; owner, group and time are 0.

    Args:
        file: empty, open for writing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._place = file, 0

    def add(self, name: str, content: bytes) -> Place:
        """Append a member; returns where its content stands."""
        return self.add_pieces(name, len(content), [content])

    def add_pieces(self, name: str, length: int, pieces: Iterable[bytes]) -> Place:
        """Append a member that comes in pieces.

        Raises:
            ValueError: they are not `length` bytes together: the file is no tar file any more.
        """
        about = tarfile.TarInfo(name)
        about.size, about.mode = length, 0o644
        header = about.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        self._file.write(header)
        crc = written = 0
        for piece in pieces:
            self._file.write(piece)
            crc, written = zlib.crc32(piece, crc), written + len(piece)
        if written != length:
            raise ValueError(f"{written} bytes came, not {length}")
        padding = -length % _BLOCK
        self._file.write(bytes(padding))
        place = Place(self._place + len(header), length, crc)
        self._place = place.offset + length + padding
        return place

    def finish(self) -> int:
        """Write tar's end mark; returns the bytes of the file."""
        end = 2 * _BLOCK
        end += -(self._place + end) % _RECORD
        self._file.write(bytes(end))
        return self._place + end


class Member(NamedTuple):
    """A file in a tar file.

    Attributes:
        name: as stored, without `./` before it.
        offset, length: bytes of its content.
    """

    name: str
    offset: int
    length: int


def read_members(read: Read, size: int, tar: str) -> Iterator[Member]:
    """The files in a tar file, in order; folders, links and devices are left out.

    Args:
        read: gives bytes of it.
        size: bytes of it.
        tar: its name, for messages.

    Raises:
        InputError: it is no tar file, compressed, cut off or damaged, or has a sparse member.
    """
    headers = _Ahead(read)
    check_tar(headers, size, tar)
    place, name = 0, None
    common: dict[str, str] = {}
    own: dict[str, str] = {}
    while True:
        about = _header(headers, place, size, tar)
        if about is None:
            break
        start, length = place + _BLOCK, about.size
        if about.type in _LONG_NAMES:
            if length > _MOST_NAME:
                raise _damaged(tar, place)
            content = headers(start, length)
            if len(content) < length:
                raise _cut_off(tar, size)
            if about.type == tarfile.GNUTYPE_LONGNAME:
                name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif about.type != tarfile.GNUTYPE_LONGLINK:
                (own if about.type == tarfile.XHDTYPE else common).update(_pax(content, tar, place))
        else:
            told = {**common, **own}
            if about.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in told):
                raise InputError(
                    f"tar {tar}: {name or told.get('path', about.name)} is a sparse member, whose bytes do "
                    "not stand as they are; write the tar without --sparse"
                )
            length = int(told["size"]) if told.get("size", "").isdecimal() else length
            if (
                about.type in tarfile.SUPPORTED_TYPES and not about.isreg()
            ):  # of these, the size means nothing
                length = 0
            elif start + length > size:
                raise _cut_off(tar, size)
            elif about.isreg():
                yield Member((name or told.get("path") or about.name).removeprefix("./"), start, length)
            name, own = None, {}
        place = start + length + -length % _BLOCK
    _check_end(read, place, size, tar)


def check_tar(read: Read, size: int, tar: str) -> None:
    """Raises InputError where a file is empty, compressed, or no tar file, by its first bytes."""
    head = read(0, _BLOCK)
    kind = next((kind for start, kind in _STARTS.items() if head.startswith(start)), None)
    if kind is not None:
        raise InputError(
            f"tar {tar} is compressed ({kind}): nothing in it can be read by range; decompress it first "
            "(videos hardly get smaller)"
        )
    if not size:
        raise InputError(f"tar {tar} is empty: 0 bytes")
    if len(head) == _BLOCK and head.count(0) == _BLOCK:
        return
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise InputError(f"{tar} is not a tar file") from None


def _header(read: Read, place: int, size: int, tar: str) -> tarfile.TarInfo | None:
    """The header at `place`; None at tar's end mark."""
    block = read(place, _BLOCK)
    if len(block) < _BLOCK:
        raise _cut_off(tar, size)
    if block.count(0) == _BLOCK:
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise _damaged(tar, place) from None


def _pax(content: bytes, tar: str, place: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of a PAX header (POSIX.1-2001)."""
    found = {}
    while content.strip(b"\0"):
        length, blank, _ = content.partition(b" ")
        if not blank or not length.isdigit() or not len(length) + 2 < int(length) <= len(content):
            raise _damaged(tar, place)
        key, equals, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if not equals:
            raise _damaged(tar, place)
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return found


def _check_end(read: Read, place: int, size: int, tar: str) -> None:
    """Raises InputError where something follows tar's end mark: it would be lost in silence."""
    while place < size:
        rest = read(place, 1 << 20)
        if not rest:
            return
        if rest.count(0) != len(rest):
            raise InputError(
                f"tar {tar} goes on behind its end mark (byte {place}): several tars one after the other? "
                "Write them apart, or as one tar"
            )
        place += len(rest)


def _cut_off(tar: str, size: int) -> InputError:
    return InputError(f"tar {tar} is cut off: it ends at byte {size} without tar's end mark; copy it again")


def _damaged(tar: str, place: int) -> InputError:
    return InputError(f"tar {tar} is damaged: no header of a member at byte {place}; copy it again")


class _Ahead:
    """`read` that asks for more than it is asked for: headers and small members come with one request."""

    def __init__(self, read: Read) -> None:
        self._read, self._start, self._data = read, 0, b""

    def __call__(self, offset: int, length: int) -> bytes:
        begin = offset - self._start
        if begin < 0 or begin + length > len(self._data):
            self._start, self._data = offset, self._read(offset, max(length, _AHEAD))
            begin = 0
        return self._data[begin : begin + length]
