"""Starts a run on a list in a process of its own, up to its first batch, and prints as JSON what that took.

It imports nothing but `vmae`, so that it measures the tree that PYTHONPATH names, an older one too.

    python list_start.py time LIST          # seconds, and memory by /proc
    python list_start.py count LIST         # questions to the file system (patched: not timed)
    python list_start.py worker LIST READS  # what a worker of the run makes private by reading entries
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from vmae import MaskConfig
from vmae.data import PretrainDataset, read_data
from vmae.data.list_identity import identify_list
from vmae.data.loaders import build_loader
from vmae.data.workers import VideoTask, WorkerPool

KIB = 1024


def memory(name: str) -> int:
    """Bytes that /proc tells of this process: "Anonymous" or "Private_Dirty"."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * KIB for line in file if line.startswith(f"{name}:"))


class Peak(threading.Thread):
    """Largest anonymous memory (RssAnon) while it runs, looked at every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._ends = 0, threading.Event()

    def run(self) -> None:
        while not self._ends.wait(0.005):
            with open("/proc/self/status") as file:
                now = next(int(line.split()[1]) * KIB for line in file if line.startswith("RssAnon:"))
            self.bytes = max(self.bytes, now)

    def end(self) -> int:
        self._ends.set()
        self.join()
        return self.bytes


def build(path: str, laps: dict[str, float]) -> PretrainDataset:
    """All that a start of pre-training does with its list."""

    def lap(name: str, since: float) -> float:
        laps[name] = time.perf_counter() - since
        return time.perf_counter()

    now = time.perf_counter()
    data = read_data(path)
    now = lap("read", now)
    dataset = PretrainDataset(
        data, num_frames=16, stride=4, image_size=224, grid=(8, 14, 14), mask=MaskConfig()
    )
    loader = build_loader(dataset, batch_size=8, epochs=1)
    now = lap("loader", now)
    if os.environ.get("RANK", "0") == "0":  # as a run does
        identify_list(dataset, "")
    now = lap("identity", now)
    assert len(loader.sampler[0]) == 8
    lap("order", now)
    return dataset


def timed(path: str) -> dict[str, Any]:
    laps: dict[str, float] = {}
    before, peak = memory("Anonymous"), Peak()
    dirty = memory("Private_Dirty")
    peak.start()
    began, cpu = time.perf_counter(), time.process_time()
    dataset = build(path, laps)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    most = peak.end() - before
    after = max(memory("Anonymous") - before, memory("Private_Dirty") - dirty)
    return {
        "lines": len(dataset),
        "seconds": seconds,
        "cpu": cpu,
        "laps": laps,
        "memory": after,
        "peak": max(most, after),
    }


def counted(path: str) -> dict[str, Any]:
    """Calls of os.stat (which os.path's questions make too) for what the list names."""
    calls, stat, folder = [0], os.stat, os.path.dirname(path) + "/videos/"

    def count(asked, *arguments, **options):
        calls[0] += str(asked).startswith(folder)
        return stat(asked, *arguments, **options)

    os.stat = count  # type: ignore[assignment]
    build(path, {})
    return {"calls": calls[0]}


class Reads(VideoTask):
    """A task is a range of samples, whose entries are read; its result is the worker's private memory."""

    def __init__(self, dataset: PretrainDataset) -> None:
        super().__init__()
        self.dataset = dataset

    def __getitem__(self, task: range) -> int:
        length = 0
        for index in task:
            video, _ = self.dataset.pick_video(0, index * 7919)  # far apart, as an epoch's order has them
            length += len(self.dataset.entries[video].path)
        return memory("Private_Dirty")


def in_worker(path: str, reads: int) -> dict[str, Any]:
    dataset = build(path, {})
    steps = 10
    tasks = [range(1)] + [range(reads * step // steps, reads * (step + 1) // steps) for step in range(steps)]
    pool = WorkerPool(Reads(dataset), iter(tasks), count=1, prefetch=1, hang_s=600.0)
    first, *others = pool
    pool.close()
    return {"reads": reads, "private": max(others) - first}


if __name__ == "__main__":
    kind, given, *more = sys.argv[1:]
    if kind == "worker":
        print(json.dumps(in_worker(given, int(more[0]))))
    else:
        print(json.dumps(timed(given) if kind == "time" else counted(given)))
