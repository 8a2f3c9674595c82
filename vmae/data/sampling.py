"""Which frames of a video make a clip: the published temporal sampling (VideoMAE V2, section 4 and its
released code).

Published: a clip spans `num_frames * stride` frames. A video that is long enough gives every start the same
chance. A shorter one starts at its first frame, and the walk stops moving on just before its end, so a late
frame repeats. As in the published code, the walk never steps onto a video's last frame.

Beside it, `exact`: every frame of the video can be met, and any real stride is kept (frame `start + floor(k *
stride)`), so that a clip of given frames a second is one of stride `video fps / wanted fps`. A shorter video
repeats its last frame.
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
    """int64 [num_frames]: `start`, `start + stride`, ..., staying where the next step would reach the last
    frame."""
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


# --- Fine-tuning and testing: the published dense (Kinetics) and sparse (Something-Something) sampling ---


def sample_dense_indices(
    total: int, num_frames: int, stride: int, rng: np.random.Generator | None
) -> np.ndarray:
    """Frames of a clip to fine-tune on, close together: `num_frames` spread over a span of `num_frames *
    stride` frames.

    As published: the frames divide the span evenly from its first to the one after its last (so a step is a
    little longer than the stride), and a short video repeats its last frame.

    Args:
        rng: draws the span's place; None takes the middle, to validate.

    Returns:
        int64 [num_frames], ascending, from 0.

    Raises:
        InputError: see `clip_starts`.
    """
    clip_starts(total, num_frames, stride)
    span = num_frames * stride
    if total <= span:
        moving = total // stride
        places = np.concatenate(
            [np.linspace(0, total, num=moving), np.full(num_frames - moving, float(total))]
        )
        return np.clip(places, 0, total - 1).astype(np.int64)
    end = (span + total) // 2 if rng is None else int(rng.integers(span, total))
    return np.clip(np.linspace(end - span, end, num=num_frames), end - span, end - 1).astype(np.int64)


def sample_sparse_indices(total: int, num_frames: int, rng: np.random.Generator | None) -> np.ndarray:
    """Frames of a clip to fine-tune on, one from each of `num_frames` equal parts of the video (TSN;
    published for SSv2).

    A video of fewer frames repeats its first.

    Args:
        rng: draws a frame of each part; None takes the middle ones, to validate.

    Returns:
        int64 [num_frames], ascending, from 0.

    Raises:
        InputError: see `clip_starts`.
    """
    clip_starts(total, num_frames, 1)
    part = total // num_frames
    if part == 0:
        return np.maximum(np.arange(num_frames, dtype=np.int64) - (num_frames - total), 0)
    places = part // 2 if rng is None else rng.integers(part, size=num_frames)
    return np.arange(num_frames, dtype=np.int64) * part + places


def dense_view_indices(total: int, num_frames: int, stride: int, segments: int) -> np.ndarray:
    """Frames of all test clips: every `stride`-th frame, `segments` windows of them spread from the first to
    the last.

    One segment is the middle window. A short video repeats its last frame.

    Returns:
        int64 [segments, num_frames].

    Raises:
        InputError: see `clip_starts`, or no segment.
    """
    clip_starts(total, num_frames, stride)
    _check_segments(segments)
    frames = np.arange(0, total, stride, dtype=np.int64)
    room = max(len(frames) - num_frames, 0)
    starts = [room // 2]
    if segments > 1:
        starts = [int(i * (room / (segments - 1))) for i in range(segments)]
    places = np.asarray(starts)[:, None] + np.arange(num_frames)
    return frames[np.minimum(places, len(frames) - 1)]


def sparse_view_indices(total: int, num_frames: int, segments: int) -> np.ndarray:
    """Frames of all test clips: the video in `num_frames` equal parts, clip k at k / `segments` of each.

    Returns:
        int64 [segments, num_frames].

    Raises:
        InputError: see `clip_starts`, or no segment.
    """
    clip_starts(total, num_frames, 1)
    _check_segments(segments)
    part = total / num_frames
    return np.array(
        [[int(k * part / segments + part * i) for i in range(num_frames)] for k in range(segments)], np.int64
    )


def _check_segments(segments: int) -> None:
    if segments < 1:
        raise InputError(f"a test needs at least 1 segment, not {segments}")


def permutation(count: int, rng: np.random.Generator) -> np.ndarray:
    """The numbers below `count` in the order of `rng.permutation(count)`, in half of its memory: int32 where
    they fit, else int64."""
    numbers = np.arange(count, dtype=np.int32 if count < 1 << 31 else np.int64)
    rng.shuffle(numbers)
    return numbers
