"""What curation pipelines leave behind, clip by clip: outputs of NeMo Curator and cosmos-curate, manifests,
and folders of videos with a JSON file beside each.

Read as published, looked up in 2026 (NVIDIA-NeMo/Curator, 25.09 to 26.09; nvidia-cosmos/cosmos-curate, 1.x):

    OUT/clips/UUID.mp4                a clip (in the documents also below folders: clips/d2/UUID.mp4)
    OUT/filtered_clips/UUID.mp4       a clip that a filter took out
    OUT/metas/v0/UUID.json            its record; filtered clips have one too
    OUT/metas_jsonl/v0/*.jsonl        cosmos-curate, instead: the records of some clips, one a line

A record has `span_uuid`, `duration_span` [s, s], `clip_location`, `width`, `height`, `framerate`,
`num_frames`, and where they were computed `motion_score` {`global_mean`, ...} and `aesthetic_score`. Its
`valid` is not used: it is false for every clip of a pipeline without captions.

Records are read a few thousand at a time, so memory grows with the names of the files in a folder only.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vmae.data.files import Unanswered, ask_files
from vmae.data.video_files import find_videos, looks_like_url
from vmae.errors import InputError
from vmae.files.json_files import parse_json

PATH_KEYS = ("clip_location", "path", "file", "video", "video_path", "file_path", "filename", "file_name")
_ID_KEYS = ("span_uuid", "id", "uuid", "clip_id", "key", "__key__")
_SECONDS_KEYS = ("duration", "duration_s", "seconds")
_AT_ONCE, _THREADS = 4096, 16
_LINES, _TABLE = (".jsonl", ".ndjson"), ".parquet"
_CLIPS, _FILTERED = "clips", "filtered_clips"
_READ = (
    "`lists import` reads an output folder of NeMo Curator or cosmos-curate, JSON Lines (.jsonl), Parquet "
    "(.parquet), a folder of these, or a folder of videos with KEY.json beside KEY.mp4"
)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Clip:
    """What a record tells of a clip; None where it does not.

    Attributes:
        where: file or line of the record, for people.
        path: the video, found or to be looked for; None where the record names none.
        id: its name in tables of duplicates.
        side: pixels of the short side.
        aesthetic, motion: scores, as the pipeline gives them.
        filtered: whether the pipeline took it out.
        problem: why the record cannot be used.
    """

    where: str
    path: str | None = None
    id: str = ""
    seconds: float | None = None
    side: int | None = None
    aesthetic: float | None = None
    motion: float | None = None
    filtered: bool = False
    problem: str | None = None


def read_clips(
    source: str | Path, *, videos: str | Path | None = None, path_key: str | None = None
) -> Iterator[Clip]:
    """The clips of a pipeline's output, in an order that depends on names and lines alone.

    Args:
        videos: folder that holds `clips` (of a pipeline's output), or that relative paths (of a manifest)
            start from; None means `source`, or the manifest's folder.
        path_key: key or column of the video's path in manifests, `a.b` for one inside another.

    Raises:
        InputError: `source` is nothing that is read here, or cannot be read; Parquet without pyarrow.
    """
    place, source = Path(source), str(source)
    if looks_like_url(source):
        raise InputError(
            f"{source!r} is an address; copy the records (metas/, small) to this machine, and give the "
            "folder of the clips, copied or mounted, as --videos"
        )
    if place.name.endswith(".lance") or place.joinpath("_versions").is_dir():
        raise InputError(
            f"{source!r} is a Lance data set, which is not read here; write it as Parquet: "
            "`pyarrow.parquet.write_table(lance.dataset(PATH).to_table(), 'clips.parquet')`"
        )
    if not place.exists():
        raise InputError(f"{source!r} does not exist; {_READ}")
    if place.is_dir():
        return _of_folder(place, Path(videos) if videos is not None else None, path_key)
    if place.suffix.lower() in (*_LINES, _TABLE):
        return _of_manifest(place, Path(videos) if videos is not None else place.parent, path_key)
    hint = ": `vmae index` makes an index of tar files" if place.suffix.lower() == ".tar" else ""
    raise InputError(f"{source!r} is not read here{hint}; {_READ}")


def _of_folder(folder: Path, videos: Path | None, path_key: str | None) -> Iterator[Clip]:
    groups = [folder / name for name in ("metas", "metas_jsonl") if (folder / name).is_dir()]
    if groups:
        return _of_pipeline(groups, videos or folder)
    manifests = [folder / name for name in _names(folder, *_LINES, _TABLE)]
    if manifests:
        root = videos or folder
        return itertools.chain.from_iterable(_of_manifest(path, root, path_key) for path in manifests)
    return _of_videos(videos or folder)


# --- Outputs of NeMo Curator and cosmos-curate ---


def _names(folder: Path, *suffixes: str) -> list[str]:
    """What is in a folder, in order; only with these suffixes, where there are any.

    Raises:
        InputError: it cannot be read.
    """
    try:
        found = os.listdir(folder)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be read: {error.strerror}") from None
    return sorted(name for name in found if not suffixes or name.lower().endswith(suffixes))


def _of_pipeline(groups: list[Path], videos: Path) -> Iterator[Clip]:
    for group in groups:
        versions = [group / name for name in _names(group) if (group / name).is_dir()]
        if not versions:
            raise InputError(f"{group} holds no version (v0) of the records")
        yield from (_of_metas if group.name == "metas" else _of_meta_lines)(versions[-1], videos)


def _of_metas(folder: Path, videos: Path) -> Iterator[Clip]:
    return in_groups(lambda name: _of_meta(folder / name, videos), _names(folder, ".json"))


def _of_meta_lines(folder: Path, videos: Path) -> Iterator[Clip]:
    for name in _names(folder, *_LINES):
        for where, record in _lines_of(folder / name):
            yield _pipeline_clip(where, record, videos)


def _of_meta(path: Path, videos: Path) -> Clip:
    try:
        record = parse_json(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError):
        return Clip(str(path), problem="a record that is damaged or cannot be read")
    return _pipeline_clip(str(path), record, videos, path.stem)


def _pipeline_clip(where: str, record: Any, videos: Path, name: str = "") -> Clip:
    if not isinstance(record, dict):
        return Clip(where, problem="a record that is damaged or cannot be read")
    told = str(record.get("clip_location") or "")
    clip_id = str(record.get("span_uuid") or name)
    kind, below = _CLIPS, f"{clip_id}.mp4"
    for folder in (_FILTERED, _CLIPS):
        _, found, rest = told.rpartition(f"/{folder}/")
        if found:
            kind, below = folder, rest
            break
    candidates = [videos / _CLIPS / below, videos / _CLIPS / f"{clip_id}.mp4"]
    if told and not looks_like_url(told):
        candidates.append(Path(told))
    path = next((path for path in candidates if path.is_file()), candidates[0])
    return _clip(where, record, str(path), clip_id, filtered=kind == _FILTERED)


# --- Manifests ---


def _of_manifest(path: Path, root: Path, path_key: str | None) -> Iterator[Clip]:
    records = _rows_of(path) if path.suffix.lower() == _TABLE else _lines_of(path)
    keys = PATH_KEYS if path_key is None else (path_key,)
    for where, record in records:
        if not isinstance(record, dict):
            yield Clip(where, problem="a record that is damaged or cannot be read")
            continue
        told = next((found for key in keys if isinstance(found := _look_up(record, key), str)), None)
        if told is None:
            known = ", ".join(map(str, list(record)[:20]))
            raise InputError(f"{where}: no path under {' or '.join(keys)}; --path-key names it: {known}")
        if looks_like_url(told):
            yield Clip(where, told, problem="an address: download it first")
            continue
        told_id = next((str(record[key]) for key in _ID_KEYS if record.get(key)), Path(told).stem)
        yield _clip(where, record, os.path.join(root, told), told_id)


def _look_up(record: Mapping[str, Any], key: str) -> Any:
    if key in record:
        return record[key]
    found: Any = record
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _lines_of(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, what it holds or None where that is damaged) of each line."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        content = parse_json(line.decode("utf-8-sig"))
                    except ValueError:
                        content = None
                    yield f"{path}, line {number}", content
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _rows_of(path: Path, columns: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Likewise of a Parquet file, some rows at a time.

    Raises:
        InputError: pyarrow is not installed, or the file is no Parquet or lacks a column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: Parquet needs the package pyarrow: `pip install pyarrow`") from None
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        wide = ("embedding", "embeddings")  # never wanted here, and most of a file
        wanted = columns or [name for name in file.schema_arrow.names if name not in wide]
        for batch in file.iter_batches(batch_size=_AT_ONCE, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


# --- Folders of videos ---


def _of_videos(folder: Path) -> Iterator[Clip]:
    return in_groups(_beside, find_videos(folder))


def _beside(path: str) -> Clip:
    """A video, with the record beside it if there is one."""
    try:
        record = parse_json(Path(path).with_suffix(".json").read_bytes().decode("utf-8"))
    except FileNotFoundError:
        record = {}
    except (OSError, ValueError):
        return Clip(path, path, problem="a record that is damaged or cannot be read")
    told = record if isinstance(record, dict) else {}
    return _clip(
        path, told, path, str(next((told[key] for key in _ID_KEYS if told.get(key)), Path(path).stem))
    )


# --- Values ---


def _clip(where: str, record: Mapping[str, Any], path: str, clip_id: str, filtered: bool = False) -> Clip:
    sides = [
        _number(record.get(name)) or _number(record.get(f"{name}_source")) for name in ("width", "height")
    ]
    motion = record.get("motion_score")
    if isinstance(motion, Mapping):
        motion = motion.get("global_mean")
    return Clip(
        where,
        path,
        clip_id,
        _seconds(record),
        int(min(known)) if len(known := [side for side in sides if side is not None]) == 2 else None,
        _number(record.get("aesthetic_score")),
        _number(motion),
        filtered,
    )


def _seconds(record: Mapping[str, Any]) -> float | None:
    span = record.get("duration_span")
    if isinstance(span, (list, tuple)) and len(span) == 2:
        begin, end = map(_number, span)
        if begin is not None and end is not None:
            return end - begin
    told = next((found for key in _SECONDS_KEYS if (found := _number(record.get(key))) is not None), None)
    frames = _number(record.get("num_frames"))
    rate = next((found for key in ("framerate", "fps") if (found := _number(record.get(key)))), None)
    return frames / rate if told is None and frames is not None and rate else told


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e300 else None


def in_groups(function: Callable[[Item], Clip], items: Iterable[Item]) -> Iterator[Clip]:
    """[function(item)], some thousand at a time, by several threads: a network file system takes long for one
    file, not for many side by side."""
    items = iter(items)
    while group := list(itertools.islice(items, _AT_ONCE)):
        try:
            yield from ask_files(function, group, threads=_THREADS)
        except Unanswered as error:
            raise InputError(f"{group[error.item]}: {error}") from None


# --- Duplicates ---


class Names:
    """A set of names that takes 8 bytes for each: of 100 million, two are taken for one another with a chance
    of 1 in 3000."""

    def __init__(self, names: Iterable[str]) -> None:
        self._hashes = np.unique(np.fromiter(map(_hash, names), np.uint64))

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, name: str) -> bool:
        place = int(np.searchsorted(self._hashes, (value := _hash(name))))
        return place < len(self._hashes) and int(self._hashes[place]) == value


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def read_duplicates(path: str | Path, similarity: float) -> Names:
    """The clips that a removal of duplicates takes out.

    Args:
        path: Parquet with the column `id` (a file, or a folder of them: NeMo Curator's `duplicates`,
            cosmos-curate's `extraction/unique_ids_EPS.parquet`, which holds those to remove, or
            `extraction/semdedup_pruning_tables`), the output folder of either, JSON Lines with `id`, or a
            text with an id a line.
        similarity: rows with a `cosine_sim_score` count from this one on.

    Raises:
        InputError: nothing there, or no such table.
    """
    place = Path(path)
    for inside in ("duplicates", "extraction", "semdedup_pruning_tables"):
        if (place / inside).is_dir():
            place = place / inside
    if not place.exists():
        raise InputError(f"--without {path}: does not exist")
    files = [place]
    if place.is_dir():
        files = [place / name for name in _names(place, _TABLE, *_LINES)]
        if not files:
            raise InputError(f"--without {path}: no .parquet and no .jsonl file in {place}")
    return Names(itertools.chain.from_iterable(_duplicates_of(file, similarity) for file in files))


def _duplicates_of(path: Path, similarity: float) -> Iterator[str]:
    if path.suffix.lower() not in (_TABLE, *_LINES):
        try:
            with open(path, encoding="utf-8-sig") as file:
                yield from filter(None, (line.strip() for line in file))
        except (OSError, ValueError) as error:
            raise InputError(f"--without {path}: no text with an id a line ({error})") from None
        return
    for where, record in _rows_of(path) if path.suffix.lower() == _TABLE else _lines_of(path):
        if not isinstance(record, dict) or "id" not in record:
            raise InputError(f"--without {where}: no column `id`")
        score = _number(record.get("cosine_sim_score"))
        if score is None or score >= similarity:
            yield str(record["id"])
