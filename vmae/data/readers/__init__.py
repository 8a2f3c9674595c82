"""Readers of videos, one file a library: each module of this package has a `BACKEND`, and
`vmae.data.decode.BACKENDS` lists them all.

A new library is a new file here: a `VideoReader` with `__len__`, `_decode` and `close`, a function that tells
what is missing, and a `BACKEND`. `auto`, `check-data --backend`, `doctor`, the tests and bench/data.py then
know it. Nothing here is imported before it is used but the modules themselves: the library is imported by the
functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmae.data.manifest import VideoEntry
from vmae.data.video_reader import VideoReader


@dataclass(frozen=True, kw_only=True)
class Library:
    """The package that a backend needs, as `doctor` tells it.

    Attributes:
        name: shown to the user.
        module: import name.
        packages: distributions that may provide it; only one may be installed.
        install: command that installs it.
        without: cost of not having it.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    install: str
    without: str


@dataclass(frozen=True)
class Backend:
    """A way to read videos.

    Attributes:
        name: name for `--backend` and `open_video`.
        kinds: the `VideoEntry.kind`s that it reads.
        open: opens an entry, or raises DecodeError.
        missing: tells what to install; None where it can be used here.
        refuses: tells, in half a line, what it would decode wrongly of an entry; None where nothing.
        order: its place in `auto`, the smallest first.
        library: the package that it needs; None where none.
    """

    name: str
    kinds: tuple[str, ...]
    open: Callable[[VideoEntry], VideoReader]
    missing: Callable[[], str | None]
    refuses: Callable[[VideoEntry], str | None] = lambda entry: None
    order: int = 100
    library: Library | None = None
