"""Drawing that the commands share: labelled panels as a PNG grid, or as an animation with all panels of a
moment side by side.

Everything is said in words and in brightness, never in colour alone, so that a grey print shows it too.

Legend: T frames, H x W pixels, N tokens.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vmae.config import ModelConfig
from vmae.data.write_video import find_encoder, write_video
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.settings import Whole
from vmae.train.checks import check_output

GREY = 128
SUFFIXES = (".png", ".gif", ".mp4")
# Pixels of a frame's shorter side; smaller ones are enlarged, not smoothed.
SMALLEST_IN_GRID, SMALLEST_IN_MOMENT = 128, 192
PANELS_ABREAST = 4  # of an animation
LINE, MARGIN = 18, 4


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One thing to see, over time.

    Attributes:
        caption: the words above it.
        frames: uint8 [T, H, W, 3].
        outlined: bool [T', rows, columns], tokens to mark, T' dividing T, rows H, columns W; or None.
    """

    caption: str
    frames: np.ndarray
    outlined: np.ndarray | None = None


def add_output_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Flags that say what to write, for `outputs_of` and `write_pictures`."""
    parser.add_argument(
        "--output",
        action="append",
        metavar="FILE",
        help=f".png, .gif or .mp4; give it again for more ({default})",
    )
    parser.add_argument(
        "--frames",
        type=Whole(1, 4096),
        default=8,
        help="columns of a PNG: moments shown, spread over the clip (8)",
    )
    parser.add_argument("--fps", type=Whole(1, 50), default=6, help="pictures a second of a GIF or MP4 (6)")


def outputs_of(args: argparse.Namespace, default: Path) -> list[Path]:
    """The files to write, checked before any work; nothing is written.

    Raises:
        InputError: a suffix that is not known, a place that can't be written, or no encoder.
    """
    paths = [Path(name) for name in args.output or [default]]
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(
                f"output {path}: give a name that ends with .png (a picture), .gif or .mp4 (an animation)"
            )
        if path.is_dir():
            raise InputError(f"output {path} is a folder")
        check_output(path.parent)
        if path.suffix.lower() == ".mp4":
            find_encoder()
    return paths


def write_pictures(
    panels: Sequence[Panel],
    paths: Sequence[Path],
    *,
    labels: Sequence[str],
    columns: int = 8,
    step: int = 1,
    fps: int = 6,
    title: str = "",
    abreast: int | None = None,
) -> None:
    """Write the panels to each of `paths`, in the form that its suffix names.

    Args:
        panels: at least one, of frames of the same shape.
        labels: of the T moments.
        columns: of a PNG, at most.
        step: a PNG shows the first of `step` frames: those of a tubelet.
        fps: pictures a second of an animation, which has one for each frame.
        title: words above all.
        abreast: panels side by side; a PNG then shows the middle moment alone.

    Raises:
        InputError: a file can't be written; those before it are.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".png":
            steps = len(labels) // step
            if abreast:
                middle = step * (steps // 2)
                picture = draw_moment(panels, middle, labels[middle], title, abreast)
            else:
                shown = step * np.unique(np.linspace(0, steps - 1, min(columns, steps)).round().astype(int))
                picture = draw_grid(panels, [(int(time), labels[time]) for time in shown], title)
            write_atomically(path, functools.partial(picture.save, format="PNG"))
            continue
        numbered = [f"{label} ({time + 1} of {len(labels)})" for time, label in enumerate(labels)]
        pictures = [
            draw_moment(panels, time, label, title, abreast or PANELS_ABREAST)
            for time, label in enumerate(numbered)
        ]
        if path.suffix.lower() == ".mp4":
            write_video(path, [_even(picture) for picture in pictures], fps)
        else:
            first, *others = pictures
            save = functools.partial(first.save, format="GIF", save_all=True, append_images=others)
            write_atomically(path, functools.partial(save, duration=round(1000 / fps), loop=0))


def _even(picture: Image.Image) -> np.ndarray:
    """With a white line more where 4:2:0 colour needs it."""
    pixels = np.asarray(picture)
    return np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), constant_values=255)


def draw_grid(panels: Sequence[Panel], moments: Sequence[tuple[int, str]], title: str = "") -> Image.Image:
    """A row of frames below each panel's caption, a column for each (frame, label) of `moments`."""
    scale = _scale(panels[0], SMALLEST_IN_GRID)
    height, width = (side * scale for side in panels[0].frames.shape[1:3])
    font, whole = _font(14), max(len(moments) * (width + MARGIN) - MARGIN, 3 * SMALLEST_IN_GRID)
    heading = _wrapped(title, whole, font)
    captions = [_wrapped(panel.caption, whole, font) for panel in panels]
    tops = np.cumsum(
        [LINE * (len(heading) + 1) + MARGIN]
        + [LINE * len(lines) + MARGIN + height + MARGIN for lines in captions]
    )
    picture = Image.new("RGB", (whole + 2 * MARGIN, int(tops[-1]) + MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    _write(pen, heading, (MARGIN, MARGIN), font)
    for column, (_, label) in enumerate(moments):
        _write(pen, [label], (MARGIN + column * (width + MARGIN), MARGIN + LINE * len(heading)), font)
    for panel, lines, top in zip(panels, captions, tops):
        _write(pen, lines, (MARGIN, int(top) + MARGIN), font)
        for column, (time, _) in enumerate(moments):
            corner = (MARGIN + column * (width + MARGIN), int(top) + MARGIN + LINE * len(lines))
            _paste(picture, panel, time, corner, scale)
    return picture


def draw_moment(
    panels: Sequence[Panel], time: int, label: str, title: str = "", abreast: int = PANELS_ABREAST
) -> Image.Image:
    """The panels of one frame side by side, `abreast` in a row, each below its caption."""
    scale = _scale(panels[0], SMALLEST_IN_MOMENT)
    height, width = (side * scale for side in panels[0].frames.shape[1:3])
    font, abreast = _font(14), min(len(panels), abreast)
    whole = abreast * (width + MARGIN) - MARGIN
    heading = [*_wrapped(title, whole, font), *_wrapped(label, whole, font)]
    captions = [_wrapped(panel.caption, width, font) for panel in panels]
    most = max(len(lines) for lines in captions)
    cell, top = LINE * most + MARGIN + height, LINE * len(heading) + MARGIN
    rows = -(-len(panels) // abreast)
    picture = Image.new("RGB", (whole + 2 * MARGIN, top + rows * (cell + MARGIN)), "white")
    pen = ImageDraw.Draw(picture)
    _write(pen, heading, (MARGIN, MARGIN), font)
    for place, (panel, lines) in enumerate(zip(panels, captions)):
        left, high = MARGIN + place % abreast * (width + MARGIN), top + place // abreast * (cell + MARGIN)
        _write(pen, lines, (left, high + LINE * (most - len(lines))), font)
        _paste(picture, panel, time, (left, high + LINE * most + MARGIN), scale)
    return picture


def _scale(panel: Panel, smallest: int) -> int:
    return max(1, -(-smallest // min(panel.frames.shape[1:3])))


def _paste(picture: Image.Image, panel: Panel, time: int, corner: tuple[int, int], scale: int) -> None:
    frame = Image.fromarray(panel.frames[time])
    picture.paste(frame.resize((frame.width * scale, frame.height * scale), Image.Resampling.NEAREST), corner)
    if panel.outlined is not None:
        marked = panel.outlined[time * len(panel.outlined) // len(panel.frames)]
        _outline(ImageDraw.Draw(picture), marked, corner, frame.height * scale // marked.shape[0])


def _outline(pen: ImageDraw.ImageDraw, marked: np.ndarray, corner: tuple[int, int], side: int) -> None:
    """White outside black: seen on any background, in grey too."""
    for row, column in zip(*marked.nonzero()):
        left, top = corner[0] + int(column) * side, corner[1] + int(row) * side
        pen.rectangle((left, top, left + side - 1, top + side - 1), outline="white")
        pen.rectangle((left + 1, top + 1, left + side - 2, top + side - 2), outline="black")


def _write(pen: ImageDraw.ImageDraw, lines: Sequence[str], corner: tuple[int, int], font) -> None:
    for number, line in enumerate(lines):
        pen.text((corner[0], corner[1] + number * LINE), line, fill="black", font=font)


def _wrapped(text: str, width: int, font) -> list[str]:
    """`text` in lines of at most `width` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _font(size: int):
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):  # Pillow before 10.1, or without FreeType: its small bitmap font
        return ImageFont.load_default()


def grey_frames(tokens: np.ndarray, config: ModelConfig) -> np.ndarray:
    """uint8 [T, H, W, 3]: a value for each token, [N] or [N, 3], 0 black to 1 white, as large as its
    tubelet."""
    cells = np.clip(tokens, 0, 1).reshape(*config.grid, -1)
    cells = np.broadcast_to((255 * cells).round().astype(np.uint8), (*config.grid, 3))
    for axis, times in enumerate((config.tubelet_size, config.patch_size, config.patch_size)):
        cells = cells.repeat(times, axis)
    return cells
