"""Clips of several shapes: what sources say, steps of one shape, and samples that no split changes."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from vmae.config import MaskConfig
from vmae.data.dataset import PretrainDataset
from vmae.data.list_identity import identify_list, list_changes
from vmae.data.loaders import build_loader
from vmae.data.manifest import VideoEntry
from vmae.data.mix import Mix, Source, read_data
from vmae.data.shape_sampler import BLOCK, ShapeSampler
from vmae.errors import InputError

SETTINGS = dict(num_frames=4, stride=2, image_size=32, grid=(2, 4, 4), mask=MaskConfig(encoder_ratio=0.75))
SHAPES = {"usual": (4, 32, 32), "long": (8, 16, 16), "photos": (2, 32, 32)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with 3 + 2 folders of 12 noisy frames in two lists, and 4 images."""
    root, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    for video in range(5):
        (root / f"v{video}").mkdir()
        for number in range(12):
            pixels = rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"v{video}" / f"{number}.png")
    (root / "photos").mkdir()
    for number in range(4):
        pixels = rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{number}.png")
    (root / "usual.txt").write_text("#! pattern={}.png\n" + "".join(f"v{n} 0 12\n" for n in range(3)))
    (root / "long.txt").write_text("#! pattern={}.png\nv3 0 12\nv4 0 12\n")
    return root


def mix_of(world, weights=(2, 1, 1), long="frames: 8, size: 16"):
    usual, of_long, photos = (f", weight: {weight}" if weight else "" for weight in weights)
    path = world / "mix.yaml"
    path.write_text(
        f"sources:\n- {{name: usual, list: usual.txt, root: .{usual}}}\n"
        f"- {{name: long, list: long.txt, root: ., {long}{of_long}}}\n"
        f"- {{name: photos, list: photos, kind: images{photos}}}\n"
    )
    return read_data(path)


def dataset_of(world, *, repeat=4, **options):
    return PretrainDataset(mix_of(world, **options), repeat=repeat, seed=3, **SETTINGS)


@pytest.mark.parametrize("weights", [(2, 1, 1), (None, None, None)])
def test_the_shape_of_a_sample_is_its_sources(world, weights):
    data = dataset_of(world, weights=weights)
    assert data.shapes == [*SHAPES.values()]
    groups = [[index for part in group for index in part] for group in data.groups]
    assert sorted(index for group in groups for index in group) == [*range(len(data))]
    for (name, shape), group in zip(SHAPES.items(), groups, strict=True):
        for index in group[:3]:
            sample = data[1, index]
            assert tuple(sample.clips.shape[1:4]) == data.shape_at(1, index) == shape
            assert sample.mask.num_tokens == shape[0] // 2 * shape[1] // 8 * shape[2] // 8
            assert data.count_sources(sample) == [int(own == name) for own in SHAPES]


def test_a_bad_video_is_replaced_by_one_of_its_shape(world):
    mix = mix_of(world, weights=(None, None, None))
    entries = [*mix.entries]
    entries[3] = VideoEntry(str(world / "none"), "frames", 0, 12, None, "{}.png")
    data = PretrainDataset(Mix(entries, mix.sources), **SETTINGS)
    sample = data[0, 3]
    assert sample.ids[0][2].endswith("/v4") and tuple(sample.clips.shape[1:4]) == SHAPES["long"]
    assert len(sample.replaced) == 1


# ---- steps


def sampler_of(counts, batch=4, **options):
    starts = [sum(counts[:place]) for place in range(len(counts))]
    groups = [[range(start, start + count)] for start, count in zip(starts, counts)]
    return ShapeSampler(groups, sum(counts), batch, seed=5, **options)


# Even shares; one that gets less than a step of an epoch; one with nothing, as a tiny weight gives.
@pytest.mark.parametrize("counts", [(12, 12), (97, 3), (10, 0, 30), (1, 1, 1, 50)])
def test_every_shape_gets_its_share_of_the_steps(counts):
    sampler, steps = sampler_of(counts), 40 * BLOCK
    turns = [sampler.turn(step) for step in range(steps)]
    for shape, count in enumerate(counts):
        own = [turn for which, turn in turns if which == shape]
        assert own == [*range(len(own))]
        assert abs(len(own) - steps * count / sum(counts)) < len(counts)
    order = [shape for shape, _ in turns[:BLOCK]]
    assert order != sorted(order) or len(set(order)) == 1  # not a shape after the other
    assert [sampler_of(counts).turn(step) for step in (0, 99, steps - 1)] == [turns[0], turns[99], turns[-1]]


def test_a_shapes_samples_come_evenly():
    counts = (26, 7)
    sampler, visits = sampler_of(counts), Counter()
    for step in range(300):
        keys = sampler[step]
        assert len({index < 26 for _, index in keys}) == 1
        visits.update(index for _, index in keys)
        for group in (range(26), range(26, 33)):
            own = [visits[index] for index in group]
            assert max(own) - min(own) <= 1
    every = [key for step in range(300) for key in sampler[step]]
    assert len(set(every)) == len(every)  # no sample is drawn with the same random numbers twice


@pytest.mark.parametrize("split", [(1, 8), (2, 4), (4, 1), (1, 2)])
def test_ranks_and_micro_batches_share_a_steps_samples(split):
    world, batch = split
    whole = sampler_of((26, 7), 8)
    options = dict(world_size=world, accumulate=8 // world // batch)
    ranks = [sampler_of((26, 7), batch, rank=rank, **options) for rank in range(world)]
    for step in (0, 3, 70, 129):
        assert [key for rank in ranks for key in rank[step]] == whole[step]


def test_batches_have_one_shape_and_depend_on_nothing_else(world):
    def batches(start=0, **options):
        data = dataset_of(world)
        with build_loader(data, batch_size=3, total_steps=24, start_step=start, **options) as loader:
            return list(loader)

    plain = batches()
    shapes = [tuple(batch.clips.shape[1:4]) for batch in plain]
    assert set(shapes) == {*SHAPES.values()}
    for start, others in ((0, batches(num_workers=2)), (17, batches(17))):
        for one, other in zip(plain[start:], others, strict=True):
            assert one.ids == other.ids and torch.equal(one.clips, other.clips)
            assert torch.equal(one.mask.decode, other.mask.decode)


def test_too_few_of_a_shape_are_told(world):
    with pytest.warns(UserWarning, match="2 samples of one shape an epoch are fewer than a batch of 3"):
        build_loader(dataset_of(world, repeat=1), batch_size=3, total_steps=1)


def test_one_shape_goes_the_usual_way(world):
    """A mix whose sources name the model's own shape has the samples of one that names none."""
    plain, named = (
        PretrainDataset(Mix(mix_of(world).entries[:3], [Source("a", 0, 3, 1.0, **own)]), **SETTINGS)
        for own in ({}, dict(frames=4, size=(32, 32)))
    )
    assert named.shapes == [named.usual_shape]
    one, other = (next(build_loader(data, batch_size=2)) for data in (plain, named))
    assert one.ids == other.ids and torch.equal(one.clips, other.clips)
    assert identify_list(plain) == identify_list(named)


# ---- what is refused, and what a resumed run compares


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("frames: 5", "source 'long' of the mix: 5 frames are not divisible by the tubelet's 2; use 4 or 6"),
        ("size: 20", "20 pixels of height are not divisible by the tubelet's 8; use 16 or 24"),
        ("size: [16, 20]", "20 pixels of width"),
        ("size: 24", "source 'long' of the mix, clips of 4 x 24 x 24: a running cell .* cannot tile"),
    ],
)
def test_shapes_that_do_not_fit(world, clip, message):
    with pytest.raises(InputError, match=message):
        dataset_of(world, long=clip)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("frames: 0", "source 1: frames must be a whole number from 1"),
        ("frames: 2.5", "source 1: frames must be"),
        ("size: [16]", "source 1: size must be one side, or .height, width."),
        ("size: [16, x]", "source 1: size must be a whole number"),
        ("kind: images, stride: 2", "source 1: stride means nothing for images"),
        ("kind: images, pattern: '{}.png'", "source 1: pattern means nothing for images"),
        ("kind: pictures", "source 1: kind must be one of video, frames, images, not 'pictures'"),
    ],
)
def test_bad_keys(world, keys, message):
    (world / "bad.yaml").write_text(f"sources:\n- {{list: usual.txt, root: ., {keys}}}\n")
    with pytest.raises(InputError, match=message):
        read_data(world / "bad.yaml")


def test_an_index_holds_no_single_images(world):
    (world / "bad.yaml").write_text("sources:\n- {list: some/index.vmae, kind: images}\n")
    with pytest.raises(
        InputError, match="index.vmae' is an index of shards, .* read from a list or a folder"
    ):
        read_data(world / "bad.yaml")


def test_shapes_are_compared_at_a_resume(world):
    def changes(one, other):
        return list_changes(identify_list(one), other, "", identify_list(other))

    data = dataset_of(world)
    assert changes(data, dataset_of(world)) == []
    (words,) = changes(data, dataset_of(world, long="frames: 12, size: 16"))
    assert words.endswith("8 x 16 x 16, 2 x 32 x 32 then, and are 4 x 32 x 32, 12 x 16 x 16, 2 x 32 x 32 now")
