"""Folders of numbered images."""

from __future__ import annotations

from typing import IO

import numpy as np

from vmae.data.files import check_regular
from vmae.data.manifest import VideoEntry
from vmae.data.readers import Backend
from vmae.data.video_reader import DecodeError, VideoReader, first_reason


class FrameFolderReader(VideoReader):
    """A folder of numbered images, all of one size."""

    def __init__(self, entry: VideoEntry) -> None:
        if entry.total < 1:
            raise DecodeError(f"{entry.path}: has no frames")
        self.path, self._entry = entry.path, entry

    def __len__(self) -> int:
        return self._entry.total

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        from PIL import Image

        images: list[np.ndarray] = []
        for index in indices.tolist():
            name, file = self._image(index)
            try:
                with Image.open(file) as image:
                    images.append(np.asarray(image.convert("RGB")))
            except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError and more
                raise DecodeError(f"{name}: cannot be decoded: {first_reason(str(error), [])}") from None
            if images[-1].shape != images[0].shape:
                height, width = images[-1].shape[:2]
                raise DecodeError(f"{name}: {width} x {height} pixels, unlike the frames before it")
        return np.stack(images)

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


BACKEND = Backend("frames", ("frames",), FrameFolderReader, lambda: None)
