"""What every benchmark shares: the environment of a measurement, summaries, the JSON file, paired ratios."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.telling import telling

if (
    not torch.cuda.is_available()
):  # before anything imports triton, which reads it once: kernels can be counted and checked
    os.environ.setdefault("TRITON_INTERPRET", "1")

SCHEMA = "vmae-bench/1"
ROOT = Path(__file__).resolve().parents[2]


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where and with what a number was measured; `clean` says whether the work tree had no uncommitted
    change."""
    device = torch.device(device)
    status = _git("status", "--porcelain")
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "clean": None if status is None else not status,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        result["cuda"] = torch.version.cuda or torch.version.hip
        result["capability"] = list(torch.cuda.get_device_capability(device))
    return result


def find_device(name: str) -> str:
    """`name`; "auto" becomes "cuda" where there is a GPU, else "cpu".

    Raises:
        InputError: a GPU is asked for where there is none.
    """
    from vmae.errors import InputError  # not at the top: bench/operations.py does without vmae

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {name}: torch sees no GPU here; use --device cpu")
    return name


def exit_code(run: Callable[[], int]) -> int:
    """What `run()` returns, which tells where it is; 2, and the message, for wrong input or a worker that
    died."""
    from vmae.errors import InputError

    try:
        with telling():
            return run()
    except (InputError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios of runs that followed each other."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def write_json(path: str | Path, records: list[dict], device: torch.device | str, **more: Any) -> None:
    """One result file in the shared schema."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "environment": environment(device), "records": records, **more}
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for number, row in enumerate(cells):
        line = "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        )
        print(line.rstrip())
        if number == 0:
            print("-" * len(line))
