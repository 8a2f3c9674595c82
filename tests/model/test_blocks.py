import math

import torch

from vmae import ModelConfig
from vmae.model.blocks import Block, DropPath, build_blocks
from vmae.model.embed import sine_cosine_positions


def test_positions_are_the_sine_cosine_table():
    table = sine_cosine_positions(5, 6)
    assert table.shape == (1, 5, 6) and table.dtype == torch.float32
    for n in range(5):
        for d in range(6):
            angle = n / 10000 ** (2 * (d // 2) / 6)
            expected = math.sin(angle) if d % 2 == 0 else math.cos(angle)
            assert abs(float(table[0, n, d]) - expected) < 1e-7


def test_layer_scale_and_residuals_by_hand():
    config = ModelConfig.preset("vit_tiny", init_values=0.3)
    block = Block(config, 12, 3, 0.0)
    with torch.no_grad():
        block.gamma_2.copy_(torch.linspace(-1, 1, 12))
    x = torch.randn(2, 5, 12)
    middle = x + 0.3 * block.attn(block.norm1(x))
    hidden = torch.nn.functional.gelu(block.norm2(middle) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    expected = middle + block.gamma_2 * (hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), expected)
    assert block.mlp.fc1.weight.shape == (48, 12) and block.norm1.eps == 1e-6


def test_without_layer_scale_there_are_no_gammas():
    block = Block(ModelConfig.preset("vit_tiny"), 12, 3, 0.0)
    assert not [name for name, _ in block.named_parameters() if "gamma" in name]


def test_stochastic_depth_drops_whole_clips_and_keeps_the_mean():
    layer = DropPath(0.25)
    out = layer(torch.ones(4000, 3, 2))
    per_clip = out.flatten(1)
    assert (per_clip == per_clip[:, :1]).all()
    kept = (per_clip[:, 0] != 0).float().mean()
    assert abs(float(kept) - 0.75) < 0.03 and torch.isclose(out.max(), torch.tensor(1 / 0.75))
    assert torch.equal(layer.eval()(torch.ones(5, 1)), torch.ones(5, 1))


def test_stochastic_depth_rises_linearly():
    rates = [
        block.drop_path.rate
        for block in build_blocks(ModelConfig.preset("vit_tiny", drop_path_rate=0.2), 12, 5, 3)
    ]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.2, 5))
