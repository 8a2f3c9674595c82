"""Single images: what a viewer shows of each kind of file, lists and folders of them, and clips made of
them."""

import numpy as np
import pytest
import torch
from PIL import Image

from vmae.config import MaskConfig
from vmae.data.dataset import PretrainDataset
from vmae.data.decode import DecodeError, open_video
from vmae.data.image_lists import read_images, read_images_with_problems
from vmae.data.long_lists import LONG
from vmae.data.manifest import VideoEntry
from vmae.data.mix import describe_data, read_data
from vmae.data.readers import image as reader
from vmae.errors import InputError

SETTINGS = dict(num_frames=4, stride=2, image_size=32, grid=(2, 4, 4), mask=MaskConfig(encoder_ratio=0.75))
RGB = np.random.default_rng(0).integers(0, 256, (36, 40, 3), dtype=np.uint8)


def decoded(path) -> np.ndarray:
    with open_video(VideoEntry(str(path), "image")) as video:
        assert len(video) == 1 and video.backend == "image"
        return video.frames([0, 0])[1]


@pytest.fixture
def photos(tmp_path):
    """A folder of six noisy images, of three formats, in two folders."""
    rng = np.random.default_rng(1)
    for number, suffix in enumerate((".png", ".PNG", ".bmp", ".png", ".webp", ".jpeg")):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (36 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{number}{suffix}")
    return tmp_path / "photos"


# ---- what is decoded


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: RGB[::-1].swapaxes(0, 1),
        7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: RGB.swapaxes(0, 1)[::-1],
    }
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), turned[orientation])


def test_grey_palette_and_cmyk_become_rgb(tmp_path):
    grey = Image.fromarray(RGB[..., 0])
    grey.save(tmp_path / "grey.png")
    np.testing.assert_array_equal(decoded(tmp_path / "grey.png"), RGB[..., :1].repeat(3, 2))
    Image.fromarray(RGB[..., 0] > 99).save(tmp_path / "bits.png")
    assert set(np.unique(decoded(tmp_path / "bits.png"))) == {0, 255}
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(decoded(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))
    Image.new("CMYK", (40, 36), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red = decoded(tmp_path / "print.jpg").mean((0, 1))
    assert red[0] > 250 and red[1] < 5 and red[2] < 5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (40, 36), 0)
        image.putpalette([200, 10, 10, 0, 0, 0])
        image.paste(1, (0, 0, 20, 36))
        image.save(tmp_path / "a.png", transparency=0)
        shown = np.zeros((36, 40, 3), np.uint8)
        shown[:, 20:] = 255
    else:
        image = Image.new(mode, (40, 36), (0,) * (len(mode) - 1) + (51,))  # black, a fifth opaque
        image.save(tmp_path / "a.png")
        shown = np.full((36, 40, 3), 204)
    np.testing.assert_allclose(decoded(tmp_path / "a.png"), shown, atol=1)


def test_16_bits(tmp_path):
    """A PNG's white is 65535; other formats do not tell."""
    deep = RGB[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(decoded(tmp_path / "deep.png"), RGB[..., :1].repeat(3, 2))
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    Image.fromarray(RGB[..., 0].astype(np.float32)).save(tmp_path / "real.tif")
    for name in ("deep.tif", "real.tif"):
        with pytest.raises(DecodeError, match=f"{name}: cannot be decoded: .*more than 8 bits.*convert it"):
            decoded(tmp_path / name)


def test_an_animation_gives_its_first_picture(tmp_path):
    first, second = Image.new("RGB", (40, 36), "red"), Image.new("RGB", (40, 36), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decoded(tmp_path / "a.gif"), np.asarray(first))


def test_broken_and_huge_images(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    for name, content in (("half.png", data[: len(data) // 2]), ("empty.png", b""), ("text.jpg", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DecodeError, match=f"^{tmp_path / name}: cannot be decoded: ") as caught:
            decoded(tmp_path / name)
        assert "\n" not in str(caught.value) and str(caught.value).count(name) == 1
    monkeypatch.setattr(reader, "MOST_PIXELS", 36 * 40 - 1)
    with pytest.raises(
        DecodeError, match="whole.png: .* 40 x 36 pixels are more than 1,439; make it smaller"
    ):
        decoded(tmp_path / "whole.png")


def test_a_bomb_is_not_decoded(tmp_path):
    """Pillow's own limit lies above this one; a file of some 200 bytes that promises 30,000 x 30,000."""
    header = b"P6 30000 30000 255\n"
    (tmp_path / "bomb.ppm").write_bytes(header + bytes(200))
    with pytest.raises(DecodeError, match="bomb.ppm: cannot be decoded: "):
        decoded(tmp_path / "bomb.ppm")
    (tmp_path / "large.ppm").write_bytes(b"P6 12000 12000 255\n" + bytes(200))
    with pytest.raises(DecodeError, match="12000 x 12000 pixels are more than"):
        decoded(tmp_path / "large.ppm")


# ---- lists


def test_a_folder_of_images(photos):
    (photos / "notes.txt").touch()
    entries = read_images(photos)
    names = ["a/p0.png", "a/p2.bmp", "a/p4.webp", "b/p1.PNG", "b/p3.png", "b/p5.jpeg"]
    assert [entry.path for entry in entries] == [str(photos / name) for name in names]
    assert {entry.kind for entry in entries} == {"image"} and [entry.line for entry in entries] == [
        *range(1, 7)
    ]
    with pytest.raises(InputError, match="holds no images .*jpg.*; 1 other files skipped"):
        (photos / "a" / "none").mkdir()
        (photos / "a" / "none" / "x.mp4").touch()
        read_images(photos / "a" / "none")


def test_a_list_of_images(photos):
    path = photos / "list.txt"
    path.write_text('# two\na/p0.png\n"b/p1.PNG"\n')
    entries = read_images(path, photos)
    assert [(entry.path, entry.kind, entry.line) for entry in entries] == [
        (str(photos / "a/p0.png"), "image", 2),
        (str(photos / "b/p1.PNG"), "image", 3),
    ]
    assert list(read_images(path)) == list(entries)  # the list's own folder
    path.write_text("a/p0.png\nnone.png\n")
    with pytest.raises(InputError, match="line 2: 'none.png' does not exist"):
        read_images(path)
    found, problems = read_images_with_problems(path)
    assert [entry.kind for entry in found] == ["image"] and [line for line, _ in problems] == [2]


def test_a_list_of_something_else(photos):
    path = photos / "list.txt"
    (photos / "film.mp4").touch()
    (photos / "img_00001.jpg").touch()
    for text, what in (
        ("a/p0.png\nfilm.mp4\n", "a video"),
        (f"a/p0.png\n{photos} 1 1\n", "a folder of frames"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=f"line 2: .* is {what}, not an image; leave out `kind: images`"):
            read_images(path)


def test_a_long_list_of_images(photos, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = photos / "list.txt"
    path.write_text("a/p0.png\nb/p1.PNG\n" * (LONG // 2))
    entries = read_images(path, photos)
    assert len(entries) == LONG and entries[LONG - 1] == VideoEntry(
        str(photos / "b/p1.PNG"), "image", line=LONG
    )
    assert entries.count_paths() == 2 and len(entries.numbers_of("image")) == LONG
    lines = entries.identity_lines(0, 2, str(photos) + "/")
    assert lines == b"a/p0.png\0None\0image\nb/p1.PNG\0None\0image\n"
    assert lines == super(type(entries), entries).identity_lines(0, 2, str(photos) + "/")


# ---- clips


def mix_of(folder, more=""):
    path = folder / "mix.yaml"
    path.write_text(f"sources:\n- {{name: photos, list: {folder}, kind: images{more}}}\n")
    return read_data(path)


def test_a_still_clip(photos):
    data = PretrainDataset(mix_of(photos, ", frames: 4"), num_sample=2, **SETTINGS)
    sample = data[0, 3]
    assert sample.clips.shape == (2, 4, 32, 32, 3) and sample.mask.num_tokens == 32
    for clip in sample.clips:
        assert all(torch.equal(frame, clip[0]) for frame in clip)
    assert not torch.equal(*sample.clips)  # each its own crop
    for sampling in (dict(sampling="exact"), dict(sampling="fps", fps=5.0)):
        assert PretrainDataset(mix_of(photos, ", frames: 4"), **SETTINGS, **sampling)[0, 0].replaced == []


def test_an_image_is_one_tubelet_long(photos):
    data = PretrainDataset(mix_of(photos), **SETTINGS)
    sample = data[0, 0]
    assert sample.clips.shape == (1, 2, 32, 32, 3) and torch.equal(sample.clips[0, 0], sample.clips[0, 1])
    assert (sample.mask.num_tokens, sample.mask.visible.shape[1], sample.mask.decode.shape[1]) == (16, 4, 8)
    assert data.shapes == [(2, 32, 32)] != [data.usual_shape]


def test_a_bad_image_is_a_bad_sample(photos):
    (photos / "a" / "bad.png").write_bytes(b"no image")
    data = PretrainDataset(mix_of(photos), **SETTINGS)
    replaced = [failure for index in range(7) for failure in data[0, index].replaced]
    assert {failure.path for failure in replaced} == {str(photos / "a" / "bad.png")}
    assert {failure.library for failure in replaced} == {"image"}


def test_what_a_run_says_of_images(photos):
    assert describe_data(mix_of(photos, ", frames: 4, size: [32, 64]")) == [
        "photos: 6 images, 100.0% of samples, clips of 4 frames of 32 x 64 pixels"
    ]
