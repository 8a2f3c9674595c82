"""`python -m vmae reconstruct VIDEO...`: what a checkpoint makes of videos, as a picture or an animation, and
its loss.

Legend: T frames, H x W pixels, N tokens, P values of a tubelet in order (t, h, w, c).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae.checkpoint.arguments import add_source_arguments
from vmae.checkpoint.folder import folder_beside
from vmae.checkpoint.models import to_model
from vmae.checkpoint.source import read_checkpoint
from vmae.config import MaskConfig, ModelConfig, SpeedConfig
from vmae.evaluate.encoder import middle_clip
from vmae.evaluate.pictures import GREY, Panel, add_output_arguments, outputs_of, write_pictures
from vmae.flags import add_settings
from vmae.masking import DualMask
from vmae.model import Pretrainer
from vmae.settings import SEED
from vmae.train.checks import resolve_device
from vmae.train.metrics import trivial_losses
from vmae.train.pretrain_settings import PretrainConfig, RunConfig
from vmae_kernels import gather_tubelets, patch_targets_ref

DEVIATIONS = 3.0  # normalised values from -3 to 3 span black to white
WHITE_ERROR = 64  # grey levels of an error that is drawn white
ROW = (0, 1, 3)  # panels of each video in a picture of several: input, encoder view, reconstruction


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What a model makes of one clip.

    Attributes:
        panels: of the picture, from input to target.
        loss: of the clip under this mask.
        zero_loss, visible_mean_loss: of the trivial predictors.
    """

    panels: list[Panel]
    loss: float
    zero_loss: float
    visible_mean_loss: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument(
        "videos", metavar="VIDEO", nargs="+", help="a video file; several share a picture, a row for each"
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR|FILE", help="a run's folder, a checkpoint, or weights"
    )
    add_output_arguments(parser, "reconstruct-VIDEO.png beside the checkpoint")
    parser.add_argument("--title", default="", help="words above the picture")
    parser.add_argument("--seed", type=SEED, default=0, help="of the mask (0)")
    add_settings(parser, RunConfig, "device")
    add_settings(parser, SpeedConfig, "attention")
    mask = parser.add_argument_group("mask and sampling (default: as in training)")
    add_settings(mask, MaskConfig, "encoder encoder_ratio decoder decoder_ratio", unset="as in training")
    add_settings(mask, PretrainConfig, "stride", unset="as in training")
    model = add_source_arguments(parser)
    add_settings(model, ModelConfig, "decoder_depth")


def run(args: argparse.Namespace) -> None:
    """The command: load, sample, predict, draw, and say where the picture is."""
    device = resolve_device(args.device)
    outputs = outputs_of(
        args, folder_beside(args.checkpoint) / f"reconstruct-{Path(args.videos[0]).stem}.png"
    )
    source = (args.init_frames, args.init_size)
    given = {
        "preset": args.model,
        "decoder_depth": args.decoder_depth,
        "source": source,
        "attention": args.attention,
    }
    model, settings = load_model(args.checkpoint, **given)
    mask_settings = mask_config(settings, args)
    stride = settings.get("stride", 4) if args.stride is None else args.stride
    mask = DualMask.sample(
        1, model.config.grid, **mask_settings.to_dict(), generator=torch.Generator().manual_seed(args.seed)
    )
    model, several = model.to(device), len(args.videos) > 1
    panels: list[Panel] = []
    for video in args.videos:
        clip, indices = middle_clip(video, model.config, stride)
        result = reconstruct(model, clip.to(device), mask.to(device))
        print(
            (f"{Path(video).stem}: " if several else "") + f"loss {result.loss:.4f}; "
            f"zero predictor {result.zero_loss:.4f}, "
            f"mean of the visible tubelets {result.visible_mean_loss:.4f}"
        )
        panels += _row(Path(video).stem, result.panels, indices, not panels) if several else result.panels
    mask_line = f"Mask: {mask_settings.encoder}, {mask_settings.encoder_ratio:.0%} of each clip hidden"
    write_pictures(
        panels,
        outputs,
        labels=[
            f"moment {number + 1}" if several else f"frame {indices[number]}"
            for number in range(len(indices))
        ],
        columns=args.frames,
        step=model.config.tubelet_size,
        fps=args.fps,
        abreast=len(ROW) if several else None,
        title=". ".join(filter(None, [args.title, mask_line if several else ""])),
    )
    print(f"written: {', '.join(map(str, outputs))}")


def _row(name: str, panels: list[Panel], indices: list[int], first: bool) -> list[Panel]:
    """A video's panels in a picture of several; what stands in brackets is told in the first row only."""
    chosen = [panels[place] for place in ROW]
    captions = [panel.caption if first else panel.caption.split(" (")[0] for panel in chosen]
    captions[0] = f"{name}, frames {indices[0]} to {indices[-1]}: {captions[0]}"
    return [replace(panel, caption=caption) for panel, caption in zip(chosen, captions)]


def load_model(
    path: str | Path,
    *,
    preset: str | None = None,
    decoder_depth: int | None = None,
    source: tuple[int | None, int | None] = (None, None),
    attention: str = "auto",
) -> tuple[Pretrainer, dict[str, Any]]:
    """The model of a checkpoint, in eval mode on the CPU, and the settings it was trained with (empty if it
    holds none).

    Prints what was assumed of a file that does not say it.

    Args:
        preset, decoder_depth: the architecture, for files that do not say it.
        source: frames and side of the clips that the weights are of, for files that do not say it.

    Raises:
        InputError: the file can't be read, does not tell its architecture, or does not fit it.
    """
    overrides: dict[str, Any] = {} if decoder_depth is None else {"decoder_depth": decoder_depth}
    read = read_checkpoint(path, preset=preset, frames=source[0], size=source[1], **overrides)
    read.config.check_rgb("a picture of a reconstruction")
    model, _ = to_model(read, "pretrainer", attention=attention)
    for line in read.lines:
        print(line, flush=True)
    return model, read.settings


def mask_config(settings: dict[str, Any], args: argparse.Namespace) -> MaskConfig:
    """The mask of training, with what the command line says on top."""
    chosen = dict(
        encoder=args.encoder_mask,
        encoder_ratio=args.encoder_ratio,
        decoder=args.decoder_mask,
        decoder_ratio=args.decoder_ratio,
    )
    return MaskConfig.from_dict(
        {**settings.get("mask", {}), **{k: v for k, v in chosen.items() if v is not None}}
    )


@torch.no_grad()
def reconstruct(model: Pretrainer, clip: Tensor, mask: DualMask) -> Reconstruction:
    """Predict every hidden tubelet of a clip: those that the mask decodes, and, in a second pass, the others.

    Args:
        model: in eval mode.
        clip: uint8 [1, T, H, W, 3], on the model's device.
        mask: of this clip, there too.
    """
    config = model.config
    tokens = torch.arange(config.num_tokens, dtype=torch.int32, device=clip.device)[None]
    size = (config.patch_size, config.tubelet_size)
    target_NP = patch_targets_ref(clip, tokens, *size, model.normalize_target)[0]
    visible, decoded = (~masked[0] for masked in mask.to_bool())
    predicted_NP = torch.zeros_like(target_NP)
    rest = ~(visible | decoded)
    for selection in (rest, decoded):
        if selection.any():
            chosen = DualMask.from_bool(~visible[None], ~selection[None]).to(clip.device)
            predicted_NP[selection] = model.predict(clip, chosen)[0].float()
    trivial = trivial_losses(clip, mask, config, model.normalize_target)
    panels = _panels(
        model, clip, visible=visible, decoded=decoded, predicted_NP=predicted_NP, target_NP=target_NP
    )
    loss = model(clip, mask).item()
    return Reconstruction(
        panels=panels,
        loss=loss,
        zero_loss=trivial["zero"],
        visible_mean_loss=trivial["mean of the visible tubelets"],
    )


def _panels(
    model: Pretrainer,
    clip: Tensor,
    *,
    visible: Tensor,
    decoded: Tensor,
    predicted_NP: Tensor,
    target_NP: Tensor,
) -> list[Panel]:
    config = model.config
    tokens = torch.arange(config.num_tokens, dtype=torch.int32, device=clip.device)[None]
    pixels_NP = gather_tubelets(clip, tokens, config.patch_size, config.tubelet_size)[0].flatten(1).float()
    seen = visible.reshape(config.grid).cpu().numpy()

    def panel(caption: str, values_NP: Tensor, shown: Tensor | None = None, outlined: bool = False) -> Panel:
        values_NP = values_NP if shown is None else torch.where(shown[:, None], values_NP, float(GREY))
        frames = assemble_frames(values_NP.clamp(0, 255).round().byte(), config).cpu().numpy()
        return Panel(caption=caption, frames=frames, outlined=seen if outlined else None)

    def error(caption: str, difference_NP: Tensor, white: float) -> Panel:
        """Mean over the channels, as brightness; tubelets that were not predicted have none."""
        grey = difference_NP.abs().unflatten(1, (-1, 3)).mean(2, keepdim=True).expand(-1, -1, 3).flatten(1)
        return panel(caption, torch.where(visible[:, None], 0.0, 255 / white * grey), None, True)

    whole = bool((decoded | visible).all())
    passes = "" if whole else "; tubelets that the mask does not decode: a second pass"
    borrowed = " (with the input's statistics)" if model.normalize_target else ""
    pixel_error = (
        f"error in pixels (reconstruction{borrowed} minus input; black: none, white: {WHITE_ERROR} of 255 or "
        "more; outlined: not predicted)"
    )
    panels = [
        panel("input", pixels_NP),
        panel("encoder view (hidden tubelets grey)", pixels_NP, visible),
        panel(
            "decoded tubelets (others grey; outlined: visible to the encoder)",
            pixels_NP,
            decoded,
            True,
        ),
    ]
    if not model.normalize_target:
        caption, rebuilt_NP = "predicted pixels", 255 * predicted_NP
    else:
        unit = (pixels_NP / 255).unflatten(1, (-1, 3))
        variance, mean = torch.var_mean(unit, dim=1, unbiased=True, keepdim=True)
        rebuilt = predicted_NP.unflatten(1, (-1, 3)) * (variance.sqrt() + 1e-6) + mean
        caption, rebuilt_NP = "with the input's patch mean and variance", 255 * rebuilt.flatten(1)
    rebuilt_NP = torch.where(visible[:, None], pixels_NP, rebuilt_NP.clamp(0, 255))
    panels.append(panel(f"reconstruction ({caption}; visible tubelets: the input{passes})", rebuilt_NP))
    panels.append(error(pixel_error, rebuilt_NP - pixels_NP, WHITE_ERROR))
    if not model.normalize_target:
        return panels
    return [
        *panels,
        panel(
            f"prediction, normalised space (grey is 0, black and white are -/+{DEVIATIONS:g})",
            _shades(predicted_NP),
            ~visible,
        ),
        panel("target, normalised space (what the prediction should be)", _shades(target_NP), ~visible),
        error(
            f"error, normalised space (prediction minus target; black: none, white: {DEVIATIONS:g} or more; "
            "outlined: not predicted)",
            predicted_NP - target_NP,
            DEVIATIONS,
        ),
    ]


def _shades(values: Tensor) -> Tensor:
    return GREY + values * (127 / DEVIATIONS)


def assemble_frames(tubelets_NP: Tensor, config: ModelConfig) -> Tensor:
    """Tubelets [N, P], order (t, h, w, c), put in their places: [T, H, W, 3] in the same dtype."""
    frames, rows, columns = config.grid
    depth, side = config.tubelet_size, config.patch_size
    split = tubelets_NP.view(frames, rows, columns, depth, side, side, 3).permute(0, 3, 1, 4, 2, 5, 6)
    return split.reshape(frames * depth, rows * side, columns * side, 3)
