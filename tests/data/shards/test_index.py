"""Entries of an index, and videos read out of a tar file by range."""

import io
import os
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from vmae.data import open_video
from vmae.data.shards.entries import Place, Shard, ShardError
from vmae.data.shards.index import (
    Sample,
    ShardIndex,
    columns_of,
    is_index,
    join_indexes,
    read_index,
    write_index,
)
from vmae.errors import InputError
from vmae.files.flat_arrays import write_arrays
from vmae.synthetic.samples import sample_videos

IMAGES = [np.full((8, 12, 3), 40 * number, np.uint8) for number in range(3)]


def png(image) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def make_shard(path, members):
    """(shard, {name: place}) of a tar file with these members."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as tar:
        places = {
            info.name: Place(info.offset_data, info.size, zlib.crc32(members[info.name])) for info in tar
        }
    return Shard(path.name, os.path.getsize(path)), places


@pytest.fixture(scope="module")
def video():
    return sample_videos()[2]


@pytest.fixture
def folder(tmp_path, video):
    """A folder with a shard of one video and one folder of frames, and their index."""
    with open(video, "rb") as file:
        content = file.read()
    images = {f"frames.img_{number:05}.png": png(image) for number, image in enumerate(IMAGES, 1)}
    shard, places = make_shard(tmp_path / "shard-00000.tar", {"grüße.mp4": content, **images})
    samples = [
        Sample(
            "grüße", 0, places["grüße.mp4"], labels=(3, 1), source="k400", stride=2, frames=120, fps=29.97
        ),
        Sample(
            "frames", 0, Place(0, 0, 0), suffix="", images=[places[name] for name in images], source="ssv2"
        ),
    ]
    sources, suffixes = [], []
    columns = columns_of(samples, sources, suffixes)
    index = ShardIndex(columns, [shard], sources=sources, suffixes=suffixes, settings={"gop": 12})
    write_index(tmp_path / "index.vmae", index)
    return tmp_path


def test_entries_are_what_was_written(folder):
    index = read_index(folder / "index.vmae")
    first, second = index
    assert (first.path, first.key) == (f"{folder}/shard-00000.tar/grüße.mp4", "grüße")
    assert (first.kind, first.total, first.stride, first.frames, first.fps) == ("video", -1, 2, 120, 29.97)
    assert (second.kind, second.total, second.stride, second.line) == ("frames", 3, None, 2)
    assert [index.labels(0), index.labels(1)] == [(3, 1), ()]
    assert [index.source(0), index.source(1)] == ["k400", "ssv2"]
    assert index[-1] == second and list(index[1:]) == [second] and index[:1][0] == first
    assert index.settings == {"gop": 12} and is_index("s3://b/index.vmae") and not is_index("list.txt")


def test_pixels_are_those_of_the_files(folder, video):
    first, second = read_index(folder / "index.vmae")
    with open_video(video) as plain, open_video(first) as stored:
        assert len(stored) == len(plain)
        assert np.array_equal(stored.frames([0, 17, 40]), plain.frames([0, 17, 40]))
    with open_video(second) as stored:
        assert np.array_equal(stored.frames([2, 0]), np.stack([IMAGES[2], IMAGES[0]]))


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_other_libraries_read_it_too(folder, video, backend):
    first = read_index(folder / "index.vmae")[0]
    try:
        plain = open_video(video, backend)
    except InputError as error:
        pytest.skip(str(error))
    with plain, open_video(first, backend) as stored:
        assert np.array_equal(stored.frames([5, 9]), plain.frames([5, 9]))


def test_a_closed_reader_leaves_no_handle(folder):
    first = read_index(folder / "index.vmae")[0]

    def read():
        with open_video(first) as reader:
            reader.frames([1])

    read()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_changed_or_cut_shard_is_told(folder):
    first, second = read_index(folder / "index.vmae")
    path = folder / "shard-00000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: first.video.offset + 99])
    with pytest.raises(ShardError, match="is cut off: its index says"):
        open_video(first)
    changed = bytearray(whole)
    changed[first.video.offset + 500] ^= 1
    changed[int(second.images[1, 0])] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ShardError, match="not those that its index describes"):
        open_video(first)
    with open_video(second) as reader, pytest.raises(ShardError, match="CRC-32"):
        reader.frames([1])


def test_a_damaged_video_is_named_by_its_key(folder, tmp_path):
    shard, places = make_shard(tmp_path / "bad.tar", {"k.mp4": b"no video" * 100})
    index = ShardIndex(columns_of([Sample("k", 0, places["k.mp4"])], [], []), [shard], base=str(tmp_path))
    with pytest.raises(InputError, match="bad.tar/k.mp4: cannot be opened") as told:
        open_video(index[0])
    assert "/proc" not in str(told.value)


def test_joined_indexes_are_one(folder):
    index = read_index(folder / "index.vmae")
    joined = join_indexes([index, index])
    assert len(joined) == 4 and len(joined.shards) == 2
    assert joined[2].shard == index[0].shard and joined.labels(2) == (3, 1) and joined.source(3) == "ssv2"
    assert [joined[n].key for n in range(4)] == ["grüße", "frames"] * 2
    assert joined[3].images.tolist() == index[1].images.tolist()


def test_other_versions_and_damage_are_told(folder, tmp_path):
    path = tmp_path / "other.vmae"
    write_arrays(path, {}, {"format": "vmae-index", "version": "2"})
    with pytest.raises(InputError, match="is of version 2, and this vmae reads version 1"):
        read_index(path)
    write_arrays(path, {}, {"format": "something"})
    with pytest.raises(InputError, match="is no index of shards"):
        read_index(path)
    index = read_index(folder / "index.vmae")
    index.columns["shard"] = np.array([0, 7], np.uint32)
    write_index(path, index)
    with pytest.raises(InputError, match="damaged .column shard names what is not there"):
        read_index(path)
    index.columns["shard"] = np.array([0], np.uint32)
    write_index(path, index)
    with pytest.raises(InputError, match="is damaged"):
        read_index(path)
