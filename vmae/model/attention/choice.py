"""The attention backends: what each needs, whether it runs here or why not, and which one `auto` takes.

One `AttentionBackend` per name, with one probe, which answers None (it runs) or the reason why not as text:
importable, version, device, dtype, head dim, dropout, training. Their calls are in `calls.py`.

Head dims 80 (ViT-H) and 88 (ViT-g): kernels work on tiles of fixed widths and multiply the padding too. Both
are multiples of 8, so no backend copies its inputs into wider ones (flash-attn and torch do that to other
head dims): padding costs FLOPs, no bytes. FLOPs of Q K^T and P V over the useful ones, from the kernels'
sources, not measured here:

| backend | tile widths | 64 | 80 | 88 |
|---|---|---|---|---|
| flash2, sdpa_flash on a GPU, varlen | 32, 64, 96, 128, 192, 256 | 1 | 96: 1.20 | 96: 1.09 |
| flash3 | 64, 96, 128, 192, 256 | 1 | 96: 1.20 | 96: 1.09 |
| flash4 | multiples of 16 forward (of 32 backward) | 1 | 80: 1 (96: 1.20) | 96: 1.09 (96: 1.09) |
| sdpa_efficient, CUTLASS in xformers | Q K^T 32s, P V 64 or 128 | 1 | 96 and 128: 1.40 | 96 and 128: 1.27 |
| sdpa_cudnn | not published | | | |
| sdpa_flash on a CPU, sdpa_math, softmax | none | 1 | 1 | 1 |
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import attention as torch_attention

from vmae.errors import InputError
from vmae.model.attention import calls, probes
from vmae.model.attention.probes import Workload

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AttentionBackend:
    """A way to compute attention.

    Attributes:
        name: of `--attention`.
        text: description in a few words.
        call: of `calls`, on equal sequences; None for packed sequences only.
        packed: of `calls`, on packed sequences; None where it has none.
        masks: `call` takes a key mask, so that packed sequences can be padded for it.
        matrix: forms the softmax matrix [B, H, N, N], and keeps it for the backward.
        probe: None, or the reason why it does not run.
        tiles: (head dim, on a GPU) -> widths in which Q K^T and P V are multiplied; None where that is not
            published.
        package: distribution that provides it, None where that is torch.
        install: how to get it.
        prepare: run once when it is chosen.
    """

    name: str
    text: str
    probe: Callable[[Workload], str | None]
    call: Callable | None = None
    packed: Callable | None = None
    masks: bool = False
    matrix: bool = False
    tiles: Callable[[int, bool], tuple[int, int] | None] = lambda head_dim, gpu: (head_dim, head_dim)
    package: str | None = None
    install: str | None = None
    prepare: Callable[[], None] | None = None

    def why_not(self, workload: Workload) -> str | None:
        """Reason why it does not run on `workload`, None if it does. Never raises."""
        if workload.packed and self.packed is None and not self.masks:
            return "takes no sequences of unequal lengths"
        if not workload.packed and self.call is None:
            return "for sequences of unequal lengths only"
        try:
            return self.probe(workload)
        except Exception as error:  # a broken installation may raise anything
            return f"its probe failed: {type(error).__name__}: {error}"

    def version(self) -> str | None:
        """Version of the providing package (torch's own for built-in kernels)."""
        if self.package is None:
            return torch.__version__
        return probes.installed_version(self.package)


def _up_to(*widths: int) -> Callable[[int, bool], tuple[int, int] | None]:
    def tiles(head_dim: int, gpu: bool) -> tuple[int, int] | None:
        width = next((w for w in widths if w >= head_dim), None)
        return None if width is None else (width, width)

    return tiles


_flash2_tiles = _up_to(32, 64, 96, 128, 192, 256)
_flash3_tiles = _up_to(64, 96, 128, 192, 256)


def _torch_flash_tiles(head_dim: int, gpu: bool) -> tuple[int, int] | None:
    return _flash2_tiles(head_dim, gpu) if gpu else (head_dim, head_dim)


def _flash4_tiles(head_dim: int, gpu: bool) -> tuple[int, int]:
    return (-(-head_dim // 16) * 16,) * 2


def _cutlass_tiles(head_dim: int, gpu: bool) -> tuple[int, int]:
    return -(-head_dim // 32) * 32, next((w for w in (64, 128) if w >= head_dim), -(-head_dim // 128) * 128)


def _torch_choice_tiles(head_dim: int, gpu: bool) -> tuple[int, int] | None:
    return None if gpu else (head_dim, head_dim)


def _unknown_tiles(head_dim: int, gpu: bool) -> None:
    return None


def _activate(number: int) -> Callable[[], None]:
    def activate() -> None:
        impl = f"FA{number}"
        if probes.replaced_flash() != impl:
            torch_attention.activate_flash_attention_impl(impl)
            logger.info("attention: torch's flash kernel is %s from here on, for the whole process", impl)
            choose.cache_clear()  # what sdpa_flash answered holds no more
            choose_name.cache_clear()

    return activate


_FLASH2 = dict(
    package="flash-attn", install="pip install flash-attn --no-build-isolation (2.7 or later; it compiles)"
)
_FLASH3 = dict(
    package="flash_attn_3", install="flash-attention's wheel for Hopper, or build its hopper/ folder"
)
_FLASH4 = dict(package="flash-attn-4", install="pip install flash-attn-4")
_XFORMERS = dict(package="xformers", install="pip install xformers (the release built for your torch)")

BACKENDS: dict[str, AttentionBackend] = {}


def _register(name: str, text: str, probe: Callable[[Workload], str | None], **settings) -> None:
    BACKENDS[name] = AttentionBackend(name=name, text=text, probe=probe, **settings)


_register(
    "flash2",
    "FlashAttention-2, packed in and out",
    probes.probe_flash2,
    call=calls.flash2,
    packed=calls.flash2_packed,
    tiles=_flash2_tiles,
    **_FLASH2,
)
_register(
    "flash3",
    "FlashAttention-3 (Hopper), packed in and out",
    probes.probe_flash3,
    call=calls.flash3,
    packed=calls.flash3_packed,
    tiles=_flash3_tiles,
    **_FLASH3,
)
_register(
    "flash4",
    "FlashAttention-4 (Hopper, Blackwell)",
    probes.probe_flash4,
    call=calls.flash4,
    packed=calls.flash4_packed,
    tiles=_flash4_tiles,
    **_FLASH4,
)
_register(
    "xformers",
    "xformers' choice of kernel",
    probes.probe_xformers,
    call=calls.xformers,
    packed=calls.xformers_packed,
    tiles=_cutlass_tiles,
    **_XFORMERS,
)
_register(
    "varlen",
    "torch's flash kernel on packed sequences",
    probes.probe_varlen,
    packed=calls.varlen,
    tiles=_flash2_tiles,
)
_register(
    "sdpa",
    "torch's choice of kernel",
    probes.probe_anywhere,
    call=calls.sdpa,
    masks=True,
    tiles=_torch_choice_tiles,
)
_register(
    "sdpa_flash",
    "torch's flash kernel",
    probes.probe_sdpa_flash,
    call=calls.sdpa_flash,
    masks=True,
    tiles=_torch_flash_tiles,
)
_register(
    "sdpa_flash3",
    "FlashAttention-3 in the place of torch's flash kernel",
    probes.probe_replaced_flash(3),
    call=calls.sdpa_flash,
    tiles=_flash3_tiles,
    prepare=_activate(3),
    **_FLASH3,
)
_register(
    "sdpa_flash4",
    "FlashAttention-4 in the place of torch's flash kernel",
    probes.probe_replaced_flash(4),
    call=calls.sdpa_flash,
    tiles=_flash4_tiles,
    prepare=_activate(4),
    **_FLASH4,
)
_register(
    "sdpa_cudnn",
    "cuDNN's kernel through torch",
    probes.probe_sdpa_cudnn,
    call=calls.sdpa_cudnn,
    masks=True,
    tiles=_unknown_tiles,
)
_register(
    "sdpa_efficient",
    "torch's CUTLASS kernel, float32 too",
    probes.probe_sdpa_efficient,
    call=calls.sdpa_efficient,
    masks=True,
    tiles=_cutlass_tiles,
)
_register(
    "sdpa_math",
    "torch's composed one, forms the softmax matrix",
    probes.probe_anywhere,
    call=calls.sdpa_math,
    masks=True,
    matrix=True,
)
_register(
    "softmax",
    "the plain one, forms the softmax matrix",
    probes.probe_anywhere,
    call=calls.softmax,
    masks=True,
    matrix=True,
)

NAMES = ("auto", *BACKENDS)

# What auto tries, fastest first, by device class and dtype; `sdpa` and `softmax` end every list, and what
# forms the softmax matrix comes last where sequences are long or padded.
#  Measured on one shared core of an AMD EPYC (AVX-512 bf16), torch 2.13, in turns, medians of ratios. A step
# of ViT-S, batch 4, dual masking: in float32 sdpa, which takes the flash kernel, is 1.18 x as fast as softmax
# (7 turns; 1.12 x another day); in bfloat16 softmax is 1.25 x as fast as sdpa (9 turns; 1.18 x another day).
# Attention alone, forward and backward, softmax against sdpa: in bfloat16 1.2 to 2.5 x at 160 tokens, 1.27 x
# at 944, 1.2 x at 1568; in float32 0.9, 0.6 and 0.64 x. A block of ViT-S then keeps more for each clip, in
# MiB: 0.2 at 160 tokens (6 heads), 4.7 at 944 (3 heads), 28 at 1568 (6 heads). There 12 blocks keep a third
# of a GiB a clip more, for 1.2 x of a part of the step: `LONG` sequences stay with sdpa. sdpa_flash is the
# same kernel; sdpa_math is 0.8 to 1.0 x.
MEASURED_ORDER: dict[tuple[str, torch.dtype], tuple[str, ...]] = {
    ("cpu", torch.float32): ("sdpa", "softmax"),
    ("cpu", torch.bfloat16): ("softmax", "sdpa"),
}
# Expected, measured by nobody in this project: no GPU has run these. On Hopper and Blackwell the kernels
# written for them come first (FlashAttention-3, arXiv 2407.08608; flash-attn-4's readme names both). On
# Blackwell torch's choice comes next, since flash2 has no kernel for it. Elsewhere flash2 comes before
# torch's choice: it writes one packed gradient, where the three that torch's kernels give are stacked, 6 B N
# H d elements of traffic, which counts at 160 tokens. xformers comes last: it dispatches to the same kernels,
# and its wheel has to fit torch's version. sdpa_flash3 and sdpa_flash4 change the whole process, so they have
# to be named.
EXPECTED_ORDER = {
    "sm_80": ("flash2", "sdpa", "xformers"),
    "sm_90": ("flash3", "flash4", "flash2", "sdpa", "xformers"),
    "sm_100": ("flash4", "sdpa", "flash2", "xformers"),
    "sm_110": ("flash4", "sdpa", "flash2", "xformers"),
    "sm_120": ("flash2", "sdpa", "xformers"),
    "hip": ("flash2", "sdpa", "xformers"),
}


def auto_order(workload: Workload) -> tuple[tuple[str, ...], bool]:
    """Names that `auto` tries, in order, and whether that order was measured on this class of device."""
    measured = MEASURED_ORDER.get((workload.device_class, workload.dtype))
    first = measured or EXPECTED_ORDER.get(workload.device_class, ())
    names = list(dict.fromkeys((*first, "sdpa", "softmax")))
    if workload.long or workload.packed:
        names.sort(key=lambda name: BACKENDS[name].matrix)
    if not workload.packed:
        return tuple(names), measured is not None
    # Padding costs the longest sequence for every one: it comes after what takes them as they are.
    ragged = [name for name in names if BACKENDS[name].packed is not None]
    return (*ragged, "varlen", *(name for name in names if name not in ragged)), False


def why_not(name: str, workload: Workload) -> str | None:
    """Reason why a backend does not run on `workload`, None if it does.

    Raises:
        InputError: an unknown name.
    """
    return backend_of(name).why_not(workload)


def backend_of(name: str) -> AttentionBackend:
    if name not in BACKENDS:
        raise InputError(f"unknown attention backend {name!r}; known: {', '.join(NAMES)}")
    return BACKENDS[name]


def runnable(workload: Workload) -> list[str]:
    return [name for name, backend in BACKENDS.items() if backend.why_not(workload) is None]


@functools.cache
def choose(name: str, workload: Workload) -> AttentionBackend:
    """The backend called `name`, or for "auto" the first of `auto_order` that runs; each workload is probed
    once.

    Raises:
        InputError: an unknown name, or one that does not run on `workload`: the message says why, and what
            would run. "auto" never raises.
    """
    if name != "auto":
        backend = backend_of(name)
        if reason := backend.why_not(workload):
            raise InputError(
                f"attention backend {name!r} cannot run ({workload}): {reason}. These can: "
                f"{', '.join(runnable(workload))}"
            )
    else:
        backend = _first_that_runs(workload)
    if backend.prepare is not None:
        backend.prepare()
    return backend


@functools.cache
def choose_name(
    name: str,
    device: str,
    index: int | None,
    dtype: torch.dtype,
    head_dim: int,
    training: bool,
    compiled: bool,
    long: bool,
    dropout: bool = False,
) -> str:
    """`choose(...).name` for equal sequences, from properties of a tensor: the only lookup of a step."""
    where = torch.device(device) if index is None else torch.device(device, index)
    workload = Workload.on(
        where,
        dtype=dtype,
        head_dim=head_dim,
        training=training,
        compiled=compiled,
        long=long,
        dropout=dropout,
    )
    return choose(name, workload).name


def _first_that_runs(workload: Workload) -> AttentionBackend:
    order, measured = auto_order(workload)
    refused = []
    for name in order:
        reason = BACKENDS[name].why_not(workload)
        if reason is None:
            break
        refused.append(f"{name}: {reason}")
    what = str(workload).replace(", training", "").replace(", inference", "")  # one line for both
    known = "measured" if measured else "expected, not measured"
    others = "".join(f"; not {text}" for text in refused)
    say_once(f"attention: auto takes {name} ({what}; order {known} on {workload.device_class}{others})")
    return BACKENDS[name]


@functools.cache
def say_once(text: str) -> None:
    """Log `text`, once in this process, by the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        logger.info(text)
