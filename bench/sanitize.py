"""compute-sanitizer on one shape of each kernel: accesses out of bounds, and races in shared memory.

    python bench/sanitize.py --json FILE

Torch's allocator is told to give every tensor memory of its own (PYTORCH_NO_CUDA_MEMORY_CACHING=1): in a
cache, what lies beyond a tensor is often another one's. Where there is no compute-sanitizer, the record says
so.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness.command import add_json, exit_code, write_partial, write_result
from harness.environment import find_environment, rehearsing
from harness.progress import at
from harness.results.sanitize import SanitizerRecord, SanitizerResult
from harness.running import run_command
from harness.table import show

TOOLS = ("memcheck", "racecheck")
ERRORS = 86  # exit code that the tool is told to end with where it found some
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error")
# In a rehearsal: runs the command that it is given, and finds nothing.
_FAKE = """
import subprocess, sys
code = subprocess.call(sys.argv[sys.argv.index(sys.executable):])
print("========= ERROR SUMMARY: 0 errors")
sys.exit(code)
"""


def find_sanitizer() -> list[str] | None:
    """The command; None where it is not installed."""
    if rehearsing():
        return [sys.executable, "-c", _FAKE]
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    packages = Path(torch.__file__).parents[1] / "nvidia"
    places += [str(path) for path in sorted(packages.glob("**/compute-sanitizer")) if path.is_file()]
    return next(([place] for place in places if place and Path(place).is_file()), None)


def sanitize(command: list[str], tool: str, limit_s: float) -> SanitizerRecord:
    """One tool over the check of all operations at one shape."""
    at(tool)
    script = Path(__file__).with_name("operations.py")
    checked = [sys.executable, str(script), "--check", "--one-shape"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        words = [*command, "--tool", tool, "--error-exitcode", str(ERRORS), *checked]
        outcome = run_command(words, log, limit_s, environment)
        return record_of(tool, outcome.status, outcome.code, outcome.seconds, log.read_text("utf-8"))


def record_of(tool: str, status: str, code: int | None, seconds: float, text: str) -> SanitizerRecord:
    """What a log says.

    Args:
        status: of `harness.running.Outcome`.
    """
    counts = [int(found[1] or found[2]) for found in SUMMARY.finditer(text)]
    errors = max(counts) if counts else None
    lines = [line.lstrip("=").strip() for line in text.splitlines() if line.startswith("====")]
    first = [line for line in lines if re.search(r"Invalid|Error:|Race reported|hazard|leaked", line)]
    known: dict[str, Any] = dict(tool=tool, seconds=seconds, errors=errors)
    if status == "cut off":
        return SanitizerRecord(**known, status="cut off", reason="the time was over", first=first[:10])
    if code == ERRORS or errors:
        return SanitizerRecord(**known, status="errors", first=first[:10])
    if code or errors is None:
        what = f"it ended with code {code}" if code else "no summary in what it printed"
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        return SanitizerRecord(**known, status="failed", reason=f"{what}: {last}", first=first[:10])
    return SanitizerRecord(**known, status="clean")


def run(args: argparse.Namespace) -> int:
    command = find_sanitizer()
    device = "cuda" if torch.cuda.is_available() and not rehearsing() else "cpu"
    result = SanitizerResult(environment=find_environment(device), records=[])
    if command is None:
        reason = "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
        result.records.append(SanitizerRecord(tool="all", status="not here", reason=reason))
    for tool in args.tools if command else ():
        result.records.append(sanitize(command or [], tool, args.limit))
        write_partial(result, args.json)
    show(*result.tables())
    write_result(result, args.json)
    return 1 if any(r.status in ("errors", "failed") for r in result.records) else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of each tool (60)")
    add_json(parser)
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
