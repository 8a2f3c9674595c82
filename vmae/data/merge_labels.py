"""`python -m vmae merge-labels OUT`: one label set from several, as Kinetics-710 is made of 400, 600 and 700.

VideoMAE V2 post-pre-trains on such a set (section 3.3): classes of the same name are one class; videos that
several sources list count once; none that any source validates on is trained on. The published code has the
result, not the way.

Merged classes come in the order of the sources, each source's new ones after those before; or as `--order`
lists them, so that heads and label maps of the published numbering fit. What is written:

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
from vmae.data.shards.index import is_index
from vmae.errors import InputError
from vmae.files.json_files import parse_json

SHOWN = 20  # conflicts that the report spells out
SAID = 5  # names that a message spells out

# What one file of same names says: for each entry, the name that stays and those that mean it too.
Groups = list[tuple[str, list[str]]]
Same = dict[str, str] | Groups


class OrderError(InputError):
    """A list of classes that is not of the merged set."""


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


def merge_classes(
    sources: Sequence[LabelSource], same: Same | None = None, order: Sequence[str] | None = None
) -> Merged:
    """The merged classes and the maps, no videos yet.

    Args:
        same: class names that mean another one: {name: the name it is merged into}, or groups of names; in
            any spelling. What merges nothing (a name that no source has, names that differ in spelling only)
            stands in the report under `same`.
        order: the merged classes, in the order that they shall have; spelt as they shall be.

    Raises:
        InputError: a circle in `same`, two classes of one source that become one.
        OrderError: `order` is not of the merged classes.
    """
    known = {normalise_name(name) for source in sources for name in source.classes}
    redirected, told = _redirections(same or {}, known)
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
    merged.classes = _names(numbers, sources, redirected)
    if order is not None:
        places = _places(order, merged.classes, numbers, redirected)
        merged.classes = list(order)
        merged.maps = {name: [places[number] for number in own] for name, own in merged.maps.items()}
        spellings = [names for _, names in sorted(zip(places, spellings))]
    merged.report["merged_classes"] = {
        merged.classes[i]: names for i, names in enumerate(spellings) if len(names) > 1
    }
    merged.report["same"] = told
    merged.report["order"] = "sources" if order is None else "given"
    return merged


def _names(numbers: dict[str, int], sources: Sequence[LabelSource], redirected: dict[str, str]) -> list[str]:
    """The merged names, spelt as the first source that has the name itself spells it; where none has it, as
    the first one that has a name merged into it."""
    spelt: dict[str, str] = {}
    stands_in: dict[str, str] = {}
    for source in sources:
        for name in source.classes:
            key = normalise_name(name)
            spelt.setdefault(key, name)
            stands_in.setdefault(_follow(key, redirected), name)
    return [spelt.get(key, stands_in[key]) for key in numbers]


def _places(
    order: Sequence[str], classes: Sequence[str], numbers: dict[str, int], redirected: dict[str, str]
) -> list[int]:
    """The place in `order` of each merged class.

    Raises:
        OrderError: a name of `order` that no source has, a class that comes twice there, or not at all.
    """
    keys = [_follow(normalise_name(name), redirected) for name in order]
    faults = []
    if unknown := [name for name, key in zip(order, keys) if key not in numbers]:
        faults.append(f"{len(unknown)} names that are no class of any source ({_some(unknown)})")
    first: dict[str, str] = {}
    twice = []
    for name, key in zip(order, keys):
        if key in first:
            twice.append(f"{first[key]} and {name}")
        first.setdefault(key, name)
    if twice:
        faults.append(f"{len(twice)} classes twice ({_some(twice)})")
    if lacking := [name for name, key in zip(classes, numbers) if key not in first]:
        faults.append(f"not {len(lacking)} of the {len(classes)} merged classes ({_some(lacking)})")
    if faults:
        raise OrderError(
            f"the order of classes has {'; '.join(faults)}: it has to name each merged class once; are all "
            "sources given, and --same?"
        )
    return [keys.index(key) for key in numbers]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SAID} more" if len(names) > SAID else ""
    return ", ".join(repr(name) for name in names[:SAID]) + more


def _redirections(same: Same, known: set[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """{name: the name that it is merged into}, normalised; and what the file of same names does, for the
    report: entries, those that merge nothing, names that no source has."""
    redirected: dict[str, str] = {}
    groups: Groups = same if isinstance(same, list) else [(target, [name]) for name, target in same.items()]
    only_spelling: list[str] = []
    unknown: list[str] = []
    for target, names in groups:
        unknown += [name for name in (target, *names) if normalise_name(name) not in known]
        into = normalise_name(target)
        for name in names:
            key = normalise_name(name)
            if key == into:
                only_spelling.append(f"{name}: {target}")
            elif isinstance(same, dict):
                if redirected.setdefault(key, into) != into:
                    both = f"{redirected[key]!r}, {target!r}"
                    raise InputError(f"the file of same names merges {name!r} into two classes: {both}")
            else:  # groups say what is one class, in any direction
                one, other = _follow(key, redirected), _follow(into, redirected)
                if one != other:
                    redirected[one] = other
    told = {
        "entries": len(groups),
        "spelling_only": list(dict.fromkeys(only_spelling)),
        "unknown_names": list(dict.fromkeys(unknown)),
    }
    return redirected, told


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
    sources: Sequence[LabelSource],
    same: Same | None = None,
    *,
    order: Sequence[str] | None = None,
    id_pattern: str | None = None,
) -> Merged:
    """Merge classes and videos.

    A video comes once, from the first source that has it; validation before training. Where two sources give
    it different classes, the first one's stay, and the report says so.

    Args:
        same, order: see `merge_classes`.
        id_pattern: see `video_id`.

    Raises:
        InputError: see `merge_classes` and `video_id`; sources of the same name; nothing left to train on.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names) or not names:
        raise InputError(f"sources need names, each its own; not {', '.join(names) or 'none'}")
    merged = merge_classes(sources, same, order)
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
        "--same",
        metavar="FILE.json",
        help="class names that mean another one, as k710_identical_label_merge.json: {name: merged into}, "
        "{name: [names]} or [[names], ...]",
    )
    parser.add_argument(
        "--order",
        metavar="FILE",
        help="class list with the numbers that the merged classes get, as label_map_k710.txt",
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
    order = read_class_names(args.order) if args.order else None
    try:
        merged = merge_sources(sources, same, order=order, id_pattern=pattern)
    except OrderError as error:
        raise InputError(f"{args.order}: {error}") from None
    _say_same(args.same, merged.report["same"])
    paths = write_merged(args.output, merged)
    numbered = f", numbered as in {args.order}" if order else ""
    print(
        f"{sum(len(source.classes) for source in sources)} classes of {len(sources)} sources make "
        f"{len(merged.classes)}{numbered}"
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
    for path in (train, val):
        if is_index(path):
            raise InputError(
                f"source {name!r}: a merged list names files, not shards: give the lists that {path} was "
                "packed from, and pack the merged one"
            )
    to_train = read_labelled_list(train, root, num_classes=len(names))
    to_test = None if val == "-" else read_labelled_list(val, root, num_classes=len(names))
    return LabelSource(name=name, classes=names, train=to_train, val=to_test)


def _say_same(path: str, told: dict[str, Any]) -> None:
    """Warn of what the file of same names has and that merges nothing."""
    for names, fault in (
        (told["spelling_only"], "entries differ only in spelling, which makes one class anyway"),
        (told["unknown_names"], "names are no class of any source"),
    ):
        if names:
            print(f"warning: {path}: {len(names)} {fault}: {_some(names)}")


def _read_same(path: str) -> Same:
    """The file of same names: {name: merged into}, or groups.

    VideoMAE V2's `misc/k710_identical_label_merge.json` was not at hand: these are forms that it may have.

    Raises:
        InputError: the file cannot be read, or has another form.
    """
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise InputError(f"the file of same names {path!r} is no JSON: {error}") from None
    if isinstance(content, dict) and all(isinstance(target, str) for target in content.values()):
        return content
    pairs = content.items() if isinstance(content, dict) else ((None, names) for names in _list_of(content))
    groups: Groups = []
    for target, names in pairs:
        listed = list(names.values()) if isinstance(names, dict) else names
        listed = [listed] if isinstance(listed, str) else listed
        if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
            groups = []
            break
        groups.append((listed[0], listed[1:]) if target is None else (target, listed))
    if not groups:
        raise InputError(
            f"the file of same names {path!r} must be {{name: name it is merged into}}, {{name: [names]}}, "
            "{name: {source: name}} or [[names of one class], ...]"
        )
    return groups


def _list_of(content: Any) -> list[Any]:
    return content if isinstance(content, list) else []


def _compile(pattern: str | None) -> str | None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise InputError(f"the video id pattern {pattern!r} is no regular expression: {error}") from None
    return pattern
