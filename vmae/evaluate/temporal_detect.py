"""`python -m vmae detect-temporal`: a small temporal detector, trained and tested on features of `python -m
vmae features`.

Features `DIR/VIDEO.npy` and the dataset file that ActionFormer reads go in; out come the detector, its
detections as ActivityNet's JSON, and the mean average precision. Losses and the choice of positions are
ActionFormer's (Zhang et al., 2022): sigmoid focal loss (alpha 0.25, gamma 2) on class scores, distance-IoU
loss on positions within an action's middle, Gaussian soft-NMS. The head is far smaller and of one scale
(`vmae.model.temporal_head`): to see whether features are of use, not to compete.

Legend: B videos, T positions, C feature width, K classes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vmae.checkpoint.identity import check_same
from vmae.config import _Checked
from vmae.errors import InputError
from vmae.evaluate.features import SETTINGS, read_features
from vmae.evaluate.temporal import (
    THUMOS_THRESHOLDS,
    Segment,
    VideoInfo,
    mean_average_precision,
    read_actionformer,
    read_videos,
    write_detections,
)
from vmae.files.atomic import write_atomically
from vmae.files.folder_lock import FolderLock
from vmae.files.json_files import parse_json
from vmae.flags import add_settings
from vmae.model.temporal_head import TemporalHead
from vmae.settings import BATCH, COUNT, SEED, SHARE_ABOVE_0, SHARE_BELOW_1, Real, Whole, limits, ranged
from vmae.train.checks import check_output, resolve_device
from vmae.train.pretrain_settings import RunConfig

DETECTOR, DETECTIONS, RESULTS = "detector.pth", "detections.json", "results.json"


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(_Checked):
    """What decides the result of a training and of a test.

    Attributes:
        width, depth: of the head.
        drop_rate: dropout in the head.
        epochs, batch_size: passes over the training videos; videos at once.
        max_positions: of a video in training; of a longer one, a random piece.
        lr, weight_decay: of AdamW; the rate rises over the first tenth of the steps, then falls as a cosine.
        core: share of an action, around its middle, whose positions learn it.
        sigma: of soft-NMS; larger lets more neighbours live.
        min_score, keep: least score of a detection, and most detections of a video.
        seed: of everything random.
    """

    width: int = ranged(64, Whole(1, 2**14))
    depth: int = ranged(5, Whole(1, 1000))
    drop_rate: float = ranged(0.1, SHARE_BELOW_1)
    epochs: int = ranged(40, COUNT)
    batch_size: int = ranged(4, BATCH)
    max_positions: int = ranged(2048, COUNT)
    lr: float = ranged(2e-3, Real(above=0, most=10_000))
    weight_decay: float = ranged(0.05, Real(least=0, most=1000))
    core: float = ranged(0.5, SHARE_ABOVE_0)
    sigma: float = ranged(0.5, Real(above=0, most=10**6))
    min_score: float = ranged(0.01, SHARE_ABOVE_0)
    keep: int = ranged(200, COUNT)
    seed: int = ranged(0, SEED)


# --- positions and seconds ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """Where features lie in time: position i stands for the middle of the window of `frames` frames from `i *
    step` on."""

    frames: int
    step: int

    def seconds(self, position: float | Tensor, fps: float) -> Any:
        """Of positions, which need not be whole."""
        return (position * self.step + self.frames / 2) / fps

    def position(self, seconds: float, fps: float) -> float:
        """The inverse of `seconds`."""
        return (seconds * fps - self.frames / 2) / self.step

    def count(self, video: VideoInfo) -> int:
        """Windows that fit into a video."""
        return max((round(video.duration * video.fps) - self.frames) // self.step + 1, 0)


def read_about(folder: Path) -> dict[str, Any]:
    """What a folder's features are of: `windows` and `weights`, and `model` where it is known.

    Raises:
        InputError: the folder is none of `python -m vmae features`.
    """
    try:
        about = parse_json((folder / SETTINGS).read_text(encoding="utf-8"))
        geometry_of(about)
        return {key: about[key] for key in ("windows", "weights", *({"model"} & about.keys()))}
    except OSError as error:
        raise InputError(
            f"{folder / SETTINGS} cannot be read ({error.strerror}); `python -m vmae features` writes it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / SETTINGS} does not tell the features' windows: {error!r}") from None


def geometry_of(about: dict[str, Any]) -> Geometry:
    return Geometry(int(about["windows"]["frames"]), int(about["windows"]["step"]))


@dataclass(frozen=True)
class Item:
    """A video's features, float32 [T, C], and what the dataset file says of it."""

    name: str
    info: VideoInfo
    features: Tensor


def read_items(folder: Path, videos: dict[str, VideoInfo], geometry: Geometry) -> list[Item]:
    """The features of `videos`.

    Raises:
        InputError: a file is missing, of another width than the others, or of another length than its video.
    """
    if missing := [name for name in videos if not (folder / f"{name}.npy").is_file()]:
        some = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise InputError(
            f"{folder} has no features of {some}: make them (`python -m vmae features`), or leave them out "
            "of the dataset"
        )
    items = []
    for name, info in videos.items():
        features, due = torch.from_numpy(read_features(folder / f"{name}.npy")).float(), geometry.count(info)
        if items and features.shape[1] != items[0].features.shape[1]:
            width = items[0].features.shape[1]
            raise InputError(
                f"{folder}/{name}.npy: {features.shape[1]} values a window, {items[0].name}.npy has {width}"
            )
        if abs(len(features) - due) > max(
            4, due // 10
        ):  # durations and frame rates of dataset files are rounded
            given = f"{info.duration:g} s at {info.fps:g} frames a second"
            raise InputError(
                f"{folder}/{name}.npy has {len(features)} windows, but {given} have {due} of "
                f"{geometry.frames} frames, step "
                f"{geometry.step}: another video, other windows, or a wrong fps in the dataset file"
            )
        items.append(Item(name, info, features))
    return items


# --- what the head learns -----------------------------------------------------------------------------------


def targets_of(
    item: Item, truth: Sequence[Segment], classes: Sequence[str], geometry: Geometry, core: float
) -> tuple[Tensor, Tensor]:
    """Labels float32 [T, K], 1 in the middle `core` of each action (one position at least), and distances to
    its start and end float32 [T, 2] in positions; where actions overlap, those to the shortest."""
    positions = torch.arange(len(item.features), dtype=torch.float32)
    labels, distances = torch.zeros(len(positions), len(classes)), torch.ones(len(positions), 2)
    for segment in sorted(truth, key=lambda one: one.start - one.end):  # the shortest last
        start, end = (geometry.position(seconds, item.info.fps) for seconds in (segment.start, segment.end))
        learns = (positions - (start + end) / 2).abs() <= max(core * (end - start) / 2, 0.5)
        labels[learns, classes.index(segment.label)] = 1
        distances[learns] = torch.stack([positions - start, end - positions], 1)[learns]
    return labels, distances.clamp(min=1e-3)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Elementwise, of sigmoids (Lin et al., 2017)."""
    missed = torch.where(labels > 0, 1 - logits.sigmoid(), logits.sigmoid())
    weight = torch.where(labels > 0, alpha, 1 - alpha) * missed**gamma
    return weight * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def distance_iou_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """[N], from distances to start and end [N, 2] of the same positions: 1 - IoU + (middles apart / span of
    both)^2."""
    overlap, span = torch.minimum(found, wanted).sum(1), torch.maximum(found, wanted).sum(1)
    apart = ((found[:, 1] - found[:, 0]) - (wanted[:, 1] - wanted[:, 0])) / 2
    return 1 - overlap / (found.sum(1) + wanted.sum(1) - overlap) + (apart / span) ** 2


def detector_loss(logits: Tensor, found: Tensor, labels: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Of a batch, over its positions with an action; logits and labels [B, T, K], distances [B, T, 2], valid
    bool [B, T]."""
    learns = labels.any(2) & valid
    classes = (focal_loss(logits, labels) * valid[..., None]).sum()
    return (classes + distance_iou_loss(found[learns], wanted[learns]).sum()) / learns.sum().clamp(min=1)


def train_detector(
    items: Sequence[Item],
    truth: Sequence[Segment],
    geometry: Geometry,
    config: DetectorConfig,
    *,
    device: torch.device | str = "cpu",
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> tuple[TemporalHead, list[str]]:
    """A detector of the classes of `truth`, in eval mode, and these classes.

    Args:
        items: at least one.
        truth: segments, of other videos too.
        report: gets each epoch's number, from 1, and its mean loss.

    Raises:
        InputError: `truth` holds no segment of the items.
    """
    own = {item.name: [segment for segment in truth if segment.video == item.name] for item in items}
    classes = sorted({segment.label for segments in own.values() for segment in segments})
    if not classes:
        raise InputError("the videos to train on have no segments")
    targets = [targets_of(item, own[item.name], classes, geometry, config.core) for item in items]
    rows = [(item.features, *target) for item, target in zip(items, targets)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = _fresh_head(rows, len(classes), config).to(device)
        order = np.random.default_rng(config.seed)
        optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        steps = config.epochs * math.ceil(len(rows) / config.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        for epoch in range(1, config.epochs + 1):
            losses = []
            for numbers in np.array_split(
                order.permutation(len(rows)), math.ceil(len(rows) / config.batch_size)
            ):
                features, labels, wanted, valid = _batch(
                    [rows[n] for n in numbers], config.max_positions, order, device
                )
                loss = detector_loss(*head(features, valid), labels, wanted, valid)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            report(epoch, sum(losses) / len(losses))
    return head.eval(), classes


def _rate(step: int, steps: int) -> float:
    warm = max(steps // 10, 1)
    return (
        (step + 1) / warm
        if step < warm
        else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
    )


def _fresh_head(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]], num_classes: int, config: DetectorConfig
) -> TemporalHead:
    """Scaled to the features, and to the typical distance to an action's start and end."""
    features = torch.cat([row[0] for row in rows])
    learned = torch.cat([wanted[labels.any(1)] for _, labels, wanted in rows])
    sizes = {"width": config.width, "depth": config.depth, "drop_rate": config.drop_rate}
    distance = learned.log().mean().exp().item() if len(learned) else 1.0
    head = TemporalHead(features.shape[1], num_classes, distance=distance, **sizes)
    head.mean.copy_(features.mean(0))
    head.deviation.copy_(features.std(0, correction=0).clamp(min=1e-6))
    return head


def _batch(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]], most: int, rng: np.random.Generator, device
) -> list[Tensor]:
    """Features, labels, distances [B, T, ...] and valid [B, T] of rows padded to the longest, of which `most`
    are taken."""
    starts = [int(rng.integers(max(len(row[0]) - most, 0) + 1)) for row in rows]
    pieces = [tuple(part[start : start + most] for part in row) for row, start in zip(rows, starts)]
    valid = [torch.ones(len(piece[0]), dtype=torch.bool) for piece in pieces]
    columns = [*zip(*pieces), valid]
    return [torch.nn.utils.rnn.pad_sequence(column, batch_first=True).to(device) for column in columns]


# --- what it finds ------------------------------------------------------------------------------------------


@torch.no_grad()
def detect(
    head: TemporalHead, item: Item, classes: Sequence[str], geometry: Geometry, config: DetectorConfig
) -> list[Segment]:
    """Segments of a video, best first, in seconds within it."""
    device = head.mean.device
    features = item.features[None].to(device)
    logits, distances = head(features, torch.ones(features.shape[:2], dtype=torch.bool, device=device))
    scores, distances = logits[0].sigmoid().cpu(), distances[0].cpu()
    positions = torch.arange(len(scores), dtype=torch.float32)
    spans = [positions - distances[:, 0], positions + distances[:, 1]]
    spans = torch.stack(
        [geometry.seconds(span, item.info.fps).clamp(0, item.info.duration) for span in spans], 1
    ).numpy()
    found = []
    for label, own in zip(classes, scores.T.numpy()):
        picked = np.flatnonzero((own >= config.min_score) & (spans[:, 1] > spans[:, 0]))
        picked = picked[np.argsort(-own[picked], kind="stable")[:2000]]
        kept, lowered = soft_nms(spans[picked], own[picked], sigma=config.sigma, min_score=config.min_score)
        best = zip(spans[picked][kept].tolist(), lowered.tolist())
        found += [Segment(item.name, start, end, label, score) for (start, end), score in best]
    return sorted(found, key=lambda segment: -segment.score)[: config.keep]


def soft_nms(
    spans: np.ndarray, scores: np.ndarray, *, sigma: float, min_score: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian soft-NMS (Bodla et al., 2017): the best is taken, the others' scores fall by `exp(-IoU^2 /
    sigma)`, and so on.

    Args:
        spans: float [N, 2], start and end.
        scores: float [N].

    Returns:
        Numbers of those that stay at `min_score` or above, best first, and their lowered scores.
    """
    scores, left, taken, lowered = scores.astype(np.float64), np.arange(len(spans)), [], []
    while len(left):
        best = left[np.argmax(scores[left])]
        taken.append(best)
        lowered.append(scores[best])
        left = left[left != best]
        overlap = np.minimum(spans[left, 1], spans[best, 1]) - np.maximum(spans[left, 0], spans[best, 0])
        lengths = spans[left, 1] - spans[left, 0] + spans[best, 1] - spans[best, 0]
        overlap = np.maximum(overlap, 0)
        scores[left] *= np.exp(-((overlap / (lengths - overlap)) ** 2) / sigma)
        left = left[scores[left] >= min_score]
    return np.array(taken, int), np.array(lowered)


# --- the detector's file ------------------------------------------------------------------------------------


def save_detector(
    path: Path, head: TemporalHead, classes: list[str], about: dict[str, Any], config: DetectorConfig
) -> None:
    """One file with all that a test needs, and what the features were of."""
    content = {"head": head.state_dict(), "classes": classes, "features": about, "config": config.to_dict()}
    write_atomically(path, lambda file: torch.save(content, file))


def load_detector(path: Path, about: dict[str, Any]) -> tuple[TemporalHead, list[str], DetectorConfig]:
    """A detector in eval mode for features that `about` describes.

    Raises:
        InputError: it can't be read, or learned from features of other weights or windows.
    """
    path = path / DETECTOR if path.is_dir() else path
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        config, classes, state = (
            DetectorConfig.from_dict(content["config"]),
            content["classes"],
            content["head"],
        )
        head = TemporalHead(len(state["mean"]), len(classes), width=config.width, depth=config.depth)
        head.load_state_dict(state)
        learned = content["features"]
    except OSError as error:
        raise InputError(f"detector {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # torch.load and load_state_dict raise many kinds
        raise InputError(
            f"{path} is no detector of `python -m vmae detect-temporal`: {str(error).splitlines()[0]}"
        ) from None
    holds = f"detector {path} learned from features of other weights or windows"
    check_same(learned, about, holds, "make features as those were, or train another detector on these")
    return head.eval(), classes, config


# --- the command --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument(
        "features", metavar="DIR", help="features of all videos, as `python -m vmae features` writes them"
    )
    parser.add_argument(
        "dataset", metavar="DATASET.json", help="segments, in the file that ActionFormer reads"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help=f"folder for {DETECTOR}, {DETECTIONS}, {RESULTS}"
    )
    parser.add_argument("--detector", metavar="DIR|FILE", help="test this one, train none")
    parser.add_argument("--train-subset", default="training", help="of the dataset, to train on (training)")
    parser.add_argument(
        "--test-subset", help="of the dataset, to test on (all others: name it where some are not labelled)"
    )
    parser.add_argument(
        "--thresholds",
        type=SHARE_ABOVE_0,
        nargs="+",
        default=list(THUMOS_THRESHOLDS),
        metavar="T",
        help="temporal IoU",
    )
    parser.add_argument(
        "--picture",
        type=Whole(0, 10_000),
        default=0,
        metavar="N",
        help="draw true and found segments of N test videos",
    )
    add_settings(parser, RunConfig, "device")
    result = parser.add_argument_group("settings that change results")
    helps = {
        "epochs": "passes over the training videos",
        "batch_size": "videos at once",
        "lr": "learning rate",
        "width": "of the head",
        "depth": "convolutions of the head",
        "seed": "of everything random",
    }
    for name, text in helps.items():
        default = getattr(DetectorConfig, name)
        result.add_argument(
            f"--{name.replace('_', '-')}", type=limits(DetectorConfig, name), help=f"{text} ({default})"
        )


def run(args: argparse.Namespace) -> None:
    """The command."""
    check_output(Path(args.output))
    with FolderLock(args.output, "a temporal detector"):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    device, folder, output = resolve_device(args.device), Path(args.features), Path(args.output)
    changes = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "width", "depth", "seed")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.detector and changes:
        raise InputError(
            f"--detector is trained already; leave out {', '.join('--' + name for name in changes)}"
        )
    if not args.detector and (output / DETECTOR).exists():
        raise InputError(
            f"{output} holds a detector; test it with --detector {output}, or choose another --output"
        )
    about, truth, videos = read_about(folder), read_actionformer(args.dataset), read_videos(args.dataset)
    geometry = geometry_of(about)
    test = read_items(folder, _subset(videos, args.test_subset, args.train_subset, args.dataset), geometry)
    if args.detector:
        head, classes, config = load_detector(Path(args.detector), about)
        output.mkdir(parents=True, exist_ok=True)
    else:
        config = DetectorConfig.from_dict(changes)
        items = read_items(folder, _subset(videos, args.train_subset, None, args.dataset), geometry)
        head, classes = train_detector(items, truth, geometry, config, device=device, report=_say)
        output.mkdir(parents=True, exist_ok=True)
        save_detector(output / DETECTOR, head, classes, about, config)
    head.to(device)
    found = [segment for item in test for segment in detect(head, item, classes, geometry, config)]
    write_detections(output / DETECTIONS, found)
    names = {item.name for item in test}
    wanted = [segment for segment in truth if segment.video in names]
    if wanted:
        _score(output, wanted, found, args.thresholds)
    else:
        print("no segments of the test videos are known: nothing to compare the detections with")
    if args.picture:
        from vmae.evaluate.temporal_picture import draw_segments

        drawn = {item.name: item.info.duration for item in test[: args.picture]}
        draw_segments(output / "segments.png", drawn, wanted, found)
        print(f"picture: {output / 'segments.png'}")
    print(f"{len(found)} detections in {len(test)} videos: {output / DETECTIONS}")


def _subset(
    videos: dict[str, VideoInfo], name: str | None, but: str | None, path: str
) -> dict[str, VideoInfo]:
    """The videos of subset `name`, or of all but `but`."""
    if name is not None:
        found = {video: info for video, info in videos.items() if info.subset.lower() == name.lower()}
    else:
        found = {video: info for video, info in videos.items() if info.subset.lower() != but.lower()}
    if not found:
        known = ", ".join(sorted({info.subset for info in videos.values()})) or "none"
        raise InputError(
            f"{path} has no videos {f'of subset {name!r}' if name else f'beside subset {but!r}'}; it has: "
            f"{known}"
        )
    return found


def _say(epoch: int, loss: float) -> None:
    if epoch == 1 or epoch % 10 == 0:
        print(f"epoch {epoch}: loss {loss:.4f}", flush=True)


def _score(output: Path, truth: list[Segment], found: list[Segment], thresholds: Sequence[float]) -> None:
    """Write and print the mean average precision, in percent; detections of classes that no test video has
    don't count."""
    known = {segment.label for segment in truth}
    scores = mean_average_precision(
        truth, [segment for segment in found if segment.label in known], thresholds
    )
    text = json.dumps(scores, indent=1) + "\n"
    write_atomically(output / RESULTS, lambda file: file.write(text), binary=False)
    rows = [(label, values) for label, values in scores["classes"].items()] + [("mAP", scores["map"])]
    width = max(len(label) for label, _ in rows)
    print(f"{'tIoU':<{width}}  " + "  ".join(f"{t:>5g}" for t in thresholds) + "  average")
    for label, values in rows:
        mean = sum(values.values()) / len(values)
        print(
            f"{label:<{width}}  "
            + "  ".join(f"{100 * values[t]:5.1f}" for t in thresholds)
            + f"  {100 * mean:7.1f}"
        )
