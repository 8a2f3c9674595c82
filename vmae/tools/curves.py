"""`python -m vmae curves RUN...`: one picture of the loss, learning rate, gradient norm and clips per second
of several runs; where they validate, top-1 and loss of that; where they are probed, both accuracies.

It reads the log that a run writes while it trains (`log.jsonl`), so a run need not be finished. `--reference
NAME` adds a curve of `vmae/reference_curves`, to compare a loss with. `--export` writes such a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.files.json_files import read_json_lines
from vmae.train.metrics import LOG_NAME, loss_of_last_tenth, read_starts

REFERENCES = Path(str(files("vmae"))) / "reference_curves"
PANELS = {"loss_mean": "loss", "lr": "learning rate", "grad_norm": "gradient norm", "clips_per_s": "clips/s"}
VALIDATION_PANELS = {"val_top1": "top-1 of validations, %", "val_loss": "loss of validations"}
PROBE_PANELS = {"probe_attentive": "attentive probe, top-1 in %", "probe_knn": "k-NN probe, top-1 in %"}
PASS_PANELS = {
    "val_top1": VALIDATION_PANELS,
    "probe_list": PROBE_PANELS,
}  # by a key of their lines in the log
AXES = {"step": "step", "epoch": "epoch"}
# Distinct without colour: line styles, and shades of different lightness.
_STYLES = ("-", "--", "-.", ":")
_SHADES = ("#000000", "#7a1fa2", "#2c7fb8", "#e08214", "#777777")
_POINTS = 200  # most lines of an exported curve


@dataclass(frozen=True)
class Curve:
    """Log of one run.

    Attributes:
        name: name in the legend and the table.
        records: lines of the log that have a step, in order; at least one.
        about: known facts about the run: commit, versions, device, command, what it predicts.
        reference: whether it is a reference curve: drawn wide and pale, below the others.
        note: one line on damaged lines of the log; None without any.
    """

    name: str
    records: list[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)
    reference: bool = False
    note: str | None = None

    def values(self, key: str, by: str = "step") -> tuple[list[float], list[float]]:
        """(x values, y values) of one logged quantity, from the records where both are numbers."""
        xs, ys = [], []
        for record in self.records:
            x, y = record.get(by), record.get(key)
            if isinstance(x, (int, float)) and isinstance(y, (int, float)):
                xs.append(x)
                ys.append(y)
        return xs, ys

    def summary(self) -> dict[str, Any]:
        """Last step, loss of the last tenth so far, lowest loss, median clips per second; best top-1 of the
        validations and best attentive probe, if there are any."""
        _, losses = self.values("loss_mean")
        _, rates = self.values("clips_per_s")
        last = self.records[-1]["step"]
        return {
            "name": self.name,
            "steps": last,
            "loss_of_last_tenth": loss_of_last_tenth(self.records, last),
            "lowest_loss": min(losses, default=None),
            "clips_per_s": statistics.median(rates) if rates else None,
            **({"best_top1": max(top1)} if (top1 := self.values("val_top1")[1]) else {}),
            **({"best_probe": max(found)} if (found := self.values("probe_attentive")[1]) else {}),
        }


def read_curve(path: str | Path, name: str | None = None, *, reference: bool = False) -> Curve:
    """Curve of a run's folder, or of one JSONL file.

    Args:
        name: name of the curve; without one, that of the folder or file.

    Raises:
        InputError: there is no log, or the log has no line of a step yet.
    """
    path = Path(path)
    log = path / LOG_NAME if path.is_dir() else path
    if not log.is_file():
        problem = f"{path} does not exist"
        if path.is_dir():
            problem = f"folder {path} has no {LOG_NAME}"
        raise InputError(f"{problem}; give the --output folder of a run, or a JSONL log")
    found = read_json_lines(log)
    lines = [line for line in found.records if type(line.get("step")) is int or "about" in line]
    found.skipped += [(n, b"") for n, line in zip(found.numbers, found.records) if line not in lines]
    records = [
        line for line in lines if "step" in line and (PASS_PANELS.keys() | {"loss_mean"}) & line.keys()
    ]
    if not records:
        raise InputError(f"log {log} has no line of a step yet; runs write one every --log-every steps")
    written = [line["about"] for line in lines if isinstance(line.get("about"), dict)]
    about = (written[0] if written else {}) or _last_start(log.parent)
    if not name:
        name = path.name if path.is_dir() else path.stem
    return Curve(name, records, about, reference, found.note(log))


def _last_start(folder: Path) -> dict[str, Any]:
    """Commit, versions, device and target of a run's last start, where they are known."""
    try:
        start = read_starts(folder)[-1]
    except (InputError, IndexError):
        return {}
    keys = ("date", "commit", "clean", "torch", "device", "threads")
    about = {key: start[key] for key in keys if key in start}
    try:
        return {**about, "predicted": start["config"]["derived"]["predicted"]}
    except (KeyError, TypeError):  # of no pre-training, or of an older version
        return about


def note_targets(curves: Sequence[Curve]) -> list[str]:
    """A line where curves are known to predict different things: their losses do not compare."""
    found = {curve.name: about for curve in curves if (about := curve.about.get("predicted"))}
    if len(set(found.values())) < 2:
        return []
    listed = "; ".join(f"{name}: {about}" for name, about in found.items())
    return [f"losses of different targets do not compare: {listed}"]


def read_curves(runs: Sequence[str], references: Sequence[str]) -> list[Curve]:
    """All curves, reference curves first, with distinct names.

    Raises:
        InputError: a reference is unknown, or there is nothing to draw; see also `read_curve`.
    """
    known = sorted(path.stem for path in REFERENCES.glob("*.jsonl"))
    for name in references:
        if name not in known:
            raise InputError(
                f"no reference curve {name!r} in {REFERENCES}; known: {', '.join(known) or 'none'}"
            )
    if not runs and not references:
        raise InputError("nothing to draw: give the --output folders of runs, or --reference NAME")
    names = [Path(run).absolute().name for run in runs]
    names = [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
    curves = [
        read_curve(REFERENCES / f"{name}.jsonl", f"reference {name}", reference=True) for name in references
    ]
    return curves + [read_curve(run, name) for run, name in zip(runs, names, strict=True)]


# --- Output ---


def draw(curves: Sequence[Curve], path: Path, by: str = "step") -> None:
    """Write the picture, with a panel for each quantity of `PANELS`; and of `VALIDATION_PANELS` and
    `PROBE_PANELS`, if a run has some.

    Raises:
        InputError: matplotlib is missing, or the file can't be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            f"no picture without matplotlib ({error}); `pip install matplotlib`, or use --json"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [list(PANELS.items())[::2], list(PANELS.items())[1::2]]
    passes: dict[str, str] = {}
    for more in PASS_PANELS.values():
        if any(curve.values(key)[0] for curve in curves for key in more):
            columns.append(list(more.items()))
            passes |= more
    panels = [column[row] for row in range(2) for column in columns]
    size = (1 + 5 * len(columns), 7)
    figure, axes = plt.subplots(2, len(columns), figsize=size, sharex=True, layout="constrained")
    for axis, (key, label) in zip(axes.flat, panels):
        number = 0  # of the curve, reference curves not counted
        for curve in curves:
            style = _style(number, curve)
            number += not curve.reference
            if key in passes and len(curve.values(key)[0]) == 1:
                style["marker"] = "o"
            axis.plot(*curve.values(key, by), label=curve.name, **style)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1, 1].set_ylim(bottom=0)
    axes[0, 0].legend()
    for axis in axes[1]:
        axis.set_xlabel(AXES[by])
    suffix = path.suffix.lstrip(".") or "png"
    if suffix not in figure.canvas.get_supported_filetypes():
        raise InputError(f"cannot draw {path}: {suffix} is no picture format; use .png, .pdf or .svg")
    write_atomically(path, lambda file: figure.savefig(file, format=suffix, dpi=120))
    plt.close(figure)


def _style(number: int, curve: Curve) -> dict[str, Any]:
    marker = "o" if len(curve.records) == 1 else None
    if curve.reference:
        return dict(color="#bbbbbb", linewidth=4, marker=marker)
    shade, style = _SHADES[number % len(_SHADES)], _STYLES[number % len(_STYLES)]
    return dict(color=shade, linestyle=style, linewidth=1.4, marker=marker)


def table(curves: Sequence[Curve]) -> list[str]:
    """Lines of a table, one for each curve: name, steps, losses, clips per second."""
    summaries = [curve.summary() for curve in curves]
    more = {"best_top1": "best top-1", "best_probe": "best probe"}
    more = {key: title for key, title in more.items() if any(key in s for s in summaries)}
    rows = [["run", "steps", "loss of the last tenth", "lowest", "clips/s", *more.values()]]
    for curve, s in zip(curves, summaries, strict=True):
        losses = [_number(s["loss_of_last_tenth"], 4), _number(s["lowest_loss"], 4)]
        best = [_number(s.get(key), 2) for key in more]
        rows.append([curve.name, str(s["steps"]), *losses, _number(s["clips_per_s"], 1), *best])
    first_width, *widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells in rows:
        lines.append("  ".join([name.ljust(first_width), *(c.rjust(w) for c, w in zip(cells, widths))]))
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def export(curve: Curve, path: Path, note: str) -> None:
    """Write a reference curve: a line `about` it (note, commit, versions, device; no paths), then at most
    200 lines of its log.

    Raises:
        InputError: the file can't be written.
    """
    records = [record for record in curve.records if "loss_mean" in record]
    count = min(len(records), _POINTS)
    kept = [records[(i + 1) * len(records) // count - 1] for i in range(count)]
    keys = ("step", "epoch", *PANELS)
    lines = [
        {"about": {"note": note, **curve.about}},
        *({key: _short(r[key]) for key in keys if key in r} for r in kept),
    ]
    lines[0]["about"].pop("predicted", None)  # may hold a teacher's path
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(path, lambda file: file.write(text), binary=False)


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="output folder of a run, or a JSONL log")
    parser.add_argument(
        "--reference",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also draw these curves, which come with the package, such as tiny",
    )
    parser.add_argument(
        "--output", default="curves.png", metavar="FILE", help="picture: .png, .pdf, .svg (curves.png)"
    )
    parser.add_argument("--by", choices=sorted(AXES), default="step", help="x axis (step)")
    parser.add_argument(
        "--json", metavar="FILE", help="file for the values, instead of a picture; - prints them"
    )
    parser.add_argument(
        "--export", metavar="FILE", help="file for a reference curve of the one RUN, instead of a picture"
    )
    parser.add_argument("--note", default="", help="with --export: the command that made the run")


def run(args: argparse.Namespace) -> int:
    """Run the command: read the logs, print the table, write the picture or the file asked for."""
    curves = read_curves(args.runs, args.reference)
    for note in [*(curve.note for curve in curves if curve.note), *note_targets(curves)]:
        print(note, file=sys.stderr)
    if args.export:
        if len(args.runs) != 1 or args.reference:
            raise InputError("--export takes one RUN, and no --reference")
        export(curves[0], Path(args.export), args.note)
        print(f"curve: {args.export}")
        return 0
    if args.json == "-":
        print(json.dumps(describe(curves, args.by), indent=1))
        return 0
    print("\n".join(table(curves)))
    if args.json:
        text = json.dumps(describe(curves, args.by), indent=1) + "\n"
        write_atomically(Path(args.json), lambda file: file.write(text), binary=False)
    else:
        draw(curves, Path(args.output), args.by)
    print(f"{'json' if args.json else 'picture'}: {args.json or args.output}")
    return 0


def describe(curves: Sequence[Curve], by: str = "step") -> dict[str, Any]:
    """All curves, in containers that JSON can hold."""
    described = []
    for curve in curves:
        passes = [key for more in PASS_PANELS.values() for key in more if curve.values(key)[0]]
        keys = (*PANELS, *passes)
        values = {key: dict(zip((by, "value"), curve.values(key, by))) for key in keys}
        described.append(
            {**curve.summary(), "reference": curve.reference, "about": curve.about, "values": values}
        )
    return {"schema": "vmae-curves/1", "curves": described}
