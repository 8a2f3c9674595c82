"""Folders of numbered images."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

import numpy as np

from vmae.data.channels import RGB
from vmae.data.files import check_regular
from vmae.data.manifest import VideoEntry
from vmae.data.readers import Backend, tiff
from vmae.data.video_reader import DecodeError, VideoReader, first_reason

if TYPE_CHECKING:
    from PIL import Image


class FrameFolderReader(VideoReader):
    """A folder of numbered images, all of one size."""

    def __init__(self, entry: VideoEntry) -> None:
        if entry.total < 1:
            raise DecodeError(f"{entry.path}: has no frames")
        self.path, self._entry = entry.path, entry

    def __len__(self) -> int:
        return self._entry.total

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        images: list[np.ndarray] = []
        for index in indices.tolist():
            name, file = self._image(index)
            images.append(self._read(name, file))
            if images[-1].dtype != images[0].dtype or images[-1].shape[2:] != images[0].shape[2:]:
                raise DecodeError(f"{name}: {_said(images[-1])}, unlike the frames before it")
            if images[-1].shape != images[0].shape:
                height, width = images[-1].shape[:2]
                raise DecodeError(f"{name}: {width} x {height} pixels, unlike the frames before it")
        return np.stack(images)

    def _read(self, name: str, file: str | IO[bytes]) -> np.ndarray:
        """An image, [H, W, C]."""
        from PIL import Image

        if self.channels != RGB and name.lower().endswith(tiff.SUFFIXES) and not tiff.missing():
            return tiff.read_image(file, name)
        try:
            with Image.open(file) as image:
                return self._pixels(image, name)
        except DecodeError:
            raise
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError and more
            raise DecodeError(f"{name}: cannot be decoded: {first_reason(str(error), [])}") from None

    def _pixels(self, image: Image.Image, name: str) -> np.ndarray:
        """RGB in 8 bits [H, W, 3], or what the image holds [H, W, C]."""
        deep = image.mode.startswith(("I", "F"))
        if self.channels == RGB and not deep:
            return np.asarray(image.convert("RGB"))
        if self.channels == RGB:
            raise DecodeError(
                f"{name}: has 1 channel of more than 8 bits, and the model takes 3 of 8 (--in-channels)"
            )
        if image.mode in ("1", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        pixels = np.asarray(image)
        if pixels.dtype == np.int32:  # how Pillow gives some images of 16 bits
            if pixels.size and not 0 <= pixels.min() <= pixels.max() < 2**16:
                raise DecodeError(f"{name}: has values of more than 16 bits")
            pixels = pixels.astype(np.uint16)
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def _image(self, index: int) -> tuple[str, str | IO[bytes]]:
        """(name for messages, file) of an image."""
        path = self._entry.frame_path(index)
        try:
            check_regular(path)
        except DecodeError as error:
            raise DecodeError(f"{error}; the list promises {len(self)} frames") from None
        return path, path

    def close(self) -> None:
        pass


def _said(image: np.ndarray) -> str:
    return f"{image.dtype} of {image.shape[2]} channels"


BACKEND = Backend("frames", ("frames",), FrameFolderReader, lambda: None)
