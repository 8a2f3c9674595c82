"""Optimizers and schedules as published: the numbers of their definitions, written down a second time."""

import json
import math

import numpy as np
import pytest
import torch

from vmae import InputError, build_classifier
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.format import read_group
from vmae.config import MaskConfig, ModelConfig, OptimConfig
from vmae.data.augment_classify import AugmentConfig
from vmae.data.classify_dataset import ClipConfig
from vmae.train.finetune_settings import FinetuneConfig
from vmae.train.layer_decay import build_layer_optimizer
from vmae.train.optim import (
    CosineSchedule,
    is_decayed,
    set_learning_rate,
    set_weight_decay,
    weight_decay_schedule,
)
from vmae.train.prepare import build_schedule
from vmae.train.pretrain_settings import PretrainConfig
from vmae.train.resume import setting_changes, with_defaults

SMALL = ModelConfig(img_size=32, num_frames=4, embed_dim=24, depth=2, num_heads=2)


def cosine_scheduler(base, final, epochs, steps, warmup_epochs=0, start=0.0, warmup_steps=-1):
    """utils.cosine_scheduler of VideoMAE V2, from its definition."""
    warmup = warmup_steps if warmup_steps > 0 else warmup_epochs * steps
    rest = epochs * steps - warmup
    cosine = [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]
    return [*np.linspace(start, base, warmup), *cosine]


class Lengths:
    """What `build_schedule` reads of a task's settings."""

    def __init__(self, steps, warmup_steps):
        self.steps, self.warmup_steps = steps, warmup_steps


@pytest.mark.parametrize("warmup_lr", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("warmup", [0, 1, 2, 12])
def test_the_warm_up_starts_from_its_rate(warmup, warmup_lr):
    """Scaled with the batch, as the published code scales it before it forgets it."""
    optim = OptimConfig(lr=2e-3, min_lr=1e-5, warmup_lr=warmup_lr).scaled_to(96)
    expected = cosine_scheduler(
        2e-3 * 96 / 256, 1e-5 * 96 / 256, 4, 10, warmup_steps=warmup, start=warmup_lr * 96 / 256
    )
    schedule = build_schedule(Lengths(40, warmup), optim)
    assert [schedule(step) for step in range(40)] == pytest.approx(expected, rel=1e-12)


def test_without_a_rate_it_starts_from_0_to_the_bit():
    with_it = CosineSchedule(lr=0.3, min_lr=0.01, total_steps=50, warmup_steps=17, warmup_lr=0.0)
    assert [with_it(step) for step in range(17)] == [0.3 * step / 16 for step in range(17)]


def test_weight_decay_along_a_cosine():
    """As published: half a cosine over all steps, no warm-up; groups of 0 stay at 0."""
    optim = OptimConfig(weight_decay=0.05, weight_decay_end=0.4)
    expected = cosine_scheduler(0.05, 0.4, 3, 10)
    schedule = weight_decay_schedule(optim, 30)
    assert [schedule(step) for step in range(30)] == pytest.approx(expected, rel=1e-12)
    optimizer = build_layer_optimizer(build_classifier(SMALL, 3), optim, 2, 0.5)
    before = [group["weight_decay"] for group in optimizer.param_groups]
    assert set(before) == {0.0, 0.05}
    set_weight_decay(optimizer, schedule(20))
    after = [group["weight_decay"] for group in optimizer.param_groups]
    assert after == [value and expected[20] for value in before]
    assert weight_decay_schedule(OptimConfig(), 30) is None


@pytest.mark.parametrize("opt", ["sgd", "momentum"])
def test_sgd_is_its_definition(opt):
    """Sutskever et al., 2013, as torch has it: v = m v + g + wd p, p -= lr (g + wd p + m v), or p -= lr v."""
    torch.manual_seed(0)
    model = build_classifier(SMALL, 3)
    optim = OptimConfig(opt=opt, momentum=0.8, lr=0.5, weight_decay=0.1)
    optimizer = build_layer_optimizer(model, optim, 2, 0.5)
    own = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    speed = dict.fromkeys(own, 0.0)
    scales = {"patch_embed": 0.125, "blocks.0": 0.25, "blocks.1": 0.5, "fc_norm": 1.0, "head": 1.0}
    for step in range(3):
        lr = 0.5 / (step + 1)
        set_learning_rate(optimizer, lr)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            scale = next(value for start, value in scales.items() if name.startswith(start))
            pull = parameter.grad.double() + (0.1 if is_decayed(name, parameter) else 0.0) * own[name]
            speed[name] = 0.8 * speed[name] + pull
            own[name] = own[name] - lr * scale * (pull + 0.8 * speed[name] if opt == "sgd" else speed[name])
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), own[name], atol=1e-5, rtol=1e-5)


def test_what_goes_with_what():
    with pytest.raises(InputError, match="Nesterov's momentum, which must be above 0: --opt momentum"):
        OptimConfig(opt="sgd", momentum=0.0)
    assert OptimConfig(opt="momentum", momentum=0.0).momentum == 0
    with pytest.raises(InputError, match="warmup_lr 0.1 is above lr 0.01"):
        OptimConfig(lr=0.01, warmup_lr=0.1)
    with pytest.raises(InputError, match="weight_decay_end 0.1 changes nothing with weight_decay 0"):
        OptimConfig(weight_decay=0.0, weight_decay_end=0.1)


def test_a_probes_encoder_has_no_dropout():
    given = dict(model=SMALL, data="list", optim=OptimConfig(), clip=ClipConfig(), augment=AugmentConfig())
    for rate in ("drop_rate", "attn_drop_rate"):
        with pytest.raises(InputError, match="--drop and --attn-drop are for an encoder that is trained"):
            FinetuneConfig(**given, num_classes=3, probe="linear", init="x", **{rate: 0.1})


# --- by the command line


PUBLISHED_NAMES = (
    "adam nadam radam adamp sgdp adadelta adafactor adahessian rmsprop rmsproptf novograd nvnovograd "
    "lookahead_adamw lookahead_sgd fusedsgd fusedmomentum fusedadam fusedadamw fusedlamb fusednovograd"
)


def test_other_optimizers_are_refused_by_name(pretrain, tmp_path, capsys):
    for name in PUBLISHED_NAMES.split():
        assert pretrain(tmp_path / "run", "--opt", name) == 2
        error = capsys.readouterr().err
        assert f"argument --opt: unknown optimizer '{name}'; known: adamw, sgd, momentum, muon" in error
        assert error.count("\n") == 1


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("written, opt", [("SGD", "sgd"), ("nesterov", "sgd"), ("AdamW", "adamw")])
def test_names_of_the_published_code(pretrain, tmp_path, capsys, written, opt):
    assert pretrain(tmp_path / "run", "--opt", written, "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["results"]["optim"]["opt"] == opt


def test_pretraining_with_sgd_goes_on_where_it_stopped(pretrain, tmp_path, capsys):
    flags = "--opt sgd --momentum 0.7 --weight_decay_end 0.2 --warmup_lr 0.01 --warmup-steps 2".split()
    flags += ["--save-every", "3"]
    run = tmp_path / "run"
    assert pretrain(run, *flags) == 0
    out = capsys.readouterr().out
    assert "SGD with Nesterov momentum 0.7; --betas and --eps are AdamW's and change nothing" in out
    assert "the published code takes it and starts from 0" in out
    assert "weight decay 0.05 at the start, 0.2 at the end" in out
    straight, last = records(run), CheckpointFolder(run).latest()
    assert {key.rpartition(".")[2] for key in read_group(last, "optimizer")} == {"momentum_buffer"}
    CheckpointFolder(run).remove(last)
    assert pretrain(run, *flags) == 0
    for name in ("loss", "lr", "weight_decay"):
        assert [one[name] for one in straight] == [one[name] for one in records(run)]
    assert straight[0]["lr"] == pytest.approx(0.01 * 2 / 256)
    assert [one["weight_decay"] for one in straight] == pytest.approx(cosine_scheduler(0.05, 0.2, 1, 6))
    capsys.readouterr()
    assert pretrain(run, "--opt", "adamw", "--steps", "8") == 2
    assert "optim.opt sgd in the checkpoint, adamw now: what" in capsys.readouterr().err


@pytest.mark.parametrize("command", [PretrainConfig, FinetuneConfig])
def test_a_run_from_before_these_settings_goes_on(command):
    """Its checkpoint does not name them; what held then is what their defaults are."""
    given = {"model": SMALL, "data": "list", "optim": OptimConfig()}
    if command is PretrainConfig:
        config = command(**given, mask=MaskConfig())
    else:
        config = command(**given, clip=ClipConfig(), augment=AugmentConfig(), num_classes=3)
    now = json.loads(json.dumps(config.to_dict()))
    before = json.loads(json.dumps(now))
    for part in (before, before["optim"], before.get("augment", {})):
        for name in set(part) & NEW:
            del part[name]
    assert not setting_changes(with_defaults(before, config), now)
    now["optim"] |= {"momentum": 0.5, "weight_decay_end": 0.1}
    assert set(setting_changes(with_defaults(before, config), now)) == {
        "optim.momentum",
        "optim.weight_decay_end",
    }


NEW = {
    *("muon_lr", "muon_momentum", "muon_adjust"),
    *("on_nonfinite", "skip_spikes", "spike_window", "spike_limit"),
    *("opt", "momentum", "warmup_lr", "weight_decay_end", "drop_rate", "attn_drop_rate"),
    *("increasing", "interpolation", "erase_mode", "erase_count"),
    *("cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode"),
}
