"""Encoders of images as teachers (CLIP, SigLIP, DINOv2, DINOv3, ViT): a folder of the Hugging Face hub,
through transformers' `AutoModel`, frame by frame.

Legend: B clips, T frames, F images, h x w patches, N = h w tokens, C the teacher's width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmae.checkpoint.hub import fetch
from vmae.checkpoint.hub_folder import is_v2, read_object
from vmae.checkpoint.hub_names import CONFIG, PROCESSOR, is_hub_name
from vmae.checkpoint.identity import fingerprint
from vmae.config import IMAGENET_MEAN, IMAGENET_STD
from vmae.errors import InputError
from vmae.model.cost import count_macs
from vmae.targets.frozen import FrozenEncoder, frames_of, nearest, resized, wanted_layers
from vmae.targets.hub_vision import blocks_of, load_vision, side_of, whole
from vmae.targets.settings import Wanted

# `--teacher-attention` in transformers' words; None leaves the choice to it.
_ATTENTION = {"auto": None, "sdpa": "sdpa", "softmax": "eager", "flash2": "flash_attention_2"}


def find_image_model(checkpoint: str) -> Path | None:
    """The folder of a model of transformers that is no VideoMAE; None where it is something else."""
    folder = Path(checkpoint)
    if is_hub_name(checkpoint):
        folder = fetch(checkpoint, any_kind=True)
    if not (folder / CONFIG).is_file():
        return None
    values = read_object(folder / CONFIG)
    ours = is_v2(values) or str(values.get("model_type", "videomae")).lower().startswith("videomae")
    return None if ours else folder


class ImageEncoder(FrozenEncoder):
    """A model of images, with its own size and statistics; class and register tokens are dropped.

    Args:
        wanted: settings of the target, and the student.
        folder: of `find_image_model`.

    Raises:
        InputError: transformers is missing or cannot read it, it takes no images, or gives no patch tokens.
    """

    def __init__(self, wanted: Wanted, folder: Path) -> None:
        settings, student = wanted.settings, wanted.model
        self.path, self.notes = str(folder), []
        if not student.has_imagenet_pixels:
            raise InputError(
                f"--teacher {folder} is of RGB images: no --in-channels, --channel-mean and --channel-std"
            )
        self.student = student
        if settings.teacher_attention not in _ATTENTION:
            raise InputError(
                f"--teacher-attention {settings.teacher_attention}: a model of transformers has "
                f"{', '.join(_ATTENTION)}"
            )
        vision = load_vision(folder, _ATTENTION[settings.teacher_attention])
        self.kind, self.module = type(vision).__name__, vision
        self.patch = whole(getattr(vision.config, "patch_size", None))
        if self.patch is None:
            raise self._no_tokens(f"a {self.kind} has no patches")
        self._read_processor(folder, wanted)
        steps = student.num_frames // student.tubelet_size
        self.depth, self.mean_of = student.tubelet_size, settings.teacher_frames == "mean"
        self.grid = (steps, self.size[0] // self.patch, self.size[1] // self.patch)
        blocks = blocks_of(vision)
        numbers = wanted_layers(settings, len(blocks), self.path)
        self.identity = {"weights": fingerprint(vision), "model": self._described()}
        self.ends = not numbers
        self.kept: list[Tensor] = []
        for number in numbers:
            blocks[number - 1].register_forward_hook(self._keep)
        del blocks[numbers[-1] if numbers else len(blocks) :]
        self._probe()
        self.macs *= student.num_frames if self.mean_of else steps
        seen = f"the mean over a tubelet's {self.depth} frames" if self.mean_of else "of a tubelet the first"
        self.notes.append(
            f"{self.path}: a {self.kind} of images, sees frames of {self.size[0]} x {self.size[1]}, {seen}"
        )

    def _described(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": list(self.size), "mean": self.mean, "std": self.std}

    def _read_processor(self, folder: Path, wanted: Wanted) -> None:
        """Its size and its statistics."""
        file = folder / PROCESSOR
        values = read_object(file) if file.is_file() else {}
        self.mean = list(values.get("image_mean") or IMAGENET_MEAN)
        self.std = list(values.get("image_std") or IMAGENET_STD)
        if "image_mean" not in values:
            self.notes.append(f"{folder}: no {PROCESSOR} says its mean and deviation, taken as ImageNet's")
        own = side_of(values.get("crop_size")) or side_of(values.get("size"))
        own = own or whole(getattr(self.module.config, "image_size", None)) or min(wanted.model.image_hw)
        height, width = wanted.model.image_hw
        given, least, patch = wanted.settings.teacher_size, min(height, width), self.patch or 1
        if given is None:
            self.size = (nearest(own * height // least, patch), nearest(own * width // least, patch))
            return
        self.size = (given, given) if isinstance(given, int) else given
        if self.size[0] % patch or self.size[1] % patch:
            raise InputError(
                f"--teacher-size {' x '.join(map(str, self.size))}: the teacher's patches of {patch} do not "
                "divide it"
            )

    def _probe(self) -> None:
        """Run one image: how many tokens come before the patches, the width, the cost."""
        image, found = torch.zeros(1, 3, *self.size), []
        patches, own = self.grid[1] * self.grid[2], whole(getattr(self.module.config, "image_size", None))
        takes = "interpolate_pos_encoding" in inspect.signature(self.module.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if takes and self.size != (own, own) else {}
        self.prefix = 0
        try:
            with torch.no_grad():
                self.macs = count_macs(lambda: found.extend(self._of_images(image)))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise self._no_tokens(
                f"a {self.kind} does not run on {self.size[0]} x {self.size[1]}: {reason}"
            ) from None
        tokens = found[0]
        before = tokens.shape[1] - patches if tokens.ndim == 3 else -1
        if not 0 <= before <= 2 + (getattr(self.module.config, "num_register_tokens", 0) or 0):
            raise self._no_tokens(
                f"a {self.kind} gives {list(tokens.shape[1:])} for an image of {patches} patches"
            )
        self.prefix, self.width = before, tokens.shape[2]

    def _no_tokens(self, why: str) -> InputError:
        return InputError(
            f"--teacher {self.path} gives no patch tokens to learn: {why}; take an image encoder with "
            "patches (CLIP, SigLIP, DINOv2, DINOv3, ViT)"
        )

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.kept.append(output if isinstance(output, Tensor) else output[0])

    def _of_images(self, images: Tensor) -> list[Tensor]:
        """Latents [F, N, C] of each layer that is wanted."""
        self.kept.clear()
        end = self.module(pixel_values=images, **self.options).last_hidden_state
        found = [end] if self.ends else list(self.kept)
        self.kept.clear()
        return [tokens[:, self.prefix :] for tokens in found]

    def layers(self, clips: Tensor) -> Iterator[Tensor]:
        frames = frames_of(clips if self.mean_of else _firsts(clips, self.depth), self.student)
        images = resized(frames.flatten(0, 1), self.size)
        mean, std = (images.new_tensor(of).view(3, 1, 1) for of in (self.mean, self.std))
        for tokens in self._of_images((images - mean) / std):
            tokens = tokens.unflatten(0, (len(clips), -1))  # [B, T, N, C]
            if self.mean_of:
                tokens = tokens.float().unflatten(1, (-1, self.depth)).mean(2)
            yield tokens.flatten(1, 2)

    def check_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """transformers has checked the attention that was named."""


def _firsts(clips: Tensor, depth: int) -> Tensor:
    """The first frame of each tubelet."""
    return clips[:, ::depth] if clips.dtype == torch.uint8 else clips[:, :, ::depth]
