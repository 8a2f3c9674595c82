"""Lists packed into a folder of videos and a list of them.

    OUT/videos/000/000017_NAME_HASH.mp4     packed videos
    OUT/list.txt                            the list, labels as they were
    OUT/parts/2-of-7/                       of part 2/7 while it is at work, see `vmae.data.part_folder`

Videos already packed are left alone, so the command can be stopped and started again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from vmae.data.manifest import VideoEntry, write_list
from vmae.data.pack import UNFINISHED_SUFFIX, VERSION, PackConfig, pack_video
from vmae.data.part_folder import PartFolder
from vmae.data.parts import WHOLE, Part
from vmae.data.quarantine import QUARANTINE_NAME, Failure, Quarantine
from vmae.data.video_reader import DecodeError, memory_as_decode_error
from vmae.data.workers import VideoTask, WorkerPool
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import parse_json, read_json_lines

SETTINGS_NAME, LIST_NAME = "pack.json", "list.txt"


class _Packer(VideoTask):
    """What runs in the workers: packs a video unless that was done before; gives None, or why it could
    not."""

    def __init__(self, entries: Sequence[VideoEntry], targets: Sequence[Path], config: PackConfig) -> None:
        super().__init__()
        self.entries, self.targets, self.config = entries, targets, config

    def __getitem__(self, video: int) -> Failure | InputError | None:
        entry, target = self.entries[video], self.targets[video]
        if video in self.blocked:
            return Failure(entry.path, self.blocked[video], "worker")
        self.watch(video)
        if _is_done(entry.path, target):
            return None
        try:
            with memory_as_decode_error(entry.path):
                pack_video(entry.path, target, self.config)
        except DecodeError as error:
            return Failure(entry.path, str(error), error.library or "pyav")
        except (InputError, OSError) as error:
            if isinstance(error, OSError):
                return InputError(f"cannot write {str(target)!r}: {error.strerror}")
            return InputError(str(error))
        return None


def _is_done(source: str, target: Path) -> bool:
    """Whether `target` is there and `source` was not changed after it."""
    try:
        return os.stat(source).st_mtime <= target.stat().st_mtime
    except FileNotFoundError:
        return False


def _target(folder: Path, number: int, path: str) -> Path:
    """Where video `number` goes. The name holds a hash of the original's path: a list in another order finds
    its own videos."""
    digest = hashlib.sha256(
        f"{VERSION} {os.path.abspath(path)}".encode("utf-8", "surrogateescape")
    ).hexdigest()[:10]
    stem = re.sub(r"[^\w.+-]", "_", Path(path).stem)[:40]
    return folder / "videos" / f"{number // 1000:03}" / f"{number:06}_{stem}_{digest}.mp4"


def pack_place(folder: Path, part: Part) -> PartFolder:
    """Where a part of a list's packing writes."""
    return PartFolder(folder, part, "videos being packed", "videos packed otherwise", SETTINGS_NAME)


def pack_list(
    entries: Sequence[VideoEntry],
    folder: Path,
    config: PackConfig,
    *,
    labels: Sequence[Iterable[int] | None] | None = None,
    labelled: bool = False,
    workers: int = 1,
    hang_s: float = 3600.0,
) -> list[VideoEntry]:
    """Pack all videos into `folder/videos`, write `folder/list.txt`, and return its entries.

    Frame folders stay where they are. A video that cannot be packed is left out and stands in
    `folder/quarantine.jsonl`.

    Args:
        labels, labelled: for the list, see `write_list`.

    Raises:
        InputError: the folder was packed with other settings, cannot be written, or PyAV is not installed.
    """
    bad = pack_part(entries, pack_place(folder, WHOLE), config, workers=workers, hang_s=hang_s)
    return _write_packed(entries, folder, set(bad), labels, labelled)


def pack_part(
    entries: Sequence[VideoEntry],
    place: PartFolder,
    config: PackConfig,
    *,
    workers: int = 1,
    hang_s: float = 3600.0,
) -> dict[int, Failure]:
    """Pack this part's videos; those that cannot be packed, by their number among the videos.

    Raises:
        InputError: see `pack_list`.
    """
    for folder in dict.fromkeys([place.folder, place.own]):
        _claim_folder(folder, config)
    videos = [entry for entry in entries if entry.kind == "video"]
    targets = [_target(place.folder, number, entry.path) for number, entry in enumerate(videos)]
    own = place.share(len(videos))
    numbers = frozenset(own)
    for parent in {targets[number].parent for number in own}:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"*{UNFINISHED_SUFFIX}"):  # by a kill
            if left.name[:6].isdecimal() and int(left.name.split("_")[0]) in numbers:
                left.unlink(missing_ok=True)
    quarantine = Quarantine(place.own / QUARANTINE_NAME, 1.0)
    packer = _Packer(videos, targets, config)
    pool = WorkerPool(packer, iter(own), count=workers, prefetch=2, hang_s=hang_s)
    bad = {}
    try:
        answers = tqdm(pool, total=len(own), unit="video", disable=None)
        for video, answer in zip(own, answers, strict=True):
            if isinstance(answer, InputError):
                raise answer
            quarantine.add(0 if answer else 1, [answer] if answer else [])
            if answer:
                bad[video] = answer
    finally:
        pool.close()
    return bad


def merge_list(
    entries: Sequence[VideoEntry],
    place: PartFolder,
    config: PackConfig,
    *,
    labels: Sequence[Iterable[int] | None] | None = None,
    labelled: bool = False,
) -> list[VideoEntry]:
    """Join what the parts packed, as `pack_list` does at its end.

    Raises:
        InputError: videos are missing (says which parts have them), or see `pack_list`.
    """
    folder = place.folder
    _claim_folder(folder, config)
    failed: dict[str, Failure] = {}
    for own in (folder, *place.folders()):
        for record in read_json_lines(own / QUARANTINE_NAME, path=str, error=str).records:
            failed[record["path"]] = Failure(record["path"], record["error"], record.get("library"))
    videos = [entry for entry in entries if entry.kind == "video"]
    there = {number for number, entry in enumerate(videos) if _target(folder, number, entry.path).exists()}
    bad = {
        number: failed[entry.path]
        for number, entry in enumerate(videos)
        if number not in there and entry.path in failed
    }
    place.check_complete(len(videos), there | set(bad), "videos")
    Quarantine(folder / QUARANTINE_NAME, 1.0).add(len(there), list(bad.values()))
    packed = _write_packed(entries, folder, set(bad), labels, labelled)
    place.remove_parts()
    return packed


def _write_packed(
    entries: Sequence[VideoEntry],
    folder: Path,
    bad: set[int],
    labels: Sequence[Iterable[int] | None] | None,
    labelled: bool,
) -> list[VideoEntry]:
    """Write the list without the videos `bad` (numbers among the videos); returns its entries."""
    number = -1
    packed, kept = [], []
    for entry, own in zip(entries, labels or [None] * len(entries), strict=True):
        if entry.kind == "video":
            number += 1
            if number in bad:
                continue
            target = str(_target(folder, number, entry.path))
            entry = VideoEntry(target, "video", 0, -1, entry.stride)
        packed.append(entry)
        kept.append(own)
    write_list(folder / LIST_NAME, packed, kept, root=folder, labelled=labelled)
    return packed


def _claim_folder(folder: Path, config: PackConfig) -> None:
    settings = folder / SETTINGS_NAME
    try:
        if settings.exists():
            before = parse_json(settings.read_text(encoding="utf-8"))
            if not isinstance(before, dict) or {**asdict(PackConfig()), **before} != asdict(config):
                raise InputError(
                    f"{folder} was packed with {before}, not {asdict(config)}; choose another folder"
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(config)) + "\n"
        write_atomically(settings, lambda file: file.write(text), binary=False)
    except OSError as error:
        raise InputError(f"cannot write to {str(folder)!r}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{settings} is damaged; remove it") from None
