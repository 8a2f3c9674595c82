"""Muon: torch's own steps where it has them, and what it lacks: stacked matrices, shards, steps left out."""

import json

import pytest
import torch
from torch import nn

from vmae import InputError, build_classifier, build_pretrainer
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.format import read_group
from vmae.config import ModelConfig, OptimConfig
from vmae.train.layer_decay import build_layer_optimizer
from vmae.train.muon import Muon, block_matrices, check_matrices, orthogonal
from vmae.train.optim import build_optimizer, optimizer_notes, set_learning_rate, set_weight_decay
from vmae.train.parallel import open_parallel

SMALL = ModelConfig(
    img_size=32,
    num_frames=4,
    embed_dim=24,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al., 2024


def with_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# Square, tall, wide.
@pytest.mark.parametrize("shape", [(24, 24), (72, 24), (24, 96)])
@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
def test_a_step_is_torchs(shape, rule):
    own, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "adjust_lr_fn": rule, "weight_decay": 0.2}
    ours = Muon([{"params": [own], "stacked": 1}], **options)
    other = torch.optim.Muon([theirs], **options)
    for step in range(3):
        for parameter, optimizer in ((own, ours), (theirs, other)):
            with_gradients([parameter], step)
            optimizer.step()
    assert torch.equal(own, theirs) and not torch.equal(own, torch.ones(shape))


def test_stacked_matrices_move_as_if_each_were_alone():
    whole = nn.Parameter(torch.randn(72, 24))
    parts = [nn.Parameter(part.clone()) for part in whole.detach().chunk(3)]
    together = Muon([{"params": [whole], "stacked": 3}], lr=0.1, adjust_lr_fn="original")
    apart = torch.optim.Muon(parts, lr=0.1)
    for step in range(3):
        with_gradients([whole], step)
        for part, grad in zip(parts, whole.grad.chunk(3)):
            part.grad = grad.clone()
        together.step(), apart.step()
    torch.testing.assert_close(
        whole.detach(), torch.cat(parts).detach(), atol=2e-3, rtol=0
    )  # of steps of 0.1


def test_orthogonal_has_singular_values_about_1():
    """0.7 to 1.2 after five steps, as their source says; float32, where they are not rounding."""
    found = torch.linalg.svdvals(orthogonal(torch.randn(2, 24, 40), COEFFICIENTS, 5, 1e-7))
    assert 0.6 < found.min() and found.max() < 1.3


def test_matrices_of_blocks_and_nothing_else():
    model = build_pretrainer(SMALL)
    matrices = block_matrices(model)
    names = {name: matrices[p] for name, p in model.named_parameters() if p in matrices}
    kinds = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
    blocks = ["encoder.blocks.0", "encoder.blocks.1", "decoder.blocks.0"]
    assert names == {f"{block}.{kind}.weight": count for block in blocks for kind, count in kinds.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="opt muon moves the matrices of blocks, and none is trained here"):
        check_matrices(model)


def test_rates_decay_and_layers_apply_to_both_parts():
    """The matrices' own rate is a factor of the schedule's; layer decay multiplies it."""
    optim = OptimConfig(opt="muon", lr=0.5, muon_lr=2.0, weight_decay=0.1).scaled_to(128)
    assert optim.muon_lr == 1.0
    optimizer = build_layer_optimizer(build_classifier(SMALL, 3), optim, 2, 0.5)
    set_learning_rate(optimizer, 0.1)
    set_weight_decay(optimizer, 0.3)
    muon, adamw = (part.param_groups for part in optimizer.parts)
    assert {round(group["lr"], 9) for group in muon} == {0.1, 0.2}  # of blocks 0 and 1: x 4, x 0.25 and 0.5
    assert {group["lr"] for group in adamw} == {0.1 * scale for scale in (0.125, 0.25, 0.5, 1)}
    assert {group["weight_decay"] for group in muon} == {0.3}
    assert {group["weight_decay"] for group in adamw} == {0.0, 0.3}
    assert len(optimizer.param_groups) == len(muon) + len(adamw)
    assert (
        "(momentum 0.95, 1 for 256 videos, match_rms_adamw), AdamW the rest (0.25)"
        in optimizer_notes(optim)[0]
    )


def test_its_rate_is_for_it_alone():
    with pytest.raises(InputError, match="muon_lr 0.1 is for opt muon, not adamw"):
        OptimConfig(muon_lr=0.1)


def test_a_step_that_is_left_out_moves_nothing():
    """Decided on the device, as in fused AdamW; the host looks where that is not fused (`FiniteGuard`)."""
    model = build_pretrainer(SMALL)
    optimizer = build_optimizer(model, OptimConfig(opt="muon", lr=0.1))
    assert optimizer._step_supports_amp_scaling
    assert not build_optimizer(model, OptimConfig(opt="muon"), fused=False)._step_supports_amp_scaling
    for bad in (0.0, 1.0):
        with_gradients(model.parameters(), 0)
        for parameter in model.parameters():
            parameter.grad[0] = float("nan") if bad else 1.0
        before = [p.detach().clone() for p in model.parameters()]
        states = [v.clone() for state in optimizer.state.values() for v in state.values()]
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
        same = [torch.equal(old, p) for old, p in zip(before, model.parameters())]
        assert all(same) if bad else not any(same)
    held = [v for state in optimizer.state.values() for v in state.values()]
    assert all(torch.equal(old, v) for old, v in zip(states, held)) and len(states) == len(held)


class Odd(nn.Module):
    """Matrices whose rows three ranks cannot share evenly; of one a rank has none."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(6, 11), "fc2": nn.Linear(11, 2)})])

    def forward(self, x):
        for linear in self.blocks[0].values():
            x = linear(x)
        return x


def steps_of_shards(kind):
    with open_parallel(kind, "cpu") as parallel:
        torch.manual_seed(0)
        model = Odd()
        wrapped = parallel.wrap(model)
        optimizer = build_optimizer(model, OptimConfig(opt="muon", lr=0.1))
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(x).square().mean().backward()
            optimizer.step()
        whole = [p.full_tensor() if kind == "fsdp" else p for p in model.parameters()]
        return [p.detach().numpy() for p in whole]


def test_uneven_shards_move_as_the_whole(run_ranks):
    whole, shards = steps_of_shards("none"), run_ranks(3, steps_of_shards, "fsdp")
    for rank in shards:
        for own, other in zip(rank, whole):
            assert abs(own - other).max() < 2e-3  # of steps of 0.1, made in bfloat16


# --- by the command line


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_pretraining_with_muon_goes_on_where_it_stopped(pretrain, tmp_path, capsys):
    flags = (
        "--opt muon --muon-lr 0.001 --weight-decay-end 0.2 --clip-grad 0.5 --save-every 2 --steps 4".split()
    )
    run = tmp_path / "run"
    assert pretrain(run, *flags) == 0
    assert "--opt muon moves the matrices of blocks (momentum 0.95, " in capsys.readouterr().out
    straight, folder = records(run), CheckpointFolder(run)
    held = read_group(last := folder.latest(), "optimizer")
    wanted = read_group(last)
    kinds = {key.rpartition(".")[2] for key in held if key.startswith("encoder.blocks.0.attn.qkv")}
    assert kinds == {"momentum_buffer"}
    assert {key.rpartition(".")[2] for key in held if "patch_embed" in key} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    folder.remove(last)
    assert pretrain(run, *flags) == 0
    for name in ("loss", "lr", "weight_decay", "grad_norm"):
        assert [one[name] for one in straight] == [one[name] for one in records(run)]
    again = read_group(folder.latest())
    assert all(torch.equal(value, again[name]) for name, value in wanted.items())
    capsys.readouterr()
    assert pretrain(run, "--steps", "8") == 2
    assert "optim.opt muon in the checkpoint, adamw now: what" in capsys.readouterr().err
