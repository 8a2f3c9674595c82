"""`python -m vmae detect-temporal`: a small temporal detector, trained and tested on features of `python -m
vmae features`.

Features `DIR/VIDEO.npy` and the dataset file that ActionFormer reads go in; out come the detector, its
detections as ActivityNet's JSON, and the mean average precision. Losses and the choice of positions are
ActionFormer's (Zhang et al., 2022): sigmoid focal loss (alpha 0.25, gamma 2) on class scores, distance-IoU
loss on positions within an action's middle, Gaussian soft-NMS. The head is far smaller and of one scale
(`vmae.model.temporal_head`): it shows whether features are of use, and does not compete.

It trains through the loop of all training (`vmae.evaluate.temporal_task`): killed or stopped, the same
command goes on.

Legend: B videos, T positions, C feature width, K classes.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vmae.config import SpeedConfig
from vmae.errors import InputError
from vmae.evaluate.temporal import (
    THUMOS_THRESHOLDS,
    Dropped,
    Segment,
    dropped_note,
    mean_average_precision,
    read_actionformer,
    read_videos,
    write_detections,
)
from vmae.evaluate.temporal_features import Geometry, Item, geometry_of, read_about, read_items, subset_of
from vmae.evaluate.temporal_settings import DetectorConfig
from vmae.evaluate.temporal_task import DETECTOR, TemporalTask
from vmae.files.atomic import write_atomically
from vmae.files.folder_lock import FolderLock, refuse_if_locked
from vmae.files.settled import check_same
from vmae.flags import add_settings
from vmae.model.temporal_head import TemporalHead
from vmae.settings import SHARE_ABOVE_0, Whole, limits
from vmae.train.checks import check_output, resolve_device
from vmae.train.pretrain_settings import RunConfig
from vmae.train.run import train

DETECTIONS, RESULTS = "detections.json", "results.json"
# Flags of the settings that change results, and what they are; they are fields of `DetectorConfig`.
_SETTINGS = {
    "epochs": "passes over the training videos",
    "lr": "learning rate",
    "width": "of the head",
    "depth": "convolutions of the head",
    "seed": "of everything random",
}
_BATCH_SIZE = 4


# --- what it finds ------------------------------------------------------------------------------------------


@torch.no_grad()
def detect(head: TemporalHead, item: Item, geometry: Geometry, config: DetectorConfig) -> list[Segment]:
    """Segments of a video, best first, in seconds within it."""
    device = head.mean.device
    features = item.features[None].to(device)
    logits, distances = head(features, torch.ones(features.shape[:2], dtype=torch.bool, device=device))
    scores, distances = logits[0].sigmoid().cpu(), distances[0].cpu()
    positions = torch.arange(len(scores), dtype=torch.float32)
    ends = [positions - distances[:, 0], positions + distances[:, 1]]
    seconds = [geometry.seconds(end, item.info.fps).clamp(0, item.info.duration) for end in ends]
    spans = torch.stack(seconds, 1).numpy()
    found: list[Segment] = []
    for label, own in zip(config.classes or (), scores.T.numpy()):
        chosen = np.flatnonzero((own >= config.min_score) & (spans[:, 1] > spans[:, 0]))
        chosen = chosen[np.argsort(-own[chosen], kind="stable")[:2000]]
        kept, lowered = soft_nms(spans[chosen], own[chosen], sigma=config.sigma, min_score=config.min_score)
        best = zip(spans[chosen][kept].tolist(), lowered.tolist())
        found += [Segment(item.name, start, end, label, score) for (start, end), score in best]
    return sorted(found, key=lambda segment: -segment.score)[: config.keep]


def soft_nms(
    spans: np.ndarray, scores: np.ndarray, *, sigma: float, min_score: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian soft-NMS (Bodla et al., 2017): the best is kept, the others'' scores fall by `exp(-IoU^2 /
    sigma)`, and so on.

    Args:
        spans: float [N, 2], start and end.
        scores: float [N].

    Returns:
        Numbers of those that stay at `min_score` or above, best first, and their lowered scores.
    """
    scores, left = scores.astype(np.float64), np.arange(len(spans))
    kept: list[int] = []
    lowered: list[float] = []
    while len(left):
        best = int(left[np.argmax(scores[left])])
        kept.append(best)
        lowered.append(float(scores[best]))
        left = left[left != best]
        overlap = np.minimum(spans[left, 1], spans[best, 1]) - np.maximum(spans[left, 0], spans[best, 0])
        lengths = spans[left, 1] - spans[left, 0] + spans[best, 1] - spans[best, 0]
        overlap = np.maximum(overlap, 0)
        scores[left] *= np.exp(-((overlap / (lengths - overlap)) ** 2) / sigma)
        left = left[scores[left] >= min_score]
    return np.array(kept, int), np.array(lowered)


# --- the detector's file ------------------------------------------------------------------------------------


def load_detector(path: Path, about: dict[str, Any]) -> tuple[TemporalHead, DetectorConfig]:
    """A detector in eval mode for features that `about` describes.

    Raises:
        InputError: it can't be read, or learned from features of other weights or windows.
    """
    path = path / DETECTOR if path.is_dir() else path
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        config, state = _read_detector(content)
        head = TemporalHead(
            len(state["mean"]), len(config.classes or ()), width=config.width, depth=config.depth
        )
        head.load_state_dict(state)
    except OSError as error:
        raise InputError(f"detector {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # torch.load and load_state_dict raise many kinds
        raise InputError(
            f"{path} is no detector of `python -m vmae detect-temporal`: {str(error).splitlines()[0]}"
        ) from None
    holds = f"detector {path} learned from features of other weights or windows"
    remedy = "make features as those were, or train another detector on these"
    check_same(config.about or {}, about, holds, remedy)
    return head.eval(), config


def _read_detector(content: dict[str, Any]) -> tuple[DetectorConfig, dict[str, torch.Tensor]]:
    """Settings and weights of a file's content; of one from before detectors trained through the common loop,
    too."""
    if "head" not in content:
        return DetectorConfig.from_dict(content["config"]), content["model"]
    settings = {name: value for name, value in content["config"].items() if name != "batch_size"}
    known = {
        "features": "",
        "dataset": "",
        "about": content["features"],
        "classes": tuple(content["classes"]),
    }
    return DetectorConfig.from_dict({**settings, **known}), content["head"]


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
    result.add_argument(
        "--batch-size", type=limits(RunConfig, "batch_size"), help=f"videos at once ({_BATCH_SIZE})"
    )
    for name, text in _SETTINGS.items():
        default = getattr(DetectorConfig, name)
        result.add_argument(f"--{name}", type=limits(DetectorConfig, name), help=f"{text} ({default})")


def run(args: argparse.Namespace) -> int:
    """The command; 130 after Ctrl-C in the training, 0 after another signal there."""
    folder, output = Path(args.features), Path(args.output)
    check_output(output)
    refuse_if_locked(output)
    changes = {name: getattr(args, name) for name in ("batch_size", *_SETTINGS)}
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.detector and changes:
        flags = ", ".join("--" + name.replace("_", "-") for name in changes)
        raise InputError(f"--detector is trained already; leave out {flags}")
    if not args.detector and (output / DETECTOR).exists():
        raise InputError(
            f"{output} holds a detector; test it with --detector {output}, or choose another --output"
        )
    about, videos = read_about(folder), read_videos(args.dataset)
    chosen = subset_of(videos, args.test_subset, args.train_subset, args.dataset)
    test = read_items(folder, chosen, geometry_of(about))
    if not args.detector:
        stopped_by = _train(args, changes)
        if stopped_by is not None:
            return 130 if stopped_by == signal.SIGINT else 0
    head, config = load_detector(Path(args.detector or output), about)
    with FolderLock(output, "a test of a temporal detector"):
        _test(args, test, head.to(resolve_device(args.device)), config)
    return 0


def _train(args: argparse.Namespace, changes: dict[str, Any]) -> int | None:
    """Train a detector; the signal that stopped it before its end."""
    batch_size = changes.pop("batch_size", _BATCH_SIZE)
    config = DetectorConfig(features=args.features, dataset=args.dataset, subset=args.train_subset, **changes)
    run = RunConfig(
        output=args.output,
        device=args.device,
        batch_size=batch_size,
        speed=SpeedConfig(num_workers=0, parallel="none"),
        save_every=100,
        tensorboard=False,
    )
    return train(TemporalTask(config), run).stopped_by


def _test(args: argparse.Namespace, test: list[Item], head: TemporalHead, config: DetectorConfig) -> None:
    """Detect in the videos `test`, and write and print what was found and how good it is."""
    output, geometry = Path(args.output), geometry_of(config.about or {})
    found = [segment for item in test for segment in detect(head, item, geometry, config)]
    write_detections(output / DETECTIONS, found)
    names = {item.name for item in test}
    left_out: list[Dropped] = []
    wanted = read_actionformer(args.dataset, dropped=left_out)
    wanted = [segment for segment in wanted if segment.video in names]
    left_out = [one for one in left_out if one.video in names]
    if left_out:
        print(dropped_note(left_out, args.dataset))
    if wanted:
        _score(output, wanted, found, args.thresholds, len(left_out))
    else:
        print("no segments of the test videos are known: nothing to compare the detections with")
    if args.picture:
        from vmae.evaluate.temporal_picture import draw_segments

        drawn = {item.name: item.info.duration for item in test[: args.picture]}
        draw_segments(output / "segments.png", drawn, wanted, found)
        print(f"picture: {output / 'segments.png'}")
    print(f"{len(found)} detections in {len(test)} videos: {output / DETECTIONS}")


def _score(
    output: Path, truth: list[Segment], found: list[Segment], thresholds: Sequence[float], left_out: int
) -> None:
    """Write and print the mean average precision, in percent; detections of classes that no test video has
    don't count.

    Args:
        left_out: segments of the dataset file that are not in `truth`, for `results.json`.
    """
    known = {segment.label for segment in truth}
    scores = mean_average_precision(
        truth, [segment for segment in found if segment.label in known], thresholds
    )
    text = json.dumps({**scores, "dropped": left_out}, indent=1) + "\n"
    write_atomically(output / RESULTS, lambda file: file.write(text), binary=False)
    rows = [*scores["classes"].items(), ("mAP", scores["map"])]
    width = max(len(label) for label, _ in rows)
    print(f"{'tIoU':<{width}}  " + "  ".join(f"{t:>5g}" for t in thresholds) + "  average")
    for label, values in rows:
        mean = sum(values.values()) / len(values)
        print(
            f"{label:<{width}}  "
            + "  ".join(f"{100 * values[t]:5.1f}" for t in thresholds)
            + f"  {100 * mean:7.1f}"
        )
