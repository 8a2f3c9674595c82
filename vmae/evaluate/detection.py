"""`python -m vmae detect`: what the people in given boxes do at key frames.

    detections.csv    a line for each box and action: the person box's score times the sigmoid of the logit
    (published)
    results.json      frame mAP by the rules of AVA, average precision of each action, settings (with
    --annotations)
    actions.csv       a row for each action
    key_frame_*.png   some key frames with their boxes and actions

Boxes are those of --persons, or without them the annotated ones. Scores are written as they come, and a test
that is started again takes the key frames that are left.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from vmae.checkpoint.folder import find_weights
from vmae.checkpoint.identity import check_same, content_hash, frames_identity, model_identity
from vmae.checkpoint.load import NO_NUMBERS, add_source_arguments
from vmae.checkpoint.published import load_into, read_settings_and_weights
from vmae.checkpoint.source import at_size, source_config
from vmae.config import ModelConfig, SpeedConfig
from vmae.data.ava import (
    AvaBox,
    read_actions,
    read_annotations,
    read_detections,
    read_excluded,
    read_person_boxes,
    write_detections,
)
from vmae.data.decode import DecodeError, open_video
from vmae.data.detection_dataset import KeyClipConfig, KeyFrame, KeyFrameReader, find_videos, key_frames
from vmae.data.guarded import guarded
from vmae.data.quarantine import Failure
from vmae.errors import InputError
from vmae.evaluate.frame_map import FrameScores, frame_map
from vmae.files.atomic import write_atomically
from vmae.files.folder_lock import FolderLock
from vmae.flags import add_settings
from vmae.model.detector import Detector, build_detector
from vmae.settings import BATCH, Real, Whole
from vmae.train.checks import check_backend, check_output, resolve_device
from vmae.train.detection_settings import DetectionConfig
from vmae.train.metrics import code_version, read_log
from vmae.train.pretrain_settings import RunConfig, TrainingConfig

DETECTIONS, RESULTS, PARTS = "detections.csv", "results.json", "scores.part.jsonl"
SHOWN = 0.5  # least score of an action that a picture names


@dataclass
class LoadedDetector:
    """A detector in eval mode on the CPU.

    Attributes:
        model: with the weights.
        path: where they come from.
        clip: how it was trained to see key frames, with what the caller changed.
        actions: names by id, in the order of its outputs.
        note: what was loaded, and what was taken for granted of a file that does not say it, a line each.
    """

    model: Detector
    path: Path
    clip: KeyClipConfig
    actions: dict[int, str]
    note: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR|FILE", help="a run's folder, a checkpoint, or weights"
    )
    parser.add_argument(
        "--videos",
        required=True,
        metavar="DIR",
        help="holds ID.mp4 (or another ending), or a folder ID of images",
    )
    parser.add_argument(
        "--persons", metavar="CSV", help="person boxes with scores (default: the annotated boxes)"
    )
    parser.add_argument(
        "--min-score",
        type=Real(least=0, most=1000),
        default=0.8,
        help="of person boxes that are taken (0.8, as published)",
    )
    parser.add_argument("--annotations", metavar="CSV", help="what is true: scores the detections")
    parser.add_argument("--actions", metavar="PBTXT", help="actions that count (default: the checkpoint's)")
    parser.add_argument("--excluded", metavar="CSV", help="key frames that do not count")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for detections, scores and pictures"
    )
    parser.add_argument("--pictures", type=Whole(0, 10_000), default=4, help="key frames to draw (4)")
    add_settings(parser, DetectionConfig, "frame_pattern fps")
    clip = parser.add_argument_group("how key frames are seen (default: as in training)")
    add_settings(clip, KeyClipConfig, "stride origin", unset="as in training")
    add_settings(clip, ModelConfig, "num_frames img_size", unset="as in training")
    add_settings(clip, TrainingConfig, "dtype")
    add_source_arguments(parser, "official files; they need --actions")
    speed = parser.add_argument_group("settings that change speed only")
    speed.add_argument("--batch-size", type=BATCH, default=8, help="clips at once (8)")
    add_settings(speed, RunConfig, "device")
    add_settings(speed, SpeedConfig, "num_workers backend attention")


def run(args: argparse.Namespace) -> int:
    """The command; 1 where a video could not be decoded."""
    if args.persons is None and args.annotations is None:
        raise InputError("which boxes? Give --persons, or --annotations for the annotated ones")
    device = resolve_device(args.device)
    check_backend(args.backend, device)
    check_output(Path(args.output))
    loaded = load_detector(
        args.checkpoint,
        preset=args.model,
        source=(args.init_frames, args.init_size),
        actions=read_actions(args.actions) if args.actions else None,
        clip={name: getattr(args, name) for name in ("stride", "origin", "num_frames", "image_size")},
        backend=args.backend,
        attention=args.attention,
    )
    counted = read_actions(args.actions) if args.actions else loaded.actions
    truth = read_annotations(args.annotations, counted, skip_unlisted=True) if args.annotations else None
    excluded = read_excluded(args.excluded) if args.excluded else set()
    frames = _frames_to_test(args, loaded, truth, excluded)
    print(loaded.note, flush=True)
    with FolderLock(args.output, "a test of a detector"):
        records = score_frames(
            loaded,
            frames,
            args.output,
            device=device,
            dtype=args.dtype,
            batch_size=args.batch_size,
            workers=args.workers,
        )
        folder = Path(args.output)
        rows = detections_of(frames, records, list(loaded.actions))
        write_detections(folder / DETECTIONS, rows)
        failed = [record["error"] for record in records if "error" in record]
        for error in failed:
            print(f"could not be decoded, and has no detections: {error}")
        print(f"{len(rows)} detections on {len(frames) - len(failed)} key frames: {folder / DETECTIONS}")
        if truth is not None:
            # As they were written: what anyone finds who scores the file.
            found = read_detections(folder / DETECTIONS, loaded.actions)
            report(
                folder,
                frame_map(truth, found, counted, excluded=excluded),
                counted,
                {"checkpoint": str(loaded.path)},
            )
        for path in draw_frames(folder, frames, records, truth, loaded.actions, args.pictures):
            print(f"picture: {path}")
    return 1 if failed else 0


def _frames_to_test(
    args: argparse.Namespace, loaded: LoadedDetector, truth: Sequence[AvaBox] | None, excluded: set
) -> list[KeyFrame]:
    source = args.persons or args.annotations
    rows = read_person_boxes(args.persons, args.min_score) if args.persons else truth
    rows = [row for row in rows if row.key not in excluded]
    if not rows:
        raise InputError(f"{source}: all boxes are on excluded key frames")
    entries = find_videos(args.videos, [row.video for row in rows], pattern=args.frame_pattern)
    return key_frames(rows, source, entries, loaded.clip, fps=args.fps, videos=args.videos)


def load_detector(
    checkpoint: str | Path,
    *,
    preset: str | None = None,
    source: tuple[int | None, int | None] = (None, None),
    actions: dict[int, str] | None = None,
    clip: dict[str, Any] | None = None,
    **options: str,
) -> LoadedDetector:
    """The detector of a checkpoint, ready to test.

    Args:
        checkpoint: see `find_weights`.
        preset: the architecture, for files that do not hold it (official ones: its outputs are the ids from
            1).
        source: frames and side of the clips that the weights are of, for files that do not say.
        actions: names by id, for files that do not hold them.
        clip: settings of `KeyClipConfig` to change; None changes nothing.
        options: `backend` and `attention`.

    Raises:
        InputError: the file can't be read, is not a detector's, or does not tell its architecture or actions.
    """
    path = find_weights(checkpoint)
    settings, state = read_settings_and_weights(path)
    if "model" not in settings and (preset is None or actions is None or "head.weight" not in state):
        raise InputError(f"{path} does not say what it is; name --model and --actions (and it needs a head)")
    if "model" in settings and "action_ids" not in settings:
        raise InputError(
            f"{path} is not a detector's; `python -m vmae finetune-detection --init {checkpoint}` makes one"
        )
    changes = {name: value for name, value in (clip or {}).items() if value is not None}
    own, note = source_config(settings, state, path, preset, *source)
    size = {"num_frames": own.num_frames, "image_size": own.img_size}
    seen = KeyClipConfig.from_dict({**size, **settings.get("clip", {}), **changes})
    if "model" in settings:
        known = dict(zip(settings["action_ids"], settings["action_names"]))
    else:
        known = {
            number: actions.get(number, str(number)) for number in range(1, state["head.weight"].shape[0] + 1)
        }
    model = build_detector(
        at_size(own, num_frames=seen.num_frames, img_size=seen.image_size), len(known), **options
    )
    note = "\n".join(filter(None, (load_into(model, state, path), note)))
    return LoadedDetector(model.eval(), path, seen, known, note)


# --- Scores ---


def score_frames(
    loaded: LoadedDetector,
    frames: Sequence[KeyFrame],
    output: str | Path,
    *,
    device: torch.device,
    dtype: str = "float32",
    batch_size: int = 8,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """A record for each key frame, in order: `frame` (its number) and `scores` [M][K], or `error`.

    What an earlier start of the same test has written in `output` is kept.

    Raises:
        InputError: `output` holds another test, or can't be written.
    """
    folder, model = Path(output), loaded.model.to(device)
    boxes = content_hash([(*frames_identity(frame), frame.frame, frame.boxes) for frame in frames])
    clip = {**loaded.clip.to_dict(), "image_size": model.config.image_hw}
    about = {**model_identity(model), "clip": clip, "dtype": dtype, "key_frames": len(frames), "boxes": boxes}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = read_log(folder / PARTS)
        if before:
            check_same(
                before[0],
                about,
                f"{folder} holds another test",
                f"choose another --output, or remove {folder / PARTS}",
            )
        done = {record["frame"]: record for record in before[1:] if type(record.get("frame")) is int}
        with open(folder / PARTS, "a" if before else "w", encoding="utf-8") as part:
            part.write(
                "\n" if before else json.dumps(about) + "\n"
            )  # the last line may be torn: it ends here
            todo = [number for number in range(len(frames)) if number not in done]
            for record in _score(model, frames, todo, loaded.clip, device, dtype, batch_size, workers):
                part.write(json.dumps(record) + "\n")
                part.flush()
                done[record["frame"]] = record
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    return [done[number] for number in range(len(frames))]


@torch.no_grad()
def _score(
    model: Detector,
    frames: Sequence[KeyFrame],
    todo: Sequence[int],
    clip: KeyClipConfig,
    device: torch.device,
    dtype: str,
    batch_size: int,
    workers: int,
) -> Iterator[dict[str, Any]]:
    reader = KeyFrameReader(frames, clip)
    held: list[tuple[int, tuple[Tensor, Tensor]]] = []
    for count, (number, seen) in enumerate(
        tqdm(reader.read(todo, workers), total=len(todo), unit="clip", disable=None), 1
    ):
        if isinstance(seen, Failure):
            yield {"frame": number, "error": seen.error}
        else:
            held.append((number, seen))
        if held and (len(held) == batch_size or count == len(todo)):
            boxes = torch.nn.utils.rnn.pad_sequence([boxes for _, (_, boxes) in held], batch_first=True)
            clips = torch.stack([clip for _, (clip, _) in held])
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(clips.to(device), boxes.to(device))
            if logits.isnan().any():
                some = ", ".join(sorted({frames[own].path for own, _ in held}))
                raise InputError(f"the model's output on {some} is no number (NaN); {NO_NUMBERS}")
            for (own, (_, given)), scores in zip(held, logits.float().sigmoid().cpu()):
                yield {"frame": own, "scores": scores[: len(given)].tolist()}
            held = []


def detections_of(
    frames: Sequence[KeyFrame], records: Sequence[dict[str, Any]], actions: Sequence[int]
) -> list[AvaBox]:
    """A row for each box and action; the score is the action's times the person's.

    Args:
        actions: ids of the outputs, in order.
    """
    return [
        AvaBox(frame.video, frame.timestamp, box, action, person * score)
        for frame, record in zip(frames, records)
        for box, person, scores in zip(frame.boxes, frame.scores, record.get("scores", ()))
        for action, score in zip(actions, scores)
    ]


def report(folder: Path, scores: FrameScores, actions: dict[int, str], about: dict[str, Any]) -> None:
    """Write `results.json` and `actions.csv`, and print them.

    Raises:
        InputError: a file can't be written.
    """
    results = {
        "frame_map": 100 * scores.mean,
        **asdict(scores),
        **about,
        "torch": torch.__version__,
        **code_version(),
    }
    write_atomically(
        folder / RESULTS, lambda file: file.write(json.dumps(results, indent=1) + "\n"), binary=False
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["action", "name", "boxes", "average_precision"])
    rows = [
        [number, actions[number], scores.truth[number], f"{100 * value:.2f}"]
        for number, value in scores.actions.items()
    ]
    writer.writerows(rows)
    write_atomically(folder / "actions.csv", lambda file: file.write(text.getvalue()), binary=False)
    print(
        f"frame mAP at IoU 0.5: {100 * scores.mean:.2f} % over {len(scores.actions)} actions, "
        f"{sum(scores.truth.values())} "
        f"annotations on {scores.key_frames} key frames, {scores.detections} detections counted"
    )
    width = max(len(name) for name in (*actions.values(), "action"))
    print(f"{'action':{width}}  boxes  average precision")
    for _, name, boxes, value in sorted(rows, key=lambda row: float(row[3])):
        print(f"{name:{width}}  {boxes:5}  {value:>6} %")


# --- Pictures ---


def draw_frames(
    folder: Path,
    frames: Sequence[KeyFrame],
    records: Sequence[dict[str, Any]],
    truth: Sequence[AvaBox] | None,
    actions: dict[int, str],
    count: int,
) -> list[Path]:
    """PNG files of `count` key frames, spread over the test: person boxes with numbers, and below, in words,
    what was found (score at least 0.5, or the best) and what is annotated.

    Raises:
        InputError: a file can't be written.
    """
    good = [number for number, record in enumerate(records) if "scores" in record]
    paths = []
    for place in sorted({good[i * len(good) // count] for i in range(count)} if good and count else ()):
        frame = frames[place]
        try:
            picture = guarded(_decode_key_frame, frame)
        except DecodeError:
            continue
        path = folder / f"key_frame_{frame.video}_{frame.timestamp:04}.png"
        lines = _captions(frame, records[place]["scores"], truth, actions)
        try:
            _draw(picture, frame, lines).save(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        paths.append(path)
    return paths


def _decode_key_frame(frame: KeyFrame) -> np.ndarray:
    """uint8 [H, W, 3]"""
    with open_video(frame) as reader:
        return reader.frames([frame.frame])[0]


def _captions(
    frame: KeyFrame,
    scores: Sequence[Sequence[float]],
    truth: Sequence[AvaBox] | None,
    actions: dict[int, str],
) -> list[str]:
    names, lines = list(actions.values()), []
    for number, own in enumerate(scores, 1):
        ranked = sorted(zip(own, names), reverse=True)
        shown = [pair for pair in ranked if pair[0] >= SHOWN] or ranked[:1]
        lines.append(f"box {number}, found: " + ", ".join(f"{name} {score:.2f}" for score, name in shown))
    annotated: dict[tuple, list[str]] = {}
    for row in truth or ():
        if row.key == frame.key:
            annotated.setdefault(row.box, []).append(actions.get(row.action, str(row.action)))
    order = sorted(
        annotated, key=lambda box: min(range(len(frame.boxes)), key=lambda i: _distance(box, frame.boxes[i]))
    )
    for box in order:
        nearest = min(range(len(frame.boxes)), key=lambda i: _distance(box, frame.boxes[i])) + 1
        lines.append(f"nearest to box {nearest}, annotated: {', '.join(annotated[box])}")
    return lines


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.abs(np.subtract(a, b)).sum())


def _draw(picture: np.ndarray, frame: KeyFrame, lines: Sequence[str]) -> Image.Image:
    """The picture at least 384 pixels wide, white boxes with black edges (readable in greyscale), and lines
    below."""
    scale = max(1, -(-384 // picture.shape[1]))
    image = Image.fromarray(picture).resize(
        (picture.shape[1] * scale, picture.shape[0] * scale), Image.Resampling.NEAREST
    )
    title = f"{frame.video}, {frame.timestamp} s"
    sheet = Image.new("RGB", (image.width, image.height + 16 * (len(lines) + 1) + 6), "white")
    sheet.paste(image)
    draw = ImageDraw.Draw(sheet)
    for number, box in enumerate(frame.boxes, 1):
        corners = [round(share * side) for share, side in zip(box, (image.width, image.height) * 2)]
        draw.rectangle(
            [corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline="black", width=4
        )
        draw.rectangle(corners, outline="white", width=2)
        draw.rectangle([corners[0], corners[1], corners[0] + 12, corners[1] + 13], fill="white")
        draw.text((corners[0] + 3, corners[1] + 1), str(number), fill="black")
    for place, line in enumerate([title, *lines]):
        draw.text((4, image.height + 4 + 16 * place), line, fill="black")
    return sheet
