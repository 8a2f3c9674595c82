"""`--recompute auto`: what is counted, what it means on each device, and that no choice changes a loss."""

from types import SimpleNamespace

import pytest
import torch

from vmae import DualMask, InputError, MaskConfig, ModelConfig, build_classifier, build_pretrainer
from vmae.config import OptimConfig, SpeedConfig
from vmae.model.cost import count_saved_bytes
from vmae.planning.memory import count_activations, state_bytes
from vmae.train import recompute_choice
from vmae.train.activations import prepare_blocks
from vmae.train.prepare import resolve_recompute
from vmae.train.pretrain_settings import RunConfig
from vmae.train.recompute_choice import (
    Need,
    choose_recompute,
    kept_bytes,
    need_without,
    recompute_ways,
)

GPU, CPU = torch.device("cuda"), torch.device("cpu")
MASK = MaskConfig()


def blocks_of(model) -> list[torch.nn.Module]:
    return [*model.encoder.blocks, *model.decoder.blocks]


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_need_is_the_plans(dtype):
    """Blocks keep almost all of what a step keeps; the plan counts the whole step."""
    config = ModelConfig.preset("vit_b")
    planned = count_activations(config, MASK, dtype, "none", "torch", recompute=False)
    with torch.device("meta"):
        model = build_pretrainer(config, backend="torch")
    tokens = [160] * config.depth + [944] * config.decoder_depth
    need = need_without(model, config, blocks_of(model), tokens, clips=32, dtype=dtype)
    assert need.kept + need.working == pytest.approx(planned.saved(32) + planned.working(32), rel=0.15)
    assert need.state == pytest.approx(sum(state_bytes(model, 1, dtype)), rel=0.02)
    shared = need_without(
        model, config, blocks_of(model), tokens, clips=32, dtype=dtype, sharers=8, accumulate=2
    )
    assert shared.state == pytest.approx(sum(state_bytes(model, 8, dtype, accumulate=2)), rel=0.2)
    assert shared.kept == need.kept
    beside = need_without(
        model, config, blocks_of(model), tokens, clips=32, dtype=dtype, sharers=8, accumulate=2, beside=10**9
    )
    assert beside.state == shared.state + 10**9  # a teacher is on every rank, whole


@pytest.mark.parametrize("opt", ["sgd", "muon"])
def test_the_state_is_that_of_the_optimizer(opt):
    config, optim = ModelConfig.preset("vit_tiny"), OptimConfig(opt=opt)
    with torch.device("meta"):
        model = build_pretrainer(config, backend="torch")
    of_adamw, own = (
        need_without(model, config, [], [], clips=1, dtype="float32", optim=one).state
        for one in (OptimConfig(), optim)
    )
    planned = [state_bytes(model, 1, "float32", optim=one)[2] for one in (OptimConfig(), optim)]
    assert of_adamw - own == pytest.approx(planned[0] - planned[1], rel=0.01)
    assert own < of_adamw


@pytest.mark.parametrize("recompute", [True, False])
def test_kept_bytes_are_those_of_a_real_block(recompute):
    config = ModelConfig.preset("vit_tiny")
    model = build_classifier(config, 0, attention="sdpa", recompute=recompute)
    block = model.blocks[0]

    def kept(clips):
        x = torch.randn(clips, 20, config.embed_dim, requires_grad=True)
        return count_saved_bytes(lambda: block(x), block)

    found = kept_bytes(config, config.embed_dim, config.num_heads, 20, "float32", recompute)
    assert found == kept(2) - kept(1)


def test_a_frozen_encoder_keeps_nothing():
    config = ModelConfig.preset("vit_tiny")
    model = build_classifier(config, 3)
    model.freeze_encoder()
    need = need_without(
        model, config, list(model.blocks), [config.num_tokens] * config.depth, clips=4, dtype="float32"
    )
    assert need.kept == need.working == 0


def test_ways_and_what_decides_between_them(monkeypatch):
    assert (
        recompute_ways("auto", "cpu", compiled=False)
        == recompute_ways("auto", "cpu", compiled=True)
        == ("on",)
    )
    assert recompute_ways("auto", "cuda", compiled=True) == ("off", "budget")
    assert recompute_ways("auto", "cuda", compiled=False) == ("off", "on")
    monkeypatch.setattr(recompute_choice, "memory_of", lambda device: 100.0)
    fits, too_much = Need(40, 50, 2), Need(40, 50, 2.1)
    for compiled, otherwise in ((True, "budget"), (False, "on")):
        assert choose_recompute("auto", GPU, compiled=compiled, need=fits) == "off"
        assert choose_recompute("auto", GPU, compiled=compiled, need=too_much) == otherwise
        assert choose_recompute("auto", GPU, compiled=compiled, need=None) == otherwise
    for asked in ("on", "off", "budget"):
        assert choose_recompute(asked, CPU, compiled=True, need=None) == asked
    assert choose_recompute("auto", CPU, compiled=False, need=None) == "on"


def task_on(device: str, **speed):
    """As much of a task as the choice needs."""
    config = ModelConfig.preset("vit_tiny")
    model = build_pretrainer(config, backend="torch")
    return SimpleNamespace(
        run=RunConfig(output="run", batch_size=8, speed=SpeedConfig(compile=True, **speed)),
        parallel=SimpleNamespace(device=torch.device(device), sharded=False),
        config=SimpleNamespace(model=config, num_sample=2, dtype="float32", optim=OptimConfig()),
        model=model,
        averaged=False,
        bytes_beside=lambda: 0,
        blocks=lambda: blocks_of(model),
        block_tokens=lambda: [160] * config.depth + [944] * config.decoder_depth,
    )


def test_a_run_decides_by_its_device_batch_and_model(monkeypatch):
    def decided(memory, device="cuda", **speed):
        monkeypatch.setattr(recompute_choice, "memory_of", lambda device: memory)
        task = task_on(device, **speed)
        resolve_recompute(task)
        return task.run.speed.recompute

    assert (decided(2**40), decided(2**20)) == ("off", "budget")
    assert decided(2**40, checkpointing="selective") == "budget"  # asked for since memory is short
    assert decided(2**40, device="cpu") == "on"
    assert decided(2**20, recompute="off") == "off"


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 2e-3)])
def test_no_choice_changes_a_loss(tiny, dtype, bound):
    torch.manual_seed(0)
    model = build_pretrainer(tiny, backend="torch")
    mask = DualMask.sample(2, tiny.grid, **MASK.to_dict(), generator=torch.Generator().manual_seed(0))
    shape = (2, tiny.num_frames, *tiny.image_hw, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8)
    losses, gradients = [], []
    for recompute in ("on", "off"):
        prepare_blocks(blocks_of(model), recompute=recompute)
        assert {block.recompute for block in blocks_of(model)} == {recompute == "on"}
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(clips, mask)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=bound)
    torch.testing.assert_close(*gradients, rtol=30 * bound, atol=10 * bound)


def test_budget_without_compilation_is_refused():
    with pytest.raises(InputError, match="--recompute budget is of compiled blocks"):
        SpeedConfig(recompute="budget", compile=False)
