"""Frames and pixels of clips to train on and of test views: the published ones, and the same wherever they
are made."""

import numpy as np
import pytest
import torch
from PIL import Image

from vmae.data.augment_classify import AugmentConfig
from vmae.data.classify_dataset import (
    ClassifyDataset,
    ClipConfig,
    LabelledBatch,
    ViewConfig,
    ViewDataset,
    spatial_views,
)
from vmae.data.labels import LabelledList
from vmae.data.loaders import build_loader
from vmae.data.manifest import VideoEntry
from vmae.data.quarantine import Failure
from vmae.data.sampling import (
    dense_view_indices,
    sample_dense_indices,
    sample_sparse_indices,
    sparse_view_indices,
)
from vmae.errors import InputError

# --- Frames: expected values worked out by hand from the published code ---


def test_dense_frames_of_a_long_video():
    drawn = np.stack([sample_dense_indices(100, 4, 4, np.random.default_rng(seed)) for seed in range(400)])
    starts = drawn[:, 0]
    assert starts.min() == 0 and starts.max() == 83  # the span's end is drawn from 16 to 99
    assert {tuple(row - row[0]) for row in drawn} == {
        (0, 5, 10, 15)
    }  # a span of 16 in three steps, cut at its end
    assert sample_dense_indices(100, 4, 4, None).tolist() == [42, 47, 52, 57]


def test_dense_frames_of_a_short_video():
    assert sample_dense_indices(10, 4, 4, None).tolist() == [0, 9, 9, 9]
    assert sample_dense_indices(16, 4, 4, None).tolist() == [0, 5, 10, 15]
    assert sample_dense_indices(1, 4, 4, None).tolist() == [0, 0, 0, 0]


def test_sparse_frames():
    drawn = np.stack([sample_sparse_indices(13, 4, np.random.default_rng(seed)) for seed in range(200)])
    assert (drawn.min(0) == [0, 3, 6, 9]).all() and (drawn.max(0) == [2, 5, 8, 11]).all()
    assert sample_sparse_indices(13, 4, None).tolist() == [1, 4, 7, 10]
    assert sample_sparse_indices(3, 5, None).tolist() == [0, 0, 0, 1, 2]


def test_dense_views():
    found = dense_view_indices(100, 4, 4, 5)  # 25 frames to choose from, 21 beyond the first clip
    assert found[:, 0].tolist() == [0, 20, 40, 60, 84] and found[4].tolist() == [84, 88, 92, 96]
    assert dense_view_indices(100, 4, 4, 1)[0].tolist() == [40, 44, 48, 52]
    assert dense_view_indices(6, 4, 4, 2).tolist() == [[0, 4, 4, 4]] * 2


def test_sparse_views():
    assert sparse_view_indices(13, 4, 2).tolist() == [[0, 3, 6, 9], [1, 4, 8, 11]]
    assert sparse_view_indices(3, 5, 1).tolist() == [[0, 0, 1, 1, 2]]


def sparse(total, frames, stride, segments):
    return sparse_view_indices(total, frames, segments)


@pytest.mark.parametrize("function", [dense_view_indices, sparse])
def test_views_refuse_nonsense(function):
    with pytest.raises(InputError, match="0 frames"):
        function(0, 4, 4, 2)
    with pytest.raises(InputError, match="at least 1 segment"):
        function(10, 4, 4, 0)


# --- Pixels ---


def test_crops_along_the_longer_side():
    frames = (
        np.arange(40, dtype=np.uint8)[None, None, :, None].repeat(16, 1).repeat(3, 3)
    )  # [1, 16, 40, 3], column numbers
    views = spatial_views(frames, 16, 3)
    assert views.shape == (3, 1, 16, 16, 3)
    assert [view[0, 0, 0, 0] for view in views] == [0, 12, 24]
    assert spatial_views(frames, 16, 1)[0][0, 0, 0, 0] == 12
    upright = spatial_views(frames.transpose(0, 2, 1, 3), 16, 3)
    assert np.array_equal(upright, views.transpose(0, 1, 3, 2, 4))


def test_the_short_side_is_resized():
    views = spatial_views(np.zeros((2, 30, 45, 3), np.uint8), 20, 3)
    assert views.shape == (3, 2, 20, 20, 3)
    assert spatial_views(np.zeros((2, 30, 45, 3), np.uint8), (20, 10), 2).shape == (2, 2, 20, 10, 3)


# --- Datasets ---


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Five folders of 12 images of 40 x 32 noise, classes 0, 1, 2, 0, 1."""
    root, rng, entries = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0), []
    for video in range(5):
        folder = root / f"v{video}"
        folder.mkdir()
        for number in range(12):
            Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(
                folder / f"img_{number + 1:05}.jpg"
            )
        entries.append(VideoEntry(str(folder), "frames", 1, 12))
    return LabelledList(entries, [(0,), (1,), (2,), (0,), (1,)], 3, False)


CLIP = ClipConfig(num_frames=4, image_size=16, stride=2)


def test_a_sample_is_a_function_of_its_key(labelled):
    data = ClassifyDataset(labelled, CLIP, AugmentConfig(), num_sample=2, seed=3)
    first = data[1, 2]
    assert first.clips.shape == (2, 4, 16, 16, 3) and first.clips.dtype == torch.uint8
    assert first.targets.tolist() == [[0, 0, 1]] * 2 and first.ids == [(1, 2, labelled.entries[2].path)]
    assert torch.equal(
        first.clips, ClassifyDataset(labelled, CLIP, AugmentConfig(), num_sample=2, seed=3)[1, 2].clips
    )
    others = [
        data[0, 2],
        data[1, 7],
        ClassifyDataset(labelled, CLIP, AugmentConfig(), num_sample=2, seed=4)[1, 2],
    ]
    assert all(not torch.equal(first.clips, other.clips) for other in others)
    assert not torch.equal(first.clips[0], first.clips[1])


def test_no_augmentation_but_flips(labelled):
    flipped = [
        ClassifyDataset(labelled, CLIP, AugmentConfig.none(flip=True), seed=seed)[0, 0].clips[0]
        for seed in range(6)
    ]
    plain = [
        ClassifyDataset(labelled, CLIP, AugmentConfig.none(), seed=seed)[0, 0].clips[0] for seed in range(6)
    ]
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, plain)]
    assert (
        any(mirrored)
        and not all(mirrored)
        and all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, plain))
    )


def test_a_broken_video_lends_no_label(labelled):
    entries = [VideoEntry("gone.mp4"), *labelled.entries[1:]]
    broken = LabelledList(entries, [(2,), (1,), (1,), (1,), (1,)], 3, False)
    sample = ClassifyDataset(broken, CLIP, AugmentConfig())[0, 0]
    assert (
        sample.targets.tolist() == [[0, 1, 0]]
        and sample.replaced[0].path == "gone.mp4"
        and sample.ids[0][2] != "gone.mp4"
    )


def test_the_loader_gives_the_same_batches_with_workers(labelled):
    def batches(workers):
        data = ClassifyDataset(labelled, CLIP, AugmentConfig(), seed=1)
        with build_loader(data, batch_size=2, num_workers=workers, total_steps=3) as loader:
            return list(loader)

    for alone, aided in zip(batches(0), batches(2), strict=True):
        assert isinstance(aided, LabelledBatch) and alone.ids == aided.ids
        assert torch.equal(alone.clips, aided.clips) and torch.equal(alone.targets, aided.targets)


def test_views_of_a_video(labelled):
    data = ViewDataset(labelled.entries, CLIP, ViewConfig(segments=2, crops=3))
    views = data[1]
    assert views.shape == (6, 4, 16, 16, 3)
    one = ViewDataset(labelled.entries, CLIP, ViewConfig(segments=2, crops=1))[1]
    assert torch.equal(views[1], one[0]) and torch.equal(views[4], one[1])


def test_views_are_read_in_order_and_broken_videos_named(labelled):
    data = ViewDataset([*labelled.entries, VideoEntry("gone.mp4")], CLIP, ViewConfig(segments=1, crops=1))
    for workers in (0, 2):
        found = list(data.read([5, 3, 0], workers))
        assert [video for video, _ in found] == [5, 3, 0]
        assert isinstance(found[0][1], Failure) and found[0][1].path == "gone.mp4"
        assert torch.equal(found[1][1], data[3]) and torch.equal(found[2][1], data[0])


def test_sparse_clips_and_bad_settings(labelled):
    sparse = ClipConfig(num_frames=4, image_size=16, sampling="sparse")
    assert ClassifyDataset(labelled, sparse, AugmentConfig.none())[0, 0].clips.shape[1] == 4
    assert ViewDataset(labelled.entries, sparse, ViewConfig(segments=2, crops=3))[0].shape[0] == 6
    for wrong in (
        lambda: ClipConfig(sampling="thick"),
        lambda: ClipConfig(stride=0),
        lambda: ViewConfig(crops=0),
    ):
        with pytest.raises(InputError):
            wrong()
