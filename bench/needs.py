"""What data workers take of a machine (open files, memory), what packing and checking cost, what an epoch's
order takes: the measured numbers that `vmae plan`, `vmae doctor` and the start of a run count with.

Each load runs in a process of its own and is looked at by /proc (Linux only).

    python bench/needs.py            # some three minutes
    python bench/needs.py --quick    # some seconds
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.command import add_json, check_least, exit_code, set_defaults, write_result
from harness.environment import find_environment
from harness.json_records import Runs
from harness.progress import at
from harness.results.needs import ClipsRecord, LoadRecord, NeedsResult, OrderRecord
from harness.table import show

from vmae import InputError, MaskConfig, ModelConfig
from vmae.data import PretrainDataset, build_loader, read_list
from vmae.data.check import check_entry
from vmae.data.dataset import EpochSampler
from vmae.data.manifest import VideoEntry
from vmae.data.needs import LIBRARY_FILES, open_files
from vmae.data.pack import PackConfig, pack_video
from vmae.synthetic.samples import sample_videos

MODEL = "vit_b"
WORKERS, BATCHES = (1, 2, 4, 8), (2, 8, 32)
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")


def count_files(process: int) -> int:
    """Open files of a process."""
    return len(os.listdir(f"/proc/{process}/fd"))


def private_bytes(process: int) -> int:
    """Bytes of a process that no other one shares, without the batches in shared memory."""
    total, counts = 0, True
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if _MAPPING.match(line):
            counts = "/dev/shm/" not in line
        elif counts and line.startswith("Private_Dirty:"):
            total += int(line.split()[1]) * 1024
    return total


def children_of(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def look_at_load(paths: Sequence[str], workers: int, batch: int, batches: int, pipe: Any) -> None:
    """Make batches, hold each for a moment as a training step does, and send what was seen."""
    own, config = os.getpid(), ModelConfig.preset(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "list.txt"
        file.write_text("".join(f"{path} 0 -1\n" for path in paths))
        dataset = PretrainDataset(
            read_list(file),
            num_frames=config.num_frames,
            stride=4,
            image_size=config.image_hw,
            grid=config.grid,
            mask=MaskConfig(),
            num_sample=1,
            seed=0,
            repeat=batch * batches,
        )
    before = count_files(own)
    main_files = main_private = files = 0
    of_workers: dict[int, int] = {}
    with build_loader(dataset, batch_size=batch, num_workers=workers, total_steps=batches) as loader:
        for number, held in enumerate(loader):
            size = held.clips.numel()
            if number in (0, workers, batches - 1):
                time.sleep(2.0)  # all that may be ahead is made
            for worker in children_of(own):
                of_workers[worker] = max(of_workers.get(worker, 0), private_bytes(worker))
                files = max(files, count_files(worker))
            main_files, main_private = max(main_files, count_files(own)), private_bytes(own)
    pipe.send((before, main_files, files, list(of_workers.values()), main_private, size))


def measure_load(paths: Sequence[str], workers: int, batch: int, batches: int) -> LoadRecord:
    at(f"{workers} workers, batches of {batch}")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=look_at_load, args=(paths, workers, batch, batches, theirs))
    process.start()
    theirs.close()
    try:
        before, main_files, files, private, main_private, size = ours.recv()
    except EOFError:
        raise InputError("the process of a load died") from None
    finally:
        process.join()
    return LoadRecord(
        workers=workers,
        batch=batch,
        batch_bytes=size,
        main_files_before=before,
        main_files=main_files,
        worker_files=files,
        planned_files=open_files(workers) - LIBRARY_FILES + before,
        worker_private=Runs.of(private),
        main_private=main_private,
    )


def measure_clips(sources: Sequence[Path], folder: Path, rounds: int) -> tuple[ClipsRecord, list[str]]:
    """Pack and check videos on this process's core; with the paths of the packed ones."""
    packed = [folder / f"{number}.mp4" for number in range(len(sources))]
    packing, checking, seconds = [], [], 0.0
    for turn in range(rounds):
        at(f"packing, round {turn + 1} of {rounds}")
        began = time.process_time()
        for source, target in zip(sources, packed):
            pack_video(source, target, PackConfig())
        packing.append(time.process_time() - began)
        began = time.process_time()
        found = [check_entry(VideoEntry(str(target), line=1)) for target in packed]
        checking.append(time.process_time() - began)
        if wrong := [record["error"] for record in found if record["error"]]:
            raise InputError(f"a packed video is bad: {wrong[0]}")
        seconds = sum(record["seconds"] for record in found)
    record = ClipsRecord(
        videos=len(sources),
        seconds=seconds,
        originals_bytes=sum(source.stat().st_size for source in sources),
        packed_bytes=sum(target.stat().st_size for target in packed),
        pack_cpu_s=Runs.of(packing),
        check_cpu_s=Runs.of(checking),
    )
    return record, [str(target) for target in packed]


def look_at_order(samples: int, pipe: Any) -> None:
    """Make the order of an epoch, and send what it took."""

    def resident(kind: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split(f"{kind}:")[1].split()[0]) * 1024

    sampler = EpochSampler(samples, 256)
    before, began = resident("VmRSS"), time.perf_counter()
    sampler[0]
    seconds = time.perf_counter() - began
    pipe.send((seconds, resident("VmRSS") - before, resident("VmHWM") - before))


def measure_order(samples: int) -> OrderRecord:
    at(f"the order of {samples:,} samples")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=look_at_order, args=(samples, theirs))
    process.start()
    seconds, kept, peak = ours.recv()
    process.join()
    return OrderRecord(samples=samples, seconds=seconds, kept_bytes=kept, peak_bytes=peak)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="two small videos, two loads")
    add("--rounds", type=int, help="of packing (3; quick: 1)")
    add("--samples", type=int, help="of the long epoch (100,000,000; quick: 1,000,000)")
    add_json(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    if not Path("/proc/self/smaps").exists():
        raise InputError("open files and private memory are read from /proc, which this system has not")
    usual = {"rounds": 1, "samples": 10**6} if args.quick else {"rounds": 3, "samples": 10**8}
    set_defaults(args, usual)
    check_least(args, "rounds", "samples")
    sources = sorted(sample_videos(), key=lambda path: path.stat().st_size)[: 2 if args.quick else None]
    loads = [(2, 2)] if args.quick else [(w, BATCHES[0]) for w in WORKERS] + [(2, b) for b in BATCHES[1:]]
    with tempfile.TemporaryDirectory() as folder:
        clips, paths = measure_clips(sources, Path(folder), args.rounds)
        records: list[Any] = [measure_load(paths, *load, batches=4 * load[0]) for load in loads]
    records += [clips, measure_order(args.samples)]
    result = NeedsResult(environment=find_environment("cpu"), records=records)
    show(*result.tables())
    write_result(result, args.json)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
