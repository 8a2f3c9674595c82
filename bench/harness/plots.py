"""Pictures of benchmark records; each needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from harness.results.step import ProfileRecord
from harness.results.steps import StepRecord
from harness.table import MIB, median_of

GAPS = ("host gaps", "waiting for data")
BLUE = "#1f5fa8"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_steps(path: str | IO[str], records: list[StepRecord], title: str) -> None:
    """A bar of each variant for every measure; one that was not counted says so instead."""
    timed = [r for r in records if r.step_ms]
    records = timed or records
    measures: list[tuple[str, list[float | None]]] = []
    if timed:
        measures.append(("ms a training step", [median_of(r.step_ms) for r in records]))
        measures.append(("peak memory, MiB", [_over(r.peak_memory_bytes, MIB) for r in records]))
    saved = [_over(r.saved_activation_bytes_per_clip, MIB) for r in records]
    measures.append(("saved activations, MiB a clip", saved))
    measures.append(("forward GMACs a clip", [r.forward_macs_per_clip / 1e9 for r in records]))
    size = (3.4 * len(measures), 0.6 + 0.55 * len(records))
    figure, axes = _pyplot().subplots(1, len(measures), figsize=size, sharey=True)
    labels = [r.name for r in records]
    shades = ["0.75" if r.masking == "encoder_only" else BLUE for r in records]
    for place, (axis, (text, values)) in enumerate(zip(axes, measures)):
        axis.barh(labels, [value or 0 for value in values], color=shades)
        past = [0.0] * len(values)
        if timed and place == 0:
            past = _error_bars(axis, records)
        for row, (value, more) in enumerate(zip(values, past)):
            at = ((value or 0) + more, row)
            axis.annotate(_shown(value), at, xytext=(4, 0), textcoords="offset points", va="center")
        axis.set_title(text, fontsize=10)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _error_bars(axis: Any, records: list[StepRecord]) -> list[float]:
    """Smallest to largest step; how far each bar reaches beyond its median."""
    times = [r.step_ms for r in records if r.step_ms]
    low, high = [t.median - t.min for t in times], [t.max - t.median for t in times]
    medians, rows = [t.median for t in times], range(len(times))
    axis.errorbar(medians, rows, xerr=[low, high], fmt="none", ecolor="black", capsize=3)
    return high


def _over(value: int | None, unit: int) -> float | None:
    return None if value is None else value / unit


def _shown(value: float | None) -> str:
    """Three digits or more."""
    if value is None:
        return "not counted"
    digits = sum(value < limit for limit in (100, 10))
    return f"{value:.{digits}f}"


def plot_classes(path: str | IO[str], record: ProfileRecord) -> None:
    """One bar a kind of work, the longest first; gaps and data below them."""
    shown = [found for found in record.classes if found.share >= 0.002]
    labels = [found.name for found in shown]
    shades = ["0.55" if name in GAPS else BLUE for name in labels]
    figure, axis = _pyplot().subplots(figsize=(7, 0.9 + 0.34 * len(shown)))
    bars = axis.barh(labels, [found.ms for found in shown], color=shades)
    axis.bar_label(bars, [f"{found.ms:.1f} ms, {found.share:.0%}" for found in shown], padding=4)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    about = f"{record.model}, {record.variant}, {record.dtype}, batch {record.batch}"
    axis.set_title(f"{about}: ms a step", fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: str | IO[str]) -> None:
    """Save to a file by its name, or as SVG to an open one."""
    figure.tight_layout()
    if isinstance(path, str):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    else:
        figure.savefig(path, format="svg")
    _pyplot().close(figure)
