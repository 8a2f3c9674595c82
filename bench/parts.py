"""Whether a job in parts gives the files of one job, bit by bit: check-data, features, evaluate and detect in
1, 3 and 7 parts, on 1, 2 and 4 ranks; one of three parts is killed, and started again. And what joining the
records of a long list takes.

Videos of moving actors and small models are made in a temporary folder. Ranks are processes on this machine
(gloo). Every file that a job leaves is compared, but for the times of check-data.

    python bench/parts.py              # some minutes
    python bench/parts.py --quick      # 3 parts on 2 ranks alone
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness.command import add_json, check_least, exit_code, write_result
from harness.environment import find_environment
from harness.json_records import Runs
from harness.progress import at
from harness.results.parts import MergeRecord, PartsResult, SameRecord
from harness.table import show

from vmae import InputError, ModelConfig, build_classifier
from vmae.checkpoint.folder import export_weights
from vmae.cli import main as run_command
from vmae.data.part_folder import PartFolder, Records
from vmae.data.parts import WHOLE, Part
from vmae.model.detector import build_detector
from vmae.synthetic.moving_actors import ACTIONS, ActorsConfig, write_actors

FORK = multiprocessing.get_context("fork")
KILL_S = 0.5  # after the start of a part
WAYS = ((1, 1), (3, 1), (7, 1), (1, 2), (1, 4), (3, 2))  # parts, and ranks of each
TIMES = "timings."  # the files with times
RECORD = {  # of check-data, but for its number
    "path": "/data/kinetics-710/train/abseiling/0a1b2c3d4e5_000123_000133.mp4",
    "line": 123456,
    "kind": "video",
    "error": None,
    "library": "pyav",
    "frames": 250,
    "fps": 25.0,
    "width": 340,
    "height": 256,
    "clip_s": 0.0123456789,
    "bytes": 1234567,
    "container": "MP4",
    "codec": "h264",
    "open_gop": False,
    "video_streams": 1,
    "gop": 12,
    "seconds": 10.0,
}


def make_inputs(folder: Path) -> dict[str, list[str]]:
    """Videos, a file that is none, lists and weights; the words of each command but --output."""
    torch.manual_seed(0)
    model = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)
    about: dict[str, Any] = {
        "model": model.to_dict(),
        "clip": {"num_frames": 4, "image_size": 32, "stride": 2},
    }
    export_weights(folder / "classifier.pth", build_classifier(model, 3).state_dict(), config=about)
    about |= {"action_ids": list(ACTIONS), "action_names": list(ACTIONS.values())}
    detector = build_detector(model, len(ACTIONS), init_scale=20.0)
    export_weights(folder / "detector.pth", detector.state_dict(), config=about)
    actors = write_actors(folder / "actors", ActorsConfig(train=1, validation=16, scenes=7), workers=1)
    (folder / "bad.mp4").write_text("no video")
    paths = [*sorted(actors["videos"].glob("*.mp4")), folder / "bad.mp4"]
    (folder / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    labelled = "".join(f"{path} {number % 3}\n" for number, path in enumerate(paths))
    (folder / "labelled.txt").write_text(labelled)
    classifier = ["--checkpoint", folder / "classifier.pth", "--device", "cpu"]
    key_frames = ["--videos", actors["videos"], "--annotations", actors["val"], "--device", "cpu"]
    words: dict[str, list[Any]] = {
        "check-data": [folder / "list.txt", "--workers", 1],
        "features": [folder / "list.txt", *classifier, "--step", 4],
        "evaluate": [folder / "labelled.txt", *classifier, "--workers", 0],
        "detect": ["--checkpoint", folder / "detector.pth", *key_frames, "--workers", 0],
    }
    return {name: [name, *map(str, own)] for name, own in words.items()}


def _child(function: Callable[..., Any], arguments: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    raise SystemExit(function(*arguments) or 0)


def start(function: Callable[..., Any], *arguments: Any, ranks: int = 1) -> list[Any]:
    """Processes that call a function, as torchrun would start them; forks, which import nothing again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    processes = []
    for rank in range(ranks):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(FORK.Process(target=_child, args=(function, arguments, environment)))
        processes[-1].start()
    return processes


def finish(processes: list[Any], what: str) -> None:
    """Wait for their end; raises RuntimeError where it is neither that of a good job nor of a bad video."""
    for process in processes:
        process.join()
    if bad := [process.exitcode for process in processes if process.exitcode not in (0, 1)]:
        raise RuntimeError(f"{what} ended with exit code {bad[0]}")


def do_job(words: list[str], folder: Path, parts: int, ranks: int, kill: bool) -> int:
    """A job in parts, one after the other, and the command that joins them; says how many were killed."""
    kills = 0
    for number in range(1, parts + 1):
        flags = [*words, "--output", str(folder), "--part", f"{number}/{parts}"]
        if kill and number == 1:
            processes = start(run_command, flags, ranks=ranks)
            time.sleep(KILL_S)
            for process in processes:
                kills += process.is_alive()
                process.kill()
            for process in processes:
                process.join()
        finish(start(run_command, flags, ranks=ranks), f"{words[0]} --part {number}/{parts} on {ranks} ranks")
    finish(start(run_command, [*words, "--output", str(folder), "--merge"]), f"{words[0]} --merge")
    return kills


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(TIMES))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def digest(files: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for name, data in files.items():
        total.update(f"{name} {len(data)}\n".encode())
        total.update(data)
    return total.hexdigest()


def compare(words: list[str], folder: Path, ways: Sequence[tuple[int, int]]) -> Iterator[SameRecord]:
    """Numbers of parts and ranks, against one job of one process."""
    finish(start(run_command, [*words, "--output", str(folder / "whole")]), words[0])
    whole = contents(folder / "whole")
    for parts, ranks in ways:
        at(f"{words[0]}: {parts} parts on {ranks} ranks")
        kills = do_job(words, folder / "out", parts, ranks, kill=parts == 3)
        found = contents(folder / "out")
        yield SameRecord(
            command=words[0],
            parts=parts,
            ranks=ranks,
            kills=kills,
            files=len(whole),
            differing=[name for name in sorted({*whole, *found}) if whole.get(name) != found.get(name)],
            sha256=digest(found),
        )
        shutil.rmtree(folder / "out")
    shutil.rmtree(folder / "whole")


def write_records(folder: Path, items: int, parts: int) -> None:
    for number in range(1, parts + 1):
        part = Part(number, parts)
        records = _records(folder, part)
        records.place.own.mkdir(parents=True)
        with records.writer(0) as write:
            for item in part.share(items):
                write({"video": item, **RECORD})


def _records(folder: Path, part: Part) -> Records:
    place = PartFolder(folder, part, "a check", "another check", "check.json")
    return Records(place, "videos.jsonl", "video", "videos-{}.part.jsonl")


def join_records(folder: Path, items: int, pipe: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    _records(folder, WHOLE).join(items, "videos")
    taken = time.perf_counter() - began, time.process_time() - cpu
    pipe.send((*taken, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def measure_merge(folder: Path, items: int, parts: int, repeats: int) -> MergeRecord:
    runs = []
    for turn in range(repeats):
        at(f"joining {items:,} records, {turn + 1} of {repeats}")
        write_records(folder / "records", items, parts)
        here, there = FORK.Pipe(duplex=False)
        finish(start(join_records, folder / "records", items, there), "joining")
        runs.append(here.recv())
        shutil.rmtree(folder / "records")
    seconds, cpu, peaks = (Runs.of(values) for values in zip(*runs))
    return MergeRecord(items=items, parts=parts, seconds=seconds, cpu_s=cpu, peak_mib=peaks)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 parts on 2 ranks alone")
    parser.add_argument("--items", type=int, default=1_350_000, help="records to join (0: none)")
    parser.add_argument("--repeats", type=int, default=1, help="times that they are joined")
    parser.add_argument("--commands", nargs="+", help="of them (all)")
    add_json(parser)
    args = parser.parse_args(argv)

    def work() -> int:
        check_least(args, "repeats")
        check_least(args, "items", least=0)
        environment = find_environment()
        records: list[SameRecord | MergeRecord] = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            words = make_inputs(folder)
            if wrong := sorted({*(args.commands or ())} - {*words}):
                raise InputError(f"--commands {wrong[0]}: known: {', '.join(words)}")
            for command in args.commands or words:
                records += compare(words[command], folder, WAYS[-1:] if args.quick else WAYS)
            if args.items:
                records.append(measure_merge(folder, args.items, 64, args.repeats))
        result = PartsResult(environment=environment, records=records)
        show(*result.tables())
        write_result(result, args.json)
        return 1 if any(r.differing for r in records if isinstance(r, SameRecord)) else 0

    torch.set_num_threads(1)  # before the first fork: a fork of a process with OpenMP threads hangs
    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
