"""How much faster clips of packed videos decode than those of their originals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from vmae.data.check import decode_clip
from vmae.data.manifest import VideoEntry
from vmae.data.quarantine import Failure, list_failures
from vmae.data.workers import VideoTask, WorkerPool
from vmae.errors import InputError


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


def report_gain(pairs: Sequence[tuple[VideoEntry, VideoEntry]]) -> dict[str, Any]:
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
