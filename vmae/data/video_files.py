"""Which files are videos: one table of suffixes for every command that scans a folder, and what a list must
not name.

Playlists and manifests are text that makes FFmpeg open other files or addresses; they are known by suffix,
and small files also by their first bytes. What a decoder opens by content is settled where it opens it.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from vmae.errors import InputError

_LOG = logging.getLogger("vmae.data")
VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".qt",
    ".3gp",
    ".3g2",
    ".f4v",
    ".mkv",
    ".webm",
    ".avi",
    ".divx",
    ".mpg",
    ".mpeg",
    ".mpe",
    ".m2v",
    ".vob",
    ".ts",
    ".mts",
    ".m2ts",
    ".flv",
    ".wmv",
    ".asf",
    ".ogv",
    ".gif",
    ".mxf",
)
PLAYLIST_SUFFIXES = (
    ".m3u",
    ".m3u8",
    ".mpd",
    ".pls",
    ".sdp",
    ".ffconcat",
    ".concat",
    ".asx",
    ".xspf",
    ".smil",
    ".ism",
    ".f4m",
)
_PLAYLIST_STARTS = {
    b"#extm3u": "an HLS playlist",
    b"[playlist]": "a playlist",
    b"v=0": "an SDP description",
    b"ffconcat": "a concat list",
}
_XML_PLAYLIST = re.compile(rb"<(mpd|smoothstreamingmedia|compositionplaylist|playlist|smil|asx|wvx)\b")
SMALL = 1 << 16  # bytes; a file below this may be a playlist, and is looked into when a list is read
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")


def is_video(path: str | Path) -> bool:
    """Whether the suffix of `path` is a video's, in capitals too."""
    return os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES


def is_image(path: str | Path) -> bool:
    """Whether the suffix of `path` is an image's, in capitals too."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def find_videos(folder: str | Path) -> list[str]:
    """Paths of all videos under `folder`, by suffix, in order of their names; what is skipped is counted and
    logged.

    Links to folders are followed, after what is there itself, and each folder once. Names that begin with a
    dot are skipped.

    Raises:
        InputError: a folder cannot be read, or there is no video.
    """
    videos, rest = _find(folder, is_video)
    start = str(Path(folder))
    if not videos:
        lists = [
            name for name in ("train.csv", "val.csv", "test.csv") if os.path.isfile(os.path.join(start, name))
        ]
        advice = (
            "numbered frames need a list with `folder start total`, other images a mix with `kind: images`"
        )
        if lists:
            advice = f"give the list {os.path.join(start, lists[0])}"
        raise InputError(f"folder {start!r} holds no videos ({', '.join(VIDEO_SUFFIXES)}){rest}; {advice}")
    _log_found(start, f"{len(videos)} videos{rest}")
    return videos


def find_images(folder: str | Path) -> list[str]:
    """Paths of all images under `folder`, as `find_videos` finds videos.

    Raises:
        InputError: a folder cannot be read, or there is no image.
    """
    images, rest = _find(folder, is_image)
    if not images:
        raise InputError(f"folder {str(folder)!r} holds no images ({', '.join(IMAGE_SUFFIXES)}){rest}")
    _log_found(str(folder), f"{len(images)} images{rest}")
    return images


def _log_found(folder: str, what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        _LOG.info("folder %s: %s", folder, what)


def _find(folder: str | Path, wanted: Callable[[str], bool]) -> tuple[list[str], str]:
    """(paths of the files under `folder` whose names are wanted, in order; words on the others, if any)."""
    found: list[str] = []
    skipped: Counter[str] = Counter()
    start = str(Path(folder))
    pending: list[str] = [start]
    links: list[str] = []
    seen: set[tuple[int, int]] = set()
    while pending or links:
        current = pending.pop() if pending else links.pop()
        for entry in _scan(current, seen):
            path = entry.name if start == current == "." else entry.path
            if entry.name.startswith("."):
                skipped["hidden"] += 1
            elif entry.is_dir():
                (links if entry.is_symlink() else pending).append(path)
            elif not entry.is_file():
                skipped["broken links and what is no file"] += 1
            elif wanted(entry.name):
                found.append(path)
            else:
                skipped[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1
    kinds = ", ".join(f"{kind} {count}" for kind, count in skipped.most_common(6))
    rest = ""
    if skipped:
        more = ", ..." if len(skipped) > 6 else ""
        rest = f"; {skipped.total()} other files skipped ({kinds}{more})"
    return sorted(found, key=lambda path: path.split(os.sep)), rest


def _scan(folder: str, seen: set[tuple[int, int]]) -> list[os.DirEntry]:
    """What is in `folder`; nothing where a link led to a folder that was scanned before."""
    try:
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in seen:
            return []
        seen.add((found.st_dev, found.st_ino))
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        raise InputError(f"folder {folder!r} cannot be read: {error.strerror}") from None


def playlist_kind(path: str, size: int | None = None) -> str | None:
    """What kind of playlist or manifest a file is, by suffix and, up to 64 KiB, by content; None where it is
    none.

    Args:
        size: bytes of the file, where they are known.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in PLAYLIST_SUFFIXES:
        return f"a playlist or manifest ({suffix})"
    try:
        if (os.path.getsize(path) if size is None else size) > SMALL:
            return None
        with open(path, "rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    except OSError:
        return None
    found = next((kind for start, kind in _PLAYLIST_STARTS.items() if head.startswith(start)), None)
    if found is None and head.startswith(b"<") and (match := _XML_PLAYLIST.search(head)):
        found = f"an XML manifest (<{match[1].decode()}>)"
    return found


def looks_like_url(path: str) -> bool:
    """Whether `path` is an address (`http://...`, `s3://...`) rather than a file."""
    return _URL.match(path) is not None
