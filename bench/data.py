"""How fast videos become clips, with each decoder, codec and group of pictures, against the published path;
and whether that feeds a GPU.

Real clips as they come, packed by `vmae pack`, and re-encoded at short side 256 (played to and fro up to 300
frames, ten seconds, so that a group of 250 is one). All variants take turns, clip by clip, on one core, with
the same frames and crops; counted are CPU seconds of all threads, which others on the machine disturb less
than seconds on the wall. First their clips are compared with the truth: frames decoded one after the other,
cut and resized by PIL. A variant that is more than two grey levels off anywhere gets no speed.

    python bench/data.py            # some five minutes
    python bench/data.py --quick    # under a minute: two small clips, H.264 only
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment, exit_code, paired_ratio, print_table, spread, write_json
from PIL import Image
from telling import at

from vmae import InputError, MaskConfig, ModelConfig
from vmae.config import PRESETS
from vmae.cost import forward_macs, peak_flops
from vmae.data.augment import crop_and_resize, crop_boxes, sample_crop
from vmae.data.decode import BACKENDS, DecodeError, find_backends, open_video
from vmae.data.pack import PackConfig, pack_video, packed_size
from vmae.data.samples import sample_videos
from vmae.data.sampling import sample_frame_indices
from vmae.data.workers import WorkerPool

NUM_FRAMES, STRIDE, SIZE, SHORT_SIDE, LENGTH = 16, 4, 224, 256, 300
TOLERANCE = 2  # grey levels
GOPS = (12, 250)
ENCODERS = {
    "h264": (".mp4", "libx264", {"preset": "medium", "crf": "23"}, "x264-params"),
    "hevc": (".mp4", "libx265", {"preset": "fast", "crf": "26"}, "x265-params"),
    "vp9": (".webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "b:v": "700k"}, None),
}
# Wanted of the default path, in one run on one core: how many times as fast as the published path.
TARGETS = {"h264, GOP 12": 1.8, "h264, GOP 250": 1.3, "packed / original": 2.5}
ASSUMED_GPU, ASSUMED_MFU = "H100", 0.4


# --- the paths ----------------------------------------------------------------------------------------------


def published_clip(path: str, rng: np.random.Generator) -> np.ndarray:
    """As the published code does it: decord, then PIL for each frame."""
    import decord

    reader = decord.VideoReader(path, num_threads=1, ctx=decord.cpu(0))
    indices = sample_frame_indices(len(reader), NUM_FRAMES, STRIDE, rng)
    images = [Image.fromarray(frame).convert("RGB") for frame in reader.get_batch(indices.tolist()).asnumpy()]
    box = sample_crop(*images[0].size, SIZE, rng)
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    images = [image.crop(corners).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in images])


def library_clip(path: str, rng: np.random.Generator, backend: str) -> np.ndarray:
    """As this library's loader does it."""
    with open_video(path, backend) as reader:
        frames = reader.frames(sample_frame_indices(len(reader), NUM_FRAMES, STRIDE, rng))
    return crop_and_resize(frames, sample_crop(frames.shape[2], frames.shape[1], SIZE, rng), SIZE)


def make_clip(variant: str, path: str, seed: int) -> np.ndarray:
    """uint8 [NUM_FRAMES, SIZE, SIZE, 3] of a random place and crop, the same for every variant."""
    rng = np.random.default_rng(seed)
    return published_clip(path, rng) if variant == "published" else library_clip(path, rng, variant)


def find_variants() -> tuple[list[str], dict[str, str]]:
    """The variants that can run here, and why others cannot."""
    lacks = {name: backend.missing() for name, backend in BACKENDS.items() if "video" in backend.kinds}
    if lacks["decord"]:
        raise InputError(f"the published path needs decord: {lacks['decord']}")
    return ["published", *(name for name, lack in lacks.items() if not lack)], {
        k: v for k, v in lacks.items() if v
    }


# --- the videos ---------------------------------------------------------------------------------------------


def encode(source: Path, target: Path, codec: str, gop: int) -> None:
    """Re-encode with key frames at most `gop` apart, closed groups, at the short side SHORT_SIDE, LENGTH
    frames."""
    import av

    _, encoder, options, private = ENCODERS[codec]
    forced = ":min-keyint=12:scenecut=0" if gop == 12 else ""
    options = {
        **options,
        "threads": "1",
        **({private: f"keyint={gop}{forced}:open-gop=0"} if private else {"g": str(gop)}),
    }
    if codec == "hevc":
        options[private] += ":log-level=none"
    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        video = container.streams.video[0]
        stream = out.add_stream(encoder, rate=video.average_rate, options=options)
        stream.width, stream.height = packed_size(
            video.codec_context.width, video.codec_context.height, SHORT_SIDE
        )
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", 1 / Fraction(video.average_rate)
        size = {"width": stream.width, "height": stream.height, "format": "yuv420p", "interpolation": "AREA"}
        frames = [frame.reformat(**size) for frame in container.decode(video)]
        to_and_fro = [*range(len(frames)), *range(len(frames) - 2, 0, -1)]
        for number in range(LENGTH):
            # A copy: an encoder may hold on to a frame that comes again.
            frame = av.VideoFrame.from_ndarray(
                frames[to_and_fro[number % len(to_and_fro)]].to_ndarray(), format="yuv420p"
            )
            frame.pts, frame.time_base = number, stream.codec_context.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def make_videos(folder: Path, sources: Sequence[Path], codecs: Sequence[str]) -> dict[str, list[str]]:
    """Paths of each kind of video."""
    kinds: dict[str, list[str]] = {"original": [str(source) for source in sources], "packed": []}
    for source in sources:
        at(f"packing {source.name}")
        packed = folder / f"{source.stem}_packed.mp4"
        pack_video(source, packed, PackConfig())
        kinds["packed"].append(str(packed))
        for codec in codecs:
            for gop in GOPS:
                at(f"encoding {source.name}, {codec}, GOP {gop}")
                target = folder / f"{source.stem}_{codec}_{gop}{ENCODERS[codec][0]}"
                encode(source, target, codec, gop)
                kinds.setdefault(f"{codec}, GOP {gop}", []).append(str(target))
    return kinds


# --- correctness --------------------------------------------------------------------------------------------


def true_frames(path: str, wanted: Sequence[int]) -> tuple[int, dict[int, np.ndarray]]:
    """Number of frames, and the wanted ones, by decoding all, one after the other."""
    import av

    total, needed, frames = 0, set(wanted), {}
    with av.open(path) as container:
        for frame in container.decode(video=0):
            if total in needed:
                frames[total] = frame.to_ndarray(format="rgb24")
            total += 1
    return total, frames


def true_clips(path: str, seeds: Sequence[int]) -> list[np.ndarray]:
    total, _ = true_frames(path, ())
    rngs = [np.random.default_rng(seed) for seed in seeds]
    indices = [sample_frame_indices(total, NUM_FRAMES, STRIDE, rng).tolist() for rng in rngs]
    _, frames = true_frames(path, sum(indices, []))
    clips = []
    for rng, places in zip(rngs, indices):
        pictures = np.stack([frames[place] for place in places])
        box = sample_crop(pictures.shape[2], pictures.shape[1], SIZE, rng)
        clips.append(crop_and_resize(pictures, box, SIZE, resize="pil"))
    return clips


def find_wrong(
    variants: Sequence[str], paths: Sequence[str], seeds: Sequence[int]
) -> tuple[dict[str, int], dict[str, str]]:
    """Largest difference from the truth of each variant, and why some get no speed for these videos."""
    errors, wrong = dict.fromkeys(variants, 0), {}
    for path in paths:
        for seed, truth in zip(seeds, true_clips(path, seeds)):
            for variant in [name for name in variants if name not in wrong]:
                try:
                    clip = make_clip(variant, path, seed)
                except DecodeError as error:
                    wrong[variant] = str(error).split(": ", 1)[-1]
                    continue
                errors[variant] = max(errors[variant], int(np.abs(clip.astype(np.int16) - truth).max()))
                if errors[variant] > TOLERANCE:
                    wrong[variant] = (
                        f"{Path(path).name}: off by {errors[variant]} levels, {TOLERANCE} allowed"
                    )
    return errors, wrong


def error_on_all_crops(paths: Sequence[str]) -> int:
    """Largest difference between the default resizing and PIL's, over every box that can be drawn."""
    worst = 0
    for path in paths:
        with open_video(path) as reader:
            frames = reader.frames([0, len(reader) // 2])
        for box in dict.fromkeys(crop_boxes(frames.shape[2], frames.shape[1], SIZE)):
            one, two = (
                crop_and_resize(frames, box, SIZE, resize=name).astype(np.int16) for name in ("torch", "pil")
            )
            worst = max(worst, int(np.abs(one - two).max()))
    return worst


# --- speed --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Everything in here runs on one core, where the system can promise that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_seconds_of(call: Callable, *arguments: Any) -> float:
    """Of all threads of this process, in user and system mode."""
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


def time_clips(
    variants: Sequence[str], paths: Sequence[str], seeds: Sequence[int], rounds: int
) -> dict[str, list[float]]:
    """CPU seconds a clip of each variant, for each round: the mean over videos and seeds, which all variants
    do in turn."""
    runs: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(rounds):
        sums = dict.fromkeys(variants, 0.0)
        for path in paths:
            at(f"round {turn + 1} of {rounds}, {Path(path).name}")
            for seed in seeds:
                order = variants[turn % len(variants) :] + variants[: turn % len(variants)]
                for variant in order:
                    sums[variant] += cpu_seconds_of(make_clip, variant, path, seed)
        for variant, total in sums.items():
            runs[variant].append(total / len(paths) / len(seeds))
    return runs


def time_parts(paths: Sequence[str], seeds: Sequence[int]) -> dict[str, float]:
    """CPU milliseconds a clip of the default path's parts; conversion to RGB is timed alone and taken off the
    decoding."""
    import av

    parts = dict.fromkeys(("open", "decode", "convert", "resize"), 0.0)
    for path in paths:
        with av.open(path) as container:
            pictures = [frame for frame, _ in zip(container.decode(video=0), range(NUM_FRAMES))]
        reformatter = av.video.reformatter.VideoReformatter()
        for seed in seeds:
            rng, marks = np.random.default_rng(seed), [time.process_time()]
            with open_video(path) as reader:
                marks.append(time.process_time())
                frames = reader.frames(sample_frame_indices(len(reader), NUM_FRAMES, STRIDE, rng))
            marks.append(time.process_time())
            crop_and_resize(frames, sample_crop(frames.shape[2], frames.shape[1], SIZE, rng), SIZE)
            marks.append(time.process_time())
            for picture in pictures:
                reformatter.reformat(picture, format="rgb24").to_ndarray()
            marks.append(time.process_time())
            opened, decoded, resized, converted = np.diff(marks)
            for name, value in zip(parts, (opened, decoded - converted, converted, resized)):
                parts[name] += value
    return {name: value / len(paths) / len(seeds) * 1e3 for name, value in parts.items()}


class _ClipMaker:
    """What runs in the workers of `time_workers`."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __getitem__(self, task: tuple[str, int]) -> torch.Tensor:
        return torch.from_numpy(make_clip(self.variant, *task))

    def set_watch(self, watch: Callable[[int], None]) -> None:
        pass

    def block(self, video: int, reason: str) -> None:
        pass


def time_workers(variant: str, paths: Sequence[str], seeds: Sequence[int], count: int, span: float) -> float:
    """Clips a second that arrive from `count` processes within `span` seconds, after each has delivered its
    first two."""
    tasks = itertools.cycle([(path, seed) for seed in seeds for path in paths])
    pool = WorkerPool(_ClipMaker(variant), tasks, count=count, prefetch=2, hang_s=600)
    try:
        for _ in range(2 * count):
            next(pool)
        clips, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < span or clips % (len(paths) * len(seeds)):
            next(pool)
            clips += 1
        return clips / seconds
    finally:
        pool.close()


# --- what a GPU needs ---------------------------------------------------------------------------------------


def needs(rate: float, resize_share: float, gpu_flops: float) -> list[dict[str, Any]]:
    """Clips a second that each preset takes, and cores that make them, alone and four crops to a decode.

    Training is counted as 3 forward passes of dual masking, 2 FLOP to a multiply-accumulate.
    """
    records, mask = [], MaskConfig()
    for preset in [name for name in PRESETS if name not in ("vit_tiny", "vit_demo")]:
        macs = forward_macs(ModelConfig.preset(preset), mask.encoder_ratio, mask.decoder_ratio, fused=True)
        needed = gpu_flops / (6 * macs)
        crops = {f"cores_{s}": needed / (s * rate / (1 + (s - 1) * resize_share)) for s in (1, 4)}
        records.append(
            {"kind": "feed", "preset": preset, "forward_macs": macs, "clips_per_s_needed": needed, **crops}
        )
    return records


# --- one run ------------------------------------------------------------------------------------------------


def default_of(paths: Sequence[str]) -> str:
    """The backend that `auto` takes for these videos."""
    with open_video(paths[0]) as reader:
        return reader.backend


def measure_kind(
    kind: str, paths: list[str], variants: list[str], seeds: range, rounds: int
) -> list[dict[str, Any]]:
    at(f"checking {kind}")
    errors, wrong = find_wrong(variants, paths, seeds)
    right = [variant for variant in variants if variant not in wrong]
    runs = time_clips(right, paths, seeds, rounds)
    records, default = [], default_of(paths)
    for variant in variants:
        record = {"kind": "clip", "videos": kind, "variant": variant, "default": variant == default}
        record |= {
            "error_levels": errors[variant],
            "wrong": wrong.get(variant),
            "clip_cpu_ms": None,
            "clips_per_s_per_core": None,
        }
        if variant in runs:
            times = [value * 1e3 for value in runs[variant]]
            record["clip_cpu_ms"] = {**spread(times), "runs": times}
            record["clips_per_s_per_core"] = 1e3 / record["clip_cpu_ms"]["median"]
        records.append(record)
    return records


def compare(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every variant over the published path on the same videos, and on the originals for packed ones, round
    by round."""
    runs = {(r["videos"], r["variant"]): r["clip_cpu_ms"]["runs"] for r in records if r["clip_cpu_ms"]}
    defaults = {(r["videos"], r["variant"]) for r in records if r["default"]}
    ratios = []
    for (kind, variant), ours in runs.items():
        for base in (kind, "original") if kind == "packed" else (kind,):
            if (variant == "published" and base == kind) or (base, "published") not in runs:
                continue
            name = kind if base == kind else f"{kind} / {base}"
            target = TARGETS.get(name) if (kind, variant) in defaults else None
            speedup = paired_ratio(runs[base, "published"], ours)
            ratios.append(
                {
                    "videos": name,
                    "variant": variant,
                    "default": (kind, variant) in defaults,
                    "speedup": speedup,
                }
            )
            ratios[-1] |= {"target": target, "met": None if target is None else speedup["median"] >= target}
    return ratios


def report(records: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> None:
    clips = [r for r in records if r["kind"] == "clip"]
    speedups = {(r["videos"], r["variant"]): r["speedup"] for r in ratios}
    rows = []
    for r in clips:
        name = f"{r['videos']}: {r['variant']}{' (default)' if r['default'] else ''}"
        if r["wrong"]:
            rows.append([name, r["error_levels"], "no speed", "-", "-"])
            continue
        s = speedups.get((r["videos"], r["variant"]))
        ratio = f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})" if s else "1"
        rows.append(
            [
                name,
                r["error_levels"],
                f"{r['clip_cpu_ms']['median']:.1f}",
                f"{r['clips_per_s_per_core']:.1f}",
                ratio,
            ]
        )
    print_table(
        ["videos: variant", "levels off", "CPU ms a clip", "clips/s a core", "x published (min to max)"], rows
    )
    for r in clips:
        if r["wrong"]:
            print(f"NO SPEED for {r['variant']} on {r['videos']}: {r['wrong']}", file=sys.stderr)
    print()
    rows = [
        [r["videos"], *(f"{r[part]:.1f}" for part in ("open", "decode", "convert", "resize"))]
        for r in records
        if r["kind"] == "parts"
    ]
    print_table(["default path, CPU ms a clip", "open", "decode", "convert", "resize"], rows)
    print()
    rows = [
        [f"{r['videos']}: {r['variant']}", r["workers"], f"{r['clips_per_s']:.1f}"]
        for r in records
        if r["kind"] == "workers"
    ]
    print_table(["videos: variant", "workers", "clips/s"], rows)
    print()
    feeds = [r for r in records if r["kind"] == "feed"]
    rows = [
        [
            r["preset"],
            f"{r['forward_macs'] / 1e9:.1f}",
            f"{r['clips_per_s_needed']:.0f}",
            f"{r['cores_1']:.1f}",
            f"{r['cores_4']:.1f}",
        ]
        for r in feeds
    ]
    print_table(
        ["one GPU, packed videos", "GMACs a clip", "clips/s needed", "cores", "cores, 4 crops a decode"], rows
    )
    print(f"needed: an ASSUMPTION, {feeds[0]['assumption']}")
    print()
    for r in ratios:
        if r["target"]:
            text = "met" if r["met"] else "MISSED"
            print(
                f"{r['videos']}: {r['speedup']['median']:.2f} x the published path, {r['target']} wanted: "
                f"{text}"
            )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small clips, H.264 only")
    parser.add_argument("--rounds", type=int, help="times that every clip is made (default: 5, quick 3)")
    parser.add_argument("--clips", type=int, help="places in each video (default: 4, quick 2)")
    parser.add_argument(
        "--workers", type=int, nargs="+", metavar="N", help="worker counts (default: 1 and every core)"
    )
    parser.add_argument(
        "--gpu-flops", type=float, help=f"FLOP/s assumed of a GPU ({ASSUMED_MFU:.0%} of a {ASSUMED_GPU}'s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    args.rounds = args.rounds if args.rounds is not None else 3 if args.quick else 5
    args.clips = args.clips if args.clips is not None else 2 if args.quick else 4
    args.workers = args.workers or sorted({1, os.cpu_count() or 1})
    if min(args.rounds, args.clips, *args.workers) < 1:
        raise InputError("--rounds, --clips and --workers must be at least 1")
    if args.gpu_flops is not None and args.gpu_flops <= 0:
        raise InputError("--gpu-flops must be above 0")
    return args


def measure(args: argparse.Namespace, variants: list[str]) -> list[dict[str, Any]]:
    sources = sample_videos()[2:] if args.quick else sample_videos()
    seeds, records = range(args.clips), []
    with tempfile.TemporaryDirectory() as folder:
        # Before decord is imported, whose own libvpx would take the place of PyAV's.
        kinds = make_videos(Path(folder), sources, ("h264",) if args.quick else tuple(ENCODERS))
        with one_core():
            at("resizing, checked against PIL")
            crops = error_on_all_crops(kinds["h264, GOP 250"])
            if crops > TOLERANCE:
                raise RuntimeError(
                    f"resizing is {crops} grey levels off PIL's, {TOLERANCE} allowed: nothing is timed"
                )
            records.append({"kind": "crops", "error_levels": crops})
            for kind, paths in kinds.items():
                records += measure_kind(kind, paths, variants, seeds, args.rounds)
                at(f"parts of {kind}")
                records.append({"kind": "parts", "videos": kind, **time_parts(paths, seeds)})
        timed = {(r["videos"], r["variant"]) for r in records if r["kind"] == "clip" and r["clip_cpu_ms"]}
        for kind in ("original", "h264, GOP 12", "h264, GOP 250", "packed"):
            for variant in ("published", default_of(kinds[kind])):
                for count in args.workers if (kind, variant) in timed else ():
                    at(f"{kind}, {variant}, {count} workers")
                    rate = time_workers(variant, kinds[kind], seeds, count, 1.0 if args.quick else 4.0)
                    records.append(
                        {
                            "kind": "workers",
                            "videos": kind,
                            "variant": variant,
                            "workers": count,
                            "clips_per_s": rate,
                        }
                    )
    return records


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    variants, absent = find_variants()
    known = environment()
    print(
        f"{known['cpu']}, {known['cores']} cores, torch {known['torch']}; {NUM_FRAMES} frames, stride "
        f"{STRIDE}, {SIZE} x {SIZE}"
    )
    for name, reason in absent.items():
        print(f"not here: {name} ({reason})")
    records = measure(args, variants)
    packed = next(r for r in records if r["kind"] == "clip" and r["videos"] == "packed" and r["default"])
    share = next(r for r in records if r["kind"] == "parts" and r["videos"] == "packed")
    flops = args.gpu_flops or ASSUMED_MFU * peak_flops(ASSUMED_GPU, "bfloat16")
    source = "as given" if args.gpu_flops else f"{ASSUMED_MFU:.0%} of a {ASSUMED_GPU}'s dense bfloat16 peak"
    feeds = needs(packed["clips_per_s_per_core"], share["resize"] / packed["clip_cpu_ms"]["median"], flops)
    records += [{**feed, "assumption": f"{flops / 1e12:.0f} TFLOP/s, {source}"} for feed in feeds]
    ratios = compare([r for r in records if r["kind"] == "clip"])
    print()
    report(records, ratios)
    if args.json:
        write_json(args.json, records, "cpu", ratios=ratios, absent=absent)
        print(f"\nresults: {args.json}")
    return 0


def main(argv: list[str] | None = None) -> int:
    def find_and_run() -> int:
        find_backends("video", "auto")
        return run(parse_args(argv))

    return exit_code(find_and_run)


if __name__ == "__main__":
    raise SystemExit(main())
