"""The paper's own table of what dual masking saves, beside what was measured here.

The gains and the forward MACs stand in VideoMAE V2, table 1. Its memory is given here as recalled (MB a clip,
on its A100s); it could not be read again, so every line that shows it says so.
"""

from __future__ import annotations

from typing import Any

from harness.common import print_table

NOTE = "paper, as recalled: VideoMAE V2, table 1"
TABLE = {
    "vit_b": {"speedup": 1.79, "memory_mb": (631, 328), "forward_gmacs": (35.48, 25.87)},
    "vit_g": {"speedup": 1.48, "memory_mb": (1753, 1050), "forward_gmacs": (263.93, 241.61)},
}


def compare_with_paper(
    model: str, records: list[dict[str, Any]], ratios: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """For each variant: dual over encoder-only masking here, in the paper, and the ratio of the two ratios.

    Speed-ups and memory ratios are None where nothing was timed. Empty for models that are not in the paper's
    table.
    """
    known = TABLE.get(model)
    if known is None:
        return []
    by_pair = {(r["variant"], r["baseline"]): r for r in ratios}
    lines = []
    for variant in dict.fromkeys(r["variant"] for r in records):
        ratio = by_pair.get((f"{variant} dual", f"{variant} encoder_only"))
        if ratio is None:
            continue
        speedup = ratio["speedup"]["median"] if "speedup" in ratio else None
        memory, paper_memory = ratio.get("memory"), known["memory_mb"][1] / known["memory_mb"][0]
        lines.append(
            {
                "model": model,
                "variant": variant,
                "source": NOTE,
                "speedup": speedup,
                "paper_speedup": known["speedup"],
                "speedup_over_paper": speedup and speedup / known["speedup"],
                "memory": memory,
                "paper_memory": paper_memory,
                "memory_over_paper": memory and memory / paper_memory,
                "saved_activations": ratio["saved_activations"],
                "macs": _macs(records, variant),
                "paper_macs": known["forward_gmacs"][1] / known["forward_gmacs"][0],
            }
        )
    return lines


def _macs(records: list[dict[str, Any]], variant: str) -> float:
    found = {r["masking"]: r["forward_macs_per_clip"] for r in records if r["variant"] == variant}
    return found["dual"] / found["encoder_only"]


def report_paper(lines: list[dict[str, Any]]) -> None:
    if not lines:
        return

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} x"

    print(f"\ndual over encoder-only masking, here and in the paper ({NOTE})")
    head = [
        "variant",
        "faster",
        "paper",
        "ours/paper",
        "memory",
        "paper",
        "ours/paper",
        "saved activations",
        "MACs",
        "paper",
    ]
    keys = ("speedup", "paper_speedup", "speedup_over_paper", "memory", "paper_memory", "memory_over_paper")
    keys += ("saved_activations", "macs", "paper_macs")
    print_table(head, [[line["variant"], *(number(line[key]) for key in keys)] for line in lines])
