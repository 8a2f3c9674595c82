"""Runs the kernels' tests and those that only a device can run, and writes each outcome as it comes.

python bench/device_tests.py --json FILE              # tests/kernels and tests/device
python bench/device_tests.py --json FILE -- tests/kernels -k embed_visible
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import ROOT
from harness.command import add_json, check_least, exit_code, write_partial, write_result
from harness.environment import find_environment, rehearsing
from harness.json_records import from_json
from harness.progress import at
from harness.results.device_tests import DeviceTestsResult, TestOutcome
from harness.table import show

from vmae import InputError

USUAL = ["tests/device", "tests/kernels", "-m", "device or not slow"]
# Tests of a GPU beside those, which need packages that a bare machine may lack.
MORE = {
    "tests/train/test_no_waiting.py": (),
    "tests/data/test_prefetch.py": ("PIL",),
    "tests/data/test_dali.py": ("PIL", "av", "nvidia.dali"),
}
WRITE_EVERY_S = 2.0
NONE_SELECTED = 5  # pytest's exit code


class Outcomes:
    """pytest's plugin: notes each outcome."""

    def __init__(self, result: DeviceTestsResult, path: str | None) -> None:
        self.result, self.path, self._written = result, path, 0.0

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._add(report.nodeid, "error", 0.0, _last_line(report))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            outcome = report.outcome if report.when == "call" or report.skipped else "error"
            reason = "" if report.passed else _last_line(report)
            self._add(report.nodeid, outcome, report.duration, reason)
            at(report.nodeid)

    def _add(self, name: str, outcome: str, seconds: float, reason: str) -> None:
        self.result.records.append(TestOutcome(name=name, outcome=outcome, seconds=seconds, reason=reason))
        if time.monotonic() - self._written > WRITE_EVERY_S:
            write_partial(self.result, self.path)
            self._written = time.monotonic()


def _last_line(report: Any) -> str:
    """The reason of a skip, or what an error says of itself."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return (text.strip().splitlines() or ["no reason given"])[0][:300]


def usual_arguments() -> list[str]:
    """Paths and selection, for the packages that are here."""

    def there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ImportError:  # a dotted name whose parent is absent
            return False

    more = [path for path, needs in MORE.items() if all(there(name) for name in needs)]
    return [*USUAL[:2], *more, *USUAL[2:]]


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Test files of the leading paths, and the other words."""
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    files: list[str] = []
    for path in paths:
        folder = ROOT / path
        files += [str(file) for file in sorted(folder.glob("test_*.py"))] if folder.is_dir() else [path]
    return files, words[len(paths) :]


def run_files(result: DeviceTestsResult, args: argparse.Namespace) -> tuple[DeviceTestsResult, int]:
    """Each file in a process of its own, some at once: most of their time, kernels are compiled.

    Returns:
        Their outcomes, and the largest exit code (no test of a file selected: 0).
    """
    files, rest = split(result.arguments)
    with tempfile.TemporaryDirectory() as folder:
        parts = {file: Path(folder) / f"{number}.json" for number, file in enumerate(files)}

        def run_one(file: str) -> int:
            own = [sys.executable, __file__, "--jobs", "1", "--json", str(parts[file]), "--", file, *rest]
            done = subprocess.run(own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(f"\n== {file} ==\n{done.stdout}", flush=True)
            return 0 if done.returncode == NONE_SELECTED else done.returncode

        with ThreadPoolExecutor(args.jobs) as pool:
            running = {pool.submit(run_one, file) for file in files}
            left = running
            while left:
                _, left = wait(left, WRITE_EVERY_S)
                at(f"{len(running) - len(left)} of {len(running)} files")
                result = replace(result, records=merged(parts.values()))
                write_partial(result, args.json)
        return result, max((future.result() for future in running), default=NONE_SELECTED)


def merged(parts: Iterable[Path]) -> list[TestOutcome]:
    """Outcomes of the results that are there."""
    records: list[TestOutcome] = []
    for part in parts:
        if part.is_file():
            records += from_json(DeviceTestsResult, json.loads(part.read_text("utf-8"))).records
    return records


def run(args: argparse.Namespace) -> int:
    check_least(args, "jobs")
    try:
        import pytest
    except ImportError:
        raise InputError("pytest is not installed: `pip install pytest`") from None
    os.chdir(ROOT)
    words = args.arguments or usual_arguments()
    device = "cuda" if torch.cuda.is_available() and not rehearsing() else "cpu"
    result = DeviceTestsResult(environment=find_environment(device), records=[], arguments=words)
    if args.jobs > 1:
        result, code = run_files(result, args)
    else:
        code = int(pytest.main([*words, "-p", "no:cacheprovider"], plugins=[Outcomes(result, args.json)]))
    result = replace(result, complete=code in (0, 1, NONE_SELECTED))
    show(*result.tables())
    write_result(result, args.json)
    return code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json(parser)
    parser.add_argument("--jobs", type=int, default=1, help="files at once, each in a process (1)")
    parser.add_argument("arguments", nargs="*", help=f"of pytest, after -- ({' '.join(USUAL)})")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
