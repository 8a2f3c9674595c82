"""Which of a larger head's classes the classes of a list are: maps as files, found by name or by class names.

The published code turns a head of Kinetics-710 into one of Kinetics-400, -600 or -700 with the files
`misc/label_710to400.json` and so on of its repository. They are not part of this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vmae.data.labels import read_label_map
from vmae.data.merge_labels import normalise_name
from vmae.errors import InputError
from vmae.files.json_files import read_json

KINETICS_710, KINETICS = 710, (400, 600, 700)
SHOWN = 3  # classes that a message names


def map_name(num_classes: int) -> str:
    """Name of the published map of Kinetics-710."""
    return f"label_{KINETICS_710}to{num_classes}.json"


def is_kinetics(head: int, num_classes: int) -> bool:
    """Whether a head of so many classes is of Kinetics-710, and the labels are of a smaller Kinetics."""
    return head == KINETICS_710 and num_classes in KINETICS


def places_of_maps(checkpoint: str | Path, data: str | Path | None = None) -> list[Path]:
    """Folders where a published map is looked for: beside the checkpoint, beside the list, `misc`."""
    path = Path(checkpoint)
    places = [path, path.parent] if path.is_dir() else [path.parent]
    if data is not None:
        places.append(Path(data) if Path(data).is_dir() else Path(data).parent)
    return list(dict.fromkeys([*places, Path("misc")]))


def find_kinetics_map(num_classes: int, places: Sequence[Path]) -> tuple[Path, list[int]] | None:
    """The published map of Kinetics-710 in the first of these folders that has it, checked.

    Raises:
        InputError: the file is no such map; see `read_label_map`.
    """
    for place in places:
        path = place / map_name(num_classes)
        if path.is_file():
            return path, read_label_map(path, source_classes=KINETICS_710, num_classes=num_classes)
    return None


def describe_lack(checkpoint: str | Path, num_classes: int, places: Sequence[Path]) -> str:
    """What to do where `find_kinetics_map` finds none, in a line."""
    looked = ", ".join(str(place) for place in places)
    return (
        f"checkpoint {checkpoint} has a head of {KINETICS_710} classes (Kinetics-710), the labels have "
        f"{num_classes}: {map_name(num_classes)} converts it, from misc/ of the published repository "
        f"OpenGVLab/VideoMAEv2; looked for it in {looked}; --label-map FILE.json names it elsewhere, "
        "--new-head starts a fresh head"
    )


def map_by_names(source: Sequence[str], target: Sequence[str]) -> list[int] | None:
    """The number in `source` of each class of `target`, by names in any spelling; None where a name is
    missing, or one stands for two classes."""
    numbers = {normalise_name(name): number for number, name in enumerate(source)}
    wanted = [normalise_name(name) for name in target]
    if len(numbers) < len(source) or len(set(wanted)) < len(wanted) or any(n not in numbers for n in wanted):
        return None
    return [numbers[name] for name in wanted]


def check_mapped_names(
    path: str | Path, label_map: Sequence[int], source: Sequence[str], target: Sequence[str]
) -> None:
    """See that each class of `target` has the name of the class that it is mapped to, or one that was merged
    with it (`same_names`).

    Raises:
        InputError: names the first classes that have not.
    """
    same = same_names(Path(path).parent)

    def plain(name: str) -> str:
        key = normalise_name(name)
        return same.get(key, key)

    wrong = [
        f"class {number} is {name!r}, mapped to {source[place]!r} ({place})"
        for number, (place, name) in enumerate(zip(label_map, target))
        if plain(source[place]) != plain(name)
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise InputError(
            f"label map {str(path)!r} does not fit the class names: {'; '.join(wrong[:SHOWN])}{more}; take "
            "the map, the class list and the checkpoint of one label set"
        )


def same_names(folder: Path) -> dict[str, str]:
    """Names that a merge of label sets made one, each with the one that stands for them, all normalised: of
    `report.json`, which `merge-labels` writes beside its maps, and of the published
    `k710_identical_label_merge.json`. Files that hold something else count for nothing."""
    same: dict[str, str] = {}
    for file in ("report.json", "k710_identical_label_merge.json"):
        if (folder / file).is_file():
            for names in _groups(_content(folder / file)):
                keys = [normalise_name(name) for name in names]
                merged = next((same[key] for key in keys if key in same), keys[-1])
                same |= dict.fromkeys(keys, merged)
    return same


def _content(path: Path) -> Any:
    try:
        return read_json(path)
    except InputError:
        return None


def _groups(content: Any) -> Iterable[list[str]]:
    """The names of each merged class."""
    if not isinstance(content, dict):
        return
    merged = content.get("merged_classes", content)
    for name, others in merged.items() if isinstance(merged, dict) else ():
        if isinstance(others, str):
            yield [name, others]
        elif isinstance(others, list) and all(isinstance(other, str) for other in others):
            own = [other.split(": ", 1)[-1] for other in others] if merged is not content else others
            yield [*own, name]
