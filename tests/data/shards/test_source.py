"""An index as the data of a run: every sample is, bit by bit, the one that the files give."""

import functools
import json
import pickle
import shutil

import pytest
import torch
from shard_files import write_shards

from vmae.checkpoint.identity import list_hash
from vmae.config import MaskConfig
from vmae.data import Batch, PretrainDataset, check_decodable, describe_data, read_data
from vmae.data.augment_classify import AugmentConfig
from vmae.data.classify_dataset import ClassifyDataset, ClipConfig, MiddleClipDataset, ViewConfig, ViewDataset
from vmae.data.labels import read_any_list, read_labelled_list
from vmae.data.list_identity import identify_list, list_changes
from vmae.data.loaders import build_loader
from vmae.data.manifest import read_list
from vmae.data.shards.index import read_index
from vmae.synthetic.samples import sample_videos

CLIP = dict(num_frames=4, stride=2, image_size=32, grid=(2, 4, 4), mask=MaskConfig(encoder_ratio=0.75))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A list of two videos, one of them with a stride of its own, and its index."""
    folder = tmp_path_factory.mktemp("films")
    one, other = sample_videos()[2:]
    (folder / "list.txt").write_text(f"{one}\n#! stride=3\n{other}\n")
    write_shards(folder / "out", read_list(folder / "list.txt"), each=1)
    return folder


@pytest.fixture(scope="module")
def frames(labelled_world, tmp_path_factory):
    """An index of the labelled folders of frames."""
    labelled = read_labelled_list(labelled_world / "train.txt")
    return write_shards(tmp_path_factory.mktemp("frames"), labelled.entries, labelled.labels, each=5)


def same(one, other):
    """Whether two samples are the same, but for the names of their videos."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    assert [key[:2] for key in one.ids] == [key[:2] for key in other.ids]
    assert not one.replaced and not other.replaced
    if hasattr(one, "mask"):
        assert torch.equal(one.mask.visible, other.mask.visible)
        assert torch.equal(one.mask.weight, other.mask.weight)
    else:
        assert torch.equal(one.targets, other.targets)
    return torch.equal(one.clips, other.clips)


@pytest.mark.parametrize(
    "settings", [{}, {"sampling": "exact", "flip": True}, {"sampling": "fps", "fps": 7.5, "crop": "center"}]
)
def test_samples_to_pretrain_on(films, settings):
    make = functools.partial(PretrainDataset, num_sample=2, seed=5, **CLIP, **settings)
    plain, stored = make(read_data(films / "list.txt")), make(read_data(films / "out" / "index.vmae"))
    assert len(plain) == len(stored) == 2
    for key in ((0, 0), (0, 1), (1, 1), (3, 0)):
        assert same(plain[key], stored[key]), key
    assert stored[0, 1].ids[0][2].endswith("/shard-00001.tar/00000001_carphone_distorted.mp4")


def test_samples_to_fine_tune_and_to_test_on(labelled_world, frames):
    plain, stored = read_labelled_list(labelled_world / "train.txt"), read_labelled_list(frames)
    assert list(stored.labels) == list(plain.labels) and stored.labels[4] == plain.labels[4]
    assert (stored.num_classes, stored.multi) == (3, False)
    assert torch.equal(stored.targets([0, 5]), plain.targets([0, 5]))
    for sampling in ("dense", "sparse"):
        clip = ClipConfig(num_frames=4, image_size=32, stride=2, sampling=sampling)
        one, other = (ClassifyDataset(read, clip, AugmentConfig(), num_sample=2) for read in (plain, stored))
        assert all(same(one[key], other[key]) for key in ((0, 0), (1, 7), (2, 11)))
        views = ViewConfig(segments=2, crops=3)
        one, other = (ViewDataset(read.entries, clip, views) for read in (plain, stored))
        assert all(same(one[video], other[video]) for video in (0, 11))
        one, other = (MiddleClipDataset(read.entries, clip) for read in (plain, stored))
        assert same(one[3], other[3])


MIX = """mixing: weighted
sources:
- {{name: films, list: {films}, kind: video, stride: 5, weight: 2}}
- {{name: frames, list: {frames}, kind: frames, weight: 1}}
- {{name: again, list: {again}, weight: 1}}
"""


@pytest.fixture
def mixes(films, labelled_world, frames, tmp_path):
    """Data sets of the same mix: of lists, and of two indexes and a list."""
    (tmp_path / "frames.txt").write_text("".join(f"{labelled_world}/v{n:02} 1 10\n" for n in range(12)))
    names = dict(films=films / "list.txt", frames=tmp_path / "frames.txt", again=films / "list.txt")
    (tmp_path / "plain.yaml").write_text(MIX.format(**names))
    names |= dict(films=films / "out" / "index.vmae", frames=frames)
    (tmp_path / "stored.yaml").write_text(MIX.format(**names))
    return [
        PretrainDataset(read_data(tmp_path / f"{name}.yaml"), seed=2, **CLIP) for name in ("plain", "stored")
    ]


def test_mixes_of_indexes_and_lists(mixes):
    plain, stored = (dataset.data for dataset in mixes)
    assert plain.shares() == stored.shares() and len(plain) == len(stored) == 16
    assert [entry.stride for entry in stored] == [entry.stride for entry in plain]
    assert [entry.stride for entry in stored][:3] == [5, 3, None]
    assert [entry.kind for entry in stored] == [entry.kind for entry in plain]
    one, other = mixes
    assert all(same(one[0, index], other[0, index]) for index in range(0, 16, 2))


def test_any_number_of_ranks_reads_the_same_samples(mixes):
    plain, stored = mixes
    (expected,) = build_loader(plain, batch_size=4, start_step=1, total_steps=2)
    for ranks in (2, 4):
        options = dict(batch_size=4 // ranks, world_size=ranks, start_step=1, total_steps=2)
        parts = [next(build_loader(stored, rank=rank, **options)) for rank in range(ranks)]
        assert same(expected, Batch.cat(parts)), ranks


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_batches(mixes):
    batches = [
        list(build_loader(data, batch_size=4, num_workers=workers, total_steps=6))
        for data, workers in ((mixes[0], 0), (mixes[1], 0), (mixes[1], 1), (mixes[1], 3))
    ]
    for several in batches[1:]:
        assert all(same(*pair) for pair in zip(batches[0], several, strict=True))


def test_a_run_is_told_hours_and_images_without_opening_anything(films, frames, tmp_path, monkeypatch):
    (tmp_path / "mix.yaml").write_text(
        f"sources: [{{name: a, list: {films}/out/index.vmae}}, {{name: b, list: {frames}}}]"
    )
    monkeypatch.setattr("vmae.data.mix.guarded_each", None)
    first, second, last = describe_data(read_data(tmp_path / "mix.yaml"))
    assert first == "a: 2 videos, 0.00222 hours, 14.3% of samples, stride 3"
    assert second == "b: 12 videos, 120 images, 85.7% of samples"
    assert last == "natural mixing of 2 sources, 14 videos"
    (line,) = describe_data(read_data(films / "out" / "index.vmae"))
    assert line.startswith("out: 2 videos, 0.00222 hours, 100.0%")


def test_hours_are_said_to_be_about_where_some_are_not_known(films):
    index = read_index(films / "out" / "index.vmae")
    frames = index.columns["frames"].copy()
    frames[1] = 0
    (line,) = describe_data(index.with_columns(frames=frames))
    assert "about 0.00222 hours" in line


def test_it_is_the_same_list_wherever_it_lies(films, frames, tmp_path, monkeypatch):
    def dataset(path, root=None):
        return PretrainDataset(read_data(path, root), **CLIP)

    def changed(before, path, root=None):
        now = dataset(path, root)
        return list_changes(before, now, "", identify_list(now))

    own = json.loads(json.dumps(identify_list(dataset(films / "out" / "index.vmae"))))
    shutil.copytree(films / "out", tmp_path / "elsewhere")
    assert changed(own, tmp_path / "elsewhere" / "index.vmae") == []
    shutil.copy(films / "out" / "index.vmae", tmp_path / "alone.vmae")
    assert changed(own, tmp_path / "alone.vmae", films / "out") == []
    monkeypatch.chdir(films / "out")
    assert changed(own, "index.vmae") == []
    entries = read_list(films / "list.txt")
    keys = ["00000000_carphone_pristine", "00000001_carphone_distorted"]
    assert changed(own, write_shards(tmp_path / "one", entries, each=2, keys=keys)) == []  # in one shard
    plain = changed(own, films / "list.txt")
    assert plain[0] == "its videos lay in shards then and lie in files now" and "number 1" in plain[1]
    swapped = write_shards(
        tmp_path / "swapped", entries[::-1], each=2, keys=keys
    )  # other videos of these keys
    assert "number 1, now" in changed(own, swapped)[0]
    images = identify_list(dataset(frames))["entries"]["sha256"]
    again = read_index(frames)
    crc = again.columns["image_crc"].copy()
    crc[7] ^= 1
    other = PretrainDataset(again.with_columns(image_crc=crc), **CLIP)
    assert identify_list(other)["entries"]["sha256"] != images


def test_a_test_of_it_is_the_same_wherever_it_lies(films, tmp_path):
    shutil.copytree(films / "out", tmp_path / "out")
    one, other = (read_index(folder / "out" / "index.vmae") for folder in (films, tmp_path))
    assert one[0].path != other[0].path
    assert (
        list_hash(one, [(1,), (2,)]) == list_hash(other, [(1,), (2,)]) != list_hash(one[::-1], [(1,), (2,)])
    )


def test_any_list_keeps_its_labels(frames, films):
    found = read_any_list(frames)
    assert found.labels[:4] == [(0,), (1,), (2,), (0,)] and found.labelled and not found.problems
    found = read_any_list(films / "out" / "index.vmae")
    assert found.labels == [None, None] and not found.labelled


def test_parts_columns_and_copies(frames):
    index = read_index(frames)
    part = index[3:9]
    assert [entry.key for entry in part[1:3]] == [index[4].key, index[5].key] and len(index[::-2]) == 6
    assert index[::-2].column("length").shape == (6,) and part.images() == 60
    assert list(part.numbers_of("frames")) == list(range(6)) and not len(part.numbers_of("video"))
    assert index.identity_lines(3, 5) == part.identity_lines(0, 2)
    copy = pickle.loads(pickle.dumps(index))
    assert copy[11] == index[11] and copy.labels(11) == (2,)
    chosen = index.chosen([7, 2])
    assert [entry.key for entry in chosen] == [index[7].key, index[2].key]
    assert chosen[0].images.tolist() == index[7].images.tolist() and chosen.labels(1) == (2,)


def test_the_first_frames_are_tried_in_a_worker(films):
    assert check_decodable(read_data(films / "out" / "index.vmae")) == []
