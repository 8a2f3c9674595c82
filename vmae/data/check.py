"""`python -m vmae check-data LIST`: open every video of a list before a run does.

Each video is opened, and one clip of it is decoded, in worker processes that are replaced if a file hangs or
crashes them. What comes out: a table; `report.json` with a record for each video; `histogram.png`;
`clean.txt`, the list without the bad ones, its labels kept. A list that cannot be read is explained instead.
A folder is checked like a list.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vmae.data.augment import CropBox, crop_and_resize, sample_crop
from vmae.data.containers import container_kind
from vmae.data.decode import DecodeError, find_backends, open_video, video_backends
from vmae.data.files import Unanswered, ask_files
from vmae.data.inspection import inspect_video
from vmae.data.labels import LABELLED, AnyList, add_labelled_argument, read_any_list
from vmae.data.manifest import (
    VideoEntry,
    check_listable,
    foreign_table,
    is_comment,
    read_text,
    split_lines,
    unquote,
    write_list,
)
from vmae.data.orientation import UPRIGHT, Orientation
from vmae.data.sampling import sample_frame_indices
from vmae.data.shards.entries import DamagedShard, ShardEntry
from vmae.data.shards.index import ShardIndex, write_index
from vmae.data.shards.opening import stored_file
from vmae.data.shards.source import is_address
from vmae.data.video_reader import memory_as_decode_error
from vmae.data.workers import VideoTask, WorkerPool
from vmae.errors import InputError
from vmae.settings import PROCESSES, Real

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
) -> dict[str, Any]:
    """Decode, cut and resize one clip as a run does; says how long that took (`clip_s`) and what was opened.

    Raises:
        DecodeError: see `open_video`.
    """
    width = height = 0

    def draw(*shape: int) -> CropBox:
        nonlocal width, height
        width, height = shape
        return sample_crop(width, height, size, rng)

    find_backends(entry.kind, backend)  # imports the decoders, which is no part of a clip's time
    began = time.perf_counter()
    with open_video(entry, backend) as reader:
        indices = sample_frame_indices(len(reader), num_frames, entry.stride or stride, rng)
        frames = reader.frames(indices, draw)
        crop_and_resize(frames, CropBox(0, 0, frames.shape[2], frames.shape[1]), size)
        seconds = time.perf_counter() - began
        about = {"library": reader.backend, "frames": len(reader), "fps": reader.fps}
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


def check_entry(entry: VideoEntry, backend: str = "auto") -> dict[str, Any]:
    """The record of one video: what it is, or its `error` and the `library` that gave it."""
    record: dict[str, Any] = {"path": entry.path, "line": entry.line, "kind": entry.kind, "error": None}
    try:
        with memory_as_decode_error(entry.path):
            record |= decode_clip(entry, np.random.default_rng(entry.line), backend=backend)
            if entry.kind == "video":
                record |= _about_file(entry)
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

    def __init__(self, entries: Sequence[VideoEntry], backend: str) -> None:
        super().__init__()
        self.entries, self.backend = entries, backend

    def __getitem__(self, video: int) -> dict[str, Any]:
        entry = self.entries[video]
        if video in self.blocked:
            about = {"path": entry.path, "line": entry.line, "kind": entry.kind}
            return {**about, "error": self.blocked[video], "library": "worker"}
        self.watch(video)
        return check_entry(entry, self.backend)


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
    for kind in {entry.kind for entry in entries}:
        find_backends(kind, backend)
    pool = WorkerPool(
        _Checker(entries, backend), iter(range(len(entries))), count=workers, prefetch=4, hang_s=hang_s
    )
    try:
        return list(tqdm(pool, total=len(entries), unit="video", disable=None if progress else True))
    finally:
        pool.close()


# --- A list that cannot be read ---


def explain_list(path: str | Path, data_root: str | None = None) -> list[str]:
    """What is likely wrong with a list file, in sentences; empty where nothing is found."""
    try:
        lines = [unquote(line) for line in split_lines(read_text(path)) if line and not is_comment(line)]
    except InputError:
        return []
    if lines and foreign_table(lines[0]):
        return []
    total, found = len(lines), []

    def most(pattern: str) -> bool:
        return sum(re.search(pattern, line) is not None for line in lines) > total / 2

    for delimiter, pattern in ((";", r";(?!\d+(;\d+)*$)"), ("|", r"\|")):  # several labels are 3;17
        if most(pattern):
            found.append(f"columns seem to be apart by {delimiter!r}; use a blank or a comma")
    if most(r"""^["']"""):
        found.append("paths stand in quotes; write them without")
    if lines and re.fullmatch(r"[A-Za-z_]+([,;\s]+[A-Za-z_]+)+", lines[0]) and most(r"\d\s*$|\.\w{2,4}$"):
        found.append(
            f"the first line, {lines[0]!r}, looks like a table's head; remove it, or put # and a blank "
            "before it"
        )
    if most(r"\\"):
        found.append("paths have backslashes; write / between folders")
    return found + _explain_roots(lines, Path(path), data_root)


def _explain_roots(lines: list[str], path: Path, data_root: str | None) -> list[str]:
    names = [re.split(r"[,;|]|\s+-?\d+(?=\s|$)", line.strip("\"'"))[0].strip("\"' ") for line in lines[:50]]
    start = path.resolve().parent
    bases = [Path(data_root)] if data_root else [Path("."), start]
    missing = [name for name in names if not any((base / name).exists() for base in bases)]
    for name in missing:
        parts = Path(name).parts
        for base in dict.fromkeys([*bases, start, *list(start.parents)[:3]]):
            for cut in range(len(parts)):
                if (base / Path(*parts[cut:])).exists():
                    if cut == 0:
                        return [f"paths start from another folder; try --data-root {base}"]
                    return [
                        f"{name!r} is there as {str(base / Path(*parts[cut:]))!r}: the paths' beginnings "
                        "differ"
                    ]
    if names and len(missing) == len(names):
        return [
            f"none of the first {len(names)} paths exists; --data-root sets the folder that relative paths "
            "start from"
        ]
    return []


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
    lines = [
        f"{len(records)} videos: {len(good)} good, {len(bad)} bad ({len(bad) / max(len(records), 1):.1%})"
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
    for title, key in (("codecs", "codec"), ("containers", "container"), ("decoded with", "library")):
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
    if good:
        rates = [1 / record["clip_s"] for record in good]
        mean = len(rates) / sum(record["clip_s"] for record in good)
        lines.append(f"clips a second, one process: {mean:.1f} (slowest video {min(rates):.1f})")
    long_gops = [record for record in good if record.get("gop", 0) > 60]
    if long_gops:
        lines.append(
            f"{len(long_gops)} videos have key frames more than 60 apart: slow clips; `python -m vmae pack` "
            "helps"
        )
    return lines + _notes(good)


_NOTES = (
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
    """Durations, frame rates, GOPs and decode rates of the good videos."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [record for record in records if not record["error"]]
    panels = {
        "seconds": [record["seconds"] for record in good if record["seconds"]],
        "frames a second": [record["fps"] for record in good if record["fps"]],
        "frames from key frame to key frame": [record["gop"] for record in good if record.get("gop")],
        "ms for a clip": [1e3 * record["clip_s"] for record in good],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3))
    for axis, (title, values) in zip(axes, panels.items()):
        axis.hist(values, bins=30, color="#1f5fa8")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("videos")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "list",
        metavar="LIST",
        help="list of videos and frame folders, labelled or not, a folder of videos, or an index of shards",
    )
    parser.add_argument("--data-root", metavar="DIR", help="where the list's relative paths start")
    add_labelled_argument(parser)
    parser.add_argument(
        "--output", metavar="DIR", help="where the report goes (default: LIST-check beside the list)"
    )
    names = ", ".join(("auto", *video_backends()))
    parser.add_argument("--backend", default="auto", help=f"decoder: {names} (auto)")
    parser.add_argument(
        "--workers", type=PROCESSES, default=os.cpu_count() or 1, help="processes (one for each core)"
    )
    parser.add_argument(
        "--hang", type=Real(above=0, most=10**6), default=120.0, help="seconds that a video may take (120)"
    )


def run(args: argparse.Namespace) -> int:
    """The command; 1 where a video is bad."""
    source = Path(args.list)
    if is_address(args.list) and not args.output:
        raise InputError(f"{args.list} lies in a store: --output DIR says where the report goes")
    found = _read_with_advice(args.list, args.data_root, LABELLED[args.labelled])
    clean = "clean.vmae" if isinstance(found.entries, ShardIndex) else "clean.txt"
    if source.is_dir():  # before hours of reading
        for entry in found.entries:
            check_listable(os.path.abspath(entry.path))
    records = check_entries(found.entries, backend=args.backend, workers=args.workers, hang_s=args.hang)
    for record, labels in zip(records, found.labels, strict=True):
        record |= {} if labels is None else {"labels": list(labels)}
    missing = {"path": None, "kind": None, "library": None}
    records += [{**missing, "line": line, "error": problem} for line, problem in found.problems]
    records.sort(key=lambda record: record["line"])
    folder = Path(args.output) if args.output else _report_folder(source)
    bad = [record for record in records if record["error"]]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(
            json.dumps({"list": args.list, "videos": records}, indent=1) + "\n"
        )
        write_clean_list(source, folder / clean, found, {record["line"] for record in bad}, args.data_root)
        plot_histogram(folder / "histogram.png", records)
    except OSError as error:
        raise InputError(f"cannot write the report to {str(folder)!r}: {error.strerror}") from None
    print("\n".join(summarise(records)))
    for record in bad[:10]:
        line = f"line {record['line']}: " if clean == "clean.txt" and not source.is_dir() else ""
        print(f"bad: {line}{record['error']}")
    if len(bad) > 10:
        print(f"bad: {len(bad) - 10} more")
    print(f"report.json, histogram.png and {clean} ({len(records) - len(bad)} videos) are in {folder}")
    return 1 if bad else 0


def _report_folder(source: Path) -> Path:
    """`NAME-check` beside the list or folder NAME."""
    if source.is_dir():
        source = source.resolve()
        return source.with_name(f"{source.name}-check")
    return source.with_name(f"{source.stem}-check")


def _read_with_advice(source: str | Path, data_root: str | None, labelled: bool | None) -> AnyList:
    """The list; prints, or raises with, what is likely wrong with it."""
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
    for hint in hints:
        print(f"likely: {hint}")
    return found
