"""Encoders of video as teachers: any checkpoint that `read_checkpoint` reads, pre-trained or fine-tuned,
built for the student's clips."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from vmae.checkpoint.identity import model_identity
from vmae.checkpoint.models import to_model
from vmae.checkpoint.source import Source, read_checkpoint
from vmae.config import NORMED, ModelConfig
from vmae.errors import InputError
from vmae.model import Classifier
from vmae.model.attention.choice import choose
from vmae.model.attention.probes import Workload
from vmae.model.cost import classifier_macs
from vmae.targets.frozen import FrozenEncoder, fitted, nearest, wanted_layers
from vmae.targets.settings import TargetConfig, Wanted

# What a checkpoint's messages call by the flags of a command that has one.
_FLAGS = {"--model": "--teacher-model", "--init-": "--teacher-init-"}


class VideoEncoder(FrozenEncoder):
    """The encoder of a checkpoint.

    Args:
        wanted: settings of the target, and the student.

    Raises:
        InputError: it cannot be read, does not say what it is, holds no encoder, or lacks a layer.
    """

    def __init__(self, wanted: Wanted) -> None:
        settings, student = wanted.settings, wanted.model
        source, own = _read(settings)
        self.path = str(source.path)
        if own.in_channels != student.in_channels:
            raise InputError(
                f"the teacher {self.path} takes clips of {own.in_channels} channels, the student of "
                f"{student.in_channels}"
            )
        self.notes = [_of_teacher(line) for line in source.lines]
        tubelet, patch = own.tubelet_size, own.patch_size
        size = settings.teacher_size
        if size is None:
            size = (nearest(student.image_hw[0], patch), nearest(student.image_hw[1], patch))
        changes = {"num_frames": nearest(student.num_frames, tubelet), "img_size": size}
        self.attention, backend = settings.teacher_attention, wanted.speed.backend
        with _about_teacher():
            model, _ = to_model(source, "encoder", changes, backend=backend, attention=self.attention)
        model.fc_norm = model.pool = None
        self._note(source, model, wanted)
        self.identity = model_identity(model)
        numbers = wanted_layers(settings, model.config.depth, self.path)
        self.numbers = numbers or [model.config.depth]
        self.ends = not numbers
        model.blocks = model.blocks[: self.numbers[-1]]
        self.module: Classifier = model
        self.width, self.grid = model.config.embed_dim, model.config.grid
        self.macs = classifier_macs(model.config.replace(depth=self.numbers[-1]), 0)

    def _note(self, source: Source, model: Classifier, wanted: Wanted) -> None:
        config, student = model.config, wanted.model
        given, sees = ((one.num_frames, *one.image_hw) for one in (student, config))
        if given != sees:
            self.notes.append(
                f"{self.path}: sees clips of {_by(given)} as {_by(sees)} (frames, height, width)"
            )
        if source.grid != config.grid:
            self.notes.append(
                f"{self.path}: positions interpolated from {_by(source.grid)} tokens to {_by(config.grid)}"
            )
        if wanted.settings.teacher_layers == "last" and model.pooling not in (NORMED, "first"):
            self.notes.append(
                f"{self.path}: fine-tuned, with its last norm on the mean over tokens: latents are before it"
            )

    def layers(self, clips: Tensor) -> Iterator[Tensor]:
        clips = fitted(clips, self.module.config)
        for number, tokens in enumerate(self.module.layer_tokens(clips), 1):
            if number in self.numbers:
                yield self.module.norm(tokens) if self.ends else tokens

    def check_device(self, device: torch.device, dtype: torch.dtype) -> None:
        config = self.module.config
        if self.attention != "auto":
            head_dim = config.embed_dim // config.num_heads
            choose(self.attention, Workload.on(device, dtype=dtype, head_dim=head_dim))


@contextlib.contextmanager
def _about_teacher() -> Iterator[None]:
    """Messages on a checkpoint, as those on the teacher's."""
    try:
        yield
    except InputError as error:
        raise InputError(f"--teacher: {_of_teacher(str(error))}") from None


def _read(settings: TargetConfig) -> tuple[Source, ModelConfig]:
    """The checkpoint, and the architecture that it is of."""
    with _about_teacher():
        source = read_checkpoint(
            settings.teacher or "",
            preset=settings.teacher_model,
            frames=settings.teacher_init_frames,
            size=settings.teacher_init_size,
        )
    if not any(name.endswith("patch_embed.proj.weight") for name in source.state):
        some = ", ".join(sorted(source.state)[:3])
        raise InputError(
            f"--teacher {source.path} holds no encoder: it has {some} and no patch_embed.proj.weight; give a "
            "pre-trained or fine-tuned model"
        )
    with _about_teacher():
        return source, source.config


def _of_teacher(text: str) -> str:
    """A message with the teacher's flags in place of those of other commands."""
    for old, new in _FLAGS.items():
        text = text.replace(f" {old}", f" {new}").replace(f"({old}", f"({new}")
    return text


def _by(numbers: tuple[int, ...]) -> str:
    return " x ".join(map(str, numbers))
