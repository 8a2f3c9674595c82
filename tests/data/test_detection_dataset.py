"""Key frames: which frames a clip has, and that boxes stay on what they frame whatever happens to the
picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from vmae import InputError
from vmae.data.augment import CropBox
from vmae.data.ava import AvaBox
from vmae.data.detection_dataset import (
    DetectionBatch,
    DetectionDataset,
    KeyAugmentConfig,
    KeyClipConfig,
    KeyFrameReader,
    crop_boxes_of,
    extend_boxes,
    find_videos,
    flip_boxes,
    jitter_boxes,
    key_frames,
)
from vmae.data.quarantine import Failure

CLIP = KeyClipConfig(num_frames=4, image_size=32, stride=2)
OFF = KeyAugmentConfig(flip=False, jitter=False)
RED, GREEN = (0.25, 0.25, 0.5, 0.5), (0.5, 0.5, 1.0, 0.875)
ROWS = [
    AvaBox("v", 1, RED, 3, line=1),
    AvaBox("v", 1, RED, 7, line=2),
    AvaBox("v", 1, GREEN, 7, line=3),
    AvaBox("w", 2, GREEN, 3, line=4),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two folders of 20 images, 64 x 48 pixels: a red and a green rectangle; blue tells the number of the
    frame."""
    root = tmp_path_factory.mktemp("videos")
    for name in "vw":
        (root / name).mkdir()
        for number in range(20):
            pixels = np.zeros((48, 64, 3), np.uint8)
            pixels[..., 2] = 10 * number
            for channel, box in enumerate((RED, GREEN)):
                x1, y1, x2, y2 = (round(share * side) for share, side in zip(box, (64, 48, 64, 48)))
                pixels[y1:y2, x1:x2, channel] = 255
            Image.fromarray(pixels).save(root / name / f"{name}_{number + 1:06}.png")
    return root


@pytest.fixture
def frames(videos):
    entries = find_videos(videos, ["v", "w"], pattern="{video}_{:06}.png")
    return key_frames(ROWS, "a.csv", entries, CLIP, actions=[3, 7], fps=5)


def test_key_frames(frames):
    assert [(f.video, f.timestamp, f.frame, f.boxes, f.labels) for f in frames] == [
        ("v", 1, 5, (RED, GREEN), ((0, 1), (1,))),
        ("w", 2, 10, (GREEN,), ((0,),)),
    ]
    assert frames[0].kind == "frames" and frames[0].total == 20


def test_frames_of_a_clip():
    assert CLIP.indices(10, 20).tolist() == [
        6,
        8,
        10,
        12,
    ]  # the key frame is number T // 2, as in SlowFast's loader
    assert CLIP.indices(1, 20).tolist() == [0, 0, 1, 3] and CLIP.indices(19, 20).tolist() == [15, 17, 19, 19]


def test_the_origin(videos):
    entries = find_videos(videos, ["v"], pattern="{video}_{:06}.png")
    clip = KeyClipConfig(num_frames=4, image_size=32, origin=900)
    row = AvaBox("v", 902, RED, 3, line=9)
    assert key_frames([row], "a.csv", entries, clip, fps=5)[0].frame == 10
    message = (
        r"a\.csv, line 9: key frame at 902 s is outside of .*v, which has 0 to 4\.00 s "
        r"\(20 frames, 5 a second\); is --origin"
    )
    with pytest.raises(InputError, match=message):
        key_frames([row], "a.csv", entries, CLIP, fps=5)
    with pytest.raises(InputError, match="line 9: key frame at 904 s is outside"):  # just past the end
        key_frames([AvaBox("v", 904, RED, 3, line=9)], "a.csv", entries, clip, fps=5)


def test_videos_that_are_not_there(videos, tmp_path):
    entries = find_videos(videos, ["v", "other"], pattern="{video}_{:06}.png")
    assert set(entries) == {"v"}
    with pytest.raises(InputError, match=r"a\.csv, line 4: video 'w' is not in the place"):
        key_frames(ROWS, "a.csv", entries, CLIP, fps=5, videos="the place")
    with pytest.raises(
        InputError, match="line 1: .* does not tell its frames a second; name them with --fps"
    ):
        key_frames(ROWS, "a.csv", entries, CLIP)
    (tmp_path / "v.mp4").write_text("no video")
    with pytest.raises(InputError, match=r"line 1: .*v\.mp4.*cannot be opened"):
        key_frames(ROWS[:1], "a.csv", find_videos(tmp_path, ["v"]), CLIP)
    with pytest.raises(InputError, match="does not exist"):
        find_videos(tmp_path / "none", ["v"])
    for name in ("v.mp4", "v.gif", "w.mp4"):
        (tmp_path / name).touch()
    assert set(find_videos(tmp_path, ["w"])) == {"w"}
    with pytest.raises(InputError, match="v.gif and .*v.mp4 are both video 'v'"):
        find_videos(tmp_path, ["v"])


def test_boxes_by_hand():
    boxes = np.array([[0.25, 0.25, 0.5, 0.5], [0.0, 0.5, 0.2, 1.0]])
    # A crop of the right half of the width and the middle half of the height of 80 x 40 pixels.
    cut = crop_boxes_of(boxes, CropBox(20, 10, 40, 20), 80, 40)
    np.testing.assert_allclose(
        cut, [[0, 0, 0.5, 0.5], [0, 0.5, 0, 1]]
    )  # the second one is left outside: empty
    np.testing.assert_allclose(flip_boxes(boxes), [[0.5, 0.25, 0.75, 0.5], [0.8, 0.5, 1.0, 1.0]])
    np.testing.assert_allclose(
        extend_boxes(boxes, (0.1, 0.4)), [[0.2375, 0.2, 0.5125, 0.55], [0, 0.4, 0.21, 1.0]]
    )


def test_jitter_is_the_published_range():
    boxes = np.tile([[0.4, 0.3, 0.6, 0.7]], (20000, 1))
    moved = (jitter_boxes(boxes, np.random.default_rng(0)) - boxes) / [0.2, 0.4, 0.2, 0.4]
    np.testing.assert_allclose(moved.min(0), [-0.2, -0.1, -0.1, -0.05], atol=1e-3)
    np.testing.assert_allclose(moved.max(0), [0.1, 0.05, 0.2, 0.1], atol=1e-3)
    assert jitter_boxes(np.array([[0, 0, 1, 1.0]]), np.random.default_rng(1)).max() <= 1


def framed(clip, box):
    """The mean picture inside a box, a pixel away from its edges."""
    height, width = clip.shape[1:3]
    x1, y1, x2, y2 = (share * side for share, side in zip(box.tolist(), (width, height, width, height)))
    rows, columns = slice(int(np.ceil(y1)) + 1, int(y2) - 1), slice(int(np.ceil(x1)) + 1, int(x2) - 1)
    return clip[clip.shape[0] // 2, rows, columns].float().mean((0, 1))


def test_a_sample(frames):
    dataset = DetectionDataset(frames, 2, CLIP, OFF)
    sample = dataset[0, 0]
    assert sample.clips.shape == (1, 4, 32, 32, 3) and sample.clips.dtype == torch.uint8
    assert sample.boxes.tolist() == [[list(RED), list(GREEN)]] and sample.targets.tolist() == [
        [[1, 1], [0, 1]]
    ]
    assert sample.valid.tolist() == [[1, 1]] and sample.ids == [(0, 0, frames[0].path)]
    assert sample.clips[0, :, 0, 0, 2].tolist() == [10, 30, 50, 70]  # frames 1, 3, 5, 7


@pytest.mark.parametrize("change", [dict(flip=True), dict(min_crop=0.1), dict(flip=True, min_crop=0.1)])
def test_boxes_follow_the_picture(frames, change):
    dataset = DetectionDataset(
        frames, 2, CLIP, KeyAugmentConfig(**{"flip": False, "jitter": False, **change})
    )
    seen = set()
    for epoch in range(60):
        sample = dataset[epoch, 0]
        for box, target in zip(sample.boxes[0], sample.targets[0]):
            x1, y1, x2, y2 = box.tolist()
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
            seen.add(tuple(round(value, 2) for value in (x1, y1, x2, y2)))
            if min(x2 - x1, y2 - y1) * 32 > 6:
                red, green, _ = framed(sample.clips[0], box)
                both = target.tolist() == [1, 1]  # the red rectangle has both actions
                assert (red > 200 and green < 60) if both else (green > 200 and red < 60)
    assert len(seen) > (3 if change == dict(flip=True) else 20)


def test_a_sample_is_a_function_of_its_key(frames):
    augment = KeyAugmentConfig(min_crop=0.3)
    first, again = (DetectionDataset(frames, 2, CLIP, augment, seed=4)[3, 1] for _ in range(2))
    assert torch.equal(first.clips, again.clips) and torch.equal(first.boxes, again.boxes)
    other = DetectionDataset(frames, 2, CLIP, augment, seed=5)[3, 1]
    assert not torch.equal(first.boxes, other.boxes)


def test_batches_are_padded(frames):
    dataset = DetectionDataset(frames, 2, CLIP, OFF)
    batch = DetectionBatch.cat([dataset[0, 1], dataset[0, 0]])
    assert batch.valid.tolist() == [[1, 0], [1, 1]] and batch.count == 3
    assert batch.boxes.shape == (2, 2, 4) and not batch.boxes[0, 1].any() and not batch.targets[0, 1].any()
    assert batch.to("cpu").ids == batch.ids


def test_a_broken_video_is_replaced_with_its_boxes(frames):
    dataset = DetectionDataset(frames, 2, CLIP, OFF)
    dataset.block(0, "is broken")
    sample = dataset[0, 0]
    assert sample.boxes.tolist() == [[list(GREEN)]] and sample.targets.tolist() == [[[1, 0]]]
    assert "broken" in sample.replaced[0].error


def test_the_reader(frames):
    reader = KeyFrameReader(frames, CLIP)
    (number, (clip, boxes)), _ = reader.read([0, 1])
    assert number == 0 and clip.shape == (4, 32, 32, 3)
    np.testing.assert_allclose(boxes, extend_boxes(np.array([RED, GREEN]), (0.1, 0.05)), atol=1e-6)
    reader.block(1, "is broken")
    assert isinstance(reader[1], Failure)


def test_settings_are_checked():
    with pytest.raises(InputError, match="min_crop must be a number above 0 and at most 1"):
        KeyAugmentConfig(min_crop=0)
    with pytest.raises(InputError, match="origin"):
        KeyClipConfig(origin=-1)
    assert KeyClipConfig.from_dict({**CLIP.to_dict(), "extend": [0.1, 0.05]}) == CLIP
