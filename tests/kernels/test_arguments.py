"""Every tensor argument of every operation, found by their signatures: layout in memory, device, kind,
gradient."""

import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
from bounds import make_clips, tokens_of

import vmae_kernels
from vmae_kernels import device as kernel_device
from vmae_kernels import resolve_backend
from vmae_kernels.backend import OPERATIONS
from vmae_kernels.select_decoded import places_of

GRID, PATCH, WIDTH, DECODER = (2, 2, 3), 2, 8, 16
TOTAL, VALUES = 12, 6 * PATCH * PATCH


def call(name, backend, arguments):
    """The result, several ones of one shape as one tensor."""
    result = getattr(vmae_kernels, name)(**arguments, backend=backend)
    return torch.stack(result) if isinstance(result, tuple) else result


def operands(name, device, batch=2, shown=2, hidden=2, clips="uint8"):
    """Arguments of an operation by name, none of which needs a gradient."""

    def random(*shape):
        return torch.randn(*shape, device=device)

    visible, decode = tokens_of(batch, shown, TOTAL, device), tokens_of(batch, hidden, TOTAL, device)
    keep = tokens_of(batch, hidden, 8, device)
    loss = {"clips": make_clips(clips, batch, GRID, PATCH, 2, device), "decode": decode}
    loss |= {"weight": torch.rand(batch, hidden, device=device) + 0.1}
    return {
        "embed_visible": {
            "clips": loss["clips"],
            "visible": visible,
            "weight": random(WIDTH, 3, 2, PATCH, PATCH),
            "bias": random(WIDTH),
            "pos": random(1, TOTAL, WIDTH),
        },
        "assemble_decoder_tokens": {
            "encoded": random(batch, shown, DECODER),
            "mask_token": random(1, 1, DECODER),
            "pos": random(1, TOTAL, DECODER),
            "visible": visible,
            "decode": decode,
        },
        "layer_norm": {
            "x": random(batch, hidden, DECODER),
            "weight": random(DECODER),
            "bias": random(DECODER),
        },
        "select_decoded": {
            "hidden": random(batch, 8, DECODER),
            "weight": random(DECODER),
            "bias": random(DECODER),
            "keep": keep,
            "uses": places_of(keep, 8)[0],
        },
        "patch_loss": {"pixels": random(batch, hidden, VALUES), **loss},
        "head_patch_loss": {
            "hidden": random(batch, hidden, DECODER),
            "head_weight": random(VALUES, DECODER),
            "head_bias": random(VALUES),
            **loss,
        },
    }[name]


def tensor_arguments(name):
    parameters = inspect.signature(getattr(vmae_kernels, name)).parameters.values()
    return [parameter.name for parameter in parameters if "Tensor" in str(parameter.annotation)]


ARGUMENTS = [(name, argument) for name in sorted(OPERATIONS) for argument in tensor_arguments(name)]


def test_the_registry_is_complete():
    """All public functions with a backend are in it, with all their tensors; a new one can't be left out
    below."""
    public = {
        name
        for name in vmae_kernels.__all__
        if "backend" in inspect.signature(getattr(vmae_kernels, name)).parameters
    }
    assert public - {"resolve_backend"} == OPERATIONS.keys()
    for name, known in OPERATIONS.items():
        assert sorted(known.learned + known.constant + known.indices) == sorted(tensor_arguments(name))
        assert list(operands(name, "cpu")) == tensor_arguments(name)


# --- Layout in memory ---


def garbage(x):
    """Wrong values for the gaps between a tensor's values: NaN, or other valid integers."""
    if x.is_floating_point():
        return torch.full_like(x, float("nan"))
    return x.flip(-1).roll(1, 0)


def layouts(x):
    """(name, contiguous tensor, the same values in another layout)."""
    for dim in sorted(
        {0, 1, x.ndim - 1} & set(range(x.ndim))
    ):  # of a clip's five the ends and the second: a strided middle
        yield (
            f"every second place of dimension {dim}",
            x,
            torch.stack([x, garbage(x)], dim + 1).select(dim + 1, 0),
        )
        if x.shape[dim] > 1 and dim in (0, x.ndim - 1):
            expanded = x.narrow(dim, 0, 1).expand_as(x)
            yield f"expanded in dimension {dim}", expanded.contiguous(), expanded
    backwards = tuple(reversed(range(x.ndim)))
    yield "transposed", x, x.permute(backwards).contiguous().permute(backwards)
    flat = torch.cat([x.flatten()[:1], x.flatten()])
    yield "one element into its storage", x, flat[1:].view(x.shape)


def results(name, backend, arguments, upstream):
    """Result, and the gradients of all learned arguments."""
    leaves = {key: x.detach() for key, x in arguments.items()}  # detach keeps the layout
    for key in OPERATIONS[name].learned:
        leaves[key].requires_grad_()
    result = call(name, backend, leaves)
    return [result, *torch.autograd.grad(result, [leaves[key] for key in OPERATIONS[name].learned], upstream)]


def test_layouts_are_what_they_say():
    x = torch.randn(2, 3, 4)
    made = list(layouts(x))
    assert len(made) == 7 and all(
        torch.equal(plain, other) and plain.is_contiguous() for _, plain, other in made
    )
    assert [other.is_contiguous() for _, _, other in made] == [False] * 6 + [True]


def check_layouts(x, compute):
    """`compute` gives the same tensors for each layout of `x` as for its contiguous copy."""
    known = {}
    for layout, plain, other in layouts(x):
        if id(plain) not in known:
            known[id(plain)] = plain, compute(plain)
        assert all(map(torch.equal, compute(other), known[id(plain)][1])), layout


@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_any_layout_gives_the_same(name, argument, device):
    arguments = operands(name, device)
    upstream = torch.randn_like(call(name, "torch", arguments))
    check_layouts(
        arguments[argument], lambda x: results(name, "triton", {**arguments, argument: x}, upstream)
    )


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_any_layout_of_the_upstream_gradient_gives_the_same(name, device):
    arguments = operands(name, device)
    upstream = torch.randn_like(call(name, "torch", arguments))
    check_layouts(upstream, lambda x: results(name, "triton", arguments, x))


@pytest.mark.parametrize("name", [name for name in sorted(OPERATIONS) if "clips" in tensor_arguments(name)])
def test_any_layout_of_float_clips_gives_the_same(name, device):
    arguments = operands(name, device, clips="float")
    check_layouts(arguments["clips"], lambda x: [call(name, "triton", {**arguments, "clips": x})])


class Strided(torch.nn.Module):
    """An operation whose arguments become every second place of something larger inside the graph."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, arguments):
        gaps = {key: torch.stack([x, x.flip(0)], -1)[..., 0] for key, x in arguments.items()}
        return call(self.name, "triton", gaps)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_strided_arguments_pass_opcheck_and_compile(name, device):
    """Both ways into a kernel: the operator as it is, and out of a compiled graph without a break."""
    torch._dynamo.reset()
    arguments = operands(name, device)
    for key in OPERATIONS[name].learned:
        arguments[key].requires_grad_()
    result = call(name, "triton", arguments)
    upstream = torch.randn_like(result)
    learned = [arguments[key] for key in OPERATIONS[name].learned]
    expected = [result, *torch.autograd.grad(result, learned, upstream)]
    compiled = torch.compile(Strided(name), fullgraph=True, backend="aot_eager")(arguments)
    found = [compiled, *torch.autograd.grad(compiled, learned, torch.stack([upstream, upstream], -1)[..., 0])]
    assert all(map(torch.equal, expected, found))
    extra = {
        "embed_visible": (torch.float32,),
        "layer_norm": (1e-6, torch.float32),
        "select_decoded": (1e-6, torch.float32),
        "patch_loss": (True, 2),
    }
    extra["head_patch_loss"] = (True, 2, torch.float32, True)
    gaps = [
        torch.stack([x.detach(), x.detach()], -1)[..., 0].requires_grad_(x.requires_grad)
        for x in arguments.values()
    ]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        getattr(torch.ops.vmae, name).default, (*gaps, *extra.get(name, ())), test_utils=tests
    )


# --- Device, kind, gradient ---


@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_an_argument_on_another_device_is_named(name, argument, backend, device):
    arguments = operands(name, device)
    arguments[argument] = arguments[argument].to("meta")
    with pytest.raises(ValueError, match=rf"^{name}: .*\b{argument}\b.* must be on one device$"):
        call(name, backend, arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "name, argument", [(name, index) for name in sorted(OPERATIONS) for index in OPERATIONS[name].indices]
)
def test_indices_are_integers(name, argument, backend, device):
    """A boolean mask or a float would be read as indices 0 and 1."""
    arguments = operands(name, device)
    expected = call(name, backend, arguments)
    for dtype in (torch.int64, torch.uint8):
        assert torch.equal(
            call(name, backend, {**arguments, argument: arguments[argument].to(dtype)}), expected
        )
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(ValueError, match=f"{name}: {argument} must hold integers"):
            call(name, backend, {**arguments, argument: arguments[argument].to(dtype)})


@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_an_argument_of_another_precision_is_read_as_what_it_is(name, argument, device):
    """Never as the bits of another: bfloat16 values beside float32 ones give what the same values in float32
    do."""
    arguments = operands(name, device, clips="float")
    if arguments[argument].is_floating_point():
        half = arguments[argument].bfloat16()
        got, expected = (
            call(name, "triton", {**arguments, argument: x}).float() for x in (half, half.float())
        )
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_floating_point_argument_gets_its_gradient_or_is_refused(name, device):
    """PyTorch gives all (as finite differences say), so does "auto"; "triton" refuses those that it does not
    form."""
    arguments = operands(name, device, clips="float")
    exact = {key: x.double() if x.is_floating_point() else x for key, x in arguments.items()}
    upstream = torch.randn_like(call(name, "torch", exact))
    for key in [key for key, x in arguments.items() if x.is_floating_point()]:
        known = exact if "patch_loss" not in name else arguments  # targets are float32
        leaf = known[key].detach().clone().requires_grad_()
        for backend in ("torch", "auto"):
            result = call(name, backend, {**known, key: leaf})
            (grad,) = torch.autograd.grad(result, leaf, upstream.to(result.dtype))
            way, step = torch.randn_like(leaf), 1e-6 if leaf.dtype == torch.float64 else 1e-2
            with torch.no_grad():
                ends = [call(name, backend, {**known, key: leaf + sign * step * way}) for sign in (1, -1)]
            slope = ((ends[0] - ends[1]) * upstream).sum() / (2 * step)
            torch.testing.assert_close((grad * way).sum(), slope, rtol=0.02, atol=1e-3)
        leaf = arguments[key].detach().requires_grad_()
        if key in OPERATIONS[name].learned:
            assert call(name, "triton", {**arguments, key: leaf}).requires_grad
            continue
        with pytest.raises(
            ValueError, match=f"^{name}: {key} requires a gradient, which the Triton kernels do not form"
        ):
            call(name, "triton", {**arguments, key: leaf})
        with torch.no_grad():
            call(name, "triton", {**arguments, key: leaf})


@pytest.mark.parametrize(
    "name, argument", [(name, key) for name in sorted(OPERATIONS) for key in OPERATIONS[name].learned]
)
def test_no_second_gradient_is_lost_in_silence(name, argument, device):
    """It is right, as that of a sum is, or refused."""
    arguments = operands(name, device)
    leaf = arguments[argument].requires_grad_()

    def twice(backend):
        (grad,) = torch.autograd.grad(call(name, backend, arguments).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    try:
        found = twice("triton")
    except RuntimeError:
        return
    torch.testing.assert_close(found, twice("torch"))


def test_the_gradient_of_flat_float_clips_is_finite(device):
    arguments = operands("patch_loss", device, clips="float")
    arguments["clips"] = torch.full_like(arguments["clips"], 0.25).requires_grad_()
    call("patch_loss", "torch", arguments).backward()
    assert arguments["clips"].grad.isfinite().all()


@pytest.mark.parametrize("name, argument", [("embed_visible", "bias"), ("head_patch_loss", "head_bias")])
def test_a_bias_of_another_length_is_refused(name, argument, device):
    """The kernel would read past its end."""
    arguments = operands(name, device)
    with pytest.raises(ValueError, match="bias"):
        call(name, "triton", {**arguments, argument: arguments[argument][:1]})


@pytest.mark.parametrize("name", ["patch_loss", "head_patch_loss"])
def test_tokens_of_a_clip_are_one_dimension(name, device):
    arguments = operands(name, device, hidden=4)
    split = {
        key: arguments[key].unflatten(1, (2, 2))
        for key in ("decode", "weight", "pixels", "hidden")
        if key in arguments
    }
    with pytest.raises(ValueError, match="must all be"):
        call(name, "triton", {**arguments, **split})


# --- Nothing to do ---


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "counts", [dict(batch=0), dict(shown=0), dict(hidden=0), dict(shown=0, hidden=0)], ids=str
)
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_no_clip_and_no_token(name, counts, backend, device):
    """Both backends agree; a loss over nothing is NaN, all else has no value, and gradients are zeros."""
    arguments = operands(name, device, **counts)
    upstream = torch.randn_like(call(name, "torch", arguments))
    found, expected = (results(name, way, arguments, upstream) for way in (backend, "torch"))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)
    if counts.get("batch") == 0 or counts.get("hidden") == 0:
        assert not name.endswith("loss") or found[0].isnan()
    if not name.endswith("loss"):
        assert all(x.isfinite().all() for x in found)


# --- Where the kernels run ---


@pytest.mark.parametrize(
    "capability, hip, chosen",
    [
        ((7, 0), None, "torch"),
        ((7, 5), None, "torch"),
        ((8, 0), None, "triton"),
        ((8, 6), None, "triton"),
        ((12, 0), None, "triton"),
        ((9, 4), "7.2", "triton"),
        ((9, 0), "7.2", "triton"),
    ],
)
def test_auto_takes_no_triton_on_gpus_without_what_the_kernels_need(monkeypatch, capability, hip, chosen):
    """ROCm's gfx942 calls itself 9.4, gfx90a 9.0."""
    kernel_device._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float32)
    try:
        assert resolve_backend("auto", "embed_visible", gpu) == chosen
        assert resolve_backend("torch", "embed_visible", gpu) == "torch"
        if chosen == "triton":
            assert resolve_backend("triton", "embed_visible", gpu) == "triton"
        else:
            with pytest.raises(
                ValueError, match=rf"cuda:0 has compute capability 7\.{capability[1]}; before 8\.0 .*'auto'$"
            ):
                resolve_backend("triton", "embed_visible", gpu)
    finally:
        kernel_device._capability.cache_clear()


def test_the_capability_is_a_constant_of_a_compiled_graph(monkeypatch):
    """Asked for while tracing, with no break and no warning (a cached function alone gives one)."""
    torch._dynamo.reset()
    kernel_device._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    choose = torch.compile(
        lambda x: x + 1 if kernel_device.why_too_old(x.device) else x - 1, fullgraph=True, backend="eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(torch.zeros(1)) == 1
    kernel_device._capability.cache_clear()
