"""What can be said of a GPU without having one: bytes kept, multiply-accumulates, kernel floors, a step's
time as an interval.

Bytes and multiply-accumulates are exact (counted on fake tensors, any preset). Times are predictions,
labelled so, with the assumptions they rest on; `--score FILE` holds measured steps (a result of
dual_vs_encoder.py) against them.

    python bench/predict.py                                     # all presets and variants
    python bench/predict.py --score bench/results/DEVICE/dual_vs_encoder.json --gpu H100
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from harness.command import add_json, exit_code, write_result
from harness.environment import find_environment
from harness.floors import DIRECTIONS, GPUS, floor_of, preset_shape
from harness.progress import at
from harness.records import FLOPS_PER_MAC, count
from harness.results import read_result
from harness.results.operations import Rates
from harness.results.predict import Assumption, Interval, PredictedFloor, PredictedStep, PredictResult, Score
from harness.results.steps import StepsResult
from harness.table import show
from harness.variants import PUBLISHED_PRESETS, VARIANTS

from vmae import InputError, ModelConfig
from vmae_kernels.backend import OPERATIONS

MASKINGS = ("encoder_only", "dual")
DTYPE = "bfloat16"
# Between these two a step is expected. Each kept byte is at least written once and read once; the eager graph
# passes over activations several times more. The host's part is hidden behind the device's work, or not.
ASSUMPTIONS = {
    "fast": Assumption(
        matrix_share=0.65, passes_over_kept_bytes=2.0, kernels_per_block=30, us_per_kernel=0.0
    ),
    "slow": Assumption(
        matrix_share=0.30, passes_over_kept_bytes=6.0, kernels_per_block=60, us_per_kernel=5.0
    ),
}


def step_interval(macs: int, saved_bytes: int, model: str, batch: int, gpu: Rates) -> Interval:
    """Milliseconds of a training step, optimizer left out.

    Args:
        macs, saved_bytes: of a clip.
    """
    config = ModelConfig.preset(model)
    blocks = config.depth + config.decoder_depth
    found = {}
    for name, assumed in ASSUMPTIONS.items():
        products = FLOPS_PER_MAC * batch * macs / (assumed.matrix_share * gpu.matrix_flops)
        traffic = assumed.passes_over_kept_bytes * batch * saved_bytes / gpu.bytes_per_s
        host = blocks * assumed.kernels_per_block * assumed.us_per_kernel * 1e-6
        found[name] = 1e3 * (products + traffic + host)
    return Interval(**found)


def predict_steps(presets: list[str], variants: list[str], batch: int) -> list[PredictedStep]:
    """Exact counts and the predicted interval on each GPU, by preset, variant and masking."""
    keys = [(preset, variant, masking) for preset in presets for variant in variants for masking in MASKINGS]
    return with_ratios([predict_step(*key, batch) for key in keys])


def predict_step(preset: str, variant: str, masking: str, batch: int) -> PredictedStep:
    at(f"counting {preset} {variant} {masking}")
    saved, macs = count(variant, masking, ModelConfig.preset(preset), DTYPE)
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
            name: step_interval(macs, saved, preset, batch, gpu) for name, gpu in GPUS.items()
        },
    )


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
        InputError: no record of a timed step of a known preset and countable variant.
    """
    found = []
    for r in measured.records:
        saved = r.saved_activation_bytes_per_clip
        if not r.step_ms or not r.optimizer_ms or not saved:
            continue
        interval = step_interval(r.forward_macs_per_clip, saved, r.model, r.batch, GPUS[gpu])
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
        raise InputError("no timed step with counted bytes in that file: give a result of dual_vs_encoder.py")
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
    known = find_environment()
    if args.score:
        result = PredictResult(environment=known, records=[*score(read_steps(args.score), args.gpu)])
    else:
        steps = predict_steps(args.presets, args.variants, args.batch)
        floors = predict_floors(args.presets, args.batch)
        result = PredictResult(
            environment=known, records=[*steps, *floors], assumptions=ASSUMPTIONS, gpus=GPUS
        )
    show(*result.tables())
    write_result(result, args.json)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--presets", nargs="+", choices=PUBLISHED_PRESETS, default=list(PUBLISHED_PRESETS))
    countable = [name for name, variant in VARIANTS.items() if variant.countable]
    add("--variants", nargs="+", choices=countable, default=countable)
    add("--batch", type=int, default=32, help="clips of the predicted step (32)")
    measured = "hold the measured steps of this result against the prediction"
    add("--score", metavar="FILE", help=measured)
    add("--gpu", choices=list(GPUS), default="H100", help="whose prediction (H100)")
    add_json(parser)
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
