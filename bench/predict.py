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
import json
from pathlib import Path
from typing import Any

from harness.common import exit_code, print_table, write_json
from harness.records import FLOPS_PER_MAC, count_record
from harness.telling import at
from harness.variants import VARIANTS
from operations import OPERATIONS, Shape, floor_of
from operations import PRESETS as KERNEL_SHAPES

from vmae import InputError, ModelConfig

GPUS = {
    "H100": {
        "bytes_per_s": 3.35e12,
        "matrix_flops": 989e12,
        "vector_flops": 67e12,
        "source": "H100 SXM datasheet",
    },
    "A100": {
        "bytes_per_s": 2.04e12,
        "matrix_flops": 312e12,
        "vector_flops": 19.5e12,
        "source": "A100 SXM 80 GB datasheet",
    },
}
MASKINGS = ("encoder_only", "dual")
DTYPE = "bfloat16"
# Between these two a step is expected: the share of the matrix peak that its products reach; how often each
# kept byte crosses the memory bus (at least written once and read once; the eager graph passes over
# activations several times more); and the host's part, hidden behind the device's work or not.
ASSUMPTIONS = {
    "fast": {
        "matrix_share": 0.65,
        "passes_over_kept_bytes": 2.0,
        "kernels_per_block": 30,
        "us_per_kernel": 0.0,
    },
    "slow": {
        "matrix_share": 0.30,
        "passes_over_kept_bytes": 6.0,
        "kernels_per_block": 60,
        "us_per_kernel": 5.0,
    },
}


def step_interval_ms(
    record: dict[str, Any], blocks: int, batch: int, gpu: dict[str, Any]
) -> dict[str, float]:
    """Milliseconds of a training step, optimizer left out: `fast` and `slow`, by `ASSUMPTIONS`."""
    flops = FLOPS_PER_MAC * batch * record["forward_macs_per_clip"]
    kept = batch * record["saved_activation_bytes_per_clip"]
    found = {}
    for name, assumed in ASSUMPTIONS.items():
        products = flops / (assumed["matrix_share"] * gpu["matrix_flops"])
        traffic = assumed["passes_over_kept_bytes"] * kept / gpu["bytes_per_s"]
        host = blocks * assumed["kernels_per_block"] * assumed["us_per_kernel"] * 1e-6
        found[name] = 1e3 * (products + traffic + host)
    return found


def activation_records(presets: list[str], variants: list[str], batch: int) -> list[dict[str, Any]]:
    """By preset, variant and masking: exact counts, and the predicted interval on each GPU."""
    records = []
    for preset in presets:
        config = ModelConfig.preset(preset)
        for variant in variants:
            for masking in MASKINGS:
                record = {
                    "kind": "step",
                    "model": preset,
                    "variant": variant,
                    "masking": masking,
                    "dtype": DTYPE,
                }
                at(f"counting {preset} {variant} {masking}")
                record |= count_record(variant, masking, config, DTYPE)
                blocks = config.depth + config.decoder_depth
                predicted = {name: step_interval_ms(record, blocks, batch, gpu) for name, gpu in GPUS.items()}
                records.append(record | {"batch": batch, "predicted_step_ms": predicted})
    add_ratios(records)
    return records


def add_ratios(records: list[dict[str, Any]]) -> None:
    """Kept bytes over those of the reference with either masking."""
    kept = {(r["model"], r["variant"], r["masking"]): r["saved_activation_bytes_per_clip"] for r in records}
    for record in records:
        for masking in MASKINGS:
            base = kept.get((record["model"], "reference", masking))
            record[f"over_reference_{masking}"] = base and record["saved_activation_bytes_per_clip"] / base


def floor_records(presets: list[str], batch: int) -> list[dict[str, Any]]:
    records = []
    for preset in presets:
        shape = Shape(name=preset, batch=batch, **KERNEL_SHAPES[preset])
        for operation in OPERATIONS:
            for direction in ("forward", "both"):
                floors = {name: floor_of(operation, shape, direction, gpu)[0] for name, gpu in GPUS.items()}
                record = {
                    "kind": "floor",
                    "model": preset,
                    "operation": operation,
                    "direction": direction,
                    "batch": batch,
                }
                records.append(record | {"floor_us": floors})
    return records


def score(measured: list[dict[str, Any]], gpu: str) -> list[dict[str, Any]]:
    """Measured steps against the interval for their own batch: `place` is "inside", "faster" or "slower".

    Raises:
        InputError: no record of a timed step of a known preset and countable variant.
    """
    found = []
    for record in measured:
        if not record.get("step_ms") or not record.get("saved_activation_bytes_per_clip"):
            continue
        config = ModelConfig.preset(record["model"])
        interval = step_interval_ms(record, config.depth + config.decoder_depth, record["batch"], GPUS[gpu])
        done = record["step_ms"]["median"] - record["optimizer_ms"]["median"]
        place = "faster" if done < interval["fast"] else "slower" if done > interval["slow"] else "inside"
        names = ("model", "variant", "masking", "batch", "dtype")
        found.append(
            {name: record[name] for name in names}
            | {"measured_ms": done, "interval_ms": interval, "place": place}
        )
    if not found:
        raise InputError("no timed step with counted bytes in that file: give a result of dual_vs_encoder.py")
    return found


def report(steps: list[dict[str, Any]], floors: list[dict[str, Any]]) -> None:
    rows = []
    for r in steps:
        interval = [f"{p['fast']:.0f} to {p['slow']:.0f}" for p in r["predicted_step_ms"].values()]
        ratios = [
            "-" if r[f"over_reference_{m}"] is None else f"{r[f'over_reference_{m}']:.2f} x" for m in MASKINGS
        ]
        row = [f"{r['model']} {r['variant']}, {r['masking'].replace('_', '-')}"]
        row += [
            f"{r['saved_activation_bytes_per_clip'] / 2**20:.1f}",
            *ratios,
            f"{r['forward_macs_per_clip'] / 1e9:.2f}",
        ]
        rows.append([*row, *interval])
    print(
        f"counted, bf16; predicted times (ms a step of {steps[0]['batch']} clips, optimizer left out) are "
        "not measurements"
    )
    head = ["model variant, masking", "kept MiB/clip", "of reference", "of its dual", "GMACs/clip"]
    print_table([*head, *(f"{name} ms (predicted)" for name in GPUS)], rows)
    print("\nfloors of the fused operations: bytes and FLOPs at datasheet rates, microseconds")
    rows = []
    for r in floors:
        rows.append(
            [
                f"{r['model']} {r['operation']} {r['direction']}",
                *(f"{value:.1f}" for value in r["floor_us"].values()),
            ]
        )
    print_table([f"batch {floors[0]['batch']}", *GPUS], rows)


def report_score(found: list[dict[str, Any]], gpu: str) -> None:
    rows = []
    for r in found:
        interval = r["interval_ms"]
        row = [f"{r['model']} {r['variant']}, {r['masking']}, batch {r['batch']}", f"{r['measured_ms']:.1f}"]
        rows.append([*row, f"{interval['fast']:.1f} to {interval['slow']:.1f}", r["place"]])
    print_table(["step without optimizer", "measured ms", f"predicted for {gpu}", ""], rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=list(KERNEL_SHAPES), default=list(KERNEL_SHAPES))
    countable = [name for name, variant in VARIANTS.items() if variant.countable]
    parser.add_argument("--variants", nargs="+", choices=countable, default=countable)
    parser.add_argument("--batch", type=int, default=32, help="clips of the predicted step (32)")
    parser.add_argument(
        "--score", metavar="FILE", help="hold the measured steps of this result against the prediction"
    )
    parser.add_argument("--gpu", choices=list(GPUS), default="H100", help="whose prediction (H100)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    if args.score:
        found = score(read_records(args.score), args.gpu)
        report_score(found, args.gpu)
        more = {}
    else:
        steps, floors = (
            activation_records(args.presets, args.variants, args.batch),
            floor_records(args.presets, args.batch),
        )
        report(steps, floors)
        found, more = [*steps, *floors], {"assumptions": ASSUMPTIONS, "gpus": GPUS}
    if args.json:
        write_json(args.json, found, "cpu", **more)
        print(f"\nresults: {args.json}")
    return 0


def read_records(path: str) -> list[dict[str, Any]]:
    """Records of a result file.

    Raises:
        InputError: no such file, or not a result.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["records"]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a benchmark's result (JSON with `records`)") from None


if __name__ == "__main__":
    raise SystemExit(main())
