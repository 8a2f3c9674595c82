"""Which implementation an operation runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vmae_kernels import device

BACKENDS = ("auto", "torch", "triton")

# Operations with Triton kernels; the others run PyTorch whatever the device.
TRITON_OPERATIONS = frozenset(
    {"embed_visible", "assemble_decoder_tokens", "select_decoded", "patch_loss", "head_patch_loss"}
)

INTERPRETING = bool(device.INTERPRET.value)

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def resolve_backend(backend: str, operation: str, tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """"torch" or "triton" for one call of `operation` on `tensor`'s device, computing in `dtype` (None: any will do).

    "auto" is Triton on a GPU (ROCm's too), PyTorch elsewhere and in dtypes that the kernels do not have.

    Raises:
        ValueError: an unknown backend, or "triton" on a device or in a dtype where it cannot run.
        NotImplementedError: "triton" was named for an operation that has no kernel.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    available = operation in TRITON_OPERATIONS
    fits = dtype is None or dtype in TRITON_DTYPES
    if backend == "auto":
        return "triton" if available and fits and tensor.is_cuda else "torch"
    if backend == "triton":
        if not available:
            raise NotImplementedError(f"{operation} has no Triton kernel; use backend='torch' or 'auto'")
        if not fits:
            raise ValueError(f"{operation}: the Triton kernels compute in float32, bfloat16 or float16, not {dtype}")
        runs = not isinstance(tensor, FakeTensor)  # a fake one launches nothing: its step is counted, not computed
        if runs and not tensor.is_cuda and not INTERPRETING and device.BUILD_TARGET is None:
            raise ValueError(
                f"{operation}: backend='triton' needs a GPU, and the tensors are on {tensor.device}. Move them to a GPU, use "
                "backend='torch' or 'auto', or set TRITON_INTERPRET=1 before Python starts to interpret the kernels (slow)"
            )
    return backend
