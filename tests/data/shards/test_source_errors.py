"""What is wrong with an index, or with what somebody takes for one: one line, exit 2, and no file written."""

import shutil
import tarfile

import numpy as np
import pytest
from shard_files import write_shards

from vmae.cli import main
from vmae.config import MaskConfig
from vmae.data import PretrainDataset, open_video, read_data
from vmae.data.classify_dataset import ClipConfig, ViewConfig, ViewDataset
from vmae.data.labels import read_labelled_list
from vmae.data.loaders import check_loader
from vmae.data.manifest import read_list
from vmae.data.shards.entries import ShardError
from vmae.data.shards.index import read_index, write_index
from vmae.data.shards.source import check_keys
from vmae.errors import InputError
from vmae.evaluate.features import find_videos
from vmae.evaluate.model import _entries
from vmae.files.flat_arrays import write_arrays
from vmae.synthetic.samples import sample_videos

CLIP = dict(num_frames=4, stride=4, image_size=32, grid=(2, 4, 4), mask=MaskConfig(encoder_ratio=0.75))


@pytest.fixture(scope="module")
def made(labelled_world, tmp_path_factory):
    """A folder of shards of frames, without labels."""
    entries = read_labelled_list(labelled_world / "train.txt").entries
    return write_shards(tmp_path_factory.mktemp("made"), entries[:4], each=2).parent


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


def version(folder):
    write_arrays(folder / "index.vmae", {}, {"format": "vmae-index", "version": "2"})
    return folder / "index.vmae"


def text(folder):
    (folder / "list.vmae").write_text("a.mp4 0 -1\nb.mp4 0 -1\n")
    return folder / "list.vmae"


def empty_file(folder):
    (folder / "index.vmae").write_bytes(b"")
    return folder / "index.vmae"


def cut_off(folder):
    path = folder / "index.vmae"
    path.write_bytes(path.read_bytes()[:-300])
    return path


def missing(folder):
    (folder / "index.vmae").unlink()
    return folder / "index.vmae"


def shard_missing(folder):
    (folder / "shard-00001.tar").unlink()
    return folder / "index.vmae"


def shard_longer(folder):
    with open(folder / "shard-00000.tar", "ab") as file:
        file.write(bytes(512))
    return folder / "index.vmae"


def tar(folder):
    return folder / "shard-00000.tar"


def packed_tar(folder):
    with tarfile.open(folder / "a.tar.gz", "w:gz"):
        pass
    return folder / "a.tar.gz"


def its_folder(folder):
    return folder


def key_twice(folder):
    index = read_index(folder / "index.vmae")
    name = b"00000000_v00" * 2
    keys = np.frombuffer(name + index.columns["keys"].tobytes()[len(name) :], "u1")
    write_index(folder / "index.vmae", index.with_columns(keys=keys))
    return folder / "index.vmae"


def no_samples(folder):
    write_index(folder / "index.vmae", read_index(folder / "index.vmae").chosen([]))
    return folder / "index.vmae"


def a_text_in_a_store(folder):
    return "s3://bucket/list.txt"


def a_secret(folder):
    return "https://user:canary@host/data.tar"


CASES = [
    (version, "is of version 2, and this vmae reads version 1"),
    (text, "list.vmae is no file of arrays (safetensors); `vmae index` makes one of tar files"),
    (empty_file, "is damaged: it ends within its header; `vmae index` makes one"),
    (cut_off, "is damaged or cut off"),
    (missing, "index.vmae does not exist"),
    (
        shard_missing,
        "shard-00001.tar cannot be read: No such file or directory; 1 of 2 shards cannot be used",
    ),
    (shard_longer, "; 1 of 2 shards cannot be used: bring them back, or make the index anew"),
    (tar, "shard-00000.tar is a tar file: make an index of it and its neighbours with `vmae index`"),
    (packed_tar, "a.tar.gz is a tar file"),
    (its_folder, "holds shards: give their index, "),
    (key_twice, "key '00000000_v00' comes twice, as samples 1 and 2; give each sample a name of its own"),
    (no_samples, "index.vmae holds no samples"),
    (a_secret, "must hold no credential"),
    (
        a_text_in_a_store,
        "s3://bucket/list.txt is an address, and of those only an index of shards can be read",
    ),
]


@pytest.mark.parametrize(("make", "words"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_one_line_before_the_run(folder, tmp_path, capsys, make, words):
    data, run = make(folder), tmp_path / "run"
    flags = (
        "--model vit_tiny --image-size 32 --num-frames 4 --batch-size 2 --steps 1 --workers 0 --device cpu"
    )
    assert main(["pretrain", "--data", str(data), "--output", str(run), *flags.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and "canary" not in error and not run.exists()
    for read in (read_labelled_list, lambda path: find_videos(path, None)):
        with pytest.raises(InputError) as told:
            read(str(data))
        assert words in str(told.value)


def test_a_source_of_a_mix_is_named(folder, tmp_path):
    (tmp_path / "mix.yaml").write_text(f"sources: [{{name: a, list: {shard_missing(folder)}}}]")
    with pytest.raises(InputError, match="source 1: index .*shard-00001.tar cannot be read"):
        read_data(tmp_path / "mix.yaml")
    (tmp_path / "mix.yaml").write_text("sources: [{list: data/index.vmae, root: elsewhere}]")
    with pytest.raises(InputError, match="elsewhere/shard-00000.tar cannot be read"):
        read_data(tmp_path / "mix.yaml")
    (tmp_path / "mix.yaml").write_text(f"sources: [{{list: {version(folder)}}}]")
    with pytest.raises(InputError, match="source 1: index .* is of version 2"):
        read_data(tmp_path / "mix.yaml")


def test_the_kind_of_a_source_is_kept(folder, tmp_path):
    (tmp_path / "mix.yaml").write_text("sources: [{list: data/index.vmae, kind: video}]")
    with pytest.raises(
        InputError, match="00000000_v00 of its index is of kind frames, not video, as are 4 of 4"
    ):
        read_data(tmp_path / "mix.yaml")
    (tmp_path / "mix.yaml").write_text("sources: [{list: data/index.vmae, kind: frames, stride: 100000}]")
    assert [entry.stride for entry in read_data(tmp_path / "mix.yaml")] == [100000] * 4


def test_labels(folder, labelled_world, tmp_path):
    with pytest.raises(
        InputError, match="4 of 4 samples have no label, the first '00000000_v00': pack a label"
    ):
        read_labelled_list(folder / "index.vmae")
    entries = read_labelled_list(labelled_world / "train.txt").entries[:4]
    some = write_shards(tmp_path / "some", entries, [(0,), (2,), (), (1,)])
    with pytest.raises(InputError, match="1 of 4 samples have no label, the first '00000002_v02'"):
        read_labelled_list(some)
    several = write_shards(tmp_path / "several", entries, [(0,), (2, 1), (0,), (1,)])
    found = read_labelled_list(several)
    assert (list(found.labels), found.num_classes, found.multi) == ([(0,), (2, 1), (0,), (1,)], 3, True)
    assert found.labels[1:3] == [(2, 1), (0,)]
    with pytest.raises(
        InputError, match="'00000001_v01': label 2 is out of range; labels are 0 to 1 .2 classes"
    ):
        read_labelled_list(several, num_classes=2)


def test_another_rank_does_not_look_at_shards(folder, monkeypatch):
    shard_missing(folder)
    monkeypatch.setenv("RANK", "1")
    assert len(read_data(folder / "index.vmae")) == 4


def test_keys_that_only_look_alike(folder):
    index = read_index(folder / "index.vmae")
    names = ["a", "", "aa", "ab"]
    ends = np.cumsum([len(name) for name in names]).astype("u8")
    check_keys("x", index.with_columns(keys=np.frombuffer("".join(names).encode(), "u1"), key_end=ends))
    for names in (["a", "", "", "ab"], ["ü", "x", "y", "ü"]):
        data = [name.encode() for name in names]
        ends = np.cumsum([len(name) for name in data]).astype("u8")
        with pytest.raises(InputError, match="comes twice"):
            check_keys("x", index.with_columns(keys=np.frombuffer(b"".join(data), "u1"), key_end=ends))
    with pytest.raises(InputError, match="is damaged .keys"):
        check_keys("x", index.with_columns(keys=np.full(len(index.columns["keys"]), 200, "u1")))
    with pytest.raises(InputError, match="is damaged .keys"):
        check_keys("x", index.with_columns(key_end=index.columns["key_end"][::-1]))


def test_another_number_of_frames_than_the_index_says(tmp_path):
    (tmp_path / "list.txt").write_text(f"{sample_videos()[2]}\n")
    index = write_shards(tmp_path / "out", read_list(tmp_path / "list.txt"), frames=96)
    with pytest.raises(
        ShardError, match="pristine.mp4: has 120 frames, its index says 96: make the index anew"
    ):
        open_video(read_data(index)[0])


def test_dali_reads_no_shards(folder, monkeypatch):
    monkeypatch.setattr("vmae.data.loaders.dali_missing", lambda: None)
    with pytest.raises(InputError, match="DALI reads files, not shards: take --loader cpu"):
        check_loader("dali", read_data(folder / "index.vmae"))


def test_commands_that_read_files_alone(folder, tmp_path, capsys):
    index = str(folder / "index.vmae")
    assert main(["pack", index, str(tmp_path / "out")]) == 2
    assert "is an index: its videos are packed already" in capsys.readouterr().err
    with pytest.raises(InputError, match="is an index of many videos: give `vmae.data.read_data"):
        _entries(index, 3)
    entries, single = _entries(read_data(index), 3)
    assert [entry.key for entry in entries][:1] == ["00000000_v00"] and not single


@pytest.fixture
def thinned(folder):
    """An index that says that one frame of every 4 is stored."""
    index = read_index(folder / "index.vmae")
    every = np.array([1, 4, 4, 1], "u2")
    write_index(folder / "index.vmae", index.with_columns(keep_every=every))
    return read_data(folder / "index.vmae")


@pytest.mark.parametrize("settings", [{"stride": 6}, {"stride": 3, "sampling": "exact"}])
def test_strides_that_need_other_frames(thinned, settings):
    with pytest.raises(
        InputError, match="00000001_v01: a stride of . needs frames that its shard has not: one of"
    ):
        PretrainDataset(thinned, **{**CLIP, **settings})


def test_what_needs_all_frames(thinned, folder):
    for stride in (4, 8):
        PretrainDataset(thinned, **{**CLIP, "stride": stride})
    with pytest.raises(
        InputError, match="sampling by fps needs all frames, and these shards hold one of every 4"
    ):
        PretrainDataset(thinned, **CLIP, sampling="fps", fps=8.0)
    clip = ClipConfig(num_frames=4, image_size=32, stride=4)
    for entries in (thinned.entries, list(thinned)):
        with pytest.raises(InputError, match="testing needs all frames"):
            ViewDataset(entries, clip, ViewConfig())
    with pytest.raises(InputError, match="extraction of features needs all frames"):
        find_videos(str(folder / "index.vmae"), None)
