"""Codecs for packed videos: clips a second on one core, bytes, and PSNR against the originals at this size.

The sample clips are scaled as `vmae pack` scales them and stored without loss; each way encodes those frames.
Clips (16 frames, stride 4, a random crop resized to 224 x 224) are then made of its files by PyAV's reader,
all ways in turn; counted are CPU seconds of all threads. The first way is what `vmae pack` writes.

    python bench/packed_codecs.py            # some minutes
    python bench/packed_codecs.py --quick    # two small clips
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness.command import add_json, check_least, exit_code, one_core, set_defaults, write_result
from harness.environment import find_environment
from harness.json_records import Runs
from harness.progress import at
from harness.results.packed import CodecRecord, CodecsResult
from harness.table import show

from vmae.data import CropBox, DecodeError, crop_and_resize, open_video, sample_crop, sample_frame_indices
from vmae.data.pack import PackConfig, pack_video
from vmae.data.readers.pyav import PyavReader
from vmae.synthetic.samples import sample_videos

NUM_FRAMES, STRIDE, SIZE = 16, 4, 224


class Way(NamedTuple):
    """How frames are encoded.

    Attributes:
        label: what differs from the codec's first way.
        options: of FFmpeg's encoder.
    """

    codec: str
    label: str
    encoder: str
    options: dict[str, str]
    suffix: str = ".mp4"
    pixels: str = "yuv420p"


def x264(label: str, more: str = "", without: Sequence[str] = (), **changes: int | str) -> Way:
    """`vmae pack`'s encoder with other settings: fields of `PackConfig`, x264's parameters, options left
    out."""
    options = PackConfig(**changes).encoder_options()  # type: ignore[arg-type]  # its fields' own types
    options["x264-params"] += more
    return Way("H.264", label, "libx264", {k: v for k, v in options.items() if k not in without})


def x265(label: str, crf: int, preset: str = "medium") -> Way:
    params = "keyint=25:min-keyint=25:scenecut=0:open-gop=0:bframes=7:b-adapt=0:b-pyramid=0:pools=none"
    options = {"preset": preset, "crf": str(crf), "tune": "fastdecode"}
    return Way("H.265", label, "libx265", {**options, "x265-params": f"{params}:log-level=none"})


def vp9(crf: int) -> Way:
    options = {
        "crf": str(crf),
        "b:v": "0",
        "g": "25",
        "deadline": "good",
        "cpu-used": "4",
        "lag-in-frames": "0",
    }
    return Way("VP9", f"crf {crf}", "libvpx-vp9", options, ".webm")


def av1(crf: int) -> Way:
    params = "keyint=25:fast-decode=1:lp=1:scd=0"
    return Way("AV1", f"crf {crf}", "libsvtav1", {"preset": "8", "crf": str(crf), "svtav1-params": params})


def mjpeg(quality: int) -> Way:
    limits = {"qmin": str(quality), "qmax": str(quality)}
    return Way("MJPEG", f"q {quality}", "mjpeg", limits, ".mkv", "yuvj420p")


WAYS = (
    x264("as vmae pack"),
    x264("crf 18", crf=18),
    x264("crf 23", crf=23),
    x264("crf 26", crf=26),
    x264("preset veryfast", preset="veryfast"),
    x264("preset slower", preset="slower"),
    x264("GOP 12, runs of 3 B", gop=12),
    x264("GOP 25, runs of 3 B", ":bframes=3"),
    x264("GOP 25, runs of 5 B", ":bframes=5"),
    x264("GOP 9", gop=9),
    x264("GOP 49", gop=49),
    x264("only key frames", gop=1),
    x264("no B-frames", ":bframes=0"),
    x264("not tuned", without=("tune",)),
    x264("one reference", ":ref=1"),
    x264("blocks of 16 x 16", ":partitions=none:8x8dct=0"),
    x265("crf 22", 22),
    x265("crf 26", 26),
    vp9(26),
    vp9(34),
    av1(28),
    av1(36),
    mjpeg(3),
    mjpeg(6),
)


def encode(frames: Path, target: Path, way: Way) -> float:
    """CPU seconds of encoding the frames of a video.

    Raises:
        DecodeError: the encoder is not here, or fails.
    """
    import av

    start = time.process_time()
    try:
        with open_video(frames, "pyav") as reader, av.open(str(target), "w") as out:
            assert isinstance(reader, PyavReader)
            rate = Fraction(reader.stream.average_rate or 25)
            stream = out.add_stream(way.encoder, rate=rate, options={"threads": "1", **way.options})
            (stream.width, stream.height), stream.pix_fmt = reader.size, way.pixels
            stream.codec_context.time_base = 1 / rate
            for number, frame in enumerate(reader.decoded()):
                if way.pixels != "yuv420p":  # the same samples, at full range
                    frame = frame.reformat(format=way.pixels, dst_color_range="JPEG")
                frame.pts, frame.time_base, frame.pict_type = number, 1 / rate, 0
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    except (av.FFmpegError, ValueError) as error:
        raise DecodeError(f"{way.encoder}: {error}") from None
    return time.process_time() - start


def psnr(one: Path, other: Path) -> float:
    """Decibels, of all frames in RGB."""
    with open_video(one, "pyav") as a, open_video(other, "pyav") as b:
        if len(a) != len(b):
            raise DecodeError(f"{other.name}: has {len(b)} frames, not {len(a)}")
        errors = [float(np.square(x.astype(np.float32) - y).mean()) for x, y in zip(a.iterate(), b.iterate())]
    return 10 * float(np.log10(255**2 / np.mean(errors)))


def make_clip(path: Path, seed: int) -> np.ndarray:
    """uint8 [NUM_FRAMES, SIZE, SIZE, 3] of a random place and crop, the same for every way."""
    rng = np.random.default_rng(seed)
    with open_video(path, "pyav") as reader:
        indices = sample_frame_indices(len(reader), NUM_FRAMES, STRIDE, rng)
        frames = reader.frames(indices, lambda width, height: sample_crop(width, height, SIZE, rng))
    return crop_and_resize(frames, CropBox(0, 0, frames.shape[2], frames.shape[1]), SIZE)


def encode_all(folder: Path, sources: Sequence[Path]) -> list[tuple[CodecRecord, list[Path]]]:
    """The record of every way, without its speed, and its files; none where it failed."""
    lossless = []
    for source in sources:
        at(f"scaling {source.name}")
        lossless.append(folder / f"{source.stem}.mp4")
        pack_video(source, lossless[-1], PackConfig(crf=0))
    found: list[tuple[CodecRecord, list[Path]]] = []
    for number, way in enumerate(WAYS):
        record = CodecRecord(codec=way.codec, options=way.label)
        targets = [folder / f"{path.stem}_{number}{way.suffix}" for path in lossless]
        at(f"encoding, {way.codec}, {way.label}")
        try:
            seconds = sum(encode(path, target, way) for path, target in zip(lossless, targets))
            quality = [psnr(path, target) for path, target in zip(lossless, targets)]
        except DecodeError as error:
            found.append((replace(record, wrong=str(error)), []))
            continue
        size = sum(target.stat().st_size for target in targets)
        record = replace(record, bytes=size, psnr=float(np.mean(quality)), encode_s=seconds)
        found.append((record, targets))
    return found


def measure(args: argparse.Namespace) -> CodecsResult:
    sources = sample_videos()[2:] if args.quick else sample_videos()
    with tempfile.TemporaryDirectory() as name, one_core():
        found = encode_all(Path(name), sources)
        runs: list[list[float]] = [[] for _ in found]
        for turn in range(args.rounds + 1):
            sums = [0.0] * len(found)
            for seed in range(args.clips):
                at(f"round {turn} of {args.rounds}, clip {seed}")
                for video in range(len(sources)):
                    for number, (_, files) in enumerate(found):
                        if files:
                            start = time.process_time()
                            make_clip(files[video], seed)
                            sums[number] += time.process_time() - start
            if turn:  # the first round warms up
                for number, seconds in enumerate(sums):
                    runs[number].append(seconds / len(sources) / args.clips * 1e3)
    records = []
    for (record, files), times in zip(found, runs):
        if files:
            spread = Runs.of(times)
            record = replace(record, clip_cpu_ms=spread, clips_per_s_per_core=1e3 / spread.median)
        records.append(record)
    return CodecsResult(environment=find_environment(), records=records)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder's errors only
    result = measure(args)
    show(*result.tables())
    write_result(result, args.json)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="two small clips")
    add("--rounds", type=int, help="times that every clip is made (default: 5, quick 2)")
    add("--clips", type=int, help="places in each video (default: 4, quick 2)")
    add_json(parser)
    args = parser.parse_args(argv)
    if args.quick:
        set_defaults(args, dict(rounds=2, clips=2))
    set_defaults(args, dict(rounds=5, clips=4))
    check_least(args, "rounds", "clips")
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
