"""Picture of the ground truth segments and the detections of some videos, one row above the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmae.errors import InputError
from vmae.evaluate.temporal import Segment, temporal_iou
from vmae.files.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 0.36  # of a bar; a video's two rows have 1.0 together


def draw_segments(
    path: Path,
    videos: dict[str, float],
    truth: Sequence[Segment],
    found: Sequence[Segment],
    *,
    least: float = 0.3,
) -> None:
    """Write a PNG with two rows of labelled bars for each video: the ground truth, and the detections.

    Of detections with a temporal IoU of 0.5 or more, whatever their class, only the one of highest score is
    drawn.

    Args:
        videos: name -> duration in seconds.
        truth: ground truth segments.
        found: detections.
        least: least score of a detection that is drawn.

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
    ticks: dict[float, str] = {}
    for place, name in enumerate(videos):
        own_truth = [one for one in truth if one.video == name]
        own_found = _best([one for one in found if one.video == name and one.score >= least])
        _row(axis, place + 0.2, own_truth, "#dddddd")
        _row(axis, place + 0.6, own_found, "white", scored=True)
        ticks |= {place + 0.2: f"{name}: true", place + 0.6: "found"}
        axis.axhline(place, color="black", linewidth=0.5)
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.set_ylim(len(videos), 0)
    axis.set_xlim(0, max(videos.values()))
    axis.set_xlabel(f"seconds; found: with a score of at least {least:g}, of overlapping ones the best")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def _best(found: Sequence[Segment]) -> list[Segment]:
    """Detections without those that overlap one of higher score by half."""
    kept: list[Segment] = []
    for one in sorted(found, key=lambda segment: -segment.score):
        if all(temporal_iou(one, other) < 0.5 for other in kept):
            kept.append(one)
    return kept


def _row(axis: Axes, middle: float, segments: Sequence[Segment], color: str, scored: bool = False) -> None:
    for one in segments:
        span = [(one.start, one.end - one.start)]
        axis.broken_barh(span, (middle - _HEIGHT / 2, _HEIGHT), facecolor=color, edgecolor="black", alpha=0.8)
        text = f"{one.label} {one.score:.2f}" if scored else one.label
        axis.text((one.start + one.end) / 2, middle, text, ha="center", va="center", fontsize=7, clip_on=True)
