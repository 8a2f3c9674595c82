"""Features of a two-minute video: `vmae.evaluate.features` against the published loop, decoding and model
timed apart.

The published loop (VideoMAE V2's script for THUMOS14 and FineAction): for each window, decord fetches its 16
frames, they are resized and go through the model by themselves, softmax attention with its matrix. Here a
frame is decoded and resized once, a tubelet embedded once, attention fused, windows batched. Blocks see
positions, so what comes after the embedding cannot be shared between windows that overlap: with a large model
nearly all of the time, in both ways.

Both ways do the same windows, in turn, on one core; counted are CPU seconds. Timed are runs of consecutive
windows spread over the video, and of our decoding the first 24 seconds. The time of the whole video is that
of a window times its windows. Speeds are reported only where the features of both are the same within 1e-4.

    python bench/features.py            # a few minutes
    python bench/features.py --quick    # 15 seconds of video, under a minute
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from harness.command import add_json, check_least, exit_code, one_core, say_wrong, write_result
from harness.environment import find_environment
from harness.json_records import Spread
from harness.progress import at
from harness.results.features import FeaturesRecord, FeaturesResult
from harness.table import show
from harness.videos import encode

from vmae import InputError, ModelConfig, build_classifier
from vmae.data import VideoEntry, open_video
from vmae.data.decode import BACKENDS
from vmae.evaluate.features import WindowConfig, extract, features_of, resized, windows
from vmae.model import Classifier
from vmae.synthetic.samples import sample_videos

FPS, TOLERANCE, TARGET = 25, 1e-4, 2.0
DECODED = 600  # frames from the start on which our decoding is timed
FRAMES, SECONDS, QUICK_SECONDS, CHECKED_SECONDS = 16, 120, 15, 6
CPU = torch.device("cpu")
WHOS, PARTS = ("published", "ours"), ("decode", "model")
Seconds = dict[str, float]  # CPU, by part


@dataclass(frozen=True)
class Setting:
    """A model and a step, and the size of the video."""

    model: str
    side: int
    step: int
    video: tuple[int, int] = (320, 240)

    @property
    def name(self) -> str:
        return f"{self.model} {self.side}, step {self.step}, video {self.video[0]} x {self.video[1]}"

    def window_config(self) -> WindowConfig:
        return WindowConfig(frames=FRAMES, step=self.step, size=(self.side, self.side))


SETTINGS = (
    Setting("vit_s", 224, 4),
    Setting("vit_s", 224, 4, (1280, 720)),
    Setting("vit_s", 224, 16),
    Setting("vit_s", 112, 4),
    Setting("vit_s", 112, 4, (1280, 720)),
    Setting("vit_tiny", 112, 4),
)
QUICK = (Setting("vit_tiny", 112, 4),)


# --- the video ----------------------------------------------------------------------------------------------


def make_video(target: Path, size: tuple[int, int], seconds: int) -> None:
    """A real clip played ping-pong, H.264 with x264's own key frames (up to 250 apart), 25 frames/s."""
    options = {"preset": "veryfast", "crf": "23"}
    length, source = seconds * FPS, sample_videos()[0]
    encode(source, target, "libx264", options, size=size, length=length, rate=Fraction(FPS))


# --- the published loop -------------------------------------------------------------------------------------


class PublishedLoop:
    """Loop of the released script: one reader, a window at a time."""

    def __init__(self, path: str, config: WindowConfig) -> None:
        import decord

        self.reader, self.config = decord.VideoReader(path, num_threads=1, ctx=decord.cpu(0)), config

    def window(self, start: int) -> torch.Tensor:
        """float32 [1, 3, T, H, W] in [0, 1]"""
        frames = self.reader.get_batch(np.arange(start, start + self.config.frames)).asnumpy()
        pixels = torch.from_numpy(frames).to(torch.float32).permute(3, 0, 1, 2) / 255
        return F.interpolate(pixels, size=self.config.size, mode="bilinear", align_corners=False)[None]


def build_models(setting: Setting) -> tuple[Classifier, Classifier]:
    """The published model and ours, of the same weights."""
    config = ModelConfig.preset(setting.model, num_frames=FRAMES, img_size=setting.side)
    models = []
    for attention in ("softmax", "auto"):
        torch.manual_seed(0)
        models.append(build_classifier(config, 0, attention=attention, recompute=False).eval())
    return models[0], models[1]


# --- timing -------------------------------------------------------------------------------------------------


def runs_of(starts: Sequence[int], count: int, runs: int) -> list[list[int]]:
    """`runs` runs of `count` windows that follow each other, spread over the video."""
    firsts = np.linspace(0, max(len(starts) - count, 0), runs).astype(int)
    return [list(starts[first : first + count]) for first in firsts]


def published_run(model: Classifier, loop: PublishedLoop, run: Sequence[int]) -> tuple[Seconds, torch.Tensor]:
    """Decoding and resizing, the model, and the features of a run of windows."""
    began = time.process_time()
    clips = [loop.window(start) for start in run]
    decoded = time.process_time()
    found = [model.features(clip) for clip in clips]
    return {"decode": decoded - began, "model": time.process_time() - decoded}, torch.cat(found)


def our_run(
    model: Classifier, path: str, run: Sequence[int], config: WindowConfig, batch_size: int
) -> tuple[Seconds, torch.Tensor]:
    """The same; decoding and resizing are timed on the first `DECODED` frames, opening the file included, and
    the run's resizing is subtracted from the model.

    Raises:
        DecodeError: a frame cannot be read.
    """
    began = time.process_time()
    with open_video(path) as reader:
        count = sum(1 for _ in windows(itertools.islice(reader.iterate(), DECODED), config))
        decoded = (time.process_time() - began) * len(run) / count
        frames = list(reader.frames(range(run[0], run[-1] + config.frames)))
    began = time.process_time()
    for first in range(0, len(frames), config.step):
        resized(frames[first : first + config.step], config)
    resizing = time.process_time() - began
    began = time.process_time()
    (found,) = features_of(model, [frames], config, batch_size=batch_size, device=CPU)
    if isinstance(found, Exception):
        raise found
    return {"decode": decoded, "model": time.process_time() - began - resizing}, found


@dataclass(frozen=True)
class Measured:
    """CPU milliseconds a window ("published decode", ...), by run; windows of the whole video; largest
    difference between the features of both, and largest feature."""

    ms: dict[str, list[float]]
    windows: int
    error: float
    largest: float

    def total(self, who: str) -> list[float]:
        return [sum(parts) for parts in zip(*(self.ms[f"{who} {part}"] for part in PARTS))]


def measure(setting: Setting, path: str, *, count: int, runs: int, batch_size: int) -> Measured:
    """Both ways on the same runs of windows, in turn."""
    config, (published, ours) = setting.window_config(), build_models(setting)
    loop = PublishedLoop(path, config)
    starts = config.starts(len(loop.reader))
    ms: dict[str, list[float]] = {f"{who} {part}": [] for who in WHOS for part in PARTS}
    error, largest = 0.0, 0.0
    with torch.inference_mode():
        published.features(loop.window(starts[0])), ours.features(loop.window(starts[0]))  # warm-up
        for number, run in enumerate(runs_of(starts, count, runs), 1):
            at(f"{setting.name}, round {number} of {runs}")
            seconds, expected = published_run(published, loop, run)
            more, found = our_run(ours, path, run, config, batch_size)
            for who, spent in zip(WHOS, (seconds, more)):
                for part, value in spent.items():
                    ms[f"{who} {part}"].append(1e3 * value / len(run))
            error = max(error, (expected - found).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    return Measured(ms, len(starts), error, largest)


def make_record(setting: Setting, measured: Measured, seconds: int) -> FeaturesRecord:
    """No speed where the features differ."""
    ms, same = measured.ms, measured.error <= TOLERANCE
    totals = {who: measured.total(who) for who in WHOS}
    speedup = Spread.of_ratios(totals["published"], totals["ours"])

    def timed(value):
        return value if same else None

    return FeaturesRecord(
        setting=setting.name,
        video_s=seconds,
        windows=measured.windows,
        error=measured.error,
        largest_feature=measured.largest,
        same=same,
        ms_per_window=timed({part: Spread.of(values) for part, values in ms.items()}),
        video_cpu_s=timed({w: measured.windows * Spread.of(v).median / 1e3 for w, v in totals.items()}),
        speedup=timed(speedup),
        speedup_decode=timed(Spread.of_ratios(ms["published decode"], ms["ours decode"])),
        speedup_model=timed(Spread.of_ratios(ms["published model"], ms["ours model"])),
        target=timed(TARGET),
        met=timed(speedup.median >= TARGET),
    )


def check_whole(setting: Setting, path: str, count: int) -> float:
    """Largest difference between `extract` of a whole video and the published loop's first and last
    windows."""
    config, (published, ours) = setting.window_config(), build_models(setting)
    loop = PublishedLoop(path, config)
    found = extract(ours, VideoEntry(path), config, batch_size=8, device=CPU)
    starts = config.starts(len(loop.reader))
    if len(found) != len(starts):
        raise RuntimeError(f"{len(found)} windows instead of {len(starts)}")
    places = [*range(count), *range(len(starts) - count, len(starts))]
    with torch.inference_mode():
        expected = [published.features(loop.window(starts[i])).numpy()[0] for i in places]
    return float(max(np.abs(one - found[i]).max() for i, one in zip(places, expected)))


# --- one run ------------------------------------------------------------------------------------------------


def choose_settings(args: argparse.Namespace) -> list[Setting]:
    """All, or those that `--only` names.

    Raises:
        InputError: none is left.
    """
    known = QUICK if args.quick else SETTINGS
    found = [s for s in known if not args.only or any(text in s.name for text in args.only)]
    if not found:
        names = "; ".join(setting.name for setting in known)
        raise InputError(f"--only {' '.join(args.only)} leaves no setting; there are: {names}")
    return found


def checked_whole(folder: Path) -> float:
    """`check_whole` of a short video.

    Raises:
        RuntimeError: the features differ.
    """
    at("`extract`, checked against the published loop")
    short = folder / "short.mp4"
    make_video(short, QUICK[0].video, CHECKED_SECONDS)
    error = check_whole(QUICK[0], str(short), 3)
    if error > TOLERANCE:
        allowed = f"{TOLERANCE:g} allowed"
        raise RuntimeError(f"`extract` is {error:.1e} off the published loop, {allowed}: nothing is timed")
    return error


def run(args: argparse.Namespace) -> int:
    check_least(args, "windows", "rounds", "batch_size")
    torch.set_num_threads(1)
    if lack := BACKENDS["decord"].missing():
        raise InputError(f"the published loop needs decord: {lack}")
    settings, known, records = choose_settings(args), find_environment(), []
    seconds = QUICK_SECONDS if args.quick else SECONDS
    video = f"{seconds} s of video at {FPS} frames a second"
    print(f"{known.cpu}, one core, torch {known.torch}; {video}")
    with tempfile.TemporaryDirectory() as folder, one_core():
        paths: dict[tuple[int, int], Path] = {}
        for size in dict.fromkeys(setting.video for setting in settings):
            at(f"making a video of {size[0]} x {size[1]}")
            paths[size] = Path(folder) / f"{size[0]}x{size[1]}.mp4"
            make_video(paths[size], size, seconds)
        whole = checked_whole(Path(folder))
        for setting in settings:
            at(f"building {setting.name}")
            large = setting.model == "vit_s" and setting.side == 224
            count = max(args.windows // 4, 2) if large else args.windows
            path = str(paths[setting.video])
            measured = measure(setting, path, count=count, runs=args.rounds, batch_size=args.batch_size)
            records.append(make_record(setting, measured, seconds))
    result = FeaturesResult(environment=known, records=records, error_of_whole_video=whole)
    show(*result.tables())
    say_wrong({r.setting: f"features differ by {r.error:.1e}" for r in records if not r.same})
    write_result(result, args.json)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a short video, one small model")
    add("--only", nargs="+", metavar="TEXT", help="settings whose name holds one of these")
    windows = "windows of a round, one after the other (16; large models 4)"
    add("--windows", type=int, default=16, help=windows)
    add("--rounds", type=int, default=3, help="places in the video (3)")
    add("--batch-size", type=int, default=4, help="windows at once, here (4)")
    add_json(parser)
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
