"""Records of training steps: what is counted, what was timed, what is compared with what."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from harness.common import paired_ratio, spread
from harness.stepping import SEED
from harness.variants import MASKINGS, VARIANTS, resolve_variant
from vmae import MaskConfig, ModelConfig
from vmae.model.cost import forward_macs, saved_activation_bytes_per_clip

PARTS = ("step", "forward", "backward", "optimizer")
# FLOPs of a step that count as work: 2 for each multiply-accumulate, forward once and backward twice.
FLOPS_PER_MAC = 6


def load_clips(source: str, batch: int, config: ModelConfig) -> torch.Tensor:
    """uint8 [B, T, H, W, 3]: real clips of the sample videos or of a list, or noise."""
    if source == "synthetic":
        shape = (batch, config.num_frames, *config.image_hw, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))
    from vmae.data.dataset import PretrainDataset
    from vmae.data.manifest import read_list
    from vmae.synthetic.samples import write_sample_list

    with tempfile.TemporaryDirectory() as folder:
        entries = read_list(write_sample_list(Path(folder) / "samples.txt") if source == "real" else source)
    dataset = PretrainDataset(
        entries,
        num_frames=config.num_frames,
        stride=4,
        image_size=config.image_hw,
        grid=config.grid,
        mask=MaskConfig(),
        repeat=-(-batch // len(entries)),
        seed=SEED,
    )
    return torch.cat([dataset[(0, i)].clips for i in range(batch)])


def choose_input(source: str) -> str:
    """`source`; "auto" becomes "real" where the sample videos and a decoder are, else "synthetic", with a
    note."""
    if source != "auto":
        return source
    from vmae import InputError
    from vmae.data.decode import find_backends
    from vmae.synthetic.samples import sample_videos

    try:
        sample_videos()
        find_backends("video", "auto")
    except InputError as error:
        print(f"note: synthetic clips, nothing is decoded: {error}")
        return "synthetic"
    return "real"


def count_record(variant: str, masking: str, config: ModelConfig, dtype: str) -> dict[str, int | None]:
    """Exact, with no GPU: bytes that autograd keeps for one more clip, and multiply-accumulates of a clip's
    forward.

    Bytes are None for variants that cannot be counted, such as compiled ones: the compiler chooses what it
    keeps.
    """
    known = resolve_variant(variant)
    mask = MASKINGS[masking]
    ratio = 0.0 if mask.decoder == "none" else mask.decoder_ratio
    saved = (
        None
        if not known.countable
        else saved_activation_bytes_per_clip(known.build, config, mask, getattr(torch, dtype))
    )
    macs = forward_macs(config, mask.encoder_ratio, ratio, fused=known.ours)
    return {"saved_activation_bytes_per_clip": saved, "forward_macs_per_clip": macs}


def make_record(job: dict[str, Any], counts: dict[str, Any], result: dict[str, Any] | None) -> dict[str, Any]:
    """One (variant, masking); without `result` what was counted, without its `runs` no speed either."""
    names = ("model", "masking", "variant", "device", "dtype", "batch")
    record: dict[str, Any] = {name: job[name] for name in names} | counts
    if result is None:
        return record
    memory = result["memory"]
    record |= {"loss": result["loss"], "peak_memory_bytes": memory and memory["peak"], "memory": memory}
    if not result["runs"]:
        return record | {"step_ms": None, "clips_per_s": None, "model_flops_per_s": None}
    for part in PARTS:
        values = [run[part] for run in result["runs"]]
        record[f"{part}_ms"] = {**spread(values), "runs": values}
    rate = job["batch"] / record["step_ms"]["median"] * 1e3
    return record | {
        "clips_per_s": rate,
        "model_flops_per_s": FLOPS_PER_MAC * counts["forward_macs_per_clip"] * rate,
    }


def compare(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Variant over baseline (under 1 is less), run by run.

    Every record against the first variant's, encoder-only and dual; every dual record against its own
    encoder-only; and those of this code against the fastest competitor with the same masking.
    """
    by_key = {(r["variant"], r["masking"]): r for r in records}
    first = records[0]["variant"]
    pairs = {(key, (first, base)): False for key in by_key for base in ("encoder_only", "dual")}
    pairs |= {((v, m), (v, "encoder_only")): False for v, m in by_key}
    for variant, masking in by_key:
        fastest = fastest_competitor(records, masking)
        if fastest and is_ours(variant):
            pairs[(variant, masking), (fastest, masking)] = True
    ratios = []
    for (key, base_key), is_fastest in pairs.items():
        ours, base = by_key[key], by_key.get(base_key)
        if base is None or key == base_key or (key[1] == "encoder_only" and base_key[1] == "dual"):
            continue
        ratio: dict[str, Any] = {
            "model": ours["model"],
            "variant": " ".join(key),
            "baseline": " ".join(base_key),
        }
        ratios.append(ratio | {"fastest_competitor": is_fastest} | _ratios(ours, base))
    return ratios


def is_ours(variant: str) -> bool:
    return resolve_variant(variant).ours


def fastest_competitor(records: list[dict[str, Any]], masking: str) -> str | None:
    """The timed variant with that masking that is not this code's and takes the least time; None where none
    was timed."""
    timed = [r for r in records if r["masking"] == masking and r.get("step_ms") and r["variant"] in VARIANTS]
    others = [r for r in timed if not VARIANTS[r["variant"]].ours]
    return min(others, key=lambda r: r["step_ms"]["median"])["variant"] if others else None


def _ratios(ours: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    saved = [r["saved_activation_bytes_per_clip"] for r in (ours, base)]
    found["saved_activations"] = saved[0] / saved[1] if all(saved) else None
    if ours.get("step_ms") and base.get("step_ms"):
        a, b = ours["step_ms"]["runs"], base["step_ms"]["runs"]
        found |= {"time": paired_ratio(a, b), "speedup": paired_ratio(b, a)}
        found["memory"] = ours["peak_memory_bytes"] / base["peak_memory_bytes"]
    return found
