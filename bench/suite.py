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
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness.common import ROOT, SCHEMA, environment
from harness.report import write_report
from harness.telling import at, said, telling

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
    """One script: words for `quick` and full runs, on a CPU and on a GPU; None leaves it out."""

    script: str
    words: dict[str, list[str] | None] = field(default_factory=dict)

    def command(self, key: str) -> list[str] | None:
        words = self.words.get(key, [])
        return None if words is None else [sys.executable, str(HERE / f"{self.script}.py"), *words]


def parts_for(device: str) -> list[Part]:
    """In order: what matters most first."""
    words = {"cpu-quick": ["--batch", "1", "--steps", "3"], "cuda-quick": ["--steps", "10", "--warmup", "3"]}
    steps = Part("dual_vs_encoder", words | {"cuda": ["--sweep", "512"]})
    kernels = Part(
        "operations", {"cpu-quick": ["--check"], "cpu": ["--check"], "cuda-quick": ["--rounds", "20"]}
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


def result_folder(known: dict[str, Any]) -> Path:
    """bench/results/DEVICE/DATE-COMMIT"""
    device = re.sub(r"[^a-z0-9]+", "-", known["device"].lower()).strip("-")
    return HERE / "results" / device / f"{known['date'][:10]}-{(known['commit'] or 'nocommit')[:9]}"


def missing_packages() -> dict[str, str]:
    def absent(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except ImportError:  # a dotted name whose parent is absent
            return True

    return {name: cost for name, cost in OPTIONAL.items() if absent(name)}


def run_part(part: Part, key: str, folder: Path, limit_s: float | None) -> dict[str, Any]:
    """Run one script; what came of it, with `file` only where a whole result is there."""
    target = folder / f"{part.script}.json"
    command = part.command(key)
    record: dict[str, Any] = {
        "name": part.script,
        "status": "skipped",
        "reason": "not part of this run",
        "seconds": 0.0,
    }
    if command is None:
        return record
    if not Path(command[1]).is_file():
        return record | {"reason": "no such benchmark here"}
    start = time.monotonic()
    log = folder / f"{part.script}.log"
    print(f"\n== {part.script} ==", flush=True)
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "--json", str(target)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        code = _follow(process, output, limit_s)
    record |= {"seconds": time.monotonic() - start, "command": [Path(command[1]).name, *command[2:]]}
    if code is None:
        record |= {"status": "cut off", "reason": "the time of a quick run was over"}
    elif code:
        record |= {"status": "failed", "reason": f"it ended with code {code}; see {log.name}"}
    else:
        record |= {"status": "ran", "reason": ""}
    return record | ({"file": target.name} if target.is_file() else {})


def _follow(process: subprocess.Popen, output, limit_s: float | None) -> int | None:
    """Show and keep what the process prints; its exit code, or None if it had to be ended."""
    import threading

    timer = threading.Timer(limit_s, process.kill) if limit_s else None
    expired = False
    if timer:
        timer.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        said()
        output.write(line)
    code = process.wait()
    if timer:
        expired = not timer.is_alive()
        timer.cancel()
    return None if expired and code != 0 else code


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a CPU: under 5 minutes; a GPU: under 8")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where results go (bench/results/DEVICE/DATE-COMMIT)"
    )
    args = parser.parse_args(argv)
    names = [part.script for part in parts_for("cpu")]
    if unknown := [name for name in args.only or () if name not in names]:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(names)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with telling():
        return run(args)


def run(args: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = environment(device)
    folder = args.output or result_folder(known)
    folder.mkdir(parents=True, exist_ok=True)
    suite: dict[str, Any] = {"schema": SCHEMA, "environment": known, "quick": args.quick, "parts": []}
    suite["missing"] = missing_packages()
    print(
        f"{known['device']} ({known['cpu']}, {known['cores']} cores), torch {known['torch']}; results: "
        f"{folder}"
    )
    for name, cost in suite["missing"].items():
        print(f"  without {name}: {cost}")
    start = time.monotonic()
    for part in parts_for(device):
        if args.only and part.script not in args.only:
            continue
        limit = max(QUICK_S[device] - (time.monotonic() - start), 1.0) if args.quick else None
        at(part.script)
        suite["parts"].append(run_part(part, f"{device}-quick" if args.quick else device, folder, limit))
        path = save(folder, suite)
    print(f"\nall in {time.monotonic() - start:.0f} s")
    for part in suite["parts"]:
        print(f"  {part['name']}: {part['status']} {part['reason']}".rstrip())
    print(f"page: {path}")
    return 0 if all(part["status"] in ("ran", "skipped") for part in suite["parts"]) else 1


def save(folder: Path, suite: dict[str, Any]) -> Path:
    """After every part: `suite.json` and the page."""
    (folder / "suite.json").write_text(json.dumps(suite, indent=1) + "\n", encoding="utf-8")
    return write_report(folder, suite)


if __name__ == "__main__":
    raise SystemExit(main())
