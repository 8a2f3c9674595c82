"""Samples of a tar file by the names of its members, as WebDataset groups them.

A member's key is its name up to the first dot of its last part; members of a sample stand together:

    a/KEY.mp4, a/KEY.json, a/KEY.cls        a video and its label; the key is a/KEY
    KEY.img_00001.jpg, KEY.img_00002.jpg    a folder of frames
    KEY/img_00001.jpg, KEY/img_00002.jpg    a folder of frames, where KEY/img_00001 has no other members

All else is no video, and is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vmae.data.shards.tar import Member
from vmae.data.video_files import VIDEO_SUFFIXES
from vmae.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
_IMAGE = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
_NUMBERED = re.compile(rf"/?[^.]*\d\.({_IMAGE})")
_LONE = re.compile(_IMAGE)


@dataclass
class Group:
    """Members of one key, by the rest of their names, in lower case.

    Attributes:
        key: name of the sample.
        members: by what follows the key and a dot; images of a folder KEY/ by a slash and their names in it.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def start(self) -> int:
        """Where its first member's content stands."""
        return next(iter(self.members.values())).offset

    def text(self, kind: str, video: str = "") -> Member | None:
        """The member `kind`, such as "json", or that of the video "x.mp4": "x.json"."""
        return self.members.get(kind) or self.members.get(f"{video.rpartition('.')[0]}.{kind}")

    def video(self, tar: str) -> tuple[str, Member] | None:
        """(what follows the key and a dot, member) of the video; None where there is none.

        Raises:
            InputError: there are several.
        """
        found = [one for one in self.members.items() if "." + one[0].rsplit(".")[-1] in VIDEO_SUFFIXES]
        plain = [one for one in found if "." not in one[0]]
        if len(plain or found) > 1:
            names = " and ".join(member.name for _, member in (plain or found)[:2])
            raise InputError(f"tar {tar}: key {self.key!r} has several videos ({names}); give each a key")
        for name, member in plain or found:
            return name, member
        return None

    def images(self) -> list[tuple[str, Member]]:
        """(name, member) of the images of a folder of frames, by their numbers; empty where it is none: a
        lone image in a folder may be anything."""
        found = [(name, member) for name, member in self.members.items() if _NUMBERED.fullmatch(name)]
        if len(found) == 1 and found[0][0].startswith("/"):
            return []
        return sorted(found, key=lambda one: _parts(one[0]))


def _parts(name: str) -> list[str | int]:
    """What stands between numbers, and the numbers, in turn."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def group_members(members: Iterable[Member], tar: str, skipped: Counter[str]) -> Iterator[Group]:
    """Samples in order; some may be no videos.

    Args:
        tar: its name, for messages.
        skipped: counts members without a key, by kind.

    Raises:
        InputError: a key comes twice.
    """
    seen: dict[str, int] = {}
    for group in _joined(_by_key(members, tar, skipped)):
        if group.key in seen:
            raise _twice(tar, group.key, seen[group.key], group.start)
        seen[group.key] = group.start
        yield group


def _by_key(members: Iterable[Member], tar: str, skipped: Counter[str]) -> Iterator[Group]:
    """Neighbours with the same key."""
    group: Group | None = None
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, rest = name.partition(".")
        if not stem or not dot:
            skipped["names without a key"] += 1
            continue
        key = folder + slash + stem
        try:
            key.encode()
        except UnicodeEncodeError:
            raise InputError(f"tar {tar}: the name {member.name!r} is no UTF-8; rename it") from None
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = Group(key)
        if rest.lower() in group.members:
            raise _twice(tar, key, group.members[rest.lower()].offset, member.offset)
        group.members[rest.lower()] = member
    if group is not None:
        yield group


def _joined(groups: Iterable[Group]) -> Iterator[Group]:
    """Images that stand alone in a folder belong to the folder's key."""
    whole: Group | None = None
    for group in groups:
        folder, slash, stem = group.key.rpartition("/")
        if slash and len(group.members) == 1 and _LONE.fullmatch(rest := next(iter(group.members))):
            group = Group(folder, {f"/{stem.lower()}.{rest}": group.members[rest]})
        if whole is not None and whole.key == group.key and not whole.members.keys() & group.members.keys():
            whole.members.update(group.members)
            continue
        if whole is not None:
            yield whole
        whole = group
    if whole is not None:
        yield whole


def _twice(tar: str, key: str, one: int, other: int) -> InputError:
    return InputError(
        f"tar {tar}: key {key!r} comes twice, at bytes {one} and {other}; members of a sample stand "
        "together, under a name of its own"
    )
