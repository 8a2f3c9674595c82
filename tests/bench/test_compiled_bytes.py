"""What compiled blocks keep is counted, and each way of `--recompute` keeps what it says."""

import pytest
import torch

from vmae import ModelConfig
from vmae.train import compiled

CONFIG = ModelConfig.preset("vit_tiny")
WIDTH, TOKENS = 32, 64
# In widths of bfloat16, a token: two norms' mean and deviation and a row sum for each of 2 heads, in float32.
STATISTICS = (4 * 2 + 2 * 2) / WIDTH


@pytest.fixture
def module(benches):
    yield benches("compiled_bytes")
    torch.compiler.reset()
    compiled.set_compiler()


def widths(module, recompute: str) -> float:
    kept = module.count_kept(CONFIG, WIDTH, 2, TOKENS, clips=64, dtype="bfloat16", recompute=recompute)
    return kept.per_clip / (TOKENS * WIDTH * 2)


@pytest.mark.slow
def test_by_hand_and_by_budget_keep_less_than_plain_modules(module):
    """Plain modules keep x in float32, its norm, q, k, v, attention's output before and after its projection,
    a second norm, and the MLP's hidden layer before and after GELU; the others neither norms nor GELU's."""
    plain, by_hand, by_budget = (widths(module, recompute) for recompute in ("off", "on", "budget"))
    assert plain == pytest.approx(17 + STATISTICS, abs=0.01)
    assert by_budget == pytest.approx(11 + STATISTICS, abs=0.01)
    assert 11 < by_hand < 11 + STATISTICS + 0.01


@pytest.mark.slow  # 4 s
def test_what_is_made_again_by_hand_is_kept_where_torch_merges_it(module, monkeypatch):
    """Why `--recompute on` turns torch's merging off."""
    import torch._functorch.config as functorch

    def merging(recompute):
        functorch.cse, functorch.activation_memory_budget = True, 1.0

    plain = widths(module, "off")
    monkeypatch.setattr(module, "set_compiler", merging)
    assert widths(module, "on") == pytest.approx(plain, abs=0.01)


@pytest.mark.slow
def test_the_command_prints_a_table(module, capsys):
    assert module.main(["--model", "vit_tiny", "--clips", "8", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| vit_tiny")] == [
        "off",
        "budget",
        "on",
    ]
    assert module.main(["--clips", "1"]) == 2
    assert "--clips must be at least 2" in capsys.readouterr().err


def test_both_ways_are_variants(benches, module):
    import torch._functorch.config as functorch

    found = {}
    for name, variant in benches("variants").VARIANTS.items():
        if name.startswith("triton+compile"):
            blocks = variant.build(CONFIG).encoder.blocks
            (by_hand,) = {block.recompute for block in blocks}
            found[name] = by_hand, functorch.cse, functorch.activation_memory_budget
    assert found == {
        "triton+compile": (True, False, 1.0),
        "triton+compile+budget": (False, True, compiled.MEMORY_BUDGET),
    }
