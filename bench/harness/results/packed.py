"""Result of packed.py: clips of packed videos, each lever and other libraries; and of packed_codecs.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from harness.json_records import Runs, Spread
from harness.results.base import Result
from harness.table import Table, median_of, number, spread_text
from vmae.data.pack import PackConfig


@dataclass(frozen=True, kw_only=True)
class PackedWay:
    """A way to make clips of packed videos.

    Attributes:
        library: with its version; "vmae" for this one.
        error_levels, mean_levels: largest and mean difference from clips of whole frames.
        clip_cpu_ms: CPU milliseconds a clip, of each round.
        speedup: over `files, whole frames`, round by round.
    """

    kind: str = "way"
    way: str
    library: str
    error_levels: int
    mean_levels: float
    clip_cpu_ms: Runs
    clips_per_s_per_core: float
    speedup: Spread


@dataclass(frozen=True, kw_only=True)
class PackedParts:
    """CPU milliseconds of a clip's parts, by packet table."""

    kind: str = "parts"
    way: str
    open: float
    decode: float
    convert: float
    resize: float


@dataclass(frozen=True, kw_only=True)
class PackedBytes:
    """Bytes of all packed videos and of their packet tables.

    Attributes:
        psnr: decibels of the frames that they have, all of a clip, the mean of the clips.
    """

    kind: str = "bytes"
    videos: str
    bytes: int
    table_bytes: int
    pictures: int
    psnr: float


@dataclass(frozen=True, kw_only=True)
class PackedResult(Result):
    """Attributes:
    gop: frames from one key frame to the next.
    absent: libraries that could not run, with the reason.
    """

    title: ClassVar[str] = "Clips of packed videos"

    records: list[PackedWay | PackedParts | PackedBytes]
    gop: int = PackConfig.gop
    absent: dict[str, str] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        ways, parts, sizes = [], [], []
        for r in self.records:
            if isinstance(r, PackedWay):
                times = [spread_text(r.clip_cpu_ms, 1), number(r.clips_per_s_per_core, 1, 1)]
                off = f"{r.error_levels} ({r.mean_levels:.2f})"
                ways.append([r.way, r.library, *times, spread_text(r.speedup, 2), off])
            elif isinstance(r, PackedParts):
                parts.append([r.way, *(f"{value:.2f}" for value in (r.open, r.decode, r.convert, r.resize))])
            else:
                each = f"{r.table_bytes / r.pictures:.1f}"
                sizes.append(
                    [r.videos, number(r.bytes, 1e3), number(r.table_bytes, 1e3, 1), each, f"{r.psnr:.1f}"]
                )
        head = [
            "way",
            "library",
            "CPU ms a clip (min to max)",
            "clips/s a core",
            "times as fast",
            "levels off (mean)",
        ]
        return [
            Table(self.title, head, ways, f"A key frame every {self.gop} frames; {self.conditions}"),
            Table("Parts, CPU ms a clip", ["way", "open", "decode", "convert", "resize"], parts),
            Table("Sizes", ["videos", "kB", "kB of tables", "bytes a picture", "PSNR, dB"], sizes),
        ]


@dataclass(frozen=True, kw_only=True)
class CodecRecord:
    """A way to encode packed videos.

    Attributes:
        bytes: of all clips.
        psnr: decibels, all frames of each clip, the mean of the clips, against the originals at this size.
        encode_s: CPU seconds of all clips.
        wrong: why it has no speed.
    """

    codec: str
    options: str
    bytes: int | None = None
    psnr: float | None = None
    encode_s: float | None = None
    clip_cpu_ms: Runs | None = None
    clips_per_s_per_core: float | None = None
    wrong: str | None = None


@dataclass(frozen=True, kw_only=True)
class CodecsResult(Result):
    title: ClassVar[str] = "Codecs of packed videos"

    records: list[CodecRecord]

    def tables(self) -> list[Table]:
        base = next((r.bytes for r in self.records if r.bytes), 1)
        rows = []
        for r in self.records:
            size = "" if r.bytes is None else f"{r.bytes / base:.2f}"
            quality = "" if r.psnr is None else f"{r.psnr:.1f}"
            times = [number(median_of(r.clip_cpu_ms), 1, 1), number(r.clips_per_s_per_core, 1, 1)]
            encoding = number(r.encode_s, 1, 1)
            wrong = f"NO SPEED: {r.wrong}" if r.wrong else ""
            rows.append([r.codec, r.options, *times, size, quality, encoding, wrong])
        head = ["codec", "options", "CPU ms a clip", "clips/s a core", "bytes (first: 1)", "PSNR, dB"]
        return [Table(self.title, [*head, "CPU s to encode", "wrong"], rows, self.conditions)]
