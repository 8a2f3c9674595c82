"""Holds measured kernels against the static model's predictions.

    python -m vmae_kernels.build --predict --json predicted.json
    python bench/operations.py --json operations.json
    python bench/kernel_scores.py --predicted predicted.json --measured operations.json

A kernel is matched by name, a whole operation ("all") by its time beside the others'. "both" sums a kernel's
forward and backward.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness.command import add_json, exit_code, write_result
from harness.environment import rehearsing
from harness.progress import at
from harness.results import read_result
from harness.results.kernel_scores import KernelScore, KernelScoresResult
from harness.results.operations import KernelRecord, OperationsResult, TimeRecord
from harness.table import show

from vmae import InputError

WHOLE = "all"
MODEL_KEYS = (
    "registers",
    "programs_per_sm",
    "instructions_per_unit",
    "conversions_in_loop",
    "narrow_loads_in_loop",
)
Key = tuple[str, str, int, str, str]  # operation, preset, batch, direction, kernel


def read_predictions(path: str, default_batch: int = 32) -> dict[Key, dict[str, Any]]:
    """Predictions by key; those of a kernel's launches in one direction are summed, and "both" is added.

    Raises:
        InputError: no such file, or not what `vmae_kernels.build --predict` writes.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))["records"]
        found: dict[Key, dict[str, Any]] = {}
        for record in records:
            direction = record.get("direction", "both")
            whole = record["kernel"] == WHOLE
            names = {direction} if whole else {direction, "both"}
            for name in sorted(names - {"backward"}):  # alone it is not measured
                batch = record.get("batch", default_batch)
                key = (record.get("operation", ""), record["preset"], batch, name, _short(record["kernel"]))
                _add(found, key, record)
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        text = f"{path}: not what `python -m vmae_kernels.build --predict --json` writes ({reason})"
        raise InputError(text) from None


def _add(found: dict[Key, dict[str, Any]], key: Key, record: dict[str, Any]) -> None:
    span, floor = record["predicted_us"], record.get("floor_us")
    low, high = span if isinstance(span, list) else (span, span)
    before = found.get(key)
    if before is None:
        model = {name: record[name] for name in MODEL_KEYS if name in record}
        found[key] = {"predicted_us": [low, high], "floor_us": floor, "model": model}
        return
    before["predicted_us"] = [before["predicted_us"][0] + low, before["predicted_us"][1] + high]
    if floor is not None and before["floor_us"] is not None:
        before["floor_us"] += floor


def _short(kernel: str) -> str:
    """A kernel's name as the static model and the profiler both have it."""
    return kernel.removesuffix("_kernel")


def measured_us(result: OperationsResult) -> dict[Key, float]:
    """Microseconds of our operations and of their kernels."""
    found: dict[Key, float] = {}
    for r in result.records:
        if isinstance(r, TimeRecord) and r.variant == "triton" and r.median is not None:
            found[r.operation, r.shape, r.batch, r.direction, WHOLE] = r.median
        elif isinstance(r, KernelRecord):
            key = (r.operation, r.shape, r.batch, r.direction, _short(r.kernel))
            found[key] = found.get(key, 0.0) + r.us
    return found


def score(
    predictions: dict[Key, dict[str, Any]], measured: dict[Key, float]
) -> tuple[list[KernelScore], list[str]]:
    """Scores of what was predicted and measured, and the names of predictions without a measurement.

    Raises:
        InputError: none was both.
    """
    scores, unmatched = [], []
    for key, prediction in predictions.items():
        operation, preset, batch, direction, kernel = key
        if key not in measured:
            unmatched.append(f"{operation} {preset} batch {batch} {direction} {kernel}")
            continue
        us, (low, high) = measured[key], prediction["predicted_us"]
        place = "faster" if us < low else "slower" if us > high else "inside"
        known: dict[str, Any] = dict(
            operation=operation, preset=preset, batch=batch, direction=direction, kernel=kernel
        )
        over = us / max((low + high) / 2, 1e-9)
        scores.append(KernelScore(**known, **prediction, measured_us=us, place=place, over=over))
    if not scores:
        raise InputError("no prediction has a measurement: are preset and batch the same in both files?")
    return scores, unmatched


def fake_predictions(measured: dict[Key, float]) -> dict[Key, dict[str, Any]]:
    """For a rehearsal: an interval around what was "measured"."""
    return {key: {"predicted_us": [0.8 * us, 1.2 * us], "floor_us": us / 2} for key, us in measured.items()}


def run(args: argparse.Namespace) -> int:
    at("reading")
    try:
        result = read_result(args.measured, "operations")
    except ValueError as error:
        raise InputError(str(error)) from None
    assert isinstance(result, OperationsResult)
    measured = measured_us(result)
    predictions = fake_predictions(measured) if rehearsing() else read_predictions(args.predicted, args.batch)
    scores, unmatched = score(predictions, measured)
    # Where it was measured, not where it is scored.
    scored = KernelScoresResult(environment=result.environment, records=scores, unmatched=unmatched)
    show(*scored.tables())
    write_result(scored, args.json)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--predicted", metavar="FILE", required=True, help="of `python -m vmae_kernels.build --predict`")
    add("--measured", metavar="FILE", required=True, help="of bench/operations.py, on a GPU")
    add("--batch", type=int, default=32, help="of predictions that name none (32)")
    add_json(parser)
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
