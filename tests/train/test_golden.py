"""The published code's own training losses, through this loop and its optimizer."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from vmae import DualMask, build_pretrainer
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.published import config_from_arch
from vmae.checkpoint.saver import Saver
from vmae.tools.parity import BOUNDS, fill_golden, freeze_untrained, golden_clip
from vmae.train.loop import LoopConfig, Trainer
from vmae.train.metrics import read_log
from vmae.train.optim import OptimConfig, build_optimizer


@dataclass
class OneBatch:
    """The same batch at every step."""

    clips: torch.Tensor
    mask: DualMask
    ids: list = field(default_factory=list)
    replaced: list = field(default_factory=list)

    def __next__(self):
        return self

    def to(self, device, non_blocking=False):
        return self


@pytest.mark.parametrize("name", ["tiny_dual", "tiny_encoder_only"])
def test_golden_trajectories(golden, tmp_path, name):
    with np.load(golden / f"{name}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    meta = json.loads(str(arrays.pop("meta")))
    given, expected = meta["optimizer"], arrays["trajectory"].tolist()
    config = config_from_arch(meta["arch"])
    model = fill_golden(build_pretrainer(config, normalize_target=meta.get("normalize_target", True)))
    freeze_untrained(model, arrays)
    mask = DualMask.from_bool(*(torch.from_numpy(arrays[key]) for key in ("enc_mask", "dec_mask")))
    names = ("lr", "betas", "eps", "weight_decay", "clip_grad")
    optim = OptimConfig(**{key: given[key] for key in names if key in given})
    Trainer(
        model=model,
        optimizer=build_optimizer(model, optim),
        schedule=lambda step: optim.lr,
        open_batches=lambda start_step: OneBatch(golden_clip(arrays, meta, config), mask),
        compute_loss=lambda batch: model(batch.clips, batch.mask),
        config=LoopConfig(total_steps=len(expected), clip_grad=optim.clip_grad, log_every=1),
        saver=Saver(CheckpointFolder(tmp_path)),
        about={},
        tensorboard=False,
    ).run()
    losses = [record["loss"] for record in read_log(tmp_path / "log.jsonl")]
    assert losses == pytest.approx(expected, rel=BOUNDS["trajectory"]) and len(losses) > 2
