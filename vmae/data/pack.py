"""Packing: re-encode a video once, so that every clip of every epoch decodes faster.

What makes clips slow is pixels that the crop throws away, and key frames far apart: a clip of 64 frames
starts, on average, half a group of pictures after the key frame that its decoding starts from. Packed: short
side 256, a closed group of 25, H.264 with the loop filter and arithmetic coding switched off (`fastdecode`),
and seven of eight pictures that no other one needs, which PyAV's reader leaves out; frames keep their number,
their time and their colours' meaning (range, matrix, primaries, transfer), and are stored as a player shows
them: turned or mirrored, without a display matrix. `vmae.data.pack_command` does it to lists.
"""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmae.config import _Checked
from vmae.data.decode import DecodeError, open_video
from vmae.data.orientation import UPRIGHT, Orientation, read_orientation
from vmae.data.readers.pyav import PyavReader
from vmae.errors import InputError
from vmae.settings import SIDE, Whole, ranged

# of what packed videos hold: files of another one are not taken for done. 1 lost rotation and colour tags
VERSION = 2
UNFINISHED_SUFFIX = ".part.mp4"
_TARGET_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.ENOENT, errno.EIO}


@dataclass(frozen=True, kw_only=True)
class PackConfig(_Checked):
    """How videos are encoded.

    Attributes:
        short_side: pixels; smaller videos keep their size.
        gop: frames from one key frame to the next; 1 + a multiple of 8 holds whole runs of B pictures.
        crf: x264's quality, smaller is better and larger.
        preset: x264's effort.
        keep_every: 4 stores every fourth frame, for clips whose stride is a multiple of 4; the first one is
            drawn for each video (`draw_phase`). Only an index of shards tells that frames are left out.
    """

    short_side: int = ranged(256, Whole(16, SIDE.most))
    gop: int = ranged(25, Whole(1, 10_000))
    crf: int = ranged(20, Whole(0, 51))
    preset: str = "medium"
    keep_every: int = ranged(1, Whole(1, 64))

    def encoder_options(self) -> dict[str, str]:
        # Against x264's own choice of B pictures, measured on the clips of vmae.synthetic.samples: 2 to 13 %
        # less time a clip, 1 % more to 6 % fewer bytes. Groups of 25 with runs of 7, against groups of 12
        # with runs of 3: 15 % less time a clip of stride 4, 14 % fewer bytes, 0.08 dB less. Where all that
        # is stored is decoded, runs of 7 gain nothing.
        runs = 7 if self.keep_every == 1 and self.gop % 8 == 1 else 3
        pictures = f"bframes={runs}:b-adapt=0:b-pyramid=none"
        params = f"keyint={self.gop}:min-keyint={self.gop}:scenecut=0:open-gop=0:{pictures}"
        # x264's vector code for the lookahead (mbtree) reads what earlier work left in memory: other bytes
        # each time that a process packs the clip bikes. Without it, one file, for 2 to 7 % more CPU time.
        params += ":cpu-independent=1"
        if self.keep_every > 1:  # else x264 gives pictures that last longer more bits: 0.6 of all
            params += ":force-cfr=1"
        return {
            "preset": self.preset,
            "crf": str(self.crf),
            "tune": "fastdecode",
            "threads": "1",
            "x264-params": params,
        }


def packed_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) after scaling the short side down to `short_side`; even, as 4:2:0 colour needs."""
    scale = min(short_side / min(width, height), 1.0)

    def scaled(side: int) -> int:
        return max(min(2 * round(side * scale / 2), side // 2 * 2), 2)

    return scaled(width), scaled(height)


def draw_phase(key: str, keep_every: int, frames: int) -> int:
    """Number of the first frame that is stored of a video of `frames`: drawn from its key, below `keep_every`
    and `frames`."""
    digest = hashlib.sha256(f"phase {key}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") % max(min(keep_every, frames), 1)


def pack_video(source: str | Path, target: str | Path, config: PackConfig, key: str = "") -> int:
    """Re-encode one video; `target` is complete or absent. Returns the number of its frames; where not all
    are kept, of all of them.

    Args:
        key: decides which frames are kept, see `draw_phase`.

    Raises:
        DecodeError: the video cannot be decoded to its end, or loses frames on the way.
        InputError: PyAV is not installed, or too old.
        OSError: `target` cannot be written.
    """
    try:
        import av
    except ImportError as error:
        raise InputError(f"packing needs PyAV ({error}): `pip install av`") from None
    if int(av.__version__.split(".")[0]) < 17:  # 14 to 16 squeeze full range into limited, whatever is asked
        raise InputError(
            f"packing needs PyAV 17 or newer, to keep colours as they are; {av.__version__} is installed"
        )
    # of this process alone: a worker outlives a main process that is killed by a second, and goes on writing
    part = Path(target).with_suffix(f".{os.getpid()}{UNFINISHED_SUFFIX}")
    try:
        with open_video(source, "pyav") as reader, av.open(str(part), "w") as out:
            assert isinstance(reader, PyavReader)
            phase, expected = draw_phase(key, config.keep_every, len(reader)), len(reader)
            frames = _encode(reader, out, config, phase)
        if frames != expected:
            raise DecodeError(f"{source}: cannot be decoded: {frames} of {expected} frames came out")
    except av.FFmpegError as error:
        part.unlink(missing_ok=True)
        # A full disk is no fault of the video.
        if error.errno in _TARGET_FAULTS and error.filename == str(part):
            raise OSError(error.errno, error.strerror, str(part)) from None
        raise DecodeError(f"{source}: cannot be packed: {error.strerror}") from None
    except DecodeError:
        part.unlink(missing_ok=True)
        raise
    part.replace(target)
    return frames


def _encode(reader: PyavReader, out, config: PackConfig, phase: int) -> int:
    """Encode the frames that readers give, or some of them; returns how many there are."""
    from av.video.reformatter import VideoReformatter

    source, to_yuv = reader.stream, VideoReformatter()
    rate, time_base = source.average_rate or 25, source.time_base
    assert time_base is not None  # every stream of a file has one
    frames, last, first = 0, None, None
    for frame in reader.decoded():
        if first is None or frame.key_frame:  # asking every frame for its matrix costs a tenth of decoding
            orientation = read_orientation(frame, reader.path)
        shape = (frame.width, frame.height, orientation)
        if first is None:
            first, stream = shape, _add_stream(out, frame, source, orientation, config)
        if frame.is_corrupt or shape != first:
            fault = "is corrupt" if frame.is_corrupt else "has another size or rotation than the first"
            raise DecodeError(f"{reader.path}: cannot be decoded: frame {frames} {fault}")
        if frame.pts is None or (last is not None and frame.pts <= last):  # AVI: no times; keep the order
            frame.pts = 0 if last is None else last + max(round(1 / (float(rate) * time_base)), 1)
        last = frame.pts
        frames += 1
        if (frames - 1) % config.keep_every != phase:
            continue
        packed = _convert(
            frame, packed_size(frame.width, frame.height, config.short_side), orientation, to_yuv
        )
        packed.pts, packed.time_base, packed.pict_type = last, time_base, 0
        out.mux(stream.encode(packed))
    if first is not None:
        out.mux(stream.encode(None))
    return frames


def _add_stream(out, frame, source, orientation: Orientation, config: PackConfig):
    """The packed stream, with the size that `frame` is shown in, and what its numbers mean."""
    stream = out.add_stream("libx264", rate=source.average_rate or 25, options=config.encoder_options())
    width, height = packed_size(frame.width, frame.height, config.short_side)
    stream.width, stream.height = (height, width) if orientation.transpose else (width, height)
    stream.pix_fmt = "yuv420p"
    context, aspect = stream.codec_context, source.sample_aspect_ratio
    context.time_base = source.time_base
    if frame.format.is_rgb:
        context.color_range, context.colorspace = _LIMITED, _BT601
    else:
        context.color_range, context.colorspace = _range(frame), frame.colorspace
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
    if aspect:  # pixels that are not square stay so
        context.sample_aspect_ratio = 1 / aspect if orientation.transpose else aspect
    return stream


# --- Frames as a player shows them, in the numbers of the original ---

# FFmpeg's numbers: colour ranges, and a matrix in tags and in its scaler.
_LIMITED, _FULL, _BT601, _SWS_BT601 = 1, 2, 6, 5


def _range(frame) -> int:
    """How the luma of a frame is meant: full (0 to 255, `yuvj` is FFmpeg's old word for it), limited, or not
    told."""
    return _FULL if frame.format.name.startswith("yuvj") else int(frame.color_range)


def _convert(frame, size: tuple[int, int], orientation: Orientation, to_yuv):
    """A frame scaled to `size` and turned, as 4:2:0; range and matrix stay what they were (RGB becomes
    limited BT.601)."""
    import av

    before = _FULL if frame.format.is_rgb else _range(frame) or _LIMITED
    after, matrix = (_LIMITED, _BT601) if frame.format.is_rgb else (before, None)
    ranges = {"src_color_range": before, "dst_color_range": after, "dst_colorspace": matrix and _SWS_BT601}
    frame = to_yuv.reformat(frame, *size, "yuv420p", interpolation="AREA", **ranges)
    if orientation == UPRIGHT:
        return frame
    samples, (width, height) = frame.to_ndarray().reshape(-1), size
    luma, chroma = width * height, width * height // 4
    planes = [samples[:luma].reshape(height, width)]
    planes += [
        part.reshape(height // 2, width // 2)
        for part in (samples[luma : luma + chroma], samples[luma + chroma :])
    ]
    turned = np.concatenate([orientation.apply(plane).reshape(-1) for plane in planes])
    return av.VideoFrame.from_ndarray(
        turned.reshape(-1, height if orientation.transpose else width), format="yuv420p"
    )
