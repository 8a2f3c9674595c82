"""Makes opencv_resize.npz beside this file: what OpenCV's bilinear resize (`cv2.INTER_LINEAR`) gives, for
tests/data/test_published_pixels.py. Needs opencv-python-headless, which the tests do not:

    python tests/data/opencv_resize.py

The pictures are not stored: `picture` makes them. The file in the tree was made with OpenCV 5.0.0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_suffix(".npz")
# (height, width) of the picture, and what it is resized to: smaller by 1.2, by 2 and by 5.3; larger; both.
SIZES = [
    ((27, 64), (22, 52)),
    ((48, 64), (24, 32)),
    ((96, 170), (18, 31)),
    ((18, 22), (28, 34)),
    ((50, 20), (20, 30)),
]


def picture(height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3]: noise, the hardest case for a filter."""
    return np.random.RandomState(height).randint(0, 256, (height, width, 3)).astype(np.uint8)


def name_of(source: tuple[int, int], target: tuple[int, int]) -> str:
    """Key of the file."""
    return "x".join(map(str, [*source, *target]))


def main() -> None:
    import cv2

    resized = {}
    for source, (height, width) in SIZES:
        resized[name_of(source, (height, width))] = cv2.resize(
            picture(*source), (width, height), interpolation=cv2.INTER_LINEAR
        )
    np.savez_compressed(GOLDEN, version=cv2.__version__, **resized)


if __name__ == "__main__":
    main()
