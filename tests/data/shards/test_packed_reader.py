"""Packed videos in shards: opened by their packet table, and with every fourth frame only."""

import io
import os
import tarfile
import zlib

import numpy as np
import pytest

from tests.data.small_videos import make_video
from vmae.config import MaskConfig
from vmae.data import open_video
from vmae.data.dataset import PretrainDataset
from vmae.data.manifest import VideoEntry
from vmae.data.pack import PackConfig, draw_phase, pack_video
from vmae.data.shards.entries import DamagedShard, Place, Shard, ShardError
from vmae.data.shards.index import Sample, ShardIndex, columns_of
from vmae.data.shards.opening import KeptFrames
from vmae.data.shards.packed_reader import PackedReader
from vmae.data.shards.packets import PacketTable, make_table
from vmae.data.video_reader import DecodeError
from vmae.errors import InputError
from vmae.synthetic.samples import sample_videos

av = pytest.importorskip("av")
KEY = "000007_v"
QUICK = {"preset": "ultrafast", "crf": 5}


def store(folder, video, table, **about):
    """The entry of a video in a shard of its own."""
    members = {f"{KEY}.packets": table, f"{KEY}.mp4": video} if table else {f"{KEY}.mp4": video}
    path = folder / "shard-00000.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as tar:
        places = {info.name: (info.offset_data, info.size) for info in tar}
    place = Place(*places[f"{KEY}.mp4"], zlib.crc32(video))
    sample = Sample(KEY, 0, place, table=places.get(f"{KEY}.packets", (0, 0)), **about)
    columns = columns_of([sample], [""], [".mp4"])
    return ShardIndex(columns, [Shard(path.name, os.path.getsize(path))], base=str(folder))[0]


@pytest.fixture(scope="module")
def packed(bar_videos, tmp_path_factory):
    """(path, content, table) of a packed video of 120 frames that show their numbers."""
    path = tmp_path_factory.mktemp("packed") / "packed.mp4"
    pack_video(bar_videos["h264_closed"], path, PackConfig(**QUICK))
    return path, path.read_bytes(), make_table(path.read_bytes())


def test_a_table_is_used_by_pyav_only(packed, tmp_path):
    path, video, table = packed
    entry, without = store(tmp_path, video, table), None
    for backend in ("auto", "pyav"):
        with open_video(entry, backend) as reader, open_video(path, "pyav") as plain:
            assert isinstance(reader, PackedReader) and reader.path == entry.path
            assert (reader.backend, reader.codec, reader.size) == ("pyav", "h264", (128, 64))
            assert np.array_equal(reader.frames([40, 3, 41]), plain.frames([40, 3, 41]))
            without = plain.frames([40])
    try:
        other = open_video(entry, "decord")
    except InputError as error:
        pytest.skip(str(error))
    with other:
        assert not isinstance(other, PackedReader) and other.frames([40]).shape == without.shape


def test_no_table_and_later_tables_are_opened_as_files(packed, tmp_path):
    _, video, table = packed
    for data in (b"", table[:4] + b"\x63" + table[5:]):
        with open_video(store(tmp_path, video, data)) as reader:
            assert not isinstance(reader, PackedReader) and len(reader) == 120


def test_a_changed_table_stops_the_run(packed, tmp_path):
    _, video, table = packed
    entry = store(tmp_path, video, table[:60] + bytes([table[60] ^ 4]) + table[61:])
    with pytest.raises(
        ShardError, match=rf"shard .*: the packet table of {KEY} .*CRC-32.*vmae index"
    ) as error:
        open_video(entry)
    assert not isinstance(error.value, DecodeError) and "\n" not in str(error.value)


def test_samples_are_those_of_the_file(packed, tmp_path):
    """The loader's own samples, several crops of a decode, mirrored or not."""
    path, video, table = packed

    def samples(entry):
        data = PretrainDataset(
            [entry], num_frames=8, stride=4, image_size=32, grid=(4, 2, 2), mask=MaskConfig(),
            num_sample=3, flip=True,
        )  # fmt: skip
        return [data._decode_crops(entry, epoch, 0, 0) for epoch in range(4)]

    for one, two in zip(samples(VideoEntry(str(path))), samples(store(tmp_path, video, table)), strict=True):
        assert one.equal(two)


def test_most_pictures_are_needed_by_no_other(packed, bar_videos, tmp_path):
    """What a clip of stride 4 leaves out: whole runs of 7 fit between the needed ones of a group of 25."""
    table = PacketTable.read(packed[2])
    needed = np.flatnonzero(table.needed[np.argsort(table.time)])
    assert needed.tolist()[:9] == [0, 8, 16, 24, 25, 33, 41, 49, 50]
    pack_video(bar_videos["h264_closed"], tmp_path / "12.mp4", PackConfig(gop=12, **QUICK))
    table = PacketTable.read(make_table((tmp_path / "12.mp4").read_bytes()))
    needed = np.flatnonzero(table.needed[np.argsort(table.time)])
    assert needed.tolist()[:8] == [0, 4, 8, 11, 12, 16, 20, 23]


# --- Every fourth frame ---


def keep(source, folder, key=KEY, keep_every=4, **about):
    """(entry, phase) of a video packed with every n-th frame."""
    path = folder / f"kept_{key}.mp4"
    frames = pack_video(source, path, PackConfig(keep_every=keep_every, **QUICK), key)
    phase = draw_phase(key, keep_every, frames)
    video = path.read_bytes()
    about = {"frames": frames, "keep_every": keep_every, "phase": phase, "fps": 25.0} | about
    return store(folder, video, make_table(video), **about), phase


@pytest.mark.parametrize("backend", ["pyav", "torchcodec", "decord"])
def test_frames_left_out_give_the_one_before(bar_videos, read_numbers, tmp_path, backend):
    entry, phase = keep(bar_videos["h264_closed"], tmp_path)
    try:
        reader = open_video(entry, backend)
    except InputError as error:
        pytest.skip(str(error))
    with reader:
        assert isinstance(reader, KeptFrames) and len(reader) == 120 and reader.fps == 25.0
        expected = [max(phase + (number - phase) // 4 * 4, phase) for number in range(120)]
        assert read_numbers(reader.frames(range(120))) == expected


def test_a_clip_keeps_its_stride(bar_videos, read_numbers, tmp_path):
    keys = {draw_phase(key, 4, 120): key for key in "abcdefghijklmnopqrstuvwxyz"}
    for key in keys.values():
        entry, phase = keep(bar_videos["h264_closed"], tmp_path, key)
        with open_video(entry) as reader:
            for start in (0, 1, 2, 3, 4, 31, 119 - 60):
                found = read_numbers(reader.frames(start + 4 * np.arange(16)))
                assert set(np.diff(found)) == {4} and found[0] % 4 == phase % 4
                assert found[0] == max(start - (start - phase) % 4, phase)
    assert set(keys) == {0, 1, 2, 3}


def test_kept_frames_keep_their_time_and_pixels(bar_videos, tmp_path):
    path = bar_videos["vfr"]
    entry, phase = keep(path, tmp_path)
    full = tmp_path / "full.mp4"
    pack_video(path, full, PackConfig(**QUICK))
    times = [packet_times(tmp_path / f"kept_{KEY}.mp4"), packet_times(full)[phase::4]]
    assert len(times[0]) == len(times[1]) == len(range(phase, 120, 4))
    assert np.allclose(np.diff(times[0]), np.diff(times[1]), atol=1e-6)
    with open_video(entry) as kept, open_video(full) as whole:
        error = kept.frames([phase + 40])[0].astype(int) - whole.frames([phase + 40])[0]
    assert abs(error).mean() < 3


def packet_times(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return sorted(float(p.pts * p.time_base) for p in container.demux(stream) if p.size)


def test_a_part_of_kept_frames(bar_videos, tmp_path):
    entry, _ = keep(bar_videos["h264_closed"], tmp_path)
    with open_video(entry) as reader:
        whole = reader.frames([9, 50])
        assert np.array_equal(reader.frames([9, 50], lambda *_: (9, 3, 20, 33)), whole[:, 3:36, 9:29])


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_short_videos_keep_a_frame(tmp_path, frames):
    source = make_video(tmp_path / "short.mp4", frames=frames)
    for key in "abcde":
        entry, phase = keep(source, tmp_path, key)
        assert phase < frames
        with open_video(entry) as reader:
            assert len(reader) == frames and len(reader.frames(range(frames))) == frames


def test_phases_are_drawn_evenly():
    drawn = [draw_phase(f"{number:06}_video", 4, 300) for number in range(2000)]
    assert all(450 < drawn.count(phase) < 550 for phase in range(4))
    assert draw_phase("k", 1, 300) == 0 and draw_phase("k", 4, 1) == 0
    assert draw_phase("\udcff", 4, 9) == draw_phase("\udcff", 4, 9)


def test_an_index_that_tells_another_number(bar_videos, tmp_path):
    entry, _ = keep(bar_videos["h264_closed"], tmp_path, frames=200)
    with pytest.raises(DamagedShard, match=r"has 30 frames, its index says (49|50)"):
        open_video(entry)


def test_a_third_of_the_bytes(tmp_path):
    """Of real clips; the table is small beside them."""
    video = sample_videos()[2]
    sizes = []
    for keep_every in (1, 4):
        path = tmp_path / f"{keep_every}.mp4"
        pack_video(video, path, PackConfig(keep_every=keep_every))
        sizes.append(os.path.getsize(path))
        assert 0 < len(make_table(path.read_bytes())) < 0.01 * sizes[0]
    assert sizes[1] < 0.4 * sizes[0]


@pytest.mark.parametrize("wrong", [0, -4, 65, 2.5])
def test_bad_settings(wrong):
    with pytest.raises(InputError, match="keep_every"):
        PackConfig(keep_every=wrong)
