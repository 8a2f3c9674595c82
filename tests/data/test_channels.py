"""Frames of other channels and dtypes: numpy stacks, native images, what a batch and a check make of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vmae.cli import main
from vmae.config import MaskConfig
from vmae.data.augment import CropBox, crop_and_resize
from vmae.data.batches import TensorBatch
from vmae.data.channels import is_stack, join_clips
from vmae.data.dataset import PretrainDataset, check_decodable
from vmae.data.decode import DecodeError, open_video
from vmae.data.frame_arrays import check_frames
from vmae.data.manifest import VideoEntry, read_list
from vmae.errors import InputError


def values(dtype, *shape: int) -> np.ndarray:
    most = {"uint8": 255, "uint16": 65535, "float32": 3000.0}[dtype]
    return (np.random.default_rng(0).random(shape) * most).astype(dtype)


@pytest.fixture
def stack(tmp_path):
    """Writes an array, and gives its entry."""

    def write(array: np.ndarray, name: str = "a.npy") -> VideoEntry:
        np.save(tmp_path / name, array)
        return VideoEntry(str(tmp_path / name))

    return write


# Grey in 16 bits without a channel axis, RGB and depth, the bands of a satellite.
@pytest.mark.parametrize("dtype, shape", [("uint16", ()), ("uint8", (4,)), ("float32", (12,))])
def test_a_stack_gives_its_frames_as_they_are(stack, dtype, shape):
    array = values(dtype, 7, 20, 24, *shape)
    entry = stack(array)
    assert is_stack(entry)
    whole = array.reshape(7, 20, 24, -1)
    with open_video(entry) as reader:
        reader.channels = whole.shape[3]
        assert (len(reader), reader.size, reader.backend) == (7, (24, 20), "numpy")
        found = reader.frames([5, 0, 5])
        assert found.dtype == array.dtype and np.array_equal(found, whole[[5, 0, 5]])
        part = reader.frames([2], lambda width, height: (3, 4, 10, 12))
        assert np.array_equal(part, whole[2:3, 4:16, 3:13])
        assert np.array_equal(np.stack(list(reader.iterate())), whole)


def test_bytes_of_another_order_are_turned(stack):
    array = values("uint16", 3, 8, 8, 1)
    with open_video(stack(array.astype(">u2"))) as reader:
        reader.channels = 1
        assert np.array_equal(reader.frames([1]), array[1:2])


@pytest.mark.parametrize(
    "array, said",
    [
        (np.zeros((3, 8, 8), np.int16), "frames are uint8, uint16 or float32, not int16"),
        (np.zeros((8, 8), np.uint8), r"\[T, H, W\] or \[T, H, W, C\] in C's order, not \[8, 8\]"),
        (np.zeros((0, 8, 8), np.uint8), r"not \[0, 8, 8\]"),
        (np.asfortranarray(np.zeros((3, 8, 8), np.uint8)), "in Fortran's order"),
    ],
)
def test_a_stack_that_is_none_is_named(stack, array, said):
    with pytest.raises(DecodeError, match=rf"a\.npy: cannot be opened: .*{said}"):
        open_video(stack(array))


def test_a_damaged_stack_is_named(stack, tmp_path):
    entry = stack(values("uint8", 4, 8, 8, 3))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-10])
    with open_video(entry) as reader, pytest.raises(DecodeError, match="it ends within frame 3"):
        reader.frames([2, 3])
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(DecodeError, match="no numpy array"):
        open_video(entry)


def test_other_channels_are_named_with_both_counts(stack):
    with open_video(stack(values("uint8", 4, 8, 8, 4))) as reader:
        with pytest.raises(DecodeError, match=r"a\.npy: has 4 channels .*, and the model takes 3 \(--in"):
            reader.frames([0])
        reader.channels = None
        assert reader.frames([0]).shape == (1, 8, 8, 4)


def folder(tmp_path, images: list[Image.Image], suffix: str) -> VideoEntry:
    for number, image in enumerate(images):
        image.save(tmp_path / f"f_{number}{suffix}")
    return VideoEntry(str(tmp_path), "frames", 0, len(images), None, "f_{}" + suffix)


# 16-bit grey TIFF and PNG, 8-bit grey, RGB with transparency.
@pytest.mark.parametrize(
    "dtype, channels, suffix",
    [("uint16", 1, ".tif"), ("uint16", 1, ".png"), ("uint8", 1, ".png"), ("uint8", 4, ".png")],
)
def test_images_keep_their_channels_where_others_than_three_are_wanted(tmp_path, dtype, channels, suffix):
    pixels = values(dtype, 3, 10, 12, channels)
    entry = folder(tmp_path, [Image.fromarray(one.squeeze()) for one in pixels], suffix)
    with open_video(entry) as reader:
        reader.channels = channels
        found = reader.frames([2, 0])
    assert found.dtype == pixels.dtype and np.array_equal(found, pixels[[2, 0]])


def test_images_of_16_bits_are_no_rgb(tmp_path):
    entry = folder(tmp_path, [Image.fromarray(values("uint16", 10, 12))], ".tif")
    with open_video(entry) as reader, pytest.raises(DecodeError, match="f_0.tif: has 1 channel of more than"):
        reader.frames([0])


def test_images_of_one_folder_have_one_dtype(tmp_path):
    images = [Image.fromarray(values(dtype, 10, 12)) for dtype in ("uint16", "uint8")]
    with open_video(folder(tmp_path, images, ".tif")) as reader:
        reader.channels = 1
        with pytest.raises(DecodeError, match="f_1.tif: uint8 of 1 channels, unlike the frames before it"):
            reader.frames([0, 1])


@pytest.mark.parametrize("resize", ["torch", "bilinear"])
@pytest.mark.parametrize("dtype, channels", [("uint16", 1), ("float32", 12), ("uint8", 4)])
def test_resizing_keeps_dtype_and_values(dtype, channels, resize):
    frames = values(dtype, 2, 30, 40, channels)
    box = CropBox(4, 2, 24, 20)
    found = crop_and_resize(frames, box, (16, 16), resize=resize)
    assert found.dtype == frames.dtype and found.shape == (2, 16, 16, channels)
    cut = torch.from_numpy(frames[:, 2:22, 4:28].astype(np.float64)).permute(0, 3, 1, 2)
    exact = torch.nn.functional.interpolate(cut, (16, 16), mode="bilinear", antialias=resize == "torch")
    off = np.abs(found - exact.permute(0, 2, 3, 1).numpy()).max()
    assert off <= {"uint8": 1.01, "uint16": 0.51, "float32": 1e-2}[dtype]
    assert np.array_equal(crop_and_resize(frames, CropBox(0, 0, 40, 30), (30, 40), resize="torch"), frames)


def test_clips_of_several_dtypes_join_over_what_counts_as_1():
    grey = torch.tensor([51, 255], dtype=torch.uint8).view(1, 1, 1, 2, 1)
    deep = torch.tensor([13107, 65535], dtype=torch.uint16).view(1, 1, 1, 2, 1)
    assert join_clips([deep, deep]).dtype == torch.uint16
    joined = join_clips([grey, deep])
    assert joined.dtype == torch.float32 and joined.flatten().tolist() == pytest.approx([0.2, 1, 0.2, 1])


def test_batches_join_clips_by_that_rule():
    import dataclasses

    @dataclasses.dataclass
    class Clips(TensorBatch):
        clips: torch.Tensor

    mixed = [torch.full((1, 2), 255, dtype=torch.uint8), torch.full((1, 2), 65535, dtype=torch.uint16)]
    assert Clips.cat([Clips(one) for one in mixed]).clips.tolist() == [[1, 1], [1, 1]]


def make_dataset(entries, channels: int) -> PretrainDataset:
    size = dict(num_frames=4, stride=1, image_size=16, grid=(2, 2, 2), channels=channels)
    return PretrainDataset(entries, mask=MaskConfig(encoder_ratio=0.5), **size)


def test_a_data_set_gives_clips_in_their_dtype(stack):
    entries = [stack(values("uint16", 6, 20, 24), "a.npy"), stack(values("uint16", 6, 20, 24), "b.npy")]
    sample = make_dataset(entries, 1)[0, 0]
    assert sample.clips.dtype == torch.uint16 and sample.clips.shape == (1, 4, 16, 16, 1)
    assert type(sample).cat([sample, sample]).clips.dtype == torch.uint16


def test_a_list_of_other_channels_is_found_before_a_run(stack):
    entries = [stack(values("uint8", 6, 20, 24, 4))]
    with pytest.raises(InputError, match=r"a\.npy: has 4 channels .* the model takes 1"):
        check_decodable(entries, channels=1)
    assert check_decodable(entries, channels=4) == []


def test_frames_in_memory():
    frames = values("uint16", 3, 8, 8, 2)
    assert check_frames(frames, channels=2) is frames
    with pytest.raises(InputError, match=r"a model of 4 channels are .* these are uint16 \[3, 8, 8, 2\]"):
        check_frames(frames, channels=4)


def test_check_data_knows_stacks_and_tells_their_statistics(stack, tmp_path, capsys):
    array = values("uint16", 16, 40, 40, 2)
    stack(array, "a.npy")
    np.save(tmp_path / "b.npy", values("uint8", 16, 40, 40, 3))
    (tmp_path / "list.txt").write_text("a.npy 0 -1\nb.npy 0 -1\n")
    assert main(["check-data", str(tmp_path / "list.txt"), "--workers", "1", "--statistics"]) == 0
    said = capsys.readouterr().out
    assert "channels: 2 1, 3 1" in said and "values: uint16 1, uint8 1" in said
    line = next(line for line in said.splitlines() if "--in-channels 2" in line)
    words = line.split()
    mean, std = (words[words.index(flag) + 1 :][:2] for flag in ("--channel-mean", "--channel-std"))
    scaled = array.reshape(-1, 2) / 65535
    assert [float(word) for word in mean] == pytest.approx(scaled.mean(0), abs=0.02)
    assert [float(word) for word in std] == pytest.approx(scaled.std(0), abs=0.02)
    record = json.loads((tmp_path / "list-check" / "report.json").read_text())["videos"][0]
    assert (record["channels"], record["dtype"], record["library"]) == (2, "uint16", "numpy")


def test_check_data_of_other_channels(stack, tmp_path, capsys):
    stack(values("uint8", 8, 20, 20, 4))
    (tmp_path / "list.txt").write_text("a.npy 0 -1\n")
    assert main(["check-data", str(tmp_path / "list.txt"), "--workers", "1", "--in-channels", "3"]) == 1
    assert "line 1: " in (said := capsys.readouterr().out) and "has 4 channels" in said


def test_packing_is_for_videos(stack, tmp_path, capsys):
    stack(values("uint8", 8, 20, 20, 3))
    (tmp_path / "list.txt").write_text("a.npy 0 -1\n")
    assert main(["pack", str(tmp_path / "list.txt"), str(tmp_path / "out")]) == 2
    assert "a.npy: is a stack of frames, no video file; packing is for videos" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert len(read_list(tmp_path / "list.txt")) == 1


# Pages in grey; pages of samples; ImageJ's series, time before channels; OME's, channels before time.
@pytest.mark.parametrize(
    "shape, axes, options",
    [
        ((5, 20, 24), "TYX", {}),
        ((5, 20, 24, 3), "TYXS", {"photometric": "rgb"}),
        ((5, 4, 20, 24), "TCYX", {"imagej": True, "metadata": {"axes": "TCYX"}}),
        ((4, 5, 20, 24), "CTYX", {"ome": True, "metadata": {"axes": "CTYX"}, "photometric": "minisblack"}),
    ],
)
def test_a_tiff_gives_its_frames(tmp_path, shape, axes, options):
    tifffile = pytest.importorskip("tifffile")
    array = values("uint16", *shape)
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    order = [axes.find(axis) for axis in "TYX"] + [max(axes.find("C"), axes.find("S"))]
    whole = array[..., None] if order[3] < 0 else array.transpose(order)
    with open_video(VideoEntry(str(tmp_path / "a.tif"))) as reader:
        reader.channels = whole.shape[3]
        assert (len(reader), reader.size, reader.backend) == (5, (24, 20), "tifffile")
        found = reader.frames([4, 0, 2])
    assert found.dtype == np.uint16 and np.array_equal(found, whole[[4, 0, 2]])


def test_a_tiff_that_is_no_stack_is_named(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", values("uint16", 2, 3, 8, 8), imagej=True, metadata={"axes": "TZYX"})
    with pytest.raises(DecodeError, match=r"a\.tif: cannot be opened: axes TZYX of \[2, 3, 8, 8\] are no"):
        open_video(VideoEntry(str(tmp_path / "a.tif")))
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 8, 8), np.int16))
    with pytest.raises(DecodeError, match="uint8, uint16 or float32, not int16"):
        open_video(VideoEntry(str(tmp_path / "a.tif")))
    (tmp_path / "a.tif").write_bytes(b"no picture")
    with pytest.raises(DecodeError, match=r"a\.tif: cannot be opened: "):
        open_video(VideoEntry(str(tmp_path / "a.tif")))


def test_images_in_tiff_of_several_deep_channels(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pixels = values("uint16", 2, 10, 12, 6)
    for number, one in enumerate(pixels):
        tifffile.imwrite(tmp_path / f"f_{number}.tif", one, photometric="minisblack", planarconfig="contig")
    with open_video(VideoEntry(str(tmp_path), "frames", 0, 2, None, "f_{}.tif")) as reader:
        reader.channels = 6
        assert np.array_equal(reader.frames([0, 1]), pixels)
    tifffile.imwrite(tmp_path / "f_1.tif", values("uint16", 3, 10, 12), photometric="minisblack")
    with open_video(VideoEntry(str(tmp_path), "frames", 0, 2, None, "f_{}.tif")) as reader:
        reader.channels = 1
        with pytest.raises(DecodeError, match=r"f_1\.tif: has 3 frames, and an image of a folder is one"):
            reader.frames([1])


def test_a_tiff_without_its_library_is_told_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tifffile", None)
    Image.fromarray(values("uint16", 8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="need tifffile .*: `pip install tifffile`"):
        open_video(VideoEntry(str(tmp_path / "a.tif")))
