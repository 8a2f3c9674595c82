"""Clips with unequal counts in one batch: equal to running each group by itself, outputs, loss and
gradients."""

import pytest
import torch

from vmae import DualMask, InputError, ModelConfig, build_pretrainer
from vmae.model.attention import attention, packed_attention
from vmae.model.attention import choice as backends
from vmae.model.attention.packed import Lengths
from vmae.model.attention.probes import Workload
from vmae.model.blocks import Block, DropPath
from vmae.model.packed import _pack_rows
from vmae.model.rows import Rows
from vmae_kernels.select_decoded import places_of

CPU = torch.device("cpu")
RUNS = backends.runnable(Workload(packed=True))
# Sizes as a multiple of the model's own: it, half the frames, a smaller frame, more tokens than it has
# positions for.
SIZES = [dict(), dict(num_frames=4), dict(img_size=(32, 64)), dict(num_frames=16)]


def test_lengths():
    lengths = Lengths((3, 1, 2), CPU)
    assert (lengths.total, lengths.longest) == (6, 3)
    assert lengths.starts.tolist() == [0, 3, 4, 6] and lengths.starts.dtype == torch.int32
    assert lengths.owner.tolist() == [0, 0, 0, 1, 2, 2]
    assert lengths.padded_rows.tolist() == [0, 1, 2, 3, 6, 7]
    assert lengths.key_mask[:, 0, 0].tolist() == [
        [True, True, True],
        [True, False, False],
        [True, True, False],
    ]
    for counts in ((), (3, 0)):
        with pytest.raises(InputError, match="at least one token"):
            Lengths(counts, CPU)


def test_the_backends_that_pad_run_here():
    assert RUNS == ["sdpa", "sdpa_flash", "sdpa_math", "softmax"]


@pytest.mark.parametrize("counts", [(5, 1, 9, 9), (7,), (1, 1)])
@pytest.mark.parametrize("backend", ["auto", *RUNS])
def test_each_sequence_attends_to_itself_alone(backend, counts):
    qkv = torch.randn(sum(counts), 3, 2, 88, requires_grad=True)
    upstream = torch.randn(sum(counts), 2, 88)
    out = packed_attention(qkv, Lengths(counts, CPU), backend)
    alone = torch.cat([attention(part[None], "softmax")[0] for part in qkv.split(counts)])
    torch.testing.assert_close(out, alone, atol=1e-6, rtol=1e-5)
    gradients = [torch.autograd.grad(x, qkv, upstream)[0] for x in (out, alone)]
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=1e-4)


def test_wrong_totals_and_names_are_refused():
    qkv = torch.randn(5, 3, 1, 8)
    with pytest.raises(InputError, match="5 packed tokens do not fit sequences of 6 tokens"):
        packed_attention(qkv, Lengths((4, 2), CPU))
    with pytest.raises(
        InputError, match=r"'flash2' cannot run \(.* inference, packed\): .*These can: sdpa, "
    ):
        packed_attention(qkv, Lengths((3, 2), CPU), "flash2")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("change", [{}, dict(cos_attn=True), dict(init_values=0.3, qk_scale=0.2)])
def test_a_block_on_packed_clips(recompute, change):
    block = Block(ModelConfig.preset("vit_tiny", **change), 24, 3, 0.0, recompute=recompute)
    clips = [torch.randn(1, n, 24) for n in (4, 7, 1)]
    packed = block(torch.cat(clips, 1), Lengths((4, 7, 1), CPU))
    torch.testing.assert_close(packed, torch.cat([block(x) for x in clips], 1), atol=1e-5, rtol=1e-4)


def test_stochastic_depth_drops_whole_packed_clips():
    layer = DropPath(0.5)
    out = layer(torch.ones(1, 60, 2), Lengths((1, 2, 3) * 10, CPU))[0]
    parts = out.split((1, 2, 3) * 10)
    assert all((part == part[0, 0]).all() and part[0, 0] in (0, 2) for part in parts)
    assert {float(part[0, 0]) for part in parts} == {0.0, 2.0}


def groups_of(config: ModelConfig, clips_of, sizes, batches):
    """(model config, clips, mask) of each group; encoder ratios differ too."""
    made = []
    for i, (size, batch) in enumerate(zip(sizes, batches)):
        own = config.replace(**size)
        mask = DualMask.sample(
            batch, own.grid, encoder_ratio=(0.75, 0.5)[i % 2], generator=torch.Generator().manual_seed(i)
        )
        made.append((own, clips_of(own, batch, seed=i), mask))
    return made


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("backend, recompute", [("sdpa", True), ("softmax", True), ("sdpa_flash", False)])
def test_loss_gradients_and_predictions_equal_those_of_each_group_alone(tiny, clips_of, backend, recompute):
    model = perturbed(build_pretrainer(tiny, attention=backend, recompute=recompute))
    groups = groups_of(tiny, clips_of, SIZES, (2, 1, 3, 1))
    clips, masks = [clip for _, clip, _ in groups], [mask for _, _, mask in groups]
    loss = model(clips, masks)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    predictions = model.predict(clips, masks)

    counted = sum(mask.target_weight.sum() for mask in masks)
    expected, expected_gradients = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for (own, clip, mask), predicted in zip(groups, predictions):
        alone = build_pretrainer(own, attention=backend, recompute=recompute)
        alone.load_state_dict(model.state_dict())
        part = alone(clip, mask) * mask.target_weight.sum() / counted
        part.backward()
        expected += part.detach()
        for name, parameter in alone.named_parameters():
            expected_gradients[name] += parameter.grad
        torch.testing.assert_close(predicted, alone.predict(clip, mask), atol=1e-5, rtol=1e-4)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert error < 1e-4, name


def test_rows_of_packed_groups(tiny, clips_of):
    """Rows of the packed tokens and their inverse, across groups of other lengths and counts."""
    masks = [mask for _, _, mask in groups_of(tiny, clips_of, SIZES, (2, 1, 3, 1))]
    sequences = [torch.empty(*mask.hidden_uses.shape, 3) for mask in masks]
    rows = _pack_rows([Rows(mask.hidden_rows, mask.hidden_uses) for mask in masks], sequences)
    tokens = torch.cat([torch.cat([mask.visible, mask.decode], 1).flatten() for mask in masks])
    assert torch.equal(tokens[rows.keep[0].long()], torch.cat([mask.target.flatten() for mask in masks]))
    uses, following = places_of(rows.keep, rows.uses.shape[1])
    assert torch.equal(rows.uses, uses) and (following == rows.keep.shape[1]).all()
    assert rows.lengths.counts == tuple(m.keep.shape[1] for m in masks for _ in range(m.batch))
    assert rows.keep.numel() == rows.lengths.total
    assert _pack_rows([Rows(mask.decoded_rows) for mask in masks], sequences).uses is None


def test_equal_masks_give_the_loss_of_a_plain_batch(tiny, clips_of):
    model, clips = build_pretrainer(tiny), clips_of(tiny, 3)
    mask = DualMask.sample(3, tiny.grid, encoder_ratio=0.75, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(clips, [mask[:2], mask[2:]]), model(clips, mask), rtol=1e-6, atol=0)


def test_masks_that_one_batch_cannot_hold(tiny, clips_of):
    """Same clips, different visible counts: `DualMask.cat` refuses and points here, a list of them runs."""
    masks = [DualMask.sample(1, tiny.grid, encoder_ratio=ratio) for ratio in (0.5, 0.75)]
    with pytest.raises(InputError, match="takes the list of masks itself"):
        DualMask.cat(masks)
    assert torch.isfinite(build_pretrainer(tiny)(clips_of(tiny, 2), masks))


def test_under_bfloat16_autocast(tiny, clips_of):
    model = perturbed(build_pretrainer(tiny))
    groups = groups_of(tiny, clips_of, SIZES[:2], (2, 1))
    clips, masks = [clip for _, clip, _ in groups], [mask for _, _, mask in groups]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(clips, masks)
    torch.testing.assert_close(loss, model(clips, masks), rtol=2e-2, atol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_what_does_not_fit_is_refused(tiny, clips_of):
    model = build_pretrainer(tiny)
    masks = [
        DualMask.sample(1, tiny.grid, encoder_ratio=0.75),
        DualMask.sample(2, tiny.grid, encoder_ratio=0.5),
    ]
    with pytest.raises(InputError, match="at least one mask"):
        model(clips_of(tiny, 1), [])
    with pytest.raises(InputError, match="masks of 3 clips in total do not fit 2 clips"):
        model(clips_of(tiny, 2), masks)
    with pytest.raises(InputError, match="1 groups of clips do not fit 2 masks"):
        model([clips_of(tiny, 3)], masks)
    with pytest.raises(InputError, match="32 tokens each, do not fit a mask of 1 clips of 64 tokens"):
        model([clips_of(tiny.replace(num_frames=4), 1), clips_of(tiny, 2)], masks)
    learned = build_pretrainer(tiny.replace(learned_pos=True))
    small = tiny.replace(num_frames=4)
    with pytest.raises(InputError, match="learned positions are for clips of 64 tokens, not of 32"):
        learned([clips_of(small, 1)], [DualMask.sample(1, small.grid, encoder_ratio=0.75)])
