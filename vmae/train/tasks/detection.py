"""`python -m vmae finetune-detection`: train a detector of actions on annotated key frames, as on AVA.

Every video is opened once before the run begins.

Legend: B clips, M boxes of a clip, K actions.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from vmae.checkpoint.start import Start, start_classifier
from vmae.data.ava import AvaBox, read_actions, read_excluded, read_ground_truth
from vmae.data.detection_dataset import DetectionBatch, DetectionDataset, KeyFrame, find_videos, key_frames
from vmae.errors import InputError
from vmae.model.detector import Detector, build_detector
from vmae.train.detection_settings import DetectionConfig, add_arguments, configs_from_args
from vmae.train.run import run_task
from vmae.train.tasks.supervised import Source, SupervisedTask, model_for, source_from_args

__all__ = ["DetectionConfig", "DetectionTask", "add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """The command."""
    source = source_from_args(args)
    config, run_config = configs_from_args(args, model_for(args, source), read_actions(args.actions))
    return run_task(DetectionTask(config, source), run_config, args)


def detection_loss(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Binary cross entropy of each action, the mean over boxes and actions.

    The published loss is this times the boxes of the batch; the loop weighs micro-batches by their boxes
    instead.

    Args:
        logits, targets: [B, M, K].
        valid: [B, M], 0 for rows that pad.
    """
    each = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(-1)
    return (each * valid).sum() / valid.sum()


class DetectionTask(SupervisedTask[DetectionConfig, DetectionBatch]):
    """Each box of a key frame has any number of actions."""

    model: Detector
    unit = "key frames"

    @property
    def list_file(self) -> str:
        return self.config.annotations

    @property
    def list_root(self) -> str:
        return self.config.videos

    def check(self) -> list[str]:
        notes = super().check()
        self.config.model.check_rgb("detection")
        before = {} if self.source is None else self.source.settings
        if "action_ids" in before:
            was = (before["clip"].get("preprocess", "resize"), before.get("roi", "aligned"))
            now = (self.config.clip.preprocess, self.config.roi)
            for name, old, new in zip(("preprocess", "roi"), was, now):
                if old != new:
                    notes.append(f"note: the checkpoint was trained with --{name} {old}, this run has {new}")
        return notes

    def adapt(self, source: Source) -> DetectionConfig:
        new_head = self.config.new_head or "action_ids" not in source.settings  # another head is of no use
        return dataclasses.replace(super().adapt(source), new_head=new_head)

    def read_data(self) -> tuple[DetectionDataset, list[str]]:
        config = self.config
        self.frames, notes = self.read_frames()
        self.boxes = sum(len(frame.boxes) for frame in self.frames)
        dataset = DetectionDataset(
            self.frames,
            config.num_classes,
            config.clip,
            config.augment,
            seed=config.seed,
            repeat=config.repeat,
        )
        return dataset, notes

    def read_frames(self) -> tuple[list[KeyFrame], list[str]]:
        """The key frames, and lines on what was left out.

        Raises:
            InputError: files that cannot be read; see `read_ground_truth`, `key_frames`; nothing is left.
        """
        config = self.config
        notes: list[str] = []
        truth = read_ground_truth(config.annotations, config.action_ids, skip_unlisted=config.skip_unlisted)
        rows = truth.rows
        if truth.empty:
            notes.append(f"note: {truth.empty} key frames of {config.annotations} have no boxes: not learned")
        if config.excluded is not None:
            excluded = read_excluded(config.excluded)
            kept = [row for row in rows if row.key not in excluded]
            rows = _left(kept, rows, "on excluded key frames", notes)
        entries = find_videos(config.videos, [row.video for row in rows], pattern=config.frame_pattern)
        if config.skip_missing:
            kept = [row for row in rows if row.video in entries]
            rows = _left(kept, rows, f"of videos that are not in {config.videos}", notes)
        frames = key_frames(
            rows,
            config.annotations,
            entries,
            config.clip,
            actions=config.action_ids,
            fps=config.fps,
            videos=config.videos,
        )
        lacking = config.num_classes - len({row.action for row in rows})
        if lacking:
            notes.append(
                f"note: {lacking} of {config.num_classes} actions have no box in {config.annotations}"
            )
        return frames, notes

    def build_model(self) -> Detector:
        return build_detector(
            self.config.model,
            self.config.num_classes,
            init_scale=self.config.init_scale,
            drop_rate=self.config.drop_rate,
            attn_drop_rate=self.config.attn_drop_rate,
            roi=self.config.roi,
            preprocess=self.config.clip.preprocess,
            backend=self.run.speed.backend,
            attention=self.run.speed.attention,
        )

    def load(self, source: Source) -> Start:
        return start_detector(self.model, source, new_head=self.config.new_head)

    def weigh(self, batch: DetectionBatch) -> float:
        return batch.count / (self.run.batch_size * self.boxes / len(self.frames))

    def compute_loss(self, model: nn.Module, batch: DetectionBatch) -> Tensor:
        return detection_loss(model(batch.clips, batch.boxes), batch.targets, batch.valid)

    # --- Words ---

    def describe_model(self) -> str:
        return f"{super().describe_model()}, {self.config.num_classes} actions"

    def describe_data(self) -> list[str]:
        videos = len({frame.video for frame in self.frames})
        return [f"{self.boxes} boxes on {len(self.frames)} key frames of {videos} videos"]

    def closing(self) -> list[str]:
        folder = self.run.output
        flags = f"--checkpoint {folder} --annotations CSV --videos DIR --output {folder}/test"
        return [f"to test: python -m vmae detect {flags}"]


def start_detector(model: Detector, source: Source, *, new_head: bool) -> Start:
    """Load a checkpoint's encoder, and its head unless `new_head`, into `model`.

    As published, the `norm` of a pre-trained file is kept; in one fine-tuned for classification there is a
    norm of pooled clips instead, and the detector's starts fresh.

    Raises:
        InputError: see `start_classifier`.
    """
    state = dict(source.state)
    own, note = model.state_dict(), None
    pooled = [name for name in state if name.startswith(("fc_norm.", "pool."))]
    if pooled:
        state = {name: value for name, value in state.items() if name not in pooled}
        state |= {name: own[name] for name in ("norm.weight", "norm.bias")}
        note = f"{len(pooled)} dropped (fc_norm and pooling, of whole clips), norm starts fresh"
    head = next(
        (value for name, value in state.items() if name.endswith("head.weight") and "decoder." not in name),
        None,
    )
    if not new_head and head is not None and head.shape[0] != model.num_classes:
        raise InputError(
            f"checkpoint {source.path} has a head of {head.shape[0]} actions, the action list has "
            f"{model.num_classes}: --new-head starts a fresh one"
        )
    report = start_classifier(model, source.path, grid=source.grid, new_head=new_head, state=state)
    if note:
        report.notes.append(note)
        report.loaded -= 2
    return report


def _left(kept: list[AvaBox], rows: list[AvaBox], why: str, notes: list[str]) -> list[AvaBox]:
    if not kept:
        raise InputError(f"no annotation is left: all {len(rows)} are {why}")
    if len(kept) < len(rows):
        notes.append(f"note: {len(rows) - len(kept)} of {len(rows)} annotations left out, {why}")
    return kept
