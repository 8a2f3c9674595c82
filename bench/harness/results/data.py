"""Result of data.py: how fast videos become clips, each way, and whether that feeds a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from harness.json_records import Runs, Spread
from harness.results.base import Result
from harness.table import Table, median_of, number, spread_text


@dataclass(frozen=True, kw_only=True)
class CropsRecord:
    """Largest difference between the default resizing and PIL's over all crops, in grey levels."""

    kind: str = "crops"
    error_levels: int


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """A way to load a kind of video.

    Attributes:
        default: what `auto` takes.
        error_levels: largest difference from the true frames.
        wrong: why it has no speed.
    """

    kind: str = "clip"
    videos: str
    variant: str
    default: bool
    error_levels: int
    wrong: str | None = None
    clip_cpu_ms: Runs | None = None
    clips_per_s_per_core: float | None = None

    @property
    def way(self) -> str:
        return self.variant + (" (default)" if self.default else "")


@dataclass(frozen=True, kw_only=True)
class PartsRecord:
    """CPU milliseconds a clip of the default way's parts."""

    kind: str = "parts"
    videos: str
    open: float
    decode: float
    convert: float
    resize: float


@dataclass(frozen=True, kw_only=True)
class WorkersRecord:
    """Clips a second from some processes."""

    kind: str = "workers"
    videos: str
    variant: str
    workers: int
    clips_per_s: float


@dataclass(frozen=True, kw_only=True)
class FeedRecord:
    """What a GPU needs: clips a second, and cores that make them, with one and with four crops a decode."""

    kind: str = "feed"
    preset: str
    forward_macs: int
    clips_per_s_needed: float
    cores_1: float
    cores_4: float
    assumption: str


@dataclass(frozen=True, kw_only=True)
class WayRatio:
    """How many times as fast as the published way.

    Attributes:
        target: wanted of the default way; `met`: whether it is.
    """

    videos: str
    variant: str
    default: bool
    speedup: Spread
    target: float | None
    met: bool | None


@dataclass(frozen=True, kw_only=True)
class DataResult(Result):
    """Every way to load every kind of video.

    Attributes:
        absent: readers that are not installed, with the reason.
    """

    title: ClassVar[str] = "Loading video"

    records: list[CropsRecord | ClipRecord | PartsRecord | WorkersRecord | FeedRecord]
    ratios: list[WayRatio] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        tables = [self._clips(), self._ratios(), self._parts(), self._workers()]
        feeds = [r for r in self.records if isinstance(r, FeedRecord)]
        return tables + ([feed_table(feeds)] if feeds else [])

    def _clips(self) -> Table:
        rows = []
        for r in (r for r in self.records if isinstance(r, ClipRecord)):
            times = [number(median_of(r.clip_cpu_ms), 1, 1)]
            times += [number(r.clips_per_s_per_core, 1, 1)]
            rows.append(
                [r.videos, r.way, str(r.error_levels), *times, f"NO SPEED: {r.wrong}" if r.wrong else ""]
            )
        head = ["videos", "way", "levels off", "CPU ms a clip", "clips/s a core", "wrong"]
        return Table("Loading video", head, rows, self.conditions)

    def _ratios(self) -> Table:
        rows = []
        for r in self.ratios:
            way, wanted = r.variant + (" (default)" if r.default else ""), number(r.target, 1, 1)
            met = "" if r.met is None else "met" if r.met else "MISSED"
            rows.append([r.videos, way, spread_text(r.speedup, 2), wanted, met])
        head = ["videos", "way", "times faster than the published way (min to max)", "wanted", ""]
        return Table("Loading, compared", head, rows)

    def _parts(self) -> Table:
        found = [r for r in self.records if isinstance(r, PartsRecord)]
        rows = [[r.videos, *(f"{v:.1f}" for v in (r.open, r.decode, r.convert, r.resize))] for r in found]
        head = ["videos", "open", "decode", "convert", "resize"]
        return Table("Parts of the default way, CPU ms a clip", head, rows)

    def _workers(self) -> Table:
        found = [r for r in self.records if isinstance(r, WorkersRecord)]
        rows = [[r.videos, r.variant, str(r.workers), f"{r.clips_per_s:.1f}"] for r in found]
        return Table("Loading in processes", ["videos", "way", "workers", "clips/s"], rows)


def feed_table(feeds: list[FeedRecord]) -> Table:
    rows = []
    for r in feeds:
        needed = [number(r.clips_per_s_needed), number(r.cores_1, 1, 1), number(r.cores_4, 1, 1)]
        rows.append([r.preset, number(r.forward_macs, 1e9, 1), *needed])
    head = ["model", "GMACs a clip", "clips/s", "cores", "cores, 4 crops a decode"]
    title = "Clips a second that a GPU needs, packed videos (assumed, not measured)"
    return Table(title, head, rows, f"An ASSUMPTION: {feeds[0].assumption}")
