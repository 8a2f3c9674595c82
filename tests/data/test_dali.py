"""DALI's batches against the CPU loader's: the same frames, boxes and masks; pixels within some levels. On
its CPU operators, which decode VP9, so that this runs without a GPU; NVDEC where there is one."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vmae.config import MaskConfig
from vmae.data import dali
from vmae.data.augment import CropBox
from vmae.data.dataset import PretrainDataset
from vmae.data.loaders import build_loader
from vmae.data.manifest import VideoEntry
from vmae.data.prefetch import Prefetcher, _tensors
from vmae.errors import InputError

needs_dali = pytest.mark.skipif(dali.dali_missing() is not None, reason=str(dali.dali_missing()))
# Frames of the bars' size, so that boxes are cut and not resized away: the numbers stay readable.
SETTINGS = dict(
    num_frames=8, stride=2, image_size=(64, 128), grid=(4, 4, 8), mask=MaskConfig(encoder_ratio=0.75)
)
LEVELS = 4  # mean of the differences; another frame is some 50 off


def dataset(paths, **settings):
    entries = [path if isinstance(path, VideoEntry) else VideoEntry(str(path)) for path in paths]
    return PretrainDataset(entries, **{**SETTINGS, **settings})


def assert_same(one, two, levels=LEVELS):
    assert one.ids == two.ids and one.replaced == two.replaced
    assert all(torch.equal(a, b) for a, b in zip(_tensors(one.mask), _tensors(two.mask), strict=True))
    assert one.clips.shape == two.clips.shape and two.clips.dtype == torch.uint8
    difference = (one.clips.float() - two.clips.cpu().float()).abs().mean((1, 2, 3, 4))
    assert difference.max() < levels, difference


@pytest.fixture(scope="module")
def vp9_videos(bar_videos):
    return [bar_videos["vp9"], bar_videos["vp9_vfr"]]


@needs_dali
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_sample": 3, "repeat": 2},
        {"flip": True, "num_sample": 2},
        {"crop": "center", "image_size": 64, "grid": (4, 4, 4)},
        {"sampling": "exact", "stride": 5},
        {"stride": 20},  # longer than the video: frames repeat
    ],
    ids=["plain", "three crops", "flips", "center", "exact", "short"],
)
def test_batches_are_those_of_the_cpu_loader(vp9_videos, settings):
    data = dataset(vp9_videos * 3, **settings)
    with (
        build_loader(data, batch_size=2, epochs=2) as plain,
        build_loader(data, batch_size=2, epochs=2, loader="dali") as ours,
    ):
        assert ours.steps_per_epoch == plain.steps_per_epoch
        batches = list(zip(plain, ours, strict=True))
        assert ours._failures is None and not ours._avoided  # DALI made them, not the way round it
    for one, two in batches:
        assert_same(one, two)


@needs_dali
def test_frames_are_those_asked_for(vp9_videos, read_numbers, monkeypatch):
    """Every frame shows its number."""
    monkeypatch.setattr(
        "vmae.data.dataset.sample_crop", lambda width, height, size, rng: CropBox(0, 0, width, height)
    )
    data = dataset(vp9_videos, repeat=20)
    with build_loader(data, batch_size=4, epochs=1, loader="dali") as loader:
        for batch in loader:
            for (epoch, index, _), clip in zip(batch.ids, batch.clips, strict=True):
                expected = data.pick_frames(data.entries[index % 2], 120, 25.0, epoch, index)
                assert read_numbers(clip.numpy()) == expected.tolist()
        assert loader._failures is None


@needs_dali
def test_resumes_in_the_middle(vp9_videos):
    data = dataset(vp9_videos * 3)
    with build_loader(data, batch_size=2, epochs=2, loader="dali") as loader:
        whole = list(loader)
    with build_loader(data, batch_size=2, epochs=2, loader="dali", start_step=4, num_workers=2) as loader:
        rest = list(loader)
    assert [batch.ids for batch in rest] == [batch.ids for batch in whole[4:]]
    assert all(torch.equal(a.clips, b.clips) for a, b in zip(rest, whole[4:]))


@needs_dali
def test_what_dali_cannot_be_trusted_with_goes_to_the_cpu(bar_videos, odd_videos, tmp_path):
    """H.264 (no decoder on a CPU), AVI, an open GOP, frame folders, a turned video, an empty file and one
    that is gone, beside VP9."""
    for number in range(20):
        Image.fromarray(np.full((64, 128, 3), 10 * number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "empty.mp4").touch()
    others = [VideoEntry(str(tmp_path), "frames", 0, 20, None, "{}.png"), odd_videos["turned_vp9"]]
    others += [tmp_path / "empty.mp4", tmp_path / "gone.mp4"]
    data = dataset([bar_videos[n] for n in ("vp9", "h264_closed", "avi", "h264_open", "vp9_vfr")] + others)
    with build_loader(data, batch_size=3, epochs=3, max_bad_share=1) as plain:
        expected = list(plain)
    with build_loader(data, batch_size=3, epochs=3, max_bad_share=1, loader="dali") as ours:
        for one, two in zip(expected, ours, strict=True):
            assert_same(one, two)
        assert ours.quarantine.bad == plain.quarantine.bad and len(ours.quarantine.bad) == 2
        assert ours._failures is None and not ours._avoided


@needs_dali
def test_a_batch_that_dali_fails_in_is_decoded_by_the_cpu(vp9_videos, tmp_path):
    whole = vp9_videos[0].read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 3 : len(whole) * 9 // 10] = bytes(len(whole) * 9 // 10 - len(whole) // 3)
    (tmp_path / "damaged.webm").write_bytes(damaged)
    data = dataset([vp9_videos[1], tmp_path / "damaged.webm", vp9_videos[0]], seed=3)
    with build_loader(data, batch_size=1, epochs=3, max_bad_share=1) as plain:
        expected = list(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with build_loader(data, batch_size=1, epochs=3, max_bad_share=1, loader="dali") as ours:
            made = list(ours)
    for one, two in zip(expected, made, strict=True):
        assert_same(one, two)
    failed = [str(warning.message) for warning in caught if "DALI failed" in str(warning.message)]
    assert bool(failed) == bool(ours._avoided) and all("damaged.webm" in text for text in failed)


@needs_dali
def test_dali_that_always_fails_is_an_error(vp9_videos, tmp_path, monkeypatch):
    monkeypatch.setattr(
        dali.DaliLoader, "_look_into", lambda self, path: (100000, 25.0, (128, 64))
    )  # frames that it lacks
    paths = [tmp_path / f"{number}.webm" for number in range(4)]
    for path in paths:
        path.write_bytes(vp9_videos[0].read_bytes())
    with build_loader(dataset(paths), batch_size=1, loader="dali") as loader:
        with pytest.warns(UserWarning, match="DALI failed in a batch of 1 videos"):
            assert [next(loader).clips.shape[0] for _ in range(2)] == [1, 1]  # the CPU stands in
        with pytest.raises(InputError, match="DALI decodes nothing on cpu: .*take the CPU's loader"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


@needs_dali
def test_through_the_prefetcher_and_closed_early(vp9_videos):
    data = dataset(vp9_videos * 4)
    with (
        build_loader(data, batch_size=2, epochs=1) as plain,
        Prefetcher(build_loader(data, batch_size=2, epochs=1, loader="dali"), "cpu", threaded=True) as ours,
    ):
        assert_same(next(plain), next(ours))
    assert ours.source._pipeline is None
    with pytest.raises(StopIteration):
        next(ours.source)


def test_without_dali_the_loader_says_what_to_install(vp9_videos, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    assert "pip install nvidia-dali-cuda130" in dali.dali_missing()
    with pytest.raises(InputError, match="DALI is not installed.*pip install nvidia-dali-cuda130"):
        build_loader(dataset(vp9_videos), batch_size=1, loader="dali")


def test_an_unknown_loader_is_named(vp9_videos):
    with pytest.raises(InputError, match="unknown loader 'gpu'; known: cpu, dali"):
        build_loader(dataset(vp9_videos), batch_size=1, loader="gpu")


@needs_dali
@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nvdec(bar_videos):
    videos: list[Path] = [bar_videos[name] for name in ("h264_closed", "hevc_closed", "vp9", "vfr")]
    data = dataset(videos * 2, num_sample=2)
    with build_loader(data, batch_size=4, epochs=2) as plain:
        expected = list(plain)
    with build_loader(data, batch_size=4, epochs=2, loader="dali", device="cuda", num_workers=2) as ours:
        for one, two in zip(expected, ours, strict=True):
            assert two.clips.is_cuda
            assert_same(one, two)
        assert ours._failures is None and not ours._avoided
