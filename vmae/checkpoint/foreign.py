"""Folders of the published trainers: files `checkpoint-N.pth`, or, with DeepSpeed, a folder for each tag.

    run/latest                                        names a tag
    run/checkpoint-best/mp_rank_00_model_states.pt    weights under `module`
    run/checkpoint-best/*_optim_states.pt             never read

With ZeRO-1 and -2 the weights are whole in that file; with ZeRO-3 each rank has a part of every tensor, which
only DeepSpeed's own script puts together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vmae.errors import InputError

LATEST = "latest"
_STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_PARTS = re.compile(r"(?:bf16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_FILE = re.compile(r"checkpoint-(best|latest|\d{1,18})\.(?:pth|pt)")
_BIN = ("pytorch_model.bin", "model.safetensors")  # what zero_to_fp32.py and others leave


def find_foreign(folder: Path) -> tuple[Path, str] | None:
    """The file of weights in a folder of the published trainers, and a line on why this one; None where there
    is none.

    Args:
        folder: of the run, or of a tag.

    Raises:
        InputError: DeepSpeed's weights are there, but in parts; or `latest` names no tag that is there.
    """
    names = [path.name for path in folder.iterdir()]
    if _is_tag(names):
        return _states_of(folder, names), ""
    tags = [path.name for path in folder.iterdir() if path.is_dir() and _is_tag(_names_in(path))]
    if tags or (folder / LATEST).is_file():
        tag, why = _choose_tag(folder, tags)
        if tag is not None:
            return _states_of(folder / tag, _names_in(folder / tag)), why
    if files := {match[1]: name for name in names if (match := _FILE.fullmatch(name))}:
        key = _best_of(list(files))
        return folder / files[key], f"{files[key]} is taken of this folder, {_reason(key, len(files))}"
    found = next((folder / name for name in _BIN if (folder / name).is_file()), None)
    return None if found is None else (found, f"{found.name} is taken of this folder")


def _names_in(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:  # of somebody else
        return []


def _is_tag(names: Sequence[str]) -> bool:
    return any(_STATES.fullmatch(name) or _PARTS.fullmatch(name) for name in names)


def _choose_tag(folder: Path, tags: list[str]) -> tuple[str | None, str]:
    """The tag that `latest` names, else the best, else the newest; with the reason."""
    if (folder / LATEST).is_file():
        try:
            named = (folder / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / LATEST} cannot be read: {error}") from error
        if named in tags:
            best = "; checkpoint-best is there too" if "checkpoint-best" in set(tags) - {named} else ""
            return named, f"{named} is taken of this folder, the tag in {LATEST}{best}"
        if not tags and "\n" in named:
            return None, ""
        there = f"there are {', '.join(sorted(tags))}" if tags else "there is no tag's folder at all"
        raise InputError(
            f"{folder}: {LATEST} names {named[:80]!r}, which holds no mp_rank_00_model_states.pt; {there}: "
            "give the one you want"
        )
    keys = {tag.rpartition("-")[2] if "-" in tag else tag: tag for tag in tags}
    key = _best_of(list(keys))
    return keys[key], f"{keys[key]} is taken of this folder, {_reason(key, len(tags))}"


def _number(key: str) -> int:
    digits = re.search(r"\d{1,18}$", key)
    return int(digits[0]) if digits else -1


def _best_of(keys: list[str]) -> str:
    """best, else latest, else the largest number."""
    return next((key for key in ("best", "latest") if key in keys), max(keys, key=_number))


def _reason(key: str, count: int) -> str:
    return "the only one" if count == 1 else f"the {'best' if key == 'best' else 'newest'} of {count}"


def _states_of(folder: Path, names: Sequence[str]) -> Path:
    """The file with a tag's weights.

    Raises:
        InputError: they are in parts (ZeRO-3, model parallel).
    """
    whole = sorted(name for name in names if _STATES.fullmatch(name))
    if any(_PARTS.fullmatch(name) for name in names):
        raise InputError(in_parts(folder))
    if len(whole) > 1:
        raise InputError(
            f"{folder} holds weights in {len(whole)} parts of a model-parallel run ({whole[0]} to "
            f"{whole[-1]}), which are not put together here: save them with one model-parallel rank"
        )
    return folder / whole[0]


def in_parts(place: Path) -> str:
    """Text for the weights of ZeRO-3."""
    folder = place if place.is_dir() else place.parent
    return (
        f"{place} holds each rank's part of the weights (DeepSpeed's ZeRO-3); put them together with its own "
        f"script, `python {folder.parent}/zero_to_fp32.py {folder.parent} pytorch_model.bin`, and give the "
        "pytorch_model.bin that it makes"
    )


def is_part(path: Path) -> bool:
    """Whether a file is one of ZeRO-3's, by its name."""
    return _PARTS.fullmatch(path.name) is not None


def is_optimizer_state(path: Path) -> bool:
    """Whether a file is one of DeepSpeed's optimizer states, by its name."""
    return path.name.endswith("_optim_states.pt")
