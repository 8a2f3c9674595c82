"""Average precision, for videos with several labels: of validations while a run trains, and of tests."""

from __future__ import annotations

import numpy as np

from vmae.errors import InputError


def mean_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean of `average_precision` over the classes that have positives; equals scikit-learn's
    `average_precision_score` with `average="macro"`.

    Args:
        scores: float [videos, K].
        truth: bool [videos, K].

    Raises:
        InputError: a score is NaN, or no class has a positive.
    """
    positive = np.flatnonzero(truth.any(0))
    if not len(positive):
        raise InputError("no class has a positive: there is no average precision")
    return float(np.mean([average_precision(scores[:, k], truth[:, k]) for k in positive]))


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Average precision of one class: over all groups of equal scores, the sum of the precision at the end of
    the group times the group's share of the positives.

    The result does not depend on the order of the videos. A constant score gives the share of positives.

    Args:
        scores: float [videos].
        truth: bool [videos], at least one True.

    Raises:
        InputError: a score is NaN.
    """
    if np.isnan(scores).any():
        raise InputError(f"the score of video {int(np.isnan(scores).argmax())} is not a number (NaN)")
    order = np.argsort(-scores, kind="stable")
    ends = ends_of_ties(scores[order])
    found = np.cumsum(truth[order])[ends]
    return float((np.diff(found, prepend=0) * found / (ends + 1)).sum() / found[-1])


def ends_of_ties(ordered: np.ndarray) -> np.ndarray:
    """Index of the last element of each group of equal numbers in a sorted array, int64 [groups]."""
    if not len(ordered):
        return np.empty(0, np.int64)
    return np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
