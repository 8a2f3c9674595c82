"""`python -m vmae pack LIST OUT`: re-encode videos once, so that every clip of every epoch decodes faster.

What makes clips slow is pixels that the crop throws away, and key frames far apart: a clip of 64 frames starts, on
average, half a group of pictures after the key frame that its decoding starts from. Packed: short side 256, a closed
group of 12, H.264 with the loop filter and arithmetic coding switched off (`fastdecode`), and three of four pictures
that no other one needs, which PyAV's reader leaves out; frames keep their number and their time. Videos already packed
are left alone, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vmae.data.check import decode_clip
from vmae.data.decode import DecodeError, open_video
from vmae.data.files import memory_as_decode_error
from vmae.data.manifest import DEFAULT_PATTERN, VideoEntry, read_list
from vmae.data.quarantine import QUARANTINE_NAME, Failure, Quarantine
from vmae.data.workers import VideoTask, WorkerPool
from vmae.errors import InputError

SETTINGS_NAME, LIST_NAME, REPORT_NAME = "pack.json", "list.txt", "report.json"


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How videos are encoded.

    Attributes:
        short_side: pixels; smaller videos keep their size.
        gop: frames from one key frame to the next.
        crf: x264's quality, smaller is better and larger.
        preset: x264's effort.
    """

    short_side: int = 256
    gop: int = 12
    crf: int = 20
    preset: str = "medium"

    def __post_init__(self) -> None:
        if self.short_side < 16 or self.gop < 1 or not 0 <= self.crf <= 51:
            raise InputError(f"cannot pack with {asdict(self)}: short side from 16, GOP from 1, crf 0 to 51")

    def encoder_options(self) -> dict[str, str]:
        # Against x264's own choice of B pictures, measured on the clips of vmae.data.samples: 2 to 13 % less time a clip,
        # 1 % more to 6 % fewer bytes.
        pictures = "bframes=3:b-adapt=0:b-pyramid=none"
        params = f"keyint={self.gop}:min-keyint={self.gop}:scenecut=0:open-gop=0:{pictures}"
        return {"preset": self.preset, "crf": str(self.crf), "tune": "fastdecode", "threads": "1", "x264-params": params}


def packed_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) after scaling the short side down to `short_side`; even, as 4:2:0 colour needs."""
    scale = min(short_side / min(width, height), 1.0)
    return tuple(max(min(2 * round(side * scale / 2), side // 2 * 2), 2) for side in (width, height))


def pack_video(source: str | Path, target: str | Path, config: PackConfig) -> int:
    """Re-encode one video; `target` is complete or absent. Returns the number of frames.

    Raises:
        DecodeError: the video cannot be decoded to its end, or loses frames on the way.
        InputError: PyAV is not installed, or lacks the encoder.
    """
    try:
        import av
    except ImportError as error:
        raise InputError(f"packing needs PyAV ({error}): `pip install av`") from None
    with open_video(source, "pyav") as reader:
        expected = len(reader)
    part = Path(target).with_suffix(".part.mp4")
    try:
        with av.open(str(source)) as container, av.open(str(part), "w") as out:
            frames = _encode(container, out, config)
        if frames != expected:
            raise DecodeError(f"{source}: cannot be decoded: {frames} of {expected} frames came out")
    except av.FFmpegError as error:
        part.unlink(missing_ok=True)
        raise DecodeError(f"{source}: cannot be packed: {error.strerror}") from None
    except DecodeError:
        part.unlink(missing_ok=True)
        raise
    part.replace(target)
    return frames


def _encode(container, out, config: PackConfig) -> int:
    source = container.streams.video[0]
    width, height = packed_size(source.codec_context.width, source.codec_context.height, config.short_side)
    stream = out.add_stream("libx264", rate=source.average_rate or 25, options=config.encoder_options())
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.time_base = source.time_base
    frames, last = 0, None
    for frame in container.decode(source):
        if frame.is_corrupt:
            raise DecodeError(f"{container.name}: cannot be decoded: frame {frames} is corrupt")
        if frame.pts is None or (last is not None and frame.pts <= last):  # AVI: no times; keep the order
            frame.pts = 0 if last is None else last + max(round(1 / (float(source.average_rate or 25) * source.time_base)), 1)
        last, time_base = frame.pts, source.time_base
        frame = frame.reformat(width=width, height=height, format="yuv420p", interpolation="AREA")
        frame.pts, frame.time_base, frame.pict_type = last, time_base, 0
        out.mux(stream.encode(frame))
        frames += 1
    out.mux(stream.encode(None))
    return frames


class _Packer(VideoTask):
    """What runs in the workers: packs a video unless that was done before; gives None, or why it could not."""

    def __init__(self, entries: Sequence[VideoEntry], targets: Sequence[Path], config: PackConfig) -> None:
        super().__init__()
        self.entries, self.targets, self.config = entries, targets, config

    def __getitem__(self, video: int) -> Failure | InputError | None:
        entry, target = self.entries[video], self.targets[video]
        if video in self.blocked:
            return Failure(entry.path, self.blocked[video], "worker")
        if target.exists():
            return None
        self.watch(video)
        try:
            with memory_as_decode_error(entry.path):
                pack_video(entry.path, target, self.config)
        except DecodeError as error:
            return Failure(entry.path, str(error), error.library or "pyav")
        except (InputError, OSError) as error:
            return InputError(f"cannot write {str(target)!r}: {error}" if isinstance(error, OSError) else str(error))
        return None


def pack_list(
    entries: Sequence[VideoEntry], folder: Path, config: PackConfig, *, workers: int = 1, hang_s: float = 3600.0
) -> list[VideoEntry]:
    """Pack all videos into `folder/videos`, write `folder/list.txt`, and return its entries.

    Frame folders stay where they are. A video that cannot be packed is left out and stands in `folder/quarantine.jsonl`.

    Raises:
        InputError: the folder was packed with other settings, cannot be written, or PyAV is not installed.
    """
    _claim_folder(folder, config)
    videos = [entry for entry in entries if entry.kind == "video"]
    targets = [folder / "videos" / f"{i // 1000:03}" / f"{i:06}_{Path(entry.path).stem}.mp4" for i, entry in enumerate(videos)]
    for parent in {target.parent for target in targets}:
        parent.mkdir(parents=True, exist_ok=True)
    quarantine = Quarantine(folder / QUARANTINE_NAME, 1.0)
    packer = _Packer(videos, targets, config)
    pool = WorkerPool(packer, iter(range(len(videos))), count=workers, prefetch=2, hang_s=hang_s)
    bad = set()
    try:
        for video, answer in enumerate(tqdm(pool, total=len(videos), unit="video", disable=None)):
            if isinstance(answer, InputError):
                raise answer
            quarantine.add(0 if answer else 1, [answer] if answer else [])
            if answer:
                bad.add(video)
    finally:
        pool.close()
    numbers = iter(range(len(videos)))
    packed = []
    for entry in entries:
        if entry.kind != "video":
            packed.append(entry)
        elif (video := next(numbers)) not in bad:
            packed.append(VideoEntry(str(targets[video]), "video", 0, -1, entry.stride))
    _write_list(folder / LIST_NAME, packed, folder)
    return packed


def _claim_folder(folder: Path, config: PackConfig) -> None:
    settings = folder / SETTINGS_NAME
    try:
        if settings.exists():
            before = json.loads(settings.read_text(encoding="utf-8"))
            if before != asdict(config):
                raise InputError(f"{folder} was packed with {before}, not {asdict(config)}; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(asdict(config)) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {str(folder)!r}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{settings} is damaged; remove it") from None


def _write_list(path: Path, entries: Sequence[VideoEntry], folder: Path) -> None:
    lines, stride, pattern = [], None, DEFAULT_PATTERN
    for entry in entries:
        if (entry.stride, entry.pattern) != (stride, pattern):
            stride, pattern = entry.stride, entry.pattern
            lines.append(f"#! stride={stride or 'default'} pattern={pattern}\n")
        if entry.kind == "video":
            lines.append(f"{Path(entry.path).relative_to(folder).as_posix()} 0 -1\n")
        else:
            lines.append(f"{os.path.abspath(entry.path)} {entry.start} {entry.total}\n")
    part = path.with_name(path.name + ".part")
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(path)


def measure_gain(pairs: Sequence[tuple[VideoEntry, VideoEntry]], *, backend: str = "auto", rounds: int = 5) -> dict[str, Any]:
    """Clips a second of originals and packed videos, in one process and in turn, with the same frames and crops' draws."""
    times: dict[str, list[float]] = {"original": [], "packed": []}
    for turn in range(rounds + 1):
        for name, side in (("original", 0), ("packed", 1)):
            clips = (decode_clip(pair[side], np.random.default_rng((turn, i)), backend=backend) for i, pair in enumerate(pairs))
            total = sum(clip["clip_s"] for clip in clips)
            if turn:  # the first round warms up
                times[name].append(total)
    rates = {name: len(pairs) / statistics.median(values) for name, values in times.items()}
    gains = [a / b for a, b in zip(times["original"], times["packed"], strict=True)]
    gain = {"median": statistics.median(gains), "min": min(gains), "max": max(gains)}
    return {"videos": len(pairs), "clips_per_s": rates, "gain": gain}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("list", metavar="LIST", help="list file: one video or frame folder a line")
    parser.add_argument("output", metavar="OUT", help="folder for the packed videos, their list and a report")
    parser.add_argument("--data-root", metavar="DIR", help="where the list's relative paths start")
    parser.add_argument("--short-side", type=int, default=PackConfig.short_side, help="pixels (256)")
    parser.add_argument("--gop", type=int, default=PackConfig.gop, help="frames from one key frame to the next (12)")
    parser.add_argument("--crf", type=int, default=PackConfig.crf, help="quality, smaller is better (20)")
    parser.add_argument("--preset", default=PackConfig.preset, help="x264's effort (medium)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one for each core)")


def run(args: argparse.Namespace) -> int:
    """The command; 1 where a video was left out."""
    if args.workers < 1:
        raise InputError(f"--workers ({args.workers}) must be at least 1")
    config = PackConfig(short_side=args.short_side, gop=args.gop, crf=args.crf, preset=args.preset)
    entries = read_list(args.list, args.data_root)
    folder = Path(args.output)
    packed = pack_list(entries, folder, config, workers=args.workers)
    videos = [entry for entry in entries if entry.kind == "video"]
    targets = {int(Path(entry.path).name[:6]): entry for entry in packed if entry.kind == "video"}
    pairs = [(videos[number], target) for number, target in targets.items()]
    report: dict[str, Any] = {"settings": asdict(config), "videos": len(videos), "packed": len(pairs)}
    if pairs:
        report |= _measure(pairs)
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    left_out = len(videos) - len(pairs)
    bad = f"; {left_out} could not be packed, see {folder / QUARANTINE_NAME}" if left_out else ""
    print(f"{len(pairs)} of {len(videos)} videos packed: {folder / LIST_NAME}{bad}")
    return 1 if left_out else 0


def _measure(pairs: Sequence[tuple[VideoEntry, VideoEntry]]) -> dict[str, Any]:
    """Bytes of all, and the gain of up to eight; printed too."""
    before, after = (sum(os.path.getsize(pair[side].path) for pair in pairs) for side in (0, 1))
    gain = measure_gain(pairs[:: max(len(pairs) // 8, 1)][:8])
    rates, ratio = gain["clips_per_s"], gain["gain"]
    print(f"size: {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB packed ({after / before:.2f} x)")
    print(
        f"decoding, {gain['videos']} videos, one process: {rates['original']:.1f} clips/s before, {rates['packed']:.1f} packed "
        f"({ratio['median']:.2f} x, {ratio['min']:.2f} to {ratio['max']:.2f})"
    )
    return {"bytes_before": before, "bytes_after": after, "decoding": gain}
