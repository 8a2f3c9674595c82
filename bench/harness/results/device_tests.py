"""Result of device_tests.py: outcomes of tests on a device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from harness.results.base import Result
from harness.table import Table


@dataclass(frozen=True, kw_only=True)
class TestOutcome:
    """One test: "passed", "failed", "skipped" or "error" (it could not be collected or set up), and why."""

    __test__ = False  # pytest would collect it

    kind: str = "test"
    name: str
    outcome: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class DeviceTestsResult(Result):
    """Outcomes so far; `complete` once pytest came to its end."""

    title: ClassVar[str] = "Tests on the device"

    records: list[TestOutcome]
    arguments: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def counts(self) -> Counter[str]:
        return Counter(r.outcome for r in self.records)

    def tables(self) -> list[Table]:
        counts = self.counts
        said = ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
        rows = [[r.name, r.outcome, r.reason] for r in self.records if r.outcome != "passed"]
        note = f"{said or 'no test ran'}{'' if self.complete else '; NOT TO THE END'}; {self.conditions}"
        return [Table("Tests on the device that did not pass", ["test", "outcome", "why"], rows, note)]
