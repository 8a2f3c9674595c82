"""What every kind of training shares of reading videos: random numbers by sample, and others in place of
broken videos."""

from __future__ import annotations

import enum
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
from torch.utils.data import Dataset

from vmae.data.augment import RESIZERS
from vmae.data.channels import RGB
from vmae.data.decode import DecodeError, VideoReader, open_video
from vmae.data.manifest import VideoEntry
from vmae.data.mix import Mix
from vmae.data.quarantine import Failure, list_failures
from vmae.data.shards.entries import ShardEntry
from vmae.data.shards.reading import ask_ahead
from vmae.data.video_reader import memory_as_decode_error
from vmae.errors import InputError

MAX_ATTEMPTS = 50  # videos tried for one sample: with half of a list broken, all 50 fail once in 1e15 samples

SampleKey = tuple[int, int]


class Purpose(enum.IntEnum):
    """What random numbers are drawn for; each has a generator of its own. 6 and 7 are `vmae.data.mix`'s."""

    FRAMES = 0
    CROPS = 1
    MASKS = 2
    REPLACEMENT = 3
    ORDER = 4
    FLIPS = 5
    AUGMENT = 8
    ERASE = 9
    MIXING = 10
    SHAPES = 11


def seed_sequence(seed: int, *key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=tuple(int(part) for part in key))


def numpy_rng(seed: int, *key: int) -> np.random.Generator:
    """A generator of its own for (seed, *key)."""
    return np.random.default_rng(seed_sequence(seed, *key))


EntryT = TypeVar("EntryT", bound=VideoEntry)
Decoded = TypeVar("Decoded")


class VideoDataset(Dataset, Generic[EntryT, Decoded]):
    """Reads a list of videos; a subclass says what is decoded (`_decode_crops`, which gives a `Decoded`) and
    what a sample is made of (`__getitem__`).

    Args:
        entries: result of `read_list` or `read_data`, at least one; not copied.
        num_sample: clips of one decode.
        seed: not negative.
        repeat: visits of a video in an epoch.
        backend: see `open_video`.
        resize: see `crop_and_resize`.
        min_frames: a video of fewer counts as bad.
        channels: of the frames, see `VideoReader`; a video of others counts as bad.

    Attributes:
        data: `entries` as they were given.
        watch: called with an entry's number before it is decoded; what a worker tells its supervisor.

    Raises:
        InputError: no entries, a number below 1, or an unknown `resize`.
    """

    def __init__(
        self,
        entries: Sequence[EntryT],
        *,
        num_sample: int = 1,
        seed: int = 0,
        repeat: int = 1,
        backend: str = "auto",
        resize: str = "torch",
        min_frames: int = 1,
        channels: int = RGB,
    ) -> None:
        if not entries:
            raise InputError("no videos to train on: the list has no entries")
        if num_sample < 1 or repeat < 1:
            raise InputError(f"num_sample ({num_sample}) and repeat ({repeat}) must be at least 1")
        if seed < 0:
            raise InputError(f"seed must be at least 0, not {seed}")
        if resize not in RESIZERS:
            raise InputError(f"unknown resize {resize!r}; known: {', '.join(RESIZERS)}")
        if min_frames < 1:
            raise InputError(f"min_frames must be at least 1, not {min_frames}")
        self.data = entries
        self.entries: Sequence[EntryT] = entries
        if isinstance(entries, Mix):
            self.entries = cast(Sequence[EntryT], entries.entries)
        self.num_sample, self.seed, self.repeat = num_sample, seed, repeat
        self.backend, self.resize, self.min_frames = backend, resize, min_frames
        self.channels = channels
        self.watch: Callable[[int], None] | None = None
        self._blocked: dict[int, str] = {}

    @abstractmethod
    def _decode_crops(self, entry: EntryT, epoch: int, index: int, attempt: int) -> Decoded:
        """What is decoded of an entry; raises DecodeError where it cannot be."""

    def block(self, video: int, reason: str) -> None:
        """Treat the entry number `video` as undecodable from now on; its error is `reason`."""
        self._blocked[video] = reason

    def describe_labels(self, number: int) -> str:
        """What decides an entry's samples beside its video: labels, boxes."""
        return ""

    def label_lines(self, first: int, last: int) -> str:
        """`describe_labels` of the entries from `first` to before `last`, a line each."""
        return "".join(f"{self.describe_labels(number)}\n" for number in range(first, last))

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self.entries) * self.repeat

    def _checked_key(self, key: SampleKey | int) -> SampleKey:
        """(epoch, index); a number alone is of epoch 0."""
        if not isinstance(key, tuple):
            if key >= len(self):  # ends `for sample in dataset`
                raise IndexError(f"sample {key} of {len(self)}")
            key = (0, key)
        epoch, index = key
        if epoch < 0 or index < 0:
            raise IndexError(f"epoch {epoch} and index {index} must not be negative")
        return key

    def _open(self, entry: VideoEntry) -> VideoReader:
        """An open reader; raises DecodeError also where the video has too few frames."""
        reader = open_video(entry, self.backend)
        reader.channels = self.channels
        if len(reader) < self.min_frames:
            error = DecodeError(f"{entry.path}: has {len(reader)} frames, fewer than {self.min_frames}")
            error.library = reader.backend
            reader.close()
            raise error
        return reader

    @property
    def sources(self) -> list[str]:
        """Names of the mix's sources; empty where there is one only."""
        if not isinstance(self.data, Mix) or len(self.data.sources) < 2:
            return []
        return [source.name for source in self.data.sources]

    def count_sources(self, batch: Any) -> list[int]:
        """Clips of each of the `sources` in a batch (`batch.ids`: (epoch, index, path) of each sample)."""
        if not self.sources or not isinstance(self.data, Mix):
            return []
        counts = self.data.count_sources([index for _, index, _ in batch.ids], len(self))
        return [count * self.num_sample for count in counts]

    def pick_video(self, epoch: int, index: int) -> tuple[int, range]:
        """(number of a sample's entry, those of the entries that may stand in for it)."""
        if isinstance(self.data, Mix):
            return self.data.pick(self.seed, epoch, index, len(self))
        return index % len(self.entries), range(len(self.entries))

    def ask_ahead(self, keys: Sequence[SampleKey]) -> None:
        """Start to read what these samples are made of, as far as it lies in object stores."""
        for epoch, index in keys:
            number, _ = self.pick_video(epoch, index)
            entry = self.entries[number]
            if number not in self._blocked and isinstance(entry, ShardEntry):
                frames = self._frames_ahead(entry, epoch, index) if entry.kind == "frames" else None
                ask_ahead(entry, frames)

    def _frames_ahead(self, entry: EntryT, epoch: int, index: int) -> np.ndarray | None:
        """Images that a sample takes of a folder of frames; None where a subclass does not say."""
        return None

    def _decode_with_replacement(self, epoch: int, index: int) -> tuple[Decoded, int, list[Failure]]:
        """(what is decoded, number of the entry that it comes from, the failures before it)."""
        failures: list[Failure] = []
        rng = numpy_rng(self.seed, epoch, index, 0, Purpose.REPLACEMENT)
        video, others = self.pick_video(epoch, index)
        total = len(others)
        tried: set[int] = set()
        for attempt in range(min(total, MAX_ATTEMPTS)):
            while video in tried:
                video = others[int(rng.integers(total))]
            tried.add(video)
            clips = self._try_twice(video, epoch, index, attempt, failures)
            if clips is not None:
                return clips, video, failures
        which = f"all {total} videos"
        if total > MAX_ATTEMPTS:
            which = f"{len(tried)} of {total} videos, drawn in a row,"
        raise InputError(f"{which} are undecodable; the first: {list_failures(failures)}")

    def _try_twice(
        self, video: int, epoch: int, index: int, attempt: int, failures: list[Failure]
    ) -> Decoded | None:
        """What is decoded of entry number `video`; None, and one more failure, where it cannot be decoded."""
        entry = self.entries[video]
        if video in self._blocked:
            failures.append(Failure(entry.path, self._blocked[video], "worker"))
            return None
        if self.watch is not None:
            self.watch(video)
        for last_chance in (False, True):
            try:
                with memory_as_decode_error(entry.path):
                    return self._decode_crops(entry, epoch, index, attempt)
            except DecodeError as error:
                if last_chance:
                    failures.append(Failure(entry.path, str(error), error.library))
        return None
