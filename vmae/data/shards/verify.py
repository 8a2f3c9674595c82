"""`vmae index --verify INDEX`: whether all bytes of the shards are those that the index describes."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from vmae.data.parts import Part
from vmae.data.shards.entries import ShardEntry, ShardError
from vmae.data.shards.index import ShardIndex, read_index
from vmae.data.shards.reading import read_images, read_video
from vmae.data.workers import VideoTask, WorkerPool

_SHOWN = 10


class _Verifier(VideoTask):
    """What runs in the workers: reads a sample; gives None, or what is wrong."""

    def __init__(self, index: Sequence[ShardEntry]) -> None:
        super().__init__()
        self.index = index

    def __getitem__(self, number: int) -> str | None:
        if number in self.blocked:
            return self.blocked[number]
        self.watch(number)
        entry = self.index[number]
        try:
            if entry.images is None:
                read_video(entry)
            else:
                read_images(entry, range(len(entry.images)))
        except ShardError as error:
            return f"{entry.key}: {error}"
        return None


def verify_index(path: str, part: Part, *, workers: int, hang_s: float) -> int:
    """Read all members of an index, or a part of them; prints what is wrong. 1 where something is.

    Raises:
        InputError: the index cannot be read.
    """
    index: ShardIndex = read_index(path)
    numbers = part.share(len(index))
    pool = WorkerPool(_Verifier(index), iter(numbers), count=workers, prefetch=16, hang_s=hang_s)
    wrong = 0
    try:
        for found in tqdm(pool, total=len(numbers), unit="sample", disable=None):
            if found is None:
                continue
            wrong += 1
            if wrong <= _SHOWN:
                print(f"wrong: {found}")
    finally:
        pool.close()
    if wrong > _SHOWN:
        print(f"wrong: {wrong - _SHOWN} more")
    of = "" if part.whole else f"part {part}: "
    print(f"{of}{len(numbers) - wrong} of {len(numbers)} samples are what {path} says")
    return 1 if wrong else 0
