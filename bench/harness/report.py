"""One page of benchmark results: `report.html`, self-contained, every number in it from a result file beside
it."""

from __future__ import annotations

import html
import io
from dataclasses import asdict
from pathlib import Path

from harness.plots import plot_classes, plot_steps
from harness.results import read_result
from harness.results.base import Result
from harness.results.step import ProfileResult
from harness.results.steps import StepsResult
from harness.results.suite import SuiteResult
from harness.table import Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
td { white-space: nowrap; } th { border-bottom: 2px solid #888; vertical-align: bottom; max-width: 9rem; }
.text { text-align: left; }
p.note { color: #555; font-size: .85rem; } svg { min-width: 44rem; max-width: 100%; height: auto; }
.bad { color: #a00; font-weight: 600; }
"""
HEAD = f"""<!doctype html><html lang=en><head><meta charset=utf-8><title>vmae benchmarks</title>
<meta name=viewport content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
"""


def picture(result: Result) -> str:
    """Drawing of a result as SVG, or nothing where matplotlib is missing or there is nothing to draw."""
    target = io.StringIO()
    try:
        if isinstance(result, StepsResult):
            first = result.records[0]
            plot_steps(target, result.records, f"{first.model}, batch {first.batch}, {first.dtype}")
        elif isinstance(result, ProfileResult) and result.records[0].classes:
            plot_classes(target, result.records[0])
        else:
            return ""
    except ImportError:
        return ""
    svg = target.getvalue()
    return f'<div class="wide">{svg[svg.index("<svg") :]}</div>'


def part_html(name: str, result: Result) -> str:
    """Heading, what was wrong, picture and tables of a part."""
    variety = name.partition(".")[2]
    heading = f"{result.title}: {variety}" if variety else result.title
    lines = [f'<h2 id="{name}">{html.escape(heading)}</h2>']
    for variant, why in getattr(result, "rejected", {}).items():
        lines.append(f'<p class="bad">{html.escape(f"NO SPEED for {variant}: {why}")}</p>')
    return "\n".join([*lines, picture(result), *(table.to_html() for table in result.tables())])


def read_part(path: Path, name: str) -> str:
    """`part_html` of a file; a line where a part was ended before its first record."""
    try:
        return part_html(name, read_result(path, name))
    except ValueError as error:
        return f'<p class="bad">{html.escape(str(error))}</p>'


def write_report(folder: Path, suite: SuiteResult) -> Path:
    """Write `folder/report.html` from the results in `folder`, and return its path."""
    body = ["<h1>vmae: what was measured</h1>", suite.parts_table().to_html()]
    if suite.environment.rehearsed:
        body.insert(1, '<p class="bad">A rehearsal: nothing here was measured.</p>')
    if suite.missing:
        body.append(suite.missing_table().to_html())
    for part in suite.parts:
        if part.file:
            body.append(read_part(folder / part.file, part.name))
    facts = [[name, str(value)] for name, value in asdict(suite.environment).items() if value is not None]
    body.append(f"<h2>Environment</h2>{Table('Where', ['', ''], facts).to_html()}")
    path = folder / "report.html"
    path.write_text(f"{HEAD}<body>{chr(10).join(body)}</body></html>\n", encoding="utf-8")
    return path
