"""What all operators share: opcheck, torch.compile, autocast, index checks, large strides, backends, empty
batches."""

import mmap

import pytest
import torch
from bounds import make_clips, tokens_of

import vmae_kernels
from vmae_kernels import (
    assemble_decoder_tokens,
    embed_visible,
    gather_tubelets,
    head_patch_loss,
    patch_loss,
    resolve_backend,
    select_decoded,
)
from vmae_kernels.backend import TRITON_OPERATIONS
from vmae_kernels.device import check_indices

GRID, PATCH, WIDTH, DECODER = (2, 3, 3), 4, 24, 16


def operands(device, batch=2, dtype=torch.float32):
    """Arguments of every operation on one small problem; learned ones need gradients."""
    total, values = GRID[0] * GRID[1] * GRID[2], 6 * PATCH * PATCH

    def learned(*shape):
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    clips = make_clips("uint8", batch, GRID, PATCH, 2, device)
    visible, decode = tokens_of(batch, 4, total, device), tokens_of(batch, 6, total, device)
    keep = tokens_of(batch, 6, 10, device)
    weight = torch.rand(batch, 6, device=device)
    pos = torch.randn(1, total, DECODER, device=device)
    return {
        "embed_visible": (
            clips,
            visible,
            learned(WIDTH, 3, 2, PATCH, PATCH),
            learned(WIDTH),
            learned(total, WIDTH),
        ),
        "assemble_decoder_tokens": (learned(batch, 4, DECODER), learned(1, 1, DECODER), pos, visible, decode),
        "layer_norm": (learned(batch, 5, DECODER), learned(DECODER), learned(DECODER)),
        "select_decoded": (learned(batch, 10, DECODER), learned(DECODER), learned(DECODER), keep),
        "patch_loss": (learned(batch, 6, values), clips, decode, weight),
        "head_patch_loss": (
            learned(batch, 6, DECODER),
            learned(values, DECODER),
            learned(values),
            clips,
            decode,
            weight,
        ),
    }


def last_result(name, arguments, backend="triton"):
    """Of the public function: its result, or the last one of several."""
    result = getattr(vmae_kernels, name)(*arguments, backend=backend)
    return result[-1] if isinstance(result, tuple) else result


# What the public functions add before they call the operator.
EXTRA = {
    "embed_visible": (torch.float32,),
    "assemble_decoder_tokens": (),
    "layer_norm": (1e-6, torch.float32),
    "select_decoded": (None, 1e-6, torch.float32),
    "patch_loss": (True, 2),
    "head_patch_loss": (True, 2, torch.float32, True),
}


@pytest.mark.parametrize("name", sorted(TRITON_OPERATIONS))
def test_opcheck(name, device):
    """Schema, fake tensors, autograd registration, and ahead-of-time dispatch with dynamic shapes."""
    torch.library.opcheck(getattr(torch.ops.vmae, name).default, (*operands(device)[name], *EXTRA[name]))


@pytest.mark.parametrize("name", sorted(TRITON_OPERATIONS))
def test_autocast(name, device):
    """As F.linear: projections compute in autocast's dtype whatever the inputs', and gradients keep the
    inputs' dtype."""
    arguments = operands(device)[name]
    with torch.autocast(device, dtype=torch.bfloat16):
        result, expected = (last_result(name, arguments, backend) for backend in ("triton", "torch"))
    if name in ("embed_visible", "layer_norm", "select_decoded"):
        assert result.dtype == torch.bfloat16
    else:
        assert result.dtype == expected.dtype
    near = 2e-2 * expected.abs().max().item()
    torch.testing.assert_close(result.float(), expected.float(), rtol=2e-2, atol=near)
    result.backward(torch.randn_like(result))
    for argument in arguments:
        if argument.requires_grad:
            assert argument.grad.dtype == argument.dtype and torch.isfinite(argument.grad).all()


class Chain(torch.nn.Module):
    """All operations in the order of a pre-training step, with a stand-in for encoder and decoder."""

    def __init__(self, fused_head: bool, backend: str):
        super().__init__()
        total, values = GRID[0] * GRID[1] * GRID[2], 6 * PATCH * PATCH
        self.fused_head, self.backend = fused_head, backend
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, 3, 2, PATCH, PATCH) * 0.1)
        self.bias, self.pos = (
            torch.nn.Parameter(torch.randn(WIDTH)),
            torch.nn.Parameter(torch.randn(total, WIDTH)),
        )
        self.to_decoder, self.norm = torch.nn.Linear(WIDTH, DECODER), torch.nn.LayerNorm(DECODER, eps=1e-6)
        self.mask_token, self.head = (
            torch.nn.Parameter(torch.randn(1, 1, DECODER)),
            torch.nn.Linear(DECODER, values),
        )
        self.register_buffer("decoder_pos", torch.randn(1, total, DECODER))

    def forward(self, clips, visible, decode, keep, weight):
        backend = self.backend
        x = embed_visible(clips, visible, self.weight, self.bias, self.pos, backend=backend)
        x = assemble_decoder_tokens(
            self.to_decoder(x.tanh()), self.mask_token, self.decoder_pos, visible, decode, backend=backend
        )
        rows, x = select_decoded(x.tanh(), self.norm.weight, self.norm.bias, keep, backend=backend)
        x = x + rows
        if self.fused_head:
            return head_patch_loss(
                x, self.head.weight, self.head.bias, clips, decode, weight, backend=backend
            )
        return patch_loss(self.head(x), clips, decode, weight, backend=backend)


@pytest.mark.slow  # 4 s each
@pytest.mark.parametrize("fused_head, autocast", [(True, True), (True, False), (False, True), (False, False)])
def test_compiled_chain(fused_head, autocast, device):
    """torch.compile(fullgraph=True): no graph break, the same loss and gradients as eager, close to plain
    PyTorch's."""
    torch._dynamo.reset()
    arguments = operands(device)
    clips, visible = arguments["embed_visible"][:2]
    decode, weight = arguments["patch_loss"][2:]
    keep = torch.arange(4, 10, dtype=torch.int32, device=device).expand(2, 6).contiguous()
    chain = Chain(fused_head, "triton").to(device)

    def step(module):
        chain.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            loss = module(clips, visible, decode, keep, weight)
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in chain.parameters())]

    eager, compiled = step(chain), step(torch.compile(chain, fullgraph=True))
    chain.backend = "torch"
    plain = step(torch.compile(chain, fullgraph=True, backend="aot_eager"))
    rtol, atol = (5e-2, 2e-2) if autocast else (1e-4, 1e-5)
    for first, second, third in zip(eager, compiled, plain):
        torch.testing.assert_close(first, second, rtol=rtol, atol=atol)
        torch.testing.assert_close(first, third, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bad", [-1, 18])
@pytest.mark.parametrize(
    "name, position",
    [
        ("embed_visible", 1),
        ("assemble_decoder_tokens", 3),
        ("assemble_decoder_tokens", 4),
        ("select_decoded", 3),
        ("patch_loss", 2),
        ("head_patch_loss", 4),
    ],
)
def test_indices_out_of_range(name, position, bad, backend, device, monkeypatch):
    monkeypatch.setenv("VMAE_CHECK_INDICES", "1")
    arguments = list(operands(device)[name])
    arguments[position] = arguments[position].clone()
    arguments[position][1, 2] = bad
    with pytest.raises(ValueError, match="holds indices"):
        getattr(vmae_kernels, name)(*arguments, backend=backend)


def test_check_indices_says_what_is_valid():
    with pytest.raises(ValueError, match="visible holds indices 0 to 18; there are 18, so 0 to 17 are valid"):
        check_indices(torch.tensor([[0, 18]]), 18, "visible")
    check_indices(torch.tensor([[0, 17]]), 18, "visible")
    check_indices(torch.empty(2, 0), 18, "visible")


def vast(shape, stride_b, dtype, device):
    """Two clips' worth of memory `stride_b` elements apart; on a CPU, pages that nobody touches do not
    exist."""
    size = dtype.itemsize
    span = (
        stride_b
        + sum((side - 1) * step for side, step in zip(shape[1:], torch.empty(shape).stride()[1:]))
        + 1
    )
    if device == "cpu":
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, span * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        flat = torch.frombuffer(memory, dtype=dtype)
    else:
        if torch.cuda.mem_get_info()[0] < 2 * span * size:
            pytest.skip(f"needs {2 * span * size >> 30} GiB of free device memory")
        flat = torch.empty(span, dtype=dtype, device=device)
    return flat.as_strided(shape, (stride_b, *torch.empty(shape).stride()[1:]))


def test_batch_strides_over_2_31_elements(device):
    """64-bit address arithmetic: clips, encoded and hidden rows whose second clip lies beyond 2**31
    elements."""
    arguments = operands(device)
    clips, visible, weight, bias, pos = arguments["embed_visible"]
    far = vast(clips.shape, 2**31 + 64, torch.uint8, device)
    far.copy_(clips)
    with torch.no_grad():
        assert torch.equal(
            *(embed_visible(x, visible, weight, bias, pos, backend="triton") for x in (clips, far))
        )
    leaf = weight.detach().requires_grad_()
    grads = [
        torch.autograd.grad(
            embed_visible(x, visible, leaf, bias, pos, backend="triton").square().sum(), leaf
        )[0]
        for x in (clips, far)
    ]
    assert torch.equal(*grads)
    pixels, _, decode, token_weight = arguments["patch_loss"]
    losses = [patch_loss(pixels, x, decode, token_weight, backend="triton") for x in (clips, far)]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, pixels)[0] for loss in losses))
    rest = arguments["head_patch_loss"]
    assert torch.equal(*(head_patch_loss(*rest[:3], x, *rest[4:], backend="triton") for x in (clips, far)))

    for name in ("select_decoded", "assemble_decoder_tokens"):
        first, *others = (argument.detach() for argument in arguments[name])
        far = vast(first.shape, 2**31 + 64, torch.float32, device)
        far.copy_(first)
        near, far = first.requires_grad_(), far.requires_grad_()
        results = [last_result(name, (x, *others)) for x in (near, far)]
        assert torch.equal(*results)
        upstream = torch.randn_like(results[0])
        if name == "select_decoded":
            assert torch.equal(
                *(torch.autograd.grad(y, x, upstream)[0] for y, x in zip(results, (near, far)))
            )


def test_clip_that_32_bits_cannot_address():
    """One clip of 2**31 elements or more is refused, before anything is read."""
    clips = torch.empty(1, 2, 4, 4, 3, dtype=torch.uint8, device="meta").as_strided(
        (1, 2, 4, 4, 3), (0, 2**31, 12, 3, 1)
    )
    with pytest.raises(ValueError, match="spans 2\\*\\*31"):
        vmae_kernels.tubelets.clip_strides(clips)


@pytest.mark.parametrize("name", sorted(TRITON_OPERATIONS))
def test_empty_batch(name, device):
    arguments = operands(device, batch=0)[name]
    result = last_result(name, arguments)
    result.backward(torch.ones_like(result))
    for argument in arguments:
        if argument.requires_grad:
            assert argument.grad.shape == argument.shape
            assert (argument.grad == 0).all()


def test_backends(device):
    x = torch.zeros(1, device=device)
    assert resolve_backend("torch", "embed_visible", x) == "torch"
    assert resolve_backend("triton", "embed_visible", x, torch.bfloat16) == "triton"
    assert resolve_backend("auto", "embed_visible", x) == ("triton" if device == "cuda" else "torch")
    assert resolve_backend("auto", "embed_visible", x, torch.float64) == "torch"
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        resolve_backend("cuda", "embed_visible", x)
    with pytest.raises(ValueError, match="not torch.float64"):
        resolve_backend("triton", "embed_visible", x, torch.float64)
    with pytest.raises(NotImplementedError, match="no Triton kernel"):
        resolve_backend("triton", "attention", x)


def test_triton_on_a_cpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr("vmae_kernels.backend.INTERPRETING", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        resolve_backend("triton", "embed_visible", torch.zeros(1))


def test_nothing_saved_that_need_not_be(device):
    """What autograd keeps, by operation: never the clip or the weight of the embedding (but the visible
    pixels, a byte each), statistics of `select_decoded`, or the head's input."""
    arguments = operands(device)
    saved: list[torch.Tensor] = []
    expected = {
        "embed_visible": {1},
        "assemble_decoder_tokens": set(),
        "layer_norm": {0, 1},
        "select_decoded": {0, 1, 3},
        "patch_loss": {0, 1, 2, 3},
        "head_patch_loss": set(),
    }
    for name, kept in expected.items():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            getattr(vmae_kernels, name)(*arguments[name], backend="triton")
        pointers = {x.data_ptr() for x in saved}
        inputs = {i for i, x in enumerate(arguments[name]) if x.data_ptr() in pointers}
        assert inputs == kept, f"{name} saves its arguments {sorted(inputs)}"
        extra = sum(x.numel() for x in saved if x.data_ptr() not in {y.data_ptr() for y in arguments[name]})
        hidden, head = arguments["head_patch_loss"][:2]
        assert extra == {
            "layer_norm": 2 * 2 * 5,  # mean, and one over the deviation, of each row
            "embed_visible": 2 * 4 * 6 * PATCH * PATCH,
            "patch_loss": 1,
            "head_patch_loss": 1 + hidden.numel() + head.numel() + head.shape[0],
        }.get(name, 0)


def test_gathered_pixels_are_those_of_the_clip(device):
    """The reference's gather itself, on a clip whose values name their place."""
    clips = torch.arange(4 * 8 * 8 * 3, device=device).reshape(1, 4, 8, 8, 3).remainder(251).to(torch.uint8)
    token = gather_tubelets(clips, torch.tensor([[7]], device=device), 4, 2)[0, 0]
    assert torch.equal(token, clips[0, 2:4, 4:8, 4:8])
