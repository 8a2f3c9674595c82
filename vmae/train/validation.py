"""Validation while a run trains: a pass over a labelled list every few epochs, the best checkpoint, an early
end.

A pass is the published one: one clip of each video, from its middle; top-1, top-5 and loss over all ranks,
each video once. What was found stands in the run's log, a line for each pass (`val_top1`, ...); it is all
that a run which goes on has to know. A pass draws no random number, and leaves weights and modes as they
were.

Legend: B clips, T frames, H x W pixels, K classes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmae.checkpoint.folder import BEST_NAME, BEST_WEIGHTS_NAME, CheckpointFolder
from vmae.checkpoint.identity import list_hash
from vmae.data.channels import RGB, join_clips
from vmae.data.classify_dataset import ClipConfig, MiddleClipDataset
from vmae.data.labels import LabelledList
from vmae.data.quarantine import Failure, list_failures
from vmae.data.shards.entries import ShardError
from vmae.data.workers import WorkerPool, hang_limit
from vmae.errors import InputError
from vmae.train.average_precision import mean_average_precision
from vmae.train.ema import WeightAverage
from vmae.train.metrics import LOG_NAME, read_log
from vmae.train.parallel import Parallel, bare
from vmae.train.signals import STOP_SIGNALS, StopSignals

Record = dict[str, Any]
TOP = 5
PREFETCH = 2  # clips that each worker makes ahead


class Stopped(Exception):
    """A signal asked for a stop in the middle of a pass: `args[0]`."""


@dataclass
class Share:
    """What a rank found of its share of the videos; `videos` are their numbers.

    Attributes:
        loss: of each video.
        hits: bool [videos, 2]: whether the best class is right, and one of the five best.
        scores: float32 [videos, K], probabilities, where a video can have several labels.
        failed: (number, failure) of those that could not be decoded.
    """

    videos: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    hits: list[tuple[bool, bool]] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    failed: list[tuple[int, Failure]] = field(default_factory=list)


class ValidationSet:
    """The videos to validate on; all ranks share them, and score a model together.

    Args:
        labelled: the list.
        clip: how videos are seen.
        parallel: this rank.
        dtype: "float32" or "bfloat16", as in training.
        multi_label: whether each class has a loss of its own.
        batch_size: clips of a forward pass on a rank.
        num_workers: processes of this rank that decode; 0 decodes in this one.
        channels: of the clips.
    """

    def __init__(
        self,
        labelled: LabelledList,
        clip: ClipConfig,
        *,
        parallel: Parallel,
        dtype: str,
        multi_label: bool,
        batch_size: int,
        num_workers: int = 0,
        channels: int = RGB,
    ) -> None:
        self.labelled, self.clip, self.parallel = labelled, clip, parallel
        self.dtype, self.multi_label = dtype, multi_label
        self.dataset = MiddleClipDataset(labelled.entries, clip, channels=channels)
        count, ranks = len(labelled.entries), parallel.world_size
        self.own = range(parallel.rank, count, ranks)
        longest = -(-count // ranks)
        self.batch_size = min(batch_size, longest)
        self.rounds = -(-longest // self.batch_size)  # the same on all ranks: sharded models compute together
        self.num_workers = min(num_workers, len(self.own))
        self._clips: Iterator[Tensor | Failure] | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Worker processes for all passes of a run: they are forked once, before it has threads."""
        if not self.num_workers:
            yield
            return
        pool = WorkerPool(
            self.dataset,
            itertools.cycle(self.own),
            count=self.num_workers,
            prefetch=PREFETCH,
            hang_s=hang_limit(),
        )
        self._clips = iter(pool)
        try:
            yield
        finally:
            self._clips = None
            pool.close()

    def score(self, model: nn.Module, stop: StopSignals | None = None) -> tuple[Record, list[Failure]]:
        """Top-1, top-5 (percent), loss, counts of a model, and for several labels the mean average precision;
        and the videos that could not be decoded. The same on every rank.

        Raises:
            Stopped: a rank received a signal.
            InputError: a rank's workers keep dying.
        """
        model = bare(model)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        share = Share()
        clips = self._clips if self._clips is not None else (self.dataset[video] for video in self.own)
        try:
            for start in range(0, self.rounds * self.batch_size, self.batch_size):
                self._round(model, share, self.own[start : start + self.batch_size], clips, stop)
        finally:
            self._release(model)
            for module, training in modes:
                module.training = training
        return self._sum_up(share)

    def _round(
        self,
        model: nn.Module,
        share: Share,
        videos: Sequence[int],
        clips: Iterator[Tensor | Failure],
        stop: StopSignals | None,
    ) -> None:
        """A forward pass of all ranks over their next videos."""
        found, error = self._read(videos, clips, stop)
        received = None if stop is None else stop.received
        flags = [error is not None, *(received == number for number in STOP_SIGNALS)]
        wrong, *asked = self.parallel.exchange(flags).sum(0).tolist()
        signal = next((number for number, count in zip(STOP_SIGNALS, asked) if count), None)
        if signal is not None:
            raise Stopped(signal)
        if wrong:
            raise next(one for one in self.parallel.gather(error) if one)
        failed = [(v, clip) for v, clip in zip(videos, found) if isinstance(clip, Failure)]
        share.failed += failed
        good = {v: clip for v, clip in zip(videos, found) if isinstance(clip, Tensor)}
        if good or self.parallel.sharded:
            self._note(share, list(good), self._forward(model, list(good.values())))

    def _read(
        self, videos: Sequence[int], clips: Iterator[Tensor | Failure], stop: StopSignals | None
    ) -> tuple[list[Tensor | Failure], InputError | None]:
        """The next clips, one for each of `videos`; or what is wrong with this rank's workers."""
        if stop is not None:
            stop.waiting = True
        try:
            return [next(clips) for _ in videos], None
        except InputError as error:
            return [], (ShardError if isinstance(error, ShardError) else InputError)(str(error))
        except RuntimeError as error:
            time.sleep(0.2)  # a signal to the whole process group may reach a worker first
            return [], InputError(str(error))
        finally:
            if stop is not None:
                stop.waiting = False

    @torch.no_grad()
    def _forward(self, model: nn.Module, clips: list[Tensor]) -> Tensor:
        """float32 logits [clips, K], on the device. All passes have the same shape: the rest of a batch is
        black."""
        shape = (self.clip.num_frames, *self._size, self.dataset.channels)
        joined = join_clips(clips or [torch.zeros(0, *shape, dtype=torch.uint8)])
        batch = joined.new_zeros(self.batch_size, *shape)
        batch[: len(joined)] = joined
        device = self.parallel.device
        if device.type == "cuda":  # for blocks that are replayed as CUDA graphs
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            logits = model(batch.to(device))
        return logits[: len(clips)].float()

    @property
    def _size(self) -> tuple[int, int]:
        size = self.clip.image_size
        return (size, size) if isinstance(size, int) else size

    def _note(self, share: Share, videos: list[int], logits: Tensor) -> None:
        """Add what the logits [videos, K] say."""
        targets = self.labelled.targets(videos).to(logits.device)
        exact = logits.double()
        if self.multi_label:
            losses = F.binary_cross_entropy_with_logits(exact, targets.double(), reduction="none").mean(1)
            share.scores += list(logits.sigmoid().cpu().numpy())
        else:
            losses = -(targets * exact.log_softmax(1)).sum(1)
        best = logits.topk(min(TOP, logits.shape[1])).indices
        right = (targets.gather(1, best) > 0) & logits.isfinite().all(1, keepdim=True)
        share.videos += videos
        share.loss += losses.tolist()
        share.hits += list(zip(right[:, 0].tolist(), right.any(1).tolist()))

    def _release(self, model: nn.Module) -> None:
        """Let go of weights that a sharded model gathered: the next step, or an average, changes them."""
        if self.parallel.sharded:
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _sum_up(self, own: Share) -> tuple[Record, list[Failure]]:
        """The scores of all ranks' videos, summed in the order of the list."""
        shares = self.parallel.gather(own)
        rows = sorted(
            (video, loss, hit)
            for share in shares
            for video, loss, hit in zip(share.videos, share.loss, share.hits, strict=True)
        )
        failed = sorted(pair for share in shares for pair in share.failed)
        count = len(rows)
        loss = math.fsum(loss for _, loss, _ in rows) / count if count else math.nan
        found: Record = {"top1": None, "top5": None, "loss": loss if math.isfinite(loss) else None}
        if count:
            found["top1"] = 100 * sum(hit[0] for _, _, hit in rows) / count
            found["top5"] = 100 * sum(hit[1] for _, _, hit in rows) / count
        if self.multi_label:
            found["map"] = self._average_precision(shares)
        found |= {"videos": count, "undecodable": len(failed)}
        return found, [failure for _, failure in failed]

    def _average_precision(self, shares: list[Share]) -> float | None:
        """Mean over the classes that have videos, percent; None where a score is no number."""
        pairs = [pair for share in shares for pair in zip(share.videos, share.scores, strict=True)]
        if not pairs:
            return None
        pairs.sort(key=lambda pair: pair[0])
        scores = np.stack([row for _, row in pairs])
        truth = self.labelled.targets([video for video, _ in pairs]).numpy() > 0
        return None if np.isnan(scores).any() else 100 * mean_average_precision(scores, truth)


class Validation:
    """The validations of a run: when, what they found, which one is the best, and whether the run ends early.

    Args:
        videos: what they are made on.
        model: what is trained, in its wrapper.
        average: of its weights, to validate as well.
        every: steps from one to the next.
        total_steps: of the run; the last step has one too.
        steps_per_epoch: for the log.
        patience: validations without a better one that end the run; None never does.
    """

    def __init__(
        self,
        videos: ValidationSet,
        model: nn.Module,
        *,
        every: int,
        total_steps: int,
        steps_per_epoch: int,
        average: WeightAverage | None = None,
        patience: int | None = None,
    ) -> None:
        self.videos, self.model, self.average = videos, model, average
        self.every, self.total_steps, self.steps_per_epoch = every, total_steps, steps_per_epoch
        self.patience, self.parallel = patience, videos.parallel
        labelled = videos.labelled
        self.list = list_hash(labelled.entries, labelled.labels)[:16]
        self.folder: CheckpointFolder | None = None  # once `read`
        self.records: list[Record] = []
        self.notes: list[str] = []

    @property
    def measure(self) -> str:
        """Key of what is to grow."""
        return "val_map" if self.videos.multi_label else "val_top1"

    def read(self, folder: CheckpointFolder, start_step: int) -> None:
        """Take what the log of the run in `folder` has of this list, up to the step at which the run goes on,
        and see that `checkpoint-best` is the best of it. Every rank calls it, once the log was cut back."""
        self.folder = folder

        def read() -> list[Record]:
            log = read_log(folder.folder / LOG_NAME, step=int, val_list=str)
            return [r for r in log if r["val_list"] == self.list and r["step"] <= start_step]

        self.records = self.parallel.on_main(read)
        best = self.best
        if best is not None:
            self._point(best["step"])

    @property
    def best(self) -> Record | None:
        """The first of the best records."""
        known = [record for record in self.records if record.get(self.measure) is not None]
        return max(known, key=lambda record: record[self.measure]) if known else None  # the first of equals

    def due(self, step: int) -> bool:
        """Whether a validation at this step is to be made, and was not."""
        wanted = step > 0 and (step % self.every == 0 or step == self.total_steps)
        return wanted and all(record["step"] != step for record in self.records)

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` validations were no better than the best before them."""
        if self.patience is None or not self.records:
            return False
        best = self.best
        after = sum(1 for record in self.records if best is not None and record["step"] > best["step"])
        return (len(self.records) if best is None else after) >= self.patience

    def opened(self) -> contextlib.AbstractContextManager[None]:
        """Its worker processes; see `ValidationSet.opened`."""
        return self.videos.opened()

    def test(self, step: int, stop: StopSignals | None = None) -> Record:
        """Validate the weights, and the averaged ones; a record for the log. Nothing is kept yet.

        Raises:
            Stopped: a rank received a signal.
        """
        began = time.perf_counter()
        scores, failed = self.videos.score(self.model, stop)
        record: Record = {"step": step, "epoch": step / self.steps_per_epoch}
        record |= {f"val_{name}": value for name, value in scores.items()}
        if self.average is not None:
            with self.average.applied():
                averaged, _ = self.videos.score(self.model, stop)
            names = [name for name in averaged if name not in ("videos", "undecodable")]
            record |= {f"val_ema_{name}": averaged[name] for name in names}
        self.notes = [f"  not decoded, left out: {list_failures(failed)}"] if failed else []
        return {**record, "val_s": time.perf_counter() - began, "val_list": self.list}

    def improves(self, record: Record) -> bool:
        """Whether it is better than all before."""
        best, value = self.best, record[self.measure]
        return value is not None and (best is None or value > best[self.measure])

    def keep(self, record: Record) -> None:
        """Count a record that stands in the log; where it is the best one, its checkpoint is
        `checkpoint-best` from now on."""
        better = self.improves(record)
        self.records.append(record)
        if better:
            self._point(record["step"])

    def _point(self, step: int) -> None:
        """Make `checkpoint-best` that of `step`; it is not deleted then."""
        folder = self.folder
        assert folder is not None  # `read` came before
        folder.best_step = step
        text = self.parallel.on_main(lambda: folder.set_best(step))
        if text:
            self.notes.append(text)

    def describe(self, record: Record) -> list[str]:
        """Lines for the terminal."""
        step, total = record["step"], self.total_steps
        parts = [describe_scores(record, "val_")]
        if "val_ema_top1" in record:
            parts.append(f"averaged: {describe_scores(record, 'val_ema_')}")
        best = self.best
        if best is not None:
            parts.append("the best" if best is record else f"best {best[self.measure]:.2f} at {best['step']}")
        videos = f"{record['val_videos']} videos"
        if record["val_undecodable"]:
            videos += f" ({record['val_undecodable']} not decoded)"
        lines = [f"validation {step}/{total}: {'; '.join(parts)}; {videos}, {record['val_s']:.1f} s"]
        lines += self.notes
        self.notes = []
        return lines

    def closing(self) -> list[str]:
        """Lines for the end of the run."""
        best = self.best
        if best is None:
            return []
        assert self.folder is not None  # `read` came before
        folder = self.folder.folder
        where = f"{folder / BEST_NAME}, {folder / BEST_WEIGHTS_NAME}"
        lines = [f"best validation: step {best['step']}, {describe_scores(best, 'val_')}; {where}"]
        last = self.records[-1]["step"]
        if self.exhausted and last < self.total_steps:
            lines.append(
                f"ended early at step {last} of {self.total_steps}: {self.patience} validations without a "
                "better one; a larger --patience goes on from there"
            )
        return lines


def describe_scores(scores: Record, prefix: str = "") -> str:
    """The scores of a pass in words; `prefix` of their keys."""
    if scores[f"{prefix}top1"] is None:
        return "no video could be decoded"
    text = f"top-1 {scores[f'{prefix}top1']:.2f} %, top-5 {scores[f'{prefix}top5']:.2f} %"
    if scores.get(f"{prefix}map") is not None:
        text += f", mAP {scores[f'{prefix}map']:.2f} %"
    loss = scores[f"{prefix}loss"]
    return f"{text}, loss {'not a number' if loss is None else f'{loss:.4f}'}"
