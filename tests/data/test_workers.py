"""The run goes on: hung and crashed workers are replaced, bad videos written down, too many of them stop it."""

import faulthandler
import json
import os
import signal
import time

import numpy as np
import pytest
import torch

from vmae.config import MaskConfig
from vmae.data import video_dataset
from vmae.data.dataset import PretrainDataset, build_loader
from vmae.data.decode import DecodeError, VideoReader
from vmae.data.manifest import VideoEntry
from vmae.data.quarantine import Failure, Quarantine
from vmae.errors import InputError

SETTINGS = dict(num_frames=4, stride=2, image_size=32, grid=(2, 4, 4), mask=MaskConfig(encoder_ratio=0.75))


class Noise(VideoReader):
    """A video without a file: its pictures follow from its name. What the name says goes wrong."""

    def __init__(self, entry):
        self.path = entry.path
        if "bad" in entry.path:
            raise DecodeError(f"{entry.path}: is bad")
        if "hang" in entry.path:
            time.sleep(1000)
        if "crash" in entry.path:
            faulthandler.disable()  # its report is for crashes that nobody meant
            os.kill(os.getpid(), signal.SIGSEGV)
        if "memory" in entry.path:
            os.kill(os.getpid(), signal.SIGKILL)
        if "bug" in entry.path:
            raise KeyError("a bug")

    def __len__(self):
        return 30

    def _decode(self, indices):
        seed = sum(self.path.encode())
        return np.stack([np.random.default_rng((seed, i)).integers(0, 256, (36, 40, 3), np.uint8) for i in indices])

    def close(self):
        pass


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(video_dataset, "open_video", lambda entry, backend: Noise(entry))
    return lambda names: PretrainDataset([VideoEntry(name) for name in names], **SETTINGS)


GOOD = [f"v{i}" for i in range(11)]


@pytest.mark.parametrize(("name", "error"), [("hang", "took more than 0.6 s"), ("crash", "crashed its worker (SIGSEGV)")])
def test_a_worker_that_hangs_or_crashes_is_replaced(make, tmp_path, name, error):
    """Its video is replaced, all else is as if the video had been undecodable from the start."""
    names = [*GOOD[:5], name, *GOOD[5:]]
    expected = make(names)
    expected.block(5, "")
    plain = list(build_loader(expected, batch_size=3, epochs=2))
    path = tmp_path / "quarantine.jsonl"
    began = time.monotonic()
    with build_loader(make(names), batch_size=3, epochs=2, num_workers=2, hang_s=0.6, quarantine=path) as loader:
        batches = list(loader)
    assert time.monotonic() - began < 30
    assert [batch.ids for batch in batches] == [batch.ids for batch in plain]
    for one, other in zip(batches, plain, strict=True):
        assert torch.equal(one.clips, other.clips) and torch.equal(one.mask.visible, other.mask.visible)
    (line,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert line["path"] == name and line["library"] == "worker" and error in line["error"]


def test_workers_that_keep_dying(make):
    with pytest.raises(InputError, match="data workers keep dying, for want of memory"):
        list(build_loader(make(["memory"] * 12), batch_size=2, epochs=1, num_workers=1))


def test_a_bug_is_no_bad_video(make):
    with pytest.raises(RuntimeError, match="KeyError: 'a bug'"):
        list(build_loader(make(["bug"] * 4), batch_size=2, epochs=1, num_workers=1))


def test_a_worker_that_somebody_stopped(make):
    loader = build_loader(make(GOOD), batch_size=2, num_workers=1)
    next(loader)
    os.kill(loader._iterator._workers[0].process.pid, signal.SIGTERM)
    with pytest.raises(RuntimeError, match="a data worker was stopped .exit code -15"):
        for _ in range(100):
            next(loader)


def test_workers_end_with_the_loader(make):
    loader = build_loader(make(GOOD), batch_size=2, num_workers=2)
    next(loader)
    processes = [worker.process for worker in loader._iterator._workers]
    loader.close()
    assert not any(process.is_alive() for process in processes) and list(loader) == []


def test_bad_settings(make):
    for options in ({"hang_s": 0}, {"max_bad_share": 1.5}, {"max_bad_share": -0.1}):
        with pytest.raises(InputError):
            build_loader(make(GOOD), batch_size=2, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_videos_stop_the_run(make, tmp_path, workers):
    data = make([f"{'bad' if i % 8 == 0 else 'v'}{i}" for i in range(400)])  # 12.5 %
    path = tmp_path / "new" / "quarantine.jsonl"
    loader = build_loader(data, batch_size=4, num_workers=workers, quarantine=path)
    with pytest.raises(InputError) as error:
        for _ in range(101):
            next(loader)
    assert "reads failed (1" in str(error.value) and "No more than 5 % may fail".replace(" %", "%") in str(error.value)
    assert "is bad; bad" in str(error.value) and str(path) in str(error.value) and "check-data" in str(error.value)
    assert loader.quarantine.reads < 300
    assert len(path.read_text().splitlines()) == len(loader.quarantine.bad) > 10
    assert list(loader) == []


def test_a_share_below_the_cap_does_not_stop(make):
    data = make([f"{'bad' if i % 20 == 0 else 'v'}{i}" for i in range(100)])  # 5 %
    loader = build_loader(data, batch_size=10, epochs=10)
    assert len(list(loader)) == 100
    assert len(loader.quarantine.bad) == 5 and loader.quarantine.failures > 45


def test_a_resumed_run_writes_each_bad_video_once(make, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    names = ["bad1", "bad2", *GOOD * 6]
    for start in (0, 3):
        list(build_loader(make(names), batch_size=68, total_steps=6, start_step=start, quarantine=path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == ["bad1", "bad2"]
    assert lines[0]["error"] == f"{lines[0]['path']}: is bad" and lines[0]["library"] is None
    path.write_text(path.read_text()[:-5])  # as a kill leaves it
    list(build_loader(make(names), batch_size=68, total_steps=1, quarantine=path))
    assert len(path.read_text().splitlines()) == 3  # the cut one is whole again, on a line of its own


def test_ranks_write_files_of_their_own(make, tmp_path):
    for rank in range(2):
        options = dict(rank=rank, world_size=2, quarantine=tmp_path / "quarantine.jsonl")
        list(build_loader(make(["bad", *GOOD]), batch_size=6, total_steps=12, **options))
    assert {path.name for path in tmp_path.iterdir()} == {"quarantine.jsonl", "quarantine-1.jsonl"}


def test_summary(tmp_path):
    quarantine = Quarantine()
    quarantine.add(30, [])
    assert quarantine.summary() == "all 30 videos read could be decoded"
    quarantine.add(8, [Failure("a.mp4", "a.mp4: cut", "decord"), Failure("b.mp4", "hung", "worker")])
    assert quarantine.summary() == (
        "2 of 40 reads failed (5.0%), of 2 videos (1 with decord, 1 with worker); the first: a.mp4: cut; b.mp4: hung"
    )
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        Quarantine(tmp_path / "file" / "quarantine.jsonl").add(0, [Failure("a", "b")])
