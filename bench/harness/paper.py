"""The paper's own table of what dual masking saves, beside what was measured here.

The gains and the forward MACs stand in VideoMAE V2, table 1. Its memory is given here as recalled (MB a clip,
on its A100s); it could not be read again, so every line that shows it says so.
"""

from __future__ import annotations

from typing import NamedTuple

from harness.results.steps import PaperLine, StepRatio, StepRecord

NOTE = "paper, as recalled: VideoMAE V2, table 1"


class PaperNumbers(NamedTuple):
    """Speed-up of dual over encoder-only masking; of both: MB a clip, forward GMACs a clip."""

    speedup: float
    memory_mb: tuple[float, float]
    forward_gmacs: tuple[float, float]


PAPER = {
    "vit_b": PaperNumbers(1.79, (631, 328), (35.48, 25.87)),
    "vit_g": PaperNumbers(1.48, (1753, 1050), (263.93, 241.61)),
}


def compare_with_paper(model: str, records: list[StepRecord], ratios: list[StepRatio]) -> list[PaperLine]:
    """Dual over encoder-only masking of each variant: here, in the paper, and the ratio of the two ratios.

    Speed-ups and memory ratios are None where nothing was timed. Empty for models that are not in the paper's
    table.
    """
    known = PAPER.get(model)
    if known is None:
        return []
    by_pair = {(r.variant, r.baseline): r for r in ratios}
    paper_memory = known.memory_mb[1] / known.memory_mb[0]
    lines = []
    for variant in dict.fromkeys(r.variant for r in records):
        ratio = by_pair.get((f"{variant} dual", f"{variant} encoder_only"))
        if ratio is None:
            continue
        speedup = ratio.speedup.median if ratio.speedup else None
        macs = {r.masking: r.forward_macs_per_clip for r in records if r.variant == variant}
        line = PaperLine(
            model=model,
            variant=variant,
            source=NOTE,
            speedup=speedup,
            paper_speedup=known.speedup,
            speedup_over_paper=speedup and speedup / known.speedup,
            memory=ratio.memory,
            paper_memory=paper_memory,
            memory_over_paper=ratio.memory and ratio.memory / paper_memory,
            saved_activations=ratio.saved_activations,
            macs=macs["dual"] / macs["encoder_only"],
            paper_macs=known.forward_gmacs[1] / known.forward_gmacs[0],
        )
        lines.append(line)
    return lines
