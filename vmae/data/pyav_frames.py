"""Pictures that PyAV's decoder gives, as a player shows them, in one array of a clip.

Each is converted as it comes out of the decoder, and only the part that is wanted: of a frame of 602 x 256
and a crop of 196 x 196, 25 us for 56 (one core). The cut comes first where it gives the same bits, in 4:2:0
of 8 bits and even height: FFmpeg's conversion of these works on blocks of 2 x 2 pixels, and the cut is made
at even places. Other formats blend neighbours, so there the whole picture is converted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, cast

import numpy as np

from vmae.data.orientation import UPRIGHT, Orientation, read_orientation
from vmae.data.video_reader import Crop, DecodeError, find_box

if TYPE_CHECKING:
    import av
    from av.filter.context import FilterContext

Box = tuple[int, int, int, int]
_BLOCKS = {"yuv420p", "yuvj420p"}


class FrameConverter:
    """Pixels of pictures of one video, as displayed.

    Args:
        path: of the video, for messages.
    """

    def __init__(self, path: str) -> None:
        self._path, self._to_rgb = path, _ToRgb()
        self._orientation: Orientation | None = None  # since the last key frame

    def restart(self) -> None:
        """Forget what the last key frame told; decoding goes on elsewhere."""
        self._orientation = None

    def orientation(self, frame: av.VideoFrame) -> Orientation:
        """It changes at key frames only, and reading it takes a tenth of a conversion.

        Raises:
            DecodeError: the frame is corrupt, or see `read_orientation`.
        """
        if frame.is_corrupt:
            raise DecodeError(f"{self._path}: cannot be decoded: a frame is corrupt")
        if frame.key_frame or self._orientation is None:
            self._orientation = read_orientation(frame, self._path)
        return self._orientation

    def picture(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [H, W, 3], all of it."""
        orientation = self.orientation(frame)
        return orientation.apply(np.ascontiguousarray(self._to_rgb(frame)))

    def part(self, frame: av.VideoFrame, box: Box) -> np.ndarray:
        """uint8 [h, w, 3], a view: `box` of the picture as displayed."""
        orientation = self.orientation(frame)
        left, top, width, height = box
        if orientation != UPRIGHT or frame.format.name not in _BLOCKS or frame.height % 2:
            whole = orientation.apply(self._to_rgb(frame))
            return whole[top : top + height, left : left + width]
        right, bottom = min(-(-(left + width) // 2) * 2, frame.width), -(-(top + height) // 2) * 2
        from_left, from_top = left % 2, top % 2
        even = (left - from_left, top - from_top, right - left + from_left, bottom - top + from_top)
        return self._to_rgb(frame, even)[from_top : from_top + height, from_left : from_left + width]


class FrameClip:
    """The pictures of a clip, in one array.

    Args:
        path: of the video, for messages.
        names: of the wanted pictures, each once: times or numbers, in order.
        crop: see `VideoReader.frames`.
        converter: of the video's pictures.
    """

    def __init__(self, path: str, names: Sequence[int], crop: Crop | None, converter: FrameConverter) -> None:
        self._path, self._crop, self._converter = path, crop, converter
        self._places = {name: place for place, name in enumerate(names)}
        self.missing = set(names)
        self._size: tuple[int, int] | None = None
        converter.restart()

    def offer(self, name: int | None, frame: av.VideoFrame, wanted: Collection[int]) -> None:
        """A picture that came out of the decoder: it is kept where its name is `wanted`.

        Raises:
            DecodeError: it is corrupt, or of another size than those before it.
            InputError: the wanted part is not inside it.
        """
        if frame.key_frame:
            self._converter.restart()
        if name is None or name not in wanted:
            return
        size = frame.width, frame.height
        if self._converter.orientation(frame).transpose:
            size = size[1], size[0]
        if self._size is None:
            self._size, self._box = size, (0, 0, *size)
            if self._crop is not None:
                self._box = find_box(self._crop, *size)
            self._frames = np.empty((len(self._places), self._box[3], self._box[2], 3), np.uint8)
        elif size != self._size:
            raise DecodeError(f"{self._path}: cannot be decoded: the size of its pictures changes")
        self._frames[self._places[name]] = self._converter.part(frame, self._box)
        self.missing.discard(name)

    def frames(self) -> np.ndarray:
        """uint8 [T, h, w, 3]

        Raises:
            DecodeError: pictures are missing.
        """
        if self.missing:
            raise DecodeError(f"{self._path}: cannot be decoded: {len(self.missing)} frames do not come out")
        return self._frames


class _ToRgb:
    """uint8 [H, W, 3] of frames, by a filter graph: pixels as the ffmpeg command and torchcodec give them.

    `VideoFrame.reformat` differs by up to 100 grey levels at edges where 10-bit colour is subsampled, by 31
    at odd sizes; it takes all cores for one small picture, and half as much CPU time again (90 us for 640 x
    272 against 62).
    """

    def __init__(self) -> None:
        self._layout: tuple | None = None
        self._graph: av.filter.Graph | None = None  # its filters do not live without it

    def __call__(self, frame: av.VideoFrame, box: Box | None = None) -> np.ndarray:
        """A view of memory that stays as it is; `box`: of stored pixels, with even left and top."""
        layout = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, box)
        if layout != self._layout:
            self._source, self._sink = self._build(frame, box)
            self._layout = layout
        self._source.push(frame)
        rgb = cast("av.VideoFrame", self._sink.pull())
        plane = rgb.planes[0]
        lines = np.frombuffer(memoryview(plane), np.uint8).reshape(rgb.height, plane.line_size)
        return lines[:, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)

    def _build(self, frame: av.VideoFrame, box: Box | None) -> tuple[FilterContext, FilterContext]:
        import av

        self._graph = graph = av.filter.Graph()
        if hasattr(type(graph), "threads"):
            graph.threads = 1
        time_base = frame.time_base or Fraction(1)
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=time_base
        )
        steps = [source]
        if box is not None:
            left, top, width, height = box
            steps.append(graph.add("crop", f"{width}:{height}:{left}:{top}:exact=1"))
        # without a scaler of its own, FFmpeg may put one before the cut
        steps += [graph.add("scale"), graph.add("format", "rgb24"), graph.add("buffersink")]
        graph.link_nodes(*steps).configure()
        return source, steps[-1]
