"""Which implementation an operation runs, and what all operations ask of their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vmae_kernels import device
from vmae_kernels.optional_triton import WHY_MISSING

BACKENDS = ("auto", "torch", "triton")


@dataclass(frozen=True)
class Operation:
    """Tensor arguments of an operation with Triton kernels.

    Attributes:
        learned: the kernels form their gradients.
        constant: the kernels form none; where one is wanted, PyTorch does it.
        indices: of tokens or rows, integers.
    """

    learned: tuple[str, ...]
    constant: tuple[str, ...]
    indices: tuple[str, ...]


# The others run PyTorch whatever the device.
OPERATIONS = {
    "embed_visible": Operation(("weight", "bias", "pos"), ("clips",), ("visible",)),
    "assemble_decoder_tokens": Operation(("encoded", "mask_token"), ("pos",), ("visible", "decode")),
    "layer_norm": Operation(("x", "weight", "bias"), (), ()),
    "select_decoded": Operation(("hidden", "weight", "bias"), (), ("keep", "uses")),
    "patch_loss": Operation(("pixels",), ("clips", "weight"), ("decode",)),
    "head_patch_loss": Operation(("hidden", "head_weight", "head_bias"), ("clips", "weight"), ("decode",)),
}
TRITON_OPERATIONS = frozenset(OPERATIONS)

INTERPRETING = bool(device.INTERPRET.value)

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))


def resolve_backend(backend: str, operation: str, tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """ "torch" or "triton" for one call of `operation` on `tensor`'s device, computing in `dtype` (None: any
    will do).

    "auto" is Triton on a GPU (ROCm's too), PyTorch elsewhere, on GPUs before sm_80, in dtypes that the
    kernels do not have and where Triton is not installed.

    Raises:
        ValueError: an unknown backend, or "triton" without Triton, on a device or in a dtype where it cannot
            run.
        NotImplementedError: "triton" was named for an operation that has no kernel.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    available = operation in TRITON_OPERATIONS
    fits = dtype is None or dtype in TRITON_DTYPES
    runs = not isinstance(
        tensor, FakeTensor
    )  # a fake one launches nothing: its step is counted, not computed
    missing = WHY_MISSING if runs else None
    too_old = device.why_too_old(tensor.device) if runs and tensor.is_cuda and backend != "torch" else None
    if backend == "auto":
        able = available and fits and tensor.is_cuda and too_old is None and missing is None
        return "triton" if able else "torch"
    if backend == "triton":
        if not available:
            raise NotImplementedError(f"{operation} has no Triton kernel; use backend='torch' or 'auto'")
        if not fits:
            raise ValueError(
                f"{operation}: the Triton kernels compute in float32, bfloat16 or float16, not {dtype}"
            )
        if missing is not None:
            raise ValueError(f"{operation}: {missing}; use backend='torch' or 'auto'")
        if too_old is not None:
            raise ValueError(f"{operation}: {too_old}; use backend='torch' or 'auto'")
        if runs and not tensor.is_cuda and not INTERPRETING and device.BUILD_TARGET is None:
            raise ValueError(
                f"{operation}: backend='triton' needs a GPU, and the tensors are on {tensor.device}. Move "
                "them to a GPU, use "
                "backend='torch' or 'auto', or set TRITON_INTERPRET=1 before Python starts to interpret the "
                "kernels (slow)"
            )
    return backend


def backend_for(operation: str, backend: str, statistics: object) -> str:
    """`backend`, or "torch" in place of "auto" where clips have statistics of their own.

    Raises:
        ValueError: "triton" was named for such clips.
    """
    if statistics is None:
        return backend
    if backend == "triton":
        raise ValueError(
            f"{operation}: the Triton kernels read 3 channels with ImageNet's statistics, no clips of other "
            "channels, dtypes or statistics; use backend='torch' or 'auto'"
        )
    return "torch" if backend == "auto" else backend


def choose_backend(
    operation: str, backend: str, dtype: torch.dtype, tensors: Mapping[str, Tensor | None]
) -> str:
    """`resolve_backend` for a call with these arguments, the first of them a tensor, all on one device and of
    the right kind.

    Raises:
        ValueError: as `resolve_backend`; tensors on different devices; indices that are no integers; "triton"
            where a gradient is wanted that the kernels do not form ("auto" takes PyTorch then).
    """
    known = OPERATIONS[operation]
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given))
    place = given[first].device
    for name, tensor in given.items():
        if tensor.device != place:
            raise ValueError(
                f"{operation}: {name} is on {tensor.device}, but {first} on {place}; all must be on one "
                "device"
            )
    for name in known.indices:
        if name in given and given[name].dtype not in _INTEGERS:
            raise ValueError(f"{operation}: {name} must hold integers, not {given[name].dtype}")
    if backend != "torch" and torch.is_grad_enabled():
        for name in known.constant:
            if given[name].requires_grad:
                if backend == "triton":
                    raise ValueError(
                        f"{operation}: {name} requires a gradient, which the Triton kernels do not form; "
                        "detach it, or use "
                        "backend='torch' or 'auto'"
                    )
                backend = "torch" if backend == "auto" else backend
    return resolve_backend(backend, operation, given[first], dtype)
