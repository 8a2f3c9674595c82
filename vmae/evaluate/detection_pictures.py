"""Pictures of `detect`: key frames with their boxes, and the actions that were found and annotated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vmae.data.ava import AvaBox, Box, seconds_text
from vmae.data.decode import DecodeError, open_video
from vmae.data.detection_dataset import KeyFrame
from vmae.data.guarded import guarded
from vmae.errors import InputError

SHOWN = 0.5  # least score of an action that a picture names


def draw_frames(
    folder: Path,
    frames: Sequence[KeyFrame],
    records: Sequence[dict[str, Any]],
    truth: Sequence[AvaBox] | None,
    actions: dict[int, str],
    count: int,
) -> list[Path]:
    """Write PNG files of `count` key frames, evenly spread over the test: numbered person boxes, and below
    them, as text, the detected actions (score of at least 0.5, or else the best one) and the annotated ones.

    Raises:
        InputError: a file can't be written.
    """
    good = [number for number, record in enumerate(records) if "scores" in record]
    if not good:
        return []
    paths = []
    for place in sorted({good[i * len(good) // count] for i in range(count)}):
        frame = frames[place]
        try:
            picture = guarded(_decode_key_frame, frame)
        except DecodeError:
            continue
        path = folder / f"key_frame_{frame.video}_{seconds_text(frame.timestamp)}.png"
        lines = _captions(frame, records[place]["scores"], truth, actions)
        try:
            _draw(picture, frame, lines).save(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        paths.append(path)
    return paths


def _decode_key_frame(frame: KeyFrame) -> np.ndarray:
    """Picture of a key frame, uint8 [H, W, 3]."""
    with open_video(frame) as reader:
        return reader.frames([frame.frame])[0]


def _captions(
    frame: KeyFrame,
    scores: Sequence[Sequence[float]],
    truth: Sequence[AvaBox] | None,
    actions: dict[int, str],
) -> list[str]:
    """Lines of text below a key frame: detected actions of each box, then annotated ones."""
    names, lines = list(actions.values()), []
    for number, own in enumerate(scores, 1):
        ranked = sorted(zip(own, names), reverse=True)
        shown = [(score, name) for score, name in ranked if score >= SHOWN] or ranked[:1]
        lines.append(f"box {number}, found: " + ", ".join(f"{name} {score:.2f}" for score, name in shown))
    annotated: dict[Box, list[str]] = {}
    for row in truth or ():
        if row.key == frame.key and row.action is not None:
            annotated.setdefault(row.box, []).append(actions.get(row.action, str(row.action)))
    nearest = {box: _nearest(box, frame.boxes) for box in annotated}
    for box in sorted(annotated, key=lambda box: nearest[box]):
        lines.append(f"nearest to box {nearest[box] + 1}, annotated: {', '.join(annotated[box])}")
    return lines


def _nearest(box: Box, boxes: Sequence[Box]) -> int:
    """Index of the box whose coordinates differ least from those of `box` (sum of absolute differences)."""
    distances = [np.abs(np.subtract(box, other)).sum() for other in boxes]
    return int(np.argmin(distances))


def _draw(picture: np.ndarray, frame: KeyFrame, lines: Sequence[str]) -> Image.Image:
    """Picture enlarged to at least 384 pixels of width, with white boxes edged in black (readable in
    greyscale), and the lines of text below it."""
    scale = max(1, -(-384 // picture.shape[1]))
    image = Image.fromarray(picture).resize(
        (picture.shape[1] * scale, picture.shape[0] * scale), Image.Resampling.NEAREST
    )
    title = f"{frame.video}, {frame.timestamp} s"
    sheet = Image.new("RGB", (image.width, image.height + 16 * (len(lines) + 1) + 6), "white")
    sheet.paste(image)
    draw = ImageDraw.Draw(sheet)
    for number, box in enumerate(frame.boxes, 1):
        sides = (image.width, image.height, image.width, image.height)
        left, top, right, bottom = (round(share * side) for share, side in zip(box, sides))
        draw.rectangle([left - 1, top - 1, right + 1, bottom + 1], outline="black", width=4)
        draw.rectangle([left, top, right, bottom], outline="white", width=2)
        draw.rectangle([left, top, left + 12, top + 13], fill="white")
        draw.text((left + 3, top + 1), str(number), fill="black")
    for place, line in enumerate([title, *lines]):
        draw.text((4, image.height + 4 + 16 * place), line, fill="black")
    return sheet
