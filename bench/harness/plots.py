"""Pictures of benchmark records; each needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any


def plot_steps(path: str | IO[str], records: list[dict[str, Any]], title: str) -> None:
    """A bar of each variant for every measure; one that was not counted says so instead."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [
        ("saved_activation_bytes_per_clip", "saved activations, MiB a clip", 2**20),
        ("forward_macs_per_clip", "forward GMACs a clip", 1e9),
    ]
    timed = [r for r in records if r.get("step_ms")]
    if timed:
        columns = [
            ("step", "ms a training step", 1.0),
            ("peak_memory_bytes", "peak memory, MiB", 2**20),
            *columns,
        ]
        records = timed
    labels = [f"{r['variant']}, {r['masking'].replace('_', '-')}" for r in records]
    figure, axes = plt.subplots(
        1, len(columns), figsize=(3.4 * len(columns), 0.6 + 0.55 * len(records)), sharey=True
    )
    for axis, (key, text, unit) in zip(axes, columns):
        found = [r["step_ms"]["median"] if key == "step" else r[key] for r in records]
        values = [(value or 0) / unit for value in found]
        shades = ["0.75" if r["masking"] == "encoder_only" else "#1f5fa8" for r in records]
        axis.barh(labels, values, color=shades)
        past = [0.0] * len(values)
        if key == "step":
            low = [v - r["step_ms"]["min"] for v, r in zip(values, records)]
            high = [r["step_ms"]["max"] - v for v, r in zip(values, records)]
            axis.errorbar(values, range(len(values)), xerr=[low, high], fmt="none", ecolor="black", capsize=3)
            past = high
        for place, (value, more) in enumerate(zip(values, past)):
            shown = (
                "not counted"
                if found[place] is None
                else f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
            )
            axis.annotate(
                shown, (value + more, place), xytext=(4, 0), textcoords="offset points", va="center"
            )
        axis.set_title(text, fontsize=10)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_classes(path: str | IO[str], record: dict[str, Any]) -> None:
    """Where a step's time goes (`bench/step.py`): one bar a kind, the longest first; gaps and data below
    them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [found for found in record["classes"] if found["share"] >= 0.002]
    labels = [found["name"] for found in shown]
    shades = ["0.55" if name in ("host gaps", "waiting for data") else "#1f5fa8" for name in labels]
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.34 * len(shown)))
    bars = axis.barh(labels, [found["ms"] for found in shown], color=shades)
    axis.bar_label(bars, [f"{found['ms']:.1f} ms, {found['share']:.0%}" for found in shown], padding=4)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    about = ", ".join(str(record[key]) for key in ("model", "variant", "dtype"))
    axis.set_title(f"{about}, batch {record['batch']}: ms a step", fontsize=10)
    _save(figure, path)


def _save(figure, path: str | IO[str]) -> None:
    """To a file by its name, or as SVG to an open one."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    if isinstance(path, str):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    else:
        figure.savefig(path, format="svg")
    plt.close(figure)
