"""Packet tables: which videos get one, what it holds, and pictures read by it, bit by bit those of PyAV's
reader."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from tests.data.small_videos import make_video
from vmae.data import open_video
from vmae.data.shards import packed_reader
from vmae.data.shards.packed_reader import PackedReader
from vmae.data.shards.packets import PacketTable, make_table
from vmae.data.video_reader import DecodeError
from vmae.errors import InputError

av = pytest.importorskip("av")

SUITED = [
    "base",
    "fragmented",
    "wide_pixels",
    "open",
    "short_gop",
    "one_key",
    "interlaced",
    "scaled",
    "ten_bit",
]
X264 = "keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0"
COLOURS = {"full": dict(color_range=2), "709": dict(colorspace=1, color_primaries=1, color_trc=1)}


def read_table(path):
    """(table, content) of a video's file."""
    content = path.read_bytes()
    table = PacketTable.read(make_table(content))
    assert table is not None
    return table, content


def assert_same(path, reads, table=None):
    """`reads` of a video by its table are those of PyAV's reader."""
    found, content = read_table(path)
    with open_video(path, "pyav") as plain, PackedReader("v", table or found, content) as packed:
        assert len(packed) == len(plain) and packed.fps == plain.fps and packed.size == plain.size
        for indices in reads:
            assert np.array_equal(packed.frames(indices), plain.frames(indices)), indices


def places(total, seed=0):
    """Frames to read of a video of `total`: its ends, clips of strides 1 and 4, any, some twice."""
    rng = np.random.default_rng(seed)
    found = [[0], [total - 1], [total // 2, 0, total // 2], rng.integers(total, size=12), range(total)]
    for stride in (1, 4):
        start = int(rng.integers(max(total - 4 * stride, 1)))
        found.append(np.minimum(start + stride * np.arange(4), total - 1))
    return found


@pytest.mark.parametrize("name", SUITED)
def test_pictures_are_those_of_the_file(odd_videos, name):
    assert_same(odd_videos[name], places(120))


@pytest.mark.parametrize("name", ["h264_closed", "h264_open", "vfr"])
def test_pictures_are_those_of_the_file_at_any_times(bar_videos, name):
    assert_same(bar_videos[name], places(120, 1))


def test_other_videos_get_none(odd_videos, bar_videos, tmp_path):
    others = {name: path for name, path in {**odd_videos, **bar_videos}.items() if name not in SUITED}
    suited = {"h264_closed", "h264_open", "vfr"}
    for name, path in others.items():
        if name in suited:
            continue
        try:
            table = make_table(path.read_bytes())
        except DecodeError:  # cut without encoding, at an angle
            continue
        assert table == b"", name
    assert len(others) > 25


def test_set_ups_among_the_pictures_get_none(tmp_path):
    """Leaving out packets could leave out a set-up."""
    for repeat in (0, 1):
        options = {"preset": "ultrafast", "x264-params": f"keyint=3:repeat-headers={repeat}"}
        path = make_video(tmp_path / f"{repeat}.mp4", options=options)
        assert bool(make_table(path.read_bytes())) == (not repeat)


def test_a_table_tells_what_the_packets_tell(odd_videos):
    table, content = read_table(odd_videos["open"])
    with av.open(str(odd_videos["open"])) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert table.time.tolist() == [packet.pts for packet in packets]
        assert table.start.tolist() == [packet.is_keyframe for packet in packets]
        stream.codec_context.skip_frame = "NONREF"
        container.seek(0)
        refer = [frame.pts for frame in container.decode(stream)]
        assert sorted(table.time[table.needed].tolist()) == refer and 0 < len(refer) < len(packets)
        assert (table.width, table.height) == (stream.width, stream.height)
        assert table.extradata == stream.codec_context.extradata and table.fps == stream.average_rate
    for offset, size, packet in zip(table.offset.tolist(), table.size.tolist(), packets, strict=True):
        assert content[offset : offset + size] == bytes(packet)


def test_a_table_is_small(odd_videos):
    assert len(make_table(odd_videos["base"].read_bytes())) < 5 * 120


def test_big_numbers_and_odd_times_come_back():
    rng = np.random.default_rng(0)
    size = rng.integers(1, 2**24, 19)
    table = PacketTable(
        extradata=b"\1setup",
        width=70_000,
        height=2,
        colours=(2, 1, 13, 9),
        reorder=2,
        time_base=Fraction(1, 90_000),
        fps=None,
        offset=np.cumsum(size) + 2**40,
        size=size,
        time=rng.integers(-(2**45), 2**45, 19),
        start=rng.random(19) < 0.5,
        needed=rng.random(19) < 0.5,
    )
    again = PacketTable.read(table.write())
    for field in dataclasses.fields(PacketTable):
        one, two = getattr(table, field.name), getattr(again, field.name)
        assert np.array_equal(one, two) if isinstance(one, np.ndarray) else one == two, field.name
    assert dataclasses.replace(table, extradata=bytes(70_000)).write() is None


def test_damaged_tables_are_told_and_later_ones_left_alone(odd_videos):
    data = make_table(odd_videos["base"].read_bytes())
    for wrong in (
        b"",
        b"vmpt",
        data[:-1],
        data[:60],
        bytes([data[0] ^ 1]) + data[1:],
        data[:90] + b"\0" * 400,
    ):
        with pytest.raises(ValueError, match="packet table"):
            PacketTable.read(wrong)
    for place in range(5, len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x10
        with pytest.raises(ValueError, match="packet table"):
            PacketTable.read(bytes(changed))
    assert PacketTable.read(data[:4] + b"\2" + data[5:]) is None


@pytest.mark.parametrize("content", [b"", b"no video at all", bytes(5000)])
def test_no_video_no_table(content):
    assert make_table(content) == b""


# --- Pictures ---


@pytest.mark.parametrize("size", [(16, 16), (130, 98)])
@pytest.mark.parametrize("tags", COLOURS)
def test_colours_and_sizes(tmp_path, size, tags):
    options = {"preset": "ultrafast", "crf": "18", "x264-params": f"{X264}:open-gop=0"}
    path = make_video(tmp_path / "v.mp4", frames=12, options=options, size=size, **COLOURS[tags])
    assert_same(path, places(12))
    with open_video(path, "pyav") as plain, PackedReader("v", *read_table(path)) as packed:
        for seed in range(8):
            box = random_box(*plain.size, np.random.default_rng(seed))
            part = packed.frames([9, 2], lambda *_, box=box: box)
            assert np.array_equal(part, cut(plain.frames([9, 2]), box))


def random_box(width, height, rng):
    box_width, box_height = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
    left, top = int(rng.integers(width - box_width + 1)), int(rng.integers(height - box_height + 1))
    return left, top, box_width, box_height


def cut(frames, box):
    left, top, width, height = box
    return frames[:, top : top + height, left : left + width]


def test_one_picture_and_the_last_byte(tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=1)
    table, content = read_table(path)
    end = int(table.offset[0] + table.size[0])
    with open_video(path, "pyav") as plain, PackedReader("v", table, content[:end]) as packed:
        assert np.array_equal(packed.frames([0, 0]), plain.frames([0, 0]))


def test_decoders_are_used_again_and_forget(odd_videos):
    """Clips of two videos and of different set-ups in turn, each from a decoder that did another before."""
    packed_reader._idle.clear()
    for _ in range(2):
        for name in ("base", "wide_pixels", "open"):
            assert_same(odd_videos[name], [[70, 74, 78], [5]])
    assert 1 <= len(packed_reader._idle) <= 3
    table, _ = read_table(odd_videos["base"])
    for primaries in range(4, 5 + packed_reader._MOST_IDLE):
        assert_same(odd_videos["base"], [[3]], dataclasses.replace(table, colours=(0, primaries, 2, 2)))
    assert len(packed_reader._idle) == packed_reader._MOST_IDLE


def test_two_readers_at_once_do_not_meet(odd_videos):
    table, content = read_table(odd_videos["base"])
    with open_video(odd_videos["base"], "pyav") as plain:
        expected = plain.frames(range(0, 120, 7))
    with PackedReader("a", table, content) as one, PackedReader("b", table, content) as two:
        for place, number in enumerate(range(0, 120, 7)):
            assert np.array_equal(one.frames([number])[0], expected[place])
            assert np.array_equal(two.frames([119 - number]), plain_frame(odd_videos["base"], 119 - number))


def plain_frame(path, number):
    with open_video(path, "pyav") as reader:
        return reader.frames([number])


def test_damage_is_a_decode_error(odd_videos):
    """The bytes of a group of pictures are noise: its clip fails, as by PyAV's reader; others do not."""
    table, content = read_table(odd_videos["base"])
    first, last = int(table.offset[24]), int(table.offset[30])
    noise = np.random.default_rng(0).integers(0, 256, last - first, np.uint8).tobytes()
    with PackedReader("v.mp4", table, content[:first] + noise + content[last:]) as packed:
        with pytest.raises(DecodeError, match=r"v.mp4: cannot be decoded: .") as error:
            packed.frames([30, 34])
        assert error.value.library == "pyav" and "\n" not in str(error.value)
        assert np.array_equal(packed.frames([100]), plain_frame(odd_videos["base"], 100))


def test_a_table_of_another_video(odd_videos):
    table, content = read_table(odd_videos["base"])
    with pytest.raises(DecodeError, match="packet table is of another video"):
        PackedReader("v.mp4", table, content[:500])


def test_closed_and_out_of_range(odd_videos):
    reader = PackedReader("v.mp4", *read_table(odd_videos["base"]))
    for wrong in ([120], [-1], []):
        with pytest.raises(IndexError):
            reader.frames(wrong)
    with pytest.raises(InputError, match="is not inside a frame of 128 x 64"):
        reader.frames([0], lambda width, height: (0, 0, width + 1, height))
    reader.close()
    with pytest.raises(DecodeError, match="is closed"):
        reader.frames([0])
