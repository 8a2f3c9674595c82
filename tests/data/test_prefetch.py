"""Batches made ahead: in order, with errors in their place, and nothing left running; the CPU stands in for
the GPU."""

import contextlib
import threading
import time
from dataclasses import dataclass

import pytest
import torch

from vmae.config import MaskConfig
from vmae.data.dataset import PretrainDataset
from vmae.data.loaders import build_loader
from vmae.data.manifest import VideoEntry
from vmae.data.prefetch import Prefetcher, _tensors
from vmae.errors import InputError
from vmae.synthetic.samples import sample_videos

SETTINGS = dict(num_frames=4, stride=2, image_size=32, grid=(2, 4, 4), mask=MaskConfig(encoder_ratio=0.75))


@dataclass
class Number:
    value: torch.Tensor

    def to(self, device, non_blocking=False):
        return Number(self.value.to(device))


class Source:
    """Numbers up to `total`, then `error` or the end; tells when and where it was read and closed."""

    def __init__(self, total, error=None):
        self.total, self.error = total, error
        self.read, self.closed, self.threads = 0, False, set()

    def __iter__(self):
        return self

    def __next__(self):
        self.threads.add(threading.current_thread().name)
        if self.read == self.total:
            raise self.error or StopIteration
        self.read += 1
        return Number(torch.tensor(self.read))

    def close(self):
        self.closed = True


def wait_until(condition):
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("threaded", [True, False])
def test_order_and_end(threaded):
    source = Source(7)
    with Prefetcher(source, "cpu", threaded=threaded) as batches:
        assert [int(batch.value) for batch in batches] == [1, 2, 3, 4, 5, 6, 7]
        with pytest.raises(StopIteration):
            next(batches)
    assert source.closed and prefetch_threads() == []
    assert source.threads == ({"prefetch"} if threaded else {threading.current_thread().name})


def test_on_a_cpu_nothing_is_read_ahead():
    source = Source(7)
    with Prefetcher(source, "cpu") as batches:
        next(batches)
        assert source.read == 1 and prefetch_threads() == []


@pytest.mark.parametrize("depth", [1, 3])
def test_reads_ahead_and_no_further(depth):
    source = Source(20)
    with Prefetcher(source, "cpu", depth=depth, threaded=True) as batches:
        assert int(next(batches).value) == 1
        wait_until(lambda: source.read == depth + 2)  # those that wait, and the one that finds no place
        time.sleep(0.05)
        assert source.read == depth + 2


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("error", [InputError("too many bad"), RuntimeError("a data worker failed")])
def test_an_error_comes_after_the_batches_before_it(threaded, error):
    source = Source(3, error)
    with Prefetcher(source, "cpu", threaded=threaded) as batches:
        assert [int(next(batches).value) for _ in range(3)] == [1, 2, 3]
        with pytest.raises(type(error), match=str(error)):
            next(batches)
    assert source.closed and prefetch_threads() == []


def test_close_while_it_is_full_and_twice():
    batches = Prefetcher(Source(20), "cpu", threaded=True)
    next(batches)
    wait_until(lambda: batches.source.read == 3)
    batches.close()
    assert batches.source.closed and prefetch_threads() == []
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def loader(workers, **settings):
    data = PretrainDataset([VideoEntry(str(video)) for video in sample_videos()[2:]] * 4, **SETTINGS)
    return build_loader(data, batch_size=2, num_workers=workers, **settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loaders_batches(workers):
    with loader(0, epochs=2) as plain, Prefetcher(loader(workers, epochs=2), "cpu", threaded=True) as ahead:
        for one, two in zip(plain, ahead, strict=True):
            assert one.ids == two.ids
            assert all(torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(two), strict=True))
            assert len(list(_tensors(two))) == 5  # clips, and the mask's four


def test_close_does_not_wait_for_a_worker_that_hangs(monkeypatch):
    monkeypatch.setattr(PretrainDataset, "__getitem__", lambda self, key: time.sleep(600))
    batches = Prefetcher(loader(1, hang_s=600), "cpu", threaded=True)
    processes = [worker.process for worker in batches.source._iterator._workers]
    time.sleep(0.2)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 5 and prefetch_threads() == []
    assert not any(process.is_alive() for process in processes)


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    with loader(0, epochs=2) as plain, Prefetcher(loader(1, epochs=2, pin_memory=True), "cuda") as ahead:
        for one, two in zip(plain, ahead, strict=True):
            assert all(tensor.is_cuda for tensor in _tensors(two))
            assert all(torch.equal(a, b.cpu()) for a, b in zip(_tensors(one), _tensors(two), strict=True))


def test_the_thread_uses_the_gpu_that_the_batches_go_to(monkeypatch):
    """A thread starts at GPU 0, whatever the one that made it has chosen: pinning there makes a context."""
    used = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def record_event(self):
            return None

    class OneBatch(Number):
        def to(self, device, non_blocking=False):
            used.append(("copied", threading.current_thread().name))
            return self

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: used.append((str(device), threading.current_thread().name))
    )
    source = iter([OneBatch(torch.tensor(1))])
    with Prefetcher(source, "cuda:3") as batches:
        assert int(next(batches).value) == 1
    assert used == [("cuda:3", "prefetch"), ("copied", "prefetch")]
