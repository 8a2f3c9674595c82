"""Augmentation for classification: the published operations and strengths, and nothing random but by its
generator."""

import argparse

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vmae.data.augment_classify import (
    OPERATIONS,
    AugmentConfig,
    Mixing,
    RandAugmentText,
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


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_what_an_erased_box_is_filled_with(mode):
    """Published values, in the normalised clip: noise, a colour for each frame and box, or 0."""
    erased = erase_box(np.zeros((3, 40, 40, 3), np.uint8), 1.0, rng(3), mode=mode)
    rows, columns = np.flatnonzero(erased.any((0, 2, 3))), np.flatnonzero(erased.any((0, 1, 3)))
    box = erased[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].reshape(3, -1, 3)
    colours = [len(np.unique(frame, axis=0)) for frame in box]
    if mode == "pixel":
        assert min(colours) > 50
    elif mode == "rand":
        assert colours == [1, 1, 1] and len(np.unique(box[:, 0], axis=0)) == 3
    else:
        assert np.unique(box.reshape(-1, 3), axis=0).tolist() == [[123, 116, 103]]  # 255 x the mean


def test_several_erased_boxes():
    """The area is shared out, and as published the first T // count frames stay clean."""
    clip = np.zeros((7, 60, 60, 3), np.uint8)
    areas = []
    for seed in range(300):
        erased = erase_box(clip, 1.0, rng(seed), mode="const", count=3)
        assert not erased[:2].any()
        assert np.array_equal(erased[2], erased[6])
        areas.append(erased[2, ..., 0].astype(bool).mean())
    assert max(areas) < 1 / 3 * 1.1 and 0.1 < np.mean(areas) < 0.19  # one box alone: 0.177 on average
    counts = {erase_box(clip, 1.0, rng(seed), count=1)[0].any() for seed in range(20)}
    assert counts == {True}  # with one box no frame stays clean


def test_a_box_for_each_of_the_numbers_up_to_the_count():
    """rand draws a colour for each box, so the colours of a frame count them (fewer where they overlap)."""
    seen = set()
    for seed in range(40):
        erased = erase_box(np.zeros((2, 90, 90, 3), np.uint8), 1.0, rng(seed), mode="rand", count=3)
        seen.add(len(np.unique(erased[1].reshape(-1, 3), axis=0)) - 1)
    assert seen == {1, 2, 3}


# --- RandAugment in the published words


def test_published_words_of_randaugment():
    """timm's `rand_augment_transform`: magnitude 10, 2 operations, no noise, the first set without a word."""
    settings = RandAugmentText.settings
    usual = AugmentConfig()
    assert settings("rand-m7-n4-mstd0.5-inc1") == {
        name: getattr(usual, name) for name in RandAugmentText.sets
    }
    assert settings("rand") == dict(operations=2, magnitude=10, magnitude_std=0, increasing=False)
    assert settings("rand-n3-inc0-m9-mstd1") == dict(
        operations=3, magnitude=9, magnitude_std=1, increasing=True
    )  # bool("0") is true there
    for off in ("", "None", "none"):
        assert settings(RandAugmentText()(off)) == {"operations": 0}


@pytest.mark.parametrize(
    "text",
    "v0 original originalr augmix augmix-m3 rand-w0 rand-m9-w0 rand-m11 rand-m7.5 rand-mstd rand- rand-m-n3 "
    "rand-p0.5 rand-mmax5 RAND-m7 rand-m-1 rand-mstdnan rand-n1e9 3a".split(),
)
def test_other_words_are_refused_by_name(text):
    with pytest.raises(
        argparse.ArgumentTypeError, match="unknown augmentation .* there is no v0, original"
    ) as told:
        RandAugmentText()(text)
    assert text in str(told.value)


def test_the_set_that_does_not_increase():
    """timm's first set at magnitude 7: enhancements by 1.36, 2 bits stay, solarised from 179 on."""
    from PIL import Image

    def level(name, share, value):
        flat = Image.fromarray(np.full((4, 4, 3), value, np.uint8))
        return int(np.asarray(OPERATIONS[name](share, rng(), increasing=False)(flat))[0, 0, 0])

    assert level("brightness", 0.7, 100) == 136 and level("brightness", 0.0, 100) == 10
    assert level("posterize", 0.7, 0b11111111) == 0b11000000 and level("posterize", 0.0, 255) == 0
    assert level("solarize", 0.7, 178) == 178 and level("solarize", 0.7, 180) == 75
    clip = noise(1)
    for seed in range(40):  # each of the three above is among the operations
        drawn = draw_operations(AugmentConfig(increasing=False, magnitude_std=0), rng(seed))
        if drawn and drawn[0][0] == "brightness":
            expected = np.clip(1.36 * clip[0].astype(float), 0, 255)
            assert np.abs(np.asarray(drawn[0][1](Image.fromarray(clip[0]))) - expected).max() <= 1
            return
    raise AssertionError("no brightness was drawn")


def test_interpolation_of_moved_frames():
    from PIL import Image

    frame, turn = Image.fromarray(noise(1)[0]), OPERATIONS["rotate"]

    def turned(resample):
        return np.asarray(frame.rotate(-21.0, resample, fillcolor=(128, 128, 128)))

    def drawn(interpolation, seed):
        config = AugmentConfig(operations=1, magnitude_std=0, interpolation=interpolation)
        own = rng(seed)
        operations = draw_operations(config, own)
        return operations if operations and operations[0][0] == "rotate" else None

    seed = next(seed for seed in range(500) if drawn("bicubic", seed))
    sign = -1 if np.array_equal(np.asarray(drawn("bicubic", seed)[0][1](frame)), turned(3)) else 1
    for name, resample in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        expected = np.asarray(frame.rotate(sign * 21.0, resample, fillcolor=(128, 128, 128)))
        assert np.array_equal(np.asarray(drawn(name, seed)[0][1](frame)), expected)
    operation = drawn("random", seed)[0][1]
    results = {np.asarray(operation(frame)).tobytes() for _ in range(20)}
    assert len(results) == 2  # either, drawn for each frame
    assert turn is OPERATIONS["rotate"]


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


# --- the other settings of timm's Mixup


def mixed_one_by_one(clips, targets, draws):
    """timm's `_mix_elem` from its definition: clip i with clip B - 1 - i as it was."""
    count, out, labels = len(clips), clips.float(), targets.clone()
    for i, draw in enumerate(draws):
        other = count - 1 - i
        if other == i:
            other = 0  # an odd count is an error there
        if draw.box is None:
            out[i] = clips[i].float() * draw.weight + clips[other].float() * (1 - draw.weight)
        else:
            left, top, width, height = draw.box
            out[i, :, top : top + height, left : left + width] = clips[
                other, :, top : top + height, left : left + width
            ].float()
            assert draw.weight == pytest.approx(1 - width * height / (SIZE[0] * SIZE[1]))
        labels[i] = targets[i] * draw.weight + targets[other] * (1 - draw.weight)
    return out, labels


@pytest.mark.parametrize("mode", ["elem", "pair"])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_draws_for_each_clip_or_each_pair(mode, count):
    clips, targets = batch(count)
    for seed in range(6):
        draws = draw_mixing(KEY, SIZE, AugmentConfig(mixup_mode=mode, mixup_prob=0.8), seed, count)
        assert len(draws) == count
        if mode == "pair":
            assert draws == draws[::-1]
        expected, labels = mixed_one_by_one(clips, targets, draws)
        assert (mix_clips(clips, draws).float() - expected).abs().max() <= 0.5 + 1e-4
        torch.testing.assert_close(mix_targets(targets, draws, 0.0), labels)
        smooth = mix_targets(targets, draws, 0.1)
        torch.testing.assert_close(smooth, labels * 0.9 + 0.1 / count)  # timm: off s / K, on 1 - s + s / K
        torch.testing.assert_close(smooth.sum(1), torch.ones(count))


def test_clips_draw_for_themselves():
    draws = [
        draw for n in range(60) for draw in draw_mixing((0, n), SIZE, AugmentConfig(mixup_mode="elem"), 0, 8)
    ]
    assert 0.42 < np.mean([draw.box is None for draw in draws]) < 0.58
    assert len({draw.weight for draw in draws if draw.box is None}) > 200
    both = draw_mixing(KEY, SIZE, AugmentConfig(mixup_mode="elem"), 0, 8)
    assert both == draw_mixing(KEY, SIZE, AugmentConfig(mixup_mode="elem"), 0, 8) and both[0] != both[7]


def test_probability_of_mixing():
    config = AugmentConfig(mixup_prob=0.3)
    draws = [draw_mixing((0, n), SIZE, config, 0) for n in range(600)]
    assert 0.25 < np.mean([draw is not None for draw in draws]) < 0.35
    assert draw_mixing(KEY, SIZE, AugmentConfig(mixup_prob=0.0), 0) is None
    clips, targets = batch(2)
    none = draw_mixing(KEY, SIZE, AugmentConfig(mixup_prob=0.0, mixup_mode="elem"), 0, 2)
    assert none == [Mixing(1.0, None)] * 2
    assert torch.equal(mix_clips(clips, none), clips) and torch.equal(
        mix_targets(targets, none, 0.0), targets
    )


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_probability_of_cutmix(share):
    config = AugmentConfig(mixup_switch_prob=share)
    draws = [draw_mixing((0, n), SIZE, config, 0) for n in range(600)]
    assert abs(np.mean([draw.box is not None for draw in draws]) - share) < 0.05


def test_cutmix_between_two_shares():
    """timm: whole boxes inside the picture, each side between the shares, at any place; cutmix is on."""
    size = (40, 60)
    config = AugmentConfig(mixup=0.0, cutmix=0.0, cutmix_minmax=(0.25, 0.75))
    assert config.mixes
    draws = [draw_mixing((0, n), size, config, 0) for n in range(600)]
    heights, widths = ({getattr(draw.box, side) for draw in draws} for side in ("height", "width"))
    assert heights == set(range(10, 30)) and widths == set(range(15, 45))
    assert all(draw.box.top + draw.box.height < 40 and draw.box.left + draw.box.width < 60 for draw in draws)
    assert min(draw.box.left for draw in draws) == 0
    for draw in draws:
        assert draw.weight == pytest.approx(1 - draw.box.width * draw.box.height / 2400)
    on = [
        draw_mixing((0, n), size, AugmentConfig(cutmix=0.0, cutmix_minmax=(0.2, 0.8)), 0) for n in range(300)
    ]
    assert 0.4 < np.mean([draw.box is None for draw in on]) < 0.6


def test_shares_that_leave_no_box():
    for wrong in ((0.5, 0.5), (0.8, 0.2)):
        with pytest.raises(InputError, match="cutmix_minmax must be a smaller and a larger share"):
            AugmentConfig(cutmix_minmax=wrong)
    AugmentConfig(cutmix_minmax=(0.3, 0.35)).check_size((16, 16))
    with pytest.raises(InputError, match="cutmix_minmax 0.3 0.35 leaves no side for a box in 16 x 8 pixels"):
        AugmentConfig(cutmix_minmax=(0.3, 0.35)).check_size((16, 8))


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
    [dict(magnitude=11), dict(erase=2.0), dict(mixup=-1.0), dict(smoothing=1.0), dict(operations=-1)]
    + [dict(interpolation="lanczos"), dict(erase_mode="noise"), dict(erase_count=0), dict(mixup_mode="half")]
    + [dict(mixup_prob=1.1), dict(cutmix_minmax=(0.1, 1.5)), dict(mixup_switch_prob=-0.1)],
)
def test_bad_settings(change):
    with pytest.raises(InputError):
        AugmentConfig(**change)
