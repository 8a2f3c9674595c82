"""What a list of videos is, in a few hashes: whether a run that goes on sees the samples that it would have
seen.

Counted is what decides the samples, in order: of each entry its path (relative to the root that its list
starts from), kind, images and stride; its labels, or key frame and boxes; of a weighted mix the sizes and
weights of its sources. Comments, blank lines, the writing of columns, names of sources and the place of the
root (`--data-root`, the list's folder) don't count, so a folder may be moved. Which files are meant is
compared, not what is in them; of shards, the keys and checksums of the samples, wherever the shards lie.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vmae.data.manifest import VideoEntry
from vmae.data.mix import Mix
from vmae.data.shards.facts import indexes_in
from vmae.data.shards.rows import ShardRows
from vmae.data.video_dataset import VideoDataset

BLOCKS = 128  # parts of a list with a hash of their own: a difference is found within so much of it


def identify_list(
    dataset: VideoDataset, root: str | Path = "", *, block: int | None = None
) -> dict[str, Any]:
    """Plain containers: `videos` (their count), `entries` and `labels` (hashes), `shards` where some lie in
    shards, and `mix` where there is a weighted one.

    Args:
        root: folder that relative paths start from, where the mix's sources have none of their own.
        block: entries of a part; by default the list is cut into 128 of them.
    """
    videos = len(dataset.entries)
    block = block or max(-(-videos // BLOCKS), 1)
    found: dict[str, Any] = {
        "videos": videos,
        "block": block,
        "entries": _hashes(_entry_lines(dataset, str(root)), block),
    }
    if indexes_in(dataset.entries):
        found["shards"] = True
    if type(dataset).describe_labels is not VideoDataset.describe_labels:
        found["labels"] = _hashes((f"{dataset.describe_labels(number)}\n" for number in range(videos)), block)
    if isinstance(dataset.data, Mix) and dataset.data.mixing != "natural":
        found["mix"] = [[source.count, source.weight] for source in dataset.data.sources]
    return found


def _hashes(lines: Iterable[str], block: int) -> dict[str, Any]:
    """SHA-256 of all lines, and the first 8 digits of each part's."""
    lines, whole, parts = iter(lines), hashlib.sha256(), []
    while part := list(itertools.islice(lines, block)):
        data = "".join(part).encode("utf-8", "surrogatepass")
        whole.update(data)
        parts.append(hashlib.sha256(data).hexdigest()[:8])
    return {"sha256": whole.hexdigest(), "parts": parts}


def _entry_lines(dataset: VideoDataset, root: str) -> Iterator[str]:
    if not isinstance(dataset.data, Mix):
        yield from _lines_of(dataset.entries, root)
        return
    for source in dataset.data.sources:
        yield from _lines_of(dataset.entries[source.first : source.first + source.count], source.root or root)


def _lines_of(entries: Sequence[VideoEntry], root: str) -> Iterator[str]:
    if isinstance(entries, ShardRows):
        yield from map(bytes.decode, entries.identities(0, len(entries)))
        return
    start = root.rstrip("/") + "/" if root else "./"
    length = len(start)
    for entry in entries:
        path = entry.path[length:] if entry.path.startswith(start) else entry.path
        if entry.kind == "video":
            yield f"{path}\0{entry.stride}\n"
        else:
            yield f"{path}\0{entry.stride}\0{entry.start}\0{entry.total}\0{entry.pattern}\n"


def list_changes(
    before: dict[str, Any], dataset: VideoDataset, root: str | Path, now: dict[str, Any]
) -> list[str]:
    """What differs between the list of a checkpoint and this one, each in a few words; nothing where they are
    the same.

    Args:
        before, now: results of `identify_list`.
        dataset, root: arguments that gave `now`.
    """
    keys = ("videos", "entries", "labels", "mix")
    if all(before.get(key) == now.get(key) for key in keys):
        return []
    changes = []
    if before.get("shards", False) != now.get("shards", False):
        kinds = ("files", "shards") if now.get("shards") else ("shards", "files")
        changes.append("its videos lay in {} then and lie in {} now".format(*kinds))
    if before["videos"] != now["videos"]:
        changes.append(f"{before['videos']} videos then, {now['videos']} now")
    if before["block"] != now["block"]:
        now = identify_list(dataset, root, block=before["block"])
    for key, name in (("entries", "entries"), ("labels", "labels")):
        old, new = before.get(key), now.get(key)
        if old != new:
            changes.append(f"the {name} differ, {_first_difference(old, new, before['block'], dataset)}")
    if before.get("mix") != now.get("mix"):
        old, new = (_describe_mix(found.get("mix")) for found in (before, now))
        changes.append(f"mixed by {old} then, by {new} now")
    return changes


def _first_difference(old: dict | None, new: dict | None, block: int, dataset: VideoDataset) -> str:
    if not old or not new:
        return "there were none" if not old else "there are none now"
    parts = itertools.zip_longest(old["parts"], new["parts"])
    place = next((number for number, (one, other) in enumerate(parts) if one != other), 0)
    first, last = place * block, min((place + 1) * block, len(dataset.entries)) - 1
    if first >= len(dataset.entries):
        return f"the first {first} are the same"
    if first == last:
        entry = dataset.entries[first]
        return f"first at number {first + 1}, now {entry.path}" + (
            f" (line {entry.line})" if entry.line else ""
        )
    return f"first among numbers {first + 1} to {last + 1}"


def _describe_mix(mix: list[list[float]] | None) -> str:
    if mix is None:
        return "nothing but their numbers of videos"
    return "weights " + ", ".join(f"{weight:g} ({count} videos)" for count, weight in mix)
