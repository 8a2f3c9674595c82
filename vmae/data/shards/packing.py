"""`vmae pack LIST OUT --shards`: videos of a list into tar files of about 1 GiB, and an index of them.

    OUT/shard-00000.tar         videos, each with what is known of it (see `vmae.data.shards`)
    OUT/shard-00000.vmae        its own index, written after it: a shard without one is made again
    OUT/index.vmae              all of them joined: the data of a run
    OUT/unfinished/             packed videos of shards that are not complete

A shard's bytes follow from the list and the settings: not from the part that writes it, the number of
workers, the time, or how often it was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from vmae.data.containers import container_kind
from vmae.data.files import check_regular
from vmae.data.manifest import VideoEntry
from vmae.data.pack import VERSION
from vmae.data.part_folder import PartFolder
from vmae.data.quarantine import QUARANTINE_NAME, Failure, Quarantine
from vmae.data.shards.entries import Place, Shard
from vmae.data.shards.index import (
    FRAMES,
    INDEX_NAME,
    INDEX_SUFFIX,
    Sample,
    ShardIndex,
    columns_of,
    join_indexes,
    read_index,
    write_index,
)
from vmae.data.shards.look import Facts, look_at, prepare
from vmae.data.shards.packets import make_table
from vmae.data.shards.plan import Origin, ShardPlan, hash_list, probes, videos_for
from vmae.data.shards.tar import TarWriter
from vmae.data.video_files import VIDEO_SUFFIXES
from vmae.data.video_reader import DecodeError, memory_as_decode_error
from vmae.data.workers import VideoTask, WorkerPool
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import parse_json, read_json

SETTINGS_NAME, UNFINISHED = "pack.json", "unfinished"
_PREFETCH = 8  # videos that a worker has at a time: they go on while a shard is written
_PIECE, _MOST_FOR_TABLE = 8 << 20, 1 << 28  # bytes
_OTHER_SUFFIXES = {
    "Matroska": ".mkv", "AVI": ".avi", "MPEG-TS": ".ts", "MPEG-PS": ".mpg", "FLV": ".flv", "ASF": ".wmv",
    "Ogg": ".ogv", "GIF": ".gif", "MXF": ".mxf",
}  # fmt: skip


class Stored(NamedTuple):
    """Which frames of a video a packed one has, see `ShardEntry`; `fps` None where it has all of them."""

    frames: int
    keep_every: int = 1
    phase: int = 0
    fps: float | None = None


Encode = Callable[[str, Path, str], Stored]  # (original, file to write, key)


@dataclass(frozen=True)
class ShardJob:
    """What is to be packed.

    Attributes:
        entries, labels: the list; labels None where it has none.
        sources: where its entries come from, in order.
        place: the folder, and the part of the job that this is.
        encode: packs a video; None stores videos as they are.
        settings: what the encoder's work depends on, for the folder and the index.
        size: bytes of a shard, about.
        workers: processes.
        hang_s: seconds that a video may take.
    """

    entries: Sequence[VideoEntry]
    labels: Sequence[Iterable[int] | None] | None
    sources: Sequence[Origin]
    place: PartFolder
    encode: Encode | None
    settings: dict[str, Any]
    size: int
    workers: int = 1
    hang_s: float = 3600.0

    def key(self, number: int) -> str:
        """Name of a sample: place in the list and the file's stem; no dots, at which WebDataset cuts."""
        stem = re.sub(r"[^A-Za-z0-9_+-]", "_", Path(self.entries[number].path).stem)[:40]
        return f"{number:06}_{stem}"


def pack_shards(job: ShardJob) -> tuple[int, int]:
    """Write this part's shards that are not there; (videos packed, videos left out) of all of them.

    A video, or folder of frames, that cannot be read to its end is left out and stands in `quarantine.jsonl`.

    Raises:
        InputError: the folder is of another list or other settings, or cannot be written.
    """
    prepare()
    plan = settle_plan(job)
    mine = job.place.share(len(plan))
    ready = {shard for shard in mine if _read_done(job, plan, shard) is not None}
    left = [shard for shard in mine if shard not in ready]
    for shard in left:
        for piece in job.place.folder.glob(f".{shard_name(shard)}.*.unfinished"):  # of a killed run
            piece.unlink(missing_ok=True)
    videos = [number for shard in left for number in plan[shard][1]]
    quarantine = Quarantine(job.place.own / QUARANTINE_NAME, 1.0)
    pool = _pool(job, videos)
    try:
        progress = iter(tqdm(pool, total=len(videos), unit="video", disable=None))
        for shard in left:
            made = []
            for _ in plan[shard][1]:
                made.append(_checked(next(progress)))
                quarantine.add(0, [made[-1]] if isinstance(made[-1], Failure) else [])
            write_shard(job, plan, shard, made)
            for number in plan[shard][1]:
                for path in _work_files(job, number):
                    path.unlink(missing_ok=True)
    finally:
        pool.close()
    shutil.rmtree(job.place.own / UNFINISHED, ignore_errors=True)
    found = [index for shard in mine if (index := _read_done(job, plan, shard)) is not None]
    return sum(len(index) for index in found), sum(len(index.settings["left_out"]) for index in found)


def join_shards(job: ShardJob) -> tuple[ShardIndex, dict[str, int]]:
    """Write the index of all shards and `quarantine.jsonl` of all parts; (the index, bytes before and after).

    Raises:
        InputError: shards are missing (says which parts have them), or the folder is of another list or other
            settings, or cannot be written.
    """
    folder = job.place.folder
    if not (folder / SETTINGS_NAME).exists():
        raise InputError(f"{folder} has no parts to join; run the parts first (--part i/n)")
    plan = settle_plan(job)
    indexes = {
        shard: index for shard in range(len(plan)) if (index := _read_done(job, plan, shard)) is not None
    }
    job.place.check_complete(len(plan), indexes, "shards")
    ordered = [indexes[shard] for shard in range(len(plan))]
    joined = join_indexes(ordered)
    joined.settings = job.settings
    write_index(folder / INDEX_NAME, joined)
    lines = [
        json.dumps(Failure(*failure)._asdict(), ensure_ascii=False) + "\n"
        for index in ordered
        for failure in index.settings["left_out"]
    ]
    path = folder / QUARANTINE_NAME
    if lines or path.exists():
        data = "".join(lines).encode(errors="backslashreplace")
        write_atomically(path, lambda file: file.write(data))
    if not lines:
        path.unlink(missing_ok=True)
    job.place.remove_parts()
    return joined, {
        "bytes_before": sum(index.settings["bytes_before"] for index in ordered),
        "bytes_after": sum(shard.size for shard in joined.shards),
    }


def shard_name(shard: int) -> str:
    """Name of a shard's tar file."""
    return f"shard-{shard:05}.tar"


# --- The plan -----------------------------------------------------------------------------------------------


def settle_plan(job: ShardJob) -> ShardPlan:
    """The plan of a folder: read from its settings, or made and written there, once.

    Raises:
        InputError: the folder is of another list or other settings, or cannot be written.
    """
    path = job.place.folder / SETTINGS_NAME
    decides = {
        "version": VERSION,
        **job.settings,
        "shard_size": job.size,
        "sources": [[source.name, source.count] for source in job.sources],
        "list": hash_list(job.entries, job.labels, job.sources),
    }
    if not path.exists():
        _write_once(path, {**decides, "videos_a_shard": _count_each(job)})
    found = read_json(path, "settings file")
    each = found.pop("videos_a_shard", None) if isinstance(found, dict) else None
    if found != json.loads(json.dumps(decides)) or each is None:
        found = found if isinstance(found, dict) else {}
        same = all(
            found.get(name) == value for name, value in decides.items() if name not in ("list", "sources")
        )
        if each is not None and same:
            raise InputError(f"{job.place.folder} holds shards of another list; choose another folder")
        before = {name: value for name, value in found.items() if name != "list"}
        now = {name: value for name, value in decides.items() if name not in ("list", "sources")}
        raise InputError(
            f"{job.place.folder} was packed with {before}, not {now}; choose another folder, or the "
            "same settings"
        )
    if not job.place.part.whole:  # for --merge: this part was started
        text = json.dumps(decides) + "\n"
        write_atomically(job.place.own / SETTINGS_NAME, lambda file: file.write(text), binary=False)
    return ShardPlan(tuple(job.sources), tuple(each))


def _count_each(job: ShardJob) -> list[int]:
    """Videos of a shard, for each source, from the sizes of some; these are kept for their shards."""
    numbers = [number for source in job.sources for number in probes(source)]
    pool = _pool(job, numbers)
    try:
        sizes = {
            number: made.size
            for number, one in zip(numbers, pool, strict=True)
            if isinstance(made := _checked(one), Made)
        }
    finally:
        pool.close()
    return [
        videos_for(job.size, [sizes[number] for number in probes(source) if number in sizes])
        for source in job.sources
    ]


def _write_once(path: Path, content: dict[str, Any]) -> None:
    """Write a file unless it is there: of parts that come at the same time, the first one."""
    beside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(beside, lambda file: file.write(json.dumps(content) + "\n"), binary=False)
        try:
            os.link(beside, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            beside.replace(path)
    except OSError as error:
        raise InputError(f"cannot write to {str(path.parent)!r}: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


# --- Videos, in the workers ---------------------------------------------------------------------------------


class Made(NamedTuple):
    """A video, or folder of frames, that is ready to be stored.

    Attributes:
        path: file of the video; empty for frames.
        suffix: of its name in the shard.
        stored, facts: see there; `facts` are those of the stored video.
        table: packet table; empty where there is none.
        before: bytes of the original.
        size: bytes that its members take in a shard, about.
    """

    path: str
    suffix: str
    stored: Stored
    facts: Facts
    table: bytes
    before: int
    size: int


class _Maker(VideoTask):
    """What runs in the workers: packs a video unless that was done before."""

    def __init__(self, job: ShardJob) -> None:
        super().__init__()
        self.job = job

    def __getitem__(self, video: int) -> Made | Failure | InputError:
        entry = self.job.entries[video]
        if video in self.blocked:
            return Failure(entry.path, self.blocked[video], "worker")
        self.watch(video)
        try:
            with memory_as_decode_error(entry.path):
                return self._make(video, entry)
        except DecodeError as error:
            return Failure(
                entry.path, str(error), error.library or ("pyav" if entry.kind == "video" else "frames")
            )
        except InputError as error:
            return InputError(str(error))
        except OSError as error:
            return InputError(f"cannot write {str(_work_files(self.job, video)[0])!r}: {error.strerror}")

    def _make(self, video: int, entry: VideoEntry) -> Made:
        if entry.kind != "video":
            facts, before = _look_at_images(entry)
            return Made(
                "", FRAMES, Stored(facts.frames), facts, b"", before, before + 1024 * facts.frames + 1024
            )
        check_regular(entry.path)
        if self.job.encode is None:
            path, suffix = Path(entry.path), _suffix_of(entry.path)
            stored = None
        else:
            (path, about), suffix = _work_files(self.job, video), ".mp4"
            stored = _read_stored(entry.path, about)
            if stored is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                stored = self.job.encode(entry.path, path, self.job.key(video))
                write_atomically(about, lambda file: file.write(json.dumps(stored)), binary=False)
        facts = look_at(VideoEntry(str(path)))
        size, before = os.path.getsize(path), os.path.getsize(entry.path)
        table = b""
        if suffix == ".mp4" and size <= _MOST_FOR_TABLE:
            table = make_table(path.read_bytes())
        size += len(table) + 3072
        return Made(str(path), suffix, stored or Stored(facts.frames), facts, table, before, size)


def _pool(job: ShardJob, videos: Sequence[int]) -> WorkerPool:
    return WorkerPool(_Maker(job), iter(videos), count=job.workers, prefetch=_PREFETCH, hang_s=job.hang_s)


def _checked(made: Made | Failure | InputError) -> Made | Failure:
    if isinstance(made, InputError):
        raise made
    return made


def _work_files(job: ShardJob, number: int) -> tuple[Path, Path]:
    """(packed video, what is known of it) of a shard under way."""
    folder = job.place.own / UNFINISHED / f"{number // 1000:03}"
    return folder / f"{job.key(number)}.mp4", folder / f"{job.key(number)}.json"


def _read_stored(original: str, about: Path) -> Stored | None:
    """What was packed before, unless the original was changed since."""
    try:
        if os.stat(original).st_mtime > about.stat().st_mtime:
            return None
        return Stored(*parse_json(about.read_text()))
    except (FileNotFoundError, TypeError, ValueError):
        return None


def _look_at_images(entry: VideoEntry) -> tuple[Facts, int]:
    """(facts, bytes) of a folder of frames: every image is there, is one, and is as large as the first."""
    from PIL import Image

    size, total = None, 0
    for index in range(entry.total):
        path = entry.frame_path(index)
        check_regular(path)
        total += os.path.getsize(path)
        try:
            with Image.open(path) as image:
                own = image.size
        except Exception as error:
            raise DecodeError(f"{path}: cannot be decoded: {error}") from None
        size = size or own
        if own != size:
            raise DecodeError(f"{path}: {own[0]} x {own[1]} pixels, unlike the frames before it")
    assert size is not None  # a list has no folder of 0 frames
    return Facts(entry.total, 0.0, *size), total


def _suffix_of(path: str) -> str:
    """The suffix under which a video is stored as it is."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix if suffix in VIDEO_SUFFIXES else _OTHER_SUFFIXES.get(container_kind(path), ".mp4")


# --- Shards -------------------------------------------------------------------------------------------------


def write_shard(job: ShardJob, plan: ShardPlan, shard: int, made: Sequence[Made | Failure]) -> None:
    """A tar file, complete or absent, and then its index."""
    source, numbers = plan[shard]
    samples: list[Sample] = []
    written = [0]

    def write(file: IO[bytes]) -> None:
        tar = TarWriter(file)
        for number, one in zip(numbers, made, strict=True):
            if isinstance(one, Made):
                samples.append(_add_sample(tar, job, number, one, source.name))
        written[0] = tar.finish()

    folder, name = job.place.folder, shard_name(shard)
    write_atomically(folder / name, write, wanted=sum(one.size for one in made if isinstance(one, Made)))
    sources: list[str] = []
    suffixes: list[str] = []
    index = ShardIndex(
        columns_of(samples, sources, suffixes),
        [Shard(name, written[0])],
        sources=sources,
        suffixes=suffixes,
        settings={
            **job.settings,
            "videos": [numbers.start, numbers.stop],
            "left_out": [list(one) for one in made if isinstance(one, Failure)],
            "bytes_before": sum(one.before for one in made if isinstance(one, Made)),
        },
        base=str(folder),
    )
    write_index(_index_path(job, shard), index)


def _add_sample(tar: TarWriter, job: ShardJob, number: int, made: Made, source: str) -> Sample:
    entry, key, facts, stored = job.entries[number], job.key(number), made.facts, made.stored
    own = job.labels[number] if job.labels else None
    sample = Sample(
        key=key,
        shard=0,
        video=Place(0, 0, 0),
        suffix=made.suffix,
        labels=tuple(own or ()),
        source=source,
        stride=entry.stride,
        frames=stored.frames,
        fps=facts.fps if stored.fps is None else stored.fps,
        width=facts.width,
        height=facts.height,
        keep_every=stored.keep_every,
        phase=stored.phase,
    )
    tar.add(f"{key}.json", json.dumps(describe(sample, Path(entry.path).name)).encode())
    if made.suffix == FRAMES:
        images = [_add_image(tar, key, entry.frame_path(index), index) for index in range(entry.total)]
        first, last = images[0].offset, images[-1].offset + images[-1].length
        return dataclasses.replace(sample, images=images, video=Place(first, last - first, 0))
    table = (0, 0)
    if made.table:
        place = tar.add(f"{key}.packets", made.table)
        table = (place.offset, place.length)
    return dataclasses.replace(sample, table=table, video=_add_file(tar, f"{key}{made.suffix}", made.path))


def _add_image(tar: TarWriter, key: str, path: str, index: int) -> Place:
    return _add_file(tar, f"{key}.img_{index + 1:05}{os.path.splitext(path)[1].lower()}", path)


def _add_file(tar: TarWriter, name: str, path: str) -> Place:
    """Raises InputError where the file cannot be read: it was there a moment ago."""
    with _readable(path), open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
    try:
        return tar.add_pieces(name, length, _pieces(path))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} was changed while it was packed: start the command again") from None


def _pieces(path: str) -> Iterator[bytes]:
    with _readable(path):
        file = open(path, "rb")  # noqa: SIM115  closed below, and what is between is not ours to explain
    with file:
        while True:
            with _readable(path):
                piece = file.read(_PIECE)
            if not piece:
                return
            yield piece


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; start the command again") from None


def describe(sample: Sample, name: str) -> dict[str, Any]:
    """What `KEY.json` says of a sample.

    Args:
        name: of the original file or folder.
    """
    found: dict[str, Any] = {}
    if sample.labels:
        found["label"] = sample.labels[0] if len(sample.labels) == 1 else list(sample.labels)
    found |= {"source": sample.source, "name": name, "frames": sample.frames, "fps": sample.fps}
    found |= {"width": sample.width, "height": sample.height}
    if sample.stride is not None:
        found["stride"] = sample.stride
    if sample.keep_every != 1:
        found |= {"keep_every": sample.keep_every, "phase": sample.phase}
    return found


def _index_path(job: ShardJob, shard: int) -> Path:
    return (job.place.folder / shard_name(shard)).with_suffix(INDEX_SUFFIX)


def _read_done(job: ShardJob, plan: ShardPlan, shard: int) -> ShardIndex | None:
    """The index of a shard that is complete, in memory; None where it is not."""
    path, numbers = _index_path(job, shard), plan[shard][1]
    if not path.exists():
        return None
    index = read_index(path)
    try:
        size = os.path.getsize(path.with_suffix(".tar"))
    except FileNotFoundError:
        return None
    if size != index.shards[0].size or index.settings.get("videos") != [numbers.start, numbers.stop]:
        raise InputError(
            f"{path.with_suffix('.tar')} is not the shard that was packed here: it was changed; remove it "
            f"and {path.name}, and start the command again"
        )
    return index.in_memory()
