"""Result of sanitize.py: what compute-sanitizer says of the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from harness.results.base import Result
from harness.table import Table


@dataclass(frozen=True, kw_only=True)
class SanitizerRecord:
    """One tool over all kernels at one shape.

    Attributes:
        status: "clean", "errors", "cut off", "failed" (the tool or the check itself), or "not here".
        errors: as the tool counts them; None where it did not come to that.
        first: lines of the first ones.
    """

    kind: str = "sanitizer"
    tool: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    errors: int | None = None
    first: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SanitizerResult(Result):
    title: ClassVar[str] = "compute-sanitizer"

    records: list[SanitizerRecord]

    def tables(self) -> list[Table]:
        rows = []
        for r in self.records:
            count = "-" if r.errors is None else str(r.errors)
            rows.append([r.tool, r.status, count, f"{r.seconds:.0f} s", r.reason or " | ".join(r.first[:3])])
        head = ["tool", "status", "errors", "took", "why, or the first errors"]
        return [Table("compute-sanitizer on one shape of each kernel", head, rows, self.conditions)]
