"""Mixes: several sources of videos in one run, as in VideoMAE V2's UnlabeledHybrid (section 4.1 and
appendix).

A YAML file names them (relative paths start from its own folder):

    mixing: weighted             # or natural (each video equally often): the default without weights
    sources:
      - name: kinetics
        list: k710_train.txt     # see vmae.data.manifest; a folder of videos or an index of shards too
        root: /data/kinetics     # where the list's relative paths start; else as without --data-root
        kind: video              # optional: refuse a list that holds anything else
        stride: 4                # optional, as are the others below; what the list itself says comes first
        weight: 2
      - name: something
        list: ssv2_train.txt
        root: /data/ssv2_frames
        kind: frames
        pattern: img_{:05}.jpg
        stride: 2
        weight: 1
        frames: 32               # of this source's clips, in place of the model's
        size: 160                # side of its clips in pixels, or [height, width]
      - name: photos
        list: photos.txt         # one image a line, or a folder of images (see vmae.data.image_lists)
        kind: images
        weight: 1

Weighted, an epoch still has as many samples as there are videos; each source gets its share of them, and goes
through its videos in an order of its own, which goes on from epoch to epoch: none comes twice before all came
once.
"""

from __future__ import annotations

import functools
import math
import os
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vmae.data.augment import image_hw
from vmae.data.decode import DecodeError, open_video
from vmae.data.entry_table import Entries, EntryChain, as_entries
from vmae.data.files import Unanswered, ask_files
from vmae.data.guarded import guarded_each
from vmae.data.image_lists import read_images
from vmae.data.manifest import DEFAULT_PATTERN, VideoEntry, read_list
from vmae.data.sampling import permutation
from vmae.data.shards.entries import is_address
from vmae.data.shards.index import ShardIndex, is_index
from vmae.data.shards.rows import ShardRows
from vmae.data.shards.source import folder_of, index_at, join_place
from vmae.data.workers import hang_limit
from vmae.errors import InputError
from vmae.files.json_files import check_depth
from vmae.settings import FRAMES, STRIDE, Real, shown

MIX_SUFFIXES = (".yaml", ".yml")
MIXINGS = ("natural", "weighted")
SOURCE_KINDS = ("video", "frames", "images")
_SOURCE_KEYS = {"name", "list", "root", "kind", "pattern", "stride", "weight", "frames", "size"}
WEIGHT = Real(above=0, most=10**9)
_MIX_ORDER = 7  # keeps these random numbers apart from the loader's


@dataclass(frozen=True)
class Source:
    """One line of videos in a mix.

    Attributes:
        name: shown to people.
        first, count: its place among the mix's entries.
        weight: its share before all shares are made to add up to 1.
        root: folder that its relative paths start from; empty where that is not known.
        images: whether it is one of single images.
        frames: of its clips; None where it says nothing.
        size: height and width of its clips in pixels; None where it says nothing.
    """

    name: str
    first: int
    count: int
    weight: float
    root: str = ""
    images: bool = False
    frames: int | None = None
    size: tuple[int, int] | None = None


class Mix(Sequence):
    """The entries of all sources, one after the other, and how often each comes.

    Args:
        entries: videos of all sources, in order; any sequence, which is not copied.
        sources: cover the entries, in order.
        mixing: "natural" or "weighted".
    """

    def __init__(
        self, entries: Sequence[VideoEntry], sources: Sequence[Source], mixing: str = "natural"
    ) -> None:
        if mixing not in MIXINGS:
            raise InputError(f"unknown mixing {shown(mixing)}; known: {', '.join(MIXINGS)}")
        self.entries, self.sources, self.mixing = entries, list(sources), mixing
        self._orders: dict[int, tuple[tuple[int, ...], np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index):
        return self.entries[index]

    def shares(self) -> list[float]:
        """Share of the samples that each source gets; they add up to 1."""
        weights = [source.weight if self.mixing == "weighted" else source.count for source in self.sources]
        return [weight / sum(weights) for weight in weights]

    def samples(self, size: int) -> list[int]:
        """How many of an epoch's `size` samples each source gets: its share, by the largest remainder."""
        exact = [share * size for share in self.shares()]
        counts = [math.floor(value) for value in exact]
        order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in order[: size - sum(counts)]:
            counts[i] += 1
        return counts

    def pick(self, seed: int, epoch: int, index: int, size: int) -> tuple[int, range]:
        """(the entry of a sample, the entries that may stand in for it), a pure function of the arguments.

        Args:
            index: from 0; from `size` on, further rounds of the same epoch (see `EpochSampler`).
            size: samples of an epoch.
        """
        if self.mixing == "natural":
            return index % len(self), range(len(self))
        turn, number, place, samples = self._find_turn(index, size)
        source = self.sources[number]
        cycle, offset = divmod(epoch * samples + place, source.count)
        video = source.first + int(self._order(seed, number, turn, cycle)[offset])
        return video, range(source.first, source.first + source.count)

    def _find_turn(self, index: int, size: int) -> tuple[int, int, int, int]:
        """Weighted: (round of the epoch, source, which of its samples, how many of an epoch it has) of a
        sample."""
        turn, place = divmod(index, size)
        samples, number = self.samples(size), 0
        while place >= samples[number]:
            place -= samples[number]
            number += 1
        return turn, number, place, samples[number]

    def source_of(self, number: int) -> int:
        """The source that entry `number` is of."""
        return bisect_right([source.first for source in self.sources], number) - 1

    def ranges(self, number: int, size: int) -> list[range]:
        """Which of an epoch's samples 0 to `size` - 1 fall to a source."""
        if self.mixing == "natural":
            source, rounds = self.sources[number], range(0, size, len(self))
            starts = [start + source.first for start in rounds]
            return [range(start, min(start + source.count, size)) for start in starts if start < size]
        samples = self.samples(size)
        first = sum(samples[:number])
        return [range(first, first + samples[number])]

    def count_sources(self, indices: Iterable[int], size: int) -> list[int]:
        """How many of the samples `indices` of an epoch of `size` fall to each source."""
        counts = [0] * len(self.sources)
        for index in indices:
            counts[self.source_at(index, size)] += 1
        return counts

    def source_at(self, index: int, size: int) -> int:
        """The source that sample `index` of an epoch of `size` falls to."""
        if self.mixing == "natural":
            return self.source_of(index % len(self))
        return self._find_turn(index, size)[1]

    def _order(self, seed: int, number: int, turn: int, cycle: int) -> np.ndarray:
        key = (seed, number, turn, cycle)
        cached = self._orders.get(2 * number + cycle % 2)  # an epoch may end one cycle and begin the next
        if cached is None or cached[0] != key:
            generator = np.random.default_rng(
                np.random.SeedSequence(seed, spawn_key=(_MIX_ORDER, number, turn, cycle))
            )
            cached = (key, permutation(self.sources[number].count, generator))
            self._orders[2 * number + cycle % 2] = cached
        return cached[1]


def read_data(
    path: str | Path, data_root: str | Path | None = None, *, frame_pattern: str = DEFAULT_PATTERN
) -> Mix:
    """Read a mix (YAML), or a single list, folder of videos or index of shards as a mix of one source.

    Args:
        path: ends in .yaml or .yml for a mix, in .vmae for an index (a file, or an address in a store);
            anything else is a list file or a folder.
        data_root: see `read_list`; for a mix, where relative roots and lists start; for an index, folder or
            address at which the names of its shards start.
        frame_pattern: see `read_list`; a source of a mix has its own.

    Raises:
        InputError: see `read_list` and `index_at`; a mix that is no YAML, lacks a key or has an unknown one,
            or a wrong value.
    """
    index = index_at(path, data_root)
    if index is not None:
        return Mix(index, [Source(_name_of(path), 0, len(index), 1.0, index.base)])
    if Path(path).suffix.lower() in MIX_SUFFIXES and not Path(path).is_dir():
        return _read_mix(Path(path), data_root)
    entries = read_list(path, data_root, frame_pattern=frame_pattern)
    root = str(data_root)
    if data_root is None or os.path.isdir(path):
        root = _root_of(path)
    return Mix(entries, [Source(_name_of(path), 0, len(entries), 1.0, root)])


def _name_of(path: str | Path) -> str:
    """What a list, folder or index is called without a name of its own; an index, after its folder."""
    if is_index(path):
        return os.path.basename(folder_of(path if is_address(path) else os.path.abspath(path))) or "index"
    path = Path(path)
    return path.resolve().name if path.is_dir() else path.stem


def _root_of(path: str | Path) -> str:
    """Where the relative paths of a list start, or the folder itself."""
    return str(path) if os.path.isdir(path) else folder_of(path)


def _read_mix(path: Path, data_root: str | Path | None) -> Mix:
    content = _load_yaml(path)
    unknown = set(content) - {"mixing", "sources"}
    if unknown or not isinstance(content.get("sources"), list) or not content["sources"]:
        wrong = "no list of sources"
        if unknown:
            wrong = f"unknown {', '.join(sorted(map(str, unknown)))}"
        raise InputError(f"mix {str(path)!r}: {wrong}; a mix has `sources`, a list, and maybe `mixing`")
    start = str(data_root) if data_root is not None else str(path.parent)
    parts: list[Sequence[VideoEntry]] = []
    sources: list[Source] = []
    count = 0
    for number, given in enumerate(content["sources"], 1):
        where = f"mix {str(path)!r}, source {number}"
        _check_source(given, where)
        found = _read_source(given, start, where)
        place = join_place(start, str(given["list"]))
        name = str(given.get("name", _name_of(place)))
        if name in {source.name for source in sources}:
            raise InputError(f"{where}: the name {name!r} is taken; give each source a `name` of its own")
        root = join_place(start, str(given.get("root") or _root_of(place)))
        weight = float(given.get("weight", 1.0))
        sources.append(Source(name, count, len(found), weight, root, **_clip_settings(given)))
        parts.append(found)
        count += len(found)
    weighted = any("weight" in given for given in content["sources"])
    return Mix(EntryChain(parts), sources, content.get("mixing", "weighted" if weighted else "natural"))


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise InputError(f"reading a mix needs PyYAML ({error}): `pip install pyyaml`") from None
    try:
        (text,) = ask_files(lambda path: path.read_text(encoding="utf-8"), [path])
        content = yaml.safe_load(text)
        check_depth(content)
    except RecursionError:
        raise InputError(f"mix {str(path)!r} is nested too deeply") from None
    except (OSError, Unanswered) as error:
        raise InputError(
            f"mix {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"mix {str(path)!r} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(
            f"mix {str(path)!r}: expected `sources:` and a list of them; a plain list file must not end in "
            ".yaml"
        )
    return content


def _check_source(given: Any, where: str) -> None:
    if not isinstance(given, dict) or "list" not in given:
        raise InputError(f"{where}: expected keys and values, at least `list`")
    unknown = {str(key) for key in given} - _SOURCE_KEYS
    if unknown:
        raise InputError(
            f"{where}: unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(_SOURCE_KEYS))}"
        )
    for key in ("name", "list", "root", "pattern"):
        if isinstance(given.get(key), (dict, list)):
            raise InputError(f"{where}: {key} must be one word, not a list or keys")
    kind = given.get("kind", "video")
    if kind not in SOURCE_KINDS:
        raise InputError(f"{where}: kind must be one of {', '.join(SOURCE_KINDS)}, not {shown(kind)}")
    for key in ("stride", "pattern") if kind == "images" else ():
        if key in given:
            raise InputError(f"{where}: {key} means nothing for images, which are files of their own")
    WEIGHT.check(f"{where}: weight", given.get("weight", 1))
    STRIDE.check(f"{where}: stride", given.get("stride", 1))
    FRAMES.check(f"{where}: frames", given.get("frames", 1))
    size = given.get("size", 1)
    if isinstance(size, list) and len(size) != 2:
        raise InputError(f"{where}: size must be one side, or [height, width], not {shown(size)}")
    for side in size if isinstance(size, list) else [size]:
        FRAMES.check(f"{where}: size", side)


def _clip_settings(given: dict[str, Any]) -> dict[str, Any]:
    """What a checked source says of its clips, as fields of `Source`."""
    size = given.get("size")
    sides = None if size is None else image_hw(size if isinstance(size, int) else tuple(size))
    return {"images": given.get("kind") == "images", "frames": given.get("frames"), "size": sides}


def _read_source(given: dict[str, Any], start: str, where: str) -> Sequence[VideoEntry]:
    root = None
    if given.get("root") is not None:
        root = join_place(start, str(given["root"]))
    place = join_place(start, str(given["list"]))
    try:
        if given.get("kind") == "images":
            if is_index(place):
                raise InputError(
                    f"{place!r} is an index of shards, which hold videos and frames; single images are read "
                    "from a list or a folder"
                )
            return read_images(place, root)
        index = index_at(place, root)
        if index is not None:
            return _read_index_source(index, given)
        entries = read_list(
            place,
            root,
            frame_pattern=str(given.get("pattern", DEFAULT_PATTERN)),
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    other = {"video": "frames", "frames": "video"}.get(given.get("kind", ""))
    others = entries.numbers_of(other) if other else []
    if len(others):
        first = entries[int(others[0])]
        raise InputError(
            f"{where}: line {first.line} of its list is of kind {first.kind}, not {given['kind']}, as are "
            f"{len(others)} of "
            f"{len(entries)}; a video is `path 0 -1`, frames are `folder start total`"
        )
    return entries.with_stride(given.get("stride"))


def _read_index_source(index: ShardIndex, given: dict[str, Any]) -> ShardRows:
    """The samples of an index, of the kind and with the stride that a source of a mix says."""
    kind = given.get("kind")
    if kind is not None:
        others = np.flatnonzero(~index.are(kind))
        if len(others):
            other = index[int(others[0])]
            raise InputError(
                f"{other.key} of its index is of kind {other.kind}, not {kind}, as are {len(others)} of "
                f"{len(index)}"
            )
    return index.with_stride(given.get("stride"))


def describe_data(data: Sequence[VideoEntry], *, backend: str = "auto", probes: int = 24) -> list[str]:
    """Lines for the start of a run: videos, hours and share of each source.

    Hours are estimated from up to `probes` videos of a source, spread over it; frame folders tell no time, so
    their frames are counted.
    """
    if not isinstance(data, Mix):
        data = Mix(data, [Source("list", 0, len(data), 1.0)])
    lines = []
    for source, share in zip(data.sources, data.shares(), strict=True):
        entries = as_entries(data.entries[source.first : source.first + source.count])
        strides = entries.strides()
        stride = f", stride {', '.join(map(str, strides))}" if strides else ""
        what = "images" if source.images else f"videos{_length(entries, backend, probes)}"
        lines.append(
            f"{source.name}: {source.count} {what}, {share:.1%} of samples{stride}{_clips_of(source)}"
        )
    if len(lines) > 1:
        what = "videos and images" if any(source.images for source in data.sources) else "videos"
        lines.append(f"{data.mixing} mixing of {len(data.sources)} sources, {len(data)} {what}")
    return lines


def _clips_of(source: Source) -> str:
    """What a source says of its clips, in words that follow others."""
    frames = "" if source.frames is None else f", clips of {source.frames} frames"
    if source.size is None:
        return frames
    return (
        f"{frames}{', clips' if source.frames is None else ''} of {source.size[0]} x {source.size[1]} pixels"
    )


def _seconds(entry: VideoEntry, backend: str) -> float:
    with open_video(entry, backend) as reader:
        return len(reader) / reader.fps if reader.fps else 0.0


def _length(entries: Entries[VideoEntry], backend: str, probes: int) -> str:
    frames, videos = entries.images(), entries.numbers_of("video")
    if isinstance(entries, ShardRows):
        return _length_text(*entries.length(), len(videos), frames)
    count = min(probes, len(videos))
    probed = [entries[int(videos[place * len(videos) // count])] for place in range(count)]
    seconds: list[float] = []
    began = time.monotonic()
    for found in guarded_each(functools.partial(_seconds, backend=backend), probed):
        if not isinstance(found, DecodeError):
            seconds.append(found)
        if time.monotonic() - began > hang_limit():  # an estimate is not worth more
            break
    return _length_text(sum(seconds), len(seconds), len(videos), frames)


def _length_text(seconds: float, known: int, videos: int, images: int) -> str:
    """Hours of videos, of which `known` last `seconds`, and images of folders."""
    texts = []
    if known:
        about = "" if known == videos else "about "
        texts.append(f"{about}{seconds / known * videos / 3600:.3g} hours")
    if images:
        texts.append(f"{images} images")
    return "".join(f", {text}" for text in texts)
