"""Multi-scale crop against the published rule, and both resizers against each other."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vmae.data.augment import CropBox, crop_and_resize, crop_boxes, crop_sizes, sample_crop
from vmae.data.decode import open_video
from vmae.errors import InputError
from vmae.synthetic.samples import sample_videos


def published_boxes(image_w, image_h, size):
    """Every box of the published crop, for a square input, as (left, top, width, height)."""
    base = min(image_w, image_h)
    sides = []
    for scale in (1, 0.875, 0.75, 0.66):
        side = int(base * scale)
        sides.append(size if abs(side - size) < 3 else side)
    boxes = []
    for i in range(4):
        for j in range(4):
            if abs(i - j) > 1:
                continue
            w, h = sides[j], sides[i]
            sx, sy = (image_w - w) // 4, (image_h - h) // 4
            corners = [(0, 0), (4 * sx, 0), (0, 4 * sy), (4 * sx, 4 * sy), (2 * sx, 2 * sy)]
            edges = [(0, 2 * sy), (4 * sx, 2 * sy), (2 * sx, 4 * sy), (2 * sx, 0)]
            quarters = [(sx, sy), (3 * sx, sy), (sx, 3 * sy), (3 * sx, 3 * sy)]
            boxes += [(x, y, w, h) for x, y in corners + edges + quarters]
    return boxes


# The sample clips; the published 320 x 256 and 340 x 256 (256 * .875 = 224 exactly); 226 and 298 (sides 2 px
# off, which snap); portrait; a square of the input's size, where nothing can move.
SHAPES = [
    (640, 272),
    (1280, 720),
    (176, 144),
    (320, 256),
    (340, 256),
    (400, 226),
    (298, 400),
    (256, 340),
    (224, 224),
]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_boxes_are_the_published_ones(width, height):
    assert Counter(map(tuple, crop_boxes(width, height, 224))) == Counter(published_boxes(width, height, 224))


def test_sides_near_the_input_snap_to_it():
    assert {side for size in crop_sizes(400, 226, 224) for side in size} == {224, 197, 169, 149}
    assert 227 in {side for size in crop_sizes(400, 227, 224) for side in size}  # 3 px off: not near enough


def test_draws_cover_all_boxes_evenly():
    rng = np.random.default_rng(0)
    expected = Counter(crop_boxes(640, 272, 224))
    assert sum(expected.values()) == 130
    draws = Counter(sample_crop(640, 272, 224, rng) for _ in range(130 * 100))
    assert set(draws) == set(expected)
    for box, times in expected.items():
        assert abs(draws[box] / 100 - times) < 6 * (times / 100) ** 0.5  # six deviations


# Frames smaller than the input, by less than the 3 px that snap and by a lot, down to one pixel.
@pytest.mark.parametrize("size", [224, (96, 160), (160, 96), 16])
@pytest.mark.parametrize(
    ("width", "height"), [(222, 222), (223, 300), (300, 222), (1, 1), (1, 50), (2, 3), (97, 95)]
)
def test_boxes_stay_inside_small_frames(width, height, size):
    for left, top, box_width, box_height in crop_boxes(width, height, size):
        assert box_width >= 1 and box_height >= 1 and left >= 0 and top >= 0
        assert left + box_width <= width and top + box_height <= height


def test_rectangular_input_keeps_its_shape():
    assert crop_sizes(640, 272, (112, 224))[0] == (544, 272)
    assert crop_sizes(272, 640, (112, 224))[0] == (272, 136)
    for width, height in crop_sizes(640, 272, (112, 224)):
        assert 0.85 < width / height / 2 < 1 / 0.85  # scales that are one step apart, at most


@pytest.fixture(scope="module")
def frames():
    bikes = sample_videos()[0]
    with open_video(bikes) as reader:
        return reader.frames([0, 40])


@pytest.mark.parametrize("size", [224, 112, (96, 160)])
@pytest.mark.parametrize(
    "box", [CropBox(0, 0, 272, 272), CropBox(101, 17, 179, 204), CropBox(600, 240, 40, 32)]
)
def test_torch_resize_is_within_two_levels_of_pillow(frames, box, size):
    fast, exact = (crop_and_resize(frames, box, size, resize=resize) for resize in ("torch", "pil"))
    height, width = (size, size) if isinstance(size, int) else size
    assert fast.shape == exact.shape == (2, height, width, 3)
    assert fast.dtype == exact.dtype == np.uint8 and fast.flags.c_contiguous
    assert np.abs(fast.astype(int) - exact).max() <= 2
    assert exact.std() > 10  # the comparison saw a picture


def test_torch_resize_is_within_two_levels_of_pillow_on_noise():
    noise = np.random.default_rng(0).integers(0, 256, (2, 144, 176, 3), dtype=np.uint8)
    for size in crop_sizes(176, 144, 224):
        box = CropBox(3, 1, min(size[0], 173), min(size[1], 143))
        fast, exact = (
            crop_and_resize(noise, box, 224, resize=resize).astype(int) for resize in ("torch", "pil")
        )
        assert np.abs(fast - exact).max() <= 2


def test_pil_resize_is_pillows_crop_and_resize(frames):
    box = CropBox(101, 17, 238, 204)
    image = (
        Image.fromarray(frames[1])
        .crop((101, 17, 101 + 238, 17 + 204))
        .resize((112, 96), Image.Resampling.BILINEAR)
    )
    assert np.array_equal(crop_and_resize(frames, box, (96, 112), resize="pil")[1], np.asarray(image))


@pytest.mark.parametrize("resize", ["torch", "pil"])
def test_a_box_of_the_final_size_is_cut_only(frames, resize):
    cut = crop_and_resize(frames, CropBox(30, 20, 224, 200), (200, 224), resize=resize)
    assert np.array_equal(cut, frames[:, 20:220, 30:254])
    cut[:] = 0
    assert frames.any()  # a copy: the next crop of the same frames sees them unchanged


def test_bad_arguments(frames):
    box = CropBox(0, 0, 10, 10)
    with pytest.raises(InputError, match="uint8, uint16 or float32"):
        crop_and_resize(frames.astype(np.float64), box, 8)
    with pytest.raises(InputError, match="resize 'pil' is for RGB in 8 bits, and frames are float32 of 3"):
        crop_and_resize(frames.astype(np.float32), box, 8, resize="pil")
    with pytest.raises(InputError, match="not inside"):
        crop_and_resize(frames, CropBox(0, 270, 10, 10), 8)
    with pytest.raises(InputError, match="unknown resize 'cubic'; known: torch, pil"):
        crop_and_resize(frames, box, 8, resize="cubic")
    with pytest.raises(InputError, match="must be positive"):
        crop_and_resize(frames, box, 0)
    with pytest.raises(InputError, match="0 x 5"):
        sample_crop(0, 5, 224, np.random.default_rng(0))
