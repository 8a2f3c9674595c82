"""Key frames: which frames a clip has, and that boxes stay on what they frame whatever happens to the
picture."""

import colorsys
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from vmae import InputError
from vmae.data import detection_published as published
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


# --- As VideoMAE-Action-Detection --------------------------------------------------------------------------

PUBLISHED = dataclasses.replace(CLIP, preprocess="published")
PLAIN = KeyAugmentConfig(flip=False, jitter=False, colours=False)


def test_published_frames_of_a_clip():
    clip = KeyClipConfig(num_frames=16, stride=4, preprocess="published")
    assert clip.indices(500, 1000).tolist() == list(range(500 - 31, 500 + 30, 4))
    # Its code reads as many frames before the key frame as from it on, and takes the middle of each stride.
    for frames, stride in ((16, 4), (8, 3), (4, 2), (5, 5), (16, 1)):
        span = frames * stride
        read = list(range(-(span - span // 2), span // 2))
        assert published.clip_offsets(frames, stride).tolist() == read[(stride - 1) // 2 :: stride][:frames]
    assert clip.indices(3, 20).tolist() == [0] * 8 + [4, 8, 12, 16, 19, 19, 19, 19]


def test_published_sizes():
    assert published.resized_hw(360, 640, 224) == (256, 455) == published.resized_hw(640, 360, 224)[::-1]
    assert published.resized_hw(256, 256, 224) == (256, 256) and published.resized_hw(48, 64, 32) == (37, 49)


def box_lists(box, size, to, extend=(0.1, 0.05)):
    """One box [x1, y1, x2, y2] in shares through its code, step by step: to (x, y, width, height) in pixels
    and back, to another size, extended; (resized, extended) in pixels."""
    (width, height), (to_width, to_height) = size, to
    x, y, w, h = box[0] * width, box[1] * height, (box[2] - box[0]) * width, (box[3] - box[1]) * height
    corners = [x, y, x + max(w - 1, 0), y + max(h - 1, 0)]
    corners = [min(max(v, 0), last) for v, last in zip(corners, [width - 1, height - 1] * 2)]
    resized = [v * ratio for v, ratio in zip(corners, [to_width / width, to_height / height] * 2)]
    x1, y1, x2, y2 = resized
    pad_x, pad_y = extend[0] * (x2 - x1 + 1) / 2, extend[1] * (y2 - y1 + 1) / 2
    wide = [x1 - pad_x, y1 - pad_y, x2 + pad_x, y2 + pad_y]
    return resized, [min(max(v, 0), last) for v, last in zip(wide, [to_width - 1, to_height - 1] * 2)]


def test_published_boxes():
    boxes = [(0.25, 0.25, 0.5, 0.5), (0.0, 0.5, 0.2, 1.0), (0.9, 0.9, 1.0, 1.0), (0.5, 0.5, 0.501, 0.502)]
    steps = [box_lists(box, (640, 360), (455, 256)) for box in boxes]
    pixels = published.to_pixels(np.array(boxes), 360, 640, (256, 455))
    np.testing.assert_allclose(pixels, [resized for resized, _ in steps])
    extended = published.extend_pixels(pixels, (0.1, 0.05), 256, 455)
    np.testing.assert_allclose(extended, [wide for _, wide in steps])
    shares = published.to_shares(extended, 256, 455)
    np.testing.assert_allclose(shares * [455, 256, 455, 256], extended)
    cut = published.crop_pixels(np.array([[10.0, 20, 110, 120], [0, 0, 5, 5]]), 30, 40, 64)
    np.testing.assert_allclose(cut, [[0, 0, 64, 64], [0, 0, 0, 0]])  # the second one is outside, and stays
    np.testing.assert_allclose(published.flip_pixels(np.array([[10.0, 20, 30, 40]]), 64), [[33, 20, 53, 40]])


def test_published_box_jitter():
    boxes = np.tile([[40.0, 30, 59, 69]], (20000, 1))
    moved = (published.jitter_pixels(boxes, np.random.default_rng(0), 100, 100) - boxes) / [20, 40, 20, 40]
    np.testing.assert_allclose(moved.min(0), [-0.2, -0.1, -0.1, -0.05], atol=1e-3)
    np.testing.assert_allclose(moved.max(0), [0.1, 0.05, 0.2, 0.1], atol=1e-3)
    flat = np.tile([[64.0, 64, 64, 64], [0, 10, 0, 20]], (100, 1))  # outside of a crop
    jittered = published.jitter_pixels(flat, np.random.default_rng(1), 64, 64)
    assert jittered.min() >= 0 and jittered.max() <= 63
    assert ((jittered[:, 2:] - jittered[:, :2]) >= 1 - 1e-9).all()


def test_published_tests_see_the_whole_frame_in_its_own_shape(frames):
    (clip, boxes), _ = (KeyFrameReader(frames, PUBLISHED)[number] for number in (0, 1))
    assert clip.shape == (4, 37, 49, 3) and clip.dtype == torch.uint8
    assert clip[:, 0, 0, 2].tolist() == [10, 30, 50, 70]  # frames 1, 3, 5, 7 about the key frame 5
    expected = [np.array(box_lists(box, (64, 48), (49, 37))[1]) / [49, 37, 49, 37] for box in (RED, GREEN)]
    np.testing.assert_allclose(boxes, expected, atol=1e-6)
    red, green = (framed(clip, box) for box in boxes)
    assert red[0] > 200 and green[1] > 200


def test_published_training_crops(frames):
    """A crop at int(random * room) of the resized frame, and all boxes, cut at its edges."""
    dataset = DetectionDataset(frames, 2, PUBLISHED, PLAIN, seed=3)
    whole, _ = KeyFrameReader(frames, PUBLISHED)[0]
    places = set()
    for epoch in range(30):
        sample = dataset[epoch, 0]
        assert sample.clips.shape == (1, 4, 32, 32, 3) and sample.boxes.shape == (1, 2, 4)
        (place,) = [
            (left, top)
            for left in range(49 - 32)
            for top in range(37 - 32)
            if torch.equal(whole[:, top : top + 32, left : left + 32], sample.clips[0])
        ]
        places.add(place)
        for box, seen in zip((RED, GREEN), sample.boxes[0]):
            pixels = np.array(box_lists(box, (64, 48), (49, 37))[0]) - [*place, *place]
            np.testing.assert_allclose(seen, pixels.clip(0, 32) / 32, atol=1e-6)
    assert (
        len(places) > 15
        and max(left for left, _ in places) == 16
        and {top for _, top in places} == set(range(5))
    )
    assert dataset[0, 0].targets.tolist() == [[[1, 1], [0, 1]]]


@pytest.mark.parametrize("change", [dict(flip=True), dict(jitter=True), dict(colours=True), {}])
def test_published_augmentation(frames, change):
    base = {"flip": False, "jitter": False, "colours": False}
    plain = DetectionDataset(frames, 2, PUBLISHED, KeyAugmentConfig(**base), seed=1)
    settings = {**base, **change} if change else {"flip": False, "jitter": False}  # colours by default
    other = DetectionDataset(frames, 2, PUBLISHED, KeyAugmentConfig(**settings), seed=1)
    pairs = [(plain[epoch, 0], other[epoch, 0]) for epoch in range(12)]
    same_clips = [torch.equal(one.clips, two.clips) for one, two in pairs]
    same_boxes = [torch.equal(one.boxes, two.boxes) for one, two in pairs]
    if "flip" in change:
        assert 2 <= sum(same_clips) <= 10 and same_boxes == same_clips
        one, two = pairs[same_clips.index(False)]
        assert torch.equal(one.clips.flip(3), two.clips)
        np.testing.assert_allclose(two.boxes[..., 0], (31 - 32 * one.boxes[..., 2]) / 32, atol=1e-6)
    elif "jitter" in change:
        assert all(same_clips) and not any(same_boxes)
    else:
        assert not any(same_clips) and all(same_boxes)


def hsv_by_hand(pixel, hue, saturation, value):
    """One RGB pixel through OpenCV's uint8 HSV: hue in steps of two degrees, the others of 255; the way there
    in fixed point with 12 bits."""
    red, green, blue = pixel
    top, spread = max(pixel), max(pixel) - min(pixel)
    ahead = green - blue if top == red else blue - red + 2 * spread
    if top not in (red, green):
        ahead = red - green + 4 * spread
    h = (ahead * round(180 * 4096 / (6 * max(spread, 1))) + 2048) >> 12
    s = (spread * round(255 * 4096 / max(top, 1)) + 2048) >> 12
    h, s, v = (h + hue + 180) % 180, min(max(s + saturation, 0), 255), min(max(top + value, 0), 255)
    return [int(255 * channel) for channel in colorsys.hsv_to_rgb(h / 180, s / 255, v / 255)]


@pytest.mark.parametrize("shifts", [(0, 0, 0), (10, 0, 0), (-10, 26, -26), (3, -26, 26)])
def test_shifted_colours(shifts):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)).astype(np.uint8)
    pixels[0, 0, :4] = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [7, 7, 7]]
    expected = np.array([hsv_by_hand(pixel, *shifts) for pixel in pixels.reshape(-1, 3).tolist()])
    got = published.shift_hsv(pixels, *shifts).reshape(-1, 3)
    assert np.abs(got.astype(int) - expected).max() <= 1 and (got == expected).mean() > 0.8


def test_shifts_of_colours_are_the_published_range():
    grey = np.full((1, 1, 1, 3), 128, np.uint8)
    seen = {int(published.shift_colours(grey, np.random.default_rng(i)).max()) for i in range(2000)}
    assert (min(seen), max(seen)) == (128 - 26, 128 + 26)


def test_published_clips_are_square():
    with pytest.raises(InputError, match="--preprocess published trains on square clips; --image-size is"):
        KeyClipConfig(image_size=(32, 64), preprocess="published")
    with pytest.raises(InputError, match="unknown preprocessing 'caffe'; known: resize, published"):
        KeyClipConfig(preprocess="caffe")
    old = {name: value for name, value in CLIP.to_dict().items() if name != "preprocess"}
    assert KeyClipConfig.from_dict(old) == CLIP  # what runs before it meant
