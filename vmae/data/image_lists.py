"""Lists and folders of single images: a source of a mix with `kind: images`.

One path a line, as of videos alone (see `vmae.data.manifest`): comments, quotes and roots are the same, and
long lists are read once on a machine. A folder stands for all images under it.
"""

from __future__ import annotations

from pathlib import Path

from vmae.data.entry_table import EntryTable
from vmae.data.files import path_kind
from vmae.data.list_parsing import spread_sample
from vmae.data.manifest import VideoEntry, read_list, read_list_with_problems
from vmae.data.video_files import find_images, is_video
from vmae.errors import InputError

_LOOKED_AT = 500  # names of a list that are looked at


def read_images(path: str | Path, data_root: str | Path | None = None) -> EntryTable:
    """The images of a list or a folder: one entry of kind "image" each, in order; at least one.

    Raises:
        InputError: see `read_list`; a list that names folders of frames or videos, or a folder without
            images.
    """
    if path_kind(path) == "a folder":
        return EntryTable.of(folder_images(path))
    entries = read_list(path, data_root)
    check_images(path, entries)
    return entries.as_images()


def read_images_with_problems(
    path: str | Path, data_root: str | Path | None = None
) -> tuple[EntryTable, list[tuple[int, str]]]:
    """Like `read_images`, for a list that names what is not there: (entries, [(line number, what is
    wrong)])."""
    if path_kind(path) == "a folder":
        return EntryTable.of(folder_images(path)), []
    entries, problems = read_list_with_problems(path, data_root)
    table = EntryTable.of(entries)
    check_images(path, table)
    return table.as_images(), problems


def folder_images(folder: str | Path) -> list[VideoEntry]:
    """The images under `folder`, in order of their names."""
    return [VideoEntry(path, "image", line=number) for number, path in enumerate(find_images(folder), 1)]


def check_images(path: str | Path, entries: EntryTable) -> None:
    """Raises InputError where a list is one of frames or videos, by its columns and the names of a sample."""
    frames = entries.numbers_of("frames")
    sample = spread_sample(range(len(entries)), _LOOKED_AT)
    wrong = [int(number) for number in frames[:1]] + [n for n in sample if _is_film(entries[n])]
    for entry in (entries[number] for number in wrong):
        what = "a folder of frames" if entry.kind == "frames" else "a video"
        raise InputError(
            f"list file {str(path)!r}, line {entry.line}: {entry.path!r} is {what}, not an image; leave out "
            "`kind: images`, or give these a source of their own"
        )


def _is_film(entry: VideoEntry) -> bool:
    return is_video(entry.path) and not entry.path.lower().endswith(".gif")
