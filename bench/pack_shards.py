"""What shards cost beside packed files: CPU seconds of packing into either, of writing a tar file, of making
and verifying an index. Ways are measured in turn, each with one worker.

    python bench/pack_shards.py            # some two minutes
    python bench/pack_shards.py --quick    # some ten seconds
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness.command import add_json, check_least, exit_code, set_defaults, write_result
from harness.environment import find_environment
from harness.json_records import Runs
from harness.progress import at
from harness.results.pack_shards import IndexRecord, PackRecord, PackShardsResult, WriteRecord
from harness.table import show

from vmae import InputError
from vmae.cli import main as command
from vmae.data.manifest import VideoEntry
from vmae.data.pack import PackConfig, pack_video
from vmae.data.pack_command import Encode
from vmae.data.pack_lists import pack_list, pack_place
from vmae.data.parts import WHOLE
from vmae.data.shards.index import read_index
from vmae.data.shards.look import look_at
from vmae.data.shards.packets import make_table
from vmae.data.shards.packing import Made, ShardJob, Stored, join_shards, pack_shards, write_shard
from vmae.data.shards.plan import Origin, ShardPlan
from vmae.synthetic.samples import sample_videos


def cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(work: Callable[..., object], *given: object) -> float:
    began = cpu_s()
    with contextlib.redirect_stdout(io.StringIO()):
        work(*given)
    return cpu_s() - began


def job_of(entries: list[VideoEntry], folder: Path, config: PackConfig | None) -> ShardJob:
    encode = None if config is None else Encode(config)
    origin = [Origin("clips", 0, len(entries))]
    return ShardJob(entries, None, origin, pack_place(folder, WHOLE), encode, {}, size=1 << 30)


def pack_whole(job: ShardJob) -> None:
    pack_shards(job)
    join_shards(job)


def measure_packing(sources: list[Path], folder: Path, rounds: int) -> list[PackRecord]:
    """Packing into files and into shards, in turn."""
    entries, config = [VideoEntry(str(path)) for path in sources], PackConfig()
    found: dict[str, list[float]] = {"files": [], "shards": []}
    for turn in range(rounds):
        at(f"packing, round {turn + 1} of {rounds}")
        files, shards = folder / f"files{turn}", folder / f"shards{turn}"
        job = job_of(entries, shards, config)
        found["files"].append(timed(pack_list, entries, files, config))
        found["shards"].append(timed(pack_whole, job))
    return [PackRecord(into=name, videos=len(entries), cpu_s=Runs.of(times)) for name, times in found.items()]


def measure_writing(video: Path, copies: int, folder: Path, rounds: int) -> WriteRecord:
    """A shard of one packed video, many times over: what `pack` does beside its workers."""
    at("writing a shard")
    content = video.read_bytes()
    made = Made(
        str(video), ".mp4", Stored(0), look_at(VideoEntry(str(video))), make_table(content), 0, len(content)
    )
    job = job_of([VideoEntry(str(video))] * copies, folder, None)
    plan = ShardPlan(tuple(job.sources), (copies,))
    folder.mkdir()
    times = [timed(lambda: write_shard(job, plan, 0, [made] * copies)) for _ in range(rounds)]
    size = (folder / "shard-00000.tar").stat().st_size
    return WriteRecord(videos=copies, bytes=size, cpu_s=Runs.of(times))


def measure_index(folder: Path, rounds: int) -> list[IndexRecord]:
    """An index of that shard, by its headers, and all of its bytes compared with it."""
    tar, output = folder / "shard-00000.tar", folder / "index.vmae"
    (folder / "shard-00000.vmae").unlink()
    ways = {
        "made": ["index", str(tar), "-o", str(output), "--workers", "1"],
        "made, --quick": ["index", str(tar), "-o", str(output), "--workers", "1", "--quick"],
        "verified": ["index", "--verify", str(output), "--workers", "1"],
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        at(f"index, round {turn + 1} of {rounds}")
        for name, words in ways.items():
            if name != "verified":
                output.unlink(missing_ok=True)
            found[name].append(timed(run_command, words))
    samples, size = len(read_index(output)), tar.stat().st_size
    return [
        IndexRecord(what=name, samples=samples, bytes=size, cpu_s=Runs.of(times))
        for name, times in found.items()
    ]


def run_command(words: list[str]) -> None:
    if code := command(words):
        raise InputError(f"a command ended with exit code {code}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="the two small clips, a small shard")
    add("--rounds", type=int, help="of each measurement (5; quick: 1)")
    add("--copies", type=int, help="of a packed clip in the shard that is written (1000; quick: 20)")
    add_json(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    set_defaults(args, {"rounds": 1, "copies": 20} if args.quick else {"rounds": 5, "copies": 1000})
    check_least(args, "rounds", "copies")
    sources = sorted(sample_videos(), key=lambda path: path.stat().st_size)[: 2 if args.quick else None]
    records: list[PackRecord | WriteRecord | IndexRecord]
    folder = Path(tempfile.mkdtemp())
    try:
        packing = measure_packing(sources, folder, args.rounds)
        packed = folder / "packed.mp4"
        pack_video(sources[-1], packed, PackConfig())
        writing = measure_writing(packed, args.copies, folder / "tar", args.rounds)
        records = [*packing, writing, *measure_index(folder / "tar", args.rounds)]
    finally:
        shutil.rmtree(folder)
    result = PackShardsResult(environment=find_environment("cpu"), records=records)
    show(*result.tables())
    write_result(result, args.json)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
