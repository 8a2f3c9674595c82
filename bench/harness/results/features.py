"""Result of features.py: features of overlapping windows, the published loop's and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.json_records import Spread
from harness.results.base import Result
from harness.table import Table, median_of, number, spread_text


@dataclass(frozen=True, kw_only=True)
class FeaturesRecord:
    """A model and step on a video.

    Attributes:
        error: largest difference between the features of both; no speed where it is too large (`same`).
        ms_per_window: CPU, of "published decode", "published model", "ours decode", "ours model".
        video_cpu_s: of the whole video, "published" and "ours".
        target: times faster that were wanted.
    """

    kind: str = "features"
    setting: str
    video_s: int
    windows: int
    error: float
    largest_feature: float
    same: bool
    ms_per_window: dict[str, Spread] | None = None
    video_cpu_s: dict[str, float] | None = None
    speedup: Spread | None = None
    speedup_decode: Spread | None = None
    speedup_model: Spread | None = None
    target: float | None = None
    met: bool | None = None


@dataclass(frozen=True, kw_only=True)
class FeaturesResult(Result):
    """Every setting.

    Attributes:
        error_of_whole_video: of `extract`, against the published loop's first and last windows.
    """

    title: ClassVar[str] = "Features of overlapping windows"

    records: list[FeaturesRecord]
    error_of_whole_video: float | None = None

    def tables(self) -> list[Table]:
        return [self._videos(), self._windows()]

    def _videos(self) -> Table:
        """CPU seconds of a whole video, and what each part contributes."""
        rows = []
        for r in self.records:
            if not r.same or r.video_cpu_s is None:
                rows.append([r.setting, *["-"] * 5, f"NO SPEED: differs by {r.error:.0e}"])
                continue
            row = [r.setting, *(number(r.video_cpu_s[who]) for who in ("published", "ours"))]
            row.append(spread_text(r.speedup, 2))
            row += [number(median_of(found), 1, 1) for found in (r.speedup_decode, r.speedup_model)]
            rows.append([*row, f"{r.error:.0e}"])
        head = [f"CPU seconds for {self.records[0].video_s} s of video", "published loop", "here"]
        head += [
            "times faster (min to max)",
            "decoding and resizing alone",
            "model alone",
            "largest difference",
        ]
        return Table(self.title, head, rows, f"{self.conditions}, one of them used.")

    def _windows(self) -> Table:
        timed = [r for r in self.records if r.ms_per_window]
        rows = []
        for r in timed:
            parts = [f"{found.median:.1f}" for found in (r.ms_per_window or {}).values()]
            met = f"{'met' if r.met else 'MISSED'} ({number(r.target, 1, 1)} x)"
            rows.append([r.setting, *parts, met])
        head = ["CPU ms a window", "published: decode, resize", "model", "here: decode, resize", "model"]
        return Table("Parts of a window", [*head, "wanted"], rows)
