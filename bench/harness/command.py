"""What the commands share: arguments, exit codes, where results go."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from harness.progress import telling
from harness.results.base import Result
from vmae import InputError


def exit_code(run: Callable[[], int]) -> int:
    """What `run()` returns; 2, and a line on stderr, for wrong input or a dead worker; 130 after Ctrl-C."""
    try:
        with telling():
            return run()
    except (InputError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def find_device(name: str) -> str:
    """`name`; "auto" becomes "cuda" where there is a GPU, else "cpu".

    Raises:
        InputError: a GPU is asked for where there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {name}: torch sees no GPU here; use --device cpu")
    return name


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the results there")


def set_defaults(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Set arguments that were not given."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_least(args: argparse.Namespace, *names: str, least: int = 1) -> None:
    """Every argument of these that was given is at least `least`.

    Raises:
        InputError: one is not.
    """
    for name in names:
        given = getattr(args, name)
        values = given if isinstance(given, list) else [given]
        if any(value is not None and value < least for value in values):
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}")


def write_partial(result: Result, path: str | None) -> None:
    """Write what there is so far where `--json` was given: a command that is ended keeps it."""
    if path:
        result.write(path)


def write_result(result: Result, path: str | None) -> None:
    """Write the result where `--json` was given."""
    if path:
        result.write(path)
        print(f"\nresults: {path}")


def say_wrong(rejected: dict[str, str]) -> None:
    """Say on stderr what has no speed, and why."""
    for name, reason in rejected.items():
        print(f"\nNO SPEED for {name}: {reason}", file=sys.stderr)


def draw(path: str | None, plot: Callable[[str], None]) -> None:
    """Plot where `--plot` was given; a line on stderr where matplotlib is missing."""
    if not path:
        return
    try:
        plot(path)
        print(f"plot: {path}")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Everything in here runs on one core, where the system can promise that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
