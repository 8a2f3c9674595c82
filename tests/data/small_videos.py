"""Small videos of six pictures that no rotation leaves as they are, in any colours, with any display
matrix."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

LOSSLESS = {"crf": "1", "preset": "ultrafast"}


def picture(number=0):
    """uint8 [96, 128, 3]: smooth, and another picture in each of the eight orientations."""
    y, x = np.mgrid[:96, :128]
    return np.stack([x * 2, y * 2 + 10, (x + y + 20 * number) // 2 + 40], -1).astype(np.uint8)


def write_stream(
    out, frames=6, codec="libx264", pixels="yuv420p", options=LOSSLESS, size=(128, 96), matrix=None, **tags
):
    """A stream of pictures in numbers of the given matrix and range; returns a function that encodes them."""
    import av
    from av.video.reformatter import VideoReformatter

    stream, to_yuv = out.add_stream(codec, rate=25, options=options), VideoReformatter()
    stream.width, stream.height, stream.pix_fmt = *size, pixels
    for name, value in tags.items():
        setattr(stream.codec_context, name, value)

    def encode():
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            full = tags.get("color_range", 1)
            out.mux(
                stream.encode(
                    to_yuv.reformat(frame, *size, pixels, dst_colorspace=matrix, dst_color_range=full)
                )
            )
        out.mux(stream.encode(None))

    return encode


def make_video(path: Path, **about) -> Path:
    """An MP4 file (or what the suffix says) of one stream, see `write_stream`."""
    import av

    with av.open(str(path), "w") as out:
        write_stream(out, **about)()
    return path


def with_matrix(source, target, a, b, c, d):
    """A copy of an MP4 file with a display matrix: x' = a x + c y, y' = b x + d y."""
    data = source.read_bytes()
    place = data.index(b"tkhd") + 44
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    target.write_bytes(data[:place] + matrix + data[place + 36 :])
    return target
