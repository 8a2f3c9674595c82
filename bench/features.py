"""Features of a two-minute video: `vmae.evaluate.features` against the published loop, decoding and model
timed apart.

The published loop (VideoMAE V2's script for THUMOS14 and FineAction): for each window, decord fetches its 16
frames, they are stretched and go through the model by themselves, softmax attention with its matrix. Here a
frame is decoded and resized once, a tubelet embedded once, attention fused, windows batched. Blocks see
positions, so what comes after the embedding cannot be shared between windows that overlap: with a large model
nearly all of the time, whoever calls it.

Both do the same windows, in turn, on one core; counted are CPU seconds. Of the loop, and of both models, runs
of windows that follow each other are timed, spread over the video; of our decoding the first 24 seconds. The
time of the whole video is that of a window times its windows. Speeds are reported only where the features of
both are the same within 1e-4.

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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import one_core
from harness.common import environment, exit_code, paired_ratio, print_table, spread, write_json
from harness.telling import at

from vmae import InputError, ModelConfig, build_classifier
from vmae.data.decode import BACKENDS, open_video
from vmae.data.manifest import VideoEntry
from vmae.evaluate.features import WindowConfig, extract, features_of, resized, windows
from vmae.model import Classifier
from vmae.synthetic.samples import sample_videos

FPS, TOLERANCE, TARGET = 25, 1e-4, 2.0
DECODED = 600  # frames from the start on which our decoding is timed
FRAMES, SECONDS, QUICK_SECONDS, CHECKED_SECONDS = 16, 120, 15, 6
CPU = torch.device("cpu")


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
    """A real clip in ping-pong, H.264 with x264's own key frames (up to 250 apart), 25 frames a second."""
    import av

    with av.open(str(sample_videos()[0])) as container:
        video = container.streams.video[0]
        shape = {"width": size[0], "height": size[1], "format": "yuv420p"}
        pictures = [frame.reformat(**shape).to_ndarray() for frame in container.decode(video)]
    order = [*range(len(pictures)), *range(len(pictures) - 2, 0, -1)]
    with av.open(str(target), "w") as out:
        stream = out.add_stream(
            "libx264", rate=FPS, options={"preset": "veryfast", "crf": "23", "threads": "1"}
        )
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        for number in range(seconds * FPS):
            frame = av.VideoFrame.from_ndarray(pictures[order[number % len(order)]], format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


# --- the published loop -------------------------------------------------------------------------------------


class PublishedLoop:
    """As the released script: one reader, a window at a time."""

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


def published_run(
    model: Classifier, loop: PublishedLoop, run: Sequence[int]
) -> tuple[float, float, torch.Tensor]:
    """CPU seconds of decoding and resizing, and of the model, and the features of a run of windows."""
    began = time.process_time()
    clips = [loop.window(start) for start in run]
    decoded = time.process_time()
    found = [model.features(clip) for clip in clips]
    return decoded - began, time.process_time() - decoded, torch.cat(found)


def our_run(
    model: Classifier, path: str, run: Sequence[int], config: WindowConfig, batch_size: int
) -> tuple[float, float, torch.Tensor]:
    """The same; decoding and resizing are timed on the first `DECODED` frames, opening the file included, and
    the run's resizing is taken off the model."""
    began = time.process_time()
    with open_video(path) as reader:
        count = sum(1 for _ in windows(itertools.islice(reader.iterate(), DECODED), config))
        decoded = (time.process_time() - began) * len(run) / count
        frames = list(reader.frames(range(run[0], run[-1] + config.frames)))
    began = time.process_time()
    for first in range(0, len(frames), config.step):
        resized(frames[first : first + config.step], config)
    began_all = time.process_time()
    (found,) = features_of(model, [frames], config, batch_size=batch_size, device=CPU)
    return decoded, time.process_time() - began_all - (began_all - began), found


def measure(setting: Setting, path: str, *, count: int, runs: int, batch_size: int) -> dict[str, Any]:
    """Milliseconds a window of each part of both, by run; the largest difference between their features."""
    config, (published, ours) = setting.window_config(), build_models(setting)
    loop = PublishedLoop(path, config)
    starts = config.starts(len(loop.reader))
    ms: dict[str, list[float]] = {
        f"{who} {part}": [] for who in ("published", "ours") for part in ("decode", "model")
    }
    error, largest = 0.0, 0.0
    with torch.inference_mode():
        published.features(loop.window(starts[0])), ours.features(loop.window(starts[0]))  # warm-up
        for number, run in enumerate(runs_of(starts, count, runs), 1):
            at(f"{setting.name}, round {number} of {runs}")
            *seconds, expected = published_run(published, loop, run)
            *more, found = our_run(ours, path, run, config, batch_size)
            for part, value in zip(ms, (*seconds, *more)):
                ms[part].append(1e3 * value / len(run))
            error = max(error, (expected - found).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    return {"windows": len(starts), "ms": ms, "error": error, "largest": largest}


def record_of(setting: Setting, measured: dict[str, Any], seconds: int) -> dict[str, Any]:
    ms = measured["ms"]
    record = {"kind": "features", "setting": setting.name, "video_s": seconds, "windows": measured["windows"]}
    record |= {
        "error": measured["error"],
        "largest_feature": measured["largest"],
        "same": measured["error"] <= TOLERANCE,
    }
    if not record["same"]:
        return record
    record["ms_per_window"] = {part: spread(values) for part, values in ms.items()}
    totals = {
        who: [a + b for a, b in zip(ms[f"{who} decode"], ms[f"{who} model"])] for who in ("published", "ours")
    }
    record["video_cpu_s"] = {
        who: measured["windows"] * spread(values)["median"] / 1e3 for who, values in totals.items()
    }
    record["speedup"] = paired_ratio(totals["published"], totals["ours"])
    record["speedup_decode"] = paired_ratio(ms["published decode"], ms["ours decode"])
    record["speedup_model"] = paired_ratio(ms["published model"], ms["ours model"])
    return record | {"target": TARGET, "met": record["speedup"]["median"] >= TARGET}


def check_whole(setting: Setting, path: str, count: int) -> float:
    """Largest difference between `extract` of a whole video and the published loop's first and last
    windows."""
    config, (published, ours) = setting.window_config(), build_models(setting)
    loop = PublishedLoop(path, config)
    found = extract(ours, VideoEntry(path), config, batch_size=8, device=CPU)
    starts = config.starts(len(loop.reader))
    if len(found) != len(starts):
        raise RuntimeError(f"{len(found)} windows instead of {len(starts)}")
    with torch.inference_mode():
        places = [*range(count), *range(len(starts) - count, len(starts))]
        return max(
            np.abs(published.features(loop.window(starts[i])).numpy()[0] - found[i]).max() for i in places
        )


# --- one run ------------------------------------------------------------------------------------------------


def report(records: list[dict[str, Any]]) -> None:
    rows = []
    for r in records:
        if not r["same"]:
            print(f"{r['setting']}: features differ by {r['error']:.1e}: not timed")
            continue
        parts = [f"{r['ms_per_window'][part]['median']:.1f}" for part in r["ms_per_window"]]
        speedup = r["speedup"]
        times = f"{speedup['median']:.2f} ({speedup['min']:.2f} to {speedup['max']:.2f})"
        whole = [f"{r['video_cpu_s'][who]:.0f}" for who in ("published", "ours")]
        rows.append(
            [r["setting"], *parts, *whole, times, f"{r['error']:.0e}", "met" if r["met"] else "MISSED"]
        )
    head = ["CPU ms a window", "published: decode, resize", "model", "here: decode, resize", "model"]
    print_table([*head, "video s, published", "here", "times faster", "error", f"{TARGET:g} x"], rows)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    if lack := BACKENDS["decord"].missing():
        raise InputError(f"the published loop needs decord: {lack}")
    known, records = environment(), []
    seconds, settings = (QUICK_SECONDS, QUICK) if args.quick else (SECONDS, SETTINGS)
    settings = [
        setting for setting in settings if not args.only or any(text in setting.name for text in args.only)
    ]
    if not settings:
        raise InputError(
            f"--only {' '.join(args.only)} leaves no setting; there are: "
            f"{'; '.join(s.name for s in SETTINGS)}"
        )
    print(f"{known['cpu']}, one core, torch {known['torch']}; {seconds} s of video at {FPS} frames a second")
    with tempfile.TemporaryDirectory() as folder, one_core():
        paths: dict[tuple[int, int], str] = {}
        for size in dict.fromkeys(setting.video for setting in settings):
            at(f"making a video of {size[0]} x {size[1]}")
            paths[size] = str(Path(folder) / f"{size[0]}x{size[1]}.mp4")
            make_video(Path(paths[size]), size, seconds)
        short = str(Path(folder) / "short.mp4")
        make_video(short, QUICK[0].video, CHECKED_SECONDS)
        at("`extract`, checked against the published loop")
        whole = check_whole(QUICK[0], short, 3)
        if whole > TOLERANCE:
            raise RuntimeError(
                f"`extract` is {whole:.1e} off the published loop, {TOLERANCE:g} allowed: nothing is timed"
            )
        for setting in settings:
            at(f"building {setting.name}")
            count = (
                max(args.windows // 4, 2)
                if setting.model == "vit_s" and setting.side == 224
                else args.windows
            )
            measured = measure(
                setting, paths[setting.video], count=count, runs=args.rounds, batch_size=args.batch_size
            )
            records.append(record_of(setting, measured, seconds))
    print()
    report(records)
    if args.json:
        write_json(args.json, records, "cpu", error_of_whole_video=float(whole))
        print(f"\nresults: {args.json}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a short video, one small model")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="settings whose name holds one of these")
    parser.add_argument(
        "--windows", type=int, default=16, help="that follow each other, of a round (16; large models 4)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="places in the video (3)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows at once, here (4)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)

    def checked() -> int:
        if min(args.windows, args.rounds, args.batch_size) < 1:
            raise InputError("--windows, --rounds and --batch-size must be at least 1")
        return run(args)

    return exit_code(checked)


if __name__ == "__main__":
    raise SystemExit(main())
