"""Results of store.py and store_faults.py: shards in an object store beside local ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.json_records import Runs, Spread
from harness.results.base import Result
from harness.table import Table, number, spread_text


@dataclass(frozen=True, kw_only=True)
class LoaderRecord:
    """The loader from one place.

    Attributes:
        way: where the videos lie, and what is between.
        clips_per_s: by the clock, with as many cores for the loader as `cores`.
        cpu_ms: of the loader's processes, a clip.
        server_cpu_ms: of the store, a clip.
        waited: share of the workers' time in which they waited for the store.
        relative: `clips_per_s` over that of local files, round by round.
        cpu_relative: clips per CPU second over that of local files, round by round.
        same: whether every clip is, bit by bit, that of the local files.
    """

    kind: str = "loader"
    way: str
    workers: int
    cores: int
    clips_per_s: Runs
    cpu_ms: Runs
    server_cpu_ms: Runs | None = None
    waited: Runs | None = None
    relative: Spread
    cpu_relative: Spread
    same: bool


@dataclass(frozen=True, kw_only=True)
class RangeRecord:
    """Ranges read by one process with some threads.

    Attributes:
        threads: requests at a time.
        delay_ms: added to each answer.
    """

    kind: str = "ranges"
    threads: int
    delay_ms: float
    bytes_each: int
    requests_per_s: Runs


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A training run: share of its steps' time in which it waited for data."""

    kind: str = "run"
    way: str
    model: str
    steps: int
    clips_per_s: Runs
    data_share: Runs
    losses_same: bool


@dataclass(frozen=True, kw_only=True)
class StoreResult(Result):
    """Everything that store.py measures.

    Attributes:
        video_bytes: mean of a packed video.
        target: share of the local files' speed that was wanted.
        most_waiting: share of waiting that was allowed.
    """

    title: ClassVar[str] = "Shards in an object store"

    records: list[LoaderRecord | RangeRecord | RunRecord]
    video_bytes: float
    target: float = 0.95
    most_waiting: float = 0.02

    def tables(self) -> list[Table]:
        return [table for table in (self._loaders(), self._ranges(), self._runs()) if table.rows]

    def _loaders(self) -> Table:
        rows = []
        for r in self.records:
            if not isinstance(r, LoaderRecord):
                continue
            rows.append(
                [
                    r.way, spread_text(r.clips_per_s, 1), spread_text(r.relative, 3),
                    spread_text(r.cpu_ms, 1), spread_text(r.cpu_relative, 3), spread_text(r.server_cpu_ms, 1),
                    "-" if r.waited is None else f"{r.waited.median:.1%}", "yes" if r.same else "NO",
                ]
            )  # fmt: skip
        head = ["videos from", "clips/s", "/ local files", "CPU ms a clip", "clips a CPU s / local files"]
        head += ["CPU ms of the store", "workers wait", "same clips"]
        known = {(r.workers, r.cores) for r in self.records if isinstance(r, LoaderRecord)}
        places = "; ".join(f"{workers} workers on {cores} core" for workers, cores in sorted(known))
        return Table(self.title, head, rows, f"{places}, the store on another; {self.conditions}")

    def _ranges(self) -> Table:
        rows = []
        for r in self.records:
            if isinstance(r, RangeRecord):
                rate = r.requests_per_s.median * r.bytes_each / 1e6
                row = [str(r.threads), number(r.delay_ms, 1, 0), spread_text(r.requests_per_s, 0)]
                rows.append([*row, f"{rate:.0f}"])
        sizes = {r.bytes_each for r in self.records if isinstance(r, RangeRecord)}
        head = ["requests at a time", "delay of an answer, ms", "requests/s", "MB/s"]
        note = f"ranges of {min(sizes, default=0) / 1e3:.0f} KB, one process"
        return Table("Range requests", head, rows, note)

    def _runs(self) -> Table:
        rows = []
        for r in self.records:
            if isinstance(r, RunRecord):
                waits = f"{r.data_share.median:.2%} ({r.data_share.min:.2%} to {r.data_share.max:.2%})"
                same = "yes" if r.losses_same else "NO"
                rows.append([r.way, r.model, spread_text(r.clips_per_s, 1), waits, same])
        head = ["videos from", "model", "clips/s", "waits for data", "losses as with local files"]
        return Table("A training run", head, rows, f"at most {self.most_waiting:.0%} wanted")


@dataclass(frozen=True, kw_only=True)
class FaultRecord:
    """A run, or several, with a fault of the store.

    Attributes:
        fault: what happened.
        events: how often.
        requests: that the store, or what is between, was asked.
        lost, repeated: samples that an undisturbed run reads and this did not, or more often.
        replaced: videos that another one stood in for.
        same_curve: whether the losses of all steps are those of the undisturbed run, bit by bit; None where
            the run is meant to stop.
        ended: exit codes of the starts.
        told: what a stopped run said.
        seconds: of the whole.
    """

    kind: str = "fault"
    fault: str
    events: int
    requests: int | None
    lost: int
    repeated: int
    replaced: int
    same_curve: bool | None
    ended: list[int]
    told: str = ""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class FaultsResult(Result):
    title: ClassVar[str] = "When the store fails"

    records: list[FaultRecord]
    steps: int
    samples: int

    def tables(self) -> list[Table]:
        rows = []
        for r in self.records:
            curve = {True: "identical", False: "DIFFERS", None: "up to the stop: identical"}[r.same_curve]
            counts = [str(n) for n in (r.events, r.lost, r.repeated, r.replaced)]
            rows.append([r.fault, *counts, curve, ", ".join(map(str, r.ended)), f"{r.seconds:.0f} s"])
        head = ["fault", "times", "samples lost", "repeated", "replaced", "curve", "exit codes", "took"]
        note = f"{self.steps} steps, {self.samples} samples; {self.conditions}"
        return [Table(self.title, head, rows, note)]
