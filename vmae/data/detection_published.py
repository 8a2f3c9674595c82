"""Clips and boxes of key frames as VideoMAE-Action-Detection prepares them (at 26cbda8: data/transforms.py,
alphaction/dataset/transforms/video_transforms.py; AlphAction's bounding_box.py and ava.py at bcb6b16).

- Frames: the middle ones of `num_frames` strides around the key frame; 16 frames at stride 4 are -31 to +29.
- Pixels: the shorter side resized to 256 of 224 image sizes, the longer one in proportion, bilinear without
  antialiasing. A training clip is a random square of the image size; a test has the whole frame.
- Boxes are in pixels, and the last pixel belongs to a box: x2 = x1 + width - 1. A box that a crop leaves
  outside stays, on the crop's edge.
- Colours of a training clip: hue, saturation and value shifted by one random number each, in OpenCV's uint8
  HSV (hue 0 to 179).

Mean and deviation, and what fills a clip up to whole patches, are in `vmae.model.detector`.

Legend: M boxes, T frames. Boxes here are float64 [M, 4], x1, y1, x2, y2 in pixels of the frame at hand.
"""

from __future__ import annotations

import numpy as np

_CROP, _SIDE = 224, 256  # published image size, and shorter side before the crop
HUE, SATURATION, VALUE = 10, 26, 26  # largest shifts
# Largest moves of a box's left and right (top and bottom) edge outwards and inwards, shares of its width
# (height).
JITTER = ((0.2, 0.1), (0.1, 0.05))


def clip_offsets(num_frames: int, stride: int) -> np.ndarray:
    """int64 [T]: the frames of a clip, counted from the key frame."""
    span = num_frames * stride
    first = (stride - 1) // 2 - (span - span // 2)
    return first + stride * np.arange(num_frames, dtype=np.int64)


def resized_hw(height: int, width: int, image_size: int) -> tuple[int, int]:
    """(height, width) of a frame whose shorter side is resized for clips of `image_size`."""
    side = round(image_size * _SIDE / _CROP)
    if width < height:
        return int(side * height / width), side
    return side, int(side * width / height)


# --- Boxes --------------------------------------------------------------------------------------------------


def to_pixels(boxes: np.ndarray, height: int, width: int, to: tuple[int, int]) -> np.ndarray:
    """Boxes in pixels of a frame resized to `to`, of shares of the frame as decoded."""
    scale = np.array([width, height] * 2)
    pixels = boxes * scale
    pixels[:, 2:] = np.maximum(pixels[:, 2:] - 1, pixels[:, :2])
    return pixels.clip(0, scale - 1) * (np.array([to[1], to[0]] * 2) / scale)


def crop_pixels(boxes: np.ndarray, left: int, top: int, side: int) -> np.ndarray:
    """Boxes in a square crop; one outside lies flat on its edge."""
    return (boxes - np.array([left, top] * 2)).clip(0, side)


def flip_pixels(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes of the mirrored frame."""
    return np.stack([width - 1 - boxes[:, 2], boxes[:, 1], width - 1 - boxes[:, 0], boxes[:, 3]], 1)


def extend_pixels(boxes: np.ndarray, share: tuple[float, float], height: int, width: int) -> np.ndarray:
    """Boxes wider and taller by these shares about their middles, cut at the frame's edges."""
    pad = (boxes[:, 2:] - boxes[:, :2] + 1) * np.array(share) / 2
    last = np.array([width - 1, height - 1] * 2)
    return np.concatenate([boxes[:, :2] - pad, boxes[:, 2:] + pad], 1).clip(0, last)


def jitter_pixels(boxes: np.ndarray, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Boxes whose edges moved at random, more outwards than inwards; at least a pixel wide and tall."""
    size = np.tile(boxes[:, 2:] - boxes[:, :2] + 1, 2)
    outwards, inwards = (np.array([pair[i] for pair in JITTER] * 2) for i in (0, 1))
    moved = boxes + np.array([-1, -1, 1, 1]) * size * rng.uniform(-inwards, outwards, boxes.shape)
    last = np.array([width - 1, height - 1])
    low = moved[:, :2].clip(0, last - 1)
    return np.concatenate([low, np.maximum(np.minimum(moved[:, 2:], last), low + 1)], 1)


def to_shares(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes as shares of a frame of this size: what the detector takes."""
    return boxes / np.array([width, height] * 2)


# --- Colours ------------------------------------------------------------------------------------------------


def shift_colours(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [T, H, W, 3] with hue, saturation and value shifted by one random number each."""
    shifts = (int(rng.integers(-most, most + 1)) for most in (HUE, SATURATION, VALUE))
    return shift_hsv(frames, *shifts)


def shift_hsv(frames: np.ndarray, hue: int, saturation: int, value: int) -> np.ndarray:
    """uint8 [T, H, W, 3] shifted by these numbers, in OpenCV's uint8 HSV, frame by frame.

    To HSV as OpenCV does it, in fixed point. Back in float32: of all colours in steps of 5, 4 % of the values
    are a level off those of OpenCV 5.0, the others equal. 16 frames of 224 x 224 take some 0.2 s of a core.
    """
    return np.stack([_shift_frame(frame, hue, saturation, value) for frame in frames])


# 4096 * 255 / n and 4096 * 30 / n, for n from 1.
_COUNTS = np.maximum(np.arange(256), 1)
_OF_255, _OF_30 = (np.rint(4096 * whole / _COUNTS).astype(np.int32) for whole in (255, 30))


def _shift_frame(frame: np.ndarray, hue: int, saturation: int, value: int) -> np.ndarray:
    red, green, blue = (np.ascontiguousarray(frame[..., i], dtype=np.int32) for i in range(3))
    top = np.maximum(np.maximum(red, green), blue)
    spread = top - np.minimum(np.minimum(red, green), blue)
    ahead = np.where(
        top == red, green - blue, np.where(top == green, blue - red + 2 * spread, red - green + 4 * spread)
    )  # sixths of the circle from red, times the spread
    h = (((ahead * _OF_30[spread] + 2048) >> 12) + hue) % 180
    s = (((spread * _OF_255[top] + 2048) >> 12) + saturation).clip(0, 255)
    v = (top + value).clip(0, 255).astype(np.float32)
    sixth, drop = h.astype(np.float32) / 30, v * (s.astype(np.float32) / 255)
    shifted = np.empty_like(frame)
    for i, n in enumerate((5, 3, 1)):  # red, green, blue lie so many sixths of the circle away
        away = (n + sixth) % 6
        shifted[..., i] = v - drop * np.minimum(away, 4 - away).clip(0, 1)
    return shifted
