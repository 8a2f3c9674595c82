"""`vmae.load`: a model in three lines of Python, with the results of `vmae features` and `vmae predict`.

    model = vmae.load("runs/finetuned")
    features, times = model.embed("video.mp4")
    print(model.predict("video.mp4"))

Both commands and this module call the same functions: `load_classifier`, `embed_videos`, `predict_views`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from vmae.checkpoint.classifier import LoadedClassifier, load_classifier
from vmae.config import DTYPE, ModelConfig
from vmae.data.decode import DecodeError
from vmae.data.frame_arrays import ArrayReader, check_frames, is_array, path_entry
from vmae.data.labels import read_class_names
from vmae.data.manifest import VideoEntry
from vmae.data.shards.index import is_index
from vmae.errors import InputError
from vmae.evaluate.classify import published_views
from vmae.evaluate.encoder import middle_clip, middle_of
from vmae.evaluate.features import PUBLISHED_STEPS, Video, VideoFeatures, embed_videos, window_config
from vmae.evaluate.predict import predict_views
from vmae.evaluate.views import named
from vmae.model import Classifier
from vmae.train.checks import check_backend, resolve_device

_LOG = logging.getLogger("vmae")
# Flags that errors name, and the argument of `load` that stands for each.
_ARGUMENTS = (
    "model",
    "init-frames",
    "init-size",
    "num-frames",
    "image-size",
    "sampling",
    "stride",
    "resize",
    "averaged",
    "label-map",
    "classes",
    "device",
    "dtype",
    "backend",
    "attention",
)
_FLAG = re.compile(rf"--({'|'.join(_ARGUMENTS)})\b")
One = str | os.PathLike | VideoEntry | np.ndarray | Tensor
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Prediction:
    """Classes of a video, most likely first; iterates over (name, probability).

    Attributes:
        names: of the most likely classes; their numbers where the model knows no names.
        probabilities: float64, of the same classes.
        numbers: of the same classes.
        all: float64 [K], the probabilities of all classes by number.
    """

    names: tuple[str, ...]
    probabilities: np.ndarray
    numbers: tuple[int, ...]
    all: np.ndarray

    def __iter__(self) -> Iterator[tuple[str, float]]:
        yield from zip(self.names, self.probabilities.tolist())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[str, float]:
        return self.names[place], float(self.probabilities[place])

    def __str__(self) -> str:
        """As `vmae predict` prints it."""
        return "\n".join(f"{100 * probability:6.2f} %  {name}" for name, probability in self)


class VideoModel:
    """A model that embeds videos and names their classes; `vmae.load` makes it.

    A video is a path (of a file, or of a folder of numbered images), an entry of a list or index
    (`vmae.data.read_data`), or frames in memory: uint8 [T, H, W, 3], RGB, numpy or torch; of a model of other
    channels uint8, uint16 or float32 [T, H, W, C]. A list of videos
    gives a list of results; one that cannot be decoded gives its `DecodeError` in its place, and a line on
    the log says so. A single one raises it.

    Attributes:
        loaded: see `LoadedClassifier`: path, how videos are seen, class names, what was loaded.
        device: of the model.
        dtype: "float32" or "bfloat16" (autocast).
    """

    def __init__(self, loaded: LoadedClassifier, device: torch.device, dtype: str) -> None:
        self.loaded, self.device, self.dtype = loaded, device, dtype
        loaded.model.to(device)

    @property
    def torch(self) -> Classifier:
        """The `torch.nn.Module`, in eval mode."""
        return self.loaded.model

    @property
    def config(self) -> ModelConfig:
        return self.loaded.model.config

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes by number; None where there are none."""
        return self.loaded.class_names

    @property
    def note(self) -> str:
        """What was loaded, left out, and assumed, a line each."""
        return self.loaded.note

    def __repr__(self) -> str:
        model, config = self.torch, self.config
        height, width = config.image_hw
        head = f"{model.num_classes} classes" if model.num_classes else "no head"
        return (
            f"VideoModel({str(self.loaded.path)!r}: {config.embed_dim} wide, {config.depth} blocks, "
            f"{config.num_frames} frames of {height} x {width}, {head}, {self.dtype} on {self.device})"
        )

    # A text is a sequence of texts too: the first overload takes it.
    @overload
    def embed(  # type: ignore[overload-overlap]
        self,
        videos: One,
        *,
        step: int = ...,
        normalize: bool = ...,
        fps: float | None = ...,
        batch_size: int = ...,
    ) -> VideoFeatures: ...
    @overload
    def embed(
        self,
        videos: Sequence[One],
        *,
        step: int = ...,
        normalize: bool = ...,
        fps: float | None = ...,
        batch_size: int = ...,
    ) -> list[VideoFeatures | DecodeError]: ...
    def embed(
        self,
        videos: One | Sequence[One],
        *,
        step: int = PUBLISHED_STEPS["thumos14"],
        normalize: bool = False,
        fps: float | None = None,
        batch_size: int = 8,
    ) -> VideoFeatures | list[VideoFeatures | DecodeError]:
        """Features of the windows of a video, or of each of several: those of `vmae features`.

        A window is `config.num_frames` consecutive frames, stretched to the model's size. Its features are
        the pooled ones before the head: after `fc_norm` (of a pre-trained encoder: the mean of its tokens
        after its last norm).

        Args:
            videos: see the class.
            step: frames from one window to the next.
            normalize: subtract ImageNet's mean and divide by its standard deviation, as in training. The
                published features for temporal detection do not; models from the hub expect it.
            fps: frames a second of frames in memory or in folders, for the times.
            batch_size: windows at once.

        Raises:
            InputError: a video that is none; a single one that cannot be decoded, or is shorter than a
                window; features that are no numbers.
        """
        entries, single = _entries(videos, self.config.in_channels)
        if fps is not None and not 0 < fps < float("inf"):
            raise InputError(f"fps must be frames a second above 0, not {fps}")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        config = window_config(self.torch, step=step, normalize=normalize, dtype=self.dtype)
        found: list[VideoFeatures | DecodeError] = []
        for one in embed_videos(self.torch, entries, config, batch_size=batch_size, device=self.device):
            if isinstance(one, VideoFeatures) and one.fps is None:
                one = replace(one, fps=fps)
            found.append(one)
        return _single(found[0]) if single else _several(found)

    @overload
    def predict(  # type: ignore[overload-overlap]
        self, videos: One, *, top: int | None = ..., segments: int | None = ..., crops: int | None = ...
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        videos: Sequence[One],
        *,
        top: int | None = ...,
        segments: int | None = ...,
        crops: int | None = ...,
    ) -> list[Prediction | DecodeError]: ...
    def predict(
        self,
        videos: One | Sequence[One],
        *,
        top: int | None = 5,
        segments: int | None = None,
        crops: int | None = None,
    ) -> Prediction | list[Prediction | DecodeError]:
        """The most likely classes of a video, or of each of several: those of `vmae predict`.

        Args:
            videos: see the class.
            top: classes to name; None names all.
            segments, crops: views of a video; by default the published 5 x 3, or 2 x 3 with sparse sampling.

        Raises:
            InputError: the model has no head; a video that is none; a single one that cannot be decoded;
                probabilities that are no numbers.
        """
        if not self.torch.num_classes:
            raise InputError(
                f"{self.loaded.path} has no head, so it names no classes; embed() works, and `vmae finetune "
                "--init` trains a head"
            )
        if top is not None and top < 1:
            raise InputError(f"top must be at least 1, not {top}")
        entries, single = _entries(videos, self.config.in_channels)
        views = published_views(self.loaded.clip.sampling, segments, crops)
        found = [
            one if isinstance(one, DecodeError) else self._prediction(one, top)
            for one in predict_views(self.loaded, entries, views, self.dtype)
        ]
        return _single(found[0]) if single else _several(found)

    def _prediction(self, probabilities: Tensor, top: int | None) -> Prediction:
        best = probabilities.topk(min(top or len(probabilities), len(probabilities)))
        numbers = best.indices.tolist()
        names = tuple(named(numbers, self.classes))
        return Prediction(names, best.values.numpy(), tuple(numbers), probabilities.numpy())

    def tokens(self, video: One) -> Tensor:
        """Tokens of a video's middle clip after the last block, float32 [t, h, w, D] on the CPU, as `vmae
        pca` and `vmae attention` see it: normalised, the largest centred box of the model's aspect ratio.

        Raises:
            InputError: the video is none, or cannot be decoded.
        """
        channels = self.config.in_channels
        (entry,), _ = _entries(video, channels)
        seen = self.loaded.clip
        if isinstance(entry, np.ndarray):
            clip, _ = middle_of(
                ArrayReader(entry, channels=channels), self.config, seen.stride, seen.sampling
            )
        else:
            clip, _ = middle_clip(entry, self.config, seen.stride, seen.sampling)
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"),
        ):
            tokens = self.torch.tokens(clip.to(self.device))
        return tokens[0].float().cpu().unflatten(0, self.config.grid)


def _entries(videos: Any, channels: int) -> tuple[list[Video], bool]:
    """Each video as an entry or an array, checked before any of them is read; and whether it is one alone."""
    if isinstance(videos, (str, os.PathLike, VideoEntry)) or is_array(videos):
        return [_entry(videos, "frames", channels)], True
    try:
        several = list(videos)
    except TypeError:
        raise InputError(f"{_none(videos)}; or give a list of them") from None
    if several and is_array(several[0]) and several[0].ndim == 3:
        raise InputError(
            "a list of frames: `numpy.stack(frames)` (or torch.stack) makes a video of them, uint8 "
            "[T, H, W, 3]; a list holds videos"
        )
    named = ((f"frames of video {number}", one) for number, one in enumerate(several))
    return [_entry(one, name, channels) for name, one in named], False


def _entry(video: Any, name: str, channels: int) -> Video:
    if is_array(video):
        return check_frames(video, name, channels)
    if isinstance(video, VideoEntry):
        return video
    if isinstance(video, (str, os.PathLike)):
        path = os.fspath(video)
        if is_index(path):
            raise InputError(f"{path} is an index of many videos: give `vmae.data.read_data({path!r})`")
        return path_entry(video)
    raise InputError(_none(video))


def _none(video: Any) -> str:
    return f"a video is a path, or frames as uint8 [T, H, W, 3] (numpy or torch), not {type(video).__name__}"


def _single(found: Result | DecodeError) -> Result:
    if isinstance(found, DecodeError):
        raise found
    return found


def _several(found: list[Result | DecodeError]) -> list[Result | DecodeError]:
    """`found`; the log says which videos could not be decoded."""
    broken = [one for one in found if isinstance(one, DecodeError)]
    for error in broken:
        _LOG.warning("cannot be decoded: %s", error)
    if broken:
        _LOG.warning("%d of %d videos cannot be decoded: their results are errors", len(broken), len(found))
    return found


def load(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    init_frames: int | None = None,
    init_size: int | None = None,
    num_frames: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    sampling: str | None = None,
    stride: int | None = None,
    resize: str | None = None,
    averaged: bool = False,
    label_map: str | Path | None = None,
    classes: str | Path | Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "float32",
    backend: str = "auto",
    attention: str = "auto",
) -> VideoModel:
    """A model of any checkpoint, ready to embed videos and to name their classes.

    Arguments have the names of the commands' flags. What was assumed of a file that does not say it is
    logged.

    Args:
        checkpoint: see `read_checkpoint`: a run's folder, a file of weights (ours, published), a folder of
            transformers.
        model: architecture, for files that do not say it.
        init_frames, init_size: of the clips that the weights are of, for files that do not say it.
        num_frames, image_size: of the clips to see videos with; positions are interpolated.
        sampling, stride: how to take clips of a video, "dense" or "sparse"; default: as in training.
        resize: "torch" (antialiased) or "published"; default: as in training.
        averaged: the run's averaged weights (`finetune --ema`).
        label_map: file that turns a head of more classes into one of these.
        classes: names of the classes, or a file of them, where the checkpoint has none.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1".
        dtype: "float32" or "bfloat16".
        backend, attention: see `SpeedConfig`.

    Raises:
        InputError: the checkpoint can't be read, does not tell its architecture, or does not fit it.
    """
    try:
        DTYPE.check("dtype", dtype)
        chosen = resolve_device(device)
        check_backend(backend, chosen)
        seen = dict(
            num_frames=num_frames, image_size=image_size, sampling=sampling, stride=stride, resize=resize
        )
        loaded = load_classifier(
            checkpoint,
            preset=model,
            averaged=averaged,
            label_map=None if label_map is None else str(label_map),
            source=(init_frames, init_size),
            clip={name: value for name, value in seen.items() if value is not None},
            head=False,
            backend=backend,
            attention=attention,
        )
        loaded.class_names = _class_names(loaded, classes)
    except InputError as error:
        raise type(error)(in_python(str(error))) from error
    loaded.note, loaded.assumed = in_python(loaded.note), tuple(map(in_python, loaded.assumed))
    for line in loaded.assumed:
        _LOG.warning("%s", line)
    return VideoModel(loaded, chosen, dtype)


def _class_names(
    loaded: LoadedClassifier, classes: str | Path | Sequence[str] | None
) -> tuple[str, ...] | None:
    """Names of the classes: the caller's, else the checkpoint's."""
    names = loaded.class_names
    if isinstance(classes, (str, Path)):
        names = tuple(read_class_names(str(classes)))
    elif classes is not None:
        names = tuple(classes)
    count = loaded.model.num_classes
    if names is not None and count and len(names) != count:
        raise InputError(f"{len(names)} class names for a head of {count} classes")
    return names


def in_python(text: str) -> str:
    """`text` with the arguments of `load` in place of the commands' flags."""
    return _FLAG.sub(lambda match: f"{match[1].replace('-', '_')}=", text)
