"""Pixels out of files, behind one small interface.

A backend is a name, the kinds of entries it reads, and a function that opens one. `BACKENDS` holds those of
`vmae.data.readers`, a file each; one that lives elsewhere joins with `register_backend`. Readers are opened
where they are used (in the loader's worker), hold one file and are closed at once: nothing that decodes is
ever shared or sent between processes.

`auto` takes the first that is installed and safe for the file. torchcodec and decord refuse, also when they
were named, what PyAV finds in a file and they were found to be wrong about (docs/decoders.md).
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from vmae.data import readers
from vmae.data.channels import reading_kind
from vmae.data.files import check_regular
from vmae.data.manifest import VideoEntry
from vmae.data.readers import Backend
from vmae.data.shards.entries import DamagedShard, ShardEntry
from vmae.data.shards.opening import open_stored
from vmae.data.video_reader import DecodeError, VideoReader, memory_as_decode_error
from vmae.errors import InputError


def _load_backends() -> dict[str, Backend]:
    """The `BACKEND` of each module of `vmae.data.readers`, by name, in the order of `auto`."""
    names = [f"{readers.__name__}.{module.name}" for module in pkgutil.iter_modules(readers.__path__)]
    found: list[Backend] = [importlib.import_module(name).BACKEND for name in names]
    return {backend.name: backend for backend in sorted(found, key=lambda backend: backend.order)}


BACKENDS = _load_backends()


def register_backend(backend: Backend) -> Backend:
    """Make `backend` known to `open_video`. `auto` takes the first known one that is installed and does not
    refuse."""
    BACKENDS[backend.name] = backend
    return backend


def video_backends() -> list[str]:
    """Names of the backends that read video files, in the order of `auto`."""
    return [name for name, backend in BACKENDS.items() if "video" in backend.kinds]


def open_video(source: VideoEntry | str | Path, backend: str = "auto") -> VideoReader:
    """Open a video file, a stack or a folder of frames, or one that lies in a shard. Frames have three
    channels, unless the reader's `channels` is set to others.

    Args:
        source: an entry of a list file or an index, or the path of a video file.
        backend: "auto", or a name in `BACKENDS`.

    Raises:
        DecodeError: the file is not there, is no regular one, cannot be decoded, or has no frames.
        ShardError: the shard cannot be read, or is not what its index says.
        InputError: an unknown backend, one that does not read this kind of entry, or one that is not
            installed.
    """
    entry = source if isinstance(source, VideoEntry) else VideoEntry(str(source))
    candidates = find_backends(reading_kind(entry), backend)
    if isinstance(entry, ShardEntry):
        by_packets = candidates[0].name == "pyav"
        reader = open_stored(entry, lambda video: _open(video, candidates), by_packets=by_packets)
        if entry.frames and entry.kind == "video" and len(reader) != entry.frames:
            found = len(reader)
            reader.close()
            raise DamagedShard(
                f"{entry.path}: has {found} frames, its index says {entry.frames}: make the index anew with "
                "`vmae index`"
            )
        return reader
    check_regular(entry.path, folder=entry.kind == "frames")
    return _open(entry, candidates)


def _open(entry: VideoEntry, candidates: list[Backend]) -> VideoReader:
    """Open a file that is there with the first of `candidates` that may read it."""
    chosen = _choose_backend(entry, candidates)
    try:
        with memory_as_decode_error(entry.path):
            reader = chosen.open(entry)
    except DecodeError as error:
        error.library = chosen.name
        raise
    reader.backend = chosen.name
    return reader


def find_backends(kind: str, name: str) -> list[Backend]:
    """The installed backends that may read an entry of this kind, at least one, the preferred one first."""
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"unknown decoding backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    candidates = [backend for backend in BACKENDS.values() if kind in backend.kinds]
    named = [backend for backend in candidates if backend.name == name]
    # The name chooses among video decoders; a list may mix in frame folders, which most of them do not read.
    if named or (name != "auto" and kind == "video"):
        candidates = named
    if not candidates:
        raise InputError(f"the decoding backend {name!r} does not read entries of kind {kind!r}")
    missing = [backend.missing() for backend in candidates]
    installed = [backend for backend, lack in zip(candidates, missing, strict=True) if lack is None]
    if not installed:
        raise InputError("; or ".join(lack for lack in missing if lack))
    return installed


def _choose_backend(entry: VideoEntry, candidates: list[Backend]) -> Backend:
    refusals = []
    for backend in candidates:
        try:
            refusal = backend.refuses(entry)
        except OSError as error:
            raise DecodeError(f"{entry.path}: cannot be read: {error.strerror}") from None
        except DecodeError as error:
            error.library = backend.name
            raise
        if refusal is None:
            return backend
        refusals.append(f"{backend.name} cannot be trusted with {refusal}")
    others = [other for other in BACKENDS.values() if entry.kind in other.kinds and other not in candidates]
    advice = "; ".join(lack for lack in (other.missing() for other in others) if lack)
    if not advice:
        advice = f"another backend may read it: {', '.join(other.name for other in others)}"
    refused = DecodeError(
        f"{entry.path}: refused, it would give wrong frames: {'; '.join(refusals)}; {advice}"
    )
    refused.library = candidates[-1].name
    raise refused
