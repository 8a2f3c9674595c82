"""Parts of a job: `--part i/n`, for arrays of jobs that know nothing of one another.

Which part does what depends on (number of items, n) alone, so every n gives the same results together. Ranks
under torchrun divide what a part has left, so a part may go on with another number of them.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vmae.settings import Limits


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `count`."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def whole(self) -> bool:
        """Whether it is all there is."""
        return self.count == 1

    def share(self, items: int, together: int = 1) -> Sequence[int]:
        """Numbers of this part's items: every `count`-th, so that neighbours of a list are spread.

        Args:
            together: neighbours that go to the same part, in blocks from the first item on.
        """
        if together == 1:
            return range(self.number - 1, items, self.count)
        blocks = self.share(-(-items // together))
        return list(
            itertools.chain.from_iterable(
                range(block * together, min((block + 1) * together, items)) for block in blocks
            )
        )

    @staticmethod
    def having(item: int, count: int, together: int = 1) -> Part:
        """The part that has this item, of `count` parts; see `share`."""
        return Part(item // together % count + 1, count)


WHOLE = Part()


class _PartText(Limits):
    """`i/n` as a part: argparse's `type=`."""

    def __str__(self) -> str:
        return "i/n with i from 1 to n, as 3/8"

    def allows(self, value: Any) -> bool:
        return isinstance(value, Part)

    def read(self, text: str) -> Part:
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(text)
        return Part(int(match[1]), int(match[2]))


read_part = _PartText()


def add_part_argument(parser: argparse._ActionsContainer, merged_by: str) -> None:
    """`--part i/n`; `merged_by` is the command that joins the parts, for the help."""
    parser.add_argument(
        "--part",
        type=read_part,
        default=WHOLE,
        metavar="i/n",
        help=f"do the i-th of n parts, as in a Slurm array; {merged_by} joins them (1/1)",
    )


def add_part_arguments(parser: argparse.ArgumentParser) -> None:
    """`--part i/n`, or `--merge` in its place."""
    group = parser.add_argument_group("one of many machines").add_mutually_exclusive_group()
    add_part_argument(group, "--merge in its place")
    group.add_argument(
        "--merge",
        action="store_true",
        help="join what the parts wrote, as one job would; says which parts are missing",
    )
