"""`vmae index TAR... -o INDEX`: an index of tar files that somebody else wrote, or `pack --shards` did.

INDEX.unfinished/00000.vmae     of each tar that was read, so that a stopped command goes on, and parts
                                of a job share the work
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vmae.data.part_folder import PartFolder
from vmae.data.parts import add_part_arguments
from vmae.data.quarantine import QUARANTINE_NAME, Failure, Quarantine
from vmae.data.ranks import Ranks
from vmae.data.shards.entries import Shard, is_address
from vmae.data.shards.index import (
    FRAMES,
    INDEX_SUFFIX,
    Sample,
    ShardIndex,
    columns_of,
    is_index,
    join_indexes,
    read_index,
    write_index,
)
from vmae.data.shards.look import prepare
from vmae.data.shards.scan import Scanned, Scanner, scan_groups
from vmae.data.shards.tar_places import find_tars
from vmae.data.shards.verify import verify_index
from vmae.data.workers import WorkerPool
from vmae.errors import InputError
from vmae.files.limits import whole_cores
from vmae.settings import PROCESSES, Real

UNFINISHED = ".unfinished"
_PREFETCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tars", metavar="TAR", nargs="*", help="tar files, folders of them, patterns, addresses in a store"
    )
    parser.add_argument(
        "-o", "--output", metavar="INDEX", help=f"the index, a file that ends with {INDEX_SUFFIX}"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="open no video: frames, rate and size are what KEY.json says, or not known",
    )
    parser.add_argument(
        "--verify", metavar="INDEX", help="compare all bytes of an index's shards with it, and make none"
    )
    parser.add_argument(
        "--workers", type=PROCESSES, default=whole_cores(), help="processes (one for each core)"
    )
    parser.add_argument(
        "--hang", type=Real(above=0, most=10**6), default=120.0, help="seconds that a video may take (120)"
    )
    add_part_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """The command; 1 where a video was left out, or bytes are not what the index says."""
    if args.verify:
        if args.tars or args.output or args.merge:
            raise InputError("--verify INDEX stands alone: no tar, no --output, no --merge")
        return verify_index(args.verify, args.part, workers=args.workers, hang_s=args.hang)
    if not args.tars or not args.output:
        raise InputError("name tar files, or folders of them, and the index: `vmae index TAR... -o INDEX`")
    output = Path(args.output)
    if not is_index(output) or is_address(args.output):
        raise InputError(f"{args.output}: the index is a file of this machine that ends with {INDEX_SUFFIX}")
    shards = find_tars(args.tars)
    if output.exists():
        return _compare(output, shards)
    place = PartFolder(
        Path(f"{output}{UNFINISHED}"), args.part, "an index being made", "an index of other tars", "tars.json"
    )
    with place.hold(Ranks(), merge=args.merge):
        decides = {"tars": [list(shard) for shard in shards], "quick": args.quick}
        if args.part.whole and not args.merge and not place.found() and not place.is_of(decides):
            print(
                f"note: what {place.folder} holds of an unfinished index of other tars is dropped", flush=True
            )
            for piece in (*place.folder.glob(f"*{INDEX_SUFFIX}"), place.folder / place.settings):
                piece.unlink(missing_ok=True)
        place.settle(decides)
        if not args.merge:
            _scan_part(place, shards, output, args)
        if not args.part.whole:
            print(f"part {args.part}: {len(place.share(len(shards)))} tars read; --merge joins all parts")
            return 0
        code = _join(place, shards, output)
    shutil.rmtree(place.folder, ignore_errors=True)
    return code


def _compare(output: Path, shards: Sequence[Shard]) -> int:
    """What there is to say where the index is there."""
    index = read_index(output)
    before = [
        shard if is_address(shard.name) else shard._replace(name=os.path.abspath(shard.name))
        for shard in index.shards
    ]
    if before != list(shards):
        raise InputError(f"{output} exists, and is the index of other tars: remove it, or choose another -o")
    if changed := [shard.name for shard in shards if _is_newer(shard, output)]:
        raise InputError(f"{output} exists, and {changed[0]} was changed since: remove it, to make it anew")
    same = f"{len(index)} samples in the same {len(shards)} tars"
    print(f"{output} exists: {same}; --verify compares all bytes")
    return 0


# --- One index a tar ----------------------------------------------------------------------------------------


def _scan_part(place: PartFolder, shards: Sequence[Shard], output: Path, args: argparse.Namespace) -> None:
    """Write the index of each tar of this part that has none yet."""
    left = [number for number in place.share(len(shards)) if not _is_done(place, number, shards)]
    if not args.quick:
        prepare()
    skipped: Counter[str] = Counter()
    tasks = scan_groups([(number, shards[number]) for number in left], skipped)
    scanner = Scanner(shards, look=not args.quick)
    pool = WorkerPool(scanner, tasks, count=args.workers, prefetch=_PREFETCH, hang_s=args.hang)
    try:
        results = iter(tqdm(pool, unit="sample", disable=None))
        for number, own in _by_shard(results, left):
            _write_piece(place, number, shards[number], own, output, Counter(), args.quick)
    finally:
        pool.close()
    if skipped:
        print(f"{skipped.total()} members have {', '.join(skipped)}")


def _by_shard(results: Iterator[Scanned], numbers: Sequence[int]) -> Iterator[tuple[int, list[Scanned]]]:
    """Results of each tar, as soon as all of them are there.

    Raises:
        InputError: something is wrong with a tar.
    """
    left = list(numbers)
    own: list[Scanned] = []
    for result in results:
        while left[0] != result.shard:
            yield left.pop(0), own
            own = []
        if result.fault is not None:
            raise InputError(result.fault)
        own.append(result)
    for number in left:
        yield number, own
        own = []


def _write_piece(
    place: PartFolder,
    number: int,
    shard: Shard,
    results: Sequence[Scanned],
    output: Path,
    skipped: Counter[str],
    quick: bool,
) -> None:
    samples: list[Sample] = [result.sample for result in results if result.sample is not None]
    for result in results:
        skipped.update(result.skipped)
    sources: list[str] = []
    suffixes: list[str] = []
    columns = columns_of(samples, sources, suffixes)
    told: dict[str, Any] = {
        "left_out": [list(result.failure) for result in results if result.failure is not None],
        "skipped": dict(skipped),
        "odd_labels": sum(result.odd_label for result in results),
        "quick": quick,
    }
    name = shard.name
    folder = os.path.dirname(os.path.abspath(output))
    if not is_address(name) and os.path.commonpath([folder, name]) == folder:
        name = os.path.relpath(name, folder)
    index = ShardIndex(
        columns, [shard._replace(name=name)], sources=sources, suffixes=suffixes, settings=told, base=folder
    )
    write_index(_piece(place, number), index)


def _piece(place: PartFolder, number: int) -> Path:
    return place.folder / f"{number:05}{INDEX_SUFFIX}"


def _is_done(place: PartFolder, number: int, shards: Sequence[Shard]) -> bool:
    """Whether a tar has its index, and was not changed since."""
    piece = _piece(place, number)
    return piece.exists() and not _is_newer(shards[number], piece)


def _is_newer(shard: Shard, index: Path) -> bool:
    """Whether a tar of this machine was changed after `index` was written; of a store, its ETag tells."""
    return not is_address(shard.name) and os.stat(shard.name).st_mtime > index.stat().st_mtime


def _join(place: PartFolder, shards: Sequence[Shard], output: Path) -> int:
    """Write the index of all tars; the exit code."""
    done = {number for number in range(len(shards)) if _is_done(place, number, shards)}
    place.check_complete(len(shards), done, "tars")
    pieces = [_read_piece(_piece(place, number), output) for number in range(len(shards))]
    skipped: Counter[str] = Counter()
    for piece in pieces:
        skipped.update(piece.settings["skipped"])
    failures = [Failure(*failure) for piece in pieces for failure in piece.settings["left_out"]]
    index = join_indexes(pieces)
    if not len(index):
        raise InputError(f"no videos in {len(shards)} tars{_told(skipped)}{_bad(failures)}")
    _check_keys(index)
    index.settings = {}
    write_index(output, index)
    if failures:
        Quarantine(output.parent / QUARANTINE_NAME, 1.0).add(0, failures)
    frames = sum(index.suffixes[suffix] == FRAMES for suffix in index.columns["suffix"].tolist())
    kinds = f"{len(index) - frames} videos" + (f" and {frames} folders of frames" if frames else "")
    labelled = "with labels" if index.columns["label_end"][-1] else "without labels"
    print(f"{kinds}, {labelled}, in {len(shards)} tars: {output}{_told(skipped)}")
    odd = sum(piece.settings["odd_labels"] for piece in pieces)
    if odd:
        print(f"note: {odd} samples have a label that is no class's number; the index has none for them")
    if failures:
        where = output.parent / QUARANTINE_NAME
        print(f"{len(failures)} videos cannot be decoded and are left out, see {where}")
    return 1 if failures else 0


def _read_piece(path: Path, output: Path) -> ShardIndex:
    return read_index(path, os.path.dirname(os.path.abspath(output))).in_memory()


def _told(skipped: Counter[str]) -> str:
    if not skipped:
        return ""
    kinds = ", ".join(f"{kind} {count}" for kind, count in skipped.most_common(6))
    return f"; {skipped.total()} members are no part of a video ({kinds})"


def _bad(failures: Sequence[Failure]) -> str:
    return f"; {len(failures)} cannot be decoded, the first: {failures[0].error}" if failures else ""


def _check_keys(index: ShardIndex) -> None:
    """Raises InputError where two tars have the same key."""
    seen: dict[int, int] = {}
    for number in range(len(index)):
        key = index.part("keys", number).tobytes()
        other = seen.setdefault(hash(key), number)
        if other != number and index.part("keys", other).tobytes() == key:
            one, two = (index.shards[int(index.columns["shard"][row])].name for row in (other, number))
            raise InputError(
                f"key {key.decode()!r} comes twice: in {one} and in {two}; give each sample a name of its "
                "own, or make an index of each tar, and a mix of them"
            )
