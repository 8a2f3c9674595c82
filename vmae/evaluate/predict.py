"""`python -m vmae predict VIDEO`: most likely classes of one video, by a fine-tuned classifier."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

from torch import Tensor

from vmae.checkpoint.arguments import add_model_arguments, load_from_args
from vmae.checkpoint.classifier import LoadedClassifier
from vmae.config import SpeedConfig
from vmae.data.classify_dataset import ViewConfig, ViewDataset
from vmae.data.decode import DecodeError
from vmae.data.frame_arrays import ArrayReader, path_entry
from vmae.data.guarded import is_worker
from vmae.data.manifest import VideoEntry
from vmae.data.quarantine import Failure, list_failures
from vmae.errors import InputError
from vmae.evaluate.classify import class_names_of, published_views
from vmae.evaluate.features import Video
from vmae.evaluate.views import named, view_probabilities
from vmae.flags import add_settings
from vmae.settings import CLASSES
from vmae.train.checks import check_backend, resolve_device
from vmae.train.pretrain_settings import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("video", metavar="VIDEO", help="a video file, or a folder of frames")
    add_model_arguments(parser)
    parser.add_argument("--classes", metavar="FILE", help="class names, where the checkpoint has none")
    parser.add_argument("--top", type=CLASSES, default=5, help="classes to name (5)")
    add_settings(parser, ViewConfig, "segments crops")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_settings(parser, RunConfig, "device")
    add_settings(parser, SpeedConfig, "backend attention")


def run(args: argparse.Namespace) -> None:
    """Run the command: load the classifier, classify the video, print the classes."""
    device = resolve_device(args.device)
    check_backend(args.backend, device)
    loaded = load_from_args(args, backend=args.backend, attention=args.attention)
    for line in loaded.assumed:
        print(line, file=sys.stderr)
    names = class_names_of(loaded, args)
    if names is not None and len(names) != loaded.model.num_classes:
        raise InputError(f"{len(names)} class names for a head of {loaded.model.num_classes} classes")
    views = published_views(loaded.clip.sampling, args.segments, args.crops)
    loaded.model.to(device)
    found = top_classes(loaded, args.video, views, names, args.top)
    if args.json:
        classes = [{"name": name, "probability": probability} for name, probability in found]
        print(json.dumps({"video": args.video, "classes": classes}))
        return
    for name, probability in found:
        print(f"{100 * probability:6.2f} %  {name}")


def predict_views(
    loaded: LoadedClassifier, videos: Sequence[Video], views: ViewConfig, dtype: str = "float32"
) -> Iterator[Tensor | DecodeError]:
    """Probabilities of all classes, float64 [K] on the CPU, of each video, in order: mean over its views; or
    the error of a video. A worker process decodes files ahead."""
    entries = [video for video in videos if isinstance(video, VideoEntry)]
    channels = loaded.model.config.in_channels
    dataset = ViewDataset(entries or [VideoEntry("frames")], loaded.clip, views, channels=channels)
    files = dataset.read(range(len(entries)), num_workers=0 if is_worker() else 1)
    for video in videos:
        if isinstance(video, VideoEntry):
            _, clips = next(files)
        else:
            clips = dataset.views_of(ArrayReader(video, channels=channels), VideoEntry("frames"))
        if isinstance(clips, Failure):
            yield DecodeError(list_failures([clips]))
            continue
        yield view_probabilities(
            loaded.model,
            clips,
            device=next(loaded.model.parameters()).device,
            dtype=dtype,
            multi_label=loaded.multi_label,
            batch_size=views.crops,
        )


def top_classes(
    loaded: LoadedClassifier, video: str, views: ViewConfig, names: Sequence[str] | None, count: int
) -> list[tuple[str, float]]:
    """(class name, probability) of the `count` most likely classes, most likely first; mean over the views.

    Args:
        video: path of the file, or of a folder of frames.
        names: names of all classes; None gives class numbers instead.

    Raises:
        InputError: the video cannot be decoded, or decoding takes too long.
    """
    (probabilities,) = predict_views(loaded, [path_entry(video)], views)
    if isinstance(probabilities, DecodeError):
        raise probabilities
    best = probabilities.topk(min(count, len(probabilities)))
    return list(zip(named(best.indices.tolist(), names), best.values.tolist(), strict=True))
