"""What suite.py ran."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.environment import Environment
from harness.json_records import SCHEMA
from harness.results import result_type
from harness.table import Table


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """One benchmark of a suite.

    Attributes:
        status: ran, failed, cut off, or skipped.
        reason: why it did not run to its end.
        file: its result, beside `suite.json`, up to where it was ended; None where it wrote none.
    """

    name: str
    status: str = "skipped"
    reason: str = ""
    seconds: float = 0.0
    command: list[str] | None = None
    file: str | None = None


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """All parts of a suite.

    Attributes:
        missing: packages that are not installed, with what that costs.
    """

    environment: Environment
    quick: bool = False
    parts: list[PartRecord] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    schema: str = SCHEMA

    def parts_table(self) -> Table:
        rows = []
        for part in self.parts:
            status = part.status + (f": {part.reason}" if part.reason else "")
            title, variety = result_type(part.name).title, part.name.partition(".")[2]
            rows.append(
                [
                    f"{title}: {variety}" if variety else title,
                    status,
                    f"{part.seconds:.0f} s",
                    part.file or "-",
                ]
            )
        return Table("What ran, and what was left out", ["part", "status", "took", "result"], rows)

    def missing_table(self) -> Table:
        return Table(
            "Not installed", ["package", "what it costs"], [list(item) for item in self.missing.items()]
        )
