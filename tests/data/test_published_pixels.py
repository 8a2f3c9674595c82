"""`--resize published`: the pixels of the published training and tests on labels, within a grey level of what
their definition and OpenCV give."""

import numpy as np
import pytest

from tests.data.opencv_resize import GOLDEN, SIZES, name_of, picture
from vmae.cli import build_parser
from vmae.config import IMAGENET_MEAN, IMAGENET_STD
from vmae.data.augment import CropBox, crop_and_resize
from vmae.data.augment_classify import AugmentConfig, sample_resized_crop
from vmae.data.classify_dataset import ClassifyDataset, ClipConfig, ViewConfig, ViewDataset, spatial_views
from vmae.data.decode import open_video
from vmae.data.labels import LabelledList
from vmae.data.manifest import VideoEntry
from vmae.data.video_dataset import Purpose, numpy_rng
from vmae.errors import InputError
from vmae.synthetic.samples import sample_videos
from vmae.train import finetune_settings as finetune
from vmae.train import pretrain_settings as pretrain
from vmae.train.resume import with_defaults

PUBLISHED = ClipConfig(num_frames=2, image_size=112, stride=4, resize="published")


def bilinear(image, height, width):
    """The definition, float64 [height, width, 3]: pixel centres lie at halves, a target pixel takes its two
    nearest source pixels of each axis (at an edge the last one twice), whatever the scale."""

    def neighbours(source, target):
        place = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        first = np.floor(place).astype(int)
        return first, np.minimum(first + 1, source - 1), place - first

    top, bottom, down = neighbours(image.shape[0], height)
    left, right, along = neighbours(image.shape[1], width)
    image, along, down = image.astype(np.float64), along[None, :, None], down[:, None, None]
    rows = image[:, left] * (1 - along) + image[:, right] * along
    return rows[top] * (1 - down) + rows[bottom] * down


def published_views(frames, short_side, crops):
    """The published test: short side resized, the longer one rounded down, then squares along it."""
    height, width = frames.shape[1:3]
    size = (short_side, int(short_side * width / height))
    if width < height:
        size = (int(short_side * height / width), short_side)
    whole = np.stack([bilinear(frame, *size) for frame in frames])
    step, views = (max(size) - short_side) / (crops - 1), []
    for number in range(crops):
        start = int(number * step)
        views.append(whole[:, start:, :][:, :short_side] if size[0] >= size[1] else whole[:, :, start:])
    return np.stack([view[:, :short_side, :short_side] for view in views])


@pytest.fixture(scope="module")
def bunny():
    """Two frames of 1280 x 720, which tests resize by 3.2 and 6.4."""
    with open_video(sample_videos()[1]) as reader:
        return reader.frames([0, 9])


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_the_resize_is_opencvs_within_a_level(source, target):
    """The definition too, and the antialiased filter not, where a picture gets smaller."""
    image, golden = picture(*source), np.load(GOLDEN)[name_of(source, target)].astype(int)
    whole = CropBox(0, 0, source[1], source[0])
    found, smooth = (
        crop_and_resize(image[None], whole, target, resize=name)[0] for name in ("bilinear", "torch")
    )
    assert found.dtype == np.uint8 and np.abs(found - bilinear(image, *target)).max() < 0.501
    assert np.abs(found.astype(int) - golden).max() <= 1
    if target[0] < source[0]:
        assert np.abs(smooth.astype(int) - golden).max() > 20


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("crops", [3, 4])
def test_views_are_those_of_the_published_test(bunny, crops, upright):
    frames = np.ascontiguousarray(bunny.transpose(0, 2, 1, 3)) if upright else bunny
    expected = published_views(frames, 112, crops)
    found = PUBLISHED.views_of(frames, crops)
    assert found.shape == expected.shape == (crops, 2, 112, 112, 3)
    assert np.abs(found - expected).max() < 0.51
    smooth = ClipConfig(num_frames=2, image_size=112).views_of(frames, crops)
    assert np.abs(smooth - expected).max() > 20


def test_every_frame_size_has_the_published_longer_side():
    for height, width in ((480, 854), (272, 640), (231, 231), (719, 405), (13, 700)):
        frames = np.random.RandomState(height).randint(0, 256, (1, height, width, 3)).astype(np.uint8)
        found = spatial_views(frames, 56, 3, resize="bilinear")
        assert np.abs(found - published_views(frames, 56, 3)).max() < 0.51, (height, width)


def test_one_crop_is_that_of_the_published_validation():
    frames = np.arange(8 + 171, dtype=np.uint8)[None, None, :, None].repeat(8, 1).repeat(3, 3)
    assert spatial_views(frames, 8, 1, resize="bilinear")[0, 0, 0, 0, 0] == 86  # round(85.5), to even
    assert spatial_views(frames, 8, 1)[0, 0, 0, 0, 0] == 85  # as before this setting


def test_a_longer_short_side():
    """Squares of the clip's size: from end to end along the longer side, in the middle of the shorter one."""
    row = np.arange(60, dtype=np.uint8)[None, :, None].repeat(20, 0)
    column = np.arange(20, dtype=np.uint8)[:, None, None].repeat(60, 1)
    frames = np.concatenate([row, column, column], 2)[None]
    for resize in ("torch", "bilinear"):
        views = spatial_views(frames, 16, 3, short_side=20, resize=resize)
        assert views.shape == (3, 1, 16, 16, 3)
        assert views[:, 0, 0, 0].tolist() == [[0, 2, 2], [22, 2, 2], [44, 2, 2]]
        turned = spatial_views(frames.transpose(0, 2, 1, 3), 16, 3, short_side=20, resize=resize)
        assert np.array_equal(turned, views.transpose(0, 1, 3, 2, 4))
    assert spatial_views(np.zeros((1, 90, 160, 3), np.uint8), (20, 40), 2, short_side=30).shape[2:4] == (
        20,
        40,
    )


# --- Datasets ---


@pytest.fixture(scope="module")
def bikes():
    return LabelledList([VideoEntry(str(sample_videos()[0]))], [(0,)], 1, False)


def test_test_clips_of_a_video(bikes):
    views = ViewDataset(bikes.entries, PUBLISHED, ViewConfig(segments=1, crops=3))[0].numpy()
    with open_video(bikes.entries[0]) as reader:
        frames = reader.frames(PUBLISHED.view_indices(len(reader), bikes.entries[0], 1)[0])
    assert np.abs(views - published_views(frames, 112, 3)).max() < 0.51


def test_training_clips_of_a_video(bikes):
    """As published: normalised floats are cropped, and the crop resized; in grey levels within half a one."""
    data = ClassifyDataset(bikes, PUBLISHED, AugmentConfig.none(crop=True), seed=5)
    plain = ClassifyDataset(bikes, PUBLISHED.replace(resize="torch"), AugmentConfig.none(crop=True), seed=5)
    mean, std, seen = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD), 0.0
    for index in range(3):
        with open_video(bikes.entries[0]) as reader:
            rng = numpy_rng(5, 0, index, 0, Purpose.FRAMES)
            frames = reader.frames(PUBLISHED.train_indices(len(reader), bikes.entries[0], rng))
        box = sample_resized_crop(640, 272, numpy_rng(5, 0, index, 0, Purpose.CROPS))
        pixels = (frames / 255 - mean) / std
        pixels = pixels[:, box.top : box.top + box.height, box.left : box.left + box.width]
        expected = 255 * (np.stack([bilinear(frame, 112, 112) for frame in pixels]) * std + mean)
        assert np.abs(data[0, index].clips[0].numpy() - expected).max() < 0.51
        seen = max(seen, np.abs(plain[0, index].clips[0].numpy() - expected).max())
    assert seen > 5


def test_training_without_a_crop_sees_the_middle_test_view(bikes):
    clip = PUBLISHED.replace(short_side=128)
    sample = ClassifyDataset(bikes, clip, AugmentConfig.none(), seed=5)[0, 0].clips[0].numpy()
    with open_video(bikes.entries[0]) as reader:
        rng = numpy_rng(5, 0, 0, 0, Purpose.FRAMES)
        frames = reader.frames(clip.train_indices(len(reader), bikes.entries[0], rng))
    assert np.array_equal(sample, clip.views_of(frames, 1)[0])


def test_wrong_settings():
    with pytest.raises(
        InputError, match="short side of 96 pixels is less than the 112 .* --short-side at least 112"
    ):
        PUBLISHED.replace(short_side=96)
    with pytest.raises(InputError, match="unknown resize 'pil'; known: torch, published"):
        PUBLISHED.replace(resize="pil")
    assert ClipConfig(image_size=(96, 160), short_side=96).short_side == 96


def settings_of(*words):
    args = build_parser("finetune").parse_args(["finetune", "--data", "x", "--output", "y", *words])
    return finetune.configs_from_args(args, finetune.model_from_args(args), 5)[0]


def test_flags(tmp_path):
    """Published names; pixels and short side stay with the run."""
    clip = settings_of("--resize", "published", "--short_side_size", "256", "--input_size", "224").clip
    assert (clip.resize, clip.short_side, clip.image_size) == ("published", 256, 224)
    assert (settings_of().clip.resize, settings_of().clip.short_side) == ("torch", None)
    (tmp_path / "own.yaml").write_text("resize: published\nshort_side_size: 240\n")
    clip = settings_of("--config", str(tmp_path / "own.yaml")).clip
    assert (clip.resize, clip.short_side) == ("published", 240)
    with pytest.raises(InputError, match="short side of 224 pixels is less than the 320"):
        settings_of("--short_side_size", "224", "--input_size", "320")
    words = ["pretrain", "--data", "x", "--output", "y", "--resize", "published"]
    config, _ = pretrain.configs_from_args(build_parser("pretrain").parse_args(words))
    assert config.resize == "pil"  # published pre-training antialiases


def test_a_run_from_before_the_settings_is_resumed_with_the_usual_pixels():
    config = settings_of()
    saved = config.to_dict()
    del saved["clip"]["resize"], saved["clip"]["short_side"]
    assert with_defaults(saved, config) == config.to_dict()
