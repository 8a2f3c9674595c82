"""Records of training steps: what is counted, what was timed, what is compared with what."""

from __future__ import annotations

from typing import NamedTuple

import torch

from harness.json_records import Runs, Spread
from harness.results.steps import PARTS, StepRatio, StepRecord
from harness.stepping import Measured, StepJob
from harness.variants import MASKINGS, VARIANTS, resolve_variant
from vmae import ModelConfig
from vmae.model.cost import masked_macs, saved_activation_bytes_per_clip

# FLOPs of a step that count as work: 2 for each multiply-accumulate, forward once and backward twice.
FLOPS_PER_MAC = 6


class Counts(NamedTuple):
    """Bytes that autograd keeps of a clip (None: cannot be counted), multiply-accumulates of its forward."""

    saved_bytes: int | None
    forward_macs: int


def count(variant: str, masking: str, config: ModelConfig, dtype: str) -> Counts:
    """Exact, with no GPU.

    Bytes are None for variants that cannot be counted, such as compiled ones: the compiler chooses what it
    keeps.
    """
    known, mask = resolve_variant(variant), MASKINGS[masking]
    saved = None
    if known.countable:
        saved = saved_activation_bytes_per_clip(known.build, config, mask, getattr(torch, dtype))
    return Counts(saved, masked_macs(config, mask, fused=known.ours))


def make_record(job: StepJob, counts: Counts, measured: Measured | None) -> StepRecord:
    """One (variant, masking); without `measured` what was counted, without its runs no speed either."""
    times: dict[str, Runs] = {}
    if measured and measured.runs:
        times = {part: Runs.of([run[part] for run in measured.runs]) for part in PARTS}
    rate = job.batch / times["step"].median * 1e3 if times else None
    memory = measured.memory if measured else None
    return StepRecord(
        model=job.model,
        masking=job.masking,
        variant=job.variant,
        device=job.device,
        dtype=job.dtype,
        batch=job.batch,
        saved_activation_bytes_per_clip=counts.saved_bytes,
        forward_macs_per_clip=counts.forward_macs,
        loss=measured.loss if measured else None,
        peak_memory_bytes=memory.peak if memory else None,
        memory=memory,
        step_ms=times.get("step"),
        forward_ms=times.get("forward"),
        backward_ms=times.get("backward"),
        optimizer_ms=times.get("optimizer"),
        clips_per_s=rate,
        model_flops_per_s=FLOPS_PER_MAC * counts.forward_macs * rate if rate else None,
    )


def compare(records: list[StepRecord]) -> list[StepRatio]:
    """Variant over baseline (under 1 is less), run by run.

    Every record against the first variant's, encoder-only and dual; every dual record against its own
    encoder-only; and those of this code against the fastest competitor with the same masking.
    """
    by_key = {(r.variant, r.masking): r for r in records}
    first = records[0].variant
    pairs = {(key, (first, base)): False for key in by_key for base in ("encoder_only", "dual")}
    pairs |= {((v, m), (v, "encoder_only")): False for v, m in by_key}
    for variant, masking in by_key:
        fastest = fastest_competitor(records, masking)
        if fastest and resolve_variant(variant).ours:
            pairs[(variant, masking), (fastest, masking)] = True
    ratios = []
    for (key, base_key), is_fastest in pairs.items():
        base = by_key.get(base_key)
        if base is None or key == base_key or (key[1] == "encoder_only" and base_key[1] == "dual"):
            continue
        ratios.append(make_ratio(by_key[key], base, is_fastest))
    return ratios


def fastest_competitor(records: list[StepRecord], masking: str) -> str | None:
    """The timed variant with that masking that is not this code's and has the least time; None where none
    was timed."""
    times = {r.variant: r.step_ms.median for r in records if r.masking == masking and r.step_ms}
    others = {name: ms for name, ms in times.items() if name in VARIANTS and not VARIANTS[name].ours}
    return min(others, key=others.__getitem__) if others else None


def make_ratio(ours: StepRecord, base: StepRecord, fastest_competitor: bool) -> StepRatio:
    saved, saved_base = ours.saved_activation_bytes_per_clip, base.saved_activation_bytes_per_clip
    time = speedup = memory = None
    if ours.step_ms and base.step_ms:
        time = Spread.of_ratios(ours.step_ms.runs, base.step_ms.runs)
        speedup = Spread.of_ratios(base.step_ms.runs, ours.step_ms.runs)
    if ours.peak_memory_bytes and base.peak_memory_bytes:
        memory = ours.peak_memory_bytes / base.peak_memory_bytes
    return StepRatio(
        model=ours.model,
        variant=ours.key,
        baseline=base.key,
        fastest_competitor=fastest_competitor,
        saved_activations=saved / saved_base if saved and saved_base else None,
        time=time,
        speedup=speedup,
        memory=memory,
    )
