"""Videos whose pictures tell their own number: frame n shows the bits of n as bright and dark bars."""

from __future__ import annotations

import dataclasses
import fractions
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

BITS, BAR, HEIGHT = 8, 16, 64
WIDTH = BITS * BAR
X264 = {"preset": "ultrafast", "crf": "20", "threads": "1"}
OPEN_GOP = "keyint=24:min-keyint=24:bframes=3:b-adapt=0:scenecut=0"
# name: file's ending, encoder, options, milliseconds from one frame to the next (cycled through)
BAR_VIDEOS = {
    "h264_closed": (".mp4", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=0"}, (40,)),
    "h264_open": (".mp4", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=1"}, (40,)),
    "h264_open_mkv": (".mkv", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=1"}, (40,)),
    "hevc_closed": (
        ".mp4",
        "libx265",
        {"preset": "ultrafast", "x265-params": f"{OPEN_GOP}:open-gop=0:log-level=none"},
        (40,),
    ),
    "hevc_open": (
        ".mp4",
        "libx265",
        {"preset": "ultrafast", "x265-params": f"{OPEN_GOP}:open-gop=1:log-level=none"},
        (40,),
    ),
    "vp9": (
        ".webm",
        "libvpx-vp9",
        {"deadline": "realtime", "cpu-used": "8", "g": "24", "b:v": "300k"},
        (40,),
    ),
    "vp9_vfr": (
        ".webm",
        "libvpx-vp9",
        {"deadline": "realtime", "cpu-used": "8", "g": "24", "b:v": "300k"},
        (40, 10, 170, 60),
    ),
    "vfr": (".mp4", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=0"}, (40, 10, 170, 40, 60, 20)),
    "avi": (".avi", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=0"}, (40,)),
    "ts": (".ts", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=0"}, (40,)),
}


CLOSED = {**X264, "x264-params": f"{OPEN_GOP}:open-gop=0"}
REFRESH = {**X264, "x264-params": "intra-refresh=1:keyint=24:bframes=0"}
REFRESH_B = {**X264, "x264-params": "intra-refresh=1:keyint=24:bframes=3:b-adapt=0"}
SHORT = {**X264, "x264-params": "keyint=2:min-keyint=2:bframes=3:b-adapt=0:open-gop=1"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "24", "b:v": "300k"}
MPEG = {"g": "24", "bf": "2", "b": "1M"}
# What decoders were found to be wrong about. name: as above, and further arguments of `write_bars`
ODD_VIDEOS = {
    "base": (".mp4", "libx264", CLOSED, {}),
    "fragmented": (".mp4", "libx264", CLOSED, {"movflags": "frag_keyframe+empty_moov"}),
    "wide_pixels": (".mp4", "libx264", CLOSED, {"aspect": 2}),
    "open": (".mp4", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=1"}, {}),
    "short_gop": (".mp4", "libx264", SHORT, {}),
    "one_key": (".mp4", "libx264", {**X264, "x264-params": "keyint=999:bframes=3"}, {}),
    "refresh": (".mp4", "libx264", REFRESH, {}),
    "refresh_mkv": (".mkv", "libx264", REFRESH, {}),
    "refresh_ts": (".ts", "libx264", REFRESH, {}),
    "refresh_b": (".mp4", "libx264", REFRESH_B, {}),
    "mpeg4": (".mp4", "mpeg4", {**MPEG, "bf": "0"}, {}),
    "mpeg4_b": (".mp4", "mpeg4", MPEG, {}),
    "mpeg4_b_avi": (".avi", "mpeg4", MPEG, {}),
    "mpeg2_b_mkv": (".mkv", "mpeg2video", MPEG, {}),
    "mpeg2_ps": (".mpg", "mpeg2video", MPEG, {}),
    "ten_bit": (".mp4", "libx264", CLOSED, {"pixels": "yuv420p10le"}),
    "interlaced": (".mp4", "libx264", {**X264, "x264-params": f"{OPEN_GOP}:open-gop=0:tff=1"}, {}),
    "odd_size": (".webm", "libvpx-vp9", VP9, {"more": 1}),
    "vp9_mp4": (".mp4", "libvpx-vp9", VP9, {}),
}
# Display matrices a, b, c, d (x' = a x + c y, y' = b x + d y), and what makes the stored picture of the
# displayed one.
ORIENTATIONS = {
    "turned_90": ((0, 1, -1, 0), lambda frames: np.rot90(frames, 1, (1, 2))),
    "turned_180": ((-1, 0, 0, -1), lambda frames: frames[:, ::-1, ::-1]),
    "turned_270": ((0, -1, 1, 0), lambda frames: np.rot90(frames, -1, (1, 2))),
    "mirrored_x": ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),
    "mirrored_y": ((1, 0, 0, -1), lambda frames: frames[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda frames: frames.swapaxes(1, 2)),
    "transversed": ((0, -1, -1, 0), lambda frames: np.rot90(frames, 1, (1, 2))[:, :, ::-1]),
    "scaled": ((2, 0, 0, 1), lambda frames: frames),
}


def draw_number(number: int, more: int = 0) -> np.ndarray:
    """uint8 [HEIGHT + more, WIDTH + more, 3]: the bits of `number`, the lowest to the left, below white and
    above black."""
    bits = (number >> np.arange(BITS)) & 1
    row = np.repeat(40 + 175 * bits.astype(np.uint8), BAR)
    picture = np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy()
    picture[:4], picture[-4:] = 235, 20
    return np.pad(picture, ((0, more), (0, more), (0, 0)))


def read_numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames [T, at least HEIGHT, at least WIDTH, 3] show; -1 where they are upside down."""
    frames = frames[:, :HEIGHT, :WIDTH]
    levels = frames.reshape(len(frames), HEIGHT, BITS, BAR, 3)[:, 8:-8, :, 4:-4].mean((1, 3, 4))
    numbers = ((levels > 127) << np.arange(BITS)).sum(1)
    upright = frames[:, 1:3].mean((1, 2, 3)) > frames[:, -3:-1].mean((1, 2, 3))
    return np.where(upright, numbers, -1).tolist()


def write_bars(
    path: Path,
    codec: str,
    options: dict[str, str],
    steps_ms: tuple[int, ...] = (40,),
    pixels: str = "yuv420p",
    more: int = 0,
    total: int = 120,
    aspect: int = 1,
    **container_options: str,
) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH + more, HEIGHT + more, pixels
        if aspect != 1:
            stream.codec_context.sample_aspect_ratio = fractions.Fraction(aspect)
        constant = len(steps_ms) == 1
        stream.codec_context.time_base = fractions.Fraction(1, 25 if constant else 1000)
        time = 0
        for number in range(total):
            frame = av.VideoFrame.from_ndarray(draw_number(number, more), format="rgb24")
            frame.pts, frame.time_base = (number if constant else time), stream.codec_context.time_base
            time += steps_ms[number % len(steps_ms)]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# --- files edited as players and editors do, without encoding ---


def replace_box(data: bytes, path: str, make: Callable[[bytes], bytes]) -> bytes:
    """MP4 `data` with the content of a box ("moov.trak.tkhd", the first of each) made anew; `moov` must come
    last."""
    places, start, end = [], 0, len(data)
    for kind in path.encode().split(b"."):
        while data[start + 4 : start + 8] != kind:
            start += int.from_bytes(data[start : start + 4], "big")
            assert start < end, kind
        places.append(start)
        start, end = start + 8, start + int.from_bytes(data[start : start + 4], "big")
    content = make(data[start:end])
    out = bytearray(data[:start] + content + data[end:])
    for place in places:
        size = int.from_bytes(out[place : place + 4], "big") + len(content) - (end - start)
        out[place : place + 4] = size.to_bytes(4, "big")
    return bytes(out)


def turn(data: bytes, matrix: Sequence[float]) -> bytes:
    """The file with another display matrix."""
    a, b, c, d = (round(65536 * value) for value in matrix)
    packed = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return replace_box(data, "moov.trak.tkhd", lambda box: box[:40] + packed + box[76:])


def edit(data: bytes, parts: Sequence[tuple[int, int]]) -> bytes:
    """The file with an edit list: (frames, first frame) of each part; of 25 frames a second, B-frames' delay
    of 2."""
    rows = b"".join(struct.pack(">Iihh", 40 * count, 512 * (first + 2), 1, 0) for count, first in parts)
    return replace_box(data, "moov.trak.edts.elst", lambda box: struct.pack(">II", 0, len(parts)) + rows)


def remux(source: Path, target: Path, start_s: float = 0.0, key: int = 0, later: int = 0) -> None:
    """As `ffmpeg -ss START_S -c copy`: packets from some `later` than key frame number `key` on; times count
    from `start_s`."""
    import av

    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        video = container.streams.video[0]
        stream = out.add_stream_from_template(video)
        begin = round(start_s / video.time_base)
        packets = [packet for packet in container.demux(video) if packet.size]
        first = [place for place, packet in enumerate(packets) if packet.is_keyframe][key] + later
        for packet in packets[first:]:
            packet.pts, packet.dts, packet.stream = packet.pts - begin, packet.dts - begin, stream
            out.mux(packet)


def write_two_streams(path: Path, first: Path, second: Path) -> None:
    import av

    with av.open(str(first)) as one, av.open(str(second)) as two, av.open(str(path), "w") as out:
        pairs = [(source, out.add_stream_from_template(source.streams.video[0])) for source in (one, two)]
        for source, stream in pairs:
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)


def write_odd_videos(folder: Path) -> None:
    paths = {
        name: write_bars(folder / f"{name}{suffix}", codec, options, **settings)
        for name, (suffix, codec, options, settings) in ODD_VIDEOS.items()
    }
    base, refresh = paths["base"].read_bytes(), paths["refresh"].read_bytes()
    for name, (matrix, _) in ORIENTATIONS.items():
        (folder / f"{name}.mp4").write_bytes(turn(base, matrix))
    (folder / "turned_vp9.mp4").write_bytes(turn(paths["vp9_mp4"].read_bytes(), ORIENTATIONS["turned_90"][0]))
    (folder / "turned_30.mp4").write_bytes(turn(base, (0.866, 0.5, -0.5, 0.866)))
    (folder / "edit_start.mp4").write_bytes(edit(base, [(60, 30)]))
    (folder / "edit_parts.mp4").write_bytes(edit(base, [(20, 10), (30, 70), (10, 40)]))
    (folder / "edit_open.mp4").write_bytes(edit(paths["open"].read_bytes(), [(50, 10), (50, 10)]))
    # B-frames' delay is none of refresh's: its edits begin 2 frames later.
    (folder / "refresh_edit.mp4").write_bytes(edit(refresh, [(40, 60)]))
    remux(paths["base"], folder / "cut.mp4", 1.3, key=1)
    remux(paths["mpeg4_b"], folder / "cut_head.mkv", key=1)
    remux(paths["mpeg4_b"], folder / "cut_middle.mkv", later=9)
    stream = paths["refresh_ts"].with_name("base.ts")
    remux(paths["base"], stream)
    data = stream.read_bytes()
    stream.with_name("cut_middle_ts.ts").write_bytes(data[:752] + data[188 * (len(data) // 188 // 6) :])
    small, both = (
        write_bars(folder / "small.mp4", "mpeg4", {"b": "1k", "g": "999"}, total=20),
        folder / "two_streams.mp4",
    )
    write_two_streams(both, small, paths["mpeg4"])
    both.write_bytes(
        replace_box(both.read_bytes(), "moov.trak.tkhd", lambda box: bytes(4) + box[4:])
    )  # not the default one


@pytest.fixture(scope="session")
def bar_videos(tmp_path_factory) -> dict[str, Path]:
    """Paths of all BAR_VIDEOS, 120 frames each."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("bars")
    # In a process of its own: where decord was imported before PyAV, its libvpx takes the place of PyAV's and
    # fails.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    return {name: folder / f"{name}{suffix}" for name, (suffix, *_) in BAR_VIDEOS.items()}


@pytest.fixture(scope="session")
def odd_videos(tmp_path_factory) -> dict[str, Path]:
    """Paths of all ODD_VIDEOS, 120 frames each, and of what `write_odd_videos` makes of them."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("odd")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(folder), "odd"], check=True, env=environment)
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(name="orientations", scope="session")
def orientations_fixture():
    """ORIENTATIONS."""
    return ORIENTATIONS


@pytest.fixture(name="conftest", scope="session")
def conftest_fixture():
    """This module, for its functions: test modules are imported by path and cannot import it."""
    return sys.modules[__name__]


@pytest.fixture(name="read_numbers")
def read_numbers_fixture():
    """The function that reads the number off frames of bars."""
    return read_numbers


@pytest.fixture
def uninstall(monkeypatch):
    """Makes a decoding backend look as if it were not installed."""
    from vmae.data import decode  # here: what only writes videos does without torch

    def remove(name: str) -> None:
        gone = dataclasses.replace(
            decode.BACKENDS[name], missing=lambda: f"{name} is not installed: `pip install {name}`"
        )
        monkeypatch.setitem(decode.BACKENDS, name, gone)

    monkeypatch.setattr(decode, "BACKENDS", dict(decode.BACKENDS))
    return remove


if __name__ == "__main__":
    if sys.argv[2:] == ["odd"]:
        write_odd_videos(Path(sys.argv[1]))
    else:
        for name, (suffix, codec, options, steps) in BAR_VIDEOS.items():
            write_bars(Path(sys.argv[1]) / f"{name}{suffix}", codec, options, steps)
