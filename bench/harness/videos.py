"""Videos to load: sample videos re-encoded, longer, at other sizes; and their true frames."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

# Extension, encoder, its options, and the name of its private parameters.
ENCODERS: dict[str, tuple[str, str, dict[str, str], str | None]] = {
    "h264": (".mp4", "libx264", {"preset": "medium", "crf": "23"}, "x264-params"),
    "hevc": (".mp4", "libx265", {"preset": "fast", "crf": "26"}, "x265-params"),
    "vp9": (".webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "b:v": "700k"}, None),
}


def group_options(codec: str, gop: int) -> dict[str, str]:
    """Options of an encoder: key frames at most `gop` apart, closed groups."""
    _, _, options, private = ENCODERS[codec]
    if private is None:
        return {**options, "g": str(gop)}
    forced = ":min-keyint=12:scenecut=0" if gop == 12 else ""
    quiet = ":log-level=none" if codec == "hevc" else ""
    return {**options, private: f"keyint={gop}{forced}:open-gop=0{quiet}"}


def encode(
    source: Path,
    target: Path,
    encoder: str,
    options: dict[str, str],
    *,
    size: tuple[int, int],
    length: int,
    rate: Fraction | None = None,
) -> None:
    """Re-encode `length` frames of `size` (width, height), played ping-pong; `rate`: the source's."""
    import av

    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        video = container.streams.video[0]
        rate = rate or Fraction(video.average_rate or 25)
        stream = out.add_stream(encoder, rate=rate, options={**options, "threads": "1"})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.time_base = 1 / rate
        shape = {"width": size[0], "height": size[1], "format": "yuv420p", "interpolation": "AREA"}
        pictures = [frame.reformat(**shape).to_ndarray() for frame in container.decode(video)]
        order = [*range(len(pictures)), *range(len(pictures) - 2, 0, -1)]
        for number in range(length):
            # A new frame each time: an encoder may hold on to one that comes again.
            frame = av.VideoFrame.from_ndarray(pictures[order[number % len(order)]], format="yuv420p")
            frame.pts, frame.time_base = number, stream.codec_context.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def size_of(path: Path) -> tuple[int, int]:
    """Width and height."""
    import av

    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        return context.width, context.height


def true_frames(path: str, wanted: Sequence[int]) -> tuple[int, dict[int, np.ndarray]]:
    """Number of frames, and the wanted ones (uint8 [H, W, 3]), by decoding all, one after the other."""
    import av

    total, needed, frames = 0, set(wanted), {}
    with av.open(path) as container:
        for frame in container.decode(video=0):
            if total in needed:
                frames[total] = frame.to_ndarray(format="rgb24")
            total += 1
    return total, frames
