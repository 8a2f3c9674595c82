"""torch.compile of blocks: where it can run, how it is set, and what it has compiled so far.

Blocks are compiled one by one. Blocks of the same widths, tokens and branches share one compilation: a model
without `lengths` needs four at most (encoder and decoder, each with the first block, which drops no branch,
and the others). All of torch that is private stands here (torch 2.11 to 2.13).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vmae_kernels.optional_triton import WHY_MISSING

BACKEND = "inductor"  # tests take one that writes no code
# Share of what torch's partitioner would keep for the fastest step that `--recompute budget` lets it keep.
# Counted (`bench/compiled_bytes.py`, table in docs/benchmarks.md): from 1 to 0.9 it gives up LayerNorm's and
# GELU's results and bfloat16 copies of weights, 0.65 x the bytes, and no matrix product runs again. Below it
# solves a knapsack, whose answer is sometimes larger.
MEMORY_BUDGET = 0.9

# Most graphs of the blocks' forward, which is one function to torch, for each shape of clips, and once
# more. A shape has up to five (encoder and decoder; the first block, others, the last), probes have
# theirs; torch's own limit is 8 for all.
GRAPHS = 8


def why_not_compiled(device: torch.device) -> str | None:
    """Reason why blocks are not compiled on `device` unless that is asked for; None where they are."""
    if device.type != "cuda":
        return "a GPU's speed is what it is for"
    if WHY_MISSING is not None:
        return WHY_MISSING
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else ["gcc", "clang", "cc"])):
        what = f"the C compiler CC={named}" if named else "a C compiler (gcc or clang)"
        return f"Triton needs {what}, which is not there"
    return None


def compile_forward(forward: Callable[..., Any], *, cuda_graphs: bool = False) -> Callable[..., Any]:
    """A block's compiled `forward`; shapes are constants (a second one is a second compilation).

    Without that, a second number of tokens (the decoder's) makes it a symbol, and so does FSDP2 for every
    dimension; the kernels then know no divisor of theirs.
    """
    mode = "reduce-overhead" if cuda_graphs else None
    return torch.compile(forward, dynamic=False, backend=BACKEND, mode=mode)


def set_compiler(recompute: str = "off", *, eager_random: bool = False, shapes: int = 1) -> None:
    """Set what torch.compile reads from this process when it compiles.

    Args:
        recompute: "on", "off" or "budget"; see `vmae.train.activations`.
        eager_random: draw random numbers by the kernels that draw them without it, so that dropout drops the
            same (stochastic depth does not, in either case: see `DropPath`).
        shapes: of clips that the blocks will see.
    """
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    torch._inductor.config.fallback_random = eager_random

    torch._dynamo.config.recompile_limit = GRAPHS * (shapes + 1)
    # It would cut blocks at DDP's buckets, which a step of whole blocks fills in time anyway.
    torch._dynamo.config.optimize_ddp = False
    # What is computed by hand again in the backward is the same expression to torch, which would keep the
    # first.
    torch._functorch.config.cse = recompute != "on"
    torch._functorch.config.activation_memory_budget = MEMORY_BUDGET if recompute == "budget" else 1.0


# --- What was compiled ---


@dataclass(frozen=True)
class Compilations:
    """Counts of this process since some start.

    Attributes:
        graphs: compiled.
        recompilations: of them, those of code that had been compiled for other values.
        breaks: places where a graph had to end early.
        failed: code that runs uncompiled after all, since a limit was hit or torch cannot trace it.
    """

    graphs: int = 0
    recompilations: int = 0
    breaks: int = 0
    failed: int = 0

    def __str__(self) -> str:
        text = f"{self.graphs} graphs, {self.recompilations} recompilations, {self.breaks} graph breaks"
        return f"{text}, {self.failed} not compiled" if self.failed else text


@dataclass
class CompileWatch:
    """What torch.compile does in this process from here on; torch._dynamo is not imported for it."""

    now: Compilations = field(default_factory=Compilations)

    def __post_init__(self) -> None:
        dynamo = sys.modules.get("torch._dynamo.utils")
        self._frames = 0 if dynamo is None else dynamo.counters["frames"]["total"]
        self._graphs, self._breaks = self._counters()
        self._first = (self._graphs, sum(self._breaks.values()))
        self._seen = self._entries()

    def look(self) -> list[str]:
        """Reasons of the breaks and failures that came since the last look; `now` is brought up to date.

        Where nothing was compiled, this costs a comparison.
        """
        dynamo = sys.modules.get("torch._dynamo.utils")
        if dynamo is None or dynamo.counters["frames"]["total"] == self._frames:
            return []
        self._frames = dynamo.counters["frames"]["total"]
        new = [entry for entry in self._entries() if not any(entry is seen for seen in self._seen)]
        self._seen += new
        failed = [entry for entry in new if entry.fail_type is not None]
        again = [entry for entry in new if entry.recompile_reason and entry.fail_type is None]
        before = self._breaks
        self._graphs, self._breaks = self._counters()
        self.now = Compilations(
            graphs=self._graphs - self._first[0],
            recompilations=self.now.recompilations + len(again),
            breaks=sum(self._breaks.values()) - self._first[1],
            failed=self.now.failed + len(failed),
        )
        broken = [reason for reason, count in self._breaks.items() if count > before.get(reason, 0)]
        return [
            *(
                f"a function runs uncompiled from here on: {_line(entry.fail_reason)}"
                + (f" ({_line(entry.recompile_reason)})" if entry.recompile_reason else "")
                for entry in failed
            ),
            *(f"a graph ends early: {_line(reason)}" for reason in broken),
        ]

    def _counters(self) -> tuple[int, dict[str, int]]:
        """Graphs, and breaks by reason, since the process began."""
        dynamo = sys.modules.get("torch._dynamo.utils")
        if dynamo is None:
            return 0, {}
        return dynamo.counters["stats"]["unique_graphs"], dict(dynamo.counters["graph_break"])

    def _entries(self) -> list[Any]:
        """torch's records of its latest compilations (64 at most), forwards and backwards."""
        dynamo = sys.modules.get("torch._dynamo.utils")
        return [] if dynamo is None else dynamo.get_compilation_metrics()


def _line(reason: str | None) -> str:
    return (reason or "not told").strip().splitlines()[0][:200]
