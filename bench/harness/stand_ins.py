"""Training where its small helpers are not installed: tqdm shows progress, yaml writes a run's settings, PIL
reads images (a run on noise has none).

A machine with a GPU may have torch, triton, numpy and pytest, and no network. Importing this, before anything
of training, puts stand-ins in the place of what is missing; `NOTES` says so. Nothing that is measured passes
through them.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any


class Quiet:
    """A tqdm that shows nothing."""

    disable = True

    def __init__(self, iterable: Iterable[Any] | None = None, **settings: Any) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        yield from self.iterable or ()

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        pass

    def set_postfix(self, values: object = None, **more: object) -> None:
        pass

    def close(self) -> None:
        pass

    @staticmethod
    def write(text: str, file: Any = None) -> None:
        print(text, file=file or sys.stdout, flush=True)


class Absent:
    """Whatever is asked of a package that is not there; calling it is an error."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.name}.{name}")

    def __call__(self, *arguments: object, **settings: object) -> object:
        raise ImportError(f"{self.name} is not installed")


def as_json(content: object, *rest: object, **settings: object) -> str:
    """JSON, which is YAML too."""
    return json.dumps(content, indent=1) + "\n"


STAND_INS: dict[str, dict[str, Any]] = {
    "tqdm": {"tqdm": Quiet},
    "yaml": {"safe_dump": as_json, "YAMLError": ValueError},
    "PIL": {name: Absent(f"PIL.{name}") for name in ("Image", "ImageEnhance", "ImageOps")},
}


def stand_in() -> list[str]:
    """Put stand-ins in the place of packages that are missing; a note for each."""
    notes = []
    for name, content in STAND_INS.items():
        try:
            importlib.import_module(name)
        except ImportError:
            module = ModuleType(name)
            vars(module).update(content)
            sys.modules[name] = module
            notes.append(f"without {name}: a stand-in.")
    return notes


NOTES = stand_in()
