"""How long a run takes to start on a list of a million videos, and what memory that needs: cold (nothing kept
of the list), warm, and in a worker that reads entries.

Lists of distinct paths are made in a temporary folder; all of them lead, by links, to one file. A start is
what pre-training does up to the samples of its first batch: `read_data`, `PretrainDataset`, `build_loader`,
`identify_list` (on rank 0 only), the first epoch's order. Each one is a fresh process; its imports are not
counted. Memory is what /proc tells (anonymous, private dirty): pages of the mapped list are shared by all
processes, and are not counted.

    python bench/lists.py                      # 1.35 and 10 million lines; some three minutes
    python bench/lists.py --before TREE        # an older tree too, on lists of up to two million lines
    python bench/lists.py --index              # an index of as many samples, in place of the list
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import ROOT
from harness.command import add_json, check_least, exit_code, write_result
from harness.environment import find_environment
from harness.index_files import make_index
from harness.json_records import Runs
from harness.progress import at
from harness.results.lists import KindRecord, ListsResult, LookupRecord, StartRecord, WorkerRecord
from harness.table import MIB, show

from vmae import InputError
from vmae.data import read_list
from vmae.data.labels import read_labelled_list

LINES = (1_350_000, 10_000_000)
LINKS = 220  # folders that are links to their own folder: 220^3 paths
MOST_BEFORE = 2_000_000  # lines; an older tree takes some GiB for more
MOST_OF_A_KIND = 300_000  # lines
KINDS = {  # what a line is like, and how it is written
    "path 0 -1": "videos/{path} 0 -1",
    "path": "videos/{path}",
    "path of SomethingV2 0 -1": "SomethingV2/{path} 0 -1",
    "path with blanks 0 -1": "my videos/{path} 0 -1",
    '"path",0,-1': '"videos/{path}",0,-1',
    "path 0 -1 label": "videos/{path} 0 -1 {label}",
    "path label": "videos/{path} {label}",
    "path label;label": "videos/{path} {label};401",
    "`#! stride=2` and path": "#! stride=2\nvideos/{path}",
}
LABELLED = ("path label", "path label;label")
CHILD = Path(__file__).parent / "harness" / "list_start.py"


def make_list(folder: Path, lines: int) -> Path:
    """A list of so many distinct paths, as long as those of published lists."""
    videos, path = folder / "videos", folder / f"list_{lines}.txt"
    videos.mkdir(exist_ok=True)
    (videos / "clip_0001.mp4").write_bytes(bytes(1 << 17))  # too large to be looked into as a playlist
    for number in range(LINKS):
        if not (videos / f"part_{number:03}").is_symlink():
            (videos / f"part_{number:03}").symlink_to(".")
    with open(path, "w", encoding="utf-8") as file:
        for number in range(lines):
            rest, last = divmod(number, LINKS)
            first, middle = divmod(rest, LINKS)
            parts = (f"part_{part:03}" for part in (first, middle, last))
            file.write(f"{videos}/{'/'.join(parts)}/clip_0001.mp4 0 -1\n")
    return path


def forget(path: Path) -> None:
    for cache in path.parent.glob(f".{path.name}.*"):
        cache.unlink()


def run(tree: Path, kind: str, path: Path, *more: int, rank: int = 0) -> dict[str, Any]:
    """What `list_start.py` says, of the code in `tree`."""
    paths = os.pathsep.join((str(tree), str(tree / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(CHILD), kind, str(path), *map(str, more)]
    done = subprocess.run(words, env=environment, cwd=path.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"list_start.py {kind}, code of {tree}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def start_record(lines: int, code: str, start: str, runs: Sequence[dict[str, Any]]) -> StartRecord:
    laps = {name: statistics.median(run["laps"][name] for run in runs) for name in runs[0]["laps"]}
    return StartRecord(
        lines=lines,
        code=code,
        start=start,
        seconds=Runs.of([run["seconds"] for run in runs]),
        cpu_s=Runs.of([run["cpu"] for run in runs]),
        laps_s=laps,
        memory_mib=Runs.of([run["memory"] / MIB for run in runs]),
        peak_mib=Runs.of([run["peak"] / MIB for run in runs]),
    )


def measure(
    path: Path, lines: int, trees: dict[str, Path], repeats: int, reads: int
) -> list[StartRecord | WorkerRecord | LookupRecord]:
    """Cold and warm starts in turn, then a worker, then the questions to the file system."""
    records: list[StartRecord | WorkerRecord | LookupRecord] = []
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn in range(repeats):
        for code, tree in trees.items():
            if code != "now" and turn:
                continue  # once: it takes a minute
            forget(path)
            for start in ("cold", "warm") if code == "now" else ("cold",):
                at(f"{lines:,} lines, {code}, {start}, {turn + 1} of {repeats}")
                runs.setdefault((code, start), []).append(run(tree, "time", path))
    records += [start_record(lines, *key, found) for key, found in runs.items()]
    for code, tree in trees.items():
        at(f"{lines:,} lines, {code}, a worker")
        found = run(tree, "worker", path, reads)
        records.append(WorkerRecord(lines=lines, code=code, reads=reads, private_mib=found["private"] / MIB))
        for start, rank in (("cold", 0), ("warm", 0), ("warm", 1)):
            if start == "cold":
                forget(path)
            at(f"{lines:,} lines, {code}, questions of rank {rank}")
            calls = run(tree, "count", path, rank=rank)["calls"]
            records.append(LookupRecord(lines=lines, code=code, start=start, rank=rank, calls=calls))
            if code != "now":
                break  # it is the same for every start and rank
    return records


def measure_index(path: Path, samples: int, repeats: int, reads: int) -> list[StartRecord | WorkerRecord]:
    """Starts on an index, of which nothing is kept beside itself, then a worker."""
    runs = []
    for turn in range(repeats):
        at(f"an index of {samples:,} samples, {turn + 1} of {repeats}")
        runs.append(run(ROOT, "time", path))
    at(f"an index of {samples:,} samples, a worker")
    found = run(ROOT, "worker", path, reads)["private"] / MIB
    worker = WorkerRecord(lines=samples, code="now", reads=reads, private_mib=found)
    return [start_record(samples, "now", "index", runs), worker]


def kind_records(folder: Path, lines: int, repeats: int) -> list[KindRecord]:
    """Lists whose lines are written in different ways, read for the first time in this process, as by a rank
    that looks up no file."""
    make_list(folder, 1).unlink()
    for name in ("SomethingV2", "my videos"):
        (folder / name).symlink_to("videos")
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    path, before = folder / "kinds.txt", dict(os.environ)
    os.environ["RANK"] = "1"
    try:
        for turn, kind in itertools.product(range(repeats), KINDS):
            at(f"lines as {kind}, {turn + 1} of {repeats}")
            with open(path, "w", encoding="utf-8") as file:
                for number in range(lines):
                    video = f"part_{number // LINKS % LINKS:03}/part_{number % LINKS:03}/clip_0001.mp4"
                    file.write(KINDS[kind].format(path=video, label=number % 400) + "\n")
            forget(path)
            read = read_labelled_list if kind in LABELLED else read_list
            began = time.process_time()
            read(path, folder)
            times[kind].append((time.process_time() - began) / lines * 1e6)
    finally:
        os.environ.clear()
        os.environ.update(before)
        forget(path)
        path.unlink(missing_ok=True)
    return [KindRecord(lines=lines, line=kind, line_us=Runs.of(runs)) for kind, runs in times.items()]


def hash_seconds(path: Path) -> float:
    began = time.perf_counter()
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 22):
            content.update(data)
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, nargs="+", default=list(LINES), help="lengths of the lists")
    parser.add_argument("--repeats", type=int, default=3, help="starts of each kind")
    parser.add_argument("--reads", type=int, default=400_000, help="entries that the worker reads")
    parser.add_argument("--index", action="store_true", help="an index of shards in place of the list")
    parser.add_argument("--before", metavar="TREE", help="an older tree to compare with")
    parser.add_argument("--folder", metavar="DIR", help="where the lists are made, and removed (temporary)")
    add_json(parser)
    args = parser.parse_args(argv)

    def work() -> int:
        check_least(args, "lines", "repeats", "reads")
        if max(args.lines) > LINKS**3:
            raise InputError(f"--lines: at most {LINKS**3:,}")
        if args.before and not (Path(args.before) / "vmae").is_dir():
            raise InputError(f"--before {args.before}: no tree with a folder `vmae`")
        records: list[StartRecord | WorkerRecord | LookupRecord | KindRecord] = []
        hashes = {}
        environment = find_environment()
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for samples in args.lines if args.index else ():
                at(f"writing an index of {samples:,} samples")
                records += measure_index(make_index(Path(folder), samples), samples, args.repeats, args.reads)
            for lines in () if args.index else args.lines:
                at(f"writing a list of {lines:,} lines")
                path = make_list(Path(folder), lines)
                trees = {"now": ROOT}
                if args.before and lines <= MOST_BEFORE:
                    trees["before"] = Path(args.before).absolute()
                hashes[str(lines)] = hash_seconds(path)
                records += measure(path, lines, trees, args.repeats, args.reads)
                forget(path)
                path.unlink()
            if not args.index:
                records += kind_records(Path(folder), min(MOST_OF_A_KIND, *args.lines), args.repeats)
        result = ListsResult(environment=environment, records=records, hash_s=hashes)
        show(*result.tables())
        write_result(result, args.json)
        return 0

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
