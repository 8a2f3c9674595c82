"""Scores of predictions: accuracy, mean average precision, a table by class, and the confusion matrix."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vmae.errors import InputError
from vmae.evaluate.views import NO_NUMBERS
from vmae.files.atomic import write_atomically
from vmae.train.average_precision import average_precision, ends_of_ties, mean_average_precision

__all__ = [
    "TOP",
    "Record",
    "average_precision",
    "class_table",
    "confusion",
    "draw_confusion",
    "ends_of_ties",
    "mean_average_precision",
    "score",
    "write_table",
]

TOP = 5  # best classes stored with each prediction
Record = dict[str, Any]


def score(records: Sequence[Record], labels: Sequence[tuple[int, ...]], num_classes: int) -> dict[str, Any]:
    """Scores in percent, over the videos that could be decoded.

    Args:
        records: one for each video: `video` (its index), `top` ([class, probability] pairs, best first), and
            `scores` [K] for videos with several labels; or `error` for a video that could not be decoded.
        labels: labels of each video.

    Returns:
        `videos`, `undecodable` (counts), `top1`, `top5`, `mean_class_accuracy` (mean over the classes that
        have videos). With several labels, a prediction is correct if it is one of them, and
        `mean_average_precision` is the mean over the classes that have videos.

    Raises:
        InputError: a probability is NaN; the message names the video.
    """
    good = [record for record in records if "error" not in record]
    for record in good:
        if np.isnan([p for _, p in record["top"]] + record.get("scores", [])).any():
            raise InputError(
                f"the prediction of {record.get('path', record['video'])} is not a number (NaN); {NO_NUMBERS}"
            )
    found: dict[str, Any] = {"videos": len(good), "undecodable": len(records) - len(good)}
    if not good:
        return found
    hits = [[number in labels[record["video"]] for number, _ in record["top"]] for record in good]
    found["top1"] = 100 * float(np.mean([hit[0] for hit in hits]))
    found["top5"] = 100 * float(np.mean([any(hit[:TOP]) for hit in hits]))
    matrix = confusion(good, labels, num_classes)
    counts = matrix.sum(1)
    found["mean_class_accuracy"] = 100 * float((matrix.diagonal()[counts > 0] / counts[counts > 0]).mean())
    if all("scores" in record for record in good):
        scores = np.array([record["scores"] for record in good])
        truth = np.zeros_like(scores, dtype=bool)
        for row, record in zip(truth, good, strict=True):
            row[list(labels[record["video"]])] = True
        found["mean_average_precision"] = 100 * mean_average_precision(scores, truth)
    return found


def confusion(records: Sequence[Record], labels: Sequence[tuple[int, ...]], num_classes: int) -> np.ndarray:
    """Confusion matrix, int64 [K, K]: number of videos by (label, predicted class).

    A video with several labels counts in the row of the predicted class if that is one of its labels, else in
    the row of its first label.
    """
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for record in records:
        if "error" not in record:
            (predicted, _), *_ = record["top"]
            own = labels[record["video"]]
            label = predicted if predicted in own else own[0]
            matrix[label, predicted] += 1
    return matrix


def class_table(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class that has videos: number, name, videos, accuracy in percent, and the class that it
    is most often mistaken for (`taken_for`)."""
    rows = []
    for number in np.flatnonzero(matrix.sum(1)).tolist():
        row = matrix[number].copy()
        videos, right = int(row.sum()), int(row[number])
        row[number] = 0
        other = int(row.argmax())
        mistaken = f"{names[other]} ({row[other]})" if row[other] else ""
        about = {"class": number, "name": names[number], "videos": videos}
        rows.append({**about, "accuracy": 100 * right / videos, "taken_for": mistaken})
    return rows


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as a CSV file.

    Raises:
        InputError: the file can't be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "accuracy": f"{row['accuracy']:.2f}"} for row in rows)
    write_atomically(path, lambda file: file.write(text.getvalue()), binary=False)


def draw_confusion(path: Path, matrix: np.ndarray, names: Sequence[str]) -> None:
    """Write a PNG of the confusion matrix, each row as shares of its label's videos; with class names up to
    60 classes.

    Raises:
        InputError: the file can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = min(max(4.0, 0.28 * count), 16.0)
    figure, axes = pyplot.subplots(figsize=(size + 1.5, size), layout="constrained")
    image = axes.imshow(shares, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="label", title=f"{int(matrix.sum())} videos, {count} classes")
    if count <= 60:
        axes.set_xticks(range(count), names, rotation=90, fontsize=7)
        axes.set_yticks(range(count), names, fontsize=7)
    figure.colorbar(image, ax=axes, label="share of the label's videos", shrink=0.7)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        pyplot.close(figure)
