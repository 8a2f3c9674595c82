"""`vmae pack LIST OUT`: re-encode a list's videos into a folder and a list, or into shards and an index."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmae.data.channels import refuse_stacks
from vmae.data.decode import open_video
from vmae.data.labels import LABELLED, add_labelled_argument, read_any_list
from vmae.data.manifest import VideoEntry, raise_problems
from vmae.data.mix import MIX_SUFFIXES, read_data
from vmae.data.pack import PackConfig, draw_phase, pack_video
from vmae.data.pack_gain import report_gain
from vmae.data.pack_lists import LIST_NAME, merge_list, pack_list, pack_part, pack_place
from vmae.data.parts import add_part_arguments
from vmae.data.quarantine import QUARANTINE_NAME
from vmae.data.ranks import Ranks
from vmae.data.shards.entries import is_address
from vmae.data.shards.facts import indexes_in
from vmae.data.shards.index import INDEX_NAME, is_index
from vmae.data.shards.packing import ShardJob, Stored, join_shards, pack_shards
from vmae.data.shards.plan import Origin
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.limits import whole_cores
from vmae.settings import PROCESSES, Whole, limits

REPORT_NAME = "report.json"
SHARD_MIB, MOST_MIB = 1024, 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "list",
        metavar="LIST",
        help="list of videos and frame folders, labelled or not, a mix (.yaml), or a folder of videos",
    )
    parser.add_argument("output", metavar="OUT", help="folder for the packed videos, their list and a report")
    parser.add_argument("--data-root", metavar="DIR", help="where the list's relative paths start")
    add_labelled_argument(parser)
    parser.add_argument(
        "--short-side",
        type=limits(PackConfig, "short_side"),
        default=PackConfig.short_side,
        help="pixels (256)",
    )
    parser.add_argument(
        "--gop",
        type=limits(PackConfig, "gop"),
        default=PackConfig.gop,
        help="frames from one key frame to the next (25)",
    )
    parser.add_argument(
        "--crf",
        type=limits(PackConfig, "crf"),
        default=PackConfig.crf,
        help="quality, smaller is better (20)",
    )
    parser.add_argument("--preset", default=PackConfig.preset, help="x264's effort (medium)")
    parser.add_argument(
        "--shards",
        action="store_true",
        help="write tar files, which WebDataset reads too, and OUT/index.vmae for --data; folders of "
        "frames go in as they are",
    )
    parser.add_argument(
        "--shard-size",
        type=Whole(1, MOST_MIB),
        metavar="MIB",
        help=f"MiB of a shard, about ({SHARD_MIB})",
    )
    parser.add_argument(
        "--as-is", action="store_true", help="with --shards: store videos unchanged, whatever their format"
    )
    parser.add_argument(
        "--keep-every",
        type=limits(PackConfig, "keep_every"),
        default=PackConfig.keep_every,
        metavar="N",
        help="with --shards: store every N-th frame, for clips whose stride is a multiple of N (1: all)",
    )
    parser.add_argument(
        "--workers", type=PROCESSES, default=whole_cores(), help="processes (one for each core)"
    )
    add_part_arguments(parser)


@dataclass(frozen=True)
class _Found:
    """A list or mix, in order; see `ShardJob`."""

    entries: Sequence[VideoEntry]
    labels: Sequence[Any]
    labelled: bool
    sources: Sequence[Origin]


@dataclass(frozen=True)
class Encode:
    """Packs a video for a shard."""

    config: PackConfig

    def __call__(self, source: str, target: Path, key: str) -> Stored:
        frames, step = pack_video(source, target, self.config, key), self.config.keep_every
        if step == 1:
            return Stored(frames)
        with open_video(source, "pyav") as original:
            return Stored(frames, step, draw_phase(key, step, frames), original.fps or 0.0)


def run(args: argparse.Namespace) -> int:
    """The command; 1 where a video was left out."""
    if os.environ.get("RANK", "0") != "0":  # of torchrun: one process does it, with workers of its own
        return 0
    config = PackConfig(
        short_side=args.short_side,
        gop=args.gop,
        crf=args.crf,
        preset=args.preset,
        keep_every=args.keep_every,
    )
    _check_flags(args, config)
    if is_address(args.output):
        raise InputError(f"{args.output} is an address: pack into a folder of this machine, and copy that")
    folder = Path(args.output)
    if is_index(args.list):
        raise InputError(
            f"{args.list} is an index: its videos are packed already; give the list that they came from"
        )
    if Path(args.list).is_dir() and folder.resolve().is_relative_to(Path(args.list).resolve()):
        raise InputError(
            f"{folder} is inside {args.list}, so its videos would be packed next time; choose another folder"
        )
    found = _read(args)
    refuse_stacks(found.entries, "packing is for videos")
    return _pack_shards(args, found, config) if args.shards else _pack_list(args, found, config)


def _check_flags(args: argparse.Namespace, config: PackConfig) -> None:
    of_shards = {
        "--shard-size": args.shard_size is not None,
        "--as-is": args.as_is,
        "--keep-every": args.keep_every != 1,
    }
    for flag, given in of_shards.items():
        if given and not args.shards:
            raise InputError(f"{flag} is for shards, whose index tells what is in them: give --shards too")
    if args.as_is and config != PackConfig():
        raise InputError("--as-is stores videos as they are: it takes no flag that says how they are encoded")


def _read(args: argparse.Namespace) -> _Found:
    path = Path(args.list)
    if path.suffix.lower() in MIX_SUFFIXES and not path.is_dir():
        mix = read_data(path, args.data_root)
        if indexes_in(mix):
            raise InputError(f"mix {path} has an index among its sources, whose videos are packed already")
        images = [source.name for source in mix.sources if source.images]
        if images:
            raise InputError(
                f"mix {path}, source {images[0]!r}: single images are read as they are, and not packed; "
                "pack a mix of the other sources"
            )
        sources = [Origin(source.name, source.first, source.count, source.root) for source in mix.sources]
        return _Found(mix.entries, [None] * len(mix), False, sources)
    found = read_any_list(path, args.data_root, LABELLED[args.labelled])
    raise_problems(path, args.data_root, found.problems, len(found.entries))
    name, root = (path.resolve().name, str(path)) if path.is_dir() else (path.stem, str(path.parent))
    source = Origin(name, 0, len(found.entries), args.data_root or root)
    return _Found(found.entries, found.labels, found.labelled, [source])


def _pack_list(args: argparse.Namespace, found: _Found, config: PackConfig) -> int:
    folder, place = Path(args.output), pack_place(Path(args.output), args.part)
    kept: dict[str, Any] = {"labels": found.labels, "labelled": found.labelled}
    videos = [entry for entry in found.entries if entry.kind == "video"]
    with place.hold(Ranks(), merge=args.merge):
        if not args.part.whole:
            bad = pack_part(found.entries, place, config, workers=args.workers)
            own = len(place.share(len(videos)))
            print(_part_line(args, own - len(bad), own, place.own))
            return 1 if bad else 0
        if args.merge:
            packed = merge_list(found.entries, place, config, **kept)
        else:
            packed = pack_list(found.entries, folder, config, **kept, workers=args.workers)
        targets = {
            int(Path(entry.path).name.split("_")[0]): entry for entry in packed if entry.kind == "video"
        }
        pairs = [(videos[number], target) for number, target in targets.items()]
        report = {"settings": asdict(config), "videos": len(videos), "packed": len(pairs)} | _sizes(pairs)
        _write_report(folder, report)
        if pairs:
            _write_report(folder, report | {"decoding": report_gain(pairs)})
    return _finish(folder / LIST_NAME, len(pairs), len(videos))


def _pack_shards(args: argparse.Namespace, found: _Found, config: PackConfig) -> int:
    folder, place = Path(args.output), pack_place(Path(args.output), args.part)
    job = ShardJob(
        found.entries,
        found.labels,
        found.sources,
        place,
        encode=None if args.as_is else Encode(config),
        settings={"as_is": True} if args.as_is else asdict(config),
        size=(args.shard_size or SHARD_MIB) << 20,
        workers=args.workers,
    )
    with place.hold(Ranks(), merge=args.merge):
        if not args.merge:
            packed, left_out = pack_shards(job)
        if not args.part.whole:
            print(_part_line(args, packed, packed + left_out, place.own))
            return 1 if left_out else 0
        index, sizes = join_shards(job)
        report = {
            "settings": job.settings,
            "videos": len(found.entries),
            "packed": len(index),
            "shards": len(index.shards),
        } | sizes
        _print_sizes(sizes)
        _write_report(folder, report)
        numbers = range(0, len(index), max(len(index) // 8, 1))[:8]
        pairs = [(found.entries[int(index[row].key.split("_")[0])], index[row]) for row in numbers]
        pairs = [pair for pair in pairs if pair[1].kind == "video"]
        if pairs and not args.as_is:
            _write_report(folder, report | {"decoding": report_gain(pairs)})
    return _finish(folder / INDEX_NAME, len(index), len(found.entries))


def _part_line(args: argparse.Namespace, packed: int, videos: int, own: Path) -> str:
    bad = ""
    if packed < videos:
        bad = f"; {videos - packed} could not be packed, see {own / QUARANTINE_NAME}"
    return f"part {args.part}: {packed} of {videos} videos packed{bad}; --merge joins all parts"


def _finish(result: Path, packed: int, videos: int) -> int:
    bad = ""
    if packed < videos:
        bad = f"; {videos - packed} could not be packed, see {result.parent / QUARANTINE_NAME}"
    print(f"{packed} of {videos} videos packed: {result}{bad}")
    return 1 if packed < videos else 0


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=1) + "\n"
    write_atomically(folder / REPORT_NAME, lambda file: file.write(text), binary=False)


def _sizes(pairs: Sequence[tuple[VideoEntry, VideoEntry]]) -> dict[str, int]:
    """Bytes of all originals and packed videos that are there; printed too."""
    before = after = 0
    for pair in pairs:
        try:
            sizes = [os.path.getsize(entry.path) for entry in pair]
        except OSError:  # taken away meanwhile
            continue
        before, after = before + sizes[0], after + sizes[1]
    found = {"bytes_before": before, "bytes_after": after}
    _print_sizes(found)
    return found


def _print_sizes(sizes: dict[str, int]) -> None:
    before, after = sizes["bytes_before"], sizes["bytes_after"]
    if before:
        print(
            f"size: {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB packed ({after / before:.2f} x)"
        )
