"""Which tar files a command line means: files, folders, patterns, and the same in an object store."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmae.data.files import path_kind
from vmae.data.shards import stores
from vmae.data.shards.entries import Shard, is_address
from vmae.data.shards.remote import BEFORE_S, ask_apart, head
from vmae.errors import InputError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST = 10**6  # names that a range may mean


def find_tars(names: Sequence[str]) -> list[Shard]:
    """The tar files that `names` mean, in order: files, folders or prefixes (each `.tar` in them), patterns
    (`*.tar`), and WebDataset's ranges (`{000..117}.tar`).

    Raises:
        InputError: there is nothing, or no tar, or one comes twice; a store cannot be read.
    """
    found: dict[str, Shard] = {}
    for name in (one for given in names for one in expand_ranges(given)):
        for shard in _in_store(name) if is_address(name) else _on_disk(name):
            if shard.name in found:
                raise InputError(f"tar {shard.name} is named twice")
            found[shard.name] = shard
    return list(found.values())


def expand_ranges(name: str) -> Iterator[str]:
    """`a-{08..10}.tar` as `a-08.tar`, `a-09.tar`, `a-10.tar`; any other name as it is.

    Raises:
        InputError: the range is empty, or of more than a million numbers.
    """
    match = _RANGE.search(name)
    if match is None or (not is_address(name) and os.path.exists(name)):
        yield name
        return
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + _MOST:
        raise InputError(f"{name}: {match[0]} is no range of up to a million numbers")
    for number in range(first, last + 1):
        yield from expand_ranges(f"{name[: match.start()]}{number:0{len(match[1])}}{name[match.end() :]}")


def _on_disk(name: str) -> list[Shard]:
    kind = path_kind(name)
    if kind == "a file":
        paths = [name]
    elif kind == "a folder":
        paths = sorted(str(path) for path in Path(name).glob("*.tar") if path.is_file())
        if not paths:
            raise InputError(f"folder {name!r} holds no .tar files; name the files that are")
    elif kind is not None:
        raise InputError(f"{name!r} is {kind}, not a tar file: its members cannot be read by range")
    else:
        paths = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not paths:
            raise InputError(f"no tar file {name!r}")
    return [Shard(os.path.abspath(path), os.path.getsize(path)) for path in paths]


def _in_store(name: str) -> list[Shard]:
    parent, _, last = name.rpartition("/")
    if last and not any(mark in last for mark in "*?["):
        about = head(name)
        return [Shard(name, about.size, about.etag)]
    found = [
        shard
        for shard in ask_apart(list_objects, parent + "/")
        if fnmatch.fnmatchcase(shard.name.rpartition("/")[2], last or "*.tar")
    ]
    if not found:
        raise InputError(f"no tar file at {name}")
    return sorted(found)


def list_objects(prefix: str) -> list[Shard]:
    """Objects of a store whose address is `prefix` and a name without a further slash. For a process that is
    not forked (see `vmae.data.shards.remote`).

    Raises:
        InputError: the store cannot be read, or lists nothing.
    """
    root, key = stores.split_address(prefix + "x")
    if root.startswith("http"):
        raise InputError(f"{prefix}: a web server lists no files; name the tars, as {prefix}{{000..117}}.tar")
    store = stores.store_of(root)
    import obstore

    def ask() -> list[Shard]:
        found = obstore.list_with_delimiter(store, key[:-1])["objects"]
        return [Shard(f"{root}/{one['path']}", one["size"], one["e_tag"] or "") for one in found]

    return stores.insist(ask, prefix, root, BEFORE_S)
