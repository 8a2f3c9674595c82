"""`python -m vmae check-data LIST`: open every video of a list before a run does.

Each video is opened, and one clip of it is decoded, in worker processes that are replaced if a file hangs or
crashes them. What comes out: a table, and

    report.json      a record for each video
    histogram.png    durations, frame rates, groups of pictures
    clean.txt        the list without the bad ones, its labels kept
    timings.json     seconds that a clip of each video took

All but the times depend on the list and the decoder alone: ranks and parts (`--part i/n`, then `--merge`)
give the same. A check that was stopped goes on with the videos that are left; one that ended begins anew,
since files may have been mended. A list that cannot be read is explained instead. A folder is checked like a
list.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from vmae.config import ModelConfig
from vmae.data.augment import CropBox, crop_and_resize, sample_crop
from vmae.data.channels import RGB, channel_moments, describe_statistics, is_stack, reading_kind
from vmae.data.containers import container_kind
from vmae.data.decode import DecodeError, find_backends, open_video, video_backends
from vmae.data.files import Unanswered, ask_files
from vmae.data.image_lists import read_images_with_problems
from vmae.data.inspection import inspect_video
from vmae.data.labels import LABELLED, AnyList, add_labelled_argument, read_any_list
from vmae.data.list_hints import explain_list
from vmae.data.manifest import (
    VideoEntry,
    check_listable,
    read_text,
    split_lines,
    unquote,
    write_list,
)
from vmae.data.orientation import UPRIGHT, Orientation
from vmae.data.part_folder import PartFolder, Records
from vmae.data.parts import add_part_arguments
from vmae.data.ranks import Ranks, open_ranks
from vmae.data.readers.image import inspect_image
from vmae.data.sampling import sample_frame_indices
from vmae.data.shards.entries import DamagedShard, ShardEntry, is_address
from vmae.data.shards.index import ShardIndex, write_index
from vmae.data.shards.opening import stored_file
from vmae.data.shards.reading import ask_ahead
from vmae.data.video_reader import memory_as_decode_error
from vmae.data.workers import VideoTask, WorkerPool
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import read_json
from vmae.files.limits import whole_cores
from vmae.settings import PROCESSES, Real, limits

REPORT, TIMINGS = "report.json", "timings.json"
_ROTATIONS = {  # degrees clockwise
    Orientation(transpose=True, mirror_x=True): 90,
    Orientation(mirror_x=True, mirror_y=True): 180,
    Orientation(transpose=True, mirror_y=True): 270,
}


def decode_clip(
    entry: VideoEntry,
    rng: np.random.Generator,
    *,
    backend: str = "auto",
    num_frames: int = 16,
    stride: int = 4,
    size: int = 224,
    channels: int | None = None,
    statistics: bool = False,
) -> dict[str, Any]:
    """Decode, cut and resize one clip as a run does; says how long that took (`clip_s`) and what was opened.

    Args:
        channels: of the frames; None takes those of a stack, and RGB of all else.
        statistics: add the mean of each channel's values and of their squares, over what counts as 1.

    Raises:
        DecodeError: see `open_video`.
    """
    width = height = 0

    def draw(*shape: int) -> CropBox:
        nonlocal width, height
        width, height = shape
        return sample_crop(width, height, size, rng)

    find_backends(reading_kind(entry), backend)  # imports the decoders, which is no part of a clip's time
    began = time.perf_counter()
    wanted = channels or (None if is_stack(entry) else RGB)
    with open_video(entry, backend) as reader:
        reader.channels = wanted
        indices = sample_frame_indices(len(reader), num_frames, entry.stride or stride, rng)
        frames = reader.frames(indices, draw)
        crop_and_resize(frames, CropBox(0, 0, frames.shape[2], frames.shape[1]), size)
        seconds = time.perf_counter() - began
        about = {"library": reader.backend, "frames": len(reader), "fps": reader.fps}
    if wanted != RGB:
        about |= {"channels": frames.shape[3], "dtype": str(frames.dtype)}
    if statistics:
        about |= channel_moments(frames)
    return {**about, "width": width, "height": height, "clip_s": seconds}


def inspect_stream(path: str) -> dict[str, Any]:
    """What PyAV finds in a video beside its frames; empty where it cannot read it, or is not installed.

    Returns:
        `codec`, `gop` (median frames from one key frame to the next), `open_gop`, `video_streams`, and where
            pixels are not
        shown as they are stored: `rotation` (90, 180 or 270 degrees clockwise, or "mirrored") and
            `sample_aspect` ("4:3").
    """
    try:
        found = inspect_video(path)
    except (DecodeError, ImportError):  # the decoder that a run uses has the say whether the file is bad
        return {}
    about = {
        "codec": found.codec,
        "open_gop": found.open_gop,
        "video_streams": found.streams,
        "gop": found.gop,
    }
    if found.orientation != UPRIGHT:
        about["rotation"] = _ROTATIONS.get(found.orientation, "mirrored")
    if found.aspect is not None:
        about["sample_aspect"] = f"{found.aspect.numerator}:{found.aspect.denominator}"
    return {name: value for name, value in about.items() if value is not None}


def check_entry(entry: VideoEntry, backend: str = "auto", **options: Any) -> dict[str, Any]:
    """The record of one video: what it is, or its `error` and the `library` that gave it.

    Args:
        options: of `decode_clip`.
    """
    record: dict[str, Any] = {"path": entry.path, "line": entry.line, "kind": entry.kind, "error": None}
    try:
        with memory_as_decode_error(entry.path):
            record |= decode_clip(entry, np.random.default_rng(entry.line), backend=backend, **options)
            if is_stack(entry):
                record["bytes"] = os.path.getsize(entry.path)
            elif entry.kind == "video":
                record |= _about_file(entry)
            elif entry.kind == "image":
                record |= {"bytes": os.path.getsize(entry.path), **inspect_image(entry.path)}
    except DecodeError as error:
        return record | {"error": str(error), "library": error.library}
    except DamagedShard as error:  # here it is what is looked for
        return record | {"error": str(error), "library": None}
    record["seconds"] = record["frames"] / record["fps"] if record["fps"] else None
    return record


def _about_file(entry: VideoEntry) -> dict[str, Any]:
    """What a video's file is, beside its frames."""
    if isinstance(entry, ShardEntry):
        with stored_file(entry) as path:
            kind, stream = container_kind(path), inspect_stream(path)
        return {"bytes": entry.video.length, "container": kind, **stream}
    kind, stream = container_kind(entry.path), inspect_stream(entry.path)
    return {"bytes": os.path.getsize(entry.path), "container": kind, **stream}


class _Checker(VideoTask):
    """What runs in the workers."""

    def __init__(self, entries: Sequence[VideoEntry], backend: str, clip: dict[str, Any]) -> None:
        super().__init__()
        self.entries, self.backend, self.clip = entries, backend, clip

    def ahead(self, video: int) -> None:
        ask_ahead(self.entries[video])

    def __getitem__(self, video: int) -> dict[str, Any]:
        entry = self.entries[video]
        if video in self.blocked:
            about = {"path": entry.path, "line": entry.line, "kind": entry.kind}
            return {**about, "error": self.blocked[video], "library": "worker"}
        self.watch(video)
        return check_entry(entry, self.backend, **self.clip)


def check_entries(
    entries: Sequence[VideoEntry],
    *,
    backend: str = "auto",
    workers: int = 1,
    hang_s: float = 120.0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Records of all entries, in order; see `check_entry`.

    Raises:
        InputError: an unknown backend, or one that is not installed.
    """
    options: dict[str, Any] = {"backend": backend, "workers": workers, "hang_s": hang_s, "progress": progress}
    return [record for _, record in check_each(entries, range(len(entries)), **options)]


def check_each(
    entries: Sequence[VideoEntry],
    numbers: Sequence[int],
    *,
    backend: str,
    workers: int,
    hang_s: float,
    progress: bool,
    **clip: Any,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of the entries with these numbers, in order; see `check_entries`, and `decode_clip`
    for `clip`."""
    for kind in {reading_kind(entries[number]) for number in numbers}:
        find_backends(kind, backend)
    if not numbers:
        return
    pool = WorkerPool(
        _Checker(entries, backend, clip), iter(numbers), count=workers, prefetch=4, hang_s=hang_s
    )
    try:
        yield from zip(
            numbers, tqdm(pool, total=len(numbers), unit="video", disable=None if progress else True)
        )
    finally:
        pool.close()


# --- What comes out ---


_COLUMNS = (
    ("frames", "frames", 0),
    ("frames a second", "fps", 2),
    ("GOP", "gop", 0),
    ("width", "width", 0),
    ("height", "height", 0),
)


def summarise(records: Sequence[dict[str, Any]]) -> list[str]:
    """The table: what the videos are, and how fast they decode."""
    good = [record for record in records if not record["error"]]
    bad = [record for record in records if record["error"]]
    kind = "images" if all(record["kind"] == "image" for record in good) and good else "videos"
    lines = [
        f"{len(records)} {kind}: {len(good)} good, {len(bad)} bad ({len(bad) / max(len(records), 1):.1%})"
    ]
    seconds = [record["seconds"] for record in good if record["seconds"]]
    if seconds:
        lines.append(
            f"hours: {sum(seconds) / 3600:.3g}; seconds a video: median {statistics.median(seconds):.3g}"
        )
    labels = Counter(label for record in good for label in record.get("labels") or ())
    if labels:
        rarest, count = min(labels.items(), key=lambda pair: (pair[1], pair[0]))
        which = f"{len(labels)} classes from {min(labels)} to {max(labels)}"
        lines.append(f"labels: {which}; the rarest, {rarest}, has {count} videos")
    for title, key in (
        ("codecs", "codec"),
        ("containers", "container"),
        ("channels", "channels"),
        ("values", "dtype"),
        ("decoded with", "library"),
    ):
        counts = Counter(record[key] for record in good if record.get(key))
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    for title, key, digits in _COLUMNS:
        values = [record[key] for record in good if record.get(key)]
        if values:
            low, middle, high = (
                f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values))
            )
            lines.append(f"{title}: {low} to {high}, median {middle}")
    times = [record["clip_s"] for record in good if record.get("clip_s")]
    if times:
        rates = [1 / seconds for seconds in times]
        mean = len(rates) / sum(times)
        lines.append(f"clips a second, one process: {mean:.1f} (slowest video {min(rates):.1f})")
    lines += describe_statistics(good)
    long_gops = [record for record in good if record.get("gop", 0) > 60]
    if long_gops:
        lines.append(
            f"{len(long_gops)} videos have key frames more than 60 apart: slow clips; `python -m vmae pack` "
            "helps"
        )
    return lines + _notes(good)


_NOTES = (
    (
        "pixels",
        "have other pixels than RGB of 8 bits",
        "each is shown in it: what is transparent on white, colour profiles left out",
    ),
    (
        "rotation",
        "are displayed rotated or mirrored",
        "every reader turns them, `python -m vmae pack` for good",
    ),
    ("sample_aspect", "have pixels that are not square", "frames are taken as they are stored"),
    ("video_streams", "have several video streams", "the one that FFmpeg takes for the best is read"),
)


def _notes(good: Sequence[dict[str, Any]]) -> list[str]:
    """What is worth knowing of videos that can be read."""
    lines = []
    for key, what, then in _NOTES:
        counts = Counter(record[key] for record in good if record.get(key) not in (None, 1))
        if counts:
            kinds = ", ".join(
                f"{kind}: {count}" for kind, count in sorted(counts.items(), key=lambda pair: str(pair[0]))
            )
            lines.append(f"{counts.total()} videos {what} ({kinds}); {then}")
    return lines


def write_clean_list(
    source: Path, target: Path, found: AnyList, bad_lines: set[int], data_root: str | None = None
) -> None:
    """The list's text without the lines of bad videos; a folder's good videos as a list, an index of the good
    ones.

    Relative paths that start from the list's own folder become absolute ones: the new list is in another
    folder.
    """
    if isinstance(found.entries, ShardIndex):
        numbers = range(len(found.entries))
        write_index(target, found.entries.chosen([n for n in numbers if n + 1 not in bad_lines]))
        return
    if source.is_dir():
        write_list(target, [entry for entry in found.entries if entry.line not in bad_lines])
        return
    lines, base = split_lines(read_text(source)), os.path.dirname(str(source))
    for entry in found.entries if base and data_root is None else ():
        written, content = entry.path.removeprefix(os.path.join(base, "")), unquote(lines[entry.line - 1])
        if not content.startswith(entry.path) and content.startswith(written):
            lines[entry.line - 1] = os.path.abspath(entry.path) + content[len(written) :]
    kept = [line for number, line in enumerate(lines, 1) if number not in bad_lines]
    target.write_text("\n".join(kept), encoding="utf-8")


def plot_histogram(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Durations, frame rates and groups of pictures of the good videos."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [record for record in records if not record["error"]]
    panels = {
        "seconds": [record["seconds"] for record in good if record["seconds"]],
        "frames a second": [record["fps"] for record in good if record["fps"]],
        "frames from key frame to key frame": [record["gop"] for record in good if record.get("gop")],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(10.5, 3))
    for axis, (title, values) in zip(axes, panels.items()):
        axis.hist(values, bins=30, color="#1f5fa8")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("videos")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _write_lines(file: IO, lines: list[str]) -> None:
    file.writelines(lines)


def write_report(
    folder: Path, source: str | Path, settings: dict[str, Any], records: Sequence[dict[str, Any]]
) -> None:
    """Write what was found, and apart from it what took how long."""
    videos = [{name: value for name, value in record.items() if name != "clip_s"} for record in records]
    times = [record.get("clip_s") for record in records]
    report = {"list": str(source), "settings": settings, "videos": videos}
    for name, content in ((TIMINGS, {"clip_s": times}), (REPORT, report)):
        lines = [json.dumps(content, indent=1), "\n"]
        write_atomically(folder / name, functools.partial(_write_lines, lines=lines), binary=False)
    plot_histogram(folder / "histogram.png", records)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "list",
        metavar="LIST",
        help="list of videos and frame folders, labelled or not, a folder of videos, or an index of shards",
    )
    parser.add_argument("--data-root", metavar="DIR", help="where the list's relative paths start")
    add_labelled_argument(parser)
    parser.add_argument(
        "--images",
        action="store_true",
        help="LIST names single images, as that of a mix's source with `kind: images`",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="where the report goes (default: LIST-check beside the list)"
    )
    names = ", ".join(("auto", *video_backends()))
    parser.add_argument("--backend", default="auto", help=f"decoder: {names} (auto)")
    parser.add_argument(
        "--workers", type=PROCESSES, default=whole_cores(), help="processes (one for each core)"
    )
    parser.add_argument(
        "--hang", type=Real(above=0, most=10**6), default=120.0, help="seconds that a video may take (120)"
    )
    parser.add_argument(
        "--in-channels",
        type=limits(ModelConfig, "in_channels"),
        help="channels that frames must have (those of a numpy stack; 3 of all else)",
    )
    parser.add_argument(
        "--statistics",
        action="store_true",
        help="mean and deviation of each channel, for --channel-mean and --channel-std, over a clip a video",
    )
    add_part_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """The command; 1 where a video is bad."""
    if is_address(args.list) and not args.output:
        raise InputError("the list lies in a store: --output DIR says where the report goes")
    with open_ranks() as ranks:
        source = Path(args.list)
        if args.images:
            entries, problems = read_images_with_problems(args.list, args.data_root)
            found = AnyList(entries, [None] * len(entries), False, problems)
        else:
            found = _read_with_advice(args.list, args.data_root, LABELLED[args.labelled], ranks.is_main)
        if source.is_dir():  # before hours of reading
            for entry in found.entries:
                check_listable(os.path.abspath(entry.path))
        folder = Path(args.output) if args.output else _report_folder(source)
        about = {"backend": args.backend, "videos": len(found.entries), "list": _list_hash(found)}
        if args.in_channels or args.statistics:
            about |= {"in_channels": args.in_channels, "statistics": args.statistics}
        place = PartFolder(
            folder, args.part, "a check of videos", "an unfinished check of another list", "check.json"
        )
        records = Records(place, "videos.jsonl", "video", "videos-{}.part.jsonl")
        with place.hold(ranks, merge=args.merge):
            earlier = ranks.on_main(lambda: _begin(records, about, args.merge))
            if earlier is None:
                _check_share(records, found.entries, args, ranks)
            return ranks.on_main(lambda: _end(records, earlier, source, found, about, args))


def _begin(records: Records, about: dict[str, Any], merge: bool) -> list[dict[str, Any]] | None:
    """Make the folder that of this check; None where videos are to be checked, or else (`merge`) the records
    of all videos."""
    place = records.place
    if not merge:
        if place.part.whole and not place.is_of(about):
            print(f"note: an unfinished check of another list in {place.folder} is dropped", flush=True)
            records.clear()
        place.settle(about)
        records.collect()
        return None
    if not place.found() and not records.read() and (joined := _read_report(place.folder, about)) is not None:
        return joined  # done before
    place.settle(about)
    return records.join(about["videos"], "videos")


def _check_share(
    records: Records, entries: Sequence[VideoEntry], args: argparse.Namespace, ranks: Ranks
) -> None:
    """Check this rank's videos, and write a record of each at once."""
    done = ranks.on_main(lambda: {record["video"] for record in records.read()})
    left = [number for number in records.place.share(len(entries)) if number not in done]
    if done and ranks.is_main:
        print(f"goes on: {len(left)} videos are left", flush=True)
    options: dict[str, Any] = {"backend": args.backend, "workers": args.workers, "hang_s": args.hang}
    options |= {"channels": args.in_channels, "statistics": args.statistics}
    ranks.barrier()  # rank 0 has merged the files of an earlier start
    with records.writer(ranks.rank) as write:
        mine = left[ranks.rank :: ranks.world_size]
        for number, record in check_each(entries, mine, progress=ranks.is_main, **options):
            write({"video": number, **record})
    ranks.barrier()


def _end(
    records: Records,
    found_by: list[dict[str, Any]] | None,
    source: Path,
    found: AnyList,
    about: dict[str, Any],
    args: argparse.Namespace,
) -> int:
    """Print what was found, and of a whole list write it down; 1 where a video is bad.

    Args:
        found_by: records of all videos, where they are known; None: those of this part.
    """
    place = records.place
    if found_by is None:
        records.collect()
        own = set(place.share(len(found.entries)))
        found_by = [record for record in records.read() if record["video"] in own]
    every = []
    for record in found_by:
        labels = found.labels[record["video"]]
        about_video = {name: value for name, value in record.items() if name != "video"}
        every.append(about_video | ({} if labels is None else {"labels": list(labels)}))
    if place.part.whole:
        missing = {"path": None, "kind": None, "library": None}
        every += [{**missing, "line": line, "error": problem} for line, problem in found.problems]
        every.sort(key=lambda record: record["line"])
    bad = [record for record in every if record["error"]]
    clean = "clean.vmae" if isinstance(found.entries, ShardIndex) else "clean.txt"
    if place.part.whole:
        try:
            write_report(place.folder, args.list, about, every)
            bad_lines = {record["line"] for record in bad}
            write_clean_list(source, place.folder / clean, found, bad_lines, args.data_root)
        except OSError as error:
            raise InputError(f"cannot write the report to {str(place.folder)!r}: {error.strerror}") from None
        records.clear()  # files may be mended: the next check reads them again
    print("\n".join(summarise(every)))
    for record in bad[:10]:
        line = f"line {record['line']}: " if clean == "clean.txt" and not source.is_dir() else ""
        print(f"bad: {line}{record['error']}")
    if len(bad) > 10:
        print(f"bad: {len(bad) - 10} more")
    if place.part.whole:
        kept = len(every) - len(bad)
        print(f"{REPORT}, histogram.png and {clean} ({kept} videos) are in {place.folder}")
    else:
        print(f"part {place.part} is done: {place.own}")
    return 1 if bad else 0


def _list_hash(found: AnyList) -> str:
    """SHA-256 of the entries, their labels, and the lines that are none."""
    total = hashlib.sha256()
    for entry, labels in zip(found.entries, found.labels, strict=True):
        line = (entry.path, entry.kind, entry.line, entry.stride, entry.start, entry.total, entry.pattern)
        total.update(f"{line} {labels}\n".encode("utf-8", "surrogatepass"))
    total.update(f"{list(found.problems)}".encode("utf-8", "surrogatepass"))
    return total.hexdigest()


def _read_report(folder: Path, about: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Records of an earlier check of the same list; None where there is none."""
    if not (folder / REPORT).exists():
        return None
    report = read_json(folder / REPORT, "report")
    if not isinstance(report, dict) or report.get("settings") != about:
        return None
    times = read_json(folder / TIMINGS, "table of times")["clip_s"]
    records = [
        record if seconds is None else {**record, "clip_s": seconds}
        for record, seconds in zip(report["videos"], times)
    ]
    numbers = iter(range(len(records)))
    return [{"video": next(numbers), **record} for record in records if record["path"] is not None]


def _report_folder(source: Path) -> Path:
    """`NAME-check` beside the list or folder NAME."""
    if source.is_dir():
        source = source.resolve()
        return source.with_name(f"{source.name}-check")
    return source.with_name(f"{source.stem}-check")


def _read_with_advice(
    source: str | Path, data_root: str | None, labelled: bool | None, show: bool
) -> AnyList:
    """The list; prints (`show`), or raises with, what is likely wrong with it."""
    try:
        found = read_any_list(source, data_root, labelled)
        failure = None
    except InputError as error:
        found, failure = AnyList([], [], False, []), str(error)
    if found.problems and not found.entries:
        line, problem = found.problems[0]
        failure = f"no entry of list file {str(source)!r} can be used; the first, line {line}: {problem}"
    hints: list[str] = []
    if found.problems or failure:
        with contextlib.suppress(Unanswered):  # it looks where the list's paths may start from, too
            (hints,) = ask_files(lambda source: explain_list(source, data_root), [source])
    if failure:
        raise InputError("\n  likely: ".join([failure, *hints]))
    for hint in hints if show else ():
        print(f"likely: {hint}")
    return found
