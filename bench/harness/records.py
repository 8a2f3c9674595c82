"""Records of training steps: what is counted, what was timed, what is compared with what."""

from __future__ import annotations

from typing import NamedTuple

import torch

from harness.json_records import Runs, Spread
from harness.results.steps import PARTS, StepRatio, StepRecord
from harness.stepping import StepJob
from harness.turns import Measured
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
        check=measured.check if measured else None,
        failed=measured.failed if measured else None,
        group=measured.group if measured else 0,
        anchor=measured.anchor if measured else "",
        anchor_ms=[run["step"] for run in measured.anchor_runs] if measured else [],
    )


def compare(records: list[StepRecord]) -> list[StepRatio]:
    """Variant over baseline (under 1 is less), run by run.

    Those of this code against the fastest competitor with the same masking come first; then every record
    against the first variant's, encoder-only and dual, and every dual record against its own encoder-only.
    """
    by_key = {(r.variant, r.masking): r for r in records}
    first = records[0].variant
    pairs = {}
    for variant, masking in by_key:
        fastest = fastest_competitor(records, masking)
        if fastest and resolve_variant(variant).ours:
            pairs[(variant, masking), (fastest, masking)] = True
    others = [(key, (first, base)) for key in by_key for base in ("encoder_only", "dual")]
    others += [((v, m), (v, "encoder_only")) for v, m in by_key]
    pairs |= {pair: False for pair in others if pair not in pairs}
    ratios = []
    for (key, base_key), is_fastest in pairs.items():
        base = by_key.get(base_key)
        if base is None or key == base_key or (key[1] == "encoder_only" and base_key[1] == "dual"):
            continue
        ratios.append(make_ratio(by_key[key], base, is_fastest))
    return ratios


def fastest_competitor(records: list[StepRecord], masking: str) -> str | None:
    """The timed variant with that masking that is not this code's and has the least time, run by run; None
    where none was timed."""
    timed = [r for r in records if r.masking == masking and r.step_ms]
    others = [r for r in timed if r.variant in VARIANTS and not VARIANTS[r.variant].ours]
    if not others:
        return None
    first = others[0]
    times = {r.variant: ratio.median if (ratio := speedup_of(first, r)[0]) else 0.0 for r in others}
    return max(times, key=times.__getitem__)


def speedup_of(base: StepRecord, record: StepRecord) -> tuple[Spread | None, str]:
    """How many times as fast as `base`, run by run: of the same turns, or else through the anchor's runs of
    the turns of each, whose key is returned too. None where they have no turns in common with one anchor."""
    if not base.step_ms or not record.step_ms:
        return None, ""
    if base.group == record.group:
        return Spread.of_ratios(base.step_ms.runs, record.step_ms.runs), ""
    if base.anchor != record.anchor or not base.anchor:
        return None, ""
    bases, ours = (
        [ms / anchor for ms, anchor in zip(r.step_ms.runs, r.anchor_ms, strict=True)]
        for r in (base, record)
        if r.step_ms
    )
    common = min(len(bases), len(ours))  # a run that was cut off
    through = "" if base.anchor in (base.key, record.key) else base.anchor
    return Spread.of_ratios(bases[:common], ours[:common]), through


def make_ratio(ours: StepRecord, base: StepRecord, fastest_competitor: bool) -> StepRatio:
    saved, saved_base = ours.saved_activation_bytes_per_clip, base.saved_activation_bytes_per_clip
    memory = None
    speedup, through = speedup_of(base, ours)
    time, _ = speedup_of(ours, base)
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
        through=through,
    )
