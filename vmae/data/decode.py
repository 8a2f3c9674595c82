"""Pixels out of files, behind one small interface.

A backend is a name, the kinds of entries it reads, and a function that opens one. `open_video` finds it in `BACKENDS`;
another decoder joins with `register_backend`, and no caller changes. Readers are opened where they are used (in the
loader's worker), hold one file and are closed at once: nothing that decodes is ever shared or sent between processes.

PyAV, torchcodec, decord (or decord2): `auto` takes the first that is installed and safe for the file. A backend that is
known to return wrong frames for a file (see `vmae.data.containers`) refuses it, also when it was named.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vmae.data.containers import open_gop_hazard, seek_hazard
from vmae.data.manifest import VideoEntry
from vmae.errors import InputError


class DecodeError(InputError):
    """A file that cannot be decoded, or has no frames. The message names it and gives the library's reason.

    Attributes:
        library: the backend that failed; None where none was asked.
    """

    library: str | None = None


class VideoReader(ABC):
    """An open video; a context manager that closes it.

    Attributes:
        path: of the file or folder.
        fps: frames a second, None where it is not known.
        size: width and height, None where they are known only once a frame is decoded.
        codec: FFmpeg's name of it, None where it is not known.
        backend: name of the backend that opened it.
    """

    path: str
    fps: float | None = None
    size: tuple[int, int] | None = None
    codec: str | None = None
    backend: str = "?"

    @abstractmethod
    def __len__(self) -> int:
        """Frames of the video, at least 1."""

    @abstractmethod
    def _decode(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3], RGB, of ascending, distinct, valid int64 `indices` [T >= 1]."""

    def frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decode some frames, in any order; each is decoded once, even if it is named twice.

        Args:
            indices: whole numbers [T], from 0, T at least 1.

        Returns:
            uint8 [T, H, W, 3], RGB.

        Raises:
            IndexError: a frame that the video does not have, or no index.
            DecodeError: a frame cannot be decoded.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.ndim != 1 or wanted.size == 0:
            raise IndexError(f"{self.path}: frame indices must be a list of at least one number")
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"{self.path}: frames {wanted.min()} to {wanted.max()} asked for, it has {len(self)}")
        distinct, places = np.unique(wanted, return_inverse=True)
        try:
            decoded = self._decode(distinct)
        except DecodeError as error:
            error.library = self.backend
            raise
        return decoded if np.array_equal(distinct, wanted) else decoded[places]

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; the reader is of no further use."""

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class Backend:
    """A way to read videos.

    Attributes:
        name: what the user calls it.
        kinds: the `VideoEntry.kind`s it reads.
        open: opens an entry; raises DecodeError.
        missing: None if it can be used here, else what to install.
        refuses: what it would decode wrongly of an entry, in a few words; None where it can be trusted.
    """

    name: str
    kinds: tuple[str, ...]
    open: Callable[[VideoEntry], VideoReader]
    missing: Callable[[], str | None]
    refuses: Callable[[VideoEntry], str | None] = lambda entry: None


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> Backend:
    """Make `backend` known to `open_video`. `auto` takes the first known one that is installed and does not refuse."""
    BACKENDS[backend.name] = backend
    return backend


def open_video(source: VideoEntry | str | Path, backend: str = "auto") -> VideoReader:
    """Open a video file or a folder of frames.

    Args:
        source: an entry of a list file, or the path of a video file.
        backend: "auto", or a name in `BACKENDS`.

    Raises:
        DecodeError: the file is not there, cannot be decoded, or has no frames.
        InputError: an unknown backend, one that does not read this kind of entry, or one that is not installed.
    """
    entry = source if isinstance(source, VideoEntry) else VideoEntry(str(source))
    candidates = find_backends(entry.kind, backend)
    if not os.path.exists(entry.path):
        raise DecodeError(f"{entry.path}: does not exist")
    if entry.kind == "video" and os.path.isdir(entry.path):
        raise DecodeError(f"{entry.path}: is a folder; for frames give a list file with a line `folder start total`")
    chosen = _choose_backend(entry, candidates)
    try:
        reader = chosen.open(entry)
    except DecodeError as error:
        error.library = chosen.name
        raise
    reader.backend = chosen.name
    return reader


def find_backends(kind: str, name: str) -> list[Backend]:
    """The installed backends that may read an entry of this kind, at least one, the preferred one first."""
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"unknown decoding backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    candidates = [backend for backend in BACKENDS.values() if kind in backend.kinds]
    named = [backend for backend in candidates if backend.name == name]
    # The name chooses among video decoders; a list may mix in frame folders, which most of them do not read.
    if named or (name != "auto" and kind == "video"):
        candidates = named
    if not candidates:
        raise InputError(f"the decoding backend {name!r} does not read entries of kind {kind!r}")
    missing = [backend.missing() for backend in candidates]
    installed = [backend for backend, lack in zip(candidates, missing, strict=True) if lack is None]
    if not installed:
        raise InputError("; or ".join(lack for lack in missing if lack))
    return installed


def _choose_backend(entry: VideoEntry, candidates: list[Backend]) -> Backend:
    refusals = []
    for backend in candidates:
        try:
            refusal = backend.refuses(entry)
        except OSError as error:
            raise DecodeError(f"{entry.path}: cannot be read: {error.strerror}") from None
        if refusal is None:
            return backend
        refusals.append(f"{backend.name} cannot be trusted with {refusal}")
    others = [backend for backend in BACKENDS.values() if entry.kind in backend.kinds and backend not in candidates]
    lacking = [lack for lack in (backend.missing() for backend in others) if lack]
    advice = "; ".join(lacking) or f"another backend may read it: {', '.join(backend.name for backend in others)}"
    error = DecodeError(f"{entry.path}: refused, it would give wrong frames: {'; '.join(refusals)}; {advice}")
    error.library = candidates[-1].name
    raise error


class _TorchcodecReader(VideoReader):
    """torchcodec in exact mode: the file is scanned once, so that a frame's number is its place in time."""

    def __init__(self, entry: VideoEntry) -> None:
        from torchcodec.decoders import VideoDecoder

        self.path = entry.path
        with _library_stderr() as heard:
            try:
                decoder = VideoDecoder(entry.path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
                self._length = len(decoder)
                self.fps = decoder.metadata.average_fps
            except Exception as error:  # RuntimeError, ValueError, and what FFmpeg makes of a damaged file
                failure = error
            else:
                failure = None
        if failure is not None:
            raise DecodeError(f"{self.path}: cannot be opened: {_first_reason(str(failure), heard)}") from None
        if self._length < 1:
            raise DecodeError(f"{self.path}: has no frames")
        self._decoder = decoder

    def __len__(self) -> int:
        return self._length

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        if self._decoder is None:
            raise DecodeError(f"{self.path}: is closed")
        with _library_stderr() as heard:
            try:
                return self._decoder.get_frames_at(indices.tolist()).data.numpy()
            except Exception as error:
                failure = error
        raise DecodeError(f"{self.path}: cannot be decoded: {_first_reason(str(failure), heard)}")

    def close(self) -> None:
        self._decoder = None


@functools.cache  # a failing import looks for FFmpeg in many versions, which takes longer than a clip
def _torchcodec_missing() -> str | None:
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except ImportError:
        return "torchcodec is not installed: `pip install 'torchcodec>=0.13,<0.14'` and FFmpeg's libraries"
    except Exception as error:  # RuntimeError or OSError of its shared libraries
        reason = (str(error).strip().splitlines() or ["unknown reason"])[0]
        return (
            f"torchcodec does not load ({reason}): it needs FFmpeg's shared libraries (`apt-get install ffmpeg`) and a "
            "version that fits torch (0.13 loads with torch 2.13 on a CPU; 0.14 to 0.17 link CUDA libraries)"
        )
    return None


class _DecordReader(VideoReader):
    """decord 0.6 or decord2: a CPU decoder with one thread, since the loader's workers already fill the cores."""

    def __init__(self, entry: VideoEntry) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self.path = entry.path
        with _library_stderr() as heard:
            try:
                reader = decord.VideoReader(entry.path, ctx=decord.cpu(0), num_threads=1)
                self._length = len(reader)
                self.fps = float(reader.get_avg_fps()) if self._length else None
            except Exception as error:  # decord raises RuntimeError, DECORDError and more
                failure = error
            else:
                failure = None
        if failure is not None:
            raise DecodeError(f"{self.path}: cannot be opened: {_first_reason(str(failure), heard)}") from None
        if self._length < 1:
            raise DecodeError(f"{self.path}: has no frames")
        self._reader = reader

    def __len__(self) -> int:
        return self._length

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        if self._reader is None:
            raise DecodeError(f"{self.path}: is closed")
        try:
            batch = self._reader.get_batch(indices.tolist())
        except Exception as error:
            raise DecodeError(f"{self.path}: cannot be decoded: {_first_reason(str(error), [])}") from None
        # A program that set decord's bridge gets tensors of its framework; all of them convert.
        return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)

    def close(self) -> None:
        self._reader = None


def _decord_missing() -> str | None:
    try:
        import decord  # noqa: F401
    except Exception as error:  # ImportError, or OSError and RuntimeError from its shared library
        # decord2 installs under the same import name, for newer Pythons too.
        return f"decoding video needs decord ({error}): `pip install decord`, or `pip install decord2` where that fails"
    return None


class _FrameFolderReader(VideoReader):
    """A folder of numbered images, all of one size."""

    def __init__(self, entry: VideoEntry) -> None:
        if entry.total < 1:
            raise DecodeError(f"{entry.path}: has no frames")
        self.path, self._entry = entry.path, entry

    def __len__(self) -> int:
        return self._entry.total

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        images = []
        for index in indices.tolist():
            path = self._entry.frame_path(index)
            try:
                with Image.open(path) as image:
                    images.append(np.asarray(image.convert("RGB")))
            except FileNotFoundError:
                raise DecodeError(f"{path}: does not exist; the list promises {len(self)} frames") from None
            except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError and more
                raise DecodeError(f"{path}: cannot be decoded: {_first_reason(str(error), [])}") from None
            if images[-1].shape != images[0].shape:
                height, width = images[-1].shape[:2]
                raise DecodeError(f"{path}: {width} x {height} pixels, unlike the frames before it")
        return np.stack(images)

    def close(self) -> None:
        pass


class _PyavReader(VideoReader):
    """PyAV: frames by their packets' timestamps, or counted from the start where those cannot be relied on.

    The packets are read once, undecoded. In MP4 and Matroska their presentation times, sorted, are the frames; decoding
    starts at the last key frame that is not shown after the wanted one, so leading pictures of an open GOP come out
    of the group before. Other containers (AVI keeps no presentation times; a transport stream cannot be sought
    exactly) are decoded from their start.

    Of H.264, pictures that are not wanted and that no other picture refers to (`nal_ref_idc` 0) are not decoded: half of
    the pictures with x264's defaults, at the same pixels. HEVC's word for that holds within a temporal layer only, so
    there every picture is decoded.
    """

    def __init__(self, entry: VideoEntry) -> None:
        import av

        self.path = entry.path
        self._container = None
        try:
            self._container = av.open(entry.path)
            self._stream = self._first_video(self._container)
            self.fps = float(self._stream.average_rate) if self._stream.average_rate else None
            packets = [(p.pts, p.is_keyframe) for p in self._container.demux(self._stream) if p.size and not p.is_discard]
            counted = seek_hazard(entry.path) is not None
        except DecodeError:
            self.close()
            raise
        except Exception as error:  # av.FFmpegError and OSError, UnicodeDecodeError of damaged metadata
            self.close()
            raise DecodeError(f"{self.path}: cannot be opened: {_first_reason(_av_text(error), [])}") from None
        if not packets:
            self.close()
            raise DecodeError(f"{self.path}: has no frames")
        self._length = len(packets)
        self._to_rgb = av.video.reformatter.VideoReformatter()
        times = [time for time, _ in packets]
        self._counted = counted or None in times or len(set(times)) < len(times)
        if not self._counted:
            self._times = np.sort(np.array(times, np.int64))
            self._keys = np.sort(np.array([time for time, key in packets if key], np.int64))
        context = self._stream.codec_context
        self.size, self.codec = (context.width, context.height), context.name

    def _first_video(self, container):
        if not container.streams.video:
            raise DecodeError(f"{self.path}: cannot be opened: no video stream")
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        return stream

    def __len__(self) -> int:
        return self._length

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        if self._container is None:
            raise DecodeError(f"{self.path}: is closed")
        try:
            pictures = self._decode_counted(indices) if self._counted else self._decode_timed(self._times[indices])
        except DecodeError:
            raise
        except Exception as error:
            raise DecodeError(f"{self.path}: cannot be decoded: {_first_reason(_av_text(error), [])}") from None
        if len(pictures) < len(indices):
            raise DecodeError(f"{self.path}: cannot be decoded: {len(indices) - len(pictures)} frames do not come out")
        if len({picture.shape for picture in pictures}) > 1:
            raise DecodeError(f"{self.path}: cannot be decoded: the size of its pictures changes")
        return np.stack(pictures)

    def _decode_counted(self, indices: np.ndarray) -> list[np.ndarray]:
        import av

        wanted, pictures = set(indices.tolist()), []
        with av.open(self.path) as container:  # afresh: not every container can be rewound
            for number, frame in enumerate(container.decode(self._first_video(container))):
                if number in wanted:
                    pictures.append(self._pixels(frame))
                if number >= indices[-1]:
                    break
        return pictures

    def _decode_timed(self, times: np.ndarray) -> list[np.ndarray]:
        keys = np.maximum(np.searchsorted(self._keys, times, side="right") - 1, 0)
        runs = np.split(np.arange(len(times)), np.flatnonzero(np.diff(keys)) + 1)
        return [picture for run in runs for picture in self._decode_run(int(keys[run[0]]), times[run].tolist())]

    def _decode_run(self, key: int, times: list[int]) -> list[np.ndarray]:
        """Pictures at `times`, decoded from key frame number `key` on, without those that they do not need."""
        context, wanted, unfed = self._stream.codec_context, set(times), set(times)
        pictures: dict[int, np.ndarray] = {}

        def keep(frames: Sequence) -> None:
            pictures.update((frame.pts, self._pixels(frame)) for frame in frames if frame.pts in wanted)

        for packet in self._packets_from(key, times[0]):
            if self.codec == "h264":
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            unfed.discard(packet.pts)
            keep(packet.decode())
            if not unfed:
                if len(pictures) < len(times):
                    keep(context.decode(None))  # those that it holds back to put them in order
                break
        return [pictures[time] for time in times if time in pictures]

    def _packets_from(self, key: int, wanted: int) -> Iterator:
        """Packets from key frame number `key` on, or from an earlier one if the container seeks past it."""
        for back in (0, 1, 2, 4, key):
            target = int(self._keys[max(key - back, 0)]) if len(self._keys) else int(self._times[0])
            self._container.seek(target, stream=self._stream, backward=True)
            packets = self._container.demux(self._stream)
            first = next(packets, None)
            if first is not None and first.pts is not None and first.pts <= wanted:
                yield first
                yield from packets
                return
        raise DecodeError(f"{self.path}: cannot be decoded: no key frame before the frame at {wanted} can be found")

    def _pixels(self, frame) -> np.ndarray:
        if frame.is_corrupt:
            raise DecodeError(f"{self.path}: cannot be decoded: a frame is corrupt")
        return self._to_rgb.reformat(frame, format="rgb24").to_ndarray()

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._stream = None


def _av_text(error: Exception) -> str:
    """PyAV's message without its number and the file's name."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _pyav_missing() -> str | None:
    try:
        import av  # noqa: F401
    except Exception as error:
        return f"PyAV, which reads every container, is not installed ({error}): `pip install av`"
    return None


def _refused_by_torchcodec(entry: VideoEntry) -> str | None:
    return seek_hazard(entry.path)


def _refused_by_decord(entry: VideoEntry) -> str | None:
    return seek_hazard(entry.path) or open_gop_hazard(entry.path)


# The order of `auto`, as measured by bench/data.py on one core (clips of 16 frames, stride 4, short side 256): PyAV, which
# leaves out pictures that H.264 does not need, beats torchcodec on H.264, is level with it on HEVC, VP9 and MPEG-4, and
# refuses nothing; decord is the slowest and refuses most.
register_backend(Backend("pyav", ("video",), _PyavReader, _pyav_missing))
register_backend(Backend("torchcodec", ("video",), _TorchcodecReader, _torchcodec_missing, _refused_by_torchcodec))
register_backend(Backend("decord", ("video",), _DecordReader, _decord_missing, _refused_by_decord))
register_backend(Backend("frames", ("frames",), _FrameFolderReader, lambda: None))

_STDERR_LOCK = threading.Lock()


@contextlib.contextmanager
def _library_stderr() -> Iterator[list[str]]:
    """Keep what C libraries write to stderr from the terminal; yields a list that gets their lines at the end.

    decord tells why a file cannot be opened there and nowhere else. Lines of others that come meanwhile are passed on.
    """
    heard: list[str] = []
    with _STDERR_LOCK:
        try:
            saved = os.dup(2)
        except OSError:  # the process has no stderr
            yield heard
            return
        with tempfile.TemporaryFile() as capture:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(capture.fileno(), 2)
            try:
                yield heard
            finally:
                if sys.stderr is not None:
                    sys.stderr.flush()
                os.dup2(saved, 2)
                os.close(saved)
                capture.seek(0)
                for line in capture.read().decode(errors="replace").splitlines(keepends=True):
                    if line.startswith("["):  # decord: [08:41:57] /src/...; FFmpeg: [mov,mp4 @ 0x55...]
                        heard.append(line.strip())
                    elif line.strip():
                        os.write(2, line.encode())


def _first_reason(message: str, heard: list[str]) -> str:
    """One line without source files and addresses, from a library's exception and what it wrote to stderr."""
    opening = next((line for line in heard if "ERROR opening" in line), None)
    text = opening.rsplit(", ", 1)[-1] if opening else (message.strip().splitlines() or ["unknown reason"])[0]
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", text)
    text = re.sub(r"^(\w+, )?/\S+\.(cpp|cc|h):\d+, ", "", text)
    text = text.replace("failed with 1094995529", "failed: invalid data")  # FFmpeg's AVERROR_INVALIDDATA
    # "Check failed: CODE >= 0 (-1094995529 vs. 0) Thread worker: Error sending packet." -> the words at its end
    return re.sub(r"^Check failed: .*?\(\S+ vs\. \S+\)\s*(?=\S)", "", text).strip() or "unknown reason"
