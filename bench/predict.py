"""What can be said of a GPU without having one: bytes kept, multiply-accumulates, kernel floors, a step's
time as an interval and in parts.

Bytes and multiply-accumulates are exact (counted on fake tensors, any preset). Times are predictions,
labelled so, with the assumptions they rest on (`harness.step_parts`); `--score FILE` holds measured steps (a
result of dual_vs_encoder.py) against them.

    python bench/predict.py                                     # all presets and variants
    python bench/predict.py --score bench/results/DEVICE/dual_vs_encoder.json --gpu H100
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from harness import step_parts
from harness.command import add_json, check_least, exit_code, write_result
from harness.environment import find_environment
from harness.floors import DIRECTIONS, GPUS, floor_of, preset_shape
from harness.progress import at
from harness.records import count
from harness.results import read_result
from harness.results.predict import (
    Interval,
    PredictedFloor,
    PredictedPart,
    PredictedStep,
    PredictResult,
    Score,
)
from harness.results.steps import StepsResult
from harness.table import show
from harness.variants import PUBLISHED_PRESETS, VARIANTS

from vmae import InputError, ModelConfig
from vmae_kernels.backend import OPERATIONS

MASKINGS = ("encoder_only", "dual")
DTYPE = "bfloat16"


def predict_steps(presets: list[str], variants: list[str], batch: int) -> list[PredictedStep]:
    """Exact counts and the predicted interval on each GPU, by preset, variant and masking."""
    keys = [(preset, variant, masking) for preset in presets for variant in variants for masking in MASKINGS]
    return with_ratios([predict_step(*key, batch) for key in keys])


def predict_step(preset: str, variant: str, masking: str, batch: int) -> PredictedStep:
    at(f"counting {preset} {variant} {masking}")
    counted = step_parts.COMPILED.get(variant, variant)  # the compiler may keep less
    saved, macs = count(counted, masking, ModelConfig.preset(preset), DTYPE)
    if saved is None:
        raise InputError(f"variant {variant!r}: what it keeps cannot be counted")
    return PredictedStep(
        model=preset,
        variant=variant,
        masking=masking,
        dtype=DTYPE,
        saved_activation_bytes_per_clip=saved,
        forward_macs_per_clip=macs,
        batch=batch,
        predicted_step_ms={
            gpu: step_parts.step_interval(variant, masking, preset, batch, gpu.lower())
            for gpu in GPUS
            if step_parts.has_records(gpu.lower(), preset)
        },
    )


def predict_parts(presets: list[str], variants: list[str], batch: int, gpu: str) -> list[PredictedPart]:
    """Parts of this code's dual-masked steps on a GPU."""
    wanted = [name for name in ("triton+compile", "triton") if name in variants][:1]
    pairs = [(preset, variant) for preset in presets for variant in wanted]
    return [
        part
        for preset, variant in pairs
        if step_parts.has_records(gpu.lower(), preset)
        for part in step_parts.part_records(variant, "dual", preset, batch, gpu)
    ]


def with_ratios(steps: list[PredictedStep]) -> list[PredictedStep]:
    """Kept bytes over those of the reference with either masking."""
    kept = {(r.model, r.variant, r.masking): r.saved_activation_bytes_per_clip for r in steps}
    found = []
    for r in steps:
        bases = [kept.get((r.model, "reference", masking)) for masking in MASKINGS]
        encoder_only, dual = [base and r.saved_activation_bytes_per_clip / base for base in bases]
        found.append(replace(r, over_reference_encoder_only=encoder_only, over_reference_dual=dual))
    return found


def predict_floors(presets: list[str], batch: int) -> list[PredictedFloor]:
    """Floors of every operation, on each GPU."""
    records = []
    for preset in presets:
        shape = preset_shape(preset, batch)
        for operation in OPERATIONS:
            for direction in DIRECTIONS:
                floors = {name: floor_of(operation, shape, direction, gpu)[0] for name, gpu in GPUS.items()}
                record = PredictedFloor(
                    model=preset, operation=operation, direction=direction, batch=batch, floor_us=floors
                )
                records.append(record)
    return records


def score(measured: StepsResult, gpu: str) -> list[Score]:
    """Measured steps against the interval for their own batch.

    Raises:
        InputError: no record of a timed step of a known preset and predictable variant.
    """
    found = []
    for r in measured.records:
        if not r.step_ms or not r.optimizer_ms or not step_parts.predictable(r.variant):
            continue
        interval = step_parts.step_interval(r.variant, r.masking, r.model, r.batch, gpu.lower())
        done = r.step_ms.median - r.optimizer_ms.median
        record = Score(
            model=r.model,
            variant=r.variant,
            masking=r.masking,
            batch=r.batch,
            dtype=r.dtype,
            gpu=gpu,
            measured_ms=done,
            interval_ms=interval,
            place=place_of(done, interval),
        )
        found.append(record)
    if not found:
        raise InputError(
            "no timed step of a predictable variant in that file: give a result of dual_vs_encoder.py"
        )
    return found


def place_of(ms: float, interval: Interval) -> str:
    if ms < interval.fast:
        return "faster"
    return "slower" if ms > interval.slow else "inside"


def read_steps(path: str) -> StepsResult:
    """A result of dual_vs_encoder.py.

    Raises:
        InputError: no such file, or not such a result.
    """
    try:
        result = read_result(path, "dual_vs_encoder")
    except ValueError as error:
        raise InputError(str(error)) from None
    assert isinstance(result, StepsResult)
    return result


def run(args: argparse.Namespace) -> int:
    check_least(args, "batch")
    known = find_environment()
    if args.score:
        result = PredictResult(environment=known, records=[*score(read_steps(args.score), args.gpu)])
    else:
        steps = predict_steps(args.presets, args.variants, args.batch)
        parts = predict_parts(args.presets, args.variants, args.batch, args.gpu)
        floors = predict_floors(args.presets, args.batch)
        assumed = {name: [*ends] for name, ends in step_parts.ASSUMED.items()}
        result = PredictResult(
            environment=known, records=[*steps, *parts, *floors], assumptions=assumed, gpus=GPUS
        )
    show(*result.tables())
    write_result(result, args.json)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--presets", nargs="+", choices=PUBLISHED_PRESETS, default=list(PUBLISHED_PRESETS))
    known = [name for name in VARIANTS if step_parts.predictable(name)]
    add("--variants", nargs="+", choices=known, default=known)
    add("--batch", type=int, default=32, help="clips of the predicted step (32)")
    measured = "hold the measured steps of this result against the prediction"
    add("--score", metavar="FILE", help=measured)
    add("--gpu", choices=list(GPUS), default="H100", help="whose prediction (H100)")
    add_json(parser)
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
