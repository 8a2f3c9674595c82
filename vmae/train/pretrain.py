"""`python -m vmae pretrain`: dual-masked pre-training on a list of videos (VideoMAE V2, sections 3.2 and 4).

Everything that can be wrong with the input is found before the output folder gets its first file.
"""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path

import torch
from tqdm import tqdm

from vmae.checkpoint.published import load_into, load_weights
from vmae.data import Batch, PretrainDataset, Quarantine, check_decodable, read_data
from vmae.data.loaders import check_loader
from vmae.model import build_pretrainer
from vmae.model.cost import masked_macs, token_counts
from vmae.train.checks import check_backend, check_mask, check_output, check_speed
from vmae.train.loop import Trainer
from vmae.train.metrics import trivial_losses
from vmae.train.optim import build_adamw
from vmae.train.parallel import Parallel, open_parallel
from vmae.train.pretrain_report import banner, summary
from vmae.train.pretrain_settings import PretrainConfig, RunConfig, add_arguments, configs_from_args
from vmae.train.resume import setting_changes
from vmae.train.run import Prepared, assemble_trainer, carry_out, find_start, resolve_lengths, wrap_model

__all__ = ["Prepared", "add_arguments", "build_trainer", "prepare", "pretrain", "run", "setting_changes"]


def run(args: argparse.Namespace) -> int:
    """The command; 0 also after SIGTERM or SIGUSR1 (the run goes on when it is started again), 130 after
    Ctrl-C."""
    config, run_config = configs_from_args(args)
    speed = run_config.speed
    with open_parallel(speed.parallel, run_config.device, shard_size=speed.shard_size) as parallel:
        prepared = prepare(config, run_config, parallel)
        prepared.settings = args.settings.resolved(args, prepared.config, prepared.run)
        if args.dry_run:
            if parallel.is_main:
                print(json.dumps(prepared.describe(), indent=2))
            return 0
        return 130 if pretrain(prepared) == signal.SIGINT else 0


# --- Checks: nothing is written ---


def prepare(config: PretrainConfig, run: RunConfig, parallel: Parallel) -> Prepared:
    """Check everything that a run needs, and write nothing. All ranks call it.

    Raises:
        InputError: names what is wrong: list, videos, masks, output folder, device, weights, checkpoint.
    """
    device = parallel.device
    check_backend(run.speed.backend, device)
    check_speed(run.speed, config.model, config.dtype, device)
    check_output(Path(run.output))
    check_mask(config.mask, config.model.grid)
    Quarantine(max_share=run.max_bad_share)
    check_loader(config.loader)
    entries = read_data(config.data, config.data_root)
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
        flip=config.flip,
        resize=config.resize,
    )
    config, optim, steps_per_epoch = resolve_lengths(config, run, parallel, len(dataset))
    torch.manual_seed(config.seed)
    speed = run.speed
    model = build_pretrainer(
        config.model,
        backend=speed.backend,
        attention=speed.attention,
        normalize_target=config.normalize_target,
    )

    def load_init() -> str:
        return load_into(model, load_weights(config.init), config.init, allow_encoder_only=True)

    start = find_start(model, config, run, parallel, notes, load_init, dataset)
    return Prepared(
        config, run, parallel, dataset, model.to(device), optim, steps_per_epoch, notes=notes, **start
    )


# --- The run ---


def pretrain(prepared: Prepared) -> int | None:
    """Train, and leave checkpoints, logs, `run.json` and, at the end, the weights in the output folder.

    Returns:
        None when the run is complete, else the signal that stopped it.

    Raises:
        InputError: see `Trainer.run`, or the output folder can't be written.
    """
    trivial: dict[str, float] = {}
    folder = Path(prepared.run.output)
    return carry_out(
        prepared,
        banner(prepared),
        lambda: build_trainer(prepared, trivial),
        lambda steps, seconds: summary(folder, prepared.config, trivial, steps, seconds),
    )


def build_trainer(prepared: Prepared, trivial: dict[str, float]) -> Trainer:
    """The loop for a prepared run, at its start step; fills `trivial` with the trivial predictors' losses."""
    run, config, model, parallel = prepared.run, prepared.config, prepared.model, prepared.parallel
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    wrapped = wrap_model(prepared, blocks)
    usual = token_counts(config.model, config.mask).counted * run.batch_size * config.num_sample

    def compute_loss(batch: Batch) -> torch.Tensor:
        return wrapped(batch.clips, batch.mask)

    def weigh(batch: Batch) -> float:
        return batch.counted / usual

    def show_trivial_losses(batch: Batch) -> None:
        trivial.update(trivial_losses(batch.clips, batch.mask, config.model, config.normalize_target))
        zero, mean = trivial["zero"], trivial["visible_mean"]
        tqdm.write(
            f"loss of trivial predictors on the first batch: zero {zero:.4f}, mean of the visible tubelets "
            f"{mean:.4f}"
        )

    return assemble_trainer(
        prepared,
        wrapped,
        optimizer=build_adamw(model, prepared.optim),
        compute_loss=compute_loss,
        weigh=weigh,
        flops_per_clip=6.0 * masked_macs(config.model, config.mask),
        on_first_batch=show_trivial_losses if parallel.is_main else None,
    )
