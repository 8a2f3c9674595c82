"""On a GPU the host waits for nothing in a step: torch raises where it would."""

import pytest
import torch

from vmae import DualMask, ModelConfig, build_pretrainer
from vmae.data.augment_classify import AugmentConfig, draw_mixing, mix_clips, mix_targets
from vmae.model.attention.packed import Lengths
from vmae.train.guard import FiniteGuard, LateNumbers
from vmae.train.optim import OptimConfig, build_optimizer, clip_gradients

pytestmark = [pytest.mark.device, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_mixing(no_waiting):
    clips = torch.zeros(5, 4, 32, 32, 3, dtype=torch.uint8, device="cuda")
    targets = torch.zeros(5, 7, device="cuda")
    for kind in (dict(cutmix=0.0), dict(mixup=0.0)):
        mixing = draw_mixing((0, 1), (32, 32), AugmentConfig(**kind), seed=0)
        assert mix_clips(clips, mixing).is_cuda and mix_targets(targets, mixing, 0.1).is_cuda


def test_lengths_of_packed_clips(no_waiting):
    lengths = Lengths((3, 5, 2), torch.device("cuda"))
    made = (lengths.starts, lengths.owner, lengths.padded_rows, lengths.key_mask)
    assert all(tensor.is_cuda for tensor in made)


def test_a_pretraining_step(request):
    config = ModelConfig.preset("vit_tiny")
    model = build_pretrainer(config).cuda()
    optimizer = build_optimizer(model, OptimConfig())
    guard = FiniteGuard(optimizer, torch.device("cuda"))
    mask = DualMask.sample(2, config.grid, generator=torch.Generator().manual_seed(0)).pin_memory()
    clips = torch.zeros(2, config.num_frames, *config.image_hw, 3, dtype=torch.uint8).pin_memory()

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(clips.to("cuda", non_blocking=True), mask.to("cuda", non_blocking=True))
        loss.backward()
        norm = clip_gradients(model, 1.0, scale=1.0)
        guard.step(loss, norm)
        return LateNumbers(torch.stack([loss.detach(), norm]))

    step()  # what is built once may wait
    request.getfixturevalue("no_waiting")
    late = step()
    torch.cuda.set_sync_debug_mode("default")
    assert all(value == value for value in late.read())
