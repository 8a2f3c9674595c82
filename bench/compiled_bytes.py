"""What compiled blocks keep for their backward, counted from the graphs that torch's partitioner makes.

Needs no GPU, times nothing. Three ways (`--recompute`): LayerNorm's and GELU's results made again by hand,
kept as the partitioner likes, or kept within its memory budget. By hand counts only where torch does not
merge what is computed twice (`cse`): with it, the hand-made backward is the plain one, and keeps as much.

    python bench/compiled_bytes.py                  # ViT-B and ViT-g, bfloat16, 32 clips
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness.command import exit_code
from harness.progress import at
from harness.table import Table
from torch import Tensor, nn

from vmae import InputError, MaskConfig, ModelConfig
from vmae.config import PRESETS
from vmae.model.blocks import Block
from vmae.model.cost import token_counts
from vmae.train.activations import prepare_blocks
from vmae.train.compiled import MEMORY_BUDGET, set_compiler

WAYS = {
    "off": "plain modules",
    "budget": f"plain modules, memory budget {MEMORY_BUDGET:g}",
    "on": "by hand",
}


class _Counted(BaseException):
    """The graphs are made; nothing needs to run."""


@dataclass(frozen=True)
class Kept:
    """Bytes that a compiled block keeps: `fixed` (bfloat16 copies of weights), and more for each clip."""

    fixed: float
    per_clip: float


def saved_tensors(block: nn.Module, x: Tensor, dtype: str) -> dict[int, int]:
    """Bytes of each storage, by its key, that the partitioned forward of `block` keeps; parameters left out.

    Torch's configuration of this process decides (`set_compiler`).
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    found: dict[int, int] = {}
    assert all(p.shape != x.shape for p in block.parameters())  # the block's input is known by its shape

    def partition(joint: Any, inputs: Any, *, num_fwd_outputs: int, **more: Any) -> Any:
        forward, _ = min_cut_rematerialization_partition(
            joint, inputs, num_fwd_outputs=num_fwd_outputs, **more
        )
        outputs: Any = forward.graph.output_node().args[0]
        for node in outputs[num_fwd_outputs:]:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and (node.op != "placeholder" or value.shape == x.shape):
                storage = value.untyped_storage()
                found[storage._cdata] = storage.nbytes()
        raise _Counted

    torch.compiler.reset()
    decompositions = select_decomp_table()
    backend = aot_autograd(
        fw_compiler=None, bw_compiler=None, partition_fn=partition, decompositions=decompositions
    )
    compiled: Callable = torch.compile(block.forward, backend=backend, dynamic=False, fullgraph=True)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            compiled(x)
    except _Counted:
        return found
    raise AssertionError("the block was not partitioned")


def count_kept(
    config: ModelConfig, dim: int, heads: int, tokens: int, *, clips: int, dtype: str, recompute: str
) -> Kept:
    """What a compiled block of width `dim` keeps of clips of so many tokens; straight between half of `clips`
    and all of them."""
    block = Block(config, dim, heads, 0.0, attention="sdpa")
    prepare_blocks([block], recompute=recompute)
    set_compiler(recompute)

    def kept(count: int) -> int:
        x = torch.empty(count, tokens, dim, requires_grad=True)
        return sum(saved_tensors(block, x, dtype).values())

    few, many = kept(clips // 2), kept(clips)
    per_clip = (many - few) / (clips - clips // 2)
    return Kept(many - per_clip * clips, per_clip)


def rows_of(preset: str, clips: int, dtype: str) -> list[list[str]]:
    """A line of the table for each way."""
    config, size = ModelConfig.preset(preset), 2 if dtype == "bfloat16" else 4
    tokens = token_counts(config, MaskConfig())
    sides = (
        (config.embed_dim, config.num_heads, tokens.visible, config.depth),
        (
            config.decoder_embed_dim,
            config.decoder_num_heads,
            tokens.visible + tokens.decoded,
            config.decoder_depth,
        ),
    )
    lines = []
    for recompute, text in WAYS.items():
        at(f"partitioning {preset}, --recompute {recompute}")
        widths, per_clip, fixed = [], 0.0, 0.0
        for dim, heads, count, depth in sides:
            kept = count_kept(config, dim, heads, count, clips=clips, dtype=dtype, recompute=recompute)
            widths.append(f"{kept.per_clip / (count * dim * size):.2f}")
            per_clip, fixed = per_clip + depth * kept.per_clip, fixed + depth * kept.fixed
        mib = [f"{per_clip / 2**20:.1f}", f"{max(fixed, 0) / 2**20:.0f}"]
        lines.append([preset, recompute, text, *widths, *mib])
    return lines


def run(args: argparse.Namespace) -> int:
    if args.clips < 2:
        raise InputError("--clips must be at least 2")
    head = ["model", "--recompute", "how", "encoder, widths a token", "decoder, widths a token"]
    head += ["all blocks, MiB a clip", "and MiB whatever the clips"]
    lines = [line for preset in args.model for line in rows_of(preset, args.clips, args.dtype)]
    title = f"kept by compiled blocks, {args.dtype}, {args.clips} clips, torch {torch.__version__}; counted"
    table = Table(title, head, lines)
    print(table.to_markdown() if args.markdown else table.to_text())
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=list(PRESETS), default=["vit_b", "vit_g"])
    parser.add_argument("--clips", type=int, default=32, help="of a micro-batch (32): budgets depend on it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--markdown", action="store_true", help="the table of docs/benchmarks.md")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
