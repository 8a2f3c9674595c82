"""Result of experiments/mask_ablation.py: every decoder mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from harness.results.base import MiniatureResult
from harness.table import Table, number


@dataclass(frozen=True, kw_only=True)
class MaskRun:
    """One seed: last loss of the pre-training and its seconds, top-1 in percent."""

    seed: int
    loss: float | None
    top1: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MaskRecord:
    """A mask: means over its runs.

    Attributes:
        ratio: of the tokens that the decoder leaves out.
        macs: millions of multiply-accumulates of a clip's forward.
    """

    mask: str
    ratio: float
    loss: float | None
    top1: float
    seconds: float
    macs: float
    runs: list[MaskRun]


@dataclass(frozen=True, kw_only=True)
class MaskResult(MiniatureResult):
    """Every mask, over the seeds.

    Attributes:
        encoder: its `mask` and `ratio`.
    """

    title: ClassVar[str] = "Decoder masks in miniature"

    records: list[MaskRecord]
    encoder: dict[str, Any]

    def tables(self) -> list[Table]:
        rows = []
        for r in self.records:
            row = [r.mask.replace("_", " "), number(r.ratio, 0.01, 0, " %"), number(r.macs, 1, 1)]
            scores = [run.top1 for run in r.runs]
            spread = ""
            if len(scores) > 1:
                spread = f" ({min(scores):.1f} to {max(scores):.1f})"
            least = min(run.seconds for run in r.runs)
            rows.append([*row, number(r.loss, 1, 4), number(r.top1, 1, 1) + spread, number(least)])
        head = ["decoder mask", "left out", "forward MMACs a clip", "loss", "top-1, %"]
        steps, seeds = self.scale["pretrain_steps"], len(self.records[0].runs)
        note = f"{steps} steps, {seeds} seed{'s' if seeds > 1 else ''}; {self.conditions}."
        return [Table(self.title, [*head, "pre-training, s (least)"], rows, note)]
