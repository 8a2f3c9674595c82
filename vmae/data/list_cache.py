"""What was read of a long list, kept in a mapped file: parsed once on a machine, shared by its processes.

The file lies hidden beside the list, or where that folder cannot be written, in `$XDG_CACHE_HOME/vmae/lists`;
where neither can, a list is read into memory. Its name holds a hash of the list's bytes and of what else
decides (the kind of list, its settings, the folders that relative paths start from): a list that changed has
another one. The first process writes it while the others wait, whole or not at all; one that is damaged is
written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vmae.data.entry_table import COLUMNS, EntryTable, LabelTable, count_distinct, path_hashes, spread
from vmae.data.files import cache_home
from vmae.data.list_lines import read_pieces
from vmae.data.list_parsing import Grammar, ListParser, Piece
from vmae.errors import InputError
from vmae.files.flat_arrays import read_arrays, write_arrays

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # Windows has no such module

FORMAT, VERSION, SUFFIX = "vmae-list", "1", ".vmae-list"
_DONE, _STALE_S, _UNUSED_S = "check", 24 * 3600.0, 30 * 24 * 3600.0
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay"}
Table = tuple[EntryTable, "LabelTable | None"]


@dataclass(frozen=True)
class Key:
    """What a cache is of.

    Attributes:
        content: SHA-256 of the list's bytes.
        settings: hash of all else that decides.
    """

    content: str
    settings: str

    @classmethod
    def of(cls, path: str | Path, grammar: Grammar, roots: Sequence[str]) -> Key:
        """That of a list as it is now.

        Raises:
            InputError: it cannot be read.
        """
        content = hashlib.sha256()
        for data in read_pieces(path):
            content.update(data)
        start = ""
        if not all(map(os.path.isabs, roots)):
            with contextlib.suppress(OSError):  # the working directory was removed
                start = os.getcwd()
        settings = repr((VERSION, grammar.settings, list(roots), start))
        return cls(content.hexdigest(), hashlib.sha256(settings.encode()).hexdigest())

    @property
    def text(self) -> str:
        return f"{self.content[:16]}-{self.settings[:8]}"


def read_cached(path: str | Path, grammar: Grammar, roots: Sequence[str]) -> Table:
    """The entries of a long list, and its labels where it has some.

    Raises:
        InputError: what `read_list` says of the list's text; a file that was looked up cannot be used.
    """
    key = Key.of(path, grammar, roots)
    found = _find(path, key, roots)
    if found is not None:
        return found
    with _locked(key):
        found = _find(path, key, roots)  # another process may have written it meanwhile
        for place in () if found else _places(path):
            if _write(path, grammar, roots, key, place.of(key)):
                place.clear(key)
                found = _read(place.of(key), key, roots)
                break
    if found is None:
        found = _in_memory(_arrays(ListParser(str(path), grammar, roots), path, key), roots)
    return found


def read_all(
    path: str | Path, grammar: Grammar, roots: Sequence[str]
) -> tuple[EntryTable, LabelTable | None, list[tuple[int, str]]]:
    """Like `read_cached`, with a look at every line and without a file of its own: the entries that can be
    used, their labels, and (line number, what is wrong) of the other lines.

    Raises:
        InputError: what `read_list` says of the list's text.
    """
    parser = ListParser(str(path), grammar, roots, every=True)
    table, labels = _in_memory(_arrays(parser, path), roots)
    return table, labels, sorted(parser.problems)


def _in_memory(arrays: dict[str, Iterable[np.ndarray]], roots: Sequence[str]) -> Table:
    return _table({name: np.concatenate(list(pieces)) for name, pieces in arrays.items()}, roots)


def forget(path: str | Path, grammar: Grammar, roots: Sequence[str]) -> None:
    """Remove what is kept of a list, as far as that can be done."""
    key = Key.of(path, grammar, roots)
    for place in _places(path):
        with contextlib.suppress(OSError):
            place.of(key).unlink()


# --- Where ---


@dataclass(frozen=True)
class _Place:
    """A folder for what is kept of a list, and what the names of the files begin with."""

    folder: Path
    prefix: str

    def of(self, key: Key) -> Path:
        return self.folder / f"{self.prefix}{key.text}{SUFFIX}"

    def clear(self, key: Key) -> None:
        """Remove what is kept of the list as it was before, and what a killed process left.

        Who maps a file of a network's file system may lose it when another machine removes it: there, only
        what nobody began to use for a month is removed.
        """
        prefix, now = re.escape(self.prefix), time.time()
        old = re.compile(rf"{prefix}([0-9a-f]{{16}})-[0-9a-f]{{8}}{re.escape(SUFFIX)}")
        unfinished = re.compile(rf"\.?{prefix}[0-9a-f-]*{re.escape(SUFFIX)}\..*")
        kept_s = 0.0 if is_local(self.folder) else _UNUSED_S
        with contextlib.suppress(OSError), os.scandir(self.folder) as files:
            for file in files:
                match = old.fullmatch(file.name)
                age_s = now - file.stat(follow_symlinks=False).st_mtime
                gone = match is not None and match[1] != key.content[:16] and age_s >= kept_s
                if gone or (unfinished.fullmatch(file.name) and age_s > _STALE_S):
                    with contextlib.suppress(OSError):
                        os.unlink(file.path)


def _places(path: str | Path) -> list[_Place]:
    """Where a list may be kept, the first one first."""
    name, whole = os.path.basename(path), os.path.abspath(path)
    if len(os.fsencode(name)) > 150:  # a name has 255 bytes at most
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    own = hashlib.sha256(os.fsencode(whole)).hexdigest()[:12]  # lists of many folders, maybe of one name
    return [
        _Place(Path(whole).parent, f".{name}."),
        _Place(cache_home() / "lists", f".{name}.{own}."),
    ]


def _find(path: str | Path, key: Key, roots: Sequence[str]) -> Table | None:
    for place in _places(path):
        found = _read(place.of(key), key, roots)
        if found is not None:
            with contextlib.suppress(OSError):
                os.utime(place.of(key))
            return found
    return None


def is_local(folder: str | Path, mounts: str | Path = "/proc/self/mountinfo") -> bool:
    """Whether a folder lies on a disk of this machine, or in its memory; False where that is not known."""
    try:
        lines = Path(mounts).read_text(errors="surrogateescape").splitlines()
        wanted = os.path.realpath(folder)
    except OSError:
        return False
    best, kind = "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        inside = wanted == point or wanted.startswith(os.path.join(point, ""))
        if inside and len(point) >= len(best):  # the last one mounted there counts
            best, kind = point, after.split(" ")[0]
    return kind in _LOCAL


@contextlib.contextmanager
def _locked(key: Key) -> Iterator[None]:
    """One process of this machine and user at a time, where the system can promise that."""
    if fcntl is None:
        yield
        return
    user = os.getuid()
    path = Path(tempfile.gettempdir()) / f"vmae-list-{user}-{key.text}.lock"
    handle = None
    try:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    break
            os.close(handle)  # its last holder has removed it
            handle = None
    except OSError:  # without a lock, several may write the same
        if handle is not None:
            os.close(handle)
            handle = None
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)


# --- Writing ---


def _write(path: str | Path, grammar: Grammar, roots: Sequence[str], key: Key, target: Path) -> bool:
    """Read the list into a file; False where that cannot be written."""
    # A name of its own: another machine may write the same.
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}")
    about = {"format": FORMAT, "version": VERSION, "content": key.content, "settings": key.settings}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays = _arrays(ListParser(str(path), grammar, roots), path, key)
        write_arrays(part, arrays, about)
        os.replace(part, target)
    except OSError:
        return False
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            return False
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return True


@dataclass
class _Column:
    """A column in parts; one value while all are the same."""

    counts: list[int] = field(default_factory=list)
    parts: list[np.ndarray] = field(default_factory=list)

    def add(self, part: np.ndarray, count: int) -> None:
        self.parts.append(part[:1].copy() if len(part) and (part == part[0]).all() else part)
        self.counts.append(count)

    def pieces(self, dtype: type) -> Iterator[np.ndarray]:
        same = {int(part[0]) for part in self.parts} if all(len(part) == 1 for part in self.parts) else ()
        if len(same) == 1:
            yield self.parts[0].astype(dtype)
            return
        yield np.empty(0, dtype)
        for part, count in zip(self.parts, self.counts):
            yield spread(part, count).astype(dtype)


def _arrays(parser: ListParser, path: str | Path, key: Key | None = None) -> dict[str, Iterable[np.ndarray]]:
    """The arrays of a cache in pieces; the first one reads the list, so they are to be taken in order.

    Args:
        key: of the list; with it, a file that cannot be used is an error, as is a list that has changed.

    Raises:
        InputError: while they are taken: see `read_cached`.
    """
    roots, content = parser.roots, hashlib.sha256()
    columns = {name: _Column() for name in COLUMNS}
    ends: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    labels: list[tuple[np.ndarray, np.ndarray | None]] = []
    check = [0]

    def data() -> Iterator[bytes]:
        for data in read_pieces(path):
            content.update(data)
            yield data

    def text() -> Iterator[np.ndarray]:
        yield np.empty(0, np.uint8)
        for piece in parser.pieces(data()):
            keep(piece)
            yield np.frombuffer(piece.text, np.uint8)
        if key is not None and parser.problems:
            raise_looked_up(path, parser.problems, parser.looked_up, roots)
        if key is not None and content.hexdigest() != key.content:
            raise InputError(f"list file {str(path)!r} changed while it was read; start again")

    def keep(piece: Piece) -> None:
        count = len(piece.ends)
        ends.append(np.diff(piece.ends, prepend=0).astype(np.uint32))
        for name, column in columns.items():
            column.add(piece.columns[name], count)
        spread_out = {name: spread(column, count) for name, column in piece.columns.items()}
        part = EntryTable(np.frombuffer(piece.text, np.uint8), piece.ends, spread_out, roots=roots)
        hashes.append(path_hashes(part, 0, count))
        if piece.labels is not None:
            labels.append(piece.labels)

    def offsets(lengths: Callable[[], Iterable[np.ndarray]]) -> Iterator[np.ndarray]:
        total = sum(int(part.sum(dtype=np.int64)) for part in lengths())
        dtype, begin = np.uint32 if total < 1 << 32 else np.uint64, 0
        yield np.empty(0, dtype)
        for part in lengths():
            places = part.cumsum(dtype=np.int64) + begin
            begin = int(places[-1]) if len(places) else begin
            yield places.astype(dtype)

    def label_counts() -> Iterator[np.ndarray]:
        return (np.ones(len(values), np.int64) if counts is None else counts for values, counts in labels)

    def label_ends() -> Iterator[np.ndarray]:
        yield np.empty(0, np.uint32)
        if any(counts is not None for _, counts in labels):
            yield from offsets(label_counts)

    def paths() -> Iterator[np.ndarray]:
        yield np.array([count_distinct(hashes)], np.int64)

    def numbered() -> Iterator[np.ndarray]:
        yield np.frombuffer(json.dumps(list(parser.patterns)).encode(), np.uint8)

    def summed(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for piece in pieces:
            check[0] = zlib.crc32(np.ascontiguousarray(piece).data, check[0])
            yield piece

    arrays: dict[str, Iterable[np.ndarray]] = {"text": text(), "ends": offsets(lambda: ends)}
    arrays |= {name: columns[name].pieces(dtype) for name, dtype in COLUMNS.items()}
    if parser.grammar.classes is not None:
        arrays["labels"] = itertools.chain([np.empty(0, np.int32)], (values for values, _ in labels))
        arrays["label_ends"] = label_ends()
    arrays |= {"patterns": numbered(), "paths": paths()}
    found = {name: summed(pieces) for name, pieces in arrays.items()}
    return {**found, _DONE: (np.array([value], np.uint32) for value in check)}


def raise_looked_up(
    path: str | Path, problems: Sequence[tuple[int, str]], looked_up: int, roots: Sequence[str]
) -> None:
    """Raise InputError with the first of `problems` of the entries that were looked up."""
    problems = sorted(set(problems))
    line, problem = problems[0]
    tried = f"--data-root {roots[0]!r}" if len(roots) == 1 else "no --data-root given"
    raise InputError(
        f"list file {str(path)!r}, line {line}: {problem}; {len(problems)} of the {looked_up} entries looked "
        f"up cannot be used ({tried}). Correct the paths, or the --data-root that they start from; "
        "`python -m vmae check-data` looks at all"
    )


# --- Reading ---


def _read(path: Path, key: Key, roots: Sequence[str]) -> Table | None:
    """What a cache holds; None where there is none, or it is damaged or of another list."""
    try:
        about, arrays = read_arrays(path)
    except InputError:
        return None
    wanted = {"format": FORMAT, "version": VERSION, "content": key.content, "settings": key.settings}
    names = {"text", "ends", *COLUMNS, "patterns", "paths", _DONE}
    if about != wanted or not names <= set(arrays) or len(arrays[_DONE]) != 1:
        return None
    check = 0
    for name, array in arrays.items():
        if name != _DONE:
            check = zlib.crc32(array.data, check)
    return _table(arrays, roots) if check == int(arrays[_DONE][0]) else None


def _table(arrays: dict[str, np.ndarray], roots: Sequence[str]) -> Table:
    ends = arrays["ends"]
    table = EntryTable(
        arrays["text"],
        ends,
        {name: spread(arrays[name], len(ends)) for name in COLUMNS},
        patterns=json.loads(arrays["patterns"].tobytes()),
        roots=roots,
        paths=int(arrays["paths"][0]),
    )
    if "labels" not in arrays:
        return table, None
    several = arrays["label_ends"]
    return table, LabelTable(arrays["labels"], several if len(several) else None)
