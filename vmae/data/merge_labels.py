"""`python -m vmae merge-labels OUT`: one label set from several, as Kinetics-710 is made of 400, 600 and 700.

VideoMAE V2 post-pre-trains on such a set (section 3.3): classes of the same name are one class; videos that
several sources list count once; none that any source validates on is trained on. The published code has the
result, not the way.

Merged classes come in the order of the sources, each source's new ones after those before. What is written:

    train.txt, val.txt          labelled lists with absolute paths
    classes.txt                 a name a line
    label_NtoSOURCE.json        for each source, as published: entry i is the merged number of its class i
    report.json                 what was merged, dropped, and in conflict
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmae.data.labels import LabelledList, read_class_names, read_labelled_list, write_labelled_list
from vmae.data.manifest import VideoEntry, read_text
from vmae.errors import InputError
from vmae.files.json_files import parse_json

SHOWN = 20  # conflicts that the report spells out


@dataclass(frozen=True, kw_only=True)
class LabelSource:
    """One label set to merge.

    Attributes:
        name: its name in files and in the report.
        classes: names by number.
        train, val: its lists; `val` may be missing.
    """

    name: str
    classes: list[str]
    train: LabelledList
    val: LabelledList | None = None


@dataclass(kw_only=True)
class Merged:
    """A merged label set.

    Attributes:
        classes: names by merged number, as the first source that has one spells it.
        maps: for each source, the merged number of each of its classes.
        train, val: (entry, merged labels) of the videos that stay, in the sources' order.
        report: counts, merged names and conflicts, for JSON.
    """

    classes: list[str]
    maps: dict[str, list[int]]
    train: list[tuple[VideoEntry, tuple[int, ...]]] = field(default_factory=list)
    val: list[tuple[VideoEntry, tuple[int, ...]]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def normalise_name(name: str) -> str:
    """What two spellings of a class share: letters and digits in lower case, words apart by one blank."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(re.findall(r"[^\W_]+", folded))


def merge_classes(sources: Sequence[LabelSource], same: dict[str, str]) -> Merged:
    """The merged classes and the maps, no videos yet.

    Args:
        same: class names that mean another one: {name: the name it is merged into}, in any spelling.

    Raises:
        InputError: a name in `same` that no source has, a circle in it, or two classes of one source that
            become one.
    """
    known = {normalise_name(name) for source in sources for name in source.classes}
    redirected = _normalise_redirections(same, known)
    numbers: dict[str, int] = {}
    merged = Merged(classes=[], maps={})
    spellings: list[list[str]] = []
    for source in sources:
        own: dict[int, str] = {}
        for name in source.classes:
            key = _follow(normalise_name(name), redirected)
            number = numbers.setdefault(key, len(numbers))
            if number in own:
                raise InputError(
                    f"source {source.name!r}: {own[number]!r} and {name!r} would become one class"
                )
            own[number] = name
            if number == len(spellings):
                spellings.append([])
            spellings[number].append(f"{source.name}: {name}")
        merged.maps[source.name] = list(own)
    merged.classes = _names(numbers, sources)
    merged.report["merged_classes"] = {
        merged.classes[i]: names for i, names in enumerate(spellings) if len(names) > 1
    }
    return merged


def _names(numbers: dict[str, int], sources: Sequence[LabelSource]) -> list[str]:
    """The merged names, spelt as the first source that has the name itself spells it."""
    spelt: dict[str, str] = {}
    for source in sources:
        for name in source.classes:
            spelt.setdefault(normalise_name(name), name)
    return [spelt[key] for key in numbers]


def _normalise_redirections(same: dict[str, str], known: set[str]) -> dict[str, str]:
    redirected = {}
    for name, target in same.items():
        for given in (name, target):
            if normalise_name(given) not in known:
                raise InputError(f"the file of same names has {given!r}, which is no class of any source")
        redirected[normalise_name(name)] = normalise_name(target)
    return redirected


def _follow(key: str, redirected: dict[str, str]) -> str:
    seen = [key]
    while key in redirected:
        key = redirected[key]
        if key in seen:
            raise InputError(f"the file of same names goes round in a circle: {' -> '.join([*seen, key])}")
        seen.append(key)
    return key


def video_id(path: str, pattern: str | None = None) -> str:
    """What tells that two files are one video: the file's (or folder's) name without ending, or what
    `pattern` finds in it.

    Raises:
        InputError: the pattern finds nothing in it.
    """
    stem = re.sub(r"\.[A-Za-z0-9]{2,4}$", "", Path(path).name)
    if pattern is None:
        return stem
    match = re.search(pattern, stem)
    if match is None:
        raise InputError(f"the video id pattern {pattern!r} finds nothing in {stem!r} ({path})")
    return match[1] if match.groups() else match[0]


def merge_sources(
    sources: Sequence[LabelSource], same: dict[str, str] | None = None, *, id_pattern: str | None = None
) -> Merged:
    """Merge classes and videos.

    A video comes once, from the first source that has it; validation before training. Where two sources give
    it different classes, the first one's stay, and the report says so.

    Args:
        same: see `merge_classes`.
        id_pattern: see `video_id`.

    Raises:
        InputError: see `merge_classes` and `video_id`; sources of the same name; nothing left to train on.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names) or not names:
        raise InputError(f"sources need names, each its own; not {', '.join(names) or 'none'}")
    merged = merge_classes(sources, same or {})
    seen: dict[str, tuple[int, ...]] = {}
    conflicts: list[str] = []
    counts: dict[str, dict[str, int]] = {}
    for split in ("val", "train"):
        validated = set(seen)
        for source in sources:
            count = counts[f"{split}, {source.name}"] = dict.fromkeys(
                ("listed", "kept", "duplicates", "in_validation"), 0
            )
            for entry, own in _merged_videos(source, split, merged):
                identity = video_id(entry.path, id_pattern)
                count["listed"] += 1
                if identity not in seen:
                    seen[identity] = own
                    getattr(merged, split).append((entry, own))
                    count["kept"] += 1
                    continue
                count["in_validation" if identity in validated else "duplicates"] += 1
                if own != seen[identity]:
                    first, second = (
                        ", ".join(merged.classes[number] for number in labels)
                        for labels in (seen[identity], own)
                    )
                    conflicts.append(f"{identity}: {first}; {source.name} says {second}")
    if not merged.train:
        raise InputError("no video is left to train on: every one is also one to validate on")
    merged.report |= {"videos": counts, "conflicts": len(conflicts), "first_conflicts": conflicts[:SHOWN]}
    return merged


def _merged_videos(
    source: LabelSource, split: str, merged: Merged
) -> Iterator[tuple[VideoEntry, tuple[int, ...]]]:
    """The videos of a source's split, with their merged labels, ascending."""
    videos = getattr(source, split)
    if videos is not None:
        own = merged.maps[source.name]
        for entry, labels in zip(videos.entries, videos.labels, strict=True):
            yield entry, tuple(sorted(own[label] for label in labels))


def write_merged(folder: str | Path, merged: Merged) -> dict[str, Path]:
    """Write the lists, names, maps and report (see the module), and return their paths by kind.

    Raises:
        InputError: a file cannot be written.
    """
    folder = Path(folder)
    paths = {name: folder / name for name in ("train.txt", "val.txt", "classes.txt", "report.json")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            videos = getattr(merged, split)
            if videos:
                write_labelled_list(paths[f"{split}.txt"], *zip(*videos, strict=True))
            else:
                paths.pop(f"{split}.txt").unlink(missing_ok=True)
        paths["classes.txt"].write_text("\n".join(merged.classes) + "\n", encoding="utf-8")
        for source, numbers in merged.maps.items():
            path = paths[source] = folder / f"label_{len(merged.classes)}to{source}.json"
            path.write_text(json.dumps(numbers) + "\n", encoding="utf-8")
        paths["report.json"].write_text(
            json.dumps(merged.report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise InputError(f"cannot write the merged labels to {str(folder)!r}: {error.strerror}") from None
    return paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", help="folder for the merged lists, class names and maps")
    parser.add_argument(
        "--source",
        nargs=4,
        action="append",
        required=True,
        metavar=("NAME", "CLASSES", "TRAIN", "VAL"),
        help="a label set: its name, class list, and labelled lists (- for no list to validate on); "
        "give it several times",
    )
    parser.add_argument(
        "--data-root",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "DIR"),
        help="where a source's paths start",
    )
    parser.add_argument(
        "--same", metavar="FILE.json", help="class names that mean another one: {name: merged into}"
    )
    parser.add_argument(
        "--video-id",
        metavar="REGEX",
        help="what of a file's name tells a video, as ^.{11} for Kinetics (all but the ending)",
    )


def run(args: argparse.Namespace) -> None:
    roots = dict(args.data_root)
    names = [name for name, *_ in args.source]
    unknown = next((name for name in roots if name not in names), None)
    if unknown is not None:
        raise InputError(f"--data-root {unknown}: no such source; the sources are {', '.join(names)}")
    pattern = _compile(args.video_id)
    sources = [
        _read_source(name, classes, train, val, roots.get(name)) for name, classes, train, val in args.source
    ]
    same = _read_same(args.same) if args.same else {}
    merged = merge_sources(sources, same, id_pattern=pattern)
    paths = write_merged(args.output, merged)
    print(
        f"{sum(len(source.classes) for source in sources)} classes of {len(sources)} sources make "
        f"{len(merged.classes)}"
    )
    for title, count in merged.report["videos"].items():
        if count["listed"]:
            print(
                f"{title}: "
                + ", ".join(f"{number} {what.replace('_', ' ')}" for what, number in count.items())
            )
    if merged.report["conflicts"]:
        print(
            f"{merged.report['conflicts']} videos have other classes in another source; the first source's "
            "stay"
        )
    for path in paths.values():
        print(path)


def _read_source(name: str, classes: str, train: str, val: str, root: str | None) -> LabelSource:
    names = read_class_names(classes)
    if train == "-":
        raise InputError(f"source {name!r} has no list to train on")
    to_train = read_labelled_list(train, root, num_classes=len(names))
    to_test = None if val == "-" else read_labelled_list(val, root, num_classes=len(names))
    return LabelSource(name=name, classes=names, train=to_train, val=to_test)


def _read_same(path: str) -> dict[str, str]:
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise InputError(f"the file of same names {path!r} is no JSON: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(target, str) for target in content.values()):
        raise InputError(f"the file of same names {path!r} must be {{name: name it is merged into}}")
    return content


def _compile(pattern: str | None) -> str | None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise InputError(f"the video id pattern {pattern!r} is no regular expression: {error}") from None
    return pattern
