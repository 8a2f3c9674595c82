"""Triton; where it is missing (macOS, Windows), just enough for the kernel files to be imported.

All operations then run in PyTorch. No kernel can be launched: `resolve_backend` refuses "triton" and gives
`WHY_MISSING` as the reason.
"""

from __future__ import annotations

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    WHY_MISSING: str | None = None
except ImportError as error:
    WHY_MISSING = f"the package triton cannot be imported: {error}"
    TensorDescriptor = None
    # What the kernel files evaluate when they are imported: decorators and constants.
    triton = SimpleNamespace(
        jit=lambda function: function, knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    )
    tl = SimpleNamespace(
        constexpr=lambda value: SimpleNamespace(value=value), float32=None, bfloat16=None, float16=None
    )


def triton_version() -> tuple[int, int]:
    """Major and minor number; (0, 0) without Triton."""
    major, minor, *_ = getattr(triton, "__version__", "0.0").split(".")
    return int(major), int(minor)


__all__ = ["WHY_MISSING", "TensorDescriptor", "tl", "triton", "triton_version"]
