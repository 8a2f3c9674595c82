"""A teacher's latents stored once, for the views of some epochs (`vmae pretrain --latents DIR --store
EPOCHS`), and read by the run that learns them.

A sample's clips and masks are functions of (seed, epoch, index), so the tokens that the loss will count are
known before the student is there: only theirs are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from vmae.data.dataset import PretrainDataset
from vmae.data.list_identity import identify_list
from vmae.data.loaders import open_batches
from vmae.data.view_store import LatentStore, shares
from vmae.model.target import Target
from vmae.targets.latents import latent_settings
from vmae.train.parallel import Parallel
from vmae.train.pretrain_settings import PretrainConfig


def about_latents(
    config: PretrainConfig, dataset: PretrainDataset, root: str, target: Target, epochs: int
) -> dict[str, Any]:
    """What decides the views, and what the teacher makes of them."""
    listing = identify_list(dataset, root)
    listing["entries"] = listing["entries"]["sha256"]
    names = ("stride", "sampling", "fps", "crop", "flip", "resize", "seed")
    return {
        "clips": {"frames": config.model.num_frames, "size": list(config.model.image_hw)},
        "grid": list(config.model.grid),
        **{name: getattr(config, name) for name in names},
        "mask": config.mask.to_dict(),
        "list": {name: value for name, value in listing.items() if name in ("entries", "mix")},
        "epochs": epochs,
        "samples": len(dataset),
        "num_sample": config.num_sample,
        "tokens": dataset.sample_mask(0, 0).keep.shape[1],
        "width": target.width,
        "latents": latent_settings(config.target),
        "teacher": target.identity,
    }


def describe_size(store: LatentStore) -> str:
    """The bytes of a store, and how they come about."""
    about, free = store.about, store.check_room()
    room = "" if free is None else f"; {free:,} are free"
    return (
        f"latents: {about['epochs']} epochs x {about['samples']} videos x {about['num_sample']} clips x "
        f"{about['tokens']} counted tokens x {about['width']} values x 2 = "
        f"{store.size_bytes:,} bytes in {store.folder}{room}"
    )


def fill_latents(
    store: LatentStore,
    dataset: PretrainDataset,
    target: Target,
    parallel: Parallel,
    *,
    batch_size: int,
    num_workers: int,
) -> int:
    """Run the teacher over all views that are not stored yet; ranks take samples in turn.

    Returns:
        How many videos of this rank could not be read, and were stored as the others that stood in for them.
    """
    parts = shares(store, batch_size, parallel.rank, parallel.world_size)
    replaced = 0
    with open_batches(dataset, parts, num_workers=num_workers) as batches:
        bar = tqdm(parts, unit="batch", disable=None if parallel.is_main else True)
        for keys, batch in zip(bar, batches):
            replaced += len(batch.replaced)
            moved = batch.to(parallel.device)
            with torch.no_grad():
                store.write(keys, target.values(moved.clips, moved.mask))
    return replaced
