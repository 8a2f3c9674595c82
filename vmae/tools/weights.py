"""`python -m vmae weights [WORD ...]`: the published weights as a table, and how to get each; `python -m vmae
weights inspect FILE`: what a checkpoint is, what it fits, and what becomes of every tensor of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from vmae.checkpoint.catalogue import Weights, find_published
from vmae.checkpoint.inspection import Inspection, inspect_weights, rows_of
from vmae.config import StartSettings
from vmae.errors import InputError
from vmae.flags import add_settings

INSPECT = "inspect"
_SHOWN_MISFITS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="show published weights with all these words, such as `vit_b k710`; or `inspect` and a file, a "
        "folder or a name of the hub",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    look = parser.add_argument_group("inspect")
    look.add_argument("--keys", action="store_true", help="a line for every tensor, not for every kind of it")
    look.add_argument(
        "--averaged", action="store_true", help="the averaged weights of a run (finetune --ema)"
    )
    add_settings(look, StartSettings, "model init_frames init_size")
    _let_words_follow_flags(parser)


def _let_words_follow_flags(parser: argparse.ArgumentParser) -> None:
    """`inspect --keys FILE` too: argparse takes words of one argument in one row only."""
    parse = parser.parse_known_args

    def parse_all(*given: Any, **named: Any) -> tuple[argparse.Namespace, list[str]]:
        found, rest = parse(*given, **named)
        found.words += [word for word in rest if not word.startswith("-")]
        return found, [word for word in rest if word.startswith("-")]

    parser.parse_known_args = parse_all  # type: ignore[method-assign, assignment]


def run(args: argparse.Namespace) -> int | None:
    """Run the command; the exit code is 1 where no published weights have the words."""
    if args.words[:1] == [INSPECT]:
        if len(args.words) != 2:
            raise InputError("`vmae weights inspect` takes one file, folder or name of the hub")
        found = inspect_weights(
            args.words[1],
            preset=args.model,
            frames=args.init_frames,
            size=args.init_size,
            averaged=args.averaged,
        )
        print(json.dumps(as_json(found), indent=1) if args.json else "\n".join(report(found, args.keys)))
        return 0
    weights = find_published(args.words)
    if args.json:
        print(json.dumps([dataclasses.asdict(one) for one in weights], indent=1))
    else:
        print("\n".join(table(weights, args.words)))
    return 0 if weights else 1


# --- the published weights ----------------------------------------------------------------------------------


def table(weights: Sequence[Weights], words: Sequence[str]) -> list[str]:
    """Lines of the table of published weights."""
    if not weights:
        return [f"no published weights have the words {' '.join(words)}; `vmae weights` lists all"]
    lines = ["Published weights. Accuracy and size are published, not verified here; - is not known."]
    for family in dict.fromkeys(one.family for one in weights):
        own = [one for one in weights if one.family == family]
        header = ("name", "model", "kind", "data", "epochs", "top-1 / 5", "views", "size", "licence")
        rows = [header, *map(_cells, own)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines += ["", family]
        for row, one in zip(rows, (None, *own)):
            lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
            if one is not None:
                lines.append(f"      get: {one.get}" + (f" ({one.note})" if one.note else ""))
    lines += ["", "A `hub:` name goes where a checkpoint goes: --init, --checkpoint, vmae.load(...)."]
    return lines


def _cells(one: Weights) -> tuple[str, ...]:
    scores = "-"
    if one.top1 is not None:
        scores = f"{one.top1} / {'-' if one.top5 is None else one.top5}"
    return tuple(
        "-" if value is None else str(value)
        for value in (
            one.name,
            one.model,
            one.kind,
            one.data,
            one.epochs,
            scores,
            one.views,
            one.size,
            one.licence,
        )
    )


# --- one checkpoint -----------------------------------------------------------------------------------------


def report(found: Inspection, all_keys: bool = False) -> list[str]:
    """Lines on a checkpoint."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    where = f", under {found.place}" if found.place else ""
    lines = [
        f"{found.path}",
        f"  {found.what}",
        f"  {found.format}{where}: {found.tensors} tensors ({dtypes}), {found.parameters:,} parameters, "
        f"{found.bytes / 1e6:,.1f} MB",
        *(f"  {line}" for line in found.changes),
        *(f"  beside them: {line}" for line in found.beside),
    ]
    lines += ["architecture", *(f"  {line}" for line in _architecture(found))]
    lines += [f"  {line}" for line in found.note.splitlines()]
    lines += ["what can be done with it"]
    width = max(len(use.command) for use in found.uses)
    lines += [f"  {use.command:{width}}  {'yes' if use.works else 'no '}  {use.why}" for use in found.uses]
    fates = {
        fate: sum(key.fate == fate for key in found.keys)
        for fate in dict.fromkeys(k.fate for k in found.keys)
    }
    lines += ["tensors: " + ", ".join(f"{count} {fate}" for fate, count in fates.items())]
    for row in found.keys if all_keys else rows_of(found.keys):
        join = {"loaded": "; ", "dropped": ": ", "unknown": ": "}.get(row.fate, " ")
        detail = f"{join}{row.detail}" if row.detail else ""
        lines.append(f"  {row.name} {list(row.shape)} {row.dtype} -> {row.fate}{detail}")
    if found.missing:
        some = ", ".join(found.missing[:8]) + (" ..." if len(found.missing) > 8 else "")
        lines.append(f"  missing, the model has them: {len(found.missing)} ({some})")
    return lines


def _architecture(found: Inspection) -> list[str]:
    shown = ", ".join(f"{name} {value}" for name, value in found.shown.items()) or "nothing"
    lines = [f"its shapes show {shown}"]
    if found.config is not None:
        config = found.config
        height, width = config.image_hw
        lines.append(
            f"held against a width of {config.embed_dim}, {config.depth} blocks, {config.num_heads} heads, "
            f"clips of {config.num_frames} frames of {height} x {width}"
        )
    fitting = [fit.preset for fit in found.fits if not fit.differs]
    if fitting:
        return [*lines, f"fits {', '.join(fitting)}"]
    lines.append("fits no preset as it is; the nearest:")
    return lines + [f"  {fit.preset}: {', '.join(fit.differs)}" for fit in found.fits[:_SHOWN_MISFITS]]


def as_json(found: Inspection) -> dict[str, Any]:
    """Plain containers of an inspection."""
    values = {
        item.name: getattr(found, item.name) for item in dataclasses.fields(found) if item.name != "extra"
    }
    values["path"] = str(found.path)
    values["config"] = None if found.config is None else found.config.to_dict()
    for name in ("fits", "uses", "keys"):
        values[name] = [dataclasses.asdict(one) for one in values[name]]
    return values
