"""Which frames of a video make a clip: the published temporal sampling (VideoMAE V2, section 4 and its released code).

Published: a clip spans `num_frames * stride` frames. A video that is long enough gives every start the same chance. A
shorter one starts at its first frame, and the walk stops moving on just before its end, so a late frame repeats. As in
the published code, the walk never steps onto a video's last frame.

Beside it, `exact`: every frame of the video can be met, and any real stride is kept (frame `start + floor(k * stride)`),
so that a clip of given frames a second is one of stride `video fps / wanted fps`. A shorter video repeats its last frame.
"""

from __future__ import annotations

import numpy as np

from vmae.errors import InputError

SAMPLINGS = ("published", "exact", "fps")


def clip_starts(total: int, num_frames: int, stride: int) -> range:
    """The first frames, from 0, that a clip can have; all equally likely, never empty.

    Raises:
        InputError: a video of 0 frames, or `num_frames` or `stride` below 1.
    """
    if total < 1:
        raise InputError(f"cannot sample a clip from a video of {total} frames")
    if num_frames < 1 or stride < 1:
        raise InputError(f"cannot sample {num_frames} frames with stride {stride}: both must be at least 1")
    return range(max(total - num_frames * stride + 1, 1))


def walk_frames(start: int, total: int, num_frames: int, stride: int) -> np.ndarray:
    """int64 [num_frames]: `start`, `start + stride`, ..., staying where the next step would reach the last frame."""
    steps = max((total - 2 - start) // stride, 0)
    return start + stride * np.minimum(np.arange(num_frames, dtype=np.int64), steps)


def sample_frame_indices(total: int, num_frames: int, stride: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the frames of a clip.

    Args:
        total: frames of the video.
        num_frames: frames of the clip.
        stride: frames from one to the next.

    Returns:
        int64 [num_frames], ascending, from 0; with repetitions when the video is short.

    Raises:
        InputError: see `clip_starts`.
    """
    starts = clip_starts(total, num_frames, stride)
    return walk_frames(int(rng.integers(len(starts))), total, num_frames, stride)


def exact_starts(total: int, num_frames: int, stride: float) -> range:
    """The first frames that a clip of exact stride can have; all equally likely, never empty.

    Raises:
        InputError: a video of 0 frames, `num_frames` below 1, or a stride not above 0.
    """
    if total < 1:
        raise InputError(f"cannot sample a clip from a video of {total} frames")
    if num_frames < 1 or not 0 < stride < float("inf"):
        raise InputError(f"cannot sample {num_frames} frames with stride {stride}")
    return range(max(total - int((num_frames - 1) * stride), 1))


def sample_exact_indices(total: int, num_frames: int, stride: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the frames of a clip with an exact stride, which may be below 1 (frames then repeat).

    Returns:
        int64 [num_frames], ascending, from 0; the last frame is repeated where the video ends early.

    Raises:
        InputError: see `exact_starts`.
    """
    starts = exact_starts(total, num_frames, stride)
    steps = np.floor(np.arange(num_frames) * stride).astype(np.int64)
    return np.minimum(int(rng.integers(len(starts))) + steps, total - 1)
