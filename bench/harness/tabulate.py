"""Tables of benchmark results, for the README and the report: every number comes out of a result file.

A table stands in the README between two comments that name its file and kind,

    <!-- table steps bench/results/cpu/dual_vs_encoder.json -->
    <!-- end of table -->

    python bench/harness/tabulate.py          # write them anew
    python bench/harness/tabulate.py --check  # exit 1 if one differs from its file (a test does so)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
_BLOCK = re.compile(r"(<!-- table (?P<kind>[\w-]+) (?P<path>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """Text cells: a head and rows; `note` stands under it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines) + (
            f"\n{self.note}\n" if self.note else ""
        )


def number(value: float | None, unit: float = 1, digits: int = 0, after: str = "") -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}{after}"


def spread_text(value: dict[str, float] | None, digits: int) -> str:
    """median (min to max)"""
    return (
        "-"
        if value is None
        else " ".join(
            (f"{value['median']:.{digits}f}", f"({value['min']:.{digits}f} to {value['max']:.{digits}f})")
        )
    )


def conditions(content: dict[str, Any]) -> str:
    known = content["environment"]
    tree = {True: "", False: ", work tree not clean", None: ""}[known["clean"]]
    where = known["device"] if known["device"] != "cpu" else f"{known['cores']} cores of an {known['cpu']}"
    return f"{where}, torch {known['torch']}, commit {(known['commit'] or 'unknown')[:9]}{tree}, {known['date'][:10]}"


def _name(record: dict[str, Any]) -> str:
    return f"{record['variant']}, {record['masking'].replace('_', '-')}"


def step_tables(content: dict[str, Any]) -> list[Table]:
    """Of dual_vs_encoder.py: the steps, and what is compared with what."""
    records = content["records"]
    first = records[0]
    base = f"{first['variant']} {first['masking']}"
    faster = {r["variant"]: r.get("speedup") for r in content["ratios"] if r["baseline"] == base}
    rows = []
    for r in records:
        row = [_name(r), spread_text(r.get("step_ms"), 0), number(r.get("clips_per_s"), 1, 2)]
        row += [number(r.get("peak_memory_bytes"), MIB), number(r["saved_activation_bytes_per_clip"], MIB, 1)]
        row += [number(r["forward_macs_per_clip"], 1e9, 2)]
        rows.append(
            [*row, "1" if r is first else spread_text(faster.get(f"{r['variant']} {r['masking']}"), 2)]
        )
    head = [
        "variant, masking",
        "step, ms (min to max)",
        "clips/s",
        "peak memory, MiB",
        "kept for the backward, MiB a clip",
    ]
    head += ["forward GMACs a clip", f"times faster than {base.replace('_', '-')}"]
    title = f"Training steps: {first['model']}, batch {first['batch']}, {first['dtype']}"
    rejected = "".join(f" NO SPEED for {name}: {why}." for name, why in content.get("rejected", {}).items())
    return [Table(title, head, rows, conditions(content) + "." + rejected), _ratio_table(content)]


def _ratio_table(content: dict[str, Any]) -> Table:
    rows = []
    for r in content["ratios"]:
        mark = " (the fastest other way)" if r.get("fastest_competitor") else ""
        row = [f"{r['variant']} / {r['baseline']}{mark}".replace("_", "-"), spread_text(r.get("speedup"), 2)]
        rows.append([*row, number(r.get("memory"), 1, 2, " x"), number(r["saved_activations"], 1, 2, " x")])
    head = ["variant / baseline", "times faster (min to max)", "peak memory", "kept for the backward"]
    return Table("Compared, run by run", head, rows)


def paper_tables(content: dict[str, Any]) -> list[Table]:
    lines = content.get("paper", [])
    keys = ("speedup", "paper_speedup", "speedup_over_paper", "memory", "paper_memory", "memory_over_paper")
    keys += ("macs", "paper_macs")
    head = [
        "variant",
        "faster",
        "paper",
        "ours over paper",
        "memory",
        "paper",
        "ours over paper",
        "forward MACs",
        "paper",
    ]
    rows = [[line["variant"], *(number(line[key], 1, 2, " x") for key in keys)] for line in lines]
    note = lines[0]["source"] if lines else ""
    return [Table("Dual over encoder-only masking, here and in the paper", head, rows, note)] if lines else []


def kept_tables(content: dict[str, Any]) -> list[Table]:
    """Of predict.py: bytes kept for the backward, exact, for every preset and variant."""
    rows = []
    for r in (r for r in content["records"] if r["kind"] == "step"):
        row = [r["model"], _name(r), number(r["saved_activation_bytes_per_clip"], MIB, 1)]
        row += [number(r[f"over_reference_{m}"], 1, 2, " x") for m in ("encoder_only", "dual")]
        rows.append([*row, number(r["forward_macs_per_clip"], 1e9, 2)])
    head = [
        "model",
        "variant, masking",
        "kept for the backward, MiB a clip",
        "of reference encoder-only",
        "of reference dual",
    ]
    title = f"Counted, {content['records'][0]['dtype']}: no GPU needed, exact"
    return [Table(title, [*head, "forward GMACs a clip"], rows, conditions(content))]


def predicted_tables(content: dict[str, Any]) -> list[Table]:
    """Of predict.py: intervals of step times, and floors."""
    steps = [r for r in content["records"] if r["kind"] == "step"]
    gpus = list(content["gpus"])
    rows = []
    for r in steps:
        spans = [r["predicted_step_ms"][gpu] for gpu in gpus]
        rows.append([r["model"], _name(r), *(f"{span['fast']:.0f} to {span['slow']:.0f}" for span in spans)])
    assumed = "; ".join(f"{name}: {json.dumps(values)}" for name, values in content["assumptions"].items())
    title = f"PREDICTED, not measured: ms a step of {steps[0]['batch']} clips, bf16, optimizer left out"
    tables = [Table(title, ["model", "variant, masking", *gpus], rows, f"Assumptions: {assumed}")]
    floors = [r for r in content["records"] if r["kind"] == "floor"]
    rows = [
        [r["model"], r["operation"], r["direction"], *(f"{r['floor_us'][gpu]:.1f}" for gpu in gpus)]
        for r in floors
    ]
    title = f"Floors of the fused operations at datasheet rates, microseconds, batch {floors[0]['batch']}"
    return [*tables, Table(title, ["model", "operation", "direction", *gpus], rows)]


def kernel_tables(content: dict[str, Any]) -> list[Table]:
    """Of operations.py: checks, times over floors, or floors alone."""
    records = content["records"]
    if records[0]["kind"] == "check":
        names = [[r["operation"], r["shape"], r["dtype"]] for r in records]
        rows = [
            [*name, f"{r['error_ratio']:.2f}", "ok" if r["ok"] else "FAIL"] for name, r in zip(names, records)
        ]
        head = ["operation", "shape", "dtype", "error over bound", ""]
        return [Table("Kernels against float64 (1 is the bound)", head, rows, conditions(content))]
    rows = []
    for r in records:
        row = [r["operation"], f"{r['shape']}, batch {r['batch']}", r["direction"], r.get("variant", "floor")]
        rows.append(
            [
                *row,
                number(r["floor_us"], 1, 1),
                number(r.get("median"), 1, 1),
                number(r.get("over_floor"), 1, 2, " x"),
            ]
        )
    head = ["operation", "shape", "direction", "variant", "floor, us", "measured, us", "over floor"]
    return [Table("Kernels", head, rows, conditions(content))]


def attention_tables(content: dict[str, Any]) -> list[Table]:
    """Of attention.py: backends against the plain one, and what they change in a whole model."""
    backends = [r for r in content["ratios"] if r["kind"] == "attention"]
    rows = []
    for r in backends:
        row = [r["shape"], f"{r['variant']} / {r['baseline']}", spread_text(r.get("forward_speedup"), 2)]
        rows.append(
            [
                *row,
                spread_text(r.get("forward_backward_speedup"), 2),
                number(r["saved_activations"], 1, 2, " x"),
            ]
        )
    skipped = "".join(f" Not here: {name}: {why}." for name, why in content.get("skipped", {}).items())
    head = [
        "tokens x heads x head dim",
        "backend / baseline",
        "forward, times faster",
        "forward and backward",
        "kept bytes",
    ]
    tables = [Table("Attention backends", head, rows, conditions(content) + "." + skipped)]
    models = [r for r in content["ratios"] if r["kind"] == "model"]
    rows = [[r["model"], r["variant"].partition("=")[0], spread_text(r.get("speedup"), 2)] for r in models]
    return [
        *tables,
        Table("A training step against plain attention", ["model", "attention", "times faster"], rows),
    ]


def time_tables(content: dict[str, Any]) -> list[Table]:
    """Of step.py: where a step's time goes."""
    r = content["records"][0]
    if "classes" not in r:
        return [
            Table(
                "Where a step's time goes",
                ["variant", "NO SPEED"],
                [list(i) for i in content["rejected"].items()],
            )
        ]
    rows = [
        [c["name"], number(c["ms"], 1, 1), number(c["share"], 0.01, 1, " %"), number(c["calls"])]
        for c in r["classes"]
    ]
    title = f"Where a step's time goes: {r['model']}, {r['variant']}, batch {r['batch']}, {r['dtype']}"
    note = (
        f"{r['step_ms']['median']:.1f} ms a step, {r['profiled_step_ms']:.1f} profiled; {conditions(content)}"
    )
    return [Table(title, ["kind", "ms a step", "share", "calls"], rows, note)]


def scaling_tables(content: dict[str, Any]) -> list[Table]:
    rows = []
    for r in content["records"]:
        predicted, measured, ratio = r["predicted"], r.get("measured"), r.get("measured_over_predicted", {})
        row = [
            f"{r['axis']} {r['value']}",
            number(predicted["forward_macs"], 1e9, 1),
            number(predicted.get("step_ms")),
        ]
        row += [spread_text(measured and measured["step_ms"], 0), number(ratio.get("time"), 1, 2)]
        peak = measured["memory"]["peak"] if measured and "memory" in measured else None
        rows.append(
            [
                *row,
                number(predicted["memory_bytes"], MIB),
                number(peak, MIB),
                number(ratio.get("memory"), 1, 2),
            ]
        )
    head = [
        "point",
        "forward GMACs",
        "predicted, ms",
        "measured, ms",
        "ratio",
        "predicted, MiB",
        "measured, MiB",
        "ratio",
    ]
    return [
        Table(
            "How time and memory grow (predictions and measurements apart)", head, rows, conditions(content)
        )
    ]


def data_tables(content: dict[str, Any]) -> list[Table]:
    """Of data.py: clips a second of each way to decode, the ratios, and whether that feeds a GPU."""
    clips = [r for r in content["records"] if r["kind"] == "clip"]
    rows = [
        [r["videos"], r["variant"], number(r["clips_per_s_per_core"], 1, 1), r.get("wrong") or ""]
        for r in clips
    ]
    tables = [Table("Loading video", ["videos", "way", "clips/s a core", "wrong"], rows, conditions(content))]
    rows = []
    for r in content["ratios"]:
        way = r["variant"] + (" (default)" if r["default"] else "")
        rows.append([r["videos"], way, spread_text(r["speedup"], 2), number(r["target"], 1, 1)])
    head = ["videos", "way", "times faster than the published way (min to max)", "wanted"]
    tables.append(Table("Loading, compared", head, rows))
    feeds = [r for r in content["records"] if r["kind"] == "feed"]
    rows = [[r["preset"], number(r["clips_per_s_needed"], 1, 0)] for r in feeds]
    note = feeds[0].get("assumption", "") if feeds else ""
    return [
        *tables,
        Table("Clips a second that a GPU needs (assumed, not measured)", ["model", "clips/s"], rows, note),
    ]


def progressive_tables(content: dict[str, Any]) -> list[Table]:
    """Of progressive.py: top-1 of each arm, and what was asked for."""
    seeds = [seed["seed"] for seed in content["seeds"]]
    rows = [
        [r["arm"], *(number(v, 1, 1) for v in (r["mean"], r["std"], *r["values"]))]
        for r in content["records"]
    ]
    head = ["arm", "top-1, %", "standard deviation", *(f"seed {seed}" for seed in seeds)]
    note = ". ".join((*content["verdicts"], f"{content['minutes']:.0f} minutes; {conditions(content)}"))
    return [Table("Progressive training in miniature", head, rows, note + ".")]


def mask_tables(content: dict[str, Any]) -> list[Table]:
    """Of mask_ablation.py: every decoder mask."""
    rows = []
    for r in content["records"]:
        row = [
            r["mask"].replace("_", " "),
            number(r["ratio"], 0.01, 0, " %"),
            number(r["macs"], 1, 1),
            number(r["loss"], 1, 4),
        ]
        scores = [run["top1"] for run in r["runs"]]
        spread = f" ({min(scores):.1f} to {max(scores):.1f})" if len(scores) > 1 else ""
        rows.append(
            [*row, number(r["top1"], 1, 1) + spread, number(min(run["seconds"] for run in r["runs"]))]
        )
    head = ["decoder mask", "left out", "forward MMACs a clip", "loss", "top-1, %", "pre-training, s (least)"]
    steps, seeds = content["scale"]["pretrain_steps"], len(content["records"][0]["runs"])
    note = f"{steps} steps, {seeds} seed{'s' if seeds > 1 else ''}; {conditions(content)}."
    return [Table("Decoder masks in miniature", head, rows, note)]


def features_tables(content: dict[str, Any]) -> list[Table]:
    """Of features.py: CPU seconds of a whole video, the published loop's and ours, and what each part
    contributes."""
    rows = []
    for r in content["records"]:
        if not r["same"]:
            rows.append([r["setting"], *["-"] * 5, f"NO SPEED: differs by {r['error']:.0e}"])
            continue
        seconds = [number(r["video_cpu_s"][who]) for who in ("published", "ours")]
        parts = [number(r[f"speedup_{part}"]["median"], 1, 1) for part in ("decode", "model")]
        rows.append([r["setting"], *seconds, spread_text(r["speedup"], 2), *parts, f"{r['error']:.0e}"])
    first = content["records"][0]
    head = [
        f"CPU seconds for {first['video_s']} s of video",
        "published loop",
        "here",
        "times faster (min to max)",
    ]
    head += ["decoding and resizing alone", "model alone", "largest difference"]
    return [Table("Features of overlapping windows", head, rows, conditions(content) + ", one of them used.")]


MAKERS: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    "steps": step_tables,
    "paper": paper_tables,
    "kept": kept_tables,
    "predicted": predicted_tables,
    "kernels": kernel_tables,
    "attention": attention_tables,
    "time": time_tables,
    "scaling": scaling_tables,
    "data": data_tables,
    "progressive": progressive_tables,
    "masks": mask_tables,
    "features": features_tables,
}
# The tables of each result file, by its name.
PARTS = {
    "dual_vs_encoder": ("steps", "paper"),
    "predict": ("kept", "predicted"),
    "operations": ("kernels",),
    "attention": ("attention",),
    "step": ("time",),
    "scaling": ("scaling",),
    "data": ("data",),
}


def read_result(path: Path) -> dict[str, Any]:
    """A result file's content.

    Raises:
        ValueError: it is missing or no result.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if content["records"] and content["environment"] else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a benchmark's result: {error}") from error


def tables_of(part: str, content: dict[str, Any]) -> list[Table]:
    """All tables of the result file named `part`."""
    return [table for kind in PARTS[part] for table in MAKERS[kind](content)]


def rewritten(text: str, root: Path = ROOT) -> str:
    """`text` with every marked table made anew: the first one of its kind.

    Raises:
        ValueError: an unknown kind, or a file that is no result.
    """

    def replace(found: re.Match) -> str:
        if found["kind"] not in MAKERS:
            raise ValueError(f"unknown table {found['kind']!r}; known: {', '.join(MAKERS)}")
        return f"{found[1]}{MAKERS[found['kind']](read_result(root / found['path']))[0].markdown()}{found[4]}"

    return _BLOCK.sub(replace, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a table differs from its file"
    )
    parser.add_argument(
        "files", nargs="*", type=Path, default=[ROOT / "README.md"], help="Markdown files (README.md)"
    )
    args = parser.parse_args(argv)
    different = []
    for path in args.files:
        text = path.read_text(encoding="utf-8")
        try:
            new = rewritten(text)
        except ValueError as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            return 2
        if new != text:
            different.append(path)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    for path in different:
        print(
            f"{path}: {'differs from its results; run python bench/harness/tabulate.py' if args.check else 'written'}"
        )
    return 1 if different and args.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
