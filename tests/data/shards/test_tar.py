"""Tar files: what is written is read by others, what others write is read by headers alone."""

import bz2
import gzip
import io
import os
import tarfile
import zlib

import pytest

from vmae.data.shards.tar import TarWriter, read_members
from vmae.errors import InputError

CONTENT = {"a.json": b"{}", "a.mp4": os.urandom(3000), "ü/b.c.jpg": b"", "c.bin": bytes(512)}


def written(members) -> bytes:
    file = io.BytesIO()
    writer = TarWriter(file)
    for name, content in members.items():
        place = writer.add(name, content)
        assert place.crc == zlib.crc32(content)
    assert writer.finish() == len(file.getvalue())
    return file.getvalue()


def members_of(data: bytes, name="x.tar"):
    """{name: content} of a tar file, and the number of requests for it."""
    requests = []

    def read(offset, length):
        requests.append((offset, length))
        return data[offset : offset + length]

    found = {
        one.name: data[one.offset : one.offset + one.length] for one in read_members(read, len(data), name)
    }
    return found, len(requests)


def by_tarfile(members, format, **about) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in about.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def test_others_read_what_is_written():
    data = written(CONTENT)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {info.name: tar.extractfile(info).read() for info in tar} == CONTENT
        assert all((info.mtime, info.uid, info.gid, info.uname) == (0, 0, 0, "") for info in tar)
    assert data == written(CONTENT) == by_tarfile(CONTENT, tarfile.GNU_FORMAT)
    assert members_of(data)[0] == CONTENT
    assert members_of(written({}))[0] == {}


def test_pieces_are_one_member():
    one, other = io.BytesIO(), io.BytesIO()
    assert TarWriter(one).add("a", b"123456") == TarWriter(other).add_pieces("a", 6, [b"123", b"456"])
    assert one.getvalue() == other.getvalue()
    with pytest.raises(ValueError, match="3 bytes came, not 6"):
        TarWriter(other).add_pieces("a", 6, [b"123"])


LONG = {"d" * 90 + "/" + "n" * 120 + ".mp4": b"long", **CONTENT, "é" * 80 + ".json": b"1"}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(format):
    assert members_of(by_tarfile(LONG, format))[0] == LONG
    pax = by_tarfile(CONTENT, tarfile.PAX_FORMAT, mtime=1.5, uname="somebody é")
    assert members_of(pax)[0] == CONTENT
    split = {"p" * 100 + "/" + "q" * 90: b"prefix"}
    assert members_of(by_tarfile(split, tarfile.USTAR_FORMAT))[0] == split


def test_what_is_no_file_is_left_out(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.mp4").write_bytes(b"video")
    (tmp_path / "d" / "link.mp4").symlink_to("a.mp4")
    os.link(tmp_path / "d" / "a.mp4", tmp_path / "d" / "again.mp4")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "d", "./d")
    found, _ = members_of((tmp_path / "x.tar").read_bytes())
    assert list(found.values()) == [b"video"] and set(found) < {"d/a.mp4", "d/again.mp4"}


def test_a_header_tells_where_the_next_one_is():
    """Contents are not read, and small members come with one request."""
    data = written(
        {f"{number}.{end}": bytes(size) for number in range(3) for end, size in (("j", 9), ("v", 1 << 18))}
    )
    assert members_of(data)[1] <= 6


def test_sizes_beyond_eight_gigabytes():
    info = tarfile.TarInfo("big.mp4")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    pax = tarfile.TarInfo("big.mp4")
    pax.size = 9 << 30
    for head in (header, pax.tobuf(tarfile.PAX_FORMAT)):

        def read(offset, length, head=head):
            return (head + bytes(length))[offset : offset + length] if offset < len(head) else bytes(length)

        (one,) = read_members(read, len(head) + (9 << 30) + 1024, "x.tar")
        assert one.length == 9 << 30


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda data: b"", "is empty: 0 bytes"),
        (lambda data: gzip.compress(data), r"is compressed \(gzip\)"),
        (lambda data: bz2.compress(data), r"is compressed \(bzip2\)"),
        (lambda data: os.urandom(9) * 400, "x.tar is not a tar file"),
        (lambda data: b"\0\0\0\x20ftypisom" + bytes(2000), "is not a tar file"),
        (lambda data: data[:300], "is not a tar file"),
        (lambda data: data[:2000], "is cut off: it ends at byte 2000"),
        (lambda data: data[: data.index(b"c.bin")], "is cut off"),
        (lambda data: data[: data.index(b"c.bin") + 1024], "without tar's end mark"),
        (lambda data: data.replace(b"c.bin", b"d.bin"), "is damaged: no header of a member at byte"),
        (lambda data: data + data, "goes on behind its end mark"),
    ],
)
def test_damage_is_told(damage, told):
    with pytest.raises(InputError, match=told):
        members_of(damage(written(CONTENT)))


def test_sparse_members_are_refused(tmp_path):
    info = tarfile.TarInfo("sparse.mp4")
    info.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(InputError, match="sparse.mp4 is a sparse member"):
        members_of(info.tobuf() + bytes(1024))
    data = by_tarfile({"s.mp4": b"1"}, tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.major": "1"})
    with pytest.raises(InputError, match="s.mp4 is a sparse member"):
        members_of(data)


@pytest.mark.parametrize("record", [b"999 path=x\n", b"x path=a\n", b"9 pathsxx\n", b"\xff" * 20, b"7"])
def test_a_damaged_pax_header_is_told(record):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    with pytest.raises(InputError, match="is damaged"):
        members_of(info.tobuf() + record.ljust(512, b"\0") + bytes(1024))
