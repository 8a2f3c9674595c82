"""An index as the data of a command: found by its name, checked before a run begins.

Where the index or its shards lie makes no difference to any sample. Rank 0 checks, once for each file, that
no key comes twice, and that every shard is there and as long as the index says.
"""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

import numpy as np

from vmae.data.files import Unanswered, ask_files, path_kind
from vmae.data.shards.entries import Shard, ShardError, is_address
from vmae.data.shards.index import INDEX_NAME, ShardIndex, is_index, read_index
from vmae.data.shards.stores import split_address
from vmae.errors import InputError

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_KEYS_AT_ONCE = 1 << 12  # arrays that stay in the cache: four times as fast as 1 << 14
_checked: set[tuple[str, str, float, int]] = set()  # indexes that this process has found good


def join_place(start: str | Path, name: str) -> str:
    """`name`, from the folder or address `start` where it is relative."""
    if is_address(name) or os.path.isabs(name):
        return name
    return posixpath.join(str(start), name) if is_address(start) else os.path.join(start, name)


def folder_of(path: str | Path) -> str:
    """The folder or address of what lies at `path`."""
    return os.path.dirname(str(path))


def index_at(path: str | Path, root: str | Path | None = None) -> ShardIndex | None:
    """The index that `path` names, checked; None where it names something else.

    Args:
        path: a file or an address (s3://, gs://, az://, https://) that ends with `.vmae`.
        root: folder or address at which the names of its shards start; None means its own.

    Raises:
        InputError: the index cannot be read, is none, is of another version, holds a key twice or no sample,
            or its shards are not there; a tar file, or a folder that holds an index, in its place; an address
            of anything else.
    """
    name = str(path)
    if is_address(name):
        split_address(name)  # before any line repeats it
    if not is_index(name) or (not is_address(name) and path_kind(name) == "a folder"):
        _refuse_others(name)
        return None
    file = _local(name)
    try:
        index = read_index(file, folder_of(name) if root is None else str(root))
    except InputError as error:  # it has an address, not the name of its copy
        raise InputError(str(error).replace(str(file), name)) from None
    if not len(index):
        raise InputError(f"index {name} holds no samples")
    if os.environ.get("RANK", "0") == "0":
        _check_once(name, index)
    return index


def _refuse_others(name: str) -> None:
    """Raises InputError for what somebody may take for an index."""
    if name.endswith(_TAR) and (is_address(name) or path_kind(name) != "a folder"):
        raise InputError(
            f"{name} is a tar file: make an index of it and its neighbours with `vmae index`, and give that"
        )
    if is_address(name):
        raise InputError(
            f"{name} is an address, and of those only an index of shards can be read (.../{INDEX_NAME}, made "
            "by `vmae pack --shards` or `vmae index`); download anything else first"
        )
    refuse_folder_of_shards(name)


def refuse_folder_of_shards(name: str) -> None:
    """Raises InputError where a folder holds an index, which is what is meant."""
    inside = os.path.join(name, INDEX_NAME)
    if path_kind(name) == "a folder" and path_kind(inside) == "a file":
        raise InputError(f"folder {name} holds shards: give their index, {inside}")


def _local(name: str) -> str | Path:
    """The file of an index: itself, or a copy of what lies in a store."""
    if not is_address(name):
        kind = path_kind(name)
        if kind != "a file":
            raise InputError(f"index {name} {'does not exist' if kind is None else f'is {kind}, not a file'}")
        return name
    from vmae.data.shards.remote import fetch_index

    return fetch_index(name)


# --- Checks ---


def _check_once(name: str, index: ShardIndex) -> None:
    about = None if is_address(name) else os.stat(name)
    key = (name, index.base, about.st_mtime if about else 0.0, about.st_size if about else len(index))
    if key not in _checked:
        check_keys(name, index)
        check_shards(name, index)
        _checked.add(key)


def check_keys(name: str, index: ShardIndex) -> None:
    """Raises InputError where two samples have the same key, or a key is no text."""
    ends, data = index.columns["key_end"], index.columns["keys"]
    if len(ends) and not np.all(ends[1:] >= ends[:-1]):
        raise InputError(f"index {name} is damaged (keys): make it anew with `vmae index`")
    hashes = np.empty(len(ends), np.uint64)
    for first in range(0, len(ends), _KEYS_AT_ONCE):
        last = min(first + _KEYS_AT_ONCE, len(ends))
        start, stop = int(ends[first - 1]) if first else 0, int(ends[last - 1])
        try:
            str(data[start:stop].data, "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"index {name} is damaged (keys): make it anew with `vmae index`") from None
        hashes[first:last] = index[first:last].key_hashes()
    ordered = np.sort(hashes)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    first_of: dict[str, int] = {}
    for number in np.flatnonzero(np.isin(hashes, twice)).tolist() if len(twice) else ():
        key = index.key(number)
        if key in first_of:
            raise InputError(
                f"index {name}: key {key!r} comes twice, as samples {first_of[key] + 1} and {number + 1}; "
                "give each sample a name of its own and make the index anew"
            )
        first_of[key] = number


def check_shards(name: str, index: ShardIndex) -> None:
    """Raises InputError unless every shard of an index is there, and as long as it says."""
    remote = [shard for shard in index.shards if is_address(shard.name)]
    if remote:
        from vmae.data.shards import remote as stored

        stored.check_shards(remote)
    local = [shard for shard in index.shards if not is_address(shard.name)]
    try:
        problems = [problem for problem in ask_files(_problem, local, threads=8) if problem]
    except Unanswered as error:
        raise InputError(f"index {name}: shard {local[error.item].name}: {error}") from None
    if problems:
        raise ShardError(
            f"index {name}: {problems[0]}; {len(problems)} of {len(index.shards)} shards cannot be used: "
            "bring them back, or make the index anew with `vmae index`"
        )


def _problem(shard: Shard) -> str | None:
    try:
        size = os.stat(shard.name).st_size
    except OSError as error:
        return f"shard {shard.name} cannot be read: {error.strerror}"
    return None if size == shard.size else f"shard {shard.name} has {size} bytes, not {shard.size}"


def check_labels(name: str, index: ShardIndex, num_classes: int | None, most: int) -> int:
    """The number of classes of an index whose samples all have labels.

    Args:
        name: of the index, for messages.
        num_classes: labels are below it; None takes the largest plus 1.
        most: the largest number of classes there can be.

    Raises:
        InputError: a sample without a label, or with one out of range.
    """
    labels, counts = index.columns["labels"], np.diff(index.columns["label_end"].astype(np.int64), prepend=0)
    bare = np.flatnonzero(counts == 0)
    if len(bare):
        raise InputError(
            f"index {name}: {len(bare)} of {len(index)} samples have no label, the first "
            f"{index.key(int(bare[0]))!r}: pack a labelled list (`path label` a line)"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= (num_classes or most)))
    if len(wrong):
        number = int(np.searchsorted(index.columns["label_end"], wrong[0], side="right"))
        known = f"0 to {(num_classes or most) - 1}" + (f" ({num_classes} classes)" if num_classes else "")
        raise InputError(
            f"index {name}, {index.key(number)!r}: label {int(labels[wrong[0]])} is out of range; labels are "
            f"{known}"
        )
    return num_classes or int(labels.max()) + 1
