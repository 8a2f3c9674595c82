"""`python -m vmae pretrain`: dual-masked pre-training on a list of videos (VideoMAE V2, 3.2 and 4)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vmae.checkpoint.published import load_into
from vmae.checkpoint.source import read_checkpoint
from vmae.data import Batch, PretrainDataset, check_decodable, describe_data, read_data
from vmae.data.classify_dataset import ClipConfig
from vmae.data.gallery import Gallery
from vmae.data.labels import LabelledList, read_labelled_list
from vmae.data.loaders import check_loader
from vmae.masking import DualMask
from vmae.model import Pretrainer, build_pretrainer
from vmae.model.cost import masked_macs
from vmae.model.target import Pixels, Target
from vmae.targets import TARGETS
from vmae.targets.kind import Wanted
from vmae.train.checks import check_mask
from vmae.train.dry_run import find_absent, show_settings, tell_absent
from vmae.train.metrics import trivial_losses
from vmae.train.pretrain_settings import PretrainConfig, add_arguments, configs_from_args
from vmae.train.probe import ProbeSet, count_passes, describe_probe, pass_flops, read_gallery
from vmae.train.run import run_task
from vmae.train.task import ModelTask
from vmae.train.validation import Validation

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
        self.probed: Gallery | None = None
        lines = super().check()
        self.build_target()
        return lines

    @property
    def validates(self) -> bool:  # type: ignore[override]  # an attribute of tasks that know it
        return self.config.probe.every is not None

    def build_target(self) -> None:
        """Make what is predicted, from `config`; it is found wrong before anything is read or written."""
        config = self.config
        wanted = Wanted(config.model, config.target, config.normalize_target, self.run.speed)
        self.target = TARGETS[config.target.name].build(wanted)

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
        return dataset, notes + self.read_probe(dataset)

    def read_probe(self, dataset: PretrainDataset) -> list[str]:
        """Choose the videos to probe on, where the settings ask for it; lines on what is wrong with them."""

        def read(path: str) -> LabelledList:
            pattern = self.config.frame_pattern
            return read_labelled_list(path, self.config.data_root, frame_pattern=pattern)

        self.probed, notes = read_gallery(self.config.probe, read, dataset.data, self.parallel)
        return notes

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
        report = load_into(self.model, source.state, source.path, allow_encoder_only=True)
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

    def build_validation(self, model: nn.Module, steps_per_epoch: int) -> Validation | None:
        config, run, probe = self.config, self.run, self.config.probe
        if self.probed is None:
            return None
        own = config.model
        clip = ClipConfig(num_frames=own.num_frames, image_size=own.img_size, stride=config.stride)
        videos = ProbeSet(
            self.probed,
            own,
            clip,
            measure=probe.measure,
            parallel=self.parallel,
            dtype=config.dtype,
            batch_size=run.batch_size * config.num_sample,
            num_workers=run.speed.num_workers,
        )
        assert config.steps is not None and probe.every is not None  # `resolve_lengths` came before
        return Validation(
            videos,
            model,
            every=probe.every,
            total_steps=config.steps,
            steps_per_epoch=steps_per_epoch,
            patience=probe.patience,
            margin=probe.margin,
            at_start=True,
        )

    def probe_share(self) -> float:
        """Of the run's FLOPs, that its probes take."""
        config = self.config
        assert self.probed is not None and config.probe.every is not None and config.steps is not None
        once = pass_flops(self.probed, config.model)
        probes = once * count_passes(config.probe.every, config.steps)
        clips = (config.effective_batch or 1) * config.num_sample
        return probes / (probes + config.steps * clips * self.flops_per_clip())

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
        return [visits, *describe_data(self.dataset.data), *self.describe_probe()]

    def describe_probe(self) -> list[str]:
        """Lines on the probe, if there is one; its cost is among them."""
        return (
            [] if self.probed is None else describe_probe(self.config.probe, self.probed, self.probe_share())
        )

    def describe_more(self) -> dict[str, Any]:
        if self.probed is None:
            return {}
        sizes = {"gallery": self.probed.size, "queries": len(self.probed.queries)}
        return {"probe": {**sizes, "flops_share": self.probe_share()}}

    def describe_loss(self) -> str:
        return f"; zero predictor {self._trivial()}" if self.trivial else ""
