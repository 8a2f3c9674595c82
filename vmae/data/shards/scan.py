"""What a tar file holds, as an index tells it: in the workers of `vmae index`."""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from vmae.data.quarantine import Failure
from vmae.data.shards.entries import Place, Shard, ShardEntry
from vmae.data.shards.groups import Group, group_members
from vmae.data.shards.index import FRAMES, Sample
from vmae.data.shards.look import Facts, look_at, look_into
from vmae.data.shards.packets import PacketTable
from vmae.data.shards.reading import read_range
from vmae.data.shards.tar import Member, read_members
from vmae.data.video_reader import DecodeError, memory_as_decode_error
from vmae.data.workers import VideoTask
from vmae.errors import InputError
from vmae.files.json_files import parse_json
from vmae.settings import CLASSES, STRIDE, Real, Whole

_MOST_TEXT = 1 << 20  # bytes of a member with a label that are read
_LABEL_KEYS = ("label", "labels", "cls")
_LABEL, _COUNT, _STEP = Whole(0, CLASSES.most - 1), Whole(1, 2**31), Whole(0, 2**16 - 1)
_FPS = Real(above=0, most=10**6)
_COUNTS = ("frames", "width", "height")


class Task(NamedTuple):
    """A group of members to look at.

    Attributes:
        number: of the group, among all.
        shard: number of the tar.
        group: its members; or what is wrong with the tar, from here on.
    """

    number: int
    shard: int
    group: Group | str


class Scanned(NamedTuple):
    """What became of a group.

    Attributes:
        shard: number of the tar.
        sample: what the index tells of it; None where it is no video, or a bad one.
        failure: why a video is left out.
        skipped: kinds of members that are no part of a video.
        odd_label: whether it has a label that is no class's number.
        fault: what is wrong with the tar, so that there is no index of it.
    """

    shard: int
    sample: Sample | None = None
    failure: Failure | None = None
    skipped: Sequence[str] = ()
    odd_label: bool = False
    fault: str | None = None


def scan_groups(shards: Sequence[tuple[int, Shard]], skipped: Counter[str]) -> Iterator[Task]:
    """The samples of tar files, in order; only headers are read.

    What `read_members` and `group_members` raise comes in its turn: the tars before it get their index.

    Args:
        shards: with their numbers.
    """
    number = 0
    for place, shard in shards:

        def read(offset: int, length: int, shard: Shard = shard) -> bytes:
            length = min(length, shard.size - offset)
            return read_range(shard, offset, length) if length > 0 else b""

        try:
            for group in group_members(read_members(read, shard.size, shard.name), shard.name, skipped):
                yield Task(number, place, group)
                number += 1
        except InputError as error:
            yield Task(number, place, str(error))
            return


class Scanner(VideoTask):
    """What runs in the workers: reads a sample's members, and opens its video.

    Args:
        shards: all tars.
        look: open videos; else `KEY.json` is believed.
    """

    def __init__(self, shards: Sequence[Shard], *, look: bool) -> None:
        super().__init__()
        self.shards, self.look = shards, look

    def __getitem__(self, task: Task) -> Scanned:
        number, place, group = task
        if isinstance(group, str):
            return Scanned(place, fault=group)
        try:
            return self._scan(number, place, group)
        except InputError as error:
            return Scanned(place, fault=str(error))

    def _scan(self, number: int, place: int, group: Group) -> Scanned:
        shard = self.shards[place]
        video, images = group.video(shard.name), group.images()
        if video is None and not images:
            return Scanned(place, skipped=[_kind(name) for name in group.members])
        name = video[0] if video else ""
        path = f"{shard.name}/{group.key}{_kind(name) if video else FRAMES}"
        if number in self.blocked:
            return Scanned(place, failure=Failure(path, self.blocked[number], "worker"))
        self.watch(number)
        told = _told(shard, group, name)
        sample = Sample(
            group.key, 0, Place(0, 0, 0), labels=told.labels, source=told.source, stride=told.stride
        )
        if video is None:
            sample = _with_images(sample, shard, images)
            look = functools.partial(look_at, _entry(sample, shard, path))
        else:
            content = _read(shard, video[1])
            sample = _with_video(sample, shard, group, video[1], content)
            look = functools.partial(look_into, content, path)
        try:
            with memory_as_decode_error(path):
                facts = look() if self.look else told.facts
        except DecodeError as error:
            return Scanned(place, failure=Failure(path, str(error), error.library))
        if video is None:
            facts = facts._replace(frames=len(images))
        elif told.keep_every > 1 and (told.kept == facts.frames or not self.look):
            facts = Facts(told.facts.frames, told.facts.fps, facts.width, facts.height)
            sample = replace(sample, keep_every=told.keep_every, phase=told.phase)
        sample = replace(sample, **facts._asdict())
        return Scanned(place, sample, None, _rest(group, sample, name), told.odd_label)


class _Told(NamedTuple):
    """What the members beside a video tell of it; `odd_label`: see `Scanned`."""

    labels: tuple[int, ...]
    odd_label: bool
    facts: Facts
    source: str = ""
    stride: int | None = None
    keep_every: int = 1
    phase: int = 0

    @property
    def kept(self) -> int:
        """Frames that are stored."""
        return len(range(self.phase, self.facts.frames, self.keep_every))


def _told(shard: Shard, group: Group, video: str) -> _Told:
    """Read `KEY.json` and `KEY.cls`.

    Raises:
        InputError: a label that no class has.
    """
    about = _parse(_text(shard, group.text("json", video)))
    labels, odd = _labels(about, _text(shard, group.text("cls", video)), shard.name, group.key)
    frames, width, height = (about[name] if _COUNT.allows(about.get(name)) else 0 for name in _COUNTS)
    fps = float(about["fps"]) if _FPS.allows(about.get("fps")) else 0.0
    told = _Told(labels, odd, Facts(frames, fps, width, height))
    if not {"source", "name", "fps", *_COUNTS} <= about.keys():  # others may mean anything by such words
        return told
    stride = about.get("stride")
    step, phase = (about[name] if _STEP.allows(about.get(name)) else 0 for name in ("keep_every", "phase"))
    return told._replace(
        source=str(about["source"]),
        stride=stride if STRIDE.allows(stride) else None,
        keep_every=max(step, 1),
        phase=phase,
    )


def _with_video(sample: Sample, shard: Shard, group: Group, member: Member, content: bytes) -> Sample:
    table, place = group.members.get("packets"), (0, 0)
    if table and table.offset < member.offset and _is_table(_text(shard, table)):
        place = (table.offset, table.length)
    return replace(sample, suffix=_kind(member.name), video=_place(member, content), table=place)


def _with_images(sample: Sample, shard: Shard, images: Sequence[tuple[str, Member]]) -> Sample:
    places = [_place(member, _read(shard, member)) for _, member in images]
    first, last = min(one.offset for one in places), max(one.offset + one.length for one in places)
    return replace(sample, suffix=FRAMES, video=Place(first, last - first, 0), images=places)


def _text(shard: Shard, member: Member | None) -> bytes:
    if member is None or not 0 < member.length <= _MOST_TEXT:
        return b""
    return read_range(shard, member.offset, member.length)


def _parse(text: bytes) -> dict[str, Any]:
    """The content of `KEY.json`; empty where it holds something else."""
    try:
        found = parse_json(text.decode("utf-8")) if text else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_table(content: bytes) -> bool:
    """Whether a member of that name is a packet table."""
    try:
        PacketTable.read(content)
    except ValueError:
        return False
    return True


def _read(shard: Shard, member: Member) -> bytes:
    return read_range(shard, member.offset, member.length) if member.length else b""


def _place(member: Member, content: bytes) -> Place:
    return Place(member.offset, member.length, zlib.crc32(content))


def _entry(sample: Sample, shard: Shard, path: str) -> ShardEntry:
    """The entry of a folder of frames."""
    images = np.array(sample.images, np.int64).reshape(-1, 3)
    return ShardEntry(path, "frames", total=len(images), key=sample.key, shard=shard, images=images)


def _labels(about: dict[str, Any], text: bytes, tar: str, key: str) -> tuple[tuple[int, ...], bool]:
    """(classes, whether there is a label that is none).

    Raises:
        InputError: a number that no class has.
    """
    given = next((about[name] for name in _LABEL_KEYS if about.get(name) is not None), None)
    if given is None and text.strip():
        words = text.decode("utf-8", "replace").strip().split(";")
        given = [int(word) if word.strip().lstrip("+-").isdecimal() else word for word in words]
    if given is None:
        return (), False
    own = given if isinstance(given, list) else [given]
    if not all(isinstance(label, int) and not isinstance(label, bool) for label in own):
        return (), True
    wrong = next((label for label in own if not _LABEL.allows(label)), None)
    if wrong is not None:
        raise InputError(f"tar {tar}: label {wrong} of {key!r} is out of range; labels are {_LABEL}")
    return tuple(dict.fromkeys(own)), False


def _rest(group: Group, sample: Sample, video: str) -> list[str]:
    """Kinds of a video's members that the index does not use."""
    used = {place.offset for place in sample.images} or {sample.video.offset}
    used |= {sample.table[0]} if sample.table[1] else set()
    read = {member.offset for kind in ("json", "cls") if (member := group.text(kind, video))}
    return [_kind(name) for name, member in group.members.items() if member.offset not in used | read]


def _kind(name: str) -> str:
    """The last suffix of a member, in lower case."""
    return "." + name.rpartition(".")[2].lower().encode("ascii", "replace").decode()[:20]
