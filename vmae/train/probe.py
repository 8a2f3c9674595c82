"""A probe of an encoder while it is pre-trained: how well labelled videos can be told apart by its tokens.

A pass gives the encoder, as it stands, one fixed clip of each video, unmasked. Its tokens after the final
norm are read twice: nearest neighbours vote on the mean token (`probe_knn`), and an attentive reader is
trained on the gallery's tokens (`probe_attentive`); both are the share of the queries that they get right,
in percent.

The gallery comes first: its tokens stay on the device, float32, until the reader is trained; of a query only
the mean token and the answer are kept.

Legend: B clips, N tokens, D width, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmae.checkpoint.identity import list_hash
from vmae.config import ModelConfig
from vmae.data.classify_dataset import ClipConfig
from vmae.data.dataset import check_decodable
from vmae.data.gallery import Gallery, count_shared, join_lists, split_list
from vmae.data.labels import LabelledList
from vmae.data.quarantine import Failure
from vmae.errors import InputError
from vmae.model import Pretrainer
from vmae.model.cost import classifier_macs
from vmae.train.parallel import Parallel, bare
from vmae.train.passes import Record, VideoPass
from vmae.train.probe_readers import (
    READER_STEPS,
    AttentiveReader,
    build_reader,
    nearest_neighbours,
    reader_macs,
    train_reader,
)
from vmae.train.probe_settings import ProbeConfig
from vmae.train.signals import StopSignals

USUAL_SHARE = 0.01  # of a run's FLOPs; more is warned of
KEEP_BYTES = 2**30  # clips of all passes that a rank keeps; more are decoded again for each pass


@dataclass
class Tokens:
    """What a rank found of its share of the videos; `videos` are their numbers.

    Attributes:
        reader: trained once all of the gallery was seen.
        trained: whether it is.
        means: float32 [videos, D], the mean tokens, on the host.
        normed: tokens of the gallery for the reader, [B, N, D] on the device, a part for each round.
        answers: the reader's, of the queries; -1 where its scores are no numbers.
        failed: (number, failure) of those that could not be decoded.
    """

    reader: AttentiveReader
    trained: bool = False
    videos: list[int] = field(default_factory=list)
    means: list[np.ndarray] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    failed: list[tuple[int, Failure]] = field(default_factory=list)


class ProbeSet(VideoPass):
    """Gallery and queries of a probe; see the module.

    Args:
        gallery: the videos.
        config: the model's.
        clip: how videos are seen.
        measure: "attentive" or "knn": which of both decides what is best.
        parallel: this rank.
        dtype: "float32" or "bfloat16", as in training; tokens are read in float32.
        batch_size: clips of a forward pass on a rank.
        num_workers: processes of this rank that decode; 0 decodes in this one.
    """

    name, prefix, flags = "probe", "probe_", "--probe-"
    tells_share = True

    def __init__(
        self,
        gallery: Gallery,
        config: ModelConfig,
        clip: ClipConfig,
        *,
        measure: str,
        parallel: Parallel,
        dtype: str,
        batch_size: int,
        num_workers: int = 0,
    ) -> None:
        self.gallery, self.config, self._measure = gallery, config, measure
        self.num_workers = num_workers
        longest = -(-max(gallery.size, len(gallery.queries)) // parallel.world_size)
        size = min(batch_size, longest)
        super().__init__(
            gallery.entries,
            clip,
            parallel=parallel,
            dtype=dtype,
            batch_size=size,
            channels=config.in_channels,
        )
        self.own = [*self.deal(gallery.gallery), *self.deal(gallery.queries)]
        self.keeps = len(self.own) * config.clip_bytes <= KEEP_BYTES
        self.kept: list[Tensor | Failure] = []

    @property
    def measure(self) -> str:
        return self._measure

    @property
    def identity(self) -> str:
        labels = self.gallery.labels.tolist()
        own = [(label, int(number < self.gallery.size)) for number, label in enumerate(labels)]
        return list_hash(self.gallery.entries, own)[:16]

    def opened(self) -> contextlib.AbstractContextManager[None]:
        return self.working(self.own, self.num_workers, again=not self.keeps)

    def clips_of(self, own: Sequence[int]) -> Iterator[Tensor | Failure]:
        if len(self.kept) == len(own):
            yield from self.kept
            return
        self.kept = []
        for clip in super().clips_of(own):
            if self.keeps:
                self.kept.append(clip)
            if len(self.kept) == len(own):
                self.rest()
            yield clip

    def score(self, model: nn.Module, stop: StopSignals | None = None) -> tuple[Record, list[Failure]]:
        """Both shares of right answers in percent (None where no video could be decoded), and counts; and the
        videos that could not be decoded. The same on every rank.

        Raises:
            Stopped, InputError: see `look`.
        """
        model, clips = bare(model), self.clips_of(self.own)
        if self.parallel.sharded and "tokens" not in vars(
            model
        ):  # weights are gathered around it from now on
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(model, "tokens")
        share = Tokens(build_reader(self.config, self.gallery.num_classes, self.parallel.device))
        with self.testing(model):
            self.look(model, share, self.gallery.gallery, clips, stop)
            labels = torch.from_numpy(self.gallery.labels[share.videos]).to(self.parallel.device)
            train_reader(share.reader, share.normed, labels, self.parallel)
            share.trained, share.normed = True, []
            self.look(model, share, self.gallery.queries, clips, stop)
        return self._sum_up(share)

    def compute(self, model: nn.Module, clips: Tensor) -> Tensor:
        assert isinstance(model, Pretrainer)
        return model.tokens(clips)

    @torch.no_grad()
    def note(self, share: Tokens, videos: list[int], found: Tensor) -> None:
        share.videos += videos
        share.means += list(found.mean(1).cpu().numpy())
        normed = share.reader.normed(found)
        if share.trained:
            logits = share.reader(normed)
            answers = torch.where(logits.isfinite().all(1), logits.argmax(1), -1)
            share.answers += answers.tolist()
        else:
            share.normed.append(normed)

    def _sum_up(self, own: Tokens) -> tuple[Record, list[Failure]]:
        """The right answers of all ranks, in the order of the list."""
        shares = self.parallel.gather((own.videos, own.means, own.answers, own.failed))
        means: dict[int, np.ndarray] = {}
        answers: dict[int, int] = {}
        failed: list[tuple[int, Failure]] = []
        for videos, rows, said, bad in shares:
            means.update(zip(videos, rows, strict=True))
            answers.update(zip(videos[len(videos) - len(said) :], said, strict=True))
            failed += bad
        known, asked = (
            sorted(means.keys() & set(part)) for part in (self.gallery.gallery, self.gallery.queries)
        )
        found: Record = {"knn": None, "attentive": None}
        if known and asked:
            labels = self.gallery.labels
            rows = [torch.from_numpy(np.stack([means[number] for number in part])) for part in (known, asked)]
            voted = nearest_neighbours(
                rows[0], torch.from_numpy(labels[known]), rows[1], self.gallery.num_classes
            )
            right = (voted.numpy() == labels[asked]) & rows[1].isfinite().all(1).numpy()
            found["knn"] = 100 * int(right.sum()) / len(asked)
            found["attentive"] = 100 * sum(answers[one] == int(labels[one]) for one in asked) / len(asked)
        found |= {"videos": len(means), "undecodable": len(failed)}
        return found, [failure for _, failure in sorted(failed)]

    def describe(self, record: Record, prefix: str) -> str:
        if record[f"{prefix}{self.measure}"] is None:
            return "nothing to probe on: no video of the gallery, or no query, could be decoded"
        attentive, knn = record[f"{prefix}attentive"], record[f"{prefix}knn"]
        return f"attentive {attentive:.2f} %, k-NN {knn:.2f} %"


# --- What a run says of it ---


def read_gallery(
    probe: ProbeConfig, read: Callable[[str], LabelledList], trained: Any, parallel: Parallel
) -> tuple[Gallery | None, list[str]]:
    """The videos that a run is probed on, None where it is not; and lines on what is wrong with them.

    Args:
        read: reads a list.
        trained: entries that the run trains on, or a mix.

    Raises:
        InputError: a list cannot be read, or there is nothing to probe on.
    """
    names = [name for name in (probe.data, probe.val) if name is not None]
    if not names:
        return None, []
    notes = []
    try:
        lists = [read(name) for name in names]
        for name, labelled in zip(names, lists):
            failed = check_decodable(labelled.entries)
            notes += [f"note: {name}: cannot be decoded: {error}" for _, error in failed]
            if shared := parallel.on_main(partial(count_shared, labelled.entries, trained)):
                notes.append(
                    f"warning: {shared} of the {len(labelled.entries)} videos of {name} are trained on too; "
                    "a probe should see others"
                )
        if len(lists) == 1:
            gallery = split_list(lists[0], probe.videos, names[0])
        else:
            gallery = join_lists(lists[0], lists[1], probe.videos, (names[0], names[1]))
    except InputError as error:
        raise InputError(f"list to probe on: {error}") from None
    return gallery, [*notes, *gallery.notes]


def count_passes(every: int, total_steps: int) -> int:
    """Of a run: before the first step, every so many, after the last."""
    return 1 + total_steps // every + (total_steps % every > 0)


def pass_flops(gallery: Gallery, config: ModelConfig) -> float:
    """Of a pass: the encoder forward on every video, and the reader, which is trained on the gallery."""
    queries, macs = len(gallery.queries), reader_macs(config, gallery.num_classes)
    read = (6 * READER_STEPS * gallery.size + 2 * queries) * macs
    return 2.0 * classifier_macs(config, 0) * len(gallery.entries) + read


def describe_probe(probe: ProbeConfig, gallery: Gallery, share: float) -> list[str]:
    """Lines for the start of a run.

    Args:
        share: of the run's FLOPs.
    """
    lists = " and ".join(filter(None, (probe.data, probe.val)))
    lines = [
        f"probe: {lists}, gallery of {gallery.size} videos, {len(gallery.queries)} queries, one clip each, "
        f"every {probe.every} steps: {share:.2%} of the run's FLOPs"
    ]
    if share > USUAL_SHARE:
        lines.append(
            f"warning: the probes take more than {USUAL_SHARE:.0%} of the run's FLOPs; a larger "
            "--probe-every or a smaller --probe-videos takes less"
        )
    return lines
