"""The whole model with the Triton operations: interpreted where there is no GPU."""

import pytest
import torch

from vmae import DualMask, MaskConfig, ModelConfig, build_pretrainer
from vmae.model.cost import saved_activation_bytes_per_clip
from vmae.tools.parity import check_file, passed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_dual", "tiny_encoder_only", "tiny_rawpixels", "tiny_classify"])
def test_golden_parity(golden, name):
    errors = check_file(golden / f"{name}.npz", backend="triton")
    assert passed(errors), errors


def test_vit_b_dual_keeps_at_most_59_mib_a_clip_in_bfloat16():
    config = ModelConfig.preset("vit_b")
    kept = saved_activation_bytes_per_clip(
        lambda c: build_pretrainer(c, "triton"), config, MaskConfig(), torch.bfloat16
    )
    assert kept <= 59 * 2**20


@pytest.mark.slow  # 5 s
def test_a_step_equals_torchs_and_compiles_without_a_graph_break(tiny, clips_of):
    fast, plain = (build_pretrainer(tiny, backend).to(DEVICE) for backend in ("triton", "torch"))
    plain.load_state_dict(fast.state_dict())
    clips = clips_of(tiny, 1).to(DEVICE)
    mask = DualMask.sample(1, tiny.grid, encoder_ratio=0.75, generator=torch.Generator().manual_seed(0)).to(
        DEVICE
    )
    losses = [torch.compile(fast, fullgraph=True, backend="aot_eager")(clips, mask), plain(clips, mask)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters()):
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-7, name
