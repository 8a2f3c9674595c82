"""Single images, each as a video of one frame."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from vmae.data.manifest import VideoEntry
from vmae.data.readers import Backend
from vmae.data.video_reader import DecodeError, VideoReader, first_reason

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 1 << 27  # 384 MiB of RGB; a file of some kilobytes can promise any number


class ImageReader(VideoReader):
    """An image as a viewer shows it: turned as its EXIF says, what is transparent on white, in RGB of 8 bits.

    An animation gives its first picture. Colour profiles are not applied.
    """

    def __init__(self, entry: VideoEntry) -> None:
        self.path = entry.path

    def __len__(self) -> int:
        return 1

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        from PIL import Image

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of broken EXIF and of sizes that are checked here
                with Image.open(self.path) as image:
                    _check_size(image)
                    return np.asarray(_as_shown(image))[None]
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError and more
            reason = first_reason(str(error).replace(f" {self.path!r}", ""), [])
            raise DecodeError(f"{self.path}: cannot be decoded: {reason}") from None

    def close(self) -> None:
        pass


def _check_size(image: Image) -> None:
    """Raises ValueError before too many pixels are decoded."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MOST_PIXELS:,}; make it smaller")


def _as_shown(image: Image) -> Image:
    """An opened image in RGB of 8 bits, upright.

    Raises:
        ValueError: its values are of more bits, and no format tells what white is.
    """
    from PIL import Image, ImageOps

    if image.mode == "F" or image.mode.startswith("I"):
        if image.format != "PNG":
            raise ValueError(
                f"its values have more than 8 bits (mode {image.mode}), and {image.format} does not tell "
                "which of them is white; convert it to 8 bits"
            )
        image.load()  # of a PNG, white is 65535, as for its colour images, which Pillow cuts to 8 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    shown = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")


def inspect_image(path: str) -> dict[str, str]:
    """What an image that can be decoded is: its `container`, and its `pixels` where they are not RGB."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            found = {"container": image.format or "unknown"}
            return found if image.mode == "RGB" else {**found, "pixels": f"mode {image.mode}"}


BACKEND = Backend("image", ("image",), ImageReader, lambda: None)
