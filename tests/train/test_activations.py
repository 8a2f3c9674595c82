"""What a block keeps for its backward is what the table says, and no choice changes a number."""

import pytest
import torch

from vmae import InputError, ModelConfig, build_pretrainer
from vmae.config import SpeedConfig
from vmae.model.blocks import build_blocks
from vmae.model.cost import count_saved_bytes
from vmae.train.activations import prepare_blocks
from vmae.train.checks import check_speed
from vmae.train.pretrain_settings import RunConfig

CONFIG = ModelConfig(img_size=32, embed_dim=64, num_heads=2, drop_path_rate=0.3)
TOKENS = 512  # many, so that what does not grow with them is small beside it


def widths_kept(checkpointing: str, recompute: str) -> float:
    """Values that a block keeps for each token, in widths of the block."""
    block = build_blocks(CONFIG, 64, 1, 2, attention="sdpa")
    prepare_blocks(block, checkpointing=checkpointing, recompute=recompute)
    x = torch.randn(1, TOKENS, 64, requires_grad=True)
    return count_saved_bytes(lambda: block[0](x), block) / (TOKENS * 64 * 4)


# sdpa keeps a row sum a head beside its output: 2 of 64 values.
@pytest.mark.parametrize(
    ("checkpointing", "recompute", "widths"),
    [("none", "off", 16), ("none", "on", 10), ("selective", "on", 6), ("full", "on", 1)],
)
def test_widths_kept_are_those_of_the_table(checkpointing, recompute, widths):
    assert widths_kept(checkpointing, recompute) == pytest.approx(widths, abs=0.15)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_gradients_are_the_same_to_the_bit_with_stochastic_depth(checkpointing):
    blocks = build_blocks(CONFIG, 64, 3, 2, attention="sdpa", recompute=True)
    x = torch.randn(4, 16, 64)
    upstream = torch.randn(4, 16, 64)

    def gradients():
        torch.manual_seed(1)
        blocks.zero_grad()
        out = x
        for block in blocks:
            out = block(out)
        out.backward(upstream)
        return [p.grad.clone() for p in blocks.parameters()]

    plain = gradients()
    prepare_blocks(blocks, checkpointing=checkpointing)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients()))


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_dropouts_are_drawn_again_as_they_were(checkpointing):
    """Without stochastic depth, which alone would make `full` keep the generator's state."""
    config = CONFIG.replace(drop_path_rate=0.0)
    blocks = build_blocks(config, 64, 2, 2, attention="sdpa", recompute=True, drop=0.2, attn_drop=0.3)
    x, upstream = torch.randn(4, 16, 64), torch.randn(4, 16, 64)

    def gradients():
        torch.manual_seed(1)
        blocks.zero_grad()
        blocks[1](blocks[0](x)).backward(upstream)
        return [p.grad.clone() for p in blocks.parameters()]

    plain = gradients()
    prepare_blocks(blocks, checkpointing=checkpointing)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients()))
    torch.manual_seed(2)
    other = blocks[0](x)
    torch.manual_seed(1)
    assert not torch.equal(blocks[0](x), other)


def test_unknown_kinds_are_named():
    with pytest.raises(InputError, match="unknown checkpointing 'some'; known: none, selective, full"):
        prepare_blocks([], checkpointing="some")


def test_cuda_graphs_are_the_compilers(tiny, monkeypatch):
    """Only what is asked of torch: replaying needs a GPU."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **asks: asked.append(asks["mode"]) or function)
    model = build_pretrainer(tiny)
    prepare_blocks(model.encoder.blocks, compiled=True, cuda_graphs=True)
    prepare_blocks(model.decoder.blocks, compiled=True)
    assert asked == ["reduce-overhead"] * tiny.depth + [None] * tiny.decoder_depth


def test_cuda_graphs_where_they_cannot_be(tiny):
    with pytest.raises(InputError, match="cuda_graphs needs compile"):
        SpeedConfig(cuda_graphs=True, compile=False)
    graphs = SpeedConfig(cuda_graphs=True)  # compiled, since a GPU compiles unless told otherwise
    with pytest.raises(InputError, match="--cuda-graphs does not go with --accumulate 4: .* --accumulate 1 "):
        RunConfig(output="run", speed=graphs, accumulate=4)
    assert RunConfig(output="run", speed=graphs).accumulate == 1
    speed = SpeedConfig(cuda_graphs=True, compile=True)
    with pytest.raises(InputError, match="--cuda-graphs needs a GPU, and the device is cpu"):
        check_speed(speed, tiny, "float32", torch.device("cpu"))
