"""True and found segments of a few videos, one above the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmae.errors import InputError
from vmae.evaluate.temporal import Segment, temporal_iou
from vmae.files.atomic import write_atomically

_HEIGHT = 0.36


def draw_segments(
    path: Path,
    videos: dict[str, float],
    truth: Sequence[Segment],
    found: Sequence[Segment],
    *,
    least: float = 0.3,
) -> None:
    """Write a PNG: for each video two rows of labelled bars, what is true and what was found with a score
    from `least` on; of those that overlap by half, whatever their class, the best only.

    Args:
        videos: name -> seconds.

    Raises:
        InputError: matplotlib is missing, or the file can't be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(f"no picture without matplotlib ({error}): `pip install matplotlib`") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(13, 0.6 + 1.0 * len(videos)), layout="constrained")
    ticks = {}
    for place, name in enumerate(videos):
        _row(axis, place + 0.2, [one for one in truth if one.video == name], "#dddddd")
        _row(
            axis,
            place + 0.6,
            _best([one for one in found if one.video == name and one.score >= least]),
            "white",
            scored=True,
        )
        ticks |= {place + 0.2: f"{name}: true", place + 0.6: "found"}
        axis.axhline(place, color="black", linewidth=0.5)
    axis.set_yticks(list(ticks), ticks.values())
    axis.set_ylim(len(videos), 0)
    axis.set_xlim(0, max(videos.values()))
    axis.set_xlabel(f"seconds; found: with a score of at least {least:g}, of overlapping ones the best")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def _best(found: Sequence[Segment]) -> list[Segment]:
    kept: list[Segment] = []
    for one in sorted(found, key=lambda segment: -segment.score):
        if all(temporal_iou(one, other) < 0.5 for other in kept):
            kept.append(one)
    return kept


def _row(axis, middle: float, segments: Sequence[Segment], color: str, scored: bool = False) -> None:
    for one in segments:
        span = [(one.start, one.end - one.start)]
        axis.broken_barh(span, (middle - _HEIGHT / 2, _HEIGHT), facecolor=color, edgecolor="black", alpha=0.8)
        text = f"{one.label} {one.score:.2f}" if scored else one.label
        axis.text((one.start + one.end) / 2, middle, text, ha="center", va="center", fontsize=7, clip_on=True)
