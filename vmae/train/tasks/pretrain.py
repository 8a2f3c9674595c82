"""`python -m vmae pretrain`: dual-masked pre-training on a list of videos (VideoMAE V2, 3.2 and 4)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vmae.checkpoint.models import start_pretrainer
from vmae.checkpoint.source import Source, read_checkpoint
from vmae.data import Batch, PretrainDataset, check_decodable, describe_data, read_data
from vmae.data.classify_dataset import ClipConfig
from vmae.data.gallery import Gallery
from vmae.data.labels import LabelledList, read_labelled_list
from vmae.data.loaders import check_loader
from vmae.data.shared_memory import check_shared_memory
from vmae.data.view_store import LatentStore
from vmae.errors import InputError
from vmae.masking import DualMask
from vmae.model import Pretrainer, build_pretrainer
from vmae.model.target import Pixels, Target
from vmae.targets.building import build_target
from vmae.targets.settings import Wanted
from vmae.train.checks import check_mask
from vmae.train.dry_run import find_absent, show_settings, tell_absent
from vmae.train.latent_store import about_latents, describe_size, fill_latents
from vmae.train.metrics import trivial_losses
from vmae.train.mix_shapes import MixShapes, check_mix_shapes
from vmae.train.parallel import open_parallel
from vmae.train.pretrain_settings import (
    PretrainConfig,
    RunConfig,
    add_arguments,
    configs_from_args,
    local_ranks,
)
from vmae.train.probe import ProbeSet, count_passes, describe_probe, pass_flops, read_gallery
from vmae.train.run import run_task
from vmae.train.task import ModelTask
from vmae.train.tasks.supervised import settled
from vmae.train.validation import Validation

__all__ = ["PretrainConfig", "PretrainTask", "add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """The command."""
    config, run_config = configs_from_args(args)
    if args.store is not None and config.target.latents is None:
        raise InputError("--store needs the folder to store to: --latents DIR (and --target teacher)")
    absent = find_absent(args)
    if absent:
        show_settings(config, run_config)
        return tell_absent(absent)
    if args.store is not None:
        return store_latents(config, run_config, args.store, dry_run=args.dry_run)
    return run_task(PretrainTask(config), run_config, args)


def store_latents(config: PretrainConfig, run: RunConfig, epochs: int, *, dry_run: bool = False) -> int:
    """Run the teacher over all views of some epochs, and store what it makes of them in
    `config.target.latents`; what a stopped pass has stored is not done again.

    Args:
        dry_run: check everything, tell the bytes, write nothing.

    Raises:
        InputError: the folder holds latents of other views, or the disk has no room for them; the list, its
            videos or the teacher cannot be read.
    """
    folder = config.target.latents or ""
    task = PretrainTask(config.replace(target=dataclasses.replace(config.target, latents=None)))
    with open_parallel(run.speed.parallel, run.device, shard_size=run.speed.shard_size) as parallel:
        task.run, task.parallel = run, parallel
        notes = task.check()
        dataset, about_data = task.read_data()
        task.target.to(parallel.device)
        about = about_latents(task.config, dataset, task.list_root, task.target, epochs)
        store = LatentStore(folder, about)
        told = parallel.on_main(lambda: describe_size(store))
        if parallel.is_main:
            print("\n".join([*notes, *about_data, told]), flush=True)
        if dry_run:
            return 0
        with parallel.hold(folder, "a teacher's latents being stored"):
            parallel.on_main(store.create)
            store = LatentStore(folder, about)
            sizes = {"batch_size": run.batch_size, "num_workers": run.speed.num_workers}
            replaced = sum(parallel.gather(fill_latents(store, dataset, task.target, parallel, **sizes)))
        if parallel.is_main:
            bad = f"; {replaced} videos could not be read, others stood in" if replaced else ""
            print(f"{folder}: bf16 latents of {epochs} epochs x {len(dataset)} samples are stored{bad}")
    return 0


class PretrainTask(ModelTask[PretrainConfig, Batch]):
    """Masked autoencoding: the loss is the target's on the tokens that the mask counts."""

    dataset: PretrainDataset
    model: Pretrainer
    target: Target

    def check(self) -> list[str]:
        check_mask(self.config.mask, self.config.model.grid)
        check_loader(self.config.loader)
        if self.config.target.latents is not None and self.config.loader != "cpu":
            raise InputError(
                f"--loader {self.config.loader} brings no stored latents along: take --loader cpu"
            )
        self.loader = self.config.loader
        fixed = torch.Generator().manual_seed(0)
        self.one = DualMask.sample(1, self.config.model.grid, **self.config.mask.to_dict(), generator=fixed)
        self.trivial: dict[str, float] = {}  # losses on the first batch, once they are known
        if self.loader != "cpu":
            self.config.model.check_rgb(f"--loader {self.loader}")
        if self.config.resize == "pil":
            self.config.model.check_rgb("--resize pil")
        self.probed: Gallery | None = None
        self.shapes = MixShapes([self.config.model], [1.0])
        self.build_target()
        return [*super().check(), *self.target.notes]

    @property
    def validates(self) -> bool:  # type: ignore[override]  # an attribute of tasks that know it
        return self.config.probe.every is not None

    def build_target(self) -> None:
        """Make what is predicted, from `config`; it is found wrong before anything is read or written."""
        config, settings = self.config, self.config.target
        if settings.teacher is not None:
            settings = dataclasses.replace(settings, teacher=settled(settings.teacher, self.run))
        self.target = build_target(Wanted(config.model, settings, config.normalize_target, self.run.speed))
        identity = dataclasses.replace(config.target, teacher_identity=self.target.identity)
        self.config = dataclasses.replace(config, target=identity)

    def read_data(self) -> tuple[PretrainDataset, list[str]]:
        config = self.config
        entries = read_data(config.data, config.data_root, frame_pattern=config.frame_pattern)
        check_loader(config.loader, entries)
        channels = config.model.in_channels
        bad = check_decodable(entries, channels=channels)
        notes = [f"note: skipped, cannot be decoded: {error}" for _, error in bad]
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
            channels=channels,
        )
        self.shapes = check_mix_shapes(
            dataset,
            config.model,
            config.mask,
            target=self.target,
            loader=config.loader,
            cuda_graphs=self.run.speed.cuda_graphs,
        )
        if config.loader == "cpu":
            check_shared_memory(self.batch_bytes(), self.run.speed.num_workers, local_ranks())
        if config.target.latents is not None:
            self.open_latents(dataset)
        return dataset, notes + self.read_probe(dataset)

    def read_probe(self, dataset: PretrainDataset) -> list[str]:
        """Choose the videos to probe on, where the settings ask for it; lines on what is wrong with them."""

        def read(path: str) -> LabelledList:
            pattern = self.config.frame_pattern
            return read_labelled_list(path, self.config.data_root, frame_pattern=pattern)

        self.probed, notes = read_gallery(self.config.probe, read, dataset.data, self.parallel)
        return notes

    def open_latents(self, dataset: PretrainDataset) -> None:
        """Let `dataset` read stored latents.

        Raises:
            InputError: they are of other views or another teacher, or not complete; an epoch is less than a
                batch.
        """
        folder, config = self.config.target.latents or "", self.config
        epochs = config.target.stored_epochs or LatentStore.epochs_in(folder)
        about = about_latents(config, dataset, self.list_root, self.target, epochs)
        store = LatentStore(folder, about)
        store.check_complete(self.run.videos_per_step(self.parallel.world_size))
        dataset.cycle, dataset.read_values = epochs, store.read
        self.config = config.replace(target=dataclasses.replace(config.target, stored_epochs=epochs))

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
        return "\n".join(filter(None, (report, source.changed, self._other_positions(source))))

    def _other_positions(self, source: Source) -> str:
        """A line where a checkpoint's fixed positions are of another grid than the model's; else nothing."""
        model = self.config.model
        if source.known is None or model.learned_pos or source.grid == (model.pos_grid or model.grid):
            return ""
        theirs, ours = (" x ".join(map(str, grid)) for grid in (source.grid, model.grid))
        flag = " ".join(map(str, source.grid))
        return (
            f"note: the checkpoint's positions are of {theirs} tokens, the model's of {ours}: "
            f"--pos-grid {flag} interpolates them"
        )

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.model.encoder.blocks, *self.model.decoder.blocks]

    def block_tokens(self) -> Sequence[int]:
        visible, decoded = self.shapes.most_tokens(self.config.mask)
        encoder, decoder = self.config.model.depth, self.config.model.decoder_depth
        return [visible] * encoder + [visible + decoded] * decoder

    def batch_bytes(self) -> int:
        """Of a micro-batch's clips, uint8, and of the stored values that come with them, bf16."""
        clips, stored = self.run.batch_size * self.config.num_sample, self.config.target.latents is not None
        values = 2 * clips * self.one.keep.shape[1] * self.target.width if stored else 0
        return clips * self.shapes.clip_bytes + values

    def flops_per_clip(self) -> float:
        own = self.shapes.macs(self.config.mask, self.target.width)
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
                self.trivial = self.target.trivial(batch.clips, batch.mask, batch.values)
            tqdm.write(f"loss of trivial predictors on the first batch: zero {self._trivial()}")

    def compute_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if batch.values is not None:
            return model(batch.clips, batch.mask, values=batch.values)
        if tuple(batch.clips.shape[1:4]) == self.dataset.usual_shape:
            return model(batch.clips, batch.mask)
        return model([batch.clips], [batch.mask])

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
            goal=probe.goal,
            step_flops=self.step_flops(),
            at_start=True,
        )

    def step_flops(self) -> float:
        """Of a step on all ranks: forward and backward, and the target's values."""
        clips = (self.config.effective_batch or 1) * self.config.num_sample
        return clips * self.flops_per_clip()

    def probe_share(self) -> float:
        """Of the run's FLOPs, that its probes take."""
        config = self.config
        assert self.probed is not None and config.probe.every is not None and config.steps is not None
        once = pass_flops(self.probed, config.model)
        probes = once * count_passes(config.probe.every, config.steps)
        return probes / (probes + config.steps * self.step_flops())

    def bytes_beside(self) -> int:
        return self.target.state_bytes()

    @property
    def shape_count(self) -> int:
        return len(self.shapes.models)

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
        return [visits, *describe_data(self.dataset.data), *self.shapes.describe(), *self.describe_probe()]

    def describe_probe(self) -> list[str]:
        """Lines on the probe, if there is one; its cost is among them."""
        return (
            [] if self.probed is None else describe_probe(self.config.probe, self.probed, self.probe_share())
        )

    def describe_more(self) -> dict[str, Any]:
        more: dict[str, Any] = {"predicted": self.target.describe()}
        if self.probed is not None:
            sizes = {"gallery": self.probed.size, "queries": len(self.probed.queries)}
            more["probe"] = {**sizes, "flops_share": self.probe_share()}
        return more

    def describe_loss(self) -> str:
        return f"; zero predictor {self._trivial()}" if self.trivial else ""
