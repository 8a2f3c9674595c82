"""The task of `python -m vmae detect-temporal`: a small temporal detector that learns from features.

The loop is that of all training (`vmae.train`): checkpoints, resuming, logs. A sample is a video's features;
losses and targets are in `vmae.evaluate.temporal_loss`, the model in `vmae.model.temporal_head`.

Legend: B videos, T positions, C feature width, K classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vmae.checkpoint.identity import content_hash
from vmae.data.batches import TensorBatch
from vmae.data.manifest import VideoEntry
from vmae.data.quarantine import Failure
from vmae.data.video_dataset import Purpose, SampleKey, VideoDataset, numpy_rng
from vmae.errors import InputError
from vmae.evaluate.temporal import Dropped, dropped_note, read_actionformer, read_videos
from vmae.evaluate.temporal_features import geometry_of, read_about, read_items, subset_of
from vmae.evaluate.temporal_loss import detector_loss, targets_of
from vmae.evaluate.temporal_settings import DetectorConfig
from vmae.model.temporal_head import TemporalHead
from vmae.train.task import Task

DETECTOR = "detector.pth"


@dataclass
class FeatureBatch(TensorBatch):
    """Features of videos; shorter ones are filled up with zeros.

    Attributes:
        clips: the features, float32 [B, T, C].
        labels: float32 [B, T, K].
        distances: to an action's start and end, float32 [B, T, 2].
        valid: bool [B, T].
    """

    clips: Tensor
    labels: Tensor
    distances: Tensor
    valid: Tensor
    ids: list[tuple[int, int, str]]
    replaced: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class FeatureEntry(VideoEntry):
    """A video to train on: features, labels and distances float32 [T, C + K + 2], and what decides them."""

    values: Tensor = torch.empty(0)
    mark: str = ""


class FeatureDataset(VideoDataset):
    """Videos to train on: `dataset[epoch, index]` is a `FeatureBatch` of one.

    Args:
        sizes: C, K and 2.
        most: positions of a sample; of a longer video, a random piece.
    """

    def __init__(self, videos: list[FeatureEntry], sizes: tuple[int, int, int], most: int, seed: int) -> None:
        super().__init__(videos, seed=seed)
        self.videos, self.sizes, self.most = videos, sizes, most

    def describe_labels(self, number: int) -> str:
        return self.videos[number].mark

    def __getitem__(self, key: SampleKey | int) -> FeatureBatch:
        epoch, index = self._checked_key(key)
        piece, number, replaced = self._decode_with_replacement(epoch, index)
        features, labels, distances = piece[None].split(self.sizes, 2)
        valid = torch.ones(features.shape[:2], dtype=torch.bool)
        ids = [(epoch, index, self.entries[number].path)]
        return FeatureBatch(features, labels, distances, valid, ids, replaced)

    def _decode_crops(self, entry: VideoEntry, epoch: int, index: int, attempt: int) -> Tensor:
        assert isinstance(entry, FeatureEntry)
        last = max(len(entry.values) - self.most, 0)
        start = int(numpy_rng(self.seed, epoch, index, attempt, Purpose.FRAMES).integers(last + 1))
        return entry.values[start : start + self.most]


class TemporalTask(Task[DetectorConfig, FeatureBatch]):
    """Class scores and distances to both ends, at every position of a video."""

    model: TemporalHead
    dataset: FeatureDataset
    weights_name, scales_rates = DETECTOR, False

    @property
    def list_file(self) -> str:
        return self.config.dataset

    @property
    def list_root(self) -> str:
        return self.config.features

    def read_data(self) -> tuple[FeatureDataset, list[str]]:
        config, folder = self.config, Path(self.config.features)
        dropped: list[Dropped] = []
        about, truth = read_about(folder), read_actionformer(config.dataset, config.subset, dropped=dropped)
        videos = subset_of(read_videos(config.dataset), config.subset, None, config.dataset)
        geometry = geometry_of(about)
        items = read_items(folder, videos, geometry)
        own = [[segment for segment in truth if segment.video == item.name] for item in items]
        classes = config.classes or tuple(sorted({one.label for segments in own for one in segments}))
        if not classes:
            raise InputError("the videos to train on have no segments")
        self.config = dataclasses.replace(config, about=about, classes=classes)
        entries = []
        for item, segments in zip(items, own):
            targets = targets_of(item, segments, classes, geometry, config.core)
            mark = f"{content_hash(about)} {len(item.features)} {segments}"
            values = torch.cat([item.features, *targets], 1)
            entries.append(FeatureEntry(str(folder / f"{item.name}.npy"), values=values, mark=mark))
        sizes = items[0].features.shape[1], len(classes), 2
        notes = [dropped_note(dropped, config.dataset)] if dropped else []
        return FeatureDataset(entries, sizes, config.max_positions, config.seed), notes

    def build_model(self) -> TemporalHead:
        """Scaled to the features, and to the typical distance to an action's start and end."""
        config, sizes = self.config, self.dataset.sizes
        values = torch.cat([entry.values for entry in self.dataset.videos])
        features, labels, distances = values.split(sizes, 1)
        learned = distances[labels.any(1)]
        distance = learned.log().mean().exp().item() if len(learned) else 1.0
        size = {"width": config.width, "depth": config.depth}
        head = TemporalHead(*sizes[:2], **size, drop_rate=config.drop_rate, distance=distance)
        head.mean.copy_(features.mean(0))
        head.deviation.copy_(features.std(0, correction=0).clamp(min=1e-6))
        return head

    def compute_loss(self, model: nn.Module, batch: FeatureBatch) -> Tensor:
        logits, found = model(batch.clips, batch.valid)
        return detector_loss(logits, found, batch.labels, batch.distances, batch.valid)

    # --- Words ---

    def describe_model(self) -> str:
        classes = self.config.classes or ()
        return f", {len(classes)} classes, {self.model.mean.shape[0]} values a position"
