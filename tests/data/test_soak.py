"""Thousands of reads with every kind of bad file, and the same samples however a run is cut up."""

import hashlib
import json
import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmae.config import MaskConfig
from vmae.data.dataset import PretrainDataset
from vmae.data.loaders import build_loader
from vmae.data.manifest import VideoEntry

SETTINGS = dict(num_frames=8, stride=2, image_size=32, grid=(4, 4, 4), mask=MaskConfig(encoder_ratio=0.75))
READS = 3000


def resident(pid):
    """Resident bytes of a process; pages of shared memory count once, by whoever touched them."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def spoil(good: Path, folder: Path) -> dict[str, VideoEntry]:
    """One bad entry of each kind, by its name."""
    whole = good.read_bytes()
    place = whole.index(b"mdat") + 4
    (folder / "truncated.mp4").write_bytes(whole[: place + 600])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 100)
    rot = bytearray(whole)
    end = min(len(whole), place + int.from_bytes(whole[place - 8 : place - 4], "big") - 8)
    rot[place:end] = random.Random(0).randbytes(end - place)
    (folder / "rot.mp4").write_bytes(rot)
    (folder / "folder.mp4").mkdir()
    images = folder / "images"
    images.mkdir()
    for number in range(8):
        Image.new("RGB", (48, 40), (number, 0, 0)).save(images / f"{number}.png")
    names = ("truncated", "empty", "text", "rot", "folder", "missing")
    entries = {name: VideoEntry(str(folder / f"{name}.mp4")) for name in names}
    entries["false count"] = VideoEntry(str(images), "frames", 0, 300, None, "{}.png")
    entries["five frames"] = VideoEntry(str(images), "frames", 0, 5, None, "{}.png")
    return entries


def write_audio(path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as audio:
        stream = audio.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        for packet in [*stream.encode(silence), *stream.encode(None)]:
            audio.mux(packet)


@pytest.fixture
def soaked(bar_videos, tmp_path):
    """(entries of 180 videos, the nine bad ones of them by kind)."""
    bad = spoil(bar_videos["h264_closed"], tmp_path)
    write_audio(tmp_path / "audio.mp4")
    bad["audio only"] = VideoEntry(str(tmp_path / "audio.mp4"))
    good = []
    for number in range(171):
        source = bar_videos[("h264_closed", "vp9", "h264_open", "vfr", "avi")[number % 5]]
        path = tmp_path / f"good{number}{source.suffix}"
        os.link(source, path)
        good.append(VideoEntry(str(path)))
    entries = [*good, *bad.values()]
    random.Random(1).shuffle(entries)
    return entries, bad


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_soak(soaked, tmp_path):
    entries, bad = soaked
    path = tmp_path / "quarantine.jsonl"
    data = PretrainDataset(entries, **SETTINGS, min_frames=6)
    order, memory = [], []
    with build_loader(
        data, batch_size=10, num_workers=2, total_steps=READS // 10, quarantine=path, hang_s=60
    ) as loader:
        for step, batch in enumerate(loader):
            order += [key[:2] for key in batch.ids]
            if step % 20 == 0:
                pids = [os.getpid(), *(worker.process.pid for worker in loader._iterator._workers)]
                memory.append(sum(map(resident, pids)))
        quarantine = loader.quarantine
    assert len(order) == READS
    expected = [key for step in range(READS // 10) for key in loader.sampler[step]]
    assert order == expected  # the epochs' order is the sampler's, whatever failed
    written = {line["path"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert set(written) == {entry.path for entry in bad.values()}
    assert all(line["error"] for line in written.values())
    assert 0.03 < quarantine.failures / quarantine.reads < 0.08
    growth = max(memory[5:]) - memory[5]
    print(
        f"{READS} reads, memory {memory[5] / 2**20:.0f} MiB after 1000 reads, growth at most "
        f"{growth / 2**20:.1f} MiB"
    )
    assert growth < 32 << 20


def fingerprint(batch):
    """What a batch holds, in a few letters."""
    digest = hashlib.sha256(repr(batch.ids).encode())
    for tensor in (batch.clips, batch.mask.visible, batch.mask.decode):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _rank_fingerprints(data, rank, results):
    loader = build_loader(data, batch_size=3, epochs=2, rank=rank, world_size=2, num_workers=1)
    results.put((rank, [[fingerprint_of_video(batch, video) for video in range(3)] for batch in loader]))


def fingerprint_of_video(batch, video):
    digest = hashlib.sha256(repr(batch.ids[video]).encode())
    digest.update(batch.clips[video].numpy().tobytes() + batch.mask.visible[video].numpy().tobytes())
    return digest.hexdigest()


def test_two_epochs_are_the_same_however_they_are_run(bar_videos):
    """0, 1 and 2 workers; stopped in the middle of an epoch and resumed; one rank, and two in processes of
    their own."""
    names = ("h264_closed", "vp9", "vfr")
    entries = [VideoEntry(str(bar_videos[name])) for name in names] * 8
    data = PretrainDataset(entries, **SETTINGS)
    plain = list(build_loader(data, batch_size=6, epochs=2))
    expected = [fingerprint(batch) for batch in plain]
    assert len(set(expected)) == 8
    for workers in (1, 2):
        with build_loader(data, batch_size=6, epochs=2, num_workers=workers) as loader:
            assert [fingerprint(batch) for batch in loader] == expected
    with build_loader(data, batch_size=6, epochs=2, num_workers=2) as loader:
        head = [fingerprint(next(loader)) for _ in range(2)]
    with build_loader(data, batch_size=6, epochs=2, num_workers=1, start_step=2) as loader:
        assert head + [fingerprint(batch) for batch in loader] == expected
    results = multiprocessing.get_context("fork").Queue()
    ranks = [
        multiprocessing.get_context("fork").Process(target=_rank_fingerprints, args=(data, r, results))
        for r in range(2)
    ]
    for rank in ranks:
        rank.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join()
    for step, batch in enumerate(plain):
        assert found[0][step] + found[1][step] == [fingerprint_of_video(batch, video) for video in range(6)]
