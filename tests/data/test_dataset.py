"""The loader's promises: samples that depend on (seed, epoch, index) only, resuming, short lists, broken
videos."""

import pickle
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from vmae.config import MaskConfig
from vmae.data import dataset as dataset_module
from vmae.data import video_dataset
from vmae.data.augment import CropBox, crop_and_resize, crop_boxes
from vmae.data.dataset import Batch, EpochSampler, PretrainDataset, check_decodable
from vmae.data.decode import DecodeError, open_video, video_backends
from vmae.data.loaders import build_loader
from vmae.data.manifest import VideoEntry
from vmae.data.quarantine import Failure
from vmae.data.video_dataset import MAX_ATTEMPTS
from vmae.errors import InputError
from vmae.synthetic.samples import sample_videos

SETTINGS = dict(num_frames=4, stride=2, image_size=32, grid=(2, 4, 4), mask=MaskConfig(encoder_ratio=0.75))


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """Six frame folders of 20 noisy images, 40 x 36: quick to decode, and no two clips look alike."""
    root, rng, made = tmp_path_factory.mktemp("folders"), np.random.default_rng(0), []
    for video in range(6):
        folder = root / f"v{video}"
        folder.mkdir()
        for number in range(1, 21):
            Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        made.append(VideoEntry(str(folder), "frames", 1, 20, None, "{}.png"))
    return made


def bad_entry(folder, name):
    path = folder / name
    path.write_bytes(b"not a video")
    return VideoEntry(str(path))


def make(entries, **changes):
    return PretrainDataset(entries, **{**SETTINGS, **changes})


def assert_equal(one: Batch, other: Batch):
    assert one.ids == other.ids and one.replaced == other.replaced
    assert torch.equal(one.clips, other.clips)
    for name in ("visible", "decode", "weight"):
        assert torch.equal(getattr(one.mask, name), getattr(other.mask, name)), name


def test_a_sample(entries):
    sample = make(entries, num_sample=3)[2, 4]
    assert sample.clips.shape == (3, 4, 32, 32, 3) and sample.clips.dtype == torch.uint8
    assert sample.mask.batch == 3 and sample.mask.num_tokens == 32
    assert sample.mask.visible.shape == (3, 8) and sample.mask.decode.shape == (3, 16)
    assert sample.ids == [(2, 4, entries[4].path)] and sample.replaced == []


@pytest.mark.parametrize("resize", ["torch", "pil"])
def test_clips_are_crops_of_the_video(entries, resize):
    """Every clip is found among all (start, box) that the published sampling and crop allow."""
    with open_video(entries[1]) as reader:
        video = reader.frames(range(20))
    sample = make(entries, num_sample=4, resize=resize)[0, 1]
    found = set()
    for start in range(13):
        frames = video[start : start + 8 : 2]
        for box in set(crop_boxes(40, 36, 32)):
            for clip in range(4):
                if np.array_equal(
                    crop_and_resize(frames, box, 32, resize=resize), sample.clips[clip].numpy()
                ):
                    found.add((clip, start))
    assert {clip for clip, _ in found} == {0, 1, 2, 3}
    assert len({start for _, start in found}) == 1  # one decode for the four crops


def test_crops_and_masks_of_a_video_differ(entries):
    sample = make(entries, num_sample=8)[0, 0]
    assert len({clip.numpy().tobytes() for clip in sample.clips}) > 4
    assert len({row.numpy().tobytes() for row in sample.mask.visible}) > 4


def test_samples_depend_on_seed_epoch_and_index_only(entries):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    one = make(entries, seed=5)
    forwards = {key: one[key] for key in ((0, 0), (0, 1), (3, 0), (0, 6))}
    torch.manual_seed(2)
    np.random.seed(2)
    other = make(entries, seed=5)
    for key in reversed(forwards):
        assert_equal(forwards[key], other[key])
    # epoch, repetition of the same video, and seed each change the frames and the mask
    for different in (forwards[3, 0], forwards[0, 6], make(entries, seed=6)[0, 0]):
        assert different.ids[0][2] == forwards[0, 0].ids[0][2]
        assert not torch.equal(different.clips, forwards[0, 0].clips)
        assert not torch.equal(different.mask.visible, forwards[0, 0].mask.visible)


def test_indices(entries):
    data = make(entries, repeat=3)
    assert len(data) == 18
    assert data[0, 13].ids == [(0, 13, entries[1].path)]
    assert_equal(data[17], data[0, 17])
    assert len(list(data)) == 18
    for key in (18, (0, -1), (-1, 0)):
        with pytest.raises(IndexError):
            data[key]


def test_own_stride_and_short_videos(entries, monkeypatch):
    asked = []
    original = dataset_module.sample_frame_indices

    def spy(total, num_frames, stride, rng):
        asked.append((total, num_frames, stride))
        return original(total, num_frames, stride, rng)

    monkeypatch.setattr(dataset_module, "sample_frame_indices", spy)
    short = VideoEntry(entries[0].path, "frames", 1, 1, 9, "{}.png")
    clip = make([entries[0], short])[0, 1].clips[0]
    make([entries[0], short])[0, 0]
    assert asked == [(1, 4, 9), (20, 4, 2)]
    assert all(torch.equal(frame, clip[0]) for frame in clip)  # one frame, four times


def test_bad_settings(entries):
    for changes, message in (
        ({"num_sample": 0}, "num_sample"),
        ({"repeat": 0}, "repeat"),
        ({"seed": -1}, "seed"),
        ({"num_frames": 0}, "0 frames"),
        ({"image_size": 0}, "image size 0"),
        ({"resize": "cubic"}, "cubic"),
        ({"sampling": "random"}, "unknown sampling 'random'; known: published, exact, fps"),
        ({"crop": "centre"}, "unknown crop 'centre'; known: published, center"),
        ({"sampling": "fps"}, "fps"),
        ({"fps": 5.0}, "fps"),
        ({"sampling": "fps", "fps": 0}, "above 0"),
        ({"min_frames": 0}, "min_frames"),
        ({"mask": MaskConfig(encoder_ratio=0.75, decoder_ratio=0.4)}, "0.4"),  # no running cell has it
    ):
        with pytest.raises(InputError, match=message):
            make(entries, **changes)
    with pytest.raises(InputError, match="no entries"):
        make([])


def test_flip(entries):
    plain, flipped = make(entries, num_sample=16)[0, 1], make(entries, num_sample=16, flip=True)[0, 1]
    same = [torch.equal(a, b) for a, b in zip(plain.clips, flipped.clips, strict=True)]
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(plain.clips, flipped.clips, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and 2 < sum(same) < 14
    assert torch.equal(plain.mask.visible, flipped.mask.visible)


@pytest.mark.parametrize(
    ("image_size", "grid", "box"),
    [(32, (2, 4, 4), (2, 0, 36, 36)), ((32, 64), (2, 4, 8), (0, 8, 40, 20))],  # of frames of 40 x 36
    ids=["square", "wide"],
)
def test_center_crop(entries, image_size, grid, box):
    """The same frames and masks as of random crops, and for each clip the largest centred box."""
    shape = {"image_size": image_size, "grid": grid, "num_sample": 2}
    plain, centred = make(entries, **shape), make(entries, **shape, crop="center")
    key, sample = (3, 5), centred[3, 5]
    with open_video(entries[5]) as reader:
        frames = reader.frames(plain.pick_frames(entries[5], 20, None, *key))
    wanted = torch.from_numpy(crop_and_resize(frames, CropBox(*box), image_size))
    assert all(torch.equal(clip, wanted) for clip in sample.clips)
    assert torch.equal(sample.mask.visible, plain[key].mask.visible)
    assert not torch.equal(sample.clips, plain[key].clips)
    assert_equal(plain[key], make(entries, **shape, crop="published")[key])


def test_sampling_modes(bar_videos, read_numbers):
    """The bars of the clips' frames say which frames they are: 25 frames a second."""

    def numbers(**settings):
        data = make(
            [VideoEntry(str(bar_videos["h264_closed"]))], image_size=(64, 128), grid=(2, 4, 8), **settings
        )
        data.num_frames = 8
        monkeypatched = [data._decode_with_replacement(epoch, 0)[0] for epoch in range(6)]
        return [read_numbers(clips[0].numpy()) for clips in monkeypatched]

    full_frame = pytest.MonkeyPatch()
    full_frame.setattr(dataset_module, "sample_crop", lambda *a: (0, 0, 128, 64))
    try:
        assert {b - a for clip in numbers() for a, b in zip(clip, clip[1:])} == {2}
        assert {b - a for clip in numbers(sampling="exact", stride=5) for a, b in zip(clip, clip[1:])} == {5}
        assert {clip[-1] - clip[0] for clip in numbers(sampling="fps", fps=10)} == {17}  # floor(7 * 2.5)
        assert {clip[-1] - clip[0] for clip in numbers(sampling="fps", fps=50)} == {3}
    finally:
        full_frame.undo()


def test_a_short_video_can_count_as_bad(entries):
    short = VideoEntry(entries[0].path, "frames", 1, 5, None, "{}.png")
    (failure,) = make([short, *entries[1:]], min_frames=6)[0, 0].replaced
    assert "has 5 frames, fewer than 6" in failure.error and failure.library == "frames"
    assert make([short, *entries[1:]])[0, 0].replaced == []


# ---- batches


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(entries, workers):
    data = make(entries, num_sample=2)
    plain = list(build_loader(data, batch_size=2, total_steps=7))
    with build_loader(data, batch_size=2, total_steps=7, num_workers=workers) as loader:
        parallel = list(loader)
    assert len(plain) == len(parallel) == 7
    assert plain[0].clips.shape == (4, 4, 32, 32, 3) and plain[0].mask.batch == 4 and len(plain[0].ids) == 2
    for one, other in zip(plain, parallel, strict=True):
        assert_equal(one, other)
    assert_equal(plain[4], Batch.cat([data[key] for key in EpochSampler(6, 2)[4]]))


def test_resume_at_any_step(entries):
    data = make(entries)
    whole = list(build_loader(data, batch_size=4, epochs=5))
    assert len(whole) == 5  # six samples, batches of four, the rest dropped
    for start in (1, 4):
        rest = list(build_loader(data, batch_size=4, epochs=5, start_step=start))
        assert len(rest) == 5 - start
        for one, other in zip(whole[start:], rest, strict=True):
            assert_equal(one, other)
    assert list(build_loader(data, batch_size=4, epochs=5, start_step=5)) == []


def test_resuming_decodes_nothing_before_its_step(entries, monkeypatch):
    opened = []
    original = dataset_module.open_video
    monkeypatch.setattr(video_dataset, "open_video", lambda *a: opened.append(a) or original(*a))
    next(build_loader(make(entries), batch_size=2, start_step=1_000_000))
    assert len(opened) == 2


def test_endless_without_an_end(entries):
    loader = build_loader(make(entries), batch_size=6)
    assert [batch.ids[0][0] for _, batch in zip(range(3), loader, strict=False)] == [0, 1, 2]
    assert loader.steps_per_epoch == 1


def test_epoch_is_a_permutation_without_its_rest():
    sampler = EpochSampler(23, 5, seed=1)
    assert sampler.steps_per_epoch == 4
    orders = []
    for epoch in range(3):
        keys = [key for step in range(4 * epoch, 4 * epoch + 4) for key in sampler[step]]
        assert {e for e, _ in keys} == {epoch}
        orders.append([index for _, index in keys])
        assert len(set(orders[-1])) == 20 and set(orders[-1]) <= set(range(23))
    assert orders[0] != orders[1] and orders[1] != orders[2]
    assert EpochSampler(23, 5, seed=2)[0] != sampler[0]
    assert EpochSampler(23, 5, seed=1)[9] == sampler[9]


def test_the_dropped_rest_changes():
    sampler = EpochSampler(5, 4)
    left_out = {epoch: set(range(5)) - {index for _, index in sampler[epoch]} for epoch in range(40)}
    assert set.union(*left_out.values()) == set(range(5))


@pytest.mark.parametrize("size", [100, 5])  # more, and fewer samples than the batch of 8
def test_ranks_split_the_same_batch(size):
    whole = EpochSampler(size, 8, seed=3)
    for world in (2, 4):
        ranks = [EpochSampler(size, 8 // world, seed=3, rank=rank, world_size=world) for rank in range(world)]
        for step in (0, 5, 13):
            assert [key for rank in ranks for key in rank[step]] == whole[step]


@pytest.mark.parametrize("size", [100, 5])
def test_micro_batches_split_the_same_batch(size):
    whole = EpochSampler(size, 8, seed=3)
    ranks = [
        EpochSampler(size, 2, accumulate=2, seed=3, rank=r, world_size=2, start_step=4, total_steps=7)
        for r in (0, 1)
    ]
    assert {sampler.steps_per_epoch for sampler in ranks} == {whole.steps_per_epoch}
    parts = [list(sampler) for sampler in ranks]
    assert [len(rank) for rank in parts] == [6, 6]  # two of each step
    for step in (0, 1, 2):
        found = [key for rank in parts for part in rank[2 * step : 2 * step + 2] for key in part]
        assert found == whole[4 + step]


def test_fewer_videos_than_a_batch(entries):
    data = make(entries[:3])
    with pytest.warns(UserWarning, match="3 samples an epoch are fewer than a batch of 8: .* up to 3 times"):
        loader = build_loader(data, batch_size=8, epochs=2)
    first, second = loader
    for epoch, batch in enumerate((first, second)):
        assert batch.clips.shape[0] == 8
        assert {e for e, _, _ in batch.ids} == {epoch}
        assert sorted(Counter(path for _, _, path in batch.ids).values()) == [2, 3, 3]
        assert len({clip.numpy().tobytes() for clip in batch.clips}) == 8  # never the same clip twice


def test_repeat_makes_an_epoch_long_enough(entries):
    data = make(entries[:3], repeat=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = list(build_loader(data, batch_size=4, epochs=1))
    visits = Counter(path for batch in batches for _, _, path in batch.ids)
    assert len(batches) == 3 and set(visits.values()) == {4}


def test_the_global_random_state_is_left_alone(entries):
    data = make(entries)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for workers in (0, 1):
        list(build_loader(data, batch_size=2, total_steps=1, num_workers=workers))
    assert torch.equal(torch.rand(3), expected)


def test_loader_errors(entries):
    data = make(entries)
    for options in (
        {"batch_size": 0},
        {"batch_size": 2, "num_workers": -1},
        {"batch_size": 2, "prefetch": 0},
        {"batch_size": 2, "epochs": 1, "total_steps": 1},
        {"batch_size": 2, "accumulate": 0},
        {"batch_size": 2, "rank": 2, "world_size": 2},
        {"batch_size": 2, "start_step": -1},
    ):
        with pytest.raises(InputError):
            build_loader(data, **options)


def test_a_closed_loader_ends(entries):
    loader = build_loader(make(entries), batch_size=2, num_workers=1)
    next(loader)
    loader.close()
    assert list(loader) == []


def test_batch_moves_and_pickles(entries):
    batch = Batch.cat([make(entries)[0, index] for index in range(2)])
    assert_equal(pickle.loads(pickle.dumps(batch)), batch)
    moved = batch.to("meta")
    assert moved.clips.device.type == moved.mask.visible.device.type == "meta" and moved.ids == batch.ids


def test_workers_use_one_thread(entries, monkeypatch):
    class Threads(PretrainDataset):
        def __getitem__(self, key):
            sample = super().__getitem__(key)
            sample.replaced.append(Failure("threads", str(torch.get_num_threads())))
            return sample

    data = Threads(entries, **SETTINGS)
    batch = next(build_loader(data, batch_size=1, total_steps=1, num_workers=1))
    assert batch.replaced == [Failure("threads", "1")]


def test_real_videos_in_workers():
    """Decoding in this process first, then in forked workers, is what a run does; the results are the
    same."""
    videos = [VideoEntry(str(path)) for path in sample_videos()[2:]]
    assert check_decodable(videos) == []
    data = make(videos, num_sample=2, image_size=64, grid=(2, 4, 4))
    plain = list(build_loader(data, batch_size=2, total_steps=2))
    parallel = list(build_loader(data, batch_size=2, total_steps=2, num_workers=2))
    for one, other in zip(plain, parallel, strict=True):
        assert_equal(one, other)
        assert one.clips.float().std() > 10


# ---- broken videos


def test_a_broken_video_is_replaced_and_recorded(entries, tmp_path):
    bad = bad_entry(tmp_path, "bad.mp4")
    data = make([entries[0], bad, entries[1]])
    sample = data[0, 1]
    assert_equal(sample, make([entries[0], bad, entries[1]])[0, 1])
    ((epoch, index, path),) = sample.ids
    assert (epoch, index) == (0, 1) and path in (entries[0].path, entries[1].path)
    ((failed, error, library),) = sample.replaced
    assert library in video_backends()
    assert failed == bad.path and "bad.mp4: cannot be opened" in error
    # the stand-in is drawn by epoch and index, and its clip is not the one that it gives under its own index
    assert {data[e, 1].ids[0][2] for e in range(12)} == {entries[0].path, entries[1].path}
    own = data[0, 0 if path == entries[0].path else 2]
    assert not torch.equal(own.clips, sample.clips)
    # the mask belongs to the index, not to the video
    assert torch.equal(sample.mask.visible, make(entries)[0, 1].mask.visible)


def test_replacements_cross_the_worker_and_the_batch(entries, tmp_path):
    data = make([entries[0], bad_entry(tmp_path, "bad.mp4"), entries[1], bad_entry(tmp_path, "worse.mp4")])
    (plain,) = build_loader(data, batch_size=4, total_steps=1, max_bad_share=0.5)
    (parallel,) = build_loader(data, batch_size=4, total_steps=1, max_bad_share=0.5, num_workers=1)
    assert_equal(plain, parallel)
    assert {path.rsplit("/", 1)[1] for path, _, _ in plain.replaced} == {"bad.mp4", "worse.mp4"}
    assert plain.clips.shape[0] == 4


def test_a_failure_is_retried_once(entries, monkeypatch):
    attempts = Counter()
    original = dataset_module.open_video

    def flaky(entry, backend):
        attempts[entry.path] += 1
        if attempts[entry.path] == 1:
            raise DecodeError(f"{entry.path}: the file system hiccuped")
        return original(entry, backend)

    expected = make(entries)[0, 3]
    monkeypatch.setattr(video_dataset, "open_video", flaky)
    assert_equal(make(entries)[0, 3], expected)
    assert attempts == {entries[3].path: 2}


def test_readers_are_closed_when_decoding_fails(entries, monkeypatch):
    events = []

    class Failing:
        fps = None

        def __len__(self):
            return 20

        def __enter__(self):
            events.append("open")
            return self

        def __exit__(self, *exception):
            events.append("close")

        def frames(self, indices, crop):
            raise DecodeError("x: broken")

    monkeypatch.setattr(video_dataset, "open_video", lambda entry, backend: Failing())
    with pytest.raises(InputError, match="all 2 videos are undecodable"):
        make(entries[:2])[0, 0]
    assert events == ["open", "close"] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_all_videos_undecodable(tmp_path, workers):
    data = make([bad_entry(tmp_path, f"bad{i}.mp4") for i in range(5)])
    loader = build_loader(data, batch_size=2, num_workers=workers)
    with pytest.raises(InputError) as error:
        next(loader)
    message = str(error.value)
    assert message.startswith("all 5 videos are undecodable; the first: ")
    assert message.count("cannot be opened") == 3 and "\n" not in message and "Traceback" not in message
    assert list(loader) == []


def test_a_long_list_gives_up_after_a_bound(tmp_path, monkeypatch):
    tried = []

    def failing(entry, backend):
        tried.append(entry.path)
        raise DecodeError(f"{entry.path}: gone")

    monkeypatch.setattr(video_dataset, "open_video", failing)
    data = make([VideoEntry(f"v{i}.mp4") for i in range(1000)])
    with pytest.raises(InputError, match=f"{MAX_ATTEMPTS} of 1000 videos"):
        data[0, 0]
    assert len(tried) == 2 * MAX_ATTEMPTS and len(set(tried)) == MAX_ATTEMPTS


def test_no_backend_is_not_a_broken_video(entries, monkeypatch):
    def absent(entry, backend):
        raise InputError("decoding video needs decord")

    monkeypatch.setattr(video_dataset, "open_video", absent)
    monkeypatch.setattr(dataset_module, "open_video", absent)
    with pytest.raises(InputError, match="^decoding video needs decord$"):
        make(entries)[0, 0]
    with pytest.raises(InputError, match="^decoding video needs decord$"):
        check_decodable(entries)


def test_check_decodable(entries, tmp_path):
    bad = [bad_entry(tmp_path, f"bad{i}.mp4") for i in range(30)]
    assert check_decodable(entries) == []
    failures = check_decodable([*bad[:2], entries[0]])
    assert [path for path, _ in failures] == [bad[0].path, bad[1].path]
    with pytest.raises(InputError, match="all 2 videos are undecodable; the first: .*bad0.mp4: .*bad1.mp4: "):
        check_decodable(bad[:2])
    with pytest.raises(InputError, match="all of the 20 videos tried, of 30, are undecodable"):
        check_decodable(bad)
    with pytest.raises(InputError, match="no entries"):
        check_decodable([])


def test_check_decodable_looks_over_the_whole_list(entries, tmp_path):
    bad = [bad_entry(tmp_path, f"bad{i}.mp4") for i in range(30)]
    assert len(check_decodable([*bad, *entries * 5], limit=4)) == 2
