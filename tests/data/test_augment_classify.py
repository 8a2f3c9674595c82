"""Augmentation for classification: the published operations and strengths, and nothing random but by its generator."""

import numpy as np
import pytest
import torch

from vmae.data.augment_classify import (
    OPERATIONS,
    AugmentConfig,
    draw_mixing,
    draw_operations,
    erase_box,
    mix_clips,
    mix_targets,
    rand_augment,
    sample_resized_crop,
)
from vmae.errors import InputError


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(frames=3, height=20, width=28, seed=1):
    return rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_published_settings():
    config = AugmentConfig()
    assert (config.operations, config.magnitude, config.magnitude_std) == (4, 7, 0.5)  # rand-m7-n4-mstd0.5-inc1
    assert (config.erase, config.mixup, config.cutmix, config.smoothing, config.flip) == (0.25, 0.8, 1.0, 0.1, True)
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_shape_and_changes_something(name):
    from PIL import Image

    frame = Image.fromarray(noise()[0])
    for share in (0.0, 0.7, 1.0):
        changed = OPERATIONS[name](share, rng())(frame)
        assert changed.size == frame.size and changed.mode == "RGB"
    if name != "auto_contrast":  # full-range noise is at its widest already
        assert not np.array_equal(np.asarray(OPERATIONS[name](0.7, rng())(frame)), np.asarray(frame))


def test_strengths_at_the_published_magnitude():
    from PIL import Image

    flat = Image.fromarray(np.full((4, 4, 3), 100, np.uint8))
    brightness = {int(np.asarray(OPERATIONS["brightness"](0.7, rng(seed))(flat))[0, 0, 0]) for seed in range(20)}
    assert brightness == {163, 37}  # 1 + and - 0.63
    assert np.asarray(OPERATIONS["posterize"](0.7, rng())(flat))[0, 0, 0] == 0b01000000  # 2 bits stay
    assert np.asarray(OPERATIONS["solarize"](0.7, rng())(flat))[0, 0, 0] == 155  # above 77
    assert np.asarray(OPERATIONS["solarize_add"](0.7, rng())(flat))[0, 0, 0] == 177


def test_operations_are_drawn_once_for_a_clip():
    frame = noise(1)
    clip = np.repeat(frame, 3, 0)
    for seed in range(10):
        changed = rand_augment(clip, AugmentConfig(), rng(seed))
        assert np.array_equal(changed[0], changed[1]) and np.array_equal(changed[1], changed[2])
    assert np.array_equal(rand_augment(clip, AugmentConfig(), rng(5)), rand_augment(clip, AugmentConfig(), rng(5)))


def test_half_of_the_operations_are_applied():
    counts = [len(draw_operations(AugmentConfig(), rng(seed))) for seed in range(2000)]
    assert max(counts) == 4 and 1.9 < np.mean(counts) < 2.1
    assert draw_operations(AugmentConfig(operations=0), rng()) == []


def test_resized_crops_lie_inside_and_vary():
    boxes = [sample_resized_crop(60, 40, rng(seed)) for seed in range(500)]
    assert all(0 <= b.left and b.left + b.width <= 60 and 0 <= b.top and b.top + b.height <= 40 for b in boxes)
    areas = np.array([b.width * b.height / 2400 for b in boxes])
    ratios = np.array([b.width / b.height for b in boxes])
    assert 0.07 < areas.min() < 0.12 and areas.max() > 0.8 and ratios.min() > 0.65 and ratios.max() < 1.5
    narrow = sample_resized_crop(400, 4, rng(), area=(0.9, 1.0))  # nothing of the ratio fits: the middle
    assert narrow == (197, 0, 5, 4)


def test_erasing():
    clip = np.zeros((2, 20, 28, 3), np.uint8)
    assert erase_box(clip, 0.0, rng()) is clip
    erased = erase_box(clip, 1.0, rng(3))
    assert not clip.any()
    touched = erased.any(3)
    rows, columns = np.flatnonzero(touched.any((0, 2))), np.flatnonzero(touched.any((0, 1)))
    box = erased[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert 0.02 * 560 * 0.8 < box[0, ..., 0].size < 560 / 3 * 1.2
    assert not np.array_equal(box[0], box[1])  # noise of its own in each frame, in the same box
    shares = [erase_box(clip, 0.25, rng(seed)) is not clip for seed in range(1000)]
    assert 0.2 < np.mean(shares) < 0.3


KEYS = [(0, 3), (0, 7), (2, 1), (2, 5)]


def batch(videos=4, num_sample=1, seed=0):
    clips = torch.from_numpy(rng(seed).integers(0, 256, (videos * num_sample, 2, 8, 10, 3), dtype=np.uint8))
    targets = torch.eye(videos).repeat_interleave(num_sample, 0)
    return clips, targets


def test_mixup_of_partners():
    clips, targets = batch()
    config = AugmentConfig(cutmix=0.0, smoothing=0.0)
    mixing = draw_mixing(KEYS, 1, (8, 10), config, seed=1)
    assert mixing.partner.tolist() == [1, 0, 3, 2]
    weight = mixing.weight
    assert weight[0] == weight[1] != weight[2] == weight[3]
    expected = weight.view(-1, 1, 1, 1, 1) * clips + (1 - weight.view(-1, 1, 1, 1, 1)) * clips[[1, 0, 3, 2]]
    assert (mix_clips(clips, mixing).float() - expected).abs().max() <= 0.5 + 1e-4
    mixed = mix_targets(targets, mixing, 0.0)
    assert mixed[0].tolist() == pytest.approx([float(weight[0]), 1 - float(weight[0]), 0, 0])


def test_cutmix_counts_its_pixels():
    clips, targets = batch()
    for seed in range(8):
        mixing = draw_mixing(KEYS, 1, (8, 10), AugmentConfig(mixup=0.0), seed)
        mixed = mix_clips(clips, mixing)
        for i in range(4):
            box = mixing.boxes[i]
            foreign = box.width * box.height / 80
            assert mixing.weight[i] == pytest.approx(1 - foreign)
            inside = (slice(None), slice(box.top, box.top + box.height), slice(box.left, box.left + box.width))
            assert torch.equal(mixed[i][inside], clips[i ^ 1][inside])
            kept = mixed[i].clone()
            kept[inside] = clips[i][inside]
            assert torch.equal(kept, clips[i])


def test_one_of_the_two_for_each_pair():
    kinds = [draw_mixing([(0, n), (0, n + 1)], 1, (8, 10), AugmentConfig(), 0).boxes[0] is None for n in range(400)]
    assert 0.42 < np.mean(kinds) < 0.58


def test_mixing_does_not_depend_on_the_split():
    """A batch over two ranks, or in two micro-batches, is mixed as it is in one."""
    clips, targets = batch(num_sample=2)
    whole = draw_mixing(KEYS, 2, (8, 10), AugmentConfig(), seed=5)
    parts = [draw_mixing(KEYS[i : i + 2], 2, (8, 10), AugmentConfig(), seed=5) for i in (0, 2)]
    split = [mix_clips(part, mixing) for part, mixing in zip(clips.split(4), parts)]
    assert torch.equal(mix_clips(clips, whole), torch.cat(split))
    labels = [mix_targets(part, mixing, 0.1) for part, mixing in zip(targets.split(4), parts)]
    assert torch.equal(mix_targets(targets, whole, 0.1), torch.cat(labels))


def test_an_odd_last_video_is_not_mixed():
    clips, targets = batch(3)
    mixing = draw_mixing(KEYS[:3], 1, (8, 10), AugmentConfig(), seed=0)
    assert torch.equal(mix_clips(clips, mixing)[2], clips[2])
    assert mix_targets(targets, mixing, 0.0)[2].tolist() == [0, 0, 1]


def test_smoothing():
    targets = torch.eye(4)[:1]
    assert mix_targets(targets, None, 0.1)[0].tolist() == pytest.approx([0.925, 0.025, 0.025, 0.025])
    assert draw_mixing(KEYS, 1, (8, 10), AugmentConfig.none(), 0) is None


@pytest.mark.parametrize(
    "change", [dict(magnitude=11), dict(erase=2.0), dict(mixup=-1.0), dict(smoothing=1.0), dict(operations=-1)]
)
def test_bad_settings(change):
    with pytest.raises(InputError):
        AugmentConfig(**change)
