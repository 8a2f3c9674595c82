"""Workloads of attention, and each backend's probe: None where it runs, else the reason why not, as text.

A probe looks at what is importable, its version, the device, dtype, head dim, dropout and training, in that
order. It takes a `Workload`, not tensors, so that it can be asked about devices that are not here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import attention as torch_attention

HALF = (torch.float16, torch.bfloat16)
LONG = 1280  # tokens; pre-training's sequences have fewer (ViT-g's decoder 1232), whole clips more (1568)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Device, dtype, head dim and use of one attention call; hashable, so that answers are cached.

    Attributes:
        device: torch's device type.
        index: of the device, where it has one.
        capability: compute capability of a CUDA device, else None.
        hip: an AMD GPU (torch calls it cuda too).
        dtype, head_dim: of qkv.
        training: a gradient is needed.
        dropout: on the softmax matrix (`--attn-drop`; no published script has any).
        compiled: inside torch.compile, where only what torch can trace runs.
        packed: sequences of unequal lengths.
        long: equal sequences of more than `LONG` tokens.
    """

    device: str = "cpu"
    index: int | None = None
    capability: tuple[int, int] | None = None
    hip: bool = False
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    training: bool = True
    dropout: bool = False
    compiled: bool = False
    packed: bool = False
    long: bool = False

    @classmethod
    def on(cls, device: torch.device | str, **settings) -> Workload:
        """The workload with what torch knows of `device` filled in."""
        device = torch.device(device)
        known: dict[str, Any] = {"device": device.type, "index": device.index}
        if device.type == "cuda" and torch.cuda.is_available():
            known |= {
                "capability": torch.cuda.get_device_capability(device),
                "hip": torch.version.hip is not None,
            }
        return cls(**known, **settings)

    @property
    def device_class(self) -> str:
        """Class of devices with similar speeds: cpu, sm_80, sm_90, ..., hip, or the device's type."""
        if self.device != "cuda" or self.hip or self.capability is None:
            return "hip" if self.hip else self.device
        return f"sm_{self.capability[0]}0"

    def __str__(self) -> str:
        device = self.device
        if self.capability is not None:
            device += f" sm_{self.capability[0]}{self.capability[1]}"
        parts = [device, str(self.dtype).removeprefix("torch."), f"head dim {self.head_dim}"]
        parts += ["training" if self.training else "inference"]
        parts += [name for name in ("dropout", "compiled", "packed", "long") if getattr(self, name)]
        return ", ".join(parts)


def installed_version(package: str, module: ModuleType | None = None) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(module, "__version__", None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.findall(r"\d+", version)[:3])


def lacks_package(
    module_name: str, package: str, functions: tuple[str, ...], minimum: str | None = None
) -> str | None:
    """Reason why `functions` of a module cannot be used (not installed, broken, too old, without them); None
    where they can."""
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # flash_attn.cute lives in the namespace of flash_attn: any part of the name may be what is missing.
        if error.name and module_name.startswith(error.name):
            return f"{package} is not installed"
        return f"{package} does not import: {error}"
    except Exception as error:  # a library built for another torch: ImportError, OSError, RuntimeError ...
        return f"{package} does not import: {(str(error).splitlines() or [type(error).__name__])[0]}"
    version = installed_version(package, module)
    if minimum and version and _numbers(version) < _numbers(minimum):
        return f"{package} {version} is too old: {minimum} or later"
    missing = [name for name in functions if not hasattr(module, name)]
    if missing and version is None:
        return f"{package} is not installed"
    return f"{package} {version} has no {missing[0]}" if missing else None


def lacks_gpu(
    workload: Workload, least: tuple[int, int] = (8, 0), majors: tuple[int, ...] = (), nvidia: bool = True
) -> str | None:
    """Reason why the device is not a GPU of compute capability `least` or later (and of one of `majors`, if
    any are given); None where it is."""
    if workload.device != "cuda":
        return f"runs on a GPU, not on {workload.device}"
    if workload.hip:
        return "runs on NVIDIA GPUs only" if nvidia else None
    if workload.capability is None:
        return "torch sees no GPU here"
    major, minor = workload.capability
    if workload.capability < least:
        return f"needs compute capability {least[0]}.{least[1]} or later, this GPU has {major}.{minor}"
    if majors and major not in majors:
        return (
            f"needs compute capability {' or '.join(f'{m}.x' for m in majors)}, this GPU has {major}.{minor}"
        )
    return None


def lacks_shape(workload: Workload, largest: int = 256, dtypes: tuple[torch.dtype, ...] = HALF) -> str | None:
    """Reason why the dtype or the head dim does not fit a flash kernel; None where both do."""
    if workload.dtype not in dtypes:
        known = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"takes {known}, not {str(workload.dtype).removeprefix('torch.')}"
    if workload.head_dim > largest or workload.head_dim % 8:
        return f"takes head dims that are multiples of 8, up to {largest}, not {workload.head_dim}"
    return None


def _no_dropout(workload: Workload) -> str | None:
    return "has no dropout" if workload.dropout else None


def probe_anywhere(workload: Workload) -> str | None:
    return None


def probe_flash2(workload: Workload) -> str | None:
    both = ("flash_attn_qkvpacked_func", "flash_attn_kvpacked_func")
    functions = (*both, "flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func")
    # 2.7 registered its kernels as torch operators, which torch.compile needs.
    reason = lacks_package("flash_attn", "flash-attn", functions, "2.7")
    return reason or lacks_gpu(workload, nvidia=False) or lacks_shape(workload)


def probe_flash3(workload: Workload) -> str | None:
    functions = ("flash_attn_qkvpacked_func", "flash_attn_func", "flash_attn_varlen_func")
    reason = lacks_package("flash_attn_interface", "flash_attn_3", functions)
    reason = reason or lacks_gpu(workload, majors=(9,)) or lacks_shape(workload) or _no_dropout(workload)
    if reason is None and workload.compiled:
        forward = getattr(importlib.import_module("flash_attn_interface"), "_flash_attn_forward", None)
        if not isinstance(forward, torch.library.CustomOpDef):
            return "this build does not register its kernels as torch operators, which torch.compile needs"
    return reason


def probe_flash4(workload: Workload) -> str | None:
    functions = ("flash_attn_func", "flash_attn_varlen_func")
    reason = lacks_package("flash_attn.cute", "flash-attn-4", functions) or lacks_gpu(
        workload, majors=(9, 10, 11)
    )
    largest = 128 if workload.capability and workload.capability[0] >= 10 else 256
    reason = reason or lacks_shape(workload, largest) or _no_dropout(workload)
    if reason is None and workload.compiled:
        return (
            "torch.compile cannot trace it (sdpa_flash4 calls the same kernels through torch, which it can)"
        )
    return reason


def probe_xformers(workload: Workload) -> str | None:
    reason = lacks_package("xformers.ops", "xformers", ("memory_efficient_attention", "fmha"), "0.0.35")
    reason = (
        reason
        or lacks_gpu(workload, (7, 0), nvidia=False)
        or lacks_shape(workload, 512, (*HALF, torch.float32))
    )
    if reason is None:
        fmha = importlib.import_module("xformers.ops").fmha
        kernels = [
            getattr(getattr(fmha, name, None), "FwOp", None) for name in ("flash", "flash3", "cutlass", "ck")
        ]
        if not any(kernel is not None and kernel.is_available() for kernel in kernels):
            return f"its compiled kernels do not load with torch {torch.__version__}"
    return reason


def _torch_refuses(question: Callable[[Any, bool], bool], workload: Workload) -> str | None:
    """torch's own answer for a tiny tensor of the workload on its GPU; its reasons come as warnings."""
    with unset_fake_temporarily(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = "" if workload.index is None else f":{workload.index}"
        device = torch.device(f"{workload.device}{index}")
        q = torch.empty(
            1, 1, 8, workload.head_dim, dtype=workload.dtype, device=device, requires_grad=workload.training
        )
        mask = torch.ones(1, 1, 1, 8, dtype=torch.bool, device=device) if workload.packed else None
        params = torch.backends.cuda.SDPAParams(q, q, q, mask, 0.1 * workload.dropout, False, False)
        if question(params, True):
            return None
    reasons = [str(warning.message).split(" (Triggered internally")[0].strip() for warning in caught]
    return f"torch says: {'; '.join(reasons) or 'no (and no reason)'}"


def replaced_flash() -> str | None:
    """Name of the kernels (FA3, FA4) that this process has put in the place of torch's flash kernel; None
    where it is torch's own."""
    return getattr(torch_attention, "current_flash_attention_impl", lambda: None)()


def probe_sdpa_flash(workload: Workload) -> str | None:
    other = replaced_flash()
    if other is not None:
        return f"this process has put {other} in its place (sdpa_flash{other[-1]})"
    if workload.device == "cpu":
        return _no_dropout(workload)
    return lacks_gpu(workload, nvidia=False) or _torch_refuses(
        torch.backends.cuda.can_use_flash_attention, workload
    )


def probe_sdpa_cudnn(workload: Workload) -> str | None:
    return lacks_gpu(workload) or _torch_refuses(torch.backends.cuda.can_use_cudnn_attention, workload)


def probe_sdpa_efficient(workload: Workload) -> str | None:
    reason = lacks_gpu(workload, (5, 0), nvidia=False)
    return reason or _torch_refuses(torch.backends.cuda.can_use_efficient_attention, workload)


def probe_replaced_flash(number: int) -> Callable[[Workload], str | None]:
    """Probe of flash-attention 3 or 4 in the place of torch's own flash kernel (torch 2.11 and later)."""
    impl = f"FA{number}"

    def probe(workload: Workload) -> str | None:
        known: Collection[str] = getattr(torch_attention, "list_flash_attention_impls", tuple)()
        if impl not in known:
            return f"torch {torch.__version__} knows no {impl}"
        active = replaced_flash()
        if active not in (None, impl):
            return f"this process has put {active} in the place of torch's flash kernel"
        return (probe_flash3 if number == 3 else probe_flash4)(replace(workload, compiled=False))

    return probe


def probe_varlen(workload: Workload) -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen_attn"
    return lacks_gpu(workload) or lacks_shape(workload) or _no_dropout(workload)
