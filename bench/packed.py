"""Clips of packed videos on one core: each lever of this library alone, and other libraries at the same work.

The sample clips, packed by `vmae pack`'s encoder, as files and in a shard with their packet tables, whole and
with every fourth frame. Every way makes the same clips: 16 frames, stride 4, a random crop resized to 224 x
224, RGB, uint8. All take turns, round by round; counted are CPU seconds of all threads. Ours are compared
with clips of whole frames, and must be equal, bit by bit.

Each other library runs in a process of its own, with the interpreter that `--rival` names: SPDL, decord2 (it
imports as decord, so it needs an environment without decord) and torchcodec. One that is not installed is
left out, and said.

    python bench/packed.py                                        # a minute or two
    python bench/packed.py --rival spdl=/venvs/spdl/bin/python --rival decord2=/venvs/decord2/bin/python
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.command import add_json, check_least, exit_code, one_core, set_defaults, write_result
from harness.environment import find_environment
from harness.json_records import Runs, Spread
from harness.progress import at
from harness.results.packed import PackedBytes, PackedParts, PackedResult, PackedWay
from harness.rival import RIVALS
from harness.table import show

from vmae import InputError
from vmae.data import CropBox, crop_and_resize, open_video, sample_crop, sample_frame_indices
from vmae.data.manifest import VideoEntry
from vmae.data.pack import PackConfig, draw_phase, pack_video
from vmae.data.pyav_frames import FrameClip, FrameConverter
from vmae.data.shards.entries import Place, Shard
from vmae.data.shards.index import Sample, ShardIndex, columns_of
from vmae.data.shards.packets import make_table
from vmae.settings import limits
from vmae.synthetic.samples import sample_videos

NUM_FRAMES, STRIDE, SIZE = 16, 4, 224
BASE = "files, whole frames"
EXACT = (BASE, "files", "shards, no table", "shards, whole frames", "shards")
KEPT, SHORT = "shards, every 4th frame", "shards, groups of 12"
OURS = (*EXACT, SHORT, KEPT)
ENTRIES = ("stored", "plain", "kept", "short")
RIVAL = Path(__file__).parent / "harness" / "rival.py"


@dataclass(frozen=True)
class Packed:
    """A packed video.

    Attributes:
        path: of its file.
        stored, plain: its entry in a shard, with its packet table and without.
        kept: its entry with every fourth frame.
        short: its entry with a key frame every 12 frames.
    """

    path: str
    stored: VideoEntry
    plain: VideoEntry
    kept: VideoEntry
    short: VideoEntry


# --- the videos ---------------------------------------------------------------------------------------------


def make_videos(
    folder: Path, sources: Sequence[Path], gop: int = PackConfig.gop
) -> tuple[list[Packed], list[PackedBytes]]:
    """The videos, packed and in shards."""
    configs = {
        "full": PackConfig(gop=gop),
        "kept": PackConfig(gop=gop, keep_every=4),
        "short": PackConfig(gop=12),
    }
    contents: dict[str, list[bytes]] = {name: [] for name in configs}
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    for number, source in enumerate(sources):
        key = f"{number:06}_{source.stem}"
        for name, config in configs.items():
            at(f"packing {source.name}, {name}")
            path = folder / f"{source.stem}_{name}.mp4"
            frames, keep_every = pack_video(source, path, config, key), config.keep_every
            phase = draw_phase(key, keep_every, frames)
            contents[name].append(path.read_bytes())
            with open_video(path) as reader:
                fps = (reader.fps or 0) * keep_every
            samples[name].append(dict(key=key, frames=frames, keep_every=keep_every, phase=phase, fps=fps))
    entries = {
        "stored": write_shard(folder / "full.tar", contents["full"], samples["full"]),
        "plain": write_shard(folder / "plain.tar", contents["full"], samples["full"], tables=False),
        "kept": write_shard(folder / "kept.tar", contents["kept"], samples["kept"]),
        "short": write_shard(folder / "short.tar", contents["short"], samples["short"]),
    }
    videos = [
        Packed(str(folder / f"{source.stem}_full.mp4"), *(entries[name][number] for name in ENTRIES))
        for number, source in enumerate(sources)
    ]
    return videos, [
        measure_bytes("all frames", folder, sources, configs["full"]),
        measure_bytes("all frames, groups of 12", folder, sources, configs["short"]),
        measure_bytes("every 4th frame", folder, sources, configs["kept"]),
        measure_bytes("every 4th frame, crf 18", folder, sources, PackConfig(gop=gop, keep_every=4, crf=18)),
    ]


def measure_bytes(label: str, folder: Path, sources: Sequence[Path], config: PackConfig) -> PackedBytes:
    """Bytes of packed videos and of their tables; PSNR of their frames against videos without loss."""
    contents, tables, pictures, quality = 0, 0, 0, []
    lossless, packed = folder / "lossless.mp4", folder / "measured.mp4"
    for number, source in enumerate(sources):
        at(f"sizes of {source.name}, {label}")
        key = f"{number:06}_{source.stem}"
        frames = pack_video(source, packed, config, key)
        pack_video(source, lossless, PackConfig(crf=0, preset="ultrafast"))
        kept = range(draw_phase(key, config.keep_every, frames), frames, config.keep_every)
        with open_video(lossless) as true, open_video(packed) as found:
            pairs = zip(itertools.islice(true.iterate(), kept.start, None, kept.step), found.iterate())
            errors = [float(np.square(one.astype(np.float32) - two).mean()) for one, two in pairs]
        if len(errors) != len(kept):
            raise RuntimeError(f"{source.name}: {len(errors)} of {len(kept)} frames were compared")
        quality.append(10 * float(np.log10(255**2 / np.mean(errors))))
        pictures += len(kept)
        contents += packed.stat().st_size
        tables += len(make_table(packed.read_bytes()))
    return PackedBytes(
        videos=label, bytes=contents, table_bytes=tables, pictures=pictures, psnr=float(np.mean(quality))
    )


def write_shard(
    path: Path, videos: Sequence[bytes], samples: Sequence[dict[str, Any]], *, tables: bool = True
) -> ShardIndex:
    """The index of a tar file of videos, their tables before them."""
    rows = []
    with tarfile.open(path, "w") as tar:

        def add(name: str, content: bytes) -> tuple[int, int]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            offset = tar.offset + 512  # tar's header
            tar.addfile(info, io.BytesIO(content))
            return offset, len(content)

        for video, about in zip(videos, samples, strict=True):
            table = add(f"{about['key']}.packets", make_table(video)) if tables else (0, 0)
            place = Place(*add(f"{about['key']}.mp4", video), zlib.crc32(video))
            rows.append(Sample(shard=0, video=place, table=table, **about))
    columns = columns_of(rows, [""], [".mp4"])
    return ShardIndex(columns, [Shard(path.name, path.stat().st_size)], base=str(path.parent))


# --- the ways -----------------------------------------------------------------------------------------------


def make_clip(way: str, video: Packed, seed: int) -> np.ndarray:
    """uint8 [NUM_FRAMES, SIZE, SIZE, 3] of a random place and crop, the same for every way."""
    rng = np.random.default_rng(seed)
    source: str | VideoEntry = video.path
    if way.startswith("shards"):
        source = {"shards, no table": video.plain, KEPT: video.kept, SHORT: video.short}.get(
            way, video.stored
        )
    with open_video(source) as reader:
        indices = sample_frame_indices(len(reader), NUM_FRAMES, STRIDE, rng)
        if way.endswith("whole frames"):
            frames = reader.frames(indices)
            return crop_and_resize(frames, sample_crop(frames.shape[2], frames.shape[1], SIZE, rng), SIZE)
        frames = reader.frames(indices, lambda width, height: sample_crop(width, height, SIZE, rng))
    return crop_and_resize(frames, CropBox(0, 0, frames.shape[2], frames.shape[1]), SIZE)


def jobs_of(videos: Sequence[Packed], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The clips of `make_clip` for other libraries: frames and boxes."""
    jobs = []
    for video in videos:
        with open_video(video.path) as reader:
            width, height = reader.size or (0, 0)
            for seed in seeds:
                rng = np.random.default_rng(seed)
                indices = sample_frame_indices(len(reader), NUM_FRAMES, STRIDE, rng).tolist()
                box = list(sample_crop(width, height, SIZE, rng))
                jobs.append(dict(path=video.path, indices=indices, box=box, fps=reader.fps, size=SIZE))
    return jobs


class Rival:
    """Another library's process.

    Args:
        python: the interpreter that has it.

    Attributes:
        lack: why it cannot run; None where it does.
    """

    def __init__(self, name: str, python: str, jobs: Path) -> None:
        self.name = name
        self.lack: str | None = None
        self.version = ""
        try:
            self._process = subprocess.Popen(
                [python, str(RIVAL), name, str(jobs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            self.lack = f"{python}: {error.strerror}"
            return
        about = self._answer()
        self.lack, self.version = about.get("lack"), about.get("version", "")

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None  # a pipe
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # a pipe
        line = self._process.stdout.readline()
        if not line:
            return {"lack": f"its process ended with code {self._process.wait()}"}
        return json.loads(line)

    def close(self) -> None:
        if self.lack is None or hasattr(self, "_process"):
            self._process.terminate()
            self._process.wait()


def start_rivals(pythons: dict[str, str], jobs: Path) -> tuple[list[Rival], dict[str, str]]:
    """(those that run, why others do not)."""
    rivals, absent = [], {}
    for name in RIVALS:
        at(f"starting {name}")
        rival = Rival(name, pythons.get(name.partition(",")[0], sys.executable), jobs)
        if rival.lack is None:
            rivals.append(rival)
        else:
            absent[name] = rival.lack
            rival.close()
    return rivals, absent


# --- one run ------------------------------------------------------------------------------------------------


def cpu_seconds_of(call: Callable, *arguments: Any) -> float:
    """CPU seconds of all threads of this process."""
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


def check(videos: Sequence[Packed], seeds: Sequence[int], rivals: Sequence[Rival], folder: Path):
    """(largest, mean) difference of each way from clips of whole frames.

    Raises:
        RuntimeError: one of ours differs.
    """
    clips = {
        way: np.stack([make_clip(way, video, seed) for video in videos for seed in seeds]) for way in OURS
    }
    for rival in rivals:
        path = folder / "clips.npy"
        rival.ask(f"clips {path}")
        clips[rival.name] = np.load(path)
    truth = clips[BASE].astype(np.int16)
    differences = {way: np.abs(found - truth) for way, found in clips.items()}
    for way in EXACT:
        if differences[way].any():
            raise RuntimeError(f"clips of {way} are not those of whole frames: nothing is timed")
    return {way: (int(found.max()), float(found.mean())) for way, found in differences.items()}


def time_ways(
    videos: Sequence[Packed], seeds: Sequence[int], rivals: Sequence[Rival], rounds: int
) -> dict[str, list[float]]:
    """CPU milliseconds a clip of each way, for each round."""
    count = len(videos) * len(seeds)
    runs: dict[str, list[float]] = {way: [] for way in (*OURS, *(rival.name for rival in rivals))}
    for turn in range(rounds + 1):
        at(f"round {turn} of {rounds}")
        sums = dict.fromkeys(OURS, 0.0)
        ways = list(sums)
        for video in videos:
            for seed in seeds:
                first = turn % len(ways)
                for way in ways[first:] + ways[:first]:
                    sums[way] += cpu_seconds_of(make_clip, way, video, seed)
        found = {**sums, **{rival.name: rival.ask("round")["seconds"] for rival in rivals}}
        if turn:  # the first round warms up
            for way, seconds in found.items():
                runs[way].append(seconds / count * 1e3)
    return runs


def time_parts(way: str, entries: Sequence[VideoEntry], seeds: Sequence[int]) -> PackedParts:
    """Parts of a clip by packet table; conversion is timed alone and subtracted from the decoding."""
    import av

    seconds = np.zeros(4)  # open, decode, convert, resize
    for entry in entries:
        for seed in seeds:
            rng = np.random.default_rng(seed)
            marks = [time.process_time()]
            with open_video(entry) as reader:
                marks.append(time.process_time())
                indices = sample_frame_indices(len(reader), NUM_FRAMES, STRIDE, rng)
                box = sample_crop(*(reader.size or (0, 0)), SIZE, rng)
                frames = reader.frames(indices, lambda *_, box=box: box)
                size = reader.size or (0, 0)
            marks.append(time.process_time())
            crop_and_resize(frames, CropBox(0, 0, frames.shape[2], frames.shape[1]), SIZE)
            marks.append(time.process_time())
            picture = av.VideoFrame(*size, "yuv420p")
            start = time.process_time()
            clip = FrameClip("", range(NUM_FRAMES), lambda *_, box=box: box, FrameConverter(""))
            for place in range(NUM_FRAMES):
                clip.offer(place, picture, clip.missing)
            converted = time.process_time() - start
            opened, decoded, resized = np.diff(marks)
            seconds += (opened, decoded - converted, converted, resized)
    each = [float(value) for value in seconds / len(entries) / len(seeds) * 1e3]
    return PackedParts(way=way, open=each[0], decode=each[1], convert=each[2], resize=each[3])


def measure(args: argparse.Namespace) -> PackedResult:
    sources = sample_videos()[2:] if args.quick else sample_videos()
    seeds = range(args.clips)
    with tempfile.TemporaryDirectory() as name, one_core():
        folder = Path(name)
        videos, sizes = make_videos(folder, sources, args.gop)
        jobs = folder / "jobs.json"
        jobs.write_text(json.dumps(jobs_of(videos, seeds)), encoding="utf-8")
        rivals, absent = start_rivals(args.rival, jobs)
        try:
            at("checking")
            errors = check(videos, seeds, rivals, folder)
            runs = time_ways(videos, seeds, rivals, args.rounds)
        finally:
            for rival in rivals:
                rival.close()
        parts = [
            time_parts("shards", [video.stored for video in videos], seeds),
            time_parts(KEPT, [video.kept for video in videos], seeds),
        ]
    versions = {rival.name: f"{rival.name.partition(',')[0]} {rival.version}" for rival in rivals}
    ways = []
    for way, times in runs.items():
        found = Runs.of(times)
        record = PackedWay(
            way=way,
            library=versions.get(way, "vmae"),
            error_levels=errors[way][0],
            mean_levels=errors[way][1],
            clip_cpu_ms=found,
            clips_per_s_per_core=1e3 / found.median,
            speedup=Spread.of_ratios(runs[BASE], times),
        )
        ways.append(record)
    return PackedResult(
        environment=find_environment(), records=[*ways, *parts, *sizes], gop=args.gop, absent=absent
    )


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    result = measure(args)
    show(*result.tables())
    for name, reason in result.absent.items():
        print(f"not here: {name} ({reason})")
    write_result(result, args.json)
    return 0


def read_rivals(given: Sequence[str]) -> dict[str, str]:
    """Interpreters by library.

    Raises:
        InputError: an unknown library, or no `=`.
    """
    known = list(dict.fromkeys(name.partition(",")[0] for name in RIVALS))
    found = {}
    for one in given:
        name, sign, python = one.partition("=")
        if name not in known or not sign or not python:
            raise InputError(f"--rival {one!r}: it is NAME=PYTHON, with a name of {', '.join(known)}")
        found[name] = python
    return found


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="two small clips")
    add("--rounds", type=int, help="times that every clip is made (default: 7, quick 2)")
    add("--clips", type=int, help="places in each video (default: 8, quick 2)")
    add("--gop", type=limits(PackConfig, "gop"), default=PackConfig.gop, help="see `vmae pack --gop`")
    add(
        "--rival",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="the interpreter that has a library (default: this one)",
    )
    add_json(parser)
    args = parser.parse_args(argv)
    args.rival = read_rivals(args.rival)
    if args.quick:
        set_defaults(args, dict(rounds=2, clips=2))
    set_defaults(args, dict(rounds=7, clips=8))
    check_least(args, "rounds", "clips")
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
