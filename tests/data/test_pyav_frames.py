"""A part that is cut before colours are converted has the pixels of a part that is cut afterwards."""

import numpy as np
import pytest

from tests.data.small_videos import make_video, with_matrix
from vmae.data import open_video
from vmae.data.pyav_frames import FrameConverter, _ToRgb
from vmae.data.video_reader import DecodeError
from vmae.errors import InputError
from vmae.synthetic.samples import sample_videos

av = pytest.importorskip("av")

FORMATS = ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv410p", "rgb24", "gray"]


def noise(width, height, pixels, rng):
    """A picture of random samples."""
    frame = av.VideoFrame(width, height, pixels)
    for plane in frame.planes:
        samples = rng.integers(0, 256, plane.buffer_size, np.uint8)
        if pixels.endswith("10le"):
            samples = rng.integers(0, 1024, plane.buffer_size // 2, np.uint16)
        plane.update(samples.tobytes())
    frame.colorspace, frame.color_range = int(rng.choice([1, 2, 5, 6, 9])), int(rng.choice([0, 1, 2]))
    return frame


def random_box(width, height, rng):
    """Any box; one in three ends at the picture's right or lower edge."""
    box_width, box_height = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
    left, top = int(rng.integers(width - box_width + 1)), int(rng.integers(height - box_height + 1))
    if rng.random() < 0.3:
        left, top = width - box_width, height - box_height
    return left, top, box_width, box_height


def cut(frames, box):
    left, top, width, height = box
    return frames[..., top : top + height, left : left + width, :]


@pytest.mark.parametrize("pixels", FORMATS)
def test_random_boxes(pixels):
    rng = np.random.default_rng(FORMATS.index(pixels))
    for _ in range(25):
        width, height = int(rng.integers(2, 300)), int(rng.integers(2, 160))
        frame, converter = noise(width, height, pixels, rng), FrameConverter("v")
        whole = converter.picture(frame)
        for _ in range(4):
            box = random_box(width, height, rng)
            assert np.array_equal(converter.part(frame, box), cut(whole, box)), (width, height, box)


def test_the_cut_comes_first_where_it_can(monkeypatch):
    boxes = []
    convert = _ToRgb.__call__
    monkeypatch.setattr(
        _ToRgb, "__call__", lambda self, frame, box=None: (boxes.append(box), convert(self, frame, box))[1]
    )
    rng = np.random.default_rng(0)
    for pixels, height in (("yuv420p", 40), ("yuv420p", 41), ("yuv420p10le", 40)):
        FrameConverter("v").part(noise(60, height, pixels, rng), (11, 5, 20, 9))
    assert boxes == [(10, 4, 22, 10), None, None]


def test_cutting_elsewhere_would_show():
    """Why odd heights and other formats are converted whole: boxes cut first differ."""
    rng = np.random.default_rng(0)
    for width, height, pixels in ((60, 41, "yuv420p"), (60, 40, "yuv420p10le"), (60, 40, "yuv410p")):
        frame = noise(width, height, pixels, rng)
        whole, part = FrameConverter("v").picture(frame), _ToRgb()(frame, (10, 6, 20, 20))
        assert not np.array_equal(part, cut(whole, (10, 6, 20, 20)))


@pytest.mark.parametrize("number", range(4))
def test_sample_clips(number):
    rng = np.random.default_rng(number)
    with open_video(sample_videos()[number], "pyav") as reader:
        whole = reader.frames([3, 9, 1])
        for _ in range(3):
            box = random_box(whole.shape[2], whole.shape[1], rng)
            assert np.array_equal(reader.frames([3, 9, 1], lambda *_, box=box: box), cut(whole, box))


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, 1)])
def test_turned_and_mirrored(tmp_path, matrix):
    path = with_matrix(make_video(tmp_path / "v.mp4"), tmp_path / "turned.mp4", *matrix)
    sizes = []
    with open_video(path, "pyav") as reader:
        whole, box = reader.frames([1, 4]), (7, 3, 41, 60)
        part = reader.frames([1, 4], lambda *size: sizes.append(size) or box)
        assert np.array_equal(part, cut(whole, box))
        assert sizes == [reader.size] == [whole.shape[2:0:-1]]


@pytest.mark.parametrize("backend", ["auto", "decord", "torchcodec"])
def test_every_backend_cuts(backend):
    video, box = sample_videos()[2], (5, 8, 33, 20)
    try:
        reader = open_video(video, backend)
    except InputError as error:
        pytest.skip(str(error))
    with reader:
        assert np.array_equal(reader.frames([7, 7, 2], lambda *_: box), cut(reader.frames([7, 7, 2]), box))


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 177, 10), (0, 140, 5, 5), (3, 3, 0, 5)])
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_a_box_outside_is_an_error(backend, box):
    try:
        reader = open_video(sample_videos()[2], backend)
    except InputError as error:
        pytest.skip(str(error))
    with reader, pytest.raises(InputError, match="is not inside a frame of 176 x 144 pixels") as error:
        reader.frames([0], lambda *_: box)
    assert not isinstance(error.value, DecodeError)
