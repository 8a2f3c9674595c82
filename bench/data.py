"""How fast videos become clips, with each decoder, codec and group of pictures, against the published path;
and whether that feeds a GPU.

Real clips as they come, packed by `vmae pack`, and re-encoded at short side 256 (played ping-pong up to 300
frames, ten seconds, so that a group of 250 is one). All variants take turns, clip by clip, on one core,
with the same frames and crops; counted are CPU seconds of all threads, which other work on the machine
disturbs less than wall time. First their clips are compared with the truth: frames decoded one after the
other, cut and resized by PIL. A variant that is more than two grey levels off anywhere gets no speed.

    python bench/data.py            # some five minutes
    python bench/data.py --quick    # under a minute: two small clips, H.264 only
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.command import (
    add_json,
    check_least,
    exit_code,
    one_core,
    say_wrong,
    set_defaults,
    write_partial,
    write_result,
)
from harness.environment import find_environment
from harness.json_records import Runs, Spread
from harness.progress import at
from harness.records import FLOPS_PER_MAC
from harness.results.data import (
    ClipRecord,
    CropsRecord,
    DataResult,
    FeedRecord,
    PartsRecord,
    WayRatio,
    WorkersRecord,
)
from harness.table import show
from harness.variants import PUBLISHED_PRESETS
from harness.videos import ENCODERS, encode, group_options, size_of, true_frames

from vmae import InputError, MaskConfig, ModelConfig
from vmae.data import CropBox, DecodeError, crop_and_resize, open_video, sample_crop, sample_frame_indices
from vmae.data.augment import crop_boxes
from vmae.data.decode import BACKENDS, find_backends
from vmae.data.pack import PackConfig, pack_video, packed_size
from vmae.data.workers import WorkerPool
from vmae.model.cost import masked_macs, peak_flops
from vmae.synthetic.samples import sample_videos

NUM_FRAMES, STRIDE, SIZE, SHORT_SIDE, LENGTH = 16, 4, 224, 256, 300
TOLERANCE = 2  # grey levels
GOPS = (12, 250)
# Wanted of the default way, in one run on one core: how many times as fast as the published way.
TARGETS = {"h264, GOP 12": 1.8, "h264, GOP 250": 1.3, "packed / original": 2.5}
IN_WORKERS = ("original", "h264, GOP 12", "h264, GOP 250", "packed")
ASSUMED_GPU, ASSUMED_MFU = "H100", 0.4


# --- the paths ----------------------------------------------------------------------------------------------


def published_clip(path: str, rng: np.random.Generator) -> np.ndarray:
    """Clip of the published code: decord, then PIL for each frame."""
    import decord
    from PIL import Image

    reader = decord.VideoReader(path, num_threads=1, ctx=decord.cpu(0))
    indices = sample_frame_indices(len(reader), NUM_FRAMES, STRIDE, rng)
    images = [Image.fromarray(frame).convert("RGB") for frame in reader.get_batch(indices.tolist()).asnumpy()]
    box = sample_crop(*images[0].size, SIZE, rng)
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    images = [image.crop(corners).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in images])


def library_clip(path: str, rng: np.random.Generator, backend: str) -> np.ndarray:
    """Clip of this library's loader."""
    with open_video(path, backend) as reader:
        indices = sample_frame_indices(len(reader), NUM_FRAMES, STRIDE, rng)
        frames = reader.frames(indices, lambda width, height: sample_crop(width, height, SIZE, rng))
    return crop_and_resize(frames, CropBox(0, 0, frames.shape[2], frames.shape[1]), SIZE)


def make_clip(variant: str, path: str, seed: int) -> np.ndarray:
    """uint8 [NUM_FRAMES, SIZE, SIZE, 3] of a random place and crop, the same for every variant."""
    rng = np.random.default_rng(seed)
    if variant == "published":
        return published_clip(path, rng)
    return library_clip(path, rng, variant)


def find_variants() -> tuple[list[str], dict[str, str]]:
    """The variants that can run here, and why others cannot."""
    lacks = {name: backend.missing() for name, backend in BACKENDS.items() if "video" in backend.kinds}
    if lacks["decord"]:
        raise InputError(f"the published path needs decord: {lacks['decord']}")
    absent = {name: lack for name, lack in lacks.items() if lack}
    return ["published", *(name for name in lacks if name not in absent)], absent


# --- the videos ---------------------------------------------------------------------------------------------


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
                extension, encoder, _, _ = ENCODERS[codec]
                target = folder / f"{source.stem}_{codec}_{gop}{extension}"
                size = packed_size(*size_of(source), SHORT_SIDE)
                encode(source, target, encoder, group_options(codec, gop), size=size, length=LENGTH)
                kinds.setdefault(f"{codec}, GOP {gop}", []).append(str(target))
    return kinds


# --- correctness --------------------------------------------------------------------------------------------


def true_clips(path: str, seeds: Sequence[int]) -> list[np.ndarray]:
    """Clips of `make_clip`, but of the true frames, resized by PIL."""
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
                    levels = f"{errors[variant]} levels, {TOLERANCE} allowed"
                    wrong[variant] = f"{Path(path).name}: off by {levels}"
    return errors, wrong


def error_on_all_crops(paths: Sequence[str]) -> int:
    """Largest difference between the default resizing and PIL's, over every box that can be drawn."""
    worst = 0
    for path in paths:
        with open_video(path) as reader:
            frames = reader.frames([0, len(reader) // 2])
        for box in dict.fromkeys(crop_boxes(frames.shape[2], frames.shape[1], SIZE)):
            pair = [crop_and_resize(frames, box, SIZE, resize=name) for name in ("torch", "pil")]
            one, two = (clip.astype(np.int16) for clip in pair)
            worst = max(worst, int(np.abs(one - two).max()))
    return worst


# --- speed --------------------------------------------------------------------------------------------------


def cpu_seconds_of(call: Callable, *arguments: Any) -> float:
    """CPU seconds of all threads of this process, in user and system mode."""
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


def time_clips(
    variants: Sequence[str], paths: Sequence[str], seeds: Sequence[int], rounds: int
) -> dict[str, list[float]]:
    """CPU seconds a clip of each variant, for each round: the mean over videos and seeds, which all variants
    do in turn."""
    runs: dict[str, list[float]] = {variant: [] for variant in variants}
    ways = list(variants)
    for turn in range(rounds):
        sums = dict.fromkeys(variants, 0.0)
        for path in paths:
            at(f"round {turn + 1} of {rounds}, {Path(path).name}")
            for seed in seeds:
                first = turn % len(ways)
                order = ways[first:] + ways[:first]
                for variant in order:
                    sums[variant] += cpu_seconds_of(make_clip, variant, path, seed)
        for variant, total in sums.items():
            runs[variant].append(total / len(paths) / len(seeds))
    return runs


def time_parts(kind: str, paths: Sequence[str], seeds: Sequence[int]) -> PartsRecord:
    """Parts of the default way; conversion to RGB is timed alone and subtracted from the decoding."""
    import av

    seconds = np.zeros(4)  # open, decode, convert, resize
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
            seconds += (opened, decoded - converted, converted, resized)
    each = [float(value) for value in seconds / len(paths) / len(seeds) * 1e3]
    return PartsRecord(videos=kind, open=each[0], decode=each[1], convert=each[2], resize=each[3])


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


def needs(rate: float, resize_share: float, gpu_flops: float, assumption: str) -> list[FeedRecord]:
    """Clips a second that each preset needs, and cores that make them, alone and four crops to a decode.

    Args:
        rate: clips a second of one core.
        resize_share: of a clip's time; the rest is decoding.
        gpu_flops: FLOP/s of training: forward of dual masking and twice as much backward.
    """
    records = []
    for preset in PUBLISHED_PRESETS:
        macs = masked_macs(ModelConfig.preset(preset), MaskConfig())
        needed = gpu_flops / (FLOPS_PER_MAC * macs)
        record = FeedRecord(
            preset=preset,
            forward_macs=macs,
            clips_per_s_needed=needed,
            cores_1=needed / rate,
            cores_4=needed / (4 * rate / (1 + 3 * resize_share)),
            assumption=assumption,
        )
        records.append(record)
    return records


def feed_records(
    clips: Sequence[ClipRecord], parts: Sequence[PartsRecord], given: float | None
) -> list[FeedRecord]:
    """What the default way must deliver from packed videos, for `given` FLOP/s or an assumed GPU."""
    packed = next(r for r in clips if r.videos == "packed" and r.default)
    share = next(r for r in parts if r.videos == "packed")
    if packed.clip_cpu_ms is None or packed.clips_per_s_per_core is None:
        return []
    flops, source = given, "as given"
    if flops is None:
        flops = ASSUMED_MFU * (peak_flops(ASSUMED_GPU, "bfloat16") or 0)
        source = f"{ASSUMED_MFU:.0%} of a {ASSUMED_GPU}'s dense bfloat16 peak"
    assumption = f"{flops / 1e12:.0f} TFLOP/s, {source}"
    return needs(packed.clips_per_s_per_core, share.resize / packed.clip_cpu_ms.median, flops, assumption)


# --- one run ------------------------------------------------------------------------------------------------


def default_of(paths: Sequence[str]) -> str:
    """The backend that `auto` chooses for these videos."""
    with open_video(paths[0]) as reader:
        return reader.backend


def measure_kind(
    kind: str, paths: list[str], variants: list[str], seeds: range, rounds: int
) -> list[ClipRecord]:
    """Check, then time, all variants on one kind of video."""
    at(f"checking {kind}")
    errors, wrong = find_wrong(variants, paths, seeds)
    right = [variant for variant in variants if variant not in wrong]
    runs = time_clips(right, paths, seeds, rounds)
    records, default = [], default_of(paths)
    for variant in variants:
        times = None
        if variant in runs:
            times = Runs.of([value * 1e3 for value in runs[variant]])
        record = ClipRecord(
            videos=kind,
            variant=variant,
            default=variant == default,
            error_levels=errors[variant],
            wrong=wrong.get(variant),
            clip_cpu_ms=times,
            clips_per_s_per_core=1e3 / times.median if times else None,
        )
        records.append(record)
    return records


def compare(records: Sequence[ClipRecord]) -> list[WayRatio]:
    """Every variant over the published way on the same videos, and on the originals for packed ones, round by
    round."""
    published = {r.videos: r.clip_cpu_ms.runs for r in records if r.variant == "published" and r.clip_cpu_ms}
    ratios = []
    for r in records:
        for base in (r.videos, "original") if r.videos == "packed" else (r.videos,):
            same = r.variant == "published" and base == r.videos
            if r.clip_cpu_ms is None or base not in published or same:
                continue
            name = r.videos if base == r.videos else f"{r.videos} / {base}"
            speedup = Spread.of_ratios(published[base], r.clip_cpu_ms.runs)
            target = TARGETS.get(name) if r.default else None
            ratio = WayRatio(
                videos=name,
                variant=r.variant,
                default=r.default,
                speedup=speedup,
                target=target,
                met=None if target is None else speedup.median >= target,
            )
            ratios.append(ratio)
    return ratios


def measure_workers(
    kinds: dict[str, list[str]], clips: Sequence[ClipRecord], seeds: range, counts: list[int], span: float
) -> list[WorkersRecord]:
    """The published and the default way in processes, on some kinds of video."""
    timed, records = {(r.videos, r.variant) for r in clips if r.clip_cpu_ms}, []
    for kind in IN_WORKERS:
        for variant in ("published", default_of(kinds[kind])):
            for count in counts if (kind, variant) in timed else ():
                at(f"{kind}, {variant}, {count} workers")
                rate = time_workers(variant, kinds[kind], seeds, count, span)
                record = WorkersRecord(videos=kind, variant=variant, workers=count, clips_per_s=rate)
                records.append(record)
    return records


def measure(args: argparse.Namespace, variants: list[str]) -> DataResult:
    """Everything, in a folder that is removed."""
    sources = sample_videos()[2:] if args.quick else sample_videos()
    seeds = range(args.clips)
    clips: list[ClipRecord] = []
    parts: list[PartsRecord] = []
    with tempfile.TemporaryDirectory() as folder:
        # Before decord is imported, whose own libvpx would replace PyAV's.
        kinds = make_videos(Path(folder), sources, ("h264",) if args.quick else tuple(ENCODERS))
        with one_core():
            at("resizing, checked against PIL")
            crops = error_on_all_crops(kinds["h264, GOP 250"])
            if crops > TOLERANCE:
                levels = f"{crops} grey levels off PIL's, {TOLERANCE} allowed"
                raise RuntimeError(f"resizing is {levels}: nothing is timed")
            for kind, paths in kinds.items():
                clips += measure_kind(kind, paths, variants, seeds, args.rounds)
                at(f"parts of {kind}")
                parts.append(time_parts(kind, paths, seeds))
                so_far = DataResult(
                    environment=find_environment(),
                    records=[CropsRecord(error_levels=crops), *clips, *parts],
                    ratios=compare(clips),
                )
                write_partial(so_far, args.json)
        workers = measure_workers(kinds, clips, seeds, args.workers, 1.0 if args.quick else 4.0)
    feeds = feed_records(clips, parts, args.gpu_flops)
    return DataResult(
        environment=find_environment(),
        records=[CropsRecord(error_levels=crops), *clips, *parts, *workers, *feeds],
        ratios=compare(clips),
    )


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    variants, absent = find_variants()
    known = find_environment()
    machine = f"{known.cpu}, {known.cores} cores, torch {known.torch}"
    print(f"{machine}; {NUM_FRAMES} frames, stride {STRIDE}, {SIZE} x {SIZE}")
    for name, reason in absent.items():
        print(f"not here: {name} ({reason})")
    result = replace(measure(args, variants), absent=absent)
    show(*result.tables())
    clips = [r for r in result.records if isinstance(r, ClipRecord)]
    say_wrong({f"{r.variant} on {r.videos}": r.wrong for r in clips if r.wrong})
    write_result(result, args.json)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="two small clips, H.264 only")
    add("--rounds", type=int, help="times that every clip is made (default: 5, quick 3)")
    add("--clips", type=int, help="places in each video (default: 4, quick 2)")
    add("--workers", type=int, nargs="+", metavar="N", help="worker counts (default: 1 and every core)")
    assumed = f"FLOP/s assumed of a GPU ({ASSUMED_MFU:.0%} of a {ASSUMED_GPU}'s)".replace("%", "%%")
    add("--gpu-flops", type=float, help=assumed)
    add_json(parser)
    args = parser.parse_args(argv)
    if args.quick:
        set_defaults(args, dict(rounds=3, clips=2))
    set_defaults(args, dict(rounds=5, clips=4))
    args.workers = args.workers or sorted({1, os.cpu_count() or 1})
    check_least(args, "rounds", "clips", "workers")
    if args.gpu_flops is not None and args.gpu_flops <= 0:
        raise InputError("--gpu-flops must be above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    def find_and_run() -> int:
        find_backends("video", "auto")
        return run(parse_args(argv))

    return exit_code(find_and_run)


if __name__ == "__main__":
    raise SystemExit(main())
