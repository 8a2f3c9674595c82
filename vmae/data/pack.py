"""`python -m vmae pack LIST OUT`: re-encode videos once, so that every clip of every epoch decodes faster.

What makes clips slow is pixels that the crop throws away, and key frames far apart: a clip of 64 frames
starts, on average, half a group of pictures after the key frame that its decoding starts from. Packed: short
side 256, a closed group of 12, H.264 with the loop filter and arithmetic coding switched off (`fastdecode`),
and three of four pictures that no other one needs, which PyAV's reader leaves out; frames keep their number,
their time and their colours' meaning (range, matrix, primaries, transfer), and are stored as a player shows
them: turned or mirrored, without a display matrix. Labels stay in the list. Videos already packed are left
alone, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vmae.config import _Checked
from vmae.data.check import decode_clip
from vmae.data.decode import DecodeError, open_video
from vmae.data.labels import LABELLED, add_labelled_argument, read_any_list
from vmae.data.manifest import VideoEntry, raise_problems, write_list
from vmae.data.orientation import UPRIGHT, Orientation, read_orientation
from vmae.data.quarantine import QUARANTINE_NAME, Failure, Quarantine, list_failures
from vmae.data.readers.pyav import PyavReader
from vmae.data.video_reader import memory_as_decode_error
from vmae.data.workers import VideoTask, WorkerPool
from vmae.errors import InputError
from vmae.files.folder_lock import FolderLock
from vmae.files.json_files import parse_json
from vmae.settings import PROCESSES, SIDE, Whole, limits, ranged

SETTINGS_NAME, LIST_NAME, REPORT_NAME = "pack.json", "list.txt", "report.json"
# of what packed videos hold: files of another one are not taken for done. 1 lost rotation and colour tags
VERSION = 2
_TARGET_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.ENOENT, errno.EIO}


@dataclass(frozen=True, kw_only=True)
class PackConfig(_Checked):
    """How videos are encoded.

    Attributes:
        short_side: pixels; smaller videos keep their size.
        gop: frames from one key frame to the next.
        crf: x264's quality, smaller is better and larger.
        preset: x264's effort.
        keep_every: 4 stores every fourth frame, for clips whose stride is a multiple of 4; the first one is
            drawn for each video (`draw_phase`). Only an index of shards tells that frames are left out.
    """

    short_side: int = ranged(256, Whole(16, SIDE.most))
    gop: int = ranged(12, Whole(1, 10_000))
    crf: int = ranged(20, Whole(0, 51))
    preset: str = "medium"
    keep_every: int = ranged(1, Whole(1, 64))

    def encoder_options(self) -> dict[str, str]:
        # Against x264's own choice of B pictures, measured on the clips of vmae.synthetic.samples: 2 to 13 %
        # less time a clip, 1 % more to 6 % fewer bytes.
        pictures = "bframes=3:b-adapt=0:b-pyramid=none"
        params = f"keyint={self.gop}:min-keyint={self.gop}:scenecut=0:open-gop=0:{pictures}"
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
    part = Path(target).with_suffix(".part.mp4")
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


# --- Lists ---


class _Packer(VideoTask):
    """What runs in the workers: packs a video unless that was done before; gives None, or why it could
    not."""

    def __init__(self, entries: Sequence[VideoEntry], targets: Sequence[Path], config: PackConfig) -> None:
        super().__init__()
        self.entries, self.targets, self.config = entries, targets, config

    def __getitem__(self, video: int) -> Failure | InputError | None:
        entry, target = self.entries[video], self.targets[video]
        if video in self.blocked:
            return Failure(entry.path, self.blocked[video], "worker")
        self.watch(video)
        if _is_done(entry.path, target):
            return None
        try:
            with memory_as_decode_error(entry.path):
                pack_video(entry.path, target, self.config)
        except DecodeError as error:
            return Failure(entry.path, str(error), error.library or "pyav")
        except (InputError, OSError) as error:
            if isinstance(error, OSError):
                return InputError(f"cannot write {str(target)!r}: {error.strerror}")
            return InputError(str(error))
        return None


def _is_done(source: str, target: Path) -> bool:
    """Whether `target` is there and `source` was not changed after it."""
    try:
        return os.stat(source).st_mtime <= target.stat().st_mtime
    except FileNotFoundError:
        return False


def _target(folder: Path, number: int, path: str) -> Path:
    """Where video `number` goes. The name holds a hash of the original's path: a list in another order finds
    its own videos."""
    digest = hashlib.sha256(
        f"{VERSION} {os.path.abspath(path)}".encode("utf-8", "surrogateescape")
    ).hexdigest()[:10]
    stem = re.sub(r"[^\w.+-]", "_", Path(path).stem)[:40]
    return folder / "videos" / f"{number // 1000:03}" / f"{number:06}_{stem}_{digest}.mp4"


def pack_list(
    entries: Sequence[VideoEntry],
    folder: Path,
    config: PackConfig,
    *,
    labels: Sequence[Iterable[int] | None] | None = None,
    labelled: bool = False,
    workers: int = 1,
    hang_s: float = 3600.0,
) -> list[VideoEntry]:
    """Pack all videos into `folder/videos`, write `folder/list.txt`, and return its entries.

    Frame folders stay where they are. A video that cannot be packed is left out and stands in
    `folder/quarantine.jsonl`.

    Args:
        labels, labelled: for the list, see `write_list`.

    Raises:
        InputError: the folder was packed with other settings, cannot be written, or PyAV is not installed.
    """
    _claim_folder(folder, config)
    videos = [entry for entry in entries if entry.kind == "video"]
    targets = [_target(folder, number, entry.path) for number, entry in enumerate(videos)]
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
    packed, kept = [], []
    for entry, own in zip(entries, labels or [None] * len(entries), strict=True):
        if entry.kind != "video":
            packed.append(entry)
        elif (video := next(numbers)) not in bad:
            packed.append(VideoEntry(str(targets[video]), "video", 0, -1, entry.stride))
        else:
            continue
        kept.append(own)
    write_list(folder / LIST_NAME, packed, kept, root=folder, labelled=labelled)
    return packed


def _claim_folder(folder: Path, config: PackConfig) -> None:
    settings = folder / SETTINGS_NAME
    try:
        if settings.exists():
            before = parse_json(settings.read_text(encoding="utf-8"))
            if before != asdict(config):
                raise InputError(
                    f"{folder} was packed with {before}, not {asdict(config)}; choose another folder"
                )
        folder.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(asdict(config)) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {str(folder)!r}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{settings} is damaged; remove it") from None


# --- What it gained ---


class _Measurer(VideoTask):
    """What runs in a worker: seconds of clips of an original and of its packed video, in turn, with the same
    random numbers."""

    def __init__(self, pairs: Sequence[tuple[VideoEntry, VideoEntry]], backend: str, rounds: int) -> None:
        super().__init__()
        self.pairs, self.backend, self.rounds = pairs, backend, rounds

    def __getitem__(self, number: int) -> list[list[float]] | Failure:
        path = self.pairs[number][0].path
        if number in self.blocked:
            return Failure(path, self.blocked[number], "worker")
        self.watch(number)
        rounds = []
        try:
            for turn in range(self.rounds + 1):
                rngs = (np.random.default_rng((turn, number)) for _ in range(2))
                clips = [
                    decode_clip(*given, backend=self.backend)
                    for given in zip(self.pairs[number], rngs, strict=True)
                ]
                rounds.append([clip["clip_s"] for clip in clips])
            return rounds[1:]  # the first one warms up
        except (InputError, OSError) as error:
            return Failure(path, str(error), getattr(error, "library", None))


def measure_gain(
    pairs: Sequence[tuple[VideoEntry, VideoEntry]],
    *,
    backend: str = "auto",
    rounds: int = 5,
    hang_s: float = 300.0,
) -> dict[str, Any]:
    """Clips a second of originals and packed videos, in one process and in turn; `unmeasured` says what could
    not be read.

    An original need not be fit for it: packing reads from start to end, a clip may begin anywhere.
    """
    pool = WorkerPool(
        _Measurer(pairs, backend, rounds), iter(range(len(pairs))), count=1, prefetch=1, hang_s=hang_s
    )
    try:
        answers = list(pool)
    finally:
        pool.close()
    good = [answer for answer in answers if not isinstance(answer, Failure)]
    measured: dict[str, Any] = {"videos": len(good)}
    if good:
        original, packed = np.sum(good, axis=0).T.tolist()  # seconds of each round
        gains = [a / b for a, b in zip(original, packed, strict=True)]
        rates = {
            "original": len(good) / statistics.median(original),
            "packed": len(good) / statistics.median(packed),
        }
        gain = {"median": statistics.median(gains), "min": min(gains), "max": max(gains)}
        measured |= {"clips_per_s": rates, "gain": gain}
    unmeasured = [answer._asdict() for answer in answers if isinstance(answer, Failure)]
    return measured | ({"unmeasured": unmeasured} if unmeasured else {})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "list",
        metavar="LIST",
        help="list of videos and frame folders, labelled or not, or a folder of videos",
    )
    parser.add_argument("output", metavar="OUT", help="folder for the packed videos, their list and a report")
    parser.add_argument("--data-root", metavar="DIR", help="where the list's relative paths start")
    add_labelled_argument(parser)
    parser.add_argument(
        "--short-side",
        type=limits(PackConfig, "short_side"),
        default=PackConfig.short_side,
        help="pixels (256)",
    )
    parser.add_argument(
        "--gop",
        type=limits(PackConfig, "gop"),
        default=PackConfig.gop,
        help="frames from one key frame to the next (12)",
    )
    parser.add_argument(
        "--crf",
        type=limits(PackConfig, "crf"),
        default=PackConfig.crf,
        help="quality, smaller is better (20)",
    )
    parser.add_argument("--preset", default=PackConfig.preset, help="x264's effort (medium)")
    parser.add_argument(
        "--workers", type=PROCESSES, default=os.cpu_count() or 1, help="processes (one for each core)"
    )


def run(args: argparse.Namespace) -> int:
    """The command; 1 where a video was left out."""
    config = PackConfig(short_side=args.short_side, gop=args.gop, crf=args.crf, preset=args.preset)
    folder = Path(args.output)
    if Path(args.list).is_dir() and folder.resolve().is_relative_to(Path(args.list).resolve()):
        raise InputError(
            f"{folder} is inside {args.list}, so its videos would be packed next time; choose another folder"
        )
    found = read_any_list(args.list, args.data_root, LABELLED[args.labelled])
    raise_problems(args.list, args.data_root, found.problems, len(found.entries))
    with FolderLock(folder, "videos being packed"):
        packed = pack_list(
            found.entries, folder, config, labels=found.labels, labelled=found.labelled, workers=args.workers
        )
        videos = [entry for entry in found.entries if entry.kind == "video"]
        targets = {
            int(Path(entry.path).name.split("_")[0]): entry for entry in packed if entry.kind == "video"
        }
        pairs = [(videos[number], target) for number, target in targets.items()]
        report = {"settings": asdict(config), "videos": len(videos), "packed": len(pairs)} | _sizes(pairs)
        _write_report(folder, report)
        if pairs:
            _write_report(folder, report | {"decoding": _measure(pairs)})
    left_out = len(videos) - len(pairs)
    bad = ""
    if left_out:
        bad = f"; {left_out} could not be packed, see {folder / QUARANTINE_NAME}"
    print(f"{len(pairs)} of {len(videos)} videos packed: {folder / LIST_NAME}{bad}")
    return 1 if left_out else 0


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    part = folder / f"{REPORT_NAME}.part"
    try:
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / REPORT_NAME)
    except OSError as error:
        raise InputError(f"cannot write {str(folder / REPORT_NAME)!r}: {error.strerror}") from None


def _sizes(pairs: Sequence[tuple[VideoEntry, VideoEntry]]) -> dict[str, int]:
    """Bytes of all originals and packed videos that are there; printed too."""
    before = after = 0
    for pair in pairs:
        try:
            sizes = [os.path.getsize(entry.path) for entry in pair]
        except OSError:  # taken away meanwhile
            continue
        before, after = before + sizes[0], after + sizes[1]
    if before:
        print(
            f"size: {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB packed ({after / before:.2f} x)"
        )
    return {"bytes_before": before, "bytes_after": after}


def _measure(pairs: Sequence[tuple[VideoEntry, VideoEntry]]) -> dict[str, Any]:
    """The gain of up to eight; printed too."""
    try:
        gain = measure_gain(pairs[:: max(len(pairs) // 8, 1)][:8])
    except (InputError, RuntimeError) as error:
        gain = {"videos": 0, "error": str(error)}
    if gain["videos"]:
        rates, ratio = gain["clips_per_s"], gain["gain"]
        print(
            f"decoding, {gain['videos']} videos, one process: {rates['original']:.1f} clips/s before, "
            f"{rates['packed']:.1f} "
            f"packed ({ratio['median']:.2f} x, {ratio['min']:.2f} to {ratio['max']:.2f})"
        )
    for failure in gain.get("unmeasured", []):
        print(f"not measured: {list_failures([(failure['path'], failure['error'])])}")
    if "error" in gain:
        print(f"not measured: {gain['error']}")
    return gain
