"""One page of benchmark results: `report.html`, self-contained, every number in it from a result file beside
it."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import Any

from harness.tabulate import PARTS, Table, read_result, tables_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto; max-width: 75rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
td { white-space: nowrap; } th { border-bottom: 2px solid #888; vertical-align: bottom; max-width: 9rem; }
.text { text-align: left; }
p.note { color: #555; font-size: .85rem; } svg { min-width: 44rem; max-width: 100%; height: auto; }
.bad { color: #a00; font-weight: 600; }
"""
TITLES = {
    "operations": "Kernels",
    "attention": "Attention",
    "dual_vs_encoder": "Dual against encoder-only masking",
    "step": "Where a step's time goes",
    "data": "Loading video",
    "scaling": "Scaling",
    "predict": "Without a GPU: counted and predicted",
}


def table_html(table: Table) -> str:
    text = [not all(re.match(r"-?\d|-$", row[i]) for row in table.rows) for i in range(len(table.head))]

    def line(cells: list[str], tag: str) -> str:
        marked = zip(cells, (" class=text" if is_text else "" for is_text in text))
        return (
            "<tr>" + "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for cell, mark in marked) + "</tr>"
        )

    rows = "\n".join(line(row, "td") for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    head = line(table.head, "th")
    return f'<h3>{html.escape(table.title)}</h3><div class="wide"><table>{head}\n{rows}</table></div>{note}'


def pictures(part: str, content: dict[str, Any]) -> str:
    """Drawings of a part as SVG, or nothing where matplotlib is missing or there is nothing to draw."""
    try:
        from harness.plots import plot_classes, plot_steps
    except ImportError:
        return ""
    first = content["records"][0]
    target = io.StringIO()
    try:
        if part == "dual_vs_encoder":
            plot_steps(
                target, content["records"], f"{first['model']}, batch {first['batch']}, {first['dtype']}"
            )
        elif part == "step" and "classes" in first:
            plot_classes(target, first)
        else:
            return ""
    except ImportError:
        return ""
    svg = target.getvalue()
    return f'<div class="wide">{svg[svg.index("<svg") :]}</div>'


def status_html(parts: list[dict[str, Any]]) -> str:
    rows = []
    for part in parts:
        said = "ran" if part["status"] == "ran" else f"{part['status']}: {part['reason']}"
        rows.append([TITLES[part["name"]], said, f"{part['seconds']:.0f} s", part.get("file") or "-"])
    return table_html(Table("What ran, and what was left out", ["part", "status", "took", "result"], rows))


def write_report(folder: Path, suite: dict[str, Any]) -> Path:
    """Write `folder/report.html` from `folder/*.json`, and return its path.

    Args:
        suite: `environment`, `parts` (name, status, reason, seconds, file) and `missing` (package -> reason).
    """
    known = suite["environment"]
    facts = [
        [key, json.dumps(value) if isinstance(value, (list, dict)) else str(value)]
        for key, value in known.items()
    ]
    body = ["<h1>vmae: what was measured</h1>", status_html(suite["parts"])]
    if suite["missing"]:
        rows = [list(item) for item in suite["missing"].items()]
        body.append(table_html(Table("Not installed", ["package", "what it costs"], rows)))
    for part in suite["parts"]:
        if not part.get("file"):
            continue
        content = read_result(folder / part["file"])
        body.append(f'<h2 id="{part["name"]}">{TITLES[part["name"]]}</h2>')
        body += [
            f'<p class="bad">{html.escape(f"NO SPEED for {n}: {w}")}</p>'
            for n, w in content.get("rejected", {}).items()
        ]
        body += [
            pictures(part["name"], content),
            *(table_html(table) for table in tables_of(part["name"], content)),
        ]
    body.append(f"<h2>Environment</h2>{table_html(Table('Where', ['', ''], facts))}")
    page = "<!doctype html><html lang=en><head><meta charset=utf-8><title>vmae benchmarks</title>"
    page += f'<meta name=viewport content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
    path = folder / "report.html"
    path.write_text(page + "<body>" + "\n".join(body) + "</body></html>\n", encoding="utf-8")
    return path


assert set(TITLES) == set(PARTS)
