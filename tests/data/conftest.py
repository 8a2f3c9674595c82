"""Videos whose pictures tell their own number: frame n shows the bits of n as bright and dark bars."""

from __future__ import annotations

import dataclasses
import fractions
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vmae.data import decode

BITS, BAR, HEIGHT = 8, 16, 64
WIDTH = BITS * BAR
X264 = {"preset": "ultrafast", "crf": "20", "threads": "1"}
OPEN_GOP = "keyint=24:min-keyint=24:bframes=3:b-adapt=0:scenecut=0"
# name: file's ending, encoder, options, milliseconds from one frame to the next (cycled through)
BAR_VIDEOS = {
    "h264_closed": (".mp4", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=0"}, (40,)),
    "h264_open": (".mp4", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=1"}, (40,)),
    "h264_open_mkv": (".mkv", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=1"}, (40,)),
    "hevc_closed": (".mp4", "libx265", {"preset": "ultrafast", "x265-params": f"{OPEN_GOP}:open-gop=0:log-level=none"}, (40,)),
    "hevc_open": (".mp4", "libx265", {"preset": "ultrafast", "x265-params": f"{OPEN_GOP}:open-gop=1:log-level=none"}, (40,)),
    "vp9": (".webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "24", "b:v": "300k"}, (40,)),
    "vp9_vfr": (".webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "24", "b:v": "300k"}, (40, 10, 170, 60)),
    "vfr": (".mp4", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=0"}, (40, 10, 170, 40, 60, 20)),
    "avi": (".avi", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=0"}, (40,)),
    "ts": (".ts", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=0"}, (40,)),
}


def draw_number(number: int) -> np.ndarray:
    """uint8 [HEIGHT, WIDTH, 3]: the bits of `number`, the lowest to the left."""
    bits = (number >> np.arange(BITS)) & 1
    row = np.repeat(40 + 175 * bits.astype(np.uint8), BAR)
    return np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def read_numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames [T, HEIGHT, WIDTH, 3] show."""
    levels = frames.reshape(len(frames), HEIGHT, BITS, BAR, 3)[:, 8:-8, :, 4:-4].mean((1, 3, 4))
    return ((levels > 127) << np.arange(BITS)).sum(1).tolist()


def write_bars(path: Path, codec: str, options: dict[str, str], steps_ms: tuple[int, ...] = (40,), total: int = 120) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        constant = len(steps_ms) == 1
        stream.codec_context.time_base = fractions.Fraction(1, 25 if constant else 1000)
        time = 0
        for number in range(total):
            frame = av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")
            frame.pts, frame.time_base = (number if constant else time), stream.codec_context.time_base
            time += steps_ms[number % len(steps_ms)]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def bar_videos(tmp_path_factory) -> dict[str, Path]:
    """Paths of all BAR_VIDEOS, 120 frames each."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("bars")
    # In a process of its own: where decord was imported before PyAV, its libvpx takes the place of PyAV's and fails.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    return {name: folder / f"{name}{suffix}" for name, (suffix, *_) in BAR_VIDEOS.items()}


@pytest.fixture(name="read_numbers")
def read_numbers_fixture():
    """The function that reads the number off frames of bars."""
    return read_numbers


@pytest.fixture
def uninstall(monkeypatch):
    """Makes a decoding backend look as if it were not installed."""

    def remove(name: str) -> None:
        gone = dataclasses.replace(decode.BACKENDS[name], missing=lambda: f"{name} is not installed: `pip install {name}`")
        monkeypatch.setitem(decode.BACKENDS, name, gone)

    monkeypatch.setattr(decode, "BACKENDS", dict(decode.BACKENDS))
    return remove


if __name__ == "__main__":
    for name, (suffix, codec, options, steps) in BAR_VIDEOS.items():
        write_bars(Path(sys.argv[1]) / f"{name}{suffix}", codec, options, steps)
