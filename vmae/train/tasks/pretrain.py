"""`python -m vmae pretrain`: dual-masked pre-training on a list of videos (VideoMAE V2, 3.2 and 4)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vmae.checkpoint.models import start_pretrainer
from vmae.checkpoint.source import read_checkpoint
from vmae.data import Batch, PretrainDataset, check_decodable, describe_data, read_data
from vmae.data.loaders import check_loader
from vmae.masking import DualMask
from vmae.model import Pretrainer, build_pretrainer
from vmae.model.cost import masked_macs
from vmae.model.target import Pixels, Target
from vmae.targets.building import build_target
from vmae.targets.settings import Wanted
from vmae.train.checks import check_mask
from vmae.train.dry_run import find_absent, show_settings, tell_absent
from vmae.train.metrics import trivial_losses
from vmae.train.pretrain_settings import PretrainConfig, add_arguments, configs_from_args
from vmae.train.run import run_task
from vmae.train.task import ModelTask

__all__ = ["PretrainConfig", "PretrainTask", "add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """The command."""
    config, run_config = configs_from_args(args)
    absent = find_absent(args)
    if absent:
        show_settings(config, run_config)
        return tell_absent(absent)
    return run_task(PretrainTask(config), run_config, args)


class PretrainTask(ModelTask[PretrainConfig, Batch]):
    """Masked autoencoding: the loss is the target's on the tokens that the mask counts."""

    model: Pretrainer
    target: Target

    def check(self) -> list[str]:
        check_mask(self.config.mask, self.config.model.grid)
        check_loader(self.config.loader)
        self.loader = self.config.loader
        fixed = torch.Generator().manual_seed(0)
        self.one = DualMask.sample(1, self.config.model.grid, **self.config.mask.to_dict(), generator=fixed)
        self.trivial: dict[str, float] = {}  # losses on the first batch, once they are known
        lines = super().check()
        self.build_target()
        return lines

    def build_target(self) -> None:
        """Make what is predicted, from `config`; it is found wrong before anything is read or written."""
        config = self.config
        self.target = build_target(
            Wanted(config.model, config.target, config.normalize_target, self.run.speed)
        )

    def read_data(self) -> tuple[PretrainDataset, list[str]]:
        config = self.config
        entries = read_data(config.data, config.data_root, frame_pattern=config.frame_pattern)
        check_loader(config.loader, entries)
        notes = [f"note: skipped, cannot be decoded: {error}" for _, error in check_decodable(entries)]
        dataset = PretrainDataset(
            entries,
            num_frames=config.model.num_frames,
            stride=config.stride,
            image_size=config.model.img_size,
            grid=config.model.grid,
            mask=config.mask,
            num_sample=config.num_sample,
            seed=config.seed,
            repeat=config.repeat,
            sampling=config.sampling,
            fps=config.fps,
            crop=config.crop,
            flip=config.flip,
            resize=config.resize,
        )
        return dataset, notes

    @property
    def list_file(self) -> str:
        return self.config.data

    @property
    def list_root(self) -> str:
        return self.config.data_root or super().list_root

    def build_model(self) -> Pretrainer:
        self.target.to(self.parallel.device)
        return build_pretrainer(
            self.config.model,
            backend=self.run.speed.backend,
            attention=self.run.speed.attention,
            target=self.target,
        )

    def start(self) -> str:
        source = read_checkpoint(self.config.init or "")
        report = start_pretrainer(self.model, source)
        return "\n".join(filter(None, (report, source.changed)))

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.model.encoder.blocks, *self.model.decoder.blocks]

    def block_tokens(self) -> Sequence[int]:
        visible, decoded = self.one.visible.shape[1], self.one.decode.shape[1]
        encoder, decoder = self.config.model.depth, self.config.model.decoder_depth
        return [visible] * encoder + [visible + decoded] * decoder

    def flops_per_clip(self) -> float:
        own = masked_macs(self.config.model, self.config.mask, width=self.target.width)
        return 6.0 * own + 2.0 * self.target.macs()

    def weigh(self, batch: Batch) -> float:
        usual = self.one.keep.shape[1] * self.run.batch_size * self.config.num_sample
        return (batch.counted or 0) / usual

    def on_first_batch(self, batch: Batch) -> None:
        if self.parallel.is_main:
            if isinstance(self.target, Pixels):
                of = (self.config.model, self.target.normalize)
                self.trivial = trivial_losses(batch.clips, batch.mask, *of)
            else:
                self.trivial = self.target.trivial(batch.clips, batch.mask)
            tqdm.write(f"loss of trivial predictors on the first batch: zero {self._trivial()}")

    def compute_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.clips, batch.mask)

    def bytes_beside(self) -> int:
        return self.target.state_bytes()

    # --- Words ---

    def _trivial(self) -> str:
        """Losses of the zero predictor and of a mean, in words that follow "zero"."""
        zero, (name, mean) = self.trivial["zero"], list(self.trivial.items())[1]
        return f"{zero:.4f}, {name} {mean:.4f}"

    def describe_model(self) -> str:
        mask, one = self.config.mask, self.one
        visible, decoded, counted = one.visible.shape[1], one.decode.shape[1], int(one.weight.sum())
        decoder = f"{mask.decoder} {mask.decoder_ratio:g}"
        if mask.decoder == "none":
            decoder = "all hidden"
        return (
            f"{super().describe_model()} ({mask.encoder} {mask.encoder_ratio:g}: {visible} visible; "
            f"{decoder}: {decoded} decoded, {counted} counted by the loss); predicted: "
            f"{self.target.describe()}"
        )

    def describe_data(self) -> list[str]:
        visits = f"{len(self.dataset.entries)} videos x {self.config.repeat} visits an epoch"
        return [visits, *describe_data(self.dataset.data)]

    def describe_loss(self) -> str:
        return f"; zero predictor {self._trivial()}" if self.trivial else ""
