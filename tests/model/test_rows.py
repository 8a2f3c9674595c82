"""A block on some rows: the same numbers as the whole block at these rows, and nothing more kept."""

import pytest
import torch
from torch import nn

from vmae import ModelConfig
from vmae.model.attention import choice as backends
from vmae.model.attention.packed import Lengths
from vmae.model.attention.probes import Workload
from vmae.model.blocks import Block
from vmae.model.cost import count_saved_bytes
from vmae.model.rows import Rows, norm_rows, select_linear
from vmae_kernels import select_decoded

DIM, HEADS = 24, 3
KEEP = torch.tensor([[1, 3, 4, 8], [0, 2, 6, 7]], dtype=torch.int32)
USES = torch.tensor([[4, 0, 4, 1, 2, 4, 4, 4, 3], [0, 4, 1, 4, 4, 4, 2, 3, 4]], dtype=torch.int32)


def make_block(recompute=True, drop_path=0.0, attention="auto", **change):
    block = Block(ModelConfig.preset("vit_tiny", **change), DIM, HEADS, drop_path, attention, recompute)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def outcome(block, x, rows, pick, seed=0):
    """The block's result at `rows`, and the gradients of x and all parameters."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    if pick:
        out = block(x, rows=rows)
    else:
        out = block(x)[torch.arange(len(x))[:, None], rows.keep.long()]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, [x, *block.parameters()], upstream)]


@pytest.mark.parametrize(
    "rows", [Rows(KEEP, USES), Rows(KEEP[:, [2, 0, 0, 3, 0]])], ids=["sorted", "repeated"]
)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    "change",
    [{}, dict(cos_attn=True), dict(init_values=0.3, qk_scale=0.2), dict(qkv_bias=False)],
    ids=["plain", "cosine attention", "layer scale", "no q and v bias"],
)
def test_the_rows_of_the_whole_block(change, recompute, rows):
    block, x = make_block(recompute, **change), torch.randn(2, 9, DIM)
    for got, expected in zip(outcome(block, x, rows, True), outcome(block, x, rows, False)):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", backends.runnable(Workload(head_dim=DIM // HEADS)))
def test_every_attention_backend_that_runs_here(backend):
    block, x, rows = make_block(attention=backend), torch.randn(2, 9, DIM), Rows(KEEP, USES)
    for got, expected in zip(outcome(block, x, rows, True), outcome(block, x, rows, False)):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_stochastic_depth_drops_the_same_clips():
    block, x = make_block(drop_path=0.5).train(), torch.randn(2, 9, DIM)
    for seed in range(4):  # both branches, each kept and dropped
        for got, expected in zip(
            *(outcome(block, x, Rows(KEEP, USES), pick, seed) for pick in (True, False))
        ):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "softmax"])
def test_packed_clips(backend, recompute):
    """Clips of 4, 7 and 1 rows, of which 2, 3 and 1 are kept; places of packed rows count over all clips."""
    block = make_block(recompute, attention=backend)
    clips = [torch.randn(1, count, DIM) for count in (4, 7, 1)]
    kept = [[0, 3], [1, 2, 6], [0]]
    keep = torch.tensor([[0, 3, 5, 6, 10, 11]], dtype=torch.int32)
    uses = torch.full((1, 12), 6, dtype=torch.int32).scatter_(1, keep.long(), torch.arange(6).int()[None])
    lengths, cpu = Lengths((4, 7, 1), torch.device("cpu")), torch.device("cpu")
    rows = Rows(keep, uses, lengths=Lengths((2, 3, 1), cpu))
    packed = block(torch.cat(clips, 1), lengths, rows)
    alone = torch.cat([block(clip)[:, rows] for clip, rows in zip(clips, kept)], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    upstream = torch.randn_like(packed)
    for got, expected in zip(
        *(torch.autograd.grad(out, list(block.parameters()), upstream) for out in (packed, alone))
    ):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_stochastic_depth_drops_the_same_packed_clips():
    block, x, cpu = make_block(drop_path=0.5).train(), torch.randn(1, 12, DIM), torch.device("cpu")
    keep, lengths = torch.tensor([[0, 3, 5, 6, 10, 11]], dtype=torch.int32), Lengths((4, 7, 1), cpu)
    for seed in range(4):
        torch.manual_seed(seed)
        expected = block(x, lengths)[:, keep[0].long()]
        torch.manual_seed(seed)
        got = block(x, lengths, Rows(keep, lengths=Lengths((2, 3, 1), cpu)))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def relative_error(got, true):
    return ((got.double() - true).norm() / true.norm()).item()


def test_gradients_of_norms_over_many_rows_in_bfloat16():
    """Sums over 1,400 rows: in bfloat16, the dtype of the rows, they would be tens of per cent off."""
    norm, exact = nn.LayerNorm(16), nn.LayerNorm(16).double()
    x = torch.randn(2, 700, 16).bfloat16()
    upstream = torch.randn(2, 700, 16).bfloat16() + 1
    keep = torch.arange(700, dtype=torch.int32).expand(2, -1).contiguous()

    def selected(x, norm):
        return select_decoded(x, norm.weight, norm.bias, keep, backend="torch")[1]

    def linear(x, norm):
        return select_linear(x, Rows(keep, keep), norm, torch.eye(16), None)[1]

    truth = torch.autograd.grad(exact(x.double()), list(exact.parameters()), upstream.double())
    for way in (norm_rows, selected, linear):
        for stream in (x, x.clone().requires_grad_()):
            found = torch.autograd.grad(way(stream, norm), list(norm.parameters()), upstream)
            assert all(relative_error(*pair) < 0.01 for pair in zip(found, truth)), way


def test_norm_of_rows_keeps_them_only():
    norm, x = nn.LayerNorm(DIM), torch.randn(2, 9, DIM, requires_grad=True)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    assert count_saved_bytes(lambda: norm_rows(x, norm), norm) == x.numel() * 4
    upstream, wanted = torch.randn(2, 9, DIM), [x, *norm.parameters()]
    for got, expected in zip(
        *(torch.autograd.grad(out, wanted, upstream) for out in (norm_rows(x, norm), norm(x)))
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_keeps_its_input_only():
    norm, linear = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM)
    x = torch.randn(2, 9, DIM, requires_grad=True)
    modules = nn.ModuleList([norm, linear])

    def forward():
        return select_linear(x, Rows(KEEP, USES), norm, linear.weight, linear.bias)[1]

    indices = 4 * (KEEP.numel() + USES.numel())
    assert count_saved_bytes(forward, modules) == x.numel() * 4 + indices


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_under_autocast_no_worse_than_the_plain_way(stream):
    """Against float64: at most twice the error that plain PyTorch makes under the same autocast."""
    norm, linear = nn.LayerNorm(64, eps=1e-6), nn.Linear(64, 48)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    exact_norm, exact_linear = nn.LayerNorm(64, eps=1e-6).double(), nn.Linear(64, 48).double()
    exact_norm.load_state_dict(norm.state_dict()), exact_linear.load_state_dict(linear.state_dict())
    x = torch.randn(2, 9, 64).to(stream).requires_grad_()
    upstream = torch.randn(2, 4, 64), torch.randn(2, 4, 48)

    def plain(x, norm, linear):
        rows = x[torch.arange(2)[:, None], KEEP.long()]
        return rows, linear(norm(rows))

    def ours(x, norm, linear):
        return select_linear(x, Rows(KEEP, USES), norm, linear.weight, linear.bias)

    def gradients(results, x, norm, linear):
        wanted = [x, *norm.parameters(), *linear.parameters()]
        given = [u.to(result.dtype) for u, result in zip(upstream, results)]
        return [*results, *torch.autograd.grad(results, wanted, given)]

    wide = x.detach().double().requires_grad_()
    exact = gradients(plain(wide, exact_norm, exact_linear), wide, exact_norm, exact_linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [gradients(way(x, norm, linear), x, norm, linear) for way in (ours, plain)]
    assert found[0][0].dtype == stream and found[0][1].dtype == torch.bfloat16
    for got, theirs, truth in zip(*found, exact):
        assert got.dtype == theirs.dtype
        bound = 2 * (theirs.double() - truth).norm() + 1e-6 * truth.norm()
        assert (got.double() - truth).norm() <= bound
