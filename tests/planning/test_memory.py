"""Memory on paper against bytes counted on real tensors, real optimizers and real shards."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmae import DualMask, MaskConfig, ModelConfig, build_pretrainer
from vmae.config import CHECKPOINTING
from vmae.model.cost import count_saved_bytes, count_step, token_counts
from vmae.model.target import Target
from vmae.planning.memory import count_activations, count_values, state_bytes
from vmae.train.activations import prepare_blocks
from vmae.train.optim import OptimConfig, build_optimizer

ROOT = Path(__file__).parents[2]
MASK = MaskConfig()
# Deeper than the two depths that are counted, and another number of clips than the two batches.
DEEP = ModelConfig(
    img_size=64,
    num_frames=8,
    embed_dim=96,
    depth=7,
    num_heads=3,
    decoder_embed_dim=48,
    decoder_depth=3,
    decoder_num_heads=2,
)
CLIPS = 5


def real_step(checkpointing: str, dtype: torch.dtype, backend: str):
    """The model, and a function that runs its forward on real clips."""
    model = build_pretrainer(DEEP, backend=backend, attention="sdpa")
    prepare_blocks((*model.encoder.blocks, *model.decoder.blocks), checkpointing=checkpointing)
    mask = DualMask.sample(CLIPS, DEEP.grid, **MASK.to_dict(), generator=torch.Generator().manual_seed(0))

    def forward():
        clips = torch.randint(0, 256, (CLIPS, DEEP.num_frames, *DEEP.image_hw, 3), dtype=torch.uint8)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(clips, mask)

    return model, forward


def assert_planned(checkpointing: str, dtype: str, backend: str, rel: float = 0.04) -> None:
    planned = count_activations(DEEP, MASK, dtype, checkpointing, backend)
    model, forward = real_step(checkpointing, getattr(torch, dtype), backend)
    real = count_step(forward, model)
    assert planned.saved(CLIPS) == pytest.approx(real.saved, rel=rel)
    assert planned.saved(CLIPS) + planned.working(CLIPS) == pytest.approx(real.peak, rel=rel)
    assert planned.flops * CLIPS == pytest.approx(real.flops, rel=1e-6)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_activations_are_those_of_a_real_step(checkpointing, dtype):
    assert_planned(checkpointing, dtype, "torch")


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, checkpointing", [("float32", "full"), ("bfloat16", "none"), ("bfloat16", "selective")]
)
def test_so_they_are_with_the_operations_of_a_gpu_interpreted(checkpointing, dtype, monkeypatch):
    """Triton's interpreter leaves a launch's tensors in circles, which a GPU's launches do not."""
    from triton.runtime.interpreter import GridExecutor

    def launch_and_collect(self, *args, launch=GridExecutor.__call__, **kwargs):
        launch(self, *args, **kwargs)
        gc.collect()

    monkeypatch.setattr(GridExecutor, "__call__", launch_and_collect)
    assert_planned(checkpointing, dtype, "triton", rel=0.06)  # in a model this small, the mask counts too


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_activations_are_the_bytes_that_autograd_saves(dtype):
    planned = count_activations(DEEP, MASK, dtype, "none", "torch")
    model, forward = real_step("none", getattr(torch, dtype), "torch")
    assert planned.saved(CLIPS) == pytest.approx(count_saved_bytes(forward, model), rel=0.02)


@pytest.mark.slow
def test_checkpointing_trades_bytes_for_flops():
    none, selective, full = (count_activations(DEEP, MASK, "float32", kind) for kind in CHECKPOINTING)
    assert none.per_clip > selective.per_clip > full.per_clip
    assert none.flops < selective.flops < full.flops


@pytest.mark.parametrize(
    ("opt", "momentum"), [("adamw", 0.9), ("sgd", 0.9), ("momentum", 0.0), ("muon", 0.9)]
)
def test_state_is_that_of_a_real_optimizer(opt, momentum):
    optim = OptimConfig(opt=opt, momentum=momentum)
    model = build_pretrainer(DEEP, backend="torch")
    optimizer = build_optimizer(model, optim)
    clips = torch.zeros(1, DEEP.num_frames, *DEEP.image_hw, 3, dtype=torch.uint8)
    model(clips, DualMask.sample(1, DEEP.grid, **MASK.to_dict())).backward()
    optimizer.step()

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    states = [value for state in optimizer.state.values() for value in state.values() if value is not None]
    held = (
        size([*model.parameters(), *model.buffers()]),
        size(p.grad for p in model.parameters()),
        size(states),
        0,
    )
    assert state_bytes(model, 1, "bfloat16", optim=optim) == held


SHARDED = """
import json, sys, torch
from vmae import DualMask, build_pretrainer
from vmae.train.optim import OptimConfig, build_optimizer
from vmae.train.parallel import open_parallel
from tests.planning.test_memory import DEEP, MASK

with open_parallel("fsdp", "cpu") as parallel:
    model = build_pretrainer(DEEP, backend="torch")
    wrapped = parallel.wrap(model, [*model.encoder.blocks, *model.decoder.blocks])
    optimizer = build_optimizer(model, OptimConfig())
    clips = torch.zeros(1, DEEP.num_frames, *DEEP.image_hw, 3, dtype=torch.uint8)
    wrapped(clips, DualMask.sample(1, DEEP.grid, **MASK.to_dict())).backward()
    optimizer.step()

    def size(tensors):
        own = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        return sum(t.numel() * t.element_size() for t in own)

    states = [value for state in optimizer.state.values() for value in state.values()]
    weights, gradients = [*model.parameters(), *model.buffers()], [p.grad for p in model.parameters()]
    held = size(weights), size(gradients), size(states)
    if parallel.is_main:
        open(sys.argv[1], "w").write(json.dumps(held))
"""


@pytest.mark.slow
def test_shards_are_those_of_two_ranks(tmp_path):
    script, found = tmp_path / "sharded.py", tmp_path / "held.json"
    script.write_text(SHARDED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        found,
    ]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT, env=_environment())
    parameters, gradients, optimizer, gathered = state_bytes(build_pretrainer(DEEP), 2, "float32")
    assert [parameters, gradients, optimizer] == json.loads(found.read_text())
    largest = max(
        sum(p.numel() for p in block.parameters()) for block in build_pretrainer(DEEP).encoder.blocks
    )
    assert gathered > 2 * 4 * largest


def test_accumulation_keeps_whole_gradients_on_every_gpu():
    with torch.device("meta"):
        model = build_pretrainer(DEEP)
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert state_bytes(model, 8, "bfloat16", accumulate=2)[1] - state_bytes(model, 8, "bfloat16")[1] == whole


def _environment():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_a_targets_width_and_its_own_room_are_counted():
    """A narrower head keeps less; what a target makes on its way is the worst moment where it is more."""

    class Wide(Target):
        name = "wide"
        width = 8

        def values(self, clips, mask):
            whole = clips.new_zeros((clips.shape[0], 10_000_000), dtype=torch.float32)
            return whole[:, : mask.target.shape[1] * 8].unflatten(1, (-1, 8)) + 1

    target = Wide(DEEP)
    pixels = count_activations(DEEP, MASK, "float32", "none", "torch")
    other = count_activations(DEEP, MASK, "float32", "none", "torch", target=target)
    head = 2 * 3 * (DEEP.tubelet_pixels - 8)  # of each counted token and clip, and its gradient
    assert other.flops == pytest.approx(pixels.flops - head * DEEP.decoder_embed_dim * counted_tokens())
    assert other.working(CLIPS) == pytest.approx(40_000_000 * CLIPS, rel=0.01)
    assert count_values(target, DEEP, MASK, CLIPS) == pytest.approx(40_000_000 * CLIPS, rel=0.01)
    room = other.fixed + other.values_fixed + 7.5 * (other.per_clip + other.values_per_clip)
    assert other.most_clips(room) == pytest.approx(7.5)


def counted_tokens() -> int:
    return token_counts(DEEP, MASK).counted
