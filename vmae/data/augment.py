"""Where to cut a clip and how to resize it: TSN's multi-scale crop (Wang et al., ECCV 2016), as VideoMAE V2
uses it, or a centre crop.

One box for all frames of a clip, no flip, no colour changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from vmae.data.channels import DTYPES, RGB
from vmae.errors import InputError

SCALES = (1.0, 0.875, 0.75, 0.66)
# Places of a box, in quarters of the free room along (width, height): corners, centre, middles of the edges,
# quarters.
POSITIONS = (
    (0, 0),
    (4, 0),
    (0, 4),
    (4, 4),
    (2, 2),
    (0, 2),
    (4, 2),
    (2, 4),
    (2, 0),
    (1, 1),
    (3, 1),
    (1, 3),
    (3, 3),
)
SNAP_PIXELS = 3
# torch and pil: antialiased; bilinear: not.
RESIZERS = ("torch", "pil", "bilinear")
CROPS = ("published", "center")


class CropBox(NamedTuple):
    """A rectangle of a frame, in pixels."""

    left: int
    top: int
    width: int
    height: int


def image_hw(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image size; an int means a square.

    Raises:
        InputError: a side below 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise InputError(f"image size {size} must be positive")
    return height, width


def crop_sizes(width: int, height: int, input_size: int | tuple[int, int]) -> list[tuple[int, int]]:
    """All (width, height) that a crop can have, with repetitions as their chances.

    The base is the largest box of the input's shape that fits (for a square input the shorter side, as
    published). Each side is the base times a scale, and the two scales are at most one step apart. A side
    less than 3 pixels from the input's becomes the input's, so that it is not resized; a frame too small for
    that keeps its own side.

    Args:
        input_size: side, or (height, width), of the clip after resizing.

    Raises:
        InputError: a frame without pixels, or a non-positive input size.
    """
    if width < 1 or height < 1:
        raise InputError(f"cannot crop a frame of {width} x {height} pixels")
    input_height, input_width = image_hw(input_size)
    base_width = min(width, height * input_width / input_height)
    base_height = min(height, width * input_height / input_width)

    def side(base: float, scale: float, target: int, limit: int) -> int:
        length = int(base * scale)
        length = target if abs(length - target) < SNAP_PIXELS else length
        return min(max(length, 1), limit)

    widths = [side(base_width, scale, input_width, width) for scale in SCALES]
    heights = [side(base_height, scale, input_height, height) for scale in SCALES]
    return [(w, h) for i, h in enumerate(heights) for j, w in enumerate(widths) if abs(i - j) <= 1]


def crop_boxes(width: int, height: int, input_size: int | tuple[int, int]) -> list[CropBox]:
    """Every box that `sample_crop` can draw, with repetitions as their chances (10 sizes x 13 places)."""
    sizes = crop_sizes(width, height, input_size)
    return [_place(size, position, width, height) for size in sizes for position in POSITIONS]


def _place(size: tuple[int, int], position: tuple[int, int], width: int, height: int) -> CropBox:
    return CropBox(position[0] * ((width - size[0]) // 4), position[1] * ((height - size[1]) // 4), *size)


def sample_crop(
    width: int, height: int, input_size: int | tuple[int, int], rng: np.random.Generator
) -> CropBox:
    """Draw a crop of a `width` x `height` frame; all inside it.

    Args:
        input_size: side, or (height, width), of the clip after resizing.

    Raises:
        InputError: see `crop_sizes`.
    """
    sizes = crop_sizes(width, height, input_size)
    size, position = sizes[int(rng.integers(len(sizes)))], POSITIONS[int(rng.integers(len(POSITIONS)))]
    return _place(size, position, width, height)


def center_crop(width: int, height: int, input_size: int | tuple[int, int]) -> CropBox:
    """The largest centred box of the input's shape in a `width` x `height` frame.

    Args:
        input_size: side, or (height, width), of the clip after resizing.

    Raises:
        InputError: a non-positive input size.
    """
    input_height, input_width = image_hw(input_size)
    scale = min(height / input_height, width / input_width)
    box_width, box_height = max(round(input_width * scale), 1), max(round(input_height * scale), 1)
    return CropBox((width - box_width) // 2, (height - box_height) // 2, box_width, box_height)


def bounding_box(boxes: Sequence[tuple[int, int, int, int]]) -> CropBox:
    """The smallest box that holds all of `boxes`, at least one."""
    left, top, right, bottom = zip(*((x, y, x + width, y + height) for x, y, width, height in boxes))
    return CropBox(min(left), min(top), max(right) - min(left), max(bottom) - min(top))


def crop_and_resize(
    frames: np.ndarray, box: CropBox, size: int | tuple[int, int], *, resize: str = "torch"
) -> np.ndarray:
    """Cut `box` from every frame and resize it, bilinear; antialiased where `resize` does not say otherwise.

    Args:
        frames: uint8, uint16 or float32 [T, H, W, C].
        size: side, or (height, width), of the result.
        resize: "torch", or "pil" for the bits of the published pre-training. Measured on the clips of
            `vmae.synthetic.samples` (16 frames to 224 x 224, one core, torch 2.13, Pillow 13): "torch" is
            off by at most 2 of 255 levels, in at most 4 % of the values (of noise: 2 levels, 26 %), and takes
            2 to 11 ms where "pil" takes 11 to 58. "bilinear" does not antialias, as in published training and
            tests on labels: half a level from the exact value at most.

    Returns:
        [T, height, width, C] in the dtype of `frames`, contiguous.

    Raises:
        InputError: frames of another shape or dtype, a box that leaves the frame, or an unknown `resize`.
    """
    if frames.dtype not in DTYPES or frames.ndim != 4:
        raise InputError(
            f"frames must be uint8, uint16 or float32 [T, H, W, C], not {frames.dtype} {list(frames.shape)}"
        )
    height, width = image_hw(size)
    left, top, box_width, box_height = box
    inside = (
        0 <= left <= left + box_width <= frames.shape[2] and 0 <= top <= top + box_height <= frames.shape[1]
    )
    if not inside or box_width < 1 or box_height < 1:
        raise InputError(f"{box} is not inside a frame of {frames.shape[2]} x {frames.shape[1]} pixels")
    cut = frames[:, top : top + box_height, left : left + box_width]
    if resize == "torch":
        return _resize_torch(cut, height, width)
    if resize == "pil":
        if frames.dtype != np.uint8 or frames.shape[3] != RGB:
            raise InputError(
                f"resize 'pil' is for RGB in 8 bits, and frames are {frames.dtype} of {frames.shape[3]} "
                "channels: take resize 'torch'"
            )
        return _resize_pil(cut, height, width)
    if resize == "bilinear":
        return _resize_bilinear(cut, height, width)
    raise InputError(f"unknown resize {resize!r}; known: {', '.join(RESIZERS)}")


def _resize_torch(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    if frames.shape[0] == 0 or frames.shape[1:3] == (height, width):
        return np.ascontiguousarray(frames).reshape(frames.shape[0], height, width, frames.shape[3])
    # Channels-last memory: what decoders give and what torch's vectorised uint8 kernel takes.
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    whole = pixels.dtype if pixels.dtype == torch.uint16 else None  # which torch does not resize
    pixels = pixels.float() if whole else pixels
    pixels = torch.nn.functional.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)
    pixels = pixels.round_().to(whole) if whole else pixels
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _resize_pil(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    resized = np.empty((frames.shape[0], height, width, 3), dtype=np.uint8)
    for source, target in zip(frames, resized, strict=True):
        target[...] = np.asarray(Image.fromarray(source).resize((width, height), Image.Resampling.BILINEAR))
    return resized


def _resize_bilinear(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """In float32, frame by frame: 16 frames of 1280 x 720 to 398 x 224 take 27 ms of a core, at once 93.
    Torch's uint8 kernel takes 7, but rounds twice and is up to a level off (torch 2.13)."""
    sources = torch.from_numpy(np.ascontiguousarray(frames))
    resized = torch.empty((frames.shape[0], height, width, frames.shape[3]), dtype=sources.dtype)
    for source, target in zip(sources, resized, strict=True):
        pixels = source.permute(2, 0, 1)[None].float()
        pixels = torch.nn.functional.interpolate(
            pixels, size=(height, width), mode="bilinear", align_corners=False
        )
        pixels = pixels[0].permute(1, 2, 0)
        target.copy_(pixels if target.is_floating_point() else pixels.round_())
    return resized.numpy()
