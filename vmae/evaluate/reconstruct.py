"""`python -m vmae reconstruct VIDEO`: one picture of what a checkpoint makes of a video, and its loss.

Legend: T frames, H x W pixels, N tokens, P values of a tubelet in order (t, h, w, c).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vmae.config import MaskConfig, ModelConfig
from vmae.data import CropBox, crop_and_resize, open_video
from vmae.data.sampling import clip_starts, walk_frames
from vmae.errors import InputError
from vmae.interop.upstream import load_into, read_settings_and_weights
from vmae.masking import DualMask
from vmae.model import Pretrainer, build_pretrainer
from vmae.train.checkpoint import find_weights, write_atomically
from vmae.train.checks import check_output, resolve_device
from vmae.train.metrics import trivial_losses
from vmae_kernels import gather_tubelets, patch_targets_ref

GREY = 128
DEVIATIONS = 3.0  # normalised values from -3 to 3 span black to white
SMALLEST_FRAME = 128  # pixels of a drawn frame's shorter side; smaller frames are enlarged without smoothing
CAPTION_HEIGHT, MARGIN = 22, 4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the picture.

    Attributes:
        caption: the words above it.
        frames: uint8 [T, H, W, 3].
        outlined: bool [N] of tubelets to mark, or None.
    """

    caption: str
    frames: np.ndarray
    outlined: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What a model makes of one clip.

    Attributes:
        rows: of the picture, from input to target.
        loss: of the clip under this mask.
        zero_loss, visible_mean_loss: of the trivial predictors.
    """

    rows: list[Row]
    loss: float
    zero_loss: float
    visible_mean_loss: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("video", metavar="VIDEO", help="a video file")
    parser.add_argument("--checkpoint", required=True, metavar="DIR|FILE", help="a run's folder, a checkpoint, or weights")
    parser.add_argument(
        "--output", metavar="FILE.png", help="the picture (default: reconstruct-VIDEO.png beside the checkpoint)"
    )
    parser.add_argument("--frames", type=int, default=8, help="columns: tubelets shown, spread over the clip (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the mask (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    parser.add_argument("--attention", default="auto", help="attention: auto, or a name that `vmae doctor` lists (auto)")
    mask = parser.add_argument_group("mask and sampling (default: as in training)")
    mask.add_argument("--encoder-mask", help="tube, random, frame")
    mask.add_argument("--encoder-ratio", type=float)
    mask.add_argument("--decoder-mask", help="running_cell, random, frame, none")
    mask.add_argument("--decoder-ratio", type=float)
    mask.add_argument("--stride", type=int, help="frames from one sampled frame to the next")
    model = parser.add_argument_group("for weights that do not say what they are (official files)")
    model.add_argument("--model", help="preset: vit_s, vit_b, vit_l, vit_h, vit_g, vit_tiny")
    model.add_argument("--decoder-depth", type=int, help="blocks of the decoder, if not the preset's")


def run(args: argparse.Namespace) -> None:
    """The command: load, sample, predict, draw, and say where the picture is."""
    if args.frames < 1 or args.seed < 0:
        raise InputError("--frames must be at least 1 and --seed at least 0")
    device = resolve_device(args.device)
    path = find_weights(args.checkpoint)
    output = Path(args.output) if args.output else path.parent / f"reconstruct-{Path(args.video).stem}.png"
    check_picture(output)
    model, settings = load_model(path, preset=args.model, decoder_depth=args.decoder_depth, attention=args.attention)
    mask_settings = mask_config(settings, args)
    stride = args.stride or settings.get("stride", 4)
    clip, indices = middle_clip(args.video, model.config, stride)
    mask = DualMask.sample(1, model.config.grid, **mask_settings.to_dict(), generator=torch.Generator().manual_seed(args.seed))
    result = reconstruct(model.to(device), clip.to(device), mask.to(device))
    draw(result.rows, model.config, output, frame_numbers=indices, columns=args.frames)
    print(
        f"loss {result.loss:.4f}; zero predictor {result.zero_loss:.4f}, "
        f"mean of the visible tubelets {result.visible_mean_loss:.4f}"
    )
    print(f"picture: {output}")


def check_picture(path: Path) -> None:
    """Raises InputError unless a PNG can be written to `path`; nothing is."""
    if path.suffix.lower() != ".png":
        raise InputError(f"output {path}: the picture is a PNG; give a name that ends with .png")
    if path.is_dir():
        raise InputError(f"output {path} is a folder")
    check_output(path.parent)


def load_model(
    path: Path, *, preset: str | None = None, decoder_depth: int | None = None, attention: str = "auto"
) -> tuple[Pretrainer, dict[str, Any]]:
    """The model of a checkpoint, in eval mode on the CPU, and the settings it was trained with (empty if it holds none).

    Args:
        preset, decoder_depth: the architecture, for files that do not hold it.

    Raises:
        InputError: the file can't be read, does not tell its architecture, or does not fit it.
    """
    settings, state = read_settings_and_weights(path)
    if settings:
        config = ModelConfig.from_dict(settings["model"])
    elif preset is not None:
        overrides = {} if decoder_depth is None else {"decoder_depth": decoder_depth}
        config = ModelConfig.preset(preset, **overrides)
    else:
        raise InputError(f"{path} does not say which architecture it is of; name it with --model")
    model = build_pretrainer(config, attention=attention, normalize_target=settings.get("normalize_target", True))
    load_into(model, state, path)
    return model.eval(), settings


def mask_config(settings: dict[str, Any], args: argparse.Namespace) -> MaskConfig:
    """The mask of training, with what the command line says on top."""
    chosen = dict(
        encoder=args.encoder_mask,
        encoder_ratio=args.encoder_ratio,
        decoder=args.decoder_mask,
        decoder_ratio=args.decoder_ratio,
    )
    return MaskConfig.from_dict({**settings.get("mask", {}), **{k: v for k, v in chosen.items() if v is not None}})


def middle_clip(video: str | Path, config: ModelConfig, stride: int) -> tuple[Tensor, list[int]]:
    """The clip from the middle of a video: published sampling, the largest centred crop of the model's shape.

    Returns:
        uint8 [1, T, H, W, 3], and the T frame numbers.

    Raises:
        InputError: the video can't be decoded, or the stride is below 1.
    """
    with open_video(video) as reader:
        starts = clip_starts(len(reader), config.num_frames, stride)
        indices = walk_frames(starts[len(starts) // 2], len(reader), config.num_frames, stride)
        frames = reader.frames(indices)
    (height, width), (frame_height, frame_width) = config.image_hw, frames.shape[1:3]
    scale = min(frame_height / height, frame_width / width)
    box_width, box_height = max(round(width * scale), 1), max(round(height * scale), 1)
    box = CropBox((frame_width - box_width) // 2, (frame_height - box_height) // 2, box_width, box_height)
    return torch.from_numpy(crop_and_resize(frames, box, config.image_hw))[None], indices.tolist()


@torch.no_grad()
def reconstruct(model: Pretrainer, clip: Tensor, mask: DualMask) -> Reconstruction:
    """Predict every hidden tubelet of a clip: the picked ones, then, in a second pass, those that were not picked.

    Args:
        model: in eval mode.
        clip: uint8 [1, T, H, W, 3], on the model's device.
        mask: of this clip, there too.
    """
    config = model.config
    tokens = torch.arange(config.num_tokens, dtype=torch.int32, device=clip.device)[None]
    size = (config.patch_size, config.tubelet_size)
    target_NP = patch_targets_ref(clip, tokens, *size, model.normalize_target)[0]
    visible, picked = (~masked[0] for masked in mask.to_bool())
    predicted_NP = torch.zeros_like(target_NP)
    rest = ~(visible | picked)
    for selection in (rest, picked):
        if selection.any():
            chosen = DualMask.from_bool(~visible[None], ~selection[None]).to(clip.device)
            predicted_NP[selection] = model.predict(clip, chosen)[0].float()
    trivial = trivial_losses(clip, mask, config, model.normalize_target)
    rows = _rows(model, clip, visible=visible, picked=picked, predicted_NP=predicted_NP, target_NP=target_NP)
    loss = model(clip, mask).item()
    return Reconstruction(rows=rows, loss=loss, zero_loss=trivial["zero"], visible_mean_loss=trivial["visible_mean"])


def _rows(
    model: Pretrainer, clip: Tensor, *, visible: Tensor, picked: Tensor, predicted_NP: Tensor, target_NP: Tensor
) -> list[Row]:
    config = model.config
    tokens = torch.arange(config.num_tokens, dtype=torch.int32, device=clip.device)[None]
    pixels_NP = gather_tubelets(clip, tokens, config.patch_size, config.tubelet_size)[0].flatten(1).float()

    def row(caption: str, values_NP: Tensor, shown: Tensor | None = None, outlined: bool = False) -> Row:
        values_NP = values_NP if shown is None else torch.where(shown[:, None], values_NP, float(GREY))
        frames = assemble_frames(values_NP.clamp(0, 255).round().byte(), config).cpu().numpy()
        return Row(caption=caption, frames=frames, outlined=visible.cpu().numpy() if outlined else None)

    passes = "" if bool((picked | visible).all()) else "; tubelets that were not picked: a second pass"
    rows = [
        row("input", pixels_NP),
        row("encoder view (hidden tubelets grey)", pixels_NP, visible),
        row("decoder selection (picked tubelets shown, others grey; outlined: seen by the encoder)", pixels_NP, picked, True),
    ]
    if not model.normalize_target:
        rebuilt_NP = torch.where(visible[:, None], pixels_NP, 255 * predicted_NP)
        return [*rows, row(f"reconstruction (predicted pixels; outlined: the input{passes})", rebuilt_NP, None, True)]
    unit = (pixels_NP / 255).unflatten(1, (-1, 3))
    variance, mean = torch.var_mean(unit, dim=1, unbiased=True, keepdim=True)
    rebuilt = predicted_NP.unflatten(1, (-1, 3)) * (variance.sqrt() + 1e-6) + mean
    rebuilt_NP = torch.where(visible[:, None], pixels_NP, 255 * rebuilt.flatten(1))
    return [
        *rows,
        row(f"reconstruction (with the input's patch mean and variance; outlined: the input{passes})", rebuilt_NP, None, True),
        row(
            f"prediction, normalised space (grey is 0, black and white are -/+{DEVIATIONS:g})", _shades(predicted_NP), ~visible
        ),
        row("target, normalised space (what the prediction should be)", _shades(target_NP), ~visible),
    ]


def _shades(values: Tensor) -> Tensor:
    return GREY + values * (127 / DEVIATIONS)


def assemble_frames(tubelets_NP: Tensor, config: ModelConfig) -> Tensor:
    """Tubelets [N, P], order (t, h, w, c), put in their places: [T, H, W, 3] in the same dtype."""
    frames, rows, columns = config.grid
    depth, side = config.tubelet_size, config.patch_size
    split = tubelets_NP.view(frames, rows, columns, depth, side, side, 3).permute(0, 3, 1, 4, 2, 5, 6)
    return split.reshape(frames * depth, rows * side, columns * side, 3)


def draw(rows: list[Row], config: ModelConfig, path: Path, *, frame_numbers: list[int], columns: int = 8) -> None:
    """Write the picture: a row of frames below each caption, one column for each of up to `columns` tubelets.

    Raises:
        InputError: the file can't be written.
    """
    tubelets = np.unique(np.linspace(0, config.grid[0] - 1, min(columns, config.grid[0])).round().astype(int))
    height, width = config.image_hw
    scale = max(1, -(-SMALLEST_FRAME // min(height, width)))
    cell_width, cell_height = width * scale + MARGIN, height * scale + MARGIN + CAPTION_HEIGHT
    font = _font(14)
    narrowest = round(max(font.getlength(row.caption) for row in rows)) + 2 * MARGIN
    size = (max(len(tubelets) * cell_width + MARGIN, narrowest), CAPTION_HEIGHT + len(rows) * cell_height + MARGIN)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for column, tubelet in enumerate(tubelets):
        number = frame_numbers[tubelet * config.tubelet_size]
        pen.text((MARGIN + column * cell_width, MARGIN), f"frame {number}", fill="black", font=font)
    for place, row in enumerate(rows):
        top = CAPTION_HEIGHT + place * cell_height
        pen.text((MARGIN, top + MARGIN), row.caption, fill="black", font=font)
        for column, tubelet in enumerate(tubelets):
            corner = (MARGIN + column * cell_width, top + CAPTION_HEIGHT)
            frame = Image.fromarray(row.frames[tubelet * config.tubelet_size])
            picture.paste(frame.resize((width * scale, height * scale), Image.Resampling.NEAREST), corner)
            if row.outlined is not None:
                _outline(pen, row.outlined.reshape(config.grid)[tubelet], corner, config.patch_size * scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


def _outline(pen: ImageDraw.ImageDraw, marked: np.ndarray, corner: tuple[int, int], side: int) -> None:
    """White outside black: seen on any background, in grey too."""
    for row, column in zip(*marked.nonzero()):
        left, top = corner[0] + int(column) * side, corner[1] + int(row) * side
        pen.rectangle((left, top, left + side - 1, top + side - 1), outline="white")
        pen.rectangle((left + 1, top + 1, left + side - 2, top + side - 2), outline="black")


def _font(size: int):
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):  # Pillow before 10.1, or without FreeType: its small bitmap font
        return ImageFont.load_default()
