"""Augmentation for classification, as published: RandAugment, random resized crop, flip, random erasing,
mixup and cutmix.

RandAugment (Cubuk et al., 2020) is the published `rand-m7-n4-mstd0.5-inc1` of timm's set, drawn once for a
clip, or another one of that form. Its operations are Pillow's, as there. Kornia 0.9, the kept-up library
without torchvision, was tried: its RandAugment refuses to draw once for all frames of a clip, has no noise on
the magnitude, and needs Python 3.11.

Legend: B clips, T frames, H x W pixels, K classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vmae.config import IMAGENET_MEAN, IMAGENET_STD, _Checked
from vmae.data.augment import CropBox
from vmae.data.video_dataset import Purpose, numpy_rng
from vmae.errors import InputError
from vmae.settings import SHARE, SHARE_BELOW_1, OneOf, Real, Whole, setting

_TOP, _GREY = 10, (128, 128, 128)  # largest magnitude; what comes in where a picture is moved
_AREA, _RATIO = (0.08, 1.0), (0.75, 1.3333)  # of a random resized crop
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
_TRIES = 10
_ALPHA = Real(least=0, most=10_000)
Operation = Callable[[Image.Image], Image.Image]
Resample = Callable[[], Image.Resampling]  # asked once a frame


class RandAugmentText(OneOf):
    """RandAugment in the published words: `rand`, then, by dashes and in any order, `m` magnitude (10 without
    it), `n` operations (2), `mstd` deviation of the magnitude (0) and `inc1`, or `none`.

    As in the published code (timm's `rand_augment_transform`), `inc` with any digit, 0 too, takes the set of
    operations that change more at a larger magnitude, and a later part replaces an earlier one.
    """

    example = "rand-m7-n4-mstd0.5-inc1"
    sets = ("operations", "magnitude", "magnitude_std", "increasing")

    def __init__(self) -> None:
        super().__init__("augmentation", (self.example, "none"))

    @staticmethod
    def settings(text: str) -> dict[str, Any]:
        """Fields of `AugmentConfig`, those in `sets`; raises ValueError for a text that means none."""
        if text == "none":
            return {"operations": 0}
        kind, *parts = text.split("-")
        found = {"m": "10", "n": "2", "mstd": "0"}
        for part in parts:
            key, value = re.fullmatch(r"([a-z]+)(\d.*)", part).groups()  # type: ignore[union-attr]
            found[key] = value
        drawn = {"operations": int(found.pop("n")), "magnitude": float(int(found.pop("m")))}
        drawn |= {"magnitude_std": float(found.pop("mstd")), "increasing": found.pop("inc", None) is not None}
        if kind != "rand" or found:
            raise ValueError(text)
        return drawn

    def allows(self, value: Any) -> bool:
        try:
            AugmentConfig(**self.settings(value))
        except (AttributeError, TypeError, ValueError, InputError):
            return False
        return True

    def read(self, text: str) -> str:
        return "none" if text in ("", "None") else text

    def __str__(self) -> str:
        return (
            f"{self.example} (m up to {_TOP}, n operations, mstd, with inc1 or without), none; there is no "
            "v0, original, augmix or w0"
        )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(_Checked):
    """How clips to train on are changed; all of it changes results. The defaults are the published ones."""

    group = "augmentation (changes results)"

    operations: int = setting(
        4, "RandAugment operations of a clip, each with probability 0.5; 0: none", Whole(0, 100)
    )
    magnitude: float = setting(7.0, f"of RandAugment, 0 to {_TOP}", Real(least=0, most=_TOP))
    magnitude_std: float = setting(0.5, "of the normal noise on it", Real(least=0, most=_TOP))
    increasing: bool = setting(True, "RandAugment changes more at a larger magnitude, all operations")
    interpolation: str = setting(
        "bicubic",
        "of RandAugment's shears, shifts and turns: bicubic, bilinear, random (one of them for each frame)",
        OneOf("interpolation", ("bicubic", "bilinear", "random")),
        aliases=("--train_interpolation",),
    )
    crop: bool = setting(True, "random resized crop; else the whole frame is resized")
    flip: bool = setting(
        True, "mirror half of the clips; not where left and right mean something, as in SSv2"
    )
    erase: float = setting(0.25, "probability that a box of the clip is erased", SHARE, aliases=("--reprob",))
    erase_mode: str = setting(
        "pixel",
        "what a box is filled with: pixel (noise), rand (a colour for each frame), const (the mean colour)",
        OneOf("erasing mode", ("pixel", "rand", "const")),
        aliases=("--remode",),
    )
    erase_count: int = setting(
        1,
        "boxes at most; with 2 or more, the first 1/count of the frames stay clean, as published",
        Whole(1, 1000),
        aliases=("--recount",),
    )
    mixup: float = setting(0.8, "alpha of the Beta distribution; 0: off", _ALPHA)
    cutmix: float = setting(
        1.0, "alpha; 0: off. With mixup on too, each micro-batch gets one of them", _ALPHA
    )
    cutmix_minmax: tuple[float, float] | None = setting(
        None,
        "cutmix with boxes whose sides are this share of the picture's, from the first to the second",
        SHARE,
        aliases=("--cutmix_minmax",),
        unset="as cutmix draws them",
    )
    mixup_prob: float = setting(
        1.0, "probability of mixup or cutmix, where one is on", SHARE, aliases=("--mixup_prob",)
    )
    mixup_switch_prob: float = setting(
        0.5, "probability of cutmix, where both are on", SHARE, aliases=("--mixup_switch_prob",)
    )
    mixup_mode: str = setting(
        "batch",
        "draws: one for a micro-batch (batch), for each two clips (pair), for each clip (elem)",
        OneOf("mixing mode", ("batch", "pair", "elem")),
        aliases=("--mixup_mode",),
    )
    smoothing: float = setting(0.1, "share of a label that is spread over all classes", SHARE_BELOW_1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutmix_minmax is not None and not self.cutmix_minmax[0] < self.cutmix_minmax[1]:
            raise InputError(f"cutmix_minmax must be a smaller and a larger share, not {self.cutmix_minmax}")

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises InputError where no box of `cutmix_minmax` has whole pixels in a picture of this size."""
        low, high = self.cutmix_minmax or (0.0, 1.0)
        if any(int(side * low) >= int(side * high) for side in size):
            raise InputError(
                f"cutmix_minmax {low:g} {high:g} leaves no side for a box in {size[0]} x {size[1]} pixels: "
                "take shares that are further apart"
            )

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed."""
        return bool(self.mixup or self.cutmix or self.cutmix_minmax)

    @classmethod
    def none(cls, **changes) -> AugmentConfig:
        """No augmentation but `changes`."""
        off = dict(operations=0, crop=False, flip=False, erase=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0)
        return cls(**{**off, **changes})


# --- RandAugment ---


def _signed(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() > 0.5 else value


def _bicubic() -> Image.Resampling:
    return Image.Resampling.BICUBIC


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Resample) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample(), fillcolor=_GREY)


def _rotate(share: float, rng: np.random.Generator, *, resample: Resample = _bicubic) -> Operation:
    angle = _signed(share * 30, rng)
    return lambda image: image.rotate(angle, resample(), fillcolor=_GREY)


def _shear(
    share: float, rng: np.random.Generator, *, along_x: bool, resample: Resample = _bicubic
) -> Operation:
    slope = _signed(share * 0.3, rng)
    across, down = (slope, 0) if along_x else (0, slope)
    return lambda image: _affine(image, (1, across, 0, down, 1, 0), resample)


def _translate(
    share: float, rng: np.random.Generator, *, along_x: bool, resample: Resample = _bicubic
) -> Operation:
    part = _signed(share * 0.45, rng)
    if along_x:
        return lambda image: _affine(image, (1, 0, part * image.width, 0, 1, 0), resample)
    return lambda image: _affine(image, (1, 0, 0, 0, 1, part * image.height), resample)


def _enhance(share: float, rng: np.random.Generator, *, kind: type, increasing: bool = True) -> Operation:
    factor = 1 + _signed(share * 0.9, rng) if increasing else share * 1.8 + 0.1
    return lambda image: kind(image).enhance(factor)


def _posterize(share: float, rng: np.random.Generator, *, increasing: bool = True) -> Operation:
    # Bits; at one end all 8, which ImageOps.posterize refuses.
    lost = 4 + int(share * 4) if increasing else 8 - int(share * 4)
    table = [level >> lost << lost for level in range(256)] * 3
    return lambda image: image.point(table)


def _solarize(share: float, rng: np.random.Generator, *, increasing: bool = True) -> Operation:
    threshold = 256 - int(share * 256) if increasing else int(share * 256)
    return lambda image: ImageOps.solarize(image, threshold)


def _solarize_add(share: float, rng: np.random.Generator) -> Operation:
    table = [min(255, level + int(share * 110)) if level < 128 else level for level in range(256)] * 3
    return lambda image: image.point(table)


def _plain(share: float, rng: np.random.Generator, *, operation: Operation) -> Operation:
    return operation


# timm's "increasing" set: a larger magnitude is a larger change. (share of the largest magnitude, rng) ->
# operation.
OPERATIONS: dict[str, Callable[..., Operation]] = {
    "auto_contrast": partial(_plain, operation=ImageOps.autocontrast),
    "equalize": partial(_plain, operation=ImageOps.equalize),
    "invert": partial(_plain, operation=ImageOps.invert),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": partial(_enhance, kind=ImageEnhance.Color),
    "contrast": partial(_enhance, kind=ImageEnhance.Contrast),
    "brightness": partial(_enhance, kind=ImageEnhance.Brightness),
    "sharpness": partial(_enhance, kind=ImageEnhance.Sharpness),
    "shear_x": partial(_shear, along_x=True),
    "shear_y": partial(_shear, along_x=False),
    "translate_x": partial(_translate, along_x=True),
    "translate_y": partial(_translate, along_x=False),
}

_MOVING = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_SET_APART = ("posterize", "solarize", "color", "contrast", "brightness", "sharpness")


def _operation_options(config: AugmentConfig, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """What operations take beside the magnitude: those that move pixels how they interpolate, those of which
    timm has two sets which one."""
    either = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    resample: dict[str, Resample] = {
        "bicubic": _bicubic,
        "bilinear": lambda: either[0],
        "random": lambda: either[rng.integers(2)],
    }
    moving = dict.fromkeys(_MOVING, {"resample": resample[config.interpolation]})
    return moving | dict.fromkeys(_SET_APART, {"increasing": config.increasing})


def draw_operations(config: AugmentConfig, rng: np.random.Generator) -> list[tuple[str, Operation]]:
    """The operations of one clip, in order."""
    drawn, options = [], _operation_options(config, rng)
    for name in rng.choice(list(OPERATIONS), config.operations):
        applied, noise = rng.random() < 0.5, rng.normal()
        magnitude = min(max(config.magnitude + config.magnitude_std * noise, 0.0), _TOP)
        operation = OPERATIONS[name](magnitude / _TOP, rng, **options.get(name, {}))
        if applied:
            drawn.append((str(name), operation))
    return drawn


def rand_augment(frames: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """uint8 [T, H, W, 3] after the same drawn operations on every frame."""
    operations = draw_operations(config, rng)
    if not operations:
        return frames
    images = [Image.fromarray(frame) for frame in frames]
    for _, operation in operations:
        images = [operation(image) for image in images]
    return np.stack([np.asarray(image) for image in images])


# --- Boxes ---


def sample_resized_crop(
    width: int,
    height: int,
    rng: np.random.Generator,
    *,
    area: Sequence[float] = _AREA,
    ratio: Sequence[float] = _RATIO,
) -> CropBox:
    """A box of random area and width to height ratio (Szegedy et al., 2015); in the middle if ten draws do
    not fit."""
    for _ in range(_TRIES):
        size = rng.uniform(area[0], area[1]) * width * height
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int(rng.integers(width - box_width + 1)), int(rng.integers(height - box_height + 1))
            return CropBox(left, top, box_width, box_height)
    box_width = min(width, max(round(height * ratio[1]), 1))
    box_height = min(height, max(round(width / ratio[0]), 1))
    return CropBox((width - box_width) // 2, (height - box_height) // 2, box_width, box_height)


def erase_box(
    clip: np.ndarray, probability: float, rng: np.random.Generator, *, mode: str = "pixel", count: int = 1
) -> np.ndarray:
    """Random erasing (Zhong et al., 2020): boxes, the same in all frames, are filled with something else.

    Published: values in the normalised clip. Here they are pixels, cut to 0 to 255. With `count` above 1, the
    published code leaves the first T // count frames as they are (it hands the number of boxes on as that of
    timm's splits, of which the first stays clean), and so does this.

    Args:
        clip: uint8 [T, H, W, 3].
        mode: pixel (normal noise), rand (a normal colour for each frame and box), const (the mean colour).
        count: boxes at most; each has 1/n of the usual area where n are drawn.

    Returns:
        A copy, or `clip` itself where nothing is erased.
    """
    if rng.random() >= probability:
        return clip
    drawn = 1 if count == 1 else int(rng.integers(1, count + 1))
    first = len(clip) // count if count > 1 else 0
    for _ in range(drawn):
        box = _erased_box(clip.shape[2], clip.shape[1], drawn, rng)
        if box is not None:
            clip = clip.copy()
            rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
            clip[first:, rows, columns] = _filling(mode, len(clip) - first, box, rng)
    return clip


def _erased_box(width: int, height: int, boxes: int, rng: np.random.Generator) -> CropBox | None:
    """A box of random area, one of `boxes`; None if none of a hundred fits."""
    for _ in range(100):
        size = rng.uniform(*_ERASED_AREA) * width * height / boxes
        aspect = math.exp(rng.uniform(math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1])))
        box_height, box_width = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if 0 < box_width < width and 0 < box_height < height:
            top, left = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
            return CropBox(left, top, box_width, box_height)
    return None


def _filling(mode: str, frames: int, box: CropBox, rng: np.random.Generator) -> np.ndarray:
    """uint8 pixels for a box, [frames, height, width, 3], or 1 where all are the same."""
    shapes = {"pixel": (frames, box.height, box.width, 3), "rand": (frames, 1, 1, 3)}
    normal = np.zeros((1, 1, 1, 3), np.float32)
    if mode in shapes:
        normal = rng.standard_normal(shapes[mode], dtype=np.float32)
    std, mean = np.array(IMAGENET_STD, np.float32), np.array(IMAGENET_MEAN, np.float32)
    return np.clip(255 * (normal * std + mean), 0, 255).astype(np.uint8)


# --- Mixing clips and labels ---


@dataclass(frozen=True)
class Mixing:
    """How clips are mixed, each with a partner (`partners`).

    Attributes:
        weight: a clip's own share of its label, and of its pixels where all are mixed.
        box: the partner's pixels for cutmix; None where all pixels are mixed.
    """

    weight: float
    box: CropBox | None


def draw_mixing(
    key: tuple[int, int], size: tuple[int, int], config: AugmentConfig, seed: int, count: int = 1
) -> Mixing | list[Mixing] | None:
    """Mixup or cutmix for the clips of a micro-batch; None where the configuration has neither, or where by
    `mixup_prob` none is mixed.

    As published (timm's `Mixup`, on clips whose frames count as channels: a box is cut from all of them): one
    draw for the micro-batch, or by `mixup_mode` for each clip (elem), or for each clip and its partner
    together (pair).

    The draw is a function of the seed and the first video, so a run that goes on with the same micro-batches,
    on whatever ranks, mixes the same. Micro-batches of another size mix other clips.

    Args:
        key: (epoch, index) of the micro-batch's first video.
        size: (height, width) of the clips in pixels.
        count: clips of the micro-batch.

    Returns:
        One for all clips in batch mode, else one for each, of weight 1 where a clip stays as it is.
    """
    if not config.mixes:
        return None
    rng = numpy_rng(seed, *key, Purpose.MIXING)
    if config.mixup_mode == "batch":
        return _draw_one(config, size, rng)
    draws = count if config.mixup_mode == "elem" else (count + 1) // 2
    each = [_draw_one(config, size, rng) or Mixing(1.0, None) for _ in range(draws)]
    return each + each[: count - draws][::-1]


def _draw_one(config: AugmentConfig, size: tuple[int, int], rng: np.random.Generator) -> Mixing | None:
    """A box's share is that of the pixels inside the picture; None where nothing is mixed."""
    if config.mixup_prob < 1 and rng.random() >= config.mixup_prob:
        return None
    cutmix = 1.0 if config.cutmix_minmax else config.cutmix
    cut = cutmix > 0 and (config.mixup == 0 or rng.random() < config.mixup_switch_prob)
    alpha = cutmix if cut else config.mixup
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return Mixing(share, None)
    if config.cutmix_minmax:
        box = _box_between(config.cutmix_minmax, size, rng)
    else:
        box = _box_of_share(1 - share, size, rng)
    return Mixing(1 - box.width * box.height / (size[0] * size[1]), box)


def _box_of_share(share: float, size: tuple[int, int], rng: np.random.Generator) -> CropBox:
    """A box of this share of the picture's area, cut at the picture's edges."""
    height, width = size
    middle = (int(rng.integers(width)), int(rng.integers(height)))
    half = [int(side * math.sqrt(share)) // 2 for side in (width, height)]
    left, top = (max(m - h, 0) for m, h in zip(middle, half))
    right, bottom = (min(m + h, side) for m, h, side in zip(middle, half, (width, height)))
    return CropBox(left, top, right - left, bottom - top)


def _box_between(minmax: tuple[float, float], size: tuple[int, int], rng: np.random.Generator) -> CropBox:
    """A box inside the picture, each side a random share of the picture's between these two."""
    height, width = (int(rng.integers(int(side * minmax[0]), int(side * minmax[1]))) for side in size)
    top, left = int(rng.integers(size[0] - height)), int(rng.integers(size[1] - width))
    return CropBox(left, top, width, height)


def partners(rows: Tensor) -> Tensor:
    """[B, ...]: of each clip's row, the row of the clip that it is mixed with.

    Clip i goes with clip B - 1 - i, also one of the same video, as published. There an odd count is an error;
    here the clip in the middle, its own partner, takes the first one instead, so that none stays as it is; a
    single clip does. No index goes to the device.
    """
    turned, middle = rows.flip(0), len(rows) // 2
    if len(rows) % 2:
        turned[middle] = rows[0]
    return turned


def mix_clips(clips: Tensor, mixing: Mixing | list[Mixing]) -> Tensor:
    """[B, T, H, W, C] of clips mixed with their partners, in their dtype (rounded to whole levels)."""
    if isinstance(mixing, Mixing) and mixing.box is not None:
        mixed = clips.clone()
        inside = _pixels_of(mixing.box)
        mixed[inside] = partners(clips[inside])
        return mixed
    mixed = partners(clips)
    each = [mixing] * len(clips) if isinstance(mixing, Mixing) else mixing
    for own, other, draw in zip(
        clips, mixed, each
    ):  # one at a time: as float32 a clip is four times as large
        if draw.box is None:
            blended = torch.lerp(other.float(), own.float(), draw.weight)
            other.copy_(blended if other.is_floating_point() else blended.round_())
        else:
            inside = _pixels_of(draw.box)
            cut = other[inside].clone()
            other.copy_(own)
            other[inside] = cut
    return mixed


def _pixels_of(box: CropBox) -> tuple[Any, ...]:
    """Index of a box in [..., H, W, 3]."""
    return ..., slice(box.top, box.top + box.height), slice(box.left, box.left + box.width), slice(None)


def mix_targets(targets: Tensor, mixing: Mixing | list[Mixing] | None, smoothing: float) -> Tensor:
    """float32 [B, K] of smoothed labels, mixed as the clips are.

    Args:
        targets: float32 [B, K], 1 at each label.
    """
    smooth = targets * (1 - smoothing) + smoothing / targets.shape[1]
    if mixing is None:
        return smooth
    if isinstance(mixing, Mixing):
        return smooth * mixing.weight + partners(smooth) * (1 - mixing.weight)
    each = zip(smooth, partners(smooth), mixing)
    return torch.stack([own * draw.weight + other * (1 - draw.weight) for own, other, draw in each])
