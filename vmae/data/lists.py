"""`python -m vmae lists import SOURCE OUT`: a list of the clips that a curation pipeline left behind, for
`pack` and for training.

Taken are the clips whose video is there and that pass the filters; what was left out is counted by reason. A
clip whose record does not tell what a filter asks for is left out too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vmae.data.curated import Clip, Names, read_clips, read_duplicates
from vmae.data.manifest import check_listable
from vmae.errors import InputError
from vmae.files.atomic import write_atomically
from vmae.settings import SHARE, SIDE, Real

_SECONDS = Real(least=0, most=1e9)
_SCORE = Real(least=-1e9, most=1e9)


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What a clip must have; None asks for nothing.

    Attributes:
        min_side: pixels of the short side.
        min_aesthetic, min_motion: scores as the pipeline gives them.
        without: names of duplicates.
    """

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_side: int | None = None
    min_aesthetic: float | None = None
    min_motion: float | None = None
    without: Names | None = None

    def why_not(self, clip: Clip) -> str | None:
        """Why a clip is left out; None where it is not."""
        if clip.problem is not None:
            return clip.problem
        if clip.filtered:
            return "taken out by the pipeline's own filters (filtered_clips)"
        if self.without is not None and clip.id in self.without:
            return "a duplicate (--without)"
        asked = (
            (
                clip.seconds,
                self.min_seconds,
                self.max_seconds,
                "its duration",
                "--min-seconds",
                "--max-seconds",
            ),
            (clip.side, self.min_side, None, "its size", "--min-side", ""),
            (clip.aesthetic, self.min_aesthetic, None, "an aesthetic score", "--min-aesthetic", ""),
            (clip.motion, self.min_motion, None, "a motion score", "--min-motion", ""),
        )
        for value, least, most, what, at_least, at_most in asked:
            if least is None and most is None:
                continue
            if value is None:
                return f"a record without {what}"
            if least is not None and value < least:
                return f"below {at_least} {least:g}"
            if most is not None and value > most:
                return f"above {at_most} {most:g}"
        if clip.path is None or not os.path.isfile(clip.path):
            return "its video is not there (--videos tells where)"
        return None


@dataclass
class Imported:
    """What became of the clips: how many were taken; by reason, how many were left out, and the first one."""

    taken: int
    left_out: Counter[str]
    first: dict[str, str]

    def report(self, output: str) -> list[str]:
        """Lines for people."""
        lines = [f"{self.taken} clips: {output}"]
        for reason, count in sorted(self.left_out.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"left out: {count}, {reason}; the first: {self.first[reason]}")
        return lines


def import_list(clips: Iterator[Clip], output: Path, filters: Filters) -> Imported:
    """Write the list, complete or not at all; one line at a time, whatever its length.

    Raises:
        InputError: no clip was taken (the list is not written), or the file cannot be written.
    """
    found = Imported(0, Counter(), {})
    folder = os.path.abspath(output.parent)

    def write(file: IO) -> None:
        for clip in clips:
            reason = filters.why_not(clip)
            if reason is None:
                try:
                    file.write(f"{_listed(str(clip.path), folder)} 0 -1\n")
                    found.taken += 1
                    continue
                except InputError:
                    reason = "a name that a list cannot hold: rename the file"
            found.left_out[reason] += 1
            found.first.setdefault(reason, clip.where)
        if not found.taken:
            seen = "; ".join(found.report(str(output))[1:]) or "the source is empty"
            raise InputError(f"no clip was taken, so {output} is not written; {seen}")

    if output.is_dir():
        raise InputError(f"{output} is a folder; OUT is the list file to write")
    if not output.parent.is_dir():
        raise InputError(f"the folder of {output} does not exist")
    write_atomically(output, write, binary=False)
    return found


def _listed(path: str, folder: str) -> str:
    """The path as the list holds it: from the list's folder where the video lies below it, else absolute."""
    path = os.path.abspath(path)
    check_listable(path)
    if path.startswith(folder.rstrip(os.sep) + os.sep):
        below = os.path.relpath(path, folder)
        if below[0] not in '#"[{':  # which a list reads as something else
            return below
    return path


# --- Command line ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "write a list of the clips of NeMo Curator, cosmos-curate, a manifest, or a folder with records"
    add = actions.add_parser("import", help=text, description=text[0].upper() + text[1:] + ".").add_argument
    add(
        "source",
        metavar="SOURCE",
        help="output folder of the pipeline (with metas/ or metas_jsonl/), .jsonl, .parquet, a folder of "
        "these, or a folder of videos with KEY.json beside KEY.mp4",
    )
    add("output", metavar="OUT", help="list file to write")
    text = "where the videos lie: a folder with clips/, or the root of a manifest's relative paths (SOURCE)"
    add("--videos", metavar="DIR", help=text)
    add("--path-key", metavar="KEY", help="key or column of a manifest's paths, a.b inside another (found)")
    add("--min-seconds", type=_SECONDS, metavar="S", help="shortest clip")
    add("--max-seconds", type=_SECONDS, metavar="S", help="longest clip")
    add("--min-side", type=SIDE, metavar="PIXELS", help="least short side")
    add("--min-aesthetic", type=_SCORE, metavar="SCORE", help="least aesthetic score")
    add("--min-motion", type=_SCORE, metavar="SCORE", help="least motion score (global mean)")
    text = "leave out these clips: the output of a removal of duplicates, or a file with an id a line"
    add("--without", metavar="TABLE", help=text)
    text = "of a table with cosine_sim_score: rows from here on are duplicates (0.99)"
    add("--similarity", type=SHARE, default=0.99, metavar="S", help=text)


def run(args: argparse.Namespace) -> int:
    """The command."""
    if (args.min_seconds or 0) > (args.max_seconds if args.max_seconds is not None else float("inf")):
        raise InputError(f"--min-seconds {args.min_seconds:g} is above --max-seconds {args.max_seconds:g}")
    clips = read_clips(args.source, videos=args.videos, path_key=args.path_key)
    without = None if args.without is None else read_duplicates(args.without, args.similarity)
    names = ("min_seconds", "max_seconds", "min_side", "min_aesthetic", "min_motion")
    filters = Filters(without=without, **{name: getattr(args, name) for name in names})
    for line in import_list(clips, Path(args.output), filters).report(args.output):
        print(line, file=sys.stdout)
    return 0
