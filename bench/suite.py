"""All benchmarks in one command, on the machine at hand; one JSON file a part, and one page that shows them.

    python bench/suite.py --quick     # a CPU: under 5 minutes; a GPU: under 8
    python bench/suite.py             # longer, larger
    python bench/suite.py --only step data

What matters most comes first, each part is a process of its own, and its file is whole or absent: a suite
that is cut off, by someone or by its own time limit, leaves the parts that were done. Results go to
bench/results/DEVICE/DATE-COMMIT/.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import torch
from harness import ROOT
from harness.environment import Environment, find_environment
from harness.json_records import to_json, write_json
from harness.progress import at, said, telling
from harness.report import write_report
from harness.results.suite import PartRecord, SuiteResult
from harness.table import show

HERE = Path(__file__).resolve().parent
# What the suite can do without, and what that costs.
OPTIONAL = {
    "decord": "the published way to load video is not timed",
    "av": "no video is decoded by PyAV",
    "torchcodec": "no video is decoded by torchcodec",
    "flash_attn": "FlashAttention 2 is not among the attention backends",
    "xformers": "xformers is not among the attention backends",
    "nvidia.dali": "the GPU loader is not timed",
    "matplotlib": "the page has no pictures",
    "transformers": "the Hugging Face model is not timed",
}
# Seconds that a quick run may take in all.
QUICK_S = {"cpu": 290, "cuda": 470}


@dataclass(frozen=True)
class Part:
    """One script, with its arguments for quick and full runs, on a CPU and on a GPU; None leaves it out."""

    script: str
    arguments: Mapping[str, list[str] | None] = field(default_factory=dict)

    def command(self, key: str) -> list[str] | None:
        arguments = self.arguments.get(key, [])
        return None if arguments is None else [f"{self.script}.py", *arguments]


def parts_for(device: str) -> list[Part]:
    """Parts in order: what matters most first."""
    kernels = Part(
        "operations", {"cpu-quick": ["--check"], "cpu": ["--check"], "cuda-quick": ["--rounds", "20"]}
    )
    steps = Part(
        "dual_vs_encoder",
        {
            "cpu-quick": ["--batch", "1", "--steps", "3"],
            "cuda-quick": ["--steps", "10", "--warmup", "3"],
            "cuda": ["--sweep", "512"],
        },
    )
    attention = Part("attention", {"cpu-quick": ["--quick"]})
    step = Part("step", {"cpu-quick": ["--batch", "1", "--steps", "2"]})
    data = Part("data", {"cpu-quick": ["--quick"], "cuda-quick": ["--quick"]})
    scaling = Part(
        "scaling", {"cpu-quick": ["--quick", "--axes", "batch", "frames"], "cuda-quick": ["--axes", "batch"]}
    )
    predict = Part("predict", {"cpu-quick": ["--presets", "vit_b", "vit_g"], "cuda-quick": None})
    if device == "cuda":
        return [kernels, steps, step, attention, scaling, data, predict]
    return [steps, predict, step, kernels, attention, data, scaling]


def result_folder(known: Environment) -> Path:
    """bench/results/DEVICE/DATE-COMMIT"""
    device = re.sub(r"[^a-z0-9]+", "-", known.device.lower()).strip("-")
    return HERE / "results" / device / f"{known.date[:10]}-{(known.commit or 'nocommit')[:9]}"


def missing_packages() -> dict[str, str]:
    """Those of `OPTIONAL` that are not installed."""

    def absent(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except ImportError:  # a dotted name whose parent is absent
            return True

    return {name: cost for name, cost in OPTIONAL.items() if absent(name)}


def run_part(part: Part, key: str, folder: Path, limit_s: float | None) -> PartRecord:
    """Run one script; its `file` is named only where a whole result is there."""
    command = part.command(key)
    if command is None:
        return PartRecord(name=part.script, reason="not part of this run")
    script = HERE / command[0]
    if not script.is_file():
        return PartRecord(name=part.script, reason="no such benchmark here")
    start, target, log = time.monotonic(), folder / f"{part.script}.json", folder / f"{part.script}.log"
    print(f"\n== {part.script} ==", flush=True)
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), *command[1:], "--json", str(target)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        code = _follow(process, output, limit_s)
    status, reason = "ran", ""
    if code is None:
        status, reason = "cut off", "the time of a quick run was over"
    elif code:
        status, reason = "failed", f"it ended with code {code}; see {log.name}"
    return PartRecord(
        name=part.script,
        status=status,
        reason=reason,
        seconds=time.monotonic() - start,
        command=command,
        file=target.name if target.is_file() else None,
    )


def _follow(process: subprocess.Popen[str], output: IO[str], limit_s: float | None) -> int | None:
    """Show and keep what the process prints; its exit code, or None if it had to be ended."""
    timer = threading.Timer(limit_s, process.kill) if limit_s else None
    if timer:
        timer.start()
    for line in process.stdout or ():
        print(line, end="", flush=True)
        said()
        output.write(line)
    code = process.wait()
    if timer is None:
        return code
    expired = not timer.is_alive()
    timer.cancel()
    return None if expired and code != 0 else code


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, names = parser.add_argument, [part.script for part in parts_for("cpu")]
    add("--quick", action="store_true", help="a CPU: under 5 minutes; a GPU: under 8")
    add("--only", nargs="+", metavar="PART", help=f"these parts alone: {', '.join(names)}")
    where = "where results go (bench/results/DEVICE/DATE-COMMIT)"
    add("--output", type=Path, metavar="DIR", help=where)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.only or () if name not in names]:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(names)}")
    return args


def run(args: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = find_environment(device)
    folder = args.output or result_folder(known)
    folder.mkdir(parents=True, exist_ok=True)
    suite = SuiteResult(environment=known, quick=args.quick, missing=missing_packages())
    where = f"{known.device} ({known.cpu}, {known.cores} cores), torch {known.torch}"
    print(f"{where}; results: {folder}")
    for name, cost in suite.missing.items():
        print(f"  without {name}: {cost}")
    start, path = time.monotonic(), folder / "report.html"
    for part in parts_for(device):
        if args.only and part.script not in args.only:
            continue
        limit = None
        if args.quick:
            limit = max(QUICK_S[device] - (time.monotonic() - start), 1.0)
        at(part.script)
        record = run_part(part, f"{device}-quick" if args.quick else device, folder, limit)
        suite = replace(suite, parts=[*suite.parts, record])
        path = save(folder, suite)
    show(suite.parts_table())
    print(f"\nall in {time.monotonic() - start:.0f} s; page: {path}")
    bad = [part.name for part in suite.parts if part.status not in ("ran", "skipped")]
    return 1 if bad else 0


def save(folder: Path, suite: SuiteResult) -> Path:
    """After every part: `suite.json` and the page."""
    write_json(folder / "suite.json", to_json(suite))
    return write_report(folder, suite)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with telling():
        return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
