"""Temporal action detection: segments, their mean average precision, and the dataset file that ActionFormer
reads.

Average precision is that of the ActivityNet evaluation (Heilbron et al., 2015), which THUMOS14 and FineAction
results use. For each class, detections are matched in order of falling score: each to the unmatched ground
truth segment of its video with the largest temporal IoU. Precision is interpolated from the right.

That definition leaves equal scores open. Here detections with equal scores are matched by start, then end,
and form one point of the curve, at the end of their group. Of equal IoUs the earliest ground truth segment is
matched. So the result does not depend on the order of the input.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vmae.errors import InputError
from vmae.evaluate.scores import ends_of_ties
from vmae.files.atomic import write_atomically
from vmae.files.json_files import parse_json

_T = TypeVar("_T")
THUMOS_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
REPEATED = 1e-3  # seconds between starts, and between ends, of what counts as one segment (ActionFormer's)


@dataclass(frozen=True)
class Segment:
    """Segment of a video in which an action happens.

    Attributes:
        video: name of the video.
        start, end: seconds.
        label: class name.
        score: score of a detection; 1 for ground truth.
    """

    video: str
    start: float
    end: float
    label: str
    score: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.start < self.end < math.inf) or math.isnan(self.score):
            given = f"{self.start} to {self.end} s, score {self.score}"
            raise InputError(f"segment of {self.video!r}: {given}: needs 0 <= start < end, and a score")


class Dropped(NamedTuple):
    """A segment that does not count: its video, and what it is in words."""

    video: str
    what: str


@dataclass(frozen=True)
class VideoInfo:
    """A video's entry in the dataset file: its subset, duration in seconds, and frames per second."""

    subset: str
    duration: float
    fps: float


def temporal_iou(a: Segment, b: Segment) -> float:
    """Intersection over union of two segments, in time."""
    overlap = max(min(a.end, b.end) - max(a.start, b.start), 0.0)
    return overlap / (a.end - a.start + b.end - b.start - overlap)


def average_precision(truth: Sequence[Segment], found: Sequence[Segment], threshold: float) -> float:
    """Average precision of one class; 0 without detections.

    Args:
        truth: ground truth segments, at least one.
        found: detections, in any order.
        threshold: least temporal IoU of a correct detection.
    """
    unmatched: dict[str, list[Segment]] = defaultdict(list)
    for segment in sorted(
        truth, key=lambda one: (one.start, one.end)
    ):  # of equal IoUs, `max` returns the first
        unmatched[segment.video].append(segment)
    found, hits = sorted(found, key=lambda one: (-one.score, one.start, one.end)), []
    for detection in found:
        candidates = unmatched[detection.video]
        best = max(candidates, key=lambda segment: temporal_iou(detection, segment), default=None)
        if best is not None and temporal_iou(detection, best) >= threshold:
            candidates.remove(best)
            hits.append(True)
        else:
            hits.append(False)
    return interpolated_area([one.score for one in found], hits, len(truth))


def interpolated_area(scores: Sequence[float], hits: Sequence[bool], positives: int) -> float:
    """Area under the precision-recall curve, with a point at the end of each group of equal scores. Precision
    is
    interpolated: at each recall it is the largest precision at this or any higher recall.

    Args:
        scores: scores of the detections, falling.
        hits: whether each detection is correct.
        positives: number of ground truth boxes or segments.
    """
    ends = ends_of_ties(np.array(scores))
    right = np.cumsum(np.array(hits, dtype=np.int64))[ends]
    best = np.maximum.accumulate((right / (ends + 1))[::-1])[::-1]
    return float((best * np.diff(right, prepend=0)).sum() / positives)


def mean_average_precision(
    truth: Sequence[Segment], found: Sequence[Segment], thresholds: Sequence[float] = THUMOS_THRESHOLDS
) -> dict[str, Any]:
    """Mean average precision over the classes of the ground truth, at each threshold and averaged over all.

    Returns:
        `map` {threshold: value}, `average`, and `classes` {label: {threshold: value}}.

    Raises:
        InputError: no ground truth, or a detection of a class that it does not have.
    """
    labels = sorted({segment.label for segment in truth})
    if not labels:
        raise InputError("no ground truth to compare with")
    unknown = sorted({segment.label for segment in found} - set(labels))
    if unknown:
        raise InputError(
            f"detections of classes that the ground truth does not have: {', '.join(unknown[:8])}"
        )
    classes = {
        label: {
            threshold: average_precision(
                [segment for segment in truth if segment.label == label],
                [segment for segment in found if segment.label == label],
                threshold,
            )
            for threshold in thresholds
        }
        for label in labels
    }
    means = {
        threshold: sum(values[threshold] for values in classes.values()) / len(classes)
        for threshold in thresholds
    }
    return {"map": means, "average": sum(means.values()) / len(means), "classes": classes}


# --- ActionFormer's dataset file ----------------------------------------------------------------------------


def write_actionformer(
    path: str | Path,
    truth: Sequence[Segment],
    videos: dict[str, tuple[float, float]],
    subsets: dict[str, str],
) -> None:
    """Write the JSON that ActionFormer's datasets read.

    Args:
        truth: ground truth segments of all subsets.
        videos: name -> (seconds, frames per second); videos without a segment are written too.
        subsets: name -> "training", "validation" or "test".

    Raises:
        InputError: a segment of an unknown video or past its end; a video without a subset; or the file can't
            be written.
    """
    numbers = {label: number for number, label in enumerate(sorted({segment.label for segment in truth}))}
    own: dict[str, list[dict[str, Any]]] = {name: [] for name in videos}
    for segment in truth:
        if segment.video not in videos:
            raise InputError(f"a segment of {segment.video!r}, which is not among the videos")
        duration, fps = videos[segment.video]
        if segment.end > duration + 1 / fps:
            raise InputError(
                f"a segment of {segment.video!r} ends at {segment.end} s; the video has {duration} s"
            )
        span = [segment.start, segment.end]
        frames = [round(value * fps, 1) for value in span]
        number = numbers[segment.label]
        own[segment.video].append(
            {"label": segment.label, "segment": span, "segment(frames)": frames, "label_id": number}
        )
    if lacking := [name for name in videos if name not in subsets]:
        raise InputError(f"no subset for {', '.join(lacking[:8])}")
    database = {
        name: {"subset": subsets[name], "duration": duration, "fps": fps, "annotations": own[name]}
        for name, (duration, fps) in videos.items()
    }
    text = json.dumps({"version": "vmae", "database": database}, indent=1) + "\n"
    write_atomically(Path(path), lambda file: file.write(text), binary=False)


def read_actionformer(
    path: str | Path, subset: str | None = None, *, dropped: list[Dropped] | None = None
) -> list[Segment]:
    """Segments of ActionFormer's dataset file, of one subset or of all, without repetitions.

    As ActionFormer does (libs/utils/metrics.py at fa6e060, `remove_duplicate_annotations`), a segment is left
    out that is shorter than a millisecond, or whose start and end are within a millisecond of those of one
    kept before it, of the same video and class.

    Args:
        dropped: takes what is left out.

    Raises:
        InputError: the file can't be read, or is of another kind; a segment ends before it starts.
    """
    found: list[Segment] = []
    for name, video in _read_database(path).items():
        own, left_out = _of_video(path, _segments, name, video)
        if subset is None or video["subset"].lower() == subset.lower():
            found += own
            if dropped is not None:
                dropped += left_out
    return found


def dropped_note(dropped: Sequence[Dropped], path: str | Path) -> str:
    """A line on segments that `read_actionformer` left out."""
    return (
        f"note: {len(dropped)} segments of {path} left out, as ActionFormer does (shorter than "
        f"{REPEATED:g} s, or repeated within it): {dropped[0].what}" + (", ..." if len(dropped) > 1 else "")
    )


def read_videos(path: str | Path) -> dict[str, VideoInfo]:
    """All videos of ActionFormer's dataset file by name; raises like `read_actionformer`."""
    return {name: _of_video(path, _video_info, name, video) for name, video in _read_database(path).items()}


def _read_database(path: str | Path) -> dict[str, dict[str, Any]]:
    try:
        database = parse_json(Path(path).read_text(encoding="utf-8"))["database"]
        return dict(database.items())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a dataset file of ActionFormer (JSON with `database`): {error!r}"
        ) from None


def _of_video(path: str | Path, read: Callable[[str, Any], _T], name: str, video: Any) -> _T:
    try:
        return read(name, video)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path}: not a dataset file of ActionFormer: video {name!r}: {error!r}") from None


def _video_info(name: str, video: dict[str, Any]) -> VideoInfo:
    info = VideoInfo(str(video["subset"]), float(video["duration"]), float(video["fps"]))
    if not (0 < info.duration < math.inf and 0 < info.fps < math.inf):
        raise InputError(
            f"video {name!r} has duration {info.duration} and fps {info.fps}; both must be above 0"
        )
    return info


def _segments(name: str, video: dict[str, Any]) -> tuple[list[Segment], list[Dropped]]:
    """The segments that stay, and the others."""
    video["subset"].lower()
    kept: dict[Any, list[Segment]] = defaultdict(list)
    found: list[Segment] = []
    dropped: list[Dropped] = []
    for one in video["annotations"]:
        start, end, label = float(one["segment"][0]), float(one["segment"][1]), one["label"]
        said = f"{name!r}, {label!r} from {start:.10g} to {end:.10g} s"
        if 0 <= end - start < REPEATED:
            dropped.append(Dropped(name, f"{said} is shorter than {REPEATED:g} s"))
        elif any(abs(start - o.start) <= REPEATED and abs(end - o.end) <= REPEATED for o in kept[label]):
            dropped.append(Dropped(name, f"{said} comes twice"))
        else:
            found.append(Segment(name, start, end, label))
            kept[label].append(found[-1])
    return found, dropped


# --- detections ---------------------------------------------------------------------------------------------


def write_detections(path: str | Path, found: Sequence[Segment]) -> None:
    """Write ActivityNet's JSON of results: `results` {video: [{label, score, segment}]}, highest score
    first."""
    results: dict[str, list[dict[str, Any]]] = {}
    for one in sorted(found, key=lambda segment: -segment.score):
        line = {"label": one.label, "score": one.score, "segment": [one.start, one.end]}
        results.setdefault(one.video, []).append(line)
    text = json.dumps({"version": "vmae", "results": results, "external_data": {}}, indent=1) + "\n"
    write_atomically(Path(path), lambda file: file.write(text), binary=False)
