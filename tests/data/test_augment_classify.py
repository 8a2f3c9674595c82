"""Augmentation for classification: the published operations and strengths, and nothing random but by its
generator."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    assert (config.operations, config.magnitude, config.magnitude_std) == (
        4,
        7,
        0.5,
    )  # rand-m7-n4-mstd0.5-inc1
    assert (config.erase, config.mixup, config.cutmix, config.smoothing, config.flip) == (
        0.25,
        0.8,
        1.0,
        0.1,
        True,
    )
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
    brightness = {
        int(np.asarray(OPERATIONS["brightness"](0.7, rng(seed))(flat))[0, 0, 0]) for seed in range(20)
    }
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
    assert np.array_equal(
        rand_augment(clip, AugmentConfig(), rng(5)), rand_augment(clip, AugmentConfig(), rng(5))
    )


def test_half_of_the_operations_are_applied():
    counts = [len(draw_operations(AugmentConfig(), rng(seed))) for seed in range(2000)]
    assert max(counts) == 4 and 1.9 < np.mean(counts) < 2.1
    assert draw_operations(AugmentConfig(operations=0), rng()) == []


def test_resized_crops_lie_inside_and_vary():
    boxes = [sample_resized_crop(60, 40, rng(seed)) for seed in range(500)]
    assert all(
        0 <= b.left and b.left + b.width <= 60 and 0 <= b.top and b.top + b.height <= 40 for b in boxes
    )
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


KEY, SIZE = (2, 5), (8, 10)


def batch(videos=4, num_sample=1, seed=0):
    clips = torch.from_numpy(rng(seed).integers(0, 256, (videos * num_sample, 2, *SIZE, 3), dtype=np.uint8))
    targets = torch.eye(videos).repeat_interleave(num_sample, 0)
    return clips, targets


def published(clips, targets, weight, box):
    """Mixup in batch mode (timm 0.4.12, engine_for_finetuning.py) from its formula: x * lam + flip(x) * (1 -
    lam)."""
    if box is None:
        mixed = weight * clips.float() + (1 - weight) * clips.flip(0).float()
    else:
        inside = (
            ...,
            slice(box.top, box.top + box.height),
            slice(box.left, box.left + box.width),
            slice(None),
        )
        mixed = clips.float()
        mixed[inside] = clips.flip(0)[inside].float()
        assert weight == pytest.approx(1 - box.width * box.height / (SIZE[0] * SIZE[1]))
    return mixed, weight * targets + (1 - weight) * targets.flip(0)


@pytest.mark.parametrize("videos, num_sample", [(4, 1), (3, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", [dict(cutmix=0.0), dict(mixup=0.0)], ids=["mixup", "cutmix"])
def test_all_clips_of_a_micro_batch_are_mixed_as_published(videos, num_sample, kind):
    """ViT-g's 3 videos of 2 clips a GPU, and 1 video, too."""
    clips, targets = batch(videos, num_sample)
    for seed in range(4):
        mixing = draw_mixing(KEY, SIZE, AugmentConfig(**kind), seed)
        assert (mixing.box is None) == ("cutmix" in kind)
        expected, labels = published(clips, targets, mixing.weight, mixing.box)
        assert (mix_clips(clips, mixing).float() - expected).abs().max() <= 0.5 + 1e-4
        torch.testing.assert_close(mix_targets(targets, mixing, 0.0), labels)


@pytest.mark.parametrize("count", [3, 5, 9])
def test_the_middle_clip_of_an_odd_count_is_mixed_with_the_first(count):
    """The published formula would mix it with itself; the others are mixed as published."""
    clips, targets = batch(count)
    mixing = draw_mixing(KEY, SIZE, AugmentConfig(cutmix=0.0), seed=1)
    middle, own = count // 2, mixing.weight
    expected, labels = published(clips, targets, own, None)
    expected[middle] = own * clips[middle].float() + (1 - own) * clips[0].float()
    labels[middle] = own * targets[middle] + (1 - own) * targets[0]
    assert (mix_clips(clips, mixing).float() - expected).abs().max() <= 0.5 + 1e-4
    torch.testing.assert_close(mix_targets(targets, mixing, 0.0), labels)
    assert all(not torch.equal(mixed, clip) for mixed, clip in zip(mix_clips(clips, mixing), clips))


def test_a_single_clip_has_no_partner():
    clips, targets = batch(1)
    for config in (AugmentConfig(mixup=0.0), AugmentConfig(cutmix=0.0)):
        mixing = draw_mixing(KEY, SIZE, config, seed=0)
        assert torch.equal(mix_clips(clips, mixing), clips) and torch.equal(
            mix_targets(targets, mixing, 0.0), targets
        )


class NoHostTensor(TorchDispatchMode):
    """Raises where an operation reads a tensor of the host: on a GPU, a copy that the host waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "meta" for x in read), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [dict(cutmix=0.0), dict(mixup=0.0)], ids=["mixup", "cutmix"])
@pytest.mark.parametrize("count", [4, 5])
def test_mixing_copies_nothing_from_the_host(count, kind):
    clips, targets = (x.to("meta") for x in batch(count))
    mixing = draw_mixing(KEY, SIZE, AugmentConfig(**kind), seed=0)
    with NoHostTensor():
        assert mix_clips(clips, mixing).shape == clips.shape
        assert mix_targets(targets, mixing, 0.1).shape == targets.shape


def test_one_of_the_two_for_each_micro_batch():
    draws = [draw_mixing((0, n), SIZE, AugmentConfig(), 0) for n in range(400)]
    assert 0.42 < np.mean([draw.box is None for draw in draws]) < 0.58
    assert len({draw.weight for draw in draws}) > 100


def test_mixing_is_a_function_of_the_seed_and_the_micro_batch():
    draws = [
        draw_mixing(key, SIZE, AugmentConfig(), seed)
        for key, seed in ((KEY, 5), (KEY, 5), (KEY, 6), ((2, 6), 5))
    ]
    drawn = [(draw.weight, draw.box) for draw in draws]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


def test_smoothing():
    targets = torch.eye(4)[:1]
    assert mix_targets(targets, None, 0.1)[0].tolist() == pytest.approx([0.925, 0.025, 0.025, 0.025])
    assert draw_mixing(KEY, SIZE, AugmentConfig.none(), 0) is None


@pytest.mark.parametrize(
    "change",
    [dict(magnitude=11), dict(erase=2.0), dict(mixup=-1.0), dict(smoothing=1.0), dict(operations=-1)],
)
def test_bad_settings(change):
    with pytest.raises(InputError):
        AugmentConfig(**change)
