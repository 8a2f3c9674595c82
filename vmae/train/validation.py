"""Validation while a run trains: a pass over a labelled list every few steps, the best checkpoint, an early
end.

What a pass measures is a `Measurement` (`vmae.train.passes`): of fine-tuning the `ValidationSet` here, of
pre-training a probe (`vmae.train.probe`). What was found stands in the run's log, a line for each pass
(`val_top1`, ...); it is all that a run which goes on has to know.

Legend: B clips, K classes.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from vmae.checkpoint.folder import BEST_NAME, BEST_WEIGHTS_NAME, CheckpointFolder
from vmae.checkpoint.identity import list_hash
from vmae.data.channels import RGB
from vmae.data.classify_dataset import ClipConfig
from vmae.data.labels import LabelledList
from vmae.data.quarantine import Failure, list_failures
from vmae.errors import InputError
from vmae.train.average_precision import mean_average_precision
from vmae.train.ema import WeightAverage
from vmae.train.metrics import LOG_NAME, read_log
from vmae.train.parallel import Parallel, bare
from vmae.train.passes import Measurement, Record, VideoPass
from vmae.train.signals import StopSignals

TOP = 5


@dataclass
class Scores:
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


class ValidationSet(VideoPass):
    """The videos to validate on; all ranks share them, and score a model together. As published: one clip of
    each video, from its middle; top-1, top-5 and loss, each video once.

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

    name, prefix, flags = "validation", "val_", "--"
    tells_share = False

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
        self.labelled, self.multi_label, self.num_workers = labelled, multi_label, num_workers
        self.videos = range(len(labelled.entries))
        longest = -(-len(self.videos) // parallel.world_size)
        super().__init__(
            labelled.entries,
            clip,
            parallel=parallel,
            dtype=dtype,
            batch_size=min(batch_size, longest),
            channels=channels,
        )

    @property
    def measure(self) -> str:
        return "map" if self.multi_label else "top1"

    @property
    def identity(self) -> str:
        return list_hash(self.labelled.entries, self.labelled.labels)[:16]

    def opened(self) -> contextlib.AbstractContextManager[None]:
        return self.working(self.deal(self.videos), self.num_workers)

    def score(self, model: nn.Module, stop: StopSignals | None = None) -> tuple[Record, list[Failure]]:
        """Top-1, top-5 (percent), loss, counts of a model, and for several labels the mean average precision;
        and the videos that could not be decoded. The same on every rank.

        Raises:
            Stopped, InputError: see `look`.
        """
        model, share = bare(model), Scores()
        with self.testing(model):
            self.look(model, share, self.videos, self.clips_of(self.deal(self.videos)), stop)
        return self._sum_up(share)

    def describe(self, record: Record, prefix: str) -> str:
        return describe_scores(record, prefix)

    def compute(self, model: nn.Module, clips: Tensor) -> Tensor:
        return model(clips)

    def note(self, share: Scores, videos: list[int], found: Tensor) -> None:
        targets, exact = self.labelled.targets(videos).to(found.device), found.double()
        if self.multi_label:
            losses = F.binary_cross_entropy_with_logits(exact, targets.double(), reduction="none").mean(1)
            share.scores += list(found.sigmoid().cpu().numpy())
        else:
            losses = -(targets * exact.log_softmax(1)).sum(1)
        best = found.topk(min(TOP, found.shape[1])).indices
        right = (targets.gather(1, best) > 0) & found.isfinite().all(1, keepdim=True)
        share.videos += videos
        share.loss += losses.tolist()
        share.hits += list(zip(right[:, 0].tolist(), right.any(1).tolist()))

    def _sum_up(self, own: Scores) -> tuple[Record, list[Failure]]:
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

    def _average_precision(self, shares: list[Scores]) -> float | None:
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
        videos: what they measure.
        model: what is trained, in its wrapper.
        average: of its weights, to validate as well.
        every: steps from one to the next.
        total_steps: of the run; the last step has one too.
        steps_per_epoch: for the log.
        patience: validations without a better one that end the run; None never does.
        margin: percent that one must be better by, to count as better for `patience`.
        goal: percent that end the run once one reaches them; None never does.
        step_flops: of training, for the log, which has their sum beside each pass.
        at_start: whether there is one before the first step. It must measure something.
    """

    def __init__(
        self,
        videos: Measurement,
        model: nn.Module,
        *,
        every: int,
        total_steps: int,
        steps_per_epoch: int,
        average: WeightAverage | None = None,
        patience: int | None = None,
        margin: float = 0.0,
        goal: float | None = None,
        step_flops: float | None = None,
        at_start: bool = False,
    ) -> None:
        self.videos, self.model, self.average = videos, model, average
        self.every, self.total_steps, self.steps_per_epoch = every, total_steps, steps_per_epoch
        self.patience, self.parallel = patience, videos.parallel
        self.margin, self.goal, self.at_start = margin, goal, at_start
        self.step_flops = step_flops
        self.prefix, self.list = videos.prefix, videos.identity
        self.began, self.spent_s = time.perf_counter(), 0.0  # of this start
        self.folder: CheckpointFolder | None = None  # once `read`
        self.records: list[Record] = []
        self.notes: list[str] = []

    @property
    def measure(self) -> str:
        """Key of what is to grow."""
        return self.prefix + self.videos.measure

    def read(self, folder: CheckpointFolder, start_step: int) -> None:
        """Take what the log of the run in `folder` has of this list, up to the step at which the run goes on,
        and see that `checkpoint-best` is the best of it. Every rank calls it, once the log was cut back."""
        self.folder, self.began = folder, time.perf_counter()
        key = f"{self.prefix}list"

        def read() -> list[Record]:
            log = read_log(folder.folder / LOG_NAME, step=int, **{key: str})
            return [r for r in log if r[key] == self.list and r["step"] <= start_step]

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
        wanted = step % self.every == 0 or step == self.total_steps if step else self.at_start
        return wanted and all(record["step"] != step for record in self.records)

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` validations were no better than the best before them, by more than
        `margin`."""
        best, after = -math.inf, 0
        for record in self.records:
            value = record.get(self.measure)
            if value is not None and value > best + self.margin:
                best, after = value, 0
            else:
                after += 1
        return self.patience is not None and after >= self.patience

    @property
    def reached(self) -> Record | None:
        """The first record that reached the goal."""
        if self.goal is None:
            return None
        values = ((record, record.get(self.measure)) for record in self.records)
        return next((record for record, value in values if value is not None and value >= self.goal), None)

    @property
    def ends_run(self) -> bool:
        """Whether no further step is to be made."""
        return self.exhausted or self.reached is not None

    def opened(self) -> contextlib.AbstractContextManager[None]:
        """Its worker processes; see `ValidationSet.opened`."""
        return self.videos.opened()

    def test(self, step: int, stop: StopSignals | None = None) -> Record:
        """Validate the weights, and the averaged ones; a record for the log. Nothing is kept yet.

        Raises:
            Stopped: a rank received a signal.
            InputError: before the first step: there is nothing to measure.
        """
        began, prefix = time.perf_counter(), self.prefix
        scores, failed = self.videos.score(self.model, stop)
        left_out = f"not decoded, left out: {list_failures(failed)}" if failed else ""
        if step == 0 and scores[self.videos.measure] is None:
            raise InputError(f"{self.videos.describe(scores, '')}; {left_out}")
        record: Record = {"step": step, "epoch": step / self.steps_per_epoch}
        record |= {f"{prefix}{name}": value for name, value in scores.items()}
        if self.average is not None:
            with self.average.applied():
                averaged, _ = self.videos.score(self.model, stop)
            names = [name for name in averaged if name not in ("videos", "undecodable")]
            record |= {f"{prefix}ema_{name}": averaged[name] for name in names}
        self.notes = [f"  {left_out}"] if failed else []
        if self.step_flops is not None:
            record[f"{prefix}flops"] = step * self.step_flops
        now = time.perf_counter()
        self.spent_s += now - began
        record |= {f"{prefix}s": now - began, f"{prefix}list": self.list}
        if self.videos.tells_share and step:
            record[f"{prefix}share"] = self.spent_s / (now - self.began)
        return record

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
        step, total, prefix = record["step"], self.total_steps, self.prefix
        parts = [self.videos.describe(record, prefix)]
        if self.average is not None:
            parts.append(f"averaged: {self.videos.describe(record, f'{prefix}ema_')}")
        best = self.best
        if best is not None:
            parts.append("the best" if best is record else f"best {best[self.measure]:.2f} at {best['step']}")
        videos = f"{record[f'{prefix}videos']} videos"
        if record[f"{prefix}undecodable"]:
            videos += f" ({record[f'{prefix}undecodable']} not decoded)"
        took = f"{record[f'{prefix}s']:.1f} s"
        if f"{prefix}share" in record:
            took += f", {record[f'{prefix}share']:.2%} of the time so far"
        lines = [f"{self.videos.name} {step}/{total}: {'; '.join(parts)}; {videos}, {took}"]
        lines += self.notes
        self.notes = []
        return lines

    def closing(self) -> list[str]:
        """Lines for the end of the run."""
        best = self.best
        if best is None:
            return []
        assert self.folder is not None  # `read` came before
        folder, name, last = self.folder.folder, self.videos.name, self.records[-1]
        where = f"{folder / BEST_NAME}, {folder / BEST_WEIGHTS_NAME}"
        found = self.videos.describe(best, self.prefix)
        lines = [f"best {name}: step {best['step']}, {found}; {where}"]
        if self.videos.tells_share and last is not best:
            found = self.videos.describe(last, self.prefix)
            lines.append(f"last {name}: step {last['step']}, {found}")
        if reached := self.reached:
            line = f"{name} reached {self.goal:g} % at step {reached['step']} of {self.total_steps}"
            flops = reached.get(f"{self.prefix}flops")
            line += f" after {flops:.4g} FLOPs of training" if flops is not None else ""
            if last["step"] < self.total_steps:
                line += f"; without {self.videos.flags}goal, or with a higher one, the run goes on from there"
            lines.append(line)
        elif self.exhausted and last["step"] < self.total_steps:
            better = f"better one (by {self.margin:g} points)" if self.margin else "better one"
            lines.append(
                f"ended early at step {last['step']} of {self.total_steps}: {self.patience} {name}s without "
                f"a {better}; a larger {self.videos.flags}patience goes on from there"
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
