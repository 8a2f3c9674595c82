"""What a list of videos is, in a few hashes: whether a run that goes on sees the samples that it would have
seen.

Counted is what decides the samples, in order: of each entry its path (relative to the root that its list
starts from), kind, images and stride; its labels, or key frame and boxes; of a weighted mix the sizes and
weights of its sources; where they differ from the model's, the frames and sizes of their clips. Comments,
blank lines, the writing of columns, names of sources and the place of the root (`--data-root`, the list's
folder) don't count, so a folder may be moved. Which files are meant is compared, not what is in them; of
shards, the keys and checksums of the samples, wherever the shards lie.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmae.data.dataset import PretrainDataset
from vmae.data.entry_table import CHUNK, as_entries
from vmae.data.mix import Mix, Source
from vmae.data.shards.facts import indexes_in
from vmae.data.video_dataset import VideoDataset

BLOCKS = 128  # parts of a list with a hash of their own: a difference is found within so much of it


def identify_list(
    dataset: VideoDataset, root: str | Path = "", *, block: int | None = None
) -> dict[str, Any]:
    """Plain containers: `videos` (their count), `entries` and `labels` (hashes), `shards` where some lie in
    shards, `mix` where there is a weighted one, and `shapes` where clips have others than the model's.

    Args:
        root: folder that relative paths start from, where the mix's sources have none of their own.
        block: entries of a part; by default the list is cut into 128 of them.
    """
    videos = len(dataset.entries)
    block = block or max(-(-videos // BLOCKS), 1)
    found: dict[str, Any] = {
        "videos": videos,
        "block": block,
        "entries": _hashes(_entry_lines(dataset, str(root)), videos, block),
    }
    if indexes_in(dataset.entries):
        found["shards"] = True
    if type(dataset).describe_labels is not VideoDataset.describe_labels:
        found["labels"] = _hashes(
            lambda first, last: dataset.label_lines(first, last).encode("utf-8", "surrogatepass"),
            videos,
            block,
        )
    if isinstance(dataset.data, Mix) and dataset.data.mixing != "natural":
        found["mix"] = [[source.count, source.weight] for source in dataset.data.sources]
    if isinstance(dataset, PretrainDataset) and dataset.shapes != [dataset.usual_shape]:
        found["shapes"] = [[*shape] for shape in dataset.source_shapes]
    return found


def _hashes(lines: Callable[[int, int], bytes], count: int, block: int) -> dict[str, Any]:
    """SHA-256 of the lines of all entries, and the first 8 digits of each part's.

    Args:
        lines: of the entries from a number to before another one.
    """
    whole, parts = hashlib.sha256(), []
    for begin in range(0, count, block):
        part, end = hashlib.sha256(), min(begin + block, count)
        for first in range(begin, end, CHUNK):
            data = lines(first, min(first + CHUNK, end))
            whole.update(data)
            part.update(data)
        parts.append(part.hexdigest()[:8])
    return {"sha256": whole.hexdigest(), "parts": parts}


def _entry_lines(dataset: VideoDataset, root: str) -> Callable[[int, int], bytes]:
    entries = as_entries(dataset.entries)
    sources = [Source("list", 0, len(entries), 1.0)]
    if isinstance(dataset.data, Mix):
        sources = dataset.data.sources

    def lines(first: int, last: int) -> bytes:
        found = []
        for source in sources:
            begin, end = max(first, source.first), min(last, source.first + source.count)
            start = source.root or root
            if begin < end:
                start = start.rstrip("/") + "/" if start else "./"
                found.append(entries.identity_lines(begin, end, start))
        return b"".join(found)

    return lines


def list_changes(
    before: dict[str, Any], dataset: VideoDataset, root: str | Path, now: dict[str, Any]
) -> list[str]:
    """What differs between the list of a checkpoint and this one, each in a few words; nothing where they are
    the same.

    Args:
        before, now: results of `identify_list`.
        dataset, root: arguments that gave `now`.
    """
    keys = ("videos", "entries", "labels", "mix", "shapes")
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
    if before.get("shapes") != now.get("shapes"):
        old, new = (_describe_shapes(found.get("shapes")) for found in (before, now))
        changes.append(f"its sources' clips were {old} then, and are {new} now")
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


def _describe_shapes(shapes: list[list[int]] | None) -> str:
    if shapes is None:
        return "of the model's shape"
    return ", ".join(" x ".join(map(str, shape)) for shape in shapes)


def _describe_mix(mix: list[list[float]] | None) -> str:
    if mix is None:
        return "nothing but their numbers of videos"
    return "weights " + ", ".join(f"{weight:g} ({count} videos)" for count, weight in mix)
