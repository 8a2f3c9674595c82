"""Groups, rates and schedule of fine-tuning equal the published ones: expected values are written down."""

import pytest
import torch

from vmae import build_classifier
from vmae.config import ModelConfig
from vmae.train.ema import WeightAverage
from vmae.train.layer_decay import build_layer_optimizer, layer_groups, layer_of, layer_scales
from vmae.train.optim import CosineSchedule, OptimConfig, set_learning_rate


def test_layers_of_published_names():
    expected = {
        "patch_embed.proj.weight": 0,
        "patch_embed.proj.bias": 0,
        "pos_embed": 0,
        "cls_token": 0,
        "blocks.0.norm1.weight": 1,
        "blocks.0.attn.q_bias": 1,
        "blocks.11.mlp.fc2.weight": 12,
        "blocks.11.gamma_1": 12,
        "norm.weight": 13,
        "fc_norm.bias": 13,
        "head.weight": 13,
        "head.bias": 13,
        "pool.query": 13,
    }
    assert {name: layer_of(name, 12) for name in expected} == expected


def test_scales_of_the_published_models():
    vit_b = layer_scales(12, 0.75)
    assert len(vit_b) == 14 and vit_b[-1] == 1 and vit_b[-2] == 0.75
    assert vit_b[0] == pytest.approx(0.023757264018058777)  # 0.75 ** 13
    assert vit_b[1] == pytest.approx(0.03167635202407837)
    vit_g = layer_scales(40, 0.9)
    assert vit_g[0] == pytest.approx(0.013302794647291147) and vit_g[40] == 0.9  # 0.9 ** 41
    assert layer_scales(3, 1.0) == [1.0] * 5


def test_groups_of_a_model():
    config = ModelConfig(
        img_size=32, num_frames=4, embed_dim=24, depth=2, num_heads=2, init_values=0.1, learned_pos=True
    )
    model = build_classifier(config, 3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layer_groups(model, 0.05, 2, 0.5)
    found = {
        (group["lr_scale"], group["weight_decay"]): {names[id(parameter)] for parameter in group["params"]}
        for group in groups
    }
    block = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    vectors = {
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
        "attn.q_bias",
        "attn.v_bias",
        "attn.proj.bias",
        "mlp.fc1.bias",
        "mlp.fc2.bias",
        "gamma_1",
        "gamma_2",
    }
    assert found == {
        (0.125, 0.05): {"patch_embed.proj.weight"},
        (0.125, 0.0): {"patch_embed.proj.bias", "pos_embed"},
        (0.25, 0.05): {f"blocks.0.{name}" for name in block},
        (0.25, 0.0): {f"blocks.0.{name}" for name in vectors},
        (0.5, 0.05): {f"blocks.1.{name}" for name in block},
        (0.5, 0.0): {f"blocks.1.{name}" for name in vectors},
        (1.0, 0.05): {"head.weight"},
        (1.0, 0.0): {"fc_norm.weight", "fc_norm.bias", "head.bias"},
    }


def test_a_probe_has_no_group_for_what_is_frozen():
    model = build_classifier(ModelConfig(img_size=32, num_frames=4, embed_dim=24, depth=2, num_heads=2), 3)
    model.freeze_encoder()
    assert {group["lr_scale"] for group in layer_groups(model, 0.05, 2, 0.5)} == {1.0}


def test_rates_at_every_step_of_the_published_schedule():
    """ViT-g on K710: 1e-3 for 256 clips at a batch of 96, 5 of 35 epochs of warm-up, down to 1e-6; here 10
    steps an epoch."""
    optim = OptimConfig(lr=1e-3, min_lr=1e-6, weight_decay=0.1, betas=(0.9, 0.999)).scaled_to(96)
    assert optim.lr == pytest.approx(3.75e-4) and optim.min_lr == pytest.approx(3.75e-7)
    schedule = CosineSchedule(lr=optim.lr, min_lr=optim.min_lr, total_steps=350, warmup_steps=50)
    expected = {0: 0.0, 1: 7.653061224e-06, 49: 3.75e-4, 50: 3.75e-4, 200: 1.876875e-4, 349: 3.8527046e-07}
    assert {step: schedule(step) for step in expected} == pytest.approx(expected, rel=1e-6)
    model = build_classifier(ModelConfig(img_size=32, num_frames=4, embed_dim=24, depth=2, num_heads=2), 3)
    optimizer = build_layer_optimizer(model, optim, 2, 0.9)
    set_learning_rate(optimizer, schedule(200))
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([1.876875e-4 * 0.9**power for power in (3, 2, 1, 0)])


def test_moving_average():
    model = torch.nn.Linear(2, 2)
    average = WeightAverage(model, 0.9)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update()
    torch.testing.assert_close(average.average["weight"], first + 0.1)
    with average.applied() as averaged:
        torch.testing.assert_close(averaged.weight, first + 0.1)
    torch.testing.assert_close(model.weight, first + 1)
    other = WeightAverage(torch.nn.Linear(2, 2), 0.9)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.average["weight"], average.average["weight"])
