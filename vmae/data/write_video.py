"""Pictures into a video file, through PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from vmae.data.pack import PackConfig
from vmae.errors import InputError


def find_encoder() -> ModuleType:
    """PyAV, which has the encoder.

    Raises:
        InputError: it is not installed, or without x264.
    """
    try:
        import av
    except ImportError as error:
        raise InputError(f"writing videos needs PyAV ({error}): `pip install av`") from None
    if "libx264" not in av.codecs_available:
        raise InputError(
            "writing videos needs x264, which this build of PyAV lacks: `pip install av` brings it"
        )
    return av


def write_video(path: Path, pictures: np.ndarray | Sequence[np.ndarray], fps: int = 12) -> None:
    """Encode uint8 [T, H, W, 3], of even height and width, as H.264 in MP4; `path` is complete or absent.

    Raises:
        InputError: PyAV is not installed, or the file cannot be written.
    """
    av = find_encoder()
    part = path.with_suffix(".part.mp4")
    options = PackConfig(crf=18, preset="veryfast").encoder_options()
    # With it x264 wrote, by chance, one of two files for the same 6 frames of 32 x 32 (155 and 245 of 400
    # times); without, one.
    options["x264-params"] += ":mbtree=0"
    try:
        with av.open(str(part), "w") as out:
            stream = out.add_stream("libx264", rate=fps, options=options)
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            for picture in pictures:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode(None))
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
