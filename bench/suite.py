"""All benchmarks in one command, on the machine at hand; one JSON file a part, and one page that shows them.

    python bench/suite.py --quick     # a CPU: under 5 minutes; a GPU: under 8
    python bench/suite.py             # longer, larger
    python bench/suite.py --only step data

What matters most comes first. Each part is a process of its own with its share of the time, and writes its
file, whole, after every record: a part that is cut off, by someone or by the limit, keeps what it has.
Results go to bench/results/DEVICE/DATE-COMMIT/.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from harness.environment import Environment, find_environment
from harness.json_records import to_json, write_json
from harness.progress import at, telling
from harness.report import write_report
from harness.results.suite import PartRecord, SuiteResult
from harness.running import ended_by_sigterm, run_command
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
    """One script, with its arguments for quick and full runs, on a CPU and on a GPU; None leaves it out.

    Attributes:
        variety: what tells it from another part of the same script.
        quick_s: seconds of a quick run on a GPU, at most.
    """

    script: str
    arguments: Mapping[str, list[str] | None] = field(default_factory=dict)
    variety: str = ""
    quick_s: float | None = None

    @property
    def name(self) -> str:
        """SCRIPT or SCRIPT.VARIETY, of its result and its log too."""
        return f"{self.script}.{self.variety}" if self.variety else self.script

    def command(self, key: str) -> list[str] | None:
        arguments = self.arguments.get(key, [])
        return None if arguments is None else [f"{self.script}.py", *arguments]


def parts_for(device: str) -> list[Part]:
    """Parts in order: what matters most first."""
    steps = Part(
        "dual_vs_encoder",
        {
            "cpu-quick": ["--batch", "1", "--steps", "3"],
            "cuda-quick": ["--steps", "10", "--warmup", "3"],
            "cuda": ["--sweep", "512"],
        },
        quick_s=120,
    )
    two = ["--variants", "reference+compile,triton+compile", "--masking", "dual"]
    giant = Part(
        "dual_vs_encoder",
        {
            "cuda-quick": ["--model", "vit_g", "--batch", "8", "--steps", "5", "--warmup", "2", *two],
            "cuda": ["--model", "vit_g", "--batch", "16", *two],
        },
        variety="vit_g",
        quick_s=100,
    )
    kernels = Part(
        "operations",
        {"cpu-quick": ["--check"], "cpu": ["--check"], "cuda-quick": ["--rounds", "10"]},
        quick_s=80,
    )
    attention = Part(
        "attention",
        {"cpu-quick": ["--quick"], "cuda-quick": ["--turns", "10", "--model", "none"]},
        quick_s=70,
    )
    step = Part("step", {"cpu-quick": ["--batch", "1", "--steps", "2"]}, quick_s=40)
    data = Part("data", {"cpu-quick": ["--quick"], "cuda-quick": ["--quick"]}, quick_s=30)
    scaling = Part(
        "scaling",
        {"cpu-quick": ["--quick", "--axes", "batch", "frames"], "cuda-quick": ["--axes", "batch"]},
        quick_s=30,
    )
    predict = Part("predict", {"cpu-quick": ["--presets", "vit_b", "vit_g"], "cuda-quick": None})
    if device == "cuda":
        return [steps, giant, kernels, attention, step, scaling, data, predict]
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
    """Run one script; its `file` is named where it wrote one, complete or up to where it was ended."""
    command = part.command(key)
    if command is None:
        return PartRecord(name=part.name, reason="not part of this run")
    script = HERE / command[0]
    if not script.is_file():
        return PartRecord(name=part.name, reason="no such benchmark here")
    target, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    target.unlink(missing_ok=True)  # of an earlier run
    print(f"\n== {part.name} ==", flush=True)
    outcome = run_command([sys.executable, str(script), *command[1:], "--json", str(target)], log, limit_s)
    reason = outcome.reason
    if outcome.status == "cut off":
        reason = "the time of a quick run was over" + ("; what it had is kept" if target.is_file() else "")
    return PartRecord(
        name=part.name,
        status=outcome.status,
        reason=reason,
        seconds=outcome.seconds,
        command=command,
        file=target.name if target.is_file() else None,
    )


def limit_of(part: Part, device: str, used_s: float) -> float:
    """Seconds that a part of a quick run may take: what is left, and on a GPU no more than its share."""
    left = max(QUICK_S[device] - used_s, 1.0)
    return min(left, part.quick_s) if device == "cuda" and part.quick_s else left


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, names = (
        parser.add_argument,
        list(dict.fromkeys(part.name for kind in QUICK_S for part in parts_for(kind))),
    )
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
        if args.only and part.name not in args.only:
            continue
        limit = limit_of(part, device, time.monotonic() - start) if args.quick else None
        at(part.name)
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
    with telling(), ended_by_sigterm():
        return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
