"""Temporal sampling against the rule written out step by step, and its statistics."""

import numpy as np
import pytest

from vmae.data.sampling import (
    clip_starts,
    exact_starts,
    sample_exact_indices,
    sample_frame_indices,
    walk_frames,
)
from vmae.errors import InputError


def published_rule(total, num_frames, stride):
    """Every clip that the published sampling can draw: lists of frame ids, by 1-based offsets as it counts
    them."""
    span = num_frames * stride
    choices = total - span + 1
    offsets = [draw + 1 for draw in range(choices)] if choices > 0 else [1]
    clips = []
    for offset in offsets:
        ids = []
        for _ in range(num_frames):
            ids.append(offset - 1)
            if offset + stride < total:
                offset += stride
        clips.append(ids)
    return clips


# 16 x 4 is the published setting; 16 x 2 the one for Something-Something; the others reach every branch: one
# frame, a stride longer than the video, a span of exactly the video. Totals run from 1 past twice the span.
@pytest.mark.parametrize(
    ("num_frames", "stride"), [(16, 4), (16, 2), (16, 1), (8, 8), (4, 3), (2, 7), (1, 1), (1, 5)]
)
def test_every_clip_of_the_published_rule(num_frames, stride):
    for total in range(1, 2 * num_frames * stride + 3):
        starts = clip_starts(total, num_frames, stride)
        clips = [walk_frames(start, total, num_frames, stride).tolist() for start in starts]
        assert clips == published_rule(total, num_frames, stride), total


@pytest.mark.parametrize("total", [1, 5, 63, 64, 66, 70])
def test_draws_are_the_rules_clips_all_equally_likely(total):
    rng = np.random.default_rng(0)
    expected = published_rule(total, 16, 4)
    draws = [tuple(sample_frame_indices(total, 16, 4, rng)) for _ in range(300 * len(expected))]
    counts = [draws.count(tuple(clip)) for clip in expected]
    assert sum(counts) == len(draws)
    assert min(counts) > 200 and max(counts) < 400  # 300 expected, deviation at most 17: six of them


def test_type_and_determinism():
    first, again = (sample_frame_indices(1000, 16, 4, np.random.default_rng(7)) for _ in range(2))
    assert first.dtype == np.int64 and first.shape == (16,)
    assert np.array_equal(first, again)
    assert np.array_equal(np.diff(first), np.full(15, 4))


def test_short_videos_repeat_a_late_frame():
    rng = np.random.default_rng(0)
    assert sample_frame_indices(1, 4, 4, rng).tolist() == [0, 0, 0, 0]
    assert sample_frame_indices(6, 4, 2, rng).tolist() == [0, 2, 4, 4]
    assert sample_frame_indices(5, 4, 2, rng).tolist() == [
        0,
        2,
        2,
        2,
    ]  # frame 4 is the last: never stepped onto


@pytest.mark.parametrize("arguments", [(0, 16, 4), (-1, 16, 4), (100, 0, 4), (100, 16, 0)])
def test_nothing_to_sample(arguments):
    with pytest.raises(InputError):
        sample_frame_indices(*arguments, np.random.default_rng(0))


# A span that fits with room, exactly, and not; strides that are no whole numbers, also below one.
@pytest.mark.parametrize(
    ("total", "num_frames", "stride"),
    [(100, 16, 4), (61, 16, 4), (60, 16, 4), (1, 4, 3), (100, 16, 2.4), (20, 8, 0.5)],
)
def test_exact_stride(total, num_frames, stride):
    starts = exact_starts(total, num_frames, stride)
    span = int((num_frames - 1) * stride)
    assert len(starts) == max(total - span, 1)
    rng = np.random.default_rng(0)
    clips = [sample_exact_indices(total, num_frames, stride, rng) for _ in range(50 * len(starts))]
    assert {int(clip[0]) for clip in clips} == set(starts)
    for clip in clips:
        assert clip.dtype == np.int64
        expected = [min(int(clip[0]) + int(k * stride), total - 1) for k in range(num_frames)]
        assert clip.tolist() == expected
    if total > span:
        assert max(clip[-1] for clip in clips) == total - 1  # the last frame can be met


@pytest.mark.parametrize("arguments", [(0, 16, 4), (100, 0, 4), (100, 16, 0), (100, 16, float("inf"))])
def test_nothing_to_sample_exactly(arguments):
    with pytest.raises(InputError):
        sample_exact_indices(*arguments, np.random.default_rng(0))
